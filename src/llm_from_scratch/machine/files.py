"""Regular files, opened so that nothing blocks and nothing larger than expected is read.

A FIFO or a device under a file's name would block or never end; what is read here is a regular file of bounded size.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import UserError

KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def open_regular(path: Path) -> int:
    """A file descriptor of a regular file, to read. Raises UserError for what is none, OSError where it fails."""
    try:
        _refuse_others(path, os.stat(path))  # to open a device may change it
    except ValueError as error:  # a null character in the name
        raise error if isinstance(error, UserError) else UserError(f"{str(path)[:200]!r}: {error}") from None
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse_others(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises UserError for others, OSError where it fails."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path} is larger than the {limit:,} bytes that such a file may have")
    return data


def parse_json(raw: bytes) -> Any:
    """JSON that takes at most about 64 MB more memory than twice its size. Raises ValueError, RecursionError."""
    # what a value, a list and an object take at most, when their text is as short as can be
    if 48 * raw.count(b",") + 72 * raw.count(b"[") + 240 * raw.count(b"{") > (48 << 20) + len(raw):
        raise ValueError("it holds too many values for its size")
    return json.loads(raw)


def _refuse_others(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise UserError(
            f"cannot read {path}: it is {KINDS.get(stat.S_IFMT(info.st_mode), 'no file')}, not a regular file"
        )
