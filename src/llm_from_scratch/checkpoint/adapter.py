"""The base of an adapter: the model that it was trained on, known by the hash of its weights and by its place."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PATH = 4096  # characters
MAX_RANK = 1 << 20


@dataclass(frozen=True)
class Base:
    """Content of adapter.json: how to merge the adapter, and into what."""

    rank: int
    scale: float
    """Factor of B A (see core/adapters.py)."""
    sha256: str
    """weights_hash() of the base."""
    path: str
    """The base in init_from: a name, or an absolute path of a folder or file."""
    near: str | None = None
    """The path from the run's folder, for runs that are moved together with their base."""

    def places(self, out_dir: Path) -> list[str]:
        """Where the base may be. out_dir: the folder of the adapter's run."""
        near = [] if self.near is None else [os.path.normpath(out_dir / self.near)]
        return list(dict.fromkeys([self.path, *near]))


def read_base(raw: dict[str, Any], where: str) -> Base:
    """The base in an adapter.json that is not trusted. Raises DamagedError."""
    names = [item.name for item in dataclasses.fields(Base)]
    rank, scale, digest, path, near = (raw.get(name) for name in names)
    texts = [digest, path] + [near] * (near is not None)
    good = all(isinstance(text, str) and text.isprintable() and 0 < len(text) <= MAX_PATH for text in texts)
    good = good and type(rank) is int and 0 < rank <= MAX_RANK and type(scale) is float and math.isfinite(scale)
    if not good or set(raw) != set(names):
        raise DamagedError(f"{where}: adapter.json does not describe an adapter")
    return Base(**raw)


def weights_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 of the names, shapes and numbers (as float32) of a state dict, the same for every file format."""

    def digest(name: str) -> bytes:
        tensor = state[name]  # perhaps read from disk: one per thread in memory
        numbers = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().reshape(-1)
        head = f"{name} {tuple(tensor.shape)} {numbers.dtype} ".encode()
        content: Any = numbers.numpy()
        return hashlib.sha256(head + hashlib.sha256(content).digest()).digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves the interpreter free
        return hashlib.sha256(b"".join(pool.map(digest, sorted(state)))).hexdigest()


def base_of(state: dict[str, Tensor], found: Path | None, name: str, out_dir: Path, rank: int, scale: float) -> Base:
    """The base of a new adapter. found: where its weights were found; name: what init_from named."""
    if found is None or not found.exists():  # a name of a hub
        return Base(rank, scale, weights_hash(state), name)
    path = found.resolve()
    return Base(rank, scale, weights_hash(state), str(path), os.path.relpath(path, out_dir.resolve()))
