"""Folders that appear whole or not at all, with a manifest of the size and sha256 of every file in them.

Written beside the final place, each file synced, the manifest last, the folder synced, renamed, the parent synced, read
back. At every moment of that, and of a replacement, the old folder or the new one is there and complete. The manifest
holds its own hash, and its bytes are the only ones that this content is written as: no changed bit goes unnoticed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import DamagedError, SaveError, UserError
from ..machine.files import parse_json

MANIFEST = "MANIFEST.json"
MAX_JSON = 16 << 20  # bytes; parsing takes several times as much memory
LEFTOVER = re.compile(r"\.tmp-(step-\d+|remove-step-.+|ckpt\.pt)")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def write_sealed(
    final: Path,
    parts: Mapping[str, Callable[[], Iterable[Any]]],
    fields: dict[str, Any],
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Writes the folder `final` and verifies it, replacing one that is there.

    parts: {file name: maker of its content, a piece (bytes, or what gives its bytes without a copy) after the other}.
    fields: plain data for the manifest. write_more(folder) may write further files. Raises SaveError.
    """
    out, tmp, old = final.parent, final.with_name(f".tmp-{final.name}"), final.with_name(f"{final.name}.old")
    files: dict[str, dict[str, Any]] = {}
    try:
        make_folder(out)
        remove_tree(tmp)
        os.mkdir(tmp)
        for name, make in parts.items():
            files[name] = _write_synced(tmp / name, make())
        if write_more is not None:
            write_more(tmp)
            for path in sorted(path for path in tmp.iterdir() if path.name not in files):
                files[path.name] = _write_synced(path, [path.read_bytes()])
        _write_synced(tmp / MANIFEST, [_seal({**fields, "files": files})])
        sync_folder(tmp)
        if os.path.lexists(final):
            _make_way(final, old)
        os.rename(tmp, final)
        sync_folder(out)
        verify(final)
        remove_folder(old)
    except DamagedError as error:
        raise SaveError(f"the disk gave back other bytes than were written: {error}; now {set_aside(final)}") from None
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)  # before the free bytes are counted
        needed = sum(
            files[name]["size"] if name in files else sum(len(piece) for piece in make())
            for name, make in parts.items()
        )
        raise SaveError(f"cannot write {final}: {error}; {_space(out, needed)}") from error
    except UserError as error:  # for want of memory or file handles, say: nothing is known of what was written
        raise SaveError(f"cannot read back {final}: {error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _make_way(final: Path, old: Path) -> None:
    """Renames what is about to be replaced. A folder stays complete under a name that readers know."""
    if not final.is_dir():  # a stranger's file
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


def write_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Writes one file whole or not at all, replacing one that is there. Raises SaveError."""
    tmp = path.with_name(f".tmp-{path.name}")
    try:
        make_folder(path.parent)
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        sync_folder(path.parent)
    except OSError as error:
        _unlink(tmp)  # before the free bytes are counted
        needed = _Counter()
        with contextlib.suppress(OSError):
            write(needed)
        raise SaveError(f"cannot write {path}: {error}; {_space(path.parent, needed.size)}") from error
    finally:
        _unlink(tmp)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder, its own hash and its form checked. Raises DamagedError."""
    with _open_checked(folder / MANIFEST, MAX_JSON, exact=False) as f:
        raw = f.read(MAX_JSON + 1)
    body = from_json(raw, folder / MANIFEST)
    seal = body.pop("sha256", None)
    if seal != _sha256(to_json(body)) or to_json({**body, "sha256": seal}) != raw:
        raise DamagedError(f"{folder / MANIFEST} does not match its own sha256")
    files = body.get("files")
    for name, entry in files.items() if isinstance(files, dict) else [("", None)]:
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not (_PLAIN_NAME.fullmatch(name) and type(size) is int and size >= 0 and isinstance(digest, str)):
            raise DamagedError(f"{folder / MANIFEST} lists a file in a form that is not ours")
    return body


def read_member(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """A file of a sealed folder, if it is the one that was written. Raises DamagedError."""
    entry = manifest["files"].get(name)
    if entry is None:
        raise DamagedError(f"{folder} has no {name}")
    with _open_checked(folder / name, entry["size"], exact=True) as f:
        data = f.read(entry["size"] + 1)
    if len(data) != entry["size"] or _sha256(data) != entry["sha256"]:
        raise DamagedError(f"{folder / name} does not match its sha256")
    return data


def verify(folder: Path) -> dict[str, Any]:
    """Reads back every file of a sealed folder, in pieces. Returns its manifest; raises DamagedError."""
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        entry, digest = manifest["files"][name], hashlib.sha256()
        with _open_checked(folder / name, entry["size"], exact=True) as f:
            while piece := f.read(1 << 20):
                digest.update(piece)
        if digest.hexdigest() != entry["sha256"]:
            raise DamagedError(f"{folder / name} does not match its sha256")
    return manifest


def set_aside(folder: Path) -> Path:
    """Renames a damaged folder to damaged-<name> (-2, -3, ... where that is taken), out of the readers' sight."""
    names = (f"damaged-{folder.name}" + (f"-{n}" if n > 1 else "") for n in range(1, 1 << 16))
    target = next(folder.with_name(name) for name in names if not os.path.lexists(folder.with_name(name)))
    try:
        os.rename(folder, target)
    except OSError:
        return folder  # a read-only disk: it stays where it is
    with contextlib.suppress(OSError):
        sync_folder(folder.parent)
    return target


def remove_folder(folder: Path) -> bool:
    """Removes a folder so that no reader ever sees half of it, after a power cut neither.

    Returns whether it is gone; one that the system holds on to stays, and the next start tries again.
    """
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


def remove_tree(path: Path) -> None:
    """Removes a file or a folder, if it is there. Follows no link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and its missing parents. Their names then outlast a power cut, whoever made them, and when."""
    changed = {p.parent for p in (path, *path.parents) if not p.exists()}
    path.mkdir(parents=True, exist_ok=True)
    for parent in path.parents:
        try:
            sync_folder(parent)
        except OSError:  # one that others own may be closed to us
            if parent in changed:
                raise


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable. Windows has no such call, nor have some network disks."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def to_json(data: Any) -> bytes:
    """Plain data as JSON with sorted keys. Infinite and NaN numbers are Python's Infinity and NaN."""
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def from_json(raw: bytes, where: Path) -> dict[str, Any]:
    """The JSON object in raw. Raises DamagedError where it is none or larger than any of ours."""
    try:
        if len(raw) > MAX_JSON:
            raise ValueError(f"{len(raw)} bytes")
        data = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not JSON of ours: {error}") from None
    if not isinstance(data, dict):
        raise DamagedError(f"{where} holds a {type(data).__name__}, expected an object")
    return data


def _seal(body: dict[str, Any]) -> bytes:
    return to_json({**body, "sha256": _sha256(to_json(body))})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_synced(path: Path, pieces: Iterable[Any]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as f:
        for piece in pieces:
            f.write(piece)
            digest.update(piece)
            size += len(piece)
        f.flush()
        os.fsync(f.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def _open_checked(path: Path, size: int, exact: bool) -> Iterator[IO[bytes]]:
    """A regular file of at most (exact: of) `size` bytes, open for reading; errors in the body are ours too."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # a FIFO would block for ever
            raise DamagedError(f"{path} is not a regular file")
        if info.st_size > size or (exact and info.st_size != size):
            raise DamagedError(f"{path} has {info.st_size} bytes, expected {'' if exact else 'at most '}{size}")
        with open(path, "rb") as f:
            yield f
    except OSError as error:
        # gone, or on a bad sector; anything else (permissions, too many open files) says nothing about the content
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ELOOP):
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
        raise UserError(f"cannot read {path}: {error.strerror}") from None


class _Counter(io.BytesIO):
    """A file that keeps nothing but its size."""

    size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _space(folder: Path, needed: int) -> str:
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return f"it needs {needed:,} bytes, {shutil.disk_usage(place).free:,} bytes are free there"
    return f"it needs {needed:,} bytes"
