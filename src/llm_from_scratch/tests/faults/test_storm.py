"""The quick part of the storm. `just storm` runs all of it."""

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


@pytest.mark.parametrize("name", ROWS)
def test_the_defects_of_a_row_can_be_put_in(name: str) -> None:
    """`just storm --prove` takes too long for here: at least what they replace must exist."""
    for defect in load(name).defects.values():
        with defect():
            pass
