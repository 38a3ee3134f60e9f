"""Folders written atomically, with a manifest of the size and sha256 of every file in them.

Order of a write: each file synced in a temporary folder, the manifest last, the folder synced, renamed, the parent
synced, everything read back. At every moment, also of a replacement, the old folder or the new one is complete. The
manifest holds its own hash, and its content has only one form in bytes, so every changed bit is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import DamagedError, SaveError, UserError
from ..machine.files import (
    MAX_JSON,
    make_folder,
    open_file,
    open_synced,
    parse_json,
    remove_tree,
    space_for,
    sync_folder,
    to_json,
)  # fmt: skip
from ..machine.processes import moved
from ..machine.team import ALONE, Team

MANIFEST = "MANIFEST.json"
LEFTOVER = re.compile(r"\.tmp-(step-\d+|remove-step-.+|ckpt\.pt|README\.md|shared)")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def write_folder(
    final: Path,
    parts: Mapping[str, Callable[[], Iterable[Any]]],
    fields: dict[str, Any],
    write_more: Callable[[Path], None] | None = None,
    team: Team = ALONE,
) -> None:
    """Writes the folder `final` and verifies it, replacing one that is there. Raises SaveError.

    parts: {file name: function that yields its content in chunks (bytes or buffers)}. fields: plain data for the
    manifest. write_more(folder) may write further files. team: processes that call this together, each with parts of
    its own, which it writes, hashes, syncs and reads back; the first one does the rest.
    """
    out, tmp, old = final.parent, final.with_name(f".tmp-{final.name}"), final.with_name(f"{final.name}.old")
    files: dict[str, dict[str, Any]] = {}

    def begin() -> None:
        make_folder(out)
        remove_tree(tmp)
        os.mkdir(tmp)

    def write() -> dict[str, dict[str, Any]]:
        for name, make in parts.items():
            files[name] = write_synced(tmp / name, make())
        if not team.is_first:
            sync_folder(tmp)
        return files

    def publish() -> None:
        if write_more is not None:
            write_more(tmp)
            for path in sorted(path for path in tmp.iterdir() if path.name not in everything):
                everything[path.name] = files[path.name] = write_synced(path, [path.read_bytes()])
        write_synced(tmp / MANIFEST, [with_own_hash({**fields, "files": everything})])
        sync_folder(tmp)
        if os.path.lexists(final):
            _make_way(final, old)
        os.rename(tmp, final)
        sync_folder(out)

    def read_back() -> None:
        verify(final, files)

    try:
        team.first(begin)
        everything = {name: entry for theirs in team.all(write) for name, entry in theirs.items()}
        team.first(publish)
        team.all(read_back)
        if team.is_first:
            remove_folder(old)
    except DamagedError as error:
        moved = f"; moved to {set_aside(final)}" if team.is_first else ""
        raise SaveError(f"the disk returned different bytes than were written: {error}{moved}") from None
    except SaveError:  # of another process
        raise
    except OSError as error:
        if team.is_first:
            shutil.rmtree(tmp, ignore_errors=True)  # before the free bytes are counted
        sizes = [files[n]["size"] if n in files else sum(len(piece) for piece in parts[n]()) for n in parts]
        raise SaveError(f"cannot write {final}: {error}; {space_for(out, sum(sizes))}") from error
    except UserError as error:  # out of memory or file handles, for example: the state of the file is unknown
        raise SaveError(f"cannot read back {final}: {error}") from error
    finally:
        if team.is_first:
            shutil.rmtree(tmp, ignore_errors=True)


def _make_way(final: Path, old: Path) -> None:
    """Renames the folder that will be replaced. It stays complete under a name that readers know."""
    if not final.is_dir():  # not ours
        set_aside(final)
        return
    if old.exists():  # an earlier replacement was cut short: `final` may not be whole
        try:
            verify(final)
        except DamagedError:
            set_aside(final)
            return
        remove_folder(old)
    os.rename(final, old)
    sync_folder(final.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a hashed folder, its own hash and its form checked. Raises DamagedError."""
    path = folder / MANIFEST
    with _open_checked(path, MAX_JSON, exact=False) as f:
        raw = f.read(MAX_JSON + 1)
    body = from_json(raw, path)
    body.pop("sha256", None)
    if with_own_hash(body) != raw:
        raise DamagedError(f"{path} does not match its own sha256")
    files = body.get("files")
    for name, entry in files.items() if isinstance(files, dict) else [("", None)]:
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not (_PLAIN_NAME.fullmatch(name) and type(size) is int and size >= 0 and isinstance(digest, str)):
            raise DamagedError(f"{path} has an invalid entry in its list of files")
    return body


