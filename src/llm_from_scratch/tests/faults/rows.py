"""A row of the storm: a fault, the number of its cases, and defects of the program that the row must detect."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar


class Noticed(BaseException):
    """A case failed and no more are needed. Not an Exception: a row must not take it for an error of the program."""


@dataclass
class Report:
    """What a row found."""

    one_is_enough: ClassVar[bool] = False
    """Whether a row ends at its first failure, as in the proof that it notices a defect."""
    done: int = 0
    """Cases that were tried."""
    failures: list[str] = field(default_factory=list)
    """A line for each case that went wrong; it names the case, so that it can be tried alone."""
    counts: dict[str, int] = field(default_factory=dict)
    """Other figures to print, such as {"inside a save": 412}."""

    def count(self, what: str, by: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + by

    def check(self, good: bool, what: str) -> bool:
        if not good:
            self.failures.append(what)
            if self.one_is_enough:
                raise Noticed(self)
        return good


Defect = Callable[[], AbstractContextManager[None]]
"""Breaks the program within its block, by replacing a function of ours with a faulty one."""


@dataclass(frozen=True)
class Row:
    """One kind of fault."""

    title: str
    target: int
    """Cases in `just storm`."""
    quick: int
    """Cases in the normal test suite: seconds. 0 where one alone takes longer."""
    prove: int
    """Cases that suffice to notice each defect. A proof ends at the first one that fails."""
    run: Callable[[int, int, Path], Report]
    """run(how many cases, seed, empty folder); the same arguments try the same cases."""
    defects: dict[str, Defect]
    """Name -> a defect in the program that run() must notice, so that its silence means something."""
