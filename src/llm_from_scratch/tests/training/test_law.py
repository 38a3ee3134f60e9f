"""training/law.py: values worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llm_from_scratch.errors import UserError
from llm_from_scratch.training.counts import Curve
from llm_from_scratch.training.law import NGRAMS, PLAIN, POWER, Law, read_law

EASY = Curve(amount=1e6, bits=2.0, gain=0.4)
SIMPLE = Law(E=1.0, A=100.0, alpha=0.5, B=1000.0, beta=0.5, C=4.0, gamma=1.0, R=2.0, spread=0.1, text=EASY)


def test_the_sum_by_hand() -> None:
    # 1 + 100 / sqrt(1e4) + 1000 / sqrt(1e6) + 4 / 8
    assert SIMPLE.bits(1e4, 1e6, context=8) == pytest.approx(1 + 1 + 1 + 0.5)
    assert SIMPLE.bits(1e4, 1e6) == pytest.approx(3.0)


def test_repeated_text_is_worth_less_and_less() -> None:
    assert SIMPLE.worth(5e5, 1e6) == 5e5 and SIMPLE.worth(1e6, 1e6) == 1e6
    # the second pass: 1 + 2 (1 - exp(-1/2)) times the text
    assert SIMPLE.worth(2e6, 1e6) == pytest.approx(1e6 * (3 - 2 * math.exp(-0.5)))
    assert SIMPLE.worth(1e12, 1e6) == pytest.approx(3e6)


def test_a_harder_text_scales_the_loss_and_its_interval() -> None:
    same, hard = SIMPLE.predict(1e4, 1e6, text=EASY), SIMPLE.predict(1e4, 1e6, text=Curve(EASY.amount, 3.0, EASY.gain))
    assert same == SIMPLE.predict(1e4, 1e6) == pytest.approx((3.0, 3.0 / math.exp(0.2), 3.0 * math.exp(0.2)))
    assert hard == pytest.approx(tuple(1.5**POWER * value for value in same))


def test_at_the_balance_parameters_and_text_help_equally() -> None:
    N, D, step = SIMPLE.balanced(1e6), 1e6, 1e-4
    more_parameters = SIMPLE.bits(N, D) - SIMPLE.bits(N * (1 + step), D)
    more_text = SIMPLE.bits(N, D) - SIMPLE.bits(N, D * (1 + step))
    assert more_parameters == pytest.approx(more_text, rel=1e-3)


@pytest.mark.parametrize("law", [PLAIN, NGRAMS])
def test_the_stored_laws_fall_with_parameters_text_and_context(law: Law) -> None:
    base = law.bits(1e6, 1e6, 1e6, 256)
    assert law.bits(2e6, 1e6, 1e6, 256) < base and law.bits(1e6, 2e6, 1e7, 256) < base
    assert law.bits(1e6, 1e6, 1e6, 512) < base < 8


def test_the_scale_is_that_of_the_text_that_is_worth_as_much() -> None:
    """Repeated text counts as in the law, and the ratio of two texts changes with the amount."""
    steeper = Curve(EASY.amount, bits=1.8, gain=0.8)
    for seen, unique in ((1e6, math.inf), (4e6, math.inf), (2e6, 1e6)):
        worth = SIMPLE.worth(seen, unique)
        scale = (steeper.at(worth) / EASY.at(worth)) ** POWER
        assert SIMPLE.predict(1e4, seen, unique, text=steeper).bits == pytest.approx(
            scale * SIMPLE.bits(1e4, seen, unique)
        )
    assert steeper.at(4e6) / EASY.at(4e6) != pytest.approx(0.9, abs=0.02)  # as it is at 1e6


def test_a_law_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"E": 1, "A": 2, "alpha": 0.3, "B": 4, "beta": 0.5, "text": "x", "runs": 12}))
    assert read_law(path) == Law(E=1, A=2, alpha=0.3, B=4, beta=0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object"),
        ('{"E": 1}', "not a law"),
        ('{"E": 1, "A": 2, "alpha": 0, "B": 4, "beta": 0.5}', "alpha"),
        ('{"E": 1, "A": 2, "alpha": 0.3, "B": "x", "beta": 0.5}', "B must be"),
        ('{"E": 1, "A": 2, "alpha": 0.3, "B": NaN, "beta": 0.5}', "B must be"),
        ('{"E": 1, "A": -2, "alpha": 0.3, "B": 4, "beta": 0.5}', "A must be"),
    ],
)
def test_a_file_that_is_not_a_law_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "law.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_law(tmp_path / "law.json")
