"""A GGUF file's entries and tensors. The file is not trusted: counts are compared with its size before memory is used,
and tensors are read one at a time. Format: github.com/ggml-org/ggml, docs/gguf.md."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_HEADER, MAX_VALUES = 256 << 20, 1 << 22  # bytes, and values in lists: a vocabulary of 500,000 has two million
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
CHUNK = 1 << 20  # numbers that are dequantized at once


class Stored(NamedTuple):
    """Where a tensor is, and its type's number in ggml."""

    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFFile:
    """entries: {key: number, text or list}. Raises ValueError for a file that is damaged or not GGUF."""

    def __init__(self, path: Path):
        self.path, self.entries, self.tensors = path, dict[str, Any](), dict[str, Stored]()
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.left = min(self.size, MAX_HEADER)
            self.values = MAX_VALUES
            self._read(file.read)

    def _read(self, read: Callable[[int], bytes]) -> None:
        from gguf.constants import GGML_QUANT_SIZES

        def take(size: int) -> bytes:
            self.left -= size
            data = read(size) if self.left >= 0 else b""
            if len(data) != size:
                raise ValueError("its header is cut off or too large")
            return data

        def number(letter: str) -> Any:
            return struct.unpack("<" + letter, take(struct.calcsize("<" + letter)))[0]

        def text() -> str:
            return take(number("Q")).decode("utf-8")

        def value(kind: int, nested: bool = False) -> Any:
            if kind == TEXT:
                return text()
            if kind in NUMBERS:
                found = number(NUMBERS[kind])
                return float(str(np.float32(found))) if NUMBERS[kind] == "f" else found  # 1e-05, as it was meant
            if kind != LIST or nested:
                raise ValueError(f"a value of type {kind}{' in a list' * nested}")
            kind, count = number("I"), number("Q")
            self.values -= count
            if self.values < 0:
                raise ValueError("its lists are too long")
            if kind in NUMBERS:
                letters = f"<{count}{NUMBERS[kind]}"
                return list(struct.unpack(letters, take(struct.calcsize(letters))))
            return [value(kind, nested=True) for _ in range(count)]

        if take(4) != b"GGUF" or number("I") not in (2, 3):
            raise ValueError("it does not begin as a little-endian file of version 2 or 3")
        count, pairs = number("Q"), number("Q")
        for _ in range(pairs):
            key, kind = text(), number("I")
            if key in self.entries:
                raise ValueError(f"the key {key} occurs twice")
            self.entries[key] = value(kind)
        found = []
        for _ in range(count):
            name, dimensions = text(), number("I")
            if dimensions > 4 or name in self.tensors:
                raise ValueError(f"the tensor {name} occurs twice or has {dimensions} dimensions")
            shape = tuple(number("Q") for _ in range(dimensions))[::-1]
            found.append((name, shape, number("I"), number("Q")))
            self.tensors[name] = Stored(0, (), 0, 0)
        align = self.entries.get("general.alignment", 32)
        if type(align) is not int or align < 1 or align & (align - 1):
            raise ValueError(f"general.alignment={align}")
        begin = -(-(min(self.size, MAX_HEADER) - self.left) // align) * align
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        for name, shape, kind, offset in found:
            if kind not in sizes or not shape or 0 in shape or shape[-1] % sizes[kind][0]:
                raise ValueError(f"the tensor {name} has the type {kind} and the shape {shape}")
            block, width = sizes[kind]
            size = math.prod(shape) // block * width
            if begin + offset + size > self.size:
                raise ValueError(f"the tensor {name} is cut off")
            self.tensors[name] = Stored(kind, shape, begin + offset, size)
        if sum(stored.size for stored in self.tensors.values()) > self.size:
            raise ValueError("its tensors overlap")  # read one by one, they would need more memory than the file has

    def read(self, name: str) -> Tensor:
        """A tensor in float32, dequantized in chunks. Raises ValueError if the package gguf does not know its type."""
        import gguf

        stored = self.tensors[name]
        kind, columns = gguf.GGMLQuantizationType(stored.kind), stored.shape[-1]
        width = gguf.quant_shape_to_byte_shape((columns,), kind)[0]
        rows, step = math.prod(stored.shape[:-1]), max(1, CHUNK // max(1, columns))
        values = np.empty((rows, columns), np.float32)
        with open(self.path, "rb") as file, np.errstate(all="ignore"):  # damaged numbers
            file.seek(stored.start)
            for first in range(0, rows, step):
                part = values[first : first + step]
                data = np.fromfile(file, np.uint8, len(part) * width)
                if data.size != len(part) * width:
                    raise ValueError(f"the tensor {name} is cut off")
                try:
                    part[:] = gguf.quants.dequantize(data.reshape(-1, width), kind)
                except NotImplementedError:
                    raise ValueError(f"the tensor {name} has the type {kind.name}, which cannot be read") from None
        return torch.from_numpy(values.reshape(stored.shape))
