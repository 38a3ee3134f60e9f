"""training/progress.py: the estimated schedule of a run is the actual one; its duration is known by step 20."""

from __future__ import annotations

import datetime
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_from_scratch.training import run as runs
from llm_from_scratch.training.progress import (
    SAVE_AWAITED,
    Calendar,
    Remaining,
    StepTimer,
    clock_time,
    in_words,
    with_prefix,
)
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train

from ..tiny import tiny_config

MINUTES = 60.0


@pytest.mark.cases(2)
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "settings",
    [
        {"max_iters": 9, "eval_interval": 4},
        {"max_iters": 8, "eval_interval": 4},
        {"max_iters": 8, "eval_interval": 4, "inclusive_max_iters": True},
        {"max_iters": 9, "eval_interval": 4, "save_interval": 2},
        {"max_iters": 3, "eval_interval": 100},
        {"max_iters": 0},
    ],
)
def test_the_calendar_equals_the_events(tiny_data: Path, settings: dict[str, Any], monkeypatch: Any) -> None:
    config = tiny_config(tiny_data, out_dir="run", final_eval=True, **settings)
    happened: dict[str, list[int]] = {"evaluate": [], "save": []}
    for name, steps in happened.items():
        original = getattr(Run, name)

        def noted(self: Run, original: Any = original, steps: list[int] = steps) -> None:
            steps.append(self.state.step)
            original(self)

        monkeypatch.setattr(Run, name, noted)
    calendar = Calendar.of(make_plan(config))
    result = train(config)
    for step in range(calendar.last + 1):
        assert calendar.evaluations(step) == sum(done >= step for done in happened["evaluate"])
        assert calendar.saves(step) == sum(step <= done < calendar.last for done in happened["save"])
    if calendar.last:
        assert (
            result.final is not None and result.final.tokens + 1 == calendar.final_tokens
        )  # nothing predicts the first


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("final_eval", "expected"), [(True, False), ("always", True), (False, False)])
def test_a_long_last_evaluation(tiny_data: Path, final_eval: Any, expected: bool, monkeypatch: Any) -> None:
    """Of 200 tokens or so, at a rate of a token in a million seconds."""
    config, evaluate = tiny_config(tiny_data, out_dir="run", final_eval=final_eval, max_iters=1), Run.evaluate

    def slowly(self: Run) -> None:
        evaluate(self)
        self.eval_rate = 1e-6

    monkeypatch.setattr(Run, "evaluate", slowly)
    assert (Calendar.of(make_plan(config)).final_seconds(1e-6, trained=60.0) > 0) == expected
    assert (train(config, quiet=True).final is not None) == expected


class Simulated:
    """A run on a clock of its own."""

    def __init__(
        self, calendar: Calendar, first: int, seed: int, update: float, evaluation: float, save: float, cold: float
    ):
        self.now, self.calendar, self.first, self.rng = 1000.0, calendar, first, random.Random(seed)
        self.update, self.evaluation, self.save, self.cold = update, evaluation, save, cold
        self.timer = StepTimer(clock=lambda: self.now)
        self.remaining = Remaining(calendar, self.timer, first)
        self.foretold: dict[int, tuple[float, float]] = {}

    def spend(self, seconds: float, spread: float = 0.03) -> None:
        self.now += seconds * self.rng.uniform(1 - spread, 1 + spread)

    def run(self) -> None:
        for step in range(self.first, self.calendar.last):
            if step % self.calendar.eval_interval == 0:
                self.spend(self.evaluation * (self.cold if step == self.first else 1))
            if step and step % (self.calendar.save_interval or self.calendar.eval_interval) == 0:
                self.spend(self.save)
            self.timer.start()
            self.spend(self.update * (8 if step == self.first else 1), spread=0.3)
            self.timer.pause()
            self.spend(self.update / 4)
            if step % 20 == 19 and (seconds := self.remaining.seconds(step + 1)) is not None:
                self.foretold[step + 1] = (self.now, seconds)
        if self.calendar.evaluates_last:
            self.spend(self.evaluation)
        if self.calendar.final_eval:
            self.spend(self.evaluation * self.calendar.final_tokens / self.calendar.eval_tokens)
        self.now += self.calendar.save_bytes * SAVE_AWAITED


