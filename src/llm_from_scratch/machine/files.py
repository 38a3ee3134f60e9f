"""Files: bounded reads of regular files, JSON, atomic writes, and locks."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import SaveError, UserError, one_line

LOCK = ".lock"
MAX_JSON = 16 << 20  # bytes; parsing takes several times as much memory
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
KINDS |= dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")


def open_file(path: Path) -> int:
    """A file descriptor of a regular file, to read. Raises UserError for any other (a FIFO would block, a device never
    end), OSError if opening fails."""
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


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises UserError for others, OSError if reading fails."""
    with os.fdopen(open_file(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path} is larger than {limit:,} bytes, the limit for such a file")
    return data


def parse_json(raw: bytes) -> Any:
    """JSON that takes at most about 64 MB more memory than twice its size. Raises ValueError, RecursionError."""
    # the most memory of a value, a list and an object with the shortest possible text
    if 48 * raw.count(b",") + 72 * raw.count(b"[") + 240 * raw.count(b"{") > (48 << 20) + len(raw):
        raise ValueError("it contains too many values for its size")
    return json.loads(raw)


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    try:
        content = parse_json(read_file(path, limit))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: expected a JSON object, found a {type(content).__name__}")
    return content


def json_steps(raw: bytes) -> list[dict[str, Any]]:
    """The JSON objects with a step among some lines; NaN and infinities become None. Invalid lines, such as one cut
    short by a kill, are skipped."""
    found = []
    for line in raw.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line, parse_constant=lambda name: None)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                found.append(entry)
    return found


def to_json(data: Any) -> bytes:
    """Plain data as JSON with sorted keys. Infinite and NaN numbers are Python's Infinity and NaN."""
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


@contextlib.contextmanager
def open_synced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write. Its bytes are on the disk when the block ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def open_whole(path: Path, temporary: str | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that replaces `path` when the block ends, and vanishes if the block fails. temporary: the name
    until then; processes that may write at the same time need different ones. durable: synced."""
    tmp = path.with_name(temporary or f".tmp-{path.name}")
    try:
        with open_synced(tmp) if durable else open(tmp, "wb") as file:
            yield file
        os.replace(tmp, path)
        if durable:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(tmp)


def write_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Writes one file atomically, replacing one that is there. Raises SaveError."""
    try:
        make_folder(path.parent)
        with open_whole(path) as f:
            write(f)
    except OSError as error:
        needed = _Counter()
        with contextlib.suppress(OSError):
            write(needed)
        raise SaveError(f"cannot write {path}: {error}; {space_for(path.parent, needed.size)}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file atomically, not synced. Creates its folder. Several processes may write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_whole(path, f".{path.name.lstrip('.')}.{os.getpid()}", durable=False) as file:
        file.write(data)


@contextlib.contextmanager
def temporary_folder(target: Path, resumes: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """A folder next to target, deleted at the end unless it was renamed, or `resumes` is true of it: then it is given
    again to the next caller for which this is still true."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.building-{os.getpid()}")
    if folder.exists() and not resumes(folder):  # an earlier process had the same number
        shutil.rmtree(folder, ignore_errors=True)
    # After a killed process: restore the folder that it was replacing, continue or delete what it was building.
    for old in sorted(target.parent.glob(f".{glob.escape(target.name)}.*-*")):
        kind, _, pid = old.name[len(target.name) + 2 :].partition("-")
        if kind not in ("building", "previous") or not pid.isdecimal() or _is_alive(int(pid)) or old == folder:
            continue
        if kind == "previous" and not target.exists():
            os.rename(old, target)
        elif kind == "building" and not folder.exists() and resumes(old):
            os.rename(old, folder)
        else:
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        if not resumes(folder):
            shutil.rmtree(folder, ignore_errors=True)


def replace_folder(target: Path, folder: Path) -> None:
    """Moves a temporary_folder to target. The old files are deleted."""
    old = target.with_name(f".{target.name}.previous-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """Whether another process with this number may be running."""
    if os.name != "posix" or pid == os.getpid():
        return pid != os.getpid()  # on Windows, signal 0 would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and makes their names durable."""
    changed = {p.parent for p in (path, *path.parents) if not p.exists()}
    path.mkdir(parents=True, exist_ok=True)
    for parent in path.parents:
        try:
            sync_folder(parent)
        except OSError:  # we may not be allowed to open a parent folder
            if parent in changed:
                raise


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable. Windows and some network disks have no such call."""
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


def remove_tree(path: Path) -> None:
    """Removes a file or a folder, if it is there. Follows no link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(out_dir: Path) -> None:
    """Raises UserError if the run's folder cannot be written. Leaves nothing behind."""
    try:
        if out_dir.exists() and not out_dir.is_dir():
            raise UserError(f"out_dir={out_dir} is a file; choose a folder with --out_dir")
        parent = next(place for place in (out_dir, *out_dir.parents) if place.exists())
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file")
        with tempfile.TemporaryFile(dir=parent):  # root ignores permission bits, so try
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"out_dir={out_dir} cannot be written ({reason}); choose another with --out_dir") from None


class FolderLock:
    """One trainer at a time in a folder: held until release(), or until the process ends, however it ends. Between
    machines it works if their shared file system supports locks on open files."""

    def __init__(self, folder: Path):
        from filelock import FileLock

        self.path = folder / LOCK
        self._lock = FileLock(self.path, thread_local=False, fallback_to_soft=False)

    def acquire(self) -> None:
        """Locks the folder, creating it if needed. Raises UserError if another process holds it."""
        from filelock import Timeout

        if self._lock.is_locked:
            return
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"cannot be created ({error.strerror})"
            raise UserError(f"out_dir={folder} {why}; choose another with --out_dir") from None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is training in {folder}: wait until it ends, stop it, or choose another --out_dir"
            ) from None
        except (OSError, NotImplementedError):  # a file system without locks must not prevent training
            pass

    def release(self) -> None:
        self._lock.release()


def lock_file(path: Path, wait: bool = False) -> Any:
    """A lock on a file, which is created: held until its release(), or the end of the process, however it ends. None
    if another process holds it, unless `wait`. Raises UserError if the file system does not support locks."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"cannot lock {path}: {error}; choose a folder on another file system") from None
    return lock


@contextlib.contextmanager
def write_errors(where: object) -> Iterator[None]:
    """Raises UserError for an OSError, such as a full disk. where: what is written, if the error names no file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or where}: {error.strerror or error}") from None


def space_for(folder: Path, needed: int) -> str:
    """The bytes needed and free, for a message."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return f"it needs {needed:,} bytes, {shutil.disk_usage(place).free:,} bytes are free there"
    return f"it needs {needed:,} bytes"


class _Counter(io.BytesIO):
    """A file that keeps only its size."""

    size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


def _refuse_others(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise UserError(
            f"cannot read {path}: it is {KINDS.get(stat.S_IFMT(info.st_mode), 'not a file')}, not a regular file"
        )
