"""training/scheduler.py: the learning rate of each schedule, worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llm_from_scratch.config import SchedulerConfig
from llm_from_scratch.training.scheduler import learning_rate_at


def rates(steps: list[int], max_iters: int = 100, **changes: Any) -> list[float]:
    settings = {"warmup_iters": 10, "lr_decay_iters": 90, "min_lr": 0.1, **changes}
    return [learning_rate_at(step, 1.0, SchedulerConfig(**settings), max_iters) for step in steps]


def test_the_warm_up_begins_above_zero_and_ends_below_the_peak() -> None:
    for schedule in ("cosine", "linear", "constant", "wsd"):
        assert rates([0, 1, 9, 10], schedule=schedule) == pytest.approx([1 / 11, 2 / 11, 10 / 11, 1.0])
    assert rates([0], warmup_iters=0) == [1.0]


def test_cosine_is_nanogpts() -> None:
    # after the warm-up: min_lr + (1 + cos(pi * (it - 10) / 80)) / 2 * (1 - min_lr)
    assert rates([10, 30, 50, 70, 90, 91, 1000]) == pytest.approx(
        [1.0, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2, 0.1, 0.1, 0.1]
    )
    # GPT-2 124M as nanoGPT trains it
    gpt2 = SchedulerConfig(warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5)
    found = [learning_rate_at(step, 6e-4, gpt2, 600000) for step in (0, 1999, 2000, 301000, 600000, 600001)]
    assert found == pytest.approx([6e-4 / 2001, 6e-4 * 2000 / 2001, 6e-4, 3.3e-4, 6e-5, 6e-5])


def test_linear() -> None:
    assert rates([10, 30, 50, 90, 200], schedule="linear") == pytest.approx([1.0, 0.775, 0.55, 0.1, 0.1])


def test_the_constant_schedule_is_constant_after_the_warm_up() -> None:
    assert rates([10, 50, 90, 91, 5000], schedule="constant") == [1.0] * 5


def test_warmup_stable_decay() -> None:
    # the cool-down takes 0.4 * 90 = 36 steps, from 54 on
    found = rates([10, 30, 54, 63, 72, 90, 95], schedule="wsd", cooldown_frac=0.4)
    assert found == pytest.approx([1.0, 1.0, 1.0, 0.775, 0.55, 0.1, 0.1])
    # one that would begin in the warm-up begins after it
    assert rates([10, 50, 90], schedule="wsd", cooldown_frac=1.0) == pytest.approx([1.0, 0.55, 0.1])
    assert rates([10, 89, 90, 91], schedule="wsd", cooldown_frac=0.0) == pytest.approx([1.0, 1.0, 1.0, 0.1])


def test_without_decay_the_rate_is_constant_from_step_0() -> None:
    assert rates([0, 5, 50, 500], decay_lr=False) == [1.0] * 4


def test_max_iters_is_the_default_end() -> None:
    assert rates([100, 101], lr_decay_iters=None) == pytest.approx([0.1, 0.1])
    assert rates([55], lr_decay_iters=None) == pytest.approx([0.55])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("warmup", "end"), [(0, 0), (10, 10), (20, 10), (0, 1), (5, 6)])
def test_short_runs_stay_between_zero_and_the_peak(schedule: str, warmup: int, end: int) -> None:
    found = rates(list(range(30)), warmup_iters=warmup, lr_decay_iters=end, schedule=schedule)
    assert all(0 < rate <= 1.0 for rate in found)
    assert found[max(warmup, end) + 1] == pytest.approx(0.1)


def test_every_decay_falls_steadily() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        found = rates(list(range(10, 100)), schedule=schedule)
        assert all(later <= earlier for earlier, later in zip(found, found[1:], strict=False))
