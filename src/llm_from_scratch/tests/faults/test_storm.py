"""The quick part of the storm. `just storm` is the whole."""

from __future__ import annotations

import pytest

from .rows import Report
from .storm import ROWS, in_process, load


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """In one process, with one thread: rows fork, and importing torch takes longer than their few cases."""
    return in_process({name: load(name).quick for name in ROWS if load(name).quick}, seed=1)


@pytest.mark.parametrize("name", ROWS)
def test_a_few_cases_of_each_row(name: str, reports: dict[str, Report]) -> None:
    if not load(name).quick:
        pytest.skip("takes more than a few seconds: part of `just storm`")
    assert reports[name].failures == []
    assert reports[name].done >= load(name).quick
