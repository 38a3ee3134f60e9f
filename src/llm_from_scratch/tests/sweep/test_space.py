"""The ranges of a sweep: parsed by hand-worked examples; every mistake is one line that names it."""

from __future__ import annotations

from typing import Any

import pytest

from llm_from_scratch.config import Config
from llm_from_scratch.errors import UserError
from llm_from_scratch.sweep.space import Choices, Range, check_space, combinations, parse_space


def test_every_form() -> None:
    space = parse_space(
        ["learning_rate=log(1e-4, 1e-1) n_layer=2,4,6  dropout=0..0.3", "n_embd=64..512/64", "--model.bias=true,false"]
        + ["batch-size=log(8..128)", "dataset=../a,../b", "n_kv_head=none,2", "weight_decay=0..0.2/0.05"]
    )
    assert space == {
        "learning_rate": Range(1e-4, 1e-1, log=True), "n_layer": Choices(("2", "4", "6")), "dropout": Range(0.0, 0.3),
        "n_embd": Range(64, 512, step=64), "bias": Choices(("true", "false")), "batch_size": Range(8, 128, log=True),
        "dataset": Choices(("../a", "../b")), "n_kv_head": Choices(("none", "2")),
        "weight_decay": Range(0.0, 0.2, step=0.05),
    }  # fmt: skip
    assert type(space["n_embd"].low) is int  # type: ignore[union-attr]
    assert parse_space([f"{name}={part}" for name, part in space.items()]) == space  # as it is stored and compared


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing to sweep over"),
        ("learning_rate", "expected NAME=VALUES"),
        ("lerning_rate=1,2", "unknown setting lerning_rate; did you mean learning_rate?"),
        ("out_dir=a,b", "out_dir is set by the sweep itself"),
        ("n_layer=2,4 n_layer=1,2", "n_layer twice"),
        ("n_layer=4", "one value: give it as --n_layer=4"),
        ("n_layer=2,2", "a value twice"),
        ("n_layer=2,,4", "2,,4 is not valid for n_layer: expected LOW..HIGH"),
        ("n_layer=exp(1,2)", "is not valid for n_layer"),
        ("n_layer=2.5..4", "'2.5' is not a whole number"),
        ("dropout=a..b", "'a' is not a number"),
        ("dropout=0.3..0", "the first number must be below the second"),
        ("learning_rate=log(0,1)", "begins above 0"),
        ("learning_rate=log(nan,1)", "'nan' is not a number"),
        ("n_layer=2..4/3", "the step must be above 0 and at most 2"),
        ("optimizer_type=log(1,2)", "optimizer_type cannot have a range, because it is not a number"),
    ],
)
def test_a_mistake_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_space([text])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_values_are_checked_before_the_first_run() -> None:
    for text, said in [
        ("dropout=0..2", "dropout=2.0 is out of range"),
        ("optimizer_type=adamw,sgd", "optimizer_type='sgd' is not valid"),
        ("n_layer=two,4", "n_layer='two' is not valid"),
    ]:
        with pytest.raises(UserError, match=said):
            check_space(parse_space([text]), Config())
    check_space(parse_space(["n_embd=96,100 n_head=3,5"]), Config())  # it is the combinations that may not fit


def test_combinations_of_lists() -> None:
    found = combinations(parse_space(["n_layer=1,2 bias=true,false"]))
    assert found == [{"n_layer": a, "bias": b} for a in "12" for b in ("true", "false")]
    assert combinations(parse_space(["n_layer=1,2 dropout=0..0.1"])) is None


class Suggestions:
    """In place of a trial of optuna: the middle of each range."""

    def suggest_float(self, name: str, low: float, high: float, **kinds: Any) -> float:
        return 0.123456 if name == "middle" else high

    def suggest_int(self, name: str, low: int, high: int, **kinds: Any) -> int:
        assert kinds == {"step": 1, "log": False}
        return (low + high) // 2


def test_a_fraction_is_rounded_within_the_range() -> None:
    trial = Suggestions()
    assert Range(0.0, 1.0).suggest(trial, "middle") == "0.1235"
    assert Range(0.0, 0.123449).suggest(trial, "end") == "0.1234"
    assert Range(0.123451, 0.123459).suggest(trial, "middle") == "0.123459"
    assert Range(2, 6).suggest(trial, "whole") == "4"
