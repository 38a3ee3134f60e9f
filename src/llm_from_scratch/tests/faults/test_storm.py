"""The quick part of the storm. `just storm` runs all of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from . import runs
from .rows import Report
from .storm import ROWS, in_process, load

# The quick tests of the others are checkpoint/test_store.py, training/test_guards.py, ...
QUICK = ("kills", "operations", "power", "flips")
MORE = 4  # times as many cases of these in the slow tests, with a few of the others


def reports(cases: dict[str, int], seed: int) -> dict[str, tuple[int, Report]]:
    """The number of cases and the report of each row. In one process, with one thread: rows fork, and importing torch
    takes longer than their few cases."""
    return {name: (cases[name], report) for name, report in in_process(cases, seed).items()}


@pytest.fixture(scope="module")
def few() -> dict[str, tuple[int, Report]]:
    return reports({name: load(name).quick for name in QUICK}, seed=1)


@pytest.fixture(scope="module")
def more() -> dict[str, tuple[int, Report]]:
    quick = {name: load(name).quick for name in ROWS if load(name).quick}
    return reports({name: count * (MORE if name in QUICK else 1) for name, count in quick.items()}, seed=2)


@pytest.mark.parametrize("name", QUICK)
def test_a_few_cases_of_each_row(name: str, few: dict[str, tuple[int, Report]]) -> None:
    cases, report = few[name]
    assert report.failures == []
    assert report.done >= cases


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_more_cases_of_each_row(name: str, more: dict[str, tuple[int, Report]]) -> None:
    if not load(name).quick:
        pytest.skip("takes minutes: part of `just storm`")
    cases, report = more[name]
    assert report.failures == []
    assert report.done >= cases


@pytest.mark.parametrize("name", ROWS)
def test_the_defects_of_a_row_can_be_put_in(name: str) -> None:
    """`just storm --prove` takes too long for here: at least what they replace must exist."""
    for defect in load(name).defects.values():
        with defect():
            pass


def test_a_child_that_is_killed_at_once_leaves_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def killed_at_once() -> int:
        pid = fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return pid

    monkeypatch.setattr(os, "fork", killed_at_once)
    monkeypatch.setattr(runs, "count_threads", lambda: 1)  # what its other threads hold does not matter to a dead child
    assert runs.wait(runs.fork(lambda: 0, tmp_path / "output")) == -signal.SIGKILL
    assert (tmp_path / "output").exists()
