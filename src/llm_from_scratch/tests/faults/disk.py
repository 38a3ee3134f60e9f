"""The file operations below a folder, one by one: to record them, or to make one fail."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Operation:
    """kind: open, read, list, stat, release (of what was open for reading); create, write, close, fsync, mkdir, rename,
    unlink, rmdir (see CHANGES)."""

    kind: str
    path: str
    target: str = ""
    """Where a rename leads."""
    data: bytes = b""
    """What a write writes, at `offset`."""
    offset: int = 0


CHANGES = ("create", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")
Hook = Callable[[Operation, Callable[..., Any]], Any]
"""hook(operation, do): do() is the operation itself; that of a write takes other data, do(b"...")."""

_SIMPLE = {
    "mkdir": "mkdir", "rmdir": "rmdir", "unlink": "unlink", "remove": "unlink", "listdir": "list", "scandir": "list",
    "stat": "stat", "lstat": "stat",
}  # fmt: skip


class _Raw(io.FileIO):
    """The file under Python's buffers: what arrives here is what the system is asked for."""

    def __init__(self, file: Any, mode: str, where: str, hook: Hook, handles: dict[int, str]):
        self.where, self.hook, self.handles = where, hook, handles
        super().__init__(file, mode)
        handles[self.fileno()] = where

    def write(self, data: Any) -> int:
        data = bytes(data)
        operation = Operation("write", self.where, data=data, offset=self.tell())
        return self.hook(operation, lambda part=data: super(_Raw, self).write(part))

    def readinto(self, buffer: Any) -> int:
        return self.hook(Operation("read", self.where), lambda: super(_Raw, self).readinto(buffer))

    def readall(self) -> bytes:
        return self.hook(Operation("read", self.where), super().readall)

    def read(self, size: int | None = -1) -> Any:
        return self.hook(Operation("read", self.where), lambda: super(_Raw, self).read(size))

    def close(self) -> None:
        if self.closed or self.handles.pop(self.fileno(), None) is None:
            super().close()
        else:
            self.hook(Operation("close" if self.writable() else "release", self.where), super().close)


@contextmanager
def watched(root: Path, hook: Hook) -> Iterator[None]:
    """Within the block each file operation of Python's on root or below it goes through the hook. For one thread."""
    inside, handles = os.path.realpath(root) + os.sep, dict[int, str]()
    real_open, real = builtins.open, {name: getattr(os, name) for name in (*_SIMPLE, "open", "close", "fsync")}
    renames = {name: getattr(os, name) for name in ("rename", "replace")}

    def locate(path: Any, dir_fd: int | None = None) -> str | None:
        if isinstance(path, int):
            return handles.get(path)
        name = os.fsdecode(path)
        if dir_fd is not None:
            if dir_fd not in handles:
                return None
            name = os.path.join(handles[dir_fd], name)
        name = os.path.abspath(name)
        return name if os.path.join(name, "").startswith(inside) else None

    def simple(name: str) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **more: Any) -> Any:
            where = locate(path, more.get("dir_fd"))
            if where is None:
                return real[name](path, *args, **more)
            return hook(Operation(_SIMPLE[name], where), lambda: real[name](path, *args, **more))

        return call

    def rename(name: str) -> Callable[..., Any]:
        def call(old: Any, new: Any, **more: Any) -> Any:
            where, target = locate(old, more.get("src_dir_fd")), locate(new, more.get("dst_dir_fd"))
            if where is None or target is None:
                return renames[name](old, new, **more)
            return hook(Operation("rename", where, target), lambda: renames[name](old, new, **more))

        return call

    def os_open(path: Any, flags: int, *args: Any, **more: Any) -> int:
        where = locate(path, more.get("dir_fd"))
        if where is None:
            return real["open"](path, flags, *args, **more)
        handle = hook(Operation("open", where), lambda: real["open"](path, flags, *args, **more))
        handles[handle] = where
        return handle

    def os_close(handle: int) -> None:
        if (where := handles.pop(handle, None)) is None:
            return real["close"](handle)
        return hook(Operation("release", where), lambda: real["close"](handle))

    def fsync(handle: Any) -> None:
        where = handles.get(handle if isinstance(handle, int) else handle.fileno())
        if where is None:
            return real["fsync"](handle)
        return hook(Operation("fsync", where), lambda: None)  # to wait for this machine's disk shows nothing

    def opening(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
        closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        where = None if isinstance(file, int) or opener else locate(file)
        if where is None:
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        kind = "create" if set(mode) & set("wxa+") else "open"
        plain = mode.replace("b", "").replace("t", "")
        raw = hook(Operation(kind, where), lambda: _Raw(file, plain, where, hook, handles))
        if buffering == 0:
            return raw
        buffers: Any = {"r": io.BufferedReader, "w": io.BufferedWriter, "x": io.BufferedWriter, "a": io.BufferedWriter}
        buffered = buffers.get(plain, io.BufferedRandom)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    patches: list[Any] = [mock.patch.object(os, name, simple(name)) for name in _SIMPLE]
    patches += [mock.patch.object(os, name, rename(name)) for name in renames]
    patches += [mock.patch.object(os, "open", os_open), mock.patch.object(os, "close", os_close)]
    patches += [mock.patch.object(os, "fsync", fsync)]
    patches += [mock.patch.multiple(module, open=opening) for module in (builtins, io)]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
