"""Files in object stores and on web servers, by fsspec: s3://, gs://, hf://, https:// and others."""

from __future__ import annotations

import contextlib
import hashlib
import io
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from ..errors import AccessError, UserError, one_line
from ..machine.extras import missing, missing_store
from .selection import Selection, fixed_part, is_hidden

# What servers state about the version of a file
VERSION = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "blob_id", "sha", "Last-Modified",
           "LastModified", "last_modified", "modify", "modificationTime", "mtime", "created")  # fmt: skip


@contextlib.contextmanager
def _asking(url: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise AccessError(f"{shown(url)} not found") from None
    except Exception as error:  # each store has its own
        raise AccessError(f"cannot read {shown(url)}: {one_line(error) or type(error).__name__}") from None


@contextlib.contextmanager
def reading(name: str, url: str = "") -> Iterator[None]:
    """Errors of the network and the disk as AccessError, which names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each store has its own
        reason = one_line(error) or type(error).__name__
        if url:
            raise AccessError(f"reading {name} failed ({reason}): run the same command again") from None
        if not isinstance(error, OSError):
            raise
        raise AccessError(f"cannot read {name}: {error.strerror or reason}") from None


class Raw(io.RawIOBase):
    """The bytes of a file. Reading raises AccessError, so that no reader takes an error of the network or the disk for
    damage of the content; a position that damaged content states raises an OSError without a number."""

    def __init__(self, file: Any, name: str, url: str) -> None:
        self.file, self.name, self.url = file, name, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.file.seekable()

    def readinto(self, buffer: Any) -> int | None:
        with reading(self.name, self.url):
            return self.file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self.file.seek(offset, whence)
        except OSError as error:
            raise OSError(str(error)) from None

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        super().close()
        self.file.close()


def open_store(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise missing("fsspec", "remote", f"reading {shown(url)}", "download it") from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise missing_store(error, f"reading {shown(url)}") from None


def shown(url: str) -> str:
    """A URL without passwords and signatures."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_name(url: str) -> str:
    return PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "page.html"


def open_url(url: str) -> IO[bytes]:
    with _asking(url):
        store, path = open_store(url)
        file = store.open(path, "rb")
    return file if hasattr(file, "peek") else io.BufferedReader(file, 1 << 20)  # lines of remote files are slow without


def size(url: str) -> int:
    with _asking(url):
        store, path = open_store(url)
        return store.info(path).get("size") or 0


def version(url: str) -> str | None:
    """The same for an unchanged file; None if the server does not state a version."""
    with _asking(url):
        store, path = open_store(url)
        info = store.info(path)
    stated = [(key, str(info[key])) for key in VERSION if info.get(key)]
    return hash_text(repr(stated)) if stated else None


def find(url: str, selection: Selection, is_known: Callable[[str], bool]) -> list[str]:
    """The files that a URL names: one, or the selected ones of a pattern or below a folder, sorted."""
    with _asking(url):
        store, path = open_store(url)
        if url.startswith(("http://", "https://")):  # a server has no folders
            return [url]
        if any(sign in path for sign in "*?["):
            top = fixed_part(path)
            files = [name for name in store.glob(path) if store.isfile(name)]
            files = [name for name in files if not is_hidden(PurePosixPath(name).name)]
            found = [name for name in files if selection.selects(name[len(top) :].lstrip("/"))]
        elif store.isdir(path):
            top = path.rstrip("/")
            names = {name: name[len(top) :].lstrip("/") for name in store.find(path)}
            found = [name for name, below in names.items() if selection.accepts(below, is_known(below))]
        else:
            found = [path] if store.exists(path) else []
        if not found:
            raise FileNotFoundError(url)
        return [store.unstrip_protocol(name) for name in sorted(found)]
