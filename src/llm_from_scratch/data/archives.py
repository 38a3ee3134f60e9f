"""Compressed files and archives, read as streams: nothing is extracted to a disk, no name in an archive is a path, and
the size of what comes out is bounded by the size of what was read."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from ..errors import UserError, one_line
from ..machine.extras import missing

FREE = 64 << 20  # bytes that any compressed file may become
RATIO = 200  # beyond FREE: text compresses 3 to 20 times, repetitive logs 100 times, a bomb 1,000 times or more
XZ_MEMORY = 256 << 20  # bytes that a header may ask for
BLOCK = 1 << 16
ZSTD_BLOCK = 1 << 11  # 64 MiB at most come out of it
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, ValueError, RuntimeError,
          NotImplementedError, OverflowError, MemoryError, KeyError, IndexError)  # fmt: skip


class Bound:
    """Raises UserError if far more bytes come out of a file than `consumed` explains."""

    def __init__(self, name: str, consumed: Callable[[], int]) -> None:
        self.name, self.consumed, self.size = name, consumed, 0

    def count(self, size: int) -> None:
        self.size += size
        if self.exceeds(self.size):
            raise UserError(
                f"{self.name} expands to more than {RATIO} times its size, like a decompression bomb: if it is text, "
                "decompress it yourself"
            )

    def exceeds(self, size: int) -> bool:
        return size > FREE and size > RATIO * self.consumed()


class Bounded(io.RawIOBase):
    """A decompressed stream. Raises UserError for damage and beyond its bound."""

    def __init__(self, file: Any, bound: Bound, name: str, below: Any = None) -> None:
        self.file, self.bound, self.name, self.below, self.position = file, bound, name, below, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with damage(self.name):
            data = self.file.read(min(len(buffer), BLOCK))
        self.position += len(data)
        self.bound.count(len(data))
        buffer[: len(data)] = data
        return len(data)

    def tell(self) -> int:
        return self.position

    def close(self) -> None:
        super().close()
        for file in (self.file, self.below):
            if hasattr(file, "close"):
                file.close()


@contextlib.contextmanager
def damage(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except OSError as error:  # gzip and bz2 have no error of their own; a disk's error has a number
        if error.errno is not None:
            raise
        raise UserError(f"{name} is damaged: {one_line(error)}") from None
    except DAMAGE as error:
        raise UserError(f"{name} is damaged: {one_line(error) or type(error).__name__}") from None


class _Xz(io.RawIOBase):
    """An .xz file; Python's own class has no limit on the memory that a header asks for."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.decoder, self.rest = raw, self._new(), b""

    def _new(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def read(self, size: int = -1) -> bytes:
        while True:
            if self.decoder.eof:  # more streams may follow, and null bytes between them
                self.rest = self.decoder.unused_data.lstrip(b"\0") or self.raw.read(BLOCK).lstrip(b"\0")
                if not self.rest:
                    return b""
                self.decoder = self._new()
            elif self.decoder.needs_input and not self.rest:
                self.rest = self.raw.read(BLOCK)
                if not self.rest:
                    raise EOFError("it ends too early")
            data, self.rest = self.decoder.decompress(self.rest, size), b""
            if data:
                return data


def _zstd(raw: IO[bytes]) -> Any:
    try:
        import zstandard
    except ImportError:
        raise missing("zstandard", "documents", "reading .zst", "decompress it with zstd -d") from None
    return _Zstd(raw, zstandard.ZstdDecompressor(), zstandard.ZstdError)


class _Zstd:
    """A .zst file; the package's own stream does not report a cut."""

    def __init__(self, raw: IO[bytes], library: Any, error: type[Exception]) -> None:
        self.raw, self.library, self.error = raw, library, error
        self.frame: Any = None
        self.is_between, self.rest, self.data = True, b"", io.BytesIO()

    def read(self, size: int) -> bytes:
        while not (found := self.data.read(size)):
            self.rest = self.rest or self.raw.read(ZSTD_BLOCK)
            if not self.rest and self.is_between:
                return b""
            if not self.rest:
                raise EOFError("it ends too early")
            if self.is_between:  # more frames may follow
                self.frame = self.library.decompressobj()
            try:
                data = self.frame.decompress(self.rest)
            except self.error as error:
                raise ValueError(one_line(error)) from None
            self.is_between = self.frame.eof
            self.rest = self.frame.unused_data if self.is_between else b""
            self.data = io.BytesIO(data)
        return found


COMPRESSIONS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": _Xz,
    ".zst": _zstd,
}
SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}


def decompress(suffix: str, raw: IO[bytes], name: str) -> IO[bytes]:
    """The decompressed stream of a file with this suffix."""
    with damage(name):
        return _buffered(Bounded(COMPRESSIONS[suffix](raw), Bound(name, raw.tell), name, raw))


def _buffered(stream: Bounded) -> IO[bytes]:
    return io.BufferedReader(stream, 1 << 18)


class Zip:
    """A zip archive. All of its members together have one bound."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.name = name
        with damage(name):
            size = file.seek(0, io.SEEK_END)
            self.archive = zipfile.ZipFile(file)
        self.bound = Bound(name, lambda: size)

    def files(self) -> list[zipfile.ZipInfo]:
        """In their order, without links."""
        infos = [info for info in self.archive.infolist() if info.filename and not info.filename.endswith("/")]
        for info in infos:
            _refuse_outside(info.filename, self.name)
        return [info for info in infos if not stat.S_ISLNK(info.external_attr >> 16)]

    def open(self, member: str | zipfile.ZipInfo) -> IO[bytes]:
        where = f"{self.name}:{member if isinstance(member, str) else member.filename}"
        with damage(where):
            return _buffered(Bounded(self.archive.open(member), self.bound, where))


def zip_members(file: IO[bytes], name: str, accepts: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, stream) of the accepted files in a zip archive, in its order."""
    archive = Zip(file, name)
    yield from ((info.filename, archive.open(info)) for info in archive.files() if accepts(info.filename))


def tar_members(file: IO[bytes], name: str, accepts: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, stream) of the accepted files in a tar archive, in its order; a stream is valid until the next one. Links,
    devices and sparse files are ignored."""
    end = _End(file)
    with damage(name):
        archive: Any = tarfile.open(fileobj=end, mode="r|")  # type: ignore[call-overload]
    while True:
        with damage(name):
            info = archive.next()
            archive.members = []  # it would remember every file
        if info is None:
            break
        _refuse_outside(info.name, name)
        if info.isreg() and not info.issparse() and accepts(info.name):
            where = f"{name}:{info.name}"
            with damage(where):
                raw = archive.extractfile(info)
            yield info.name, _buffered(Bounded(raw, Bound(where, functools.partial(int, info.size)), where))
    if not end.is_marked():
        raise UserError(f"{name} is damaged: it ends too early, or has other data after its end")


class _End:
    """Remembers how a tar archive ends: tarfile takes a cut between two files for the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.last, self.size = file, b"", 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.last, self.size = (self.last + data)[-tarfile.BLOCKSIZE :], self.size + len(data)
        return data

    def is_marked(self) -> bool:
        """Whether only null characters follow the last file, in whole blocks, and there are some."""
        while self.read(BLOCK):
            pass
        return self.size % tarfile.BLOCKSIZE == 0 and not self.last.strip(b"\0")


def _refuse_outside(member: str, name: str) -> None:
    path = PurePosixPath(member.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
        raise UserError(f"{name} contains {member[:100]!r}, a path outside the archive: refused")