@pytest.mark.parametrize("first", [0, 37])
@pytest.mark.parametrize("save_interval", [None, 40])
@pytest.mark.parametrize(
    "evaluation,save",
    [(0.0, 0.0), (2.0, 0.0), (20.0, 0.1), (20.0, 1.0)],  # of an update of 0.1 s: up to most of the run
)
def test_after_20_updates_the_end_is_known(
    first: int, save_interval: int | None, evaluation: float, save: float
) -> None:
    size = int(save / 3.1e-9) // 2  # the first one shows that it is more than expected
    calendar = Calendar(1000, 100, save_interval, True, True, 1000, 50_000, 120_000, size)
    for seed in range(2):
        run = Simulated(calendar, first, seed, 0.1, evaluation, save, cold=1.1 if save < 0.5 else 2.0)
        run.run()
        assert 1 not in run.foretold  # one update tells nothing: it warms up
        knows = (
            20 if first == 0 and save < 0.5 else 400
        )  # else nothing of an evaluation, or of a save, has been seen yet
        for step in (knows, 600, 900):
            now, seconds = run.foretold[step]
            assert seconds == pytest.approx(run.now - now, rel=0.1), step


def test_without_measurements_the_expectation_is_used() -> None:
    now = 0.0
    timer = StepTimer(clock=lambda: now)
    calendar = Calendar(100, 50, None, False, False, 10, 90, 1000, 0)
    remaining = Remaining(calendar, timer, first=10)
    for _ in range(2):
        assert remaining.seconds(10) is None  # the first update warms up: it tells nothing
        timer.start()
        now += 2.0
        timer.pause()
    # 88 updates of 2 s; one evaluation of 90 tokens, each of which takes a third of an update's 0.2 s
    assert remaining.seconds(12) == pytest.approx(88 * 2.0 + 90 * 0.2 / 3)


def test_building_the_run_and_warming_up_are_not_expected_again() -> None:
    """A run of 60 s once ended at 56: its last evaluation was expected to be as slow as the start of the process."""
    now = 0.0
    timer = StepTimer(clock=lambda: now)
    now += 5.0  # the model is built
    calendar = Calendar(100, 100, None, True, True, 10, 200, 1000, 0)
    remaining = Remaining(calendar, timer, first=0)
    now, remaining.rate = now + 3.0, 100.0  # the first evaluation: half of it loads kernels
    for _ in range(2):
        timer.start()
        now += 1.0
        timer.pause()
    # 98 updates, an evaluation like the first, and 1,000 tokens at 100 tokens/s
    assert remaining.seconds(2) == pytest.approx(98 * 1.0 + 3.0 + 10.0)


@pytest.mark.usefixtures("here")
def test_a_run_reports_the_speed_of_its_evaluations(tiny_data: Path, monkeypatch: Any) -> None:
    """The train split, which is first, takes 4 s in an evaluation, the val split 0.5 s."""
    now, found = 0.0, list[float]()

    def estimate(model: Any, data: Any, block_size: int, windows: int, *_: Any) -> float:
        nonlocal now
        now += 4.0 if len(data) > 1000 else 0.5
        return 1.0

    monkeypatch.setattr(runs, "estimate_loss", estimate)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: now))
    evaluate = Run.evaluate

    def noted(self: Run) -> None:
        evaluate(self)
        assert self.log.remaining is not None and self.log.remaining.rate is not None
        found.append(self.log.remaining.rate)

    monkeypatch.setattr(Run, "evaluate", noted)
    train(tiny_config(tiny_data, out_dir="run", final_eval=False, max_iters=1), quiet=True)
    assert set(found) == {2 * 4 * 8 / 0.5}  # eval_iters, sequences, tokens


def test_a_long_last_evaluation_is_left_out() -> None:
    calendar = Calendar(100, 50, None, True, True, 10, 100, 121_000, 0)
    assert calendar.final_seconds(rate=1000.0, trained=100.0) == 0.0
    assert calendar.final_seconds(rate=1000.0, trained=122.0) == 121.0
    assert calendar.final_seconds(rate=1100.0, trained=100.0) == 110.0


def test_lengths_of_time() -> None:
    shown = {3.4: "3 s", 59.6: "1 min 00 s", 61: "1 min 01 s", 3599.6: "1 h 00 min", 5400: "1 h 30 min",
             47 * 3600: "47 h 00 min", 50 * 3600 + 59: "2 d 02 h"}  # fmt: skip
    assert {seconds: in_words(seconds) for seconds in shown} == shown
    rounded = {
        3.4: "3 s",
        59.6: "1 min",
        61: "1 min",
        95: "2 min",
        3569: "59 min",
        3599.6: "1 h 00 min",
        5400: "1 h 30 min",
    }
    assert {seconds: in_words(seconds, rounded=True) for seconds in rounded} == rounded
    evening = datetime.datetime(2026, 11, 20, 23, 0)
    assert clock_time(1800, evening) == "23:30" and clock_time(3600, evening) == "2026-11-21 00:00"


def test_rates() -> None:
    shown = {0.0: "0", 12.4: "12", 950.0: "950", 999.6: "1.0k", 2796.0: "2.8k", 9960.0: "10k", 123_456.0: "123k",
             1_250_001.0: "1.3M", 4.7e9: "4.7G"}  # fmt: skip
    assert {number: with_prefix(number) for number in shown} == shown
