"""Files in object stores and on web servers, by fsspec: s3://, gs://, hf://, https:// and others."""

from __future__ import annotations

import contextlib
import hashlib
import io
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from ..errors import UserError, one_line
from ..machine.extras import missing
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
        raise UserError(f"{shown(url)} not found") from None
    except Exception as error:  # each store has its own
        raise UserError(f"cannot read {shown(url)}: {one_line(error) or type(error).__name__}") from None


def open_store(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise missing("fsspec", "remote", f"reading {shown(url)}", "download it") from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # fsspec names the package of this kind of store
        instead = f"download the file ({one_line(error)})"
        raise missing(f"for {url.partition(':')[0]}://", "remote", f"reading {shown(url)}", instead) from None


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
