"""One trainer at a time in a folder."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError

LOCK = ".lock"


class FolderLock:
    """Holds a folder until release(), or until the process ends in whatever way: the system then lets go of it.

    The file stays, empty; what counts is who holds it open (filelock: flock, or LockFileEx on Windows). Between
    machines it holds as far as their shared file system passes such locks on.
    """

    def __init__(self, folder: Path):
        from filelock import FileLock

        # no soft lock: one that a dead process leaves behind would block the next run
        self.path = folder / LOCK
        self._lock = FileLock(self.path, thread_local=False, fallback_to_soft=False)

    def acquire(self) -> None:
        """Takes the folder, and makes it where it is missing. Raises UserError where another process holds it."""
        from filelock import Timeout

        if self._lock.is_locked:
            return
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"out_dir={folder} cannot be made ({error.strerror}); name another with --out_dir"
            ) from None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process trains in {folder}: wait for its end, stop it, or take another --out_dir"
            ) from None
        except (OSError, NotImplementedError):  # a file system that knows no locks must not keep anyone from training
            pass

    def release(self) -> None:
        self._lock.release()
