"""Standard output and error that may be closed, on a full disk, or on a terminal that no longer exists."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

READER_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # `| head`, a closed terminal
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)


def open_streams() -> bool:
    """Opens /dev/null for each standard stream that is closed; otherwise the next file opened would get its number.
    Returns whether standard output was open."""
    is_open = sys.stdout is not None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    return is_open


def note(line: str) -> None:
    """Prints a line on standard error, if it can be written."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def announce(line: str, write: Callable[[str], None] | None = None) -> bool:
    """Prints a line. Returns False if the output is closed. A full disk loses lines but does not stop the run."""
    write = write or (lambda text: print(text, flush=True))
    try:
        try:
            write(line)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            write(line.encode(encoding, "replace").decode(encoding))
    except OSError as error:
        return error.errno not in (*READER_GONE, None)
    return True


def drop_lost_output() -> None:
    """Discards output that cannot be written, so that the interpreter's last flush does not fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except ValueError:  # closed
            pass
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Lenient:
    """A stream that keeps its last error instead of raising it: a progress bar has a thread that also writes."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., Any], *args: str) -> None:
        try:
            call(*args)
        except OSError as error:
            self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
