"""Processes that act together: each does its part, and all learn whether every part succeeded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from ..errors import DamagedError, SaveError, UserError, first_line

PATIENCE = timedelta(minutes=30)  # for the slowest disk among them
T = TypeVar("T")


class Team:
    """The processes of a run, or a single one. It has its own connections (gloo), so a thread may use it while the run
    computes."""

    def __init__(self, rank: int = 0, size: int = 1):
        """All processes of the run call this together."""
        self.rank, self.size, self._group = rank, size, None
        if size > 1:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank. If a process has ended, raises gloo's error in the thread that trains, where it
        ends the run, and SaveError in another thread."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            if threading.current_thread() is threading.main_thread():
                raise
            raise SaveError(f"another process of the run has ended or does not answer: {first_line(error)}") from None
        return values

    def all(self, work: Callable[[], T]) -> list[T]:
        """Does this process's work. Returns everybody's results once all are done. If a process fails, all raise: it
        its own error, the others an OSError, a DamagedError or a SaveError."""
        if self.size == 1:
            return [work()]
        value, error = None, None
        try:
            value = work()
        except Exception as caught:
            error = caught
        told = error if isinstance(error, (UserError, OSError, type(None))) else SaveError(first_line(error))
        outcomes = self.gather((value, told))
        if error is not None:
            raise error
        for rank, (_, theirs) in enumerate(outcomes):
            if isinstance(theirs, OSError):
                raise theirs
            if theirs is not None:
                kind = DamagedError if isinstance(theirs, DamagedError) else SaveError
                raise kind(f"{theirs} (process {rank})")
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def first(self, work: Callable[[], T]) -> T:
        """The result of the first process's work, on every process."""
        return self.all(lambda: work() if self.is_first else None)[0]  # type: ignore[return-value]


ALONE = Team()