def read_member(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """A file of a hashed folder, verified. Raises DamagedError."""
    entry = manifest["files"].get(name)
    if entry is None:
        raise DamagedError(f"{folder} does not contain {name}")
    return b"".join(_verified(folder / name, entry, entry["size"] + 1))


def verify(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Reads back files of a hashed folder (None: all), in chunks. Returns its manifest; raises DamagedError."""
    manifest = read_manifest(folder)
    for name in manifest["files"] if names is None else names:
        for _ in _verified(folder / name, manifest["files"][name], 1 << 20):
            pass
    return manifest


def _verified(path: Path, entry: dict[str, Any], chunk: int) -> Iterator[bytes]:
    """The content of a file in chunks. Raises DamagedError at its end if it does not match the manifest's entry."""
    digest = hashlib.sha256()
    with _open_checked(path, entry["size"], exact=True) as f:
        while piece := f.read(chunk):
            digest.update(piece)
            moved()
            yield piece
    if digest.hexdigest() != entry["sha256"]:
        raise DamagedError(f"{path} does not match its sha256")


def set_aside(folder: Path) -> Path:
    """Renames a damaged folder to damaged-<name> (-2, -3, ... if that is taken), so that readers skip it."""
    names = (f"damaged-{folder.name}" + (f"-{n}" if n > 1 else "") for n in range(1, 1 << 16))
    target = next(folder.with_name(name) for name in names if not os.path.lexists(folder.with_name(name)))
    try:
        os.rename(folder, target)
    except OSError:
        return folder  # a read-only disk
    with contextlib.suppress(OSError):
        sync_folder(folder.parent)
    return target


def remove_folder(folder: Path) -> bool:
    """Removes a folder so that no reader ever sees half of it, even after a power cut. Returns whether it is gone; if
    the system refuses, the next start tries again."""
    if not os.path.lexists(folder):
        return True
    tmp = folder.with_name(f".tmp-remove-{folder.name}")
    try:
        remove_tree(tmp)
        os.rename(folder, tmp)
        sync_folder(folder.parent)
        remove_tree(tmp)
    except OSError:
        return False
    return True


def from_json(raw: bytes, where: Path) -> dict[str, Any]:
    """The JSON object in raw. Raises DamagedError for anything else, or if it is larger than MAX_JSON."""
    try:
        if len(raw) > MAX_JSON:
            raise ValueError(f"{len(raw)} bytes")
        data = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise DamagedError(f"{where} contains a {type(data).__name__}, expected an object")
    return data


def with_own_hash(body: dict[str, Any]) -> bytes:
    return to_json({**body, "sha256": sha256_of(to_json(body))})


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_synced(path: Path, pieces: Iterable[Any]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open_synced(path) as f:
        for piece in pieces:
            f.write(piece)
            digest.update(piece)
            size += len(piece)
            moved()
    return {"size": size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def _open_checked(path: Path, size: int, exact: bool) -> Iterator[IO[bytes]]:
    """A regular file of at most (exact: of) `size` bytes, open for reading. Errors of the body are converted too."""
    try:
        with os.fdopen(open_file(path), "rb") as f:
            found = os.fstat(f.fileno()).st_size
            if found > size or (exact and found != size):
                raise DamagedError(f"{path} has {found} bytes, expected {'' if exact else 'at most '}{size}")
            yield f
    except UserError as error:  # not a regular file
        raise DamagedError(str(error)) from None
    except OSError as error:
        # gone, or on a bad sector; other errors (permissions, too many open files) do not mean damage
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ELOOP):
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
        raise UserError(f"cannot read {path}: {error.strerror}") from None
