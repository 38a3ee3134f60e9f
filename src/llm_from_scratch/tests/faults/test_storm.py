"""The quick part of the storm. `just storm` runs all of it."""

from __future__ import annotations

import pytest

from .rows import Report
from .storm import ROWS, in_process, load

MORE = 3  # times as many cases of each row in the slow tests


@pytest.fixture(scope="module", params=[1, pytest.param(MORE, marks=pytest.mark.slow)])
def reports(request: pytest.FixtureRequest) -> dict[str, tuple[int, Report]]:
    """The number of cases and the report of each row. In one process, with one thread: rows fork, and importing torch
    takes longer than their few cases."""
    cases = {name: request.param * load(name).quick for name in ROWS if load(name).quick}
    return {name: (cases[name], report) for name, report in in_process(cases, seed=request.param).items()}


@pytest.mark.parametrize("name", ROWS)
def test_a_few_cases_of_each_row(name: str, reports: dict[str, tuple[int, Report]]) -> None:
    if not load(name).quick:
        pytest.skip("takes more than a few seconds: part of `just storm`")
    cases, report = reports[name]
    assert report.failures == []
    assert report.done >= cases


@pytest.mark.parametrize("name", ROWS)
def test_the_defects_of_a_row_can_be_put_in(name: str) -> None:
    """`just storm --prove` takes too long for here: at least what they replace must exist."""
    for defect in load(name).defects.values():
        with defect():
            pass
