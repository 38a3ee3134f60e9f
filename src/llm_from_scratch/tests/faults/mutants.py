"""Random changes to valid inputs."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 65536, 1 << 31, (1 << 31) - 1, 1 << 53, 1 << 64, -(1 << 63), 10**400, 0.5,
    -0.0, 1e308, float("inf"), float("nan"), "", "a", "0", "../x", "/etc/passwd", "\0", "\ud800", "é", "x" * 3000, [],
    {}, [[]], [1, 2], {"a": 1}, [[[[[[[[]]]]]]]], "none", "true", "1e9", "-", "FILE:/etc/passwd",
)  # fmt: skip


class Mutant(random.Random):
    """Random changes."""

    def value(self, value: Any) -> Any:
        """A plain value with one change somewhere inside."""
        if isinstance(value, dict) and value and self.random() < 0.9:
            key = self.choice(list(value))
            way = self.random()
            if way < 0.08:
                return {k: v for k, v in value.items() if k != key}
            if way < 0.14:
                return {**value, str(self.choice(NASTY)): self.choice(NASTY)}
            if way < 0.20:
                other = self.choice(list(value))
                return {**value, key: value[other], other: value[key]}
            return {**value, key: self.value(value[key])}
        if isinstance(value, list) and value and self.random() < 0.8:
            at, way = self.randrange(len(value)), self.random()
            if way < 0.1:
                return value[:at] + value[at + 1 :]
            if way < 0.2:
                return [*value, *value]
            return [*value[:at], self.value(value[at]), *value[at + 1 :]]
        if type(value) is int and self.random() < 0.5:
            return self.choice((value + 1, value - 1, -value, value * 2, value << 32, float(value % 99), str(value)))
        if isinstance(value, str) and value and self.random() < 0.5:
            at = self.randrange(len(value))
            return value[:at] + self.choice(("", "\0", "/", "..", "\u2028", "😀", value)) + value[at + 1 :]
        return self.choice(NASTY)

    def json(self, raw: bytes) -> bytes:
        """Valid JSON with changed values; surrogates stay escaped, numbers out of range stay digits."""
        content = json.loads(raw)
        for _ in range(self.randint(1, 3)):
            content = self.value(content)
        return json.dumps(content).encode()

    def bytes(self, raw: bytes) -> bytes:
        data = bytearray(raw)
        for _ in range(self.randint(1, 3)):
            at = self.randrange(len(data) + 1)
            way = self.randrange(6)
            if way == 0 and at < len(data):
                data[at] ^= 1 << self.randrange(8)
            elif way == 1 and at < len(data):
                data[at] = self.randrange(256)
            elif way == 2:
                del data[at : at + self.choice((1, 2, 8, 64))]
            elif way == 3:
                data[at:at] = self.choice((b"\0", b"\xff" * 8, b"(" * 9, b"[", b'"', b"}", struct.pack("<q", 1 << 40)))
            elif way == 4:
                data = data[:at]
            else:
                begin = self.randrange(len(data) + 1)
                data[at:at] = data[begin : begin + self.choice((1, 4, 32))]
        return bytes(data)


def expect(good: bool, what: str) -> None:
    if not good:
        raise AssertionError(what)


def write(folder: Path, files: dict[str, bytes], present: dict[str, bytes]) -> None:
    """Writes what differs from `present`, which is what a former call left."""
    for name in present.keys() - files.keys():
        (folder / name).unlink()
    for name, data in files.items():
        if present.get(name) != data:
            (folder / name).write_bytes(data)
    present.clear()
    present.update(files)
