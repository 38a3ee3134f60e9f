"""Tensors that several files hold together: each file has whole tensors, and parts that name their place.

A file of N is named model-00001-of-0000N.safetensors. The entry "parts" of its header's metadata is JSON,
{tensor: [dim, begin, size]}: the file holds tensor.narrow(dim, begin, ...) of a tensor with `size` along this dim.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine.files import parse_json

if TYPE_CHECKING:
    from torch import Tensor

SHARD = re.compile(r"(model|adapter|optimizer)-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Place:
    """Where a part of a tensor belongs."""

    dim: int
    begin: int
    size: int
    """Size of the whole tensor along dim."""


def file_name(kind: str, rank: int, ranks: int) -> str:
    """The file that a process writes."""
    return f"{kind}.safetensors" if ranks == 1 else f"{kind}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def files_of(kind: str, names: Iterable[str]) -> list[str]:
    """The files of a kind among the names in a manifest."""
    found = sorted(name for name in names if SHARD.fullmatch(name) and name.startswith(f"{kind}-"))
    return found or [f"{kind}.safetensors"]


def metadata_of(places: dict[str, Place]) -> dict[str, str]:
    """The metadata of a file with these parts."""
    return {"parts": json.dumps({name: astuple(place) for name, place in places.items()})} if places else {}


def places_in(data: bytes) -> dict[str, Place]:
    """The places in a file's header. Raises ValueError."""
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return places_of(header.get("__metadata__"))


def places_of(metadata: dict[str, str] | None) -> dict[str, Place]:
    """The places in the metadata of a file. Raises ValueError."""
    parts = parse_json((metadata or {}).get("parts", "{}").encode())
    for numbers in parts.values():
        if len(numbers) != 3 or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"invalid shard offset {numbers}")
    return {name: Place(*numbers) for name, numbers in parts.items()}


class Joined:
    """Whole tensors, put together from files."""

    def __init__(self, limit: int):
        """limit: bytes of all files together; no tensor has more."""
        self.limit = limit
        self.tensors: dict[str, Tensor] = {}
        self._parts: dict[str, list[tuple[int, int, int]]] = {}  # dim, begin, end

    def add(self, tensors: dict[str, Tensor], places: dict[str, Place]) -> None:
        """Adds the content of a file. Raises ValueError if it does not fit the others."""
        for name, part in tensors.items():
            if name in places:
                self._add_part(name, part, places[name])
            elif name in self.tensors:
                raise ValueError(f"{name} is in two files")
            else:
                self.tensors[name] = part

    def _add_part(self, name: str, part: Tensor, place: Place) -> None:
        shape: list[Any] = list(part.shape)
        if place.dim >= len(shape):
            raise ValueError(f"{name} lacks dimension {place.dim}")
        begin, end = place.begin, place.begin + shape[place.dim]
        shape[place.dim] = place.size
        if name not in self._parts and name not in self.tensors:
            if math.prod(shape) * part.element_size() > self.limit:
                raise ValueError(f"{name} is larger than the files")
            self.tensors[name], self._parts[name] = part.new_empty(shape), []
        whole = self.tensors[name]
        if name not in self._parts or list(whole.shape) != shape or whole.dtype != part.dtype or end > place.size:
            raise ValueError(f"the parts of {name} do not fit together")
        whole.narrow(place.dim, begin, end - begin).copy_(part)
        self._parts[name].append((place.dim, begin, end))

    def whole(self) -> dict[str, Tensor]:
        """The tensors. Raises ValueError if parts are missing or overlap."""
        for name, parts in self._parts.items():
            reached = 0
            for dim, begin, end in sorted(parts):
                if begin != reached or dim != parts[0][0]:
                    raise ValueError(f"parts of {name} are missing")
                reached = end
            if reached != self.tensors[name].shape[parts[0][0]]:
                raise ValueError(f"parts of {name} are missing")
        return self.tensors


class OnDisk(Mapping[str, "Tensor"]):
    """The tensors of files that have been verified. Each is read when it is asked for, so a process that needs some
    rows of every tensor has one whole tensor in memory at a time."""

    def __init__(self, folder: Path, names: list[str], size: int):
        """size: bytes of all files. Raises ValueError if parts are missing or do not fit together."""
        import torch
        from safetensors import safe_open

        from ..core.weights import STORED

        types = {stored: getattr(torch, name.removeprefix("torch.")) for name, stored in STORED.items()}
        self.size, self._files = size, dict[str, list[tuple[Any, dict[str, Place]]]]()
        joined = Joined(size)
        for name in names:
            file = safe_open(folder / name, "pt")
            places, shapes = places_of(file.metadata()), dict[str, Any]()
            for key in file.keys():
                part = file.get_slice(key)
                shapes[key] = torch.empty(part.get_shape(), dtype=types[part.get_dtype()], device="meta")
                self._files.setdefault(key, []).append((file, places))
            joined.add(shapes, places)
        self.meta = joined.whole()
        """Shapes and types of the tensors, without values."""
        self.other_names: dict[str, str] = {}
        """Further names of tensors, and the names in the files."""

    def __getitem__(self, name: str) -> Tensor:
        name, joined = self.other_names.get(name, name), Joined(self.size)
        for file, places in self._files[name]:
            joined.add({name: file.get_tensor(name)}, places)
        return joined.whole()[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.meta, *self.other_names])

    def __len__(self) -> int:
        return len(self.meta) + len(self.other_names)


class SlotsOnDisk(Mapping[str, Any]):
    """The optimizer's state of a parameter: numbers, and tensors on disk."""

    def __init__(self, name: str, slots: dict[str, Any], tensors: OnDisk):
        """slots: with tensors of any content."""
        self.name, self.slots, self.tensors = name, slots, tensors

    def __getitem__(self, slot: str) -> Any:
        value = self.slots[slot]
        return self.tensors[f"{self.name}/{slot}"] if hasattr(value, "detach") else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)
