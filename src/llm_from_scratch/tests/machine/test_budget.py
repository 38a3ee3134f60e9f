"""machine/budget.py: amounts with units."""

from __future__ import annotations

import pytest

from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.budget import parse_budget


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("90s", 90, "seconds"),
        ("10min", 600, "seconds"),
        ("2h", 7200, "seconds"),
        ("1.5 h", 5400, "seconds"),
        ("2D", 172800, "seconds"),
        ("1e15flops", 1e15, "flops"),
        ("3Eflops", 3e18, "flops"),
        ("50Mtokens", 5e7, "tokens"),
        ("2.5Btokens", 2.5e9, "tokens"),
        ("1000tokens", 1000, "tokens"),
    ],
)
def test_amounts_with_units(text: str, amount: float, unit: str) -> None:
    found = parse_budget(text)
    assert (found.amount, found.unit) == (pytest.approx(amount), unit)


REFUSED = (
    *("", "10", "min", "-5min", "10 minutes long", "nan s", "infh", "1e999h", "5s", "0tokens", "10parsec", "1qflops"),
    *("10m", "1,5h"),
)


@pytest.mark.parametrize("text", REFUSED)
def test_other_texts_are_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match="^budget=") as found:
        parse_budget(text)
    assert repr(text) in str(found.value) and "\n" not in str(found.value)
