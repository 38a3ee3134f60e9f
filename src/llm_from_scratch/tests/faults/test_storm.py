"""The quick part of the storm. `just storm` is the whole."""

from __future__ import annotations

import pytest

from .storm import ROWS, _in_process, load


@pytest.mark.parametrize("name", ROWS)
def test_a_few_cases_of_each_row(name: str) -> None:
    """In a process of its own, with one thread: rows fork."""
    report, _ = _in_process(name, load(name).quick, seed=1)
    assert report.failures == []
    assert report.done >= load(name).quick
