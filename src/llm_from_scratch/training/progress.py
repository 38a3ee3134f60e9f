"""The remaining work of a run, and its duration: updates, evaluations, checkpoints, the last evaluation."""

from __future__ import annotations

import collections
import datetime
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # it imports torch
    from .plan import Plan

LONG_FINAL_EVALUATION = 120.0  # seconds; a longer one is left to llm-eval, unless the run itself was longer
FORWARD_SHARE = 1 / 3  # of an update's time: the backward pass has twice the arithmetic of the forward pass
# A checkpoint, seconds per byte (benchmarks/RESULTS.md): writing in the background takes processor time from the
# steps on a CPU; the last one is waited for
SAVE_BESIDE, SAVE_AWAITED = 3.1e-9, 6.8e-9


@dataclass(frozen=True)
class Calendar:
    """When a run evaluates and saves. Assumes that every evaluation that may save does save."""

    last: int
    """Steps after which the run ends."""
    eval_interval: int
    save_interval: int | None
    evaluates_last: bool
    """Whether the run evaluates after its last step. With nanoGPT's step count (inclusive_max_iters) it does not."""
    final_eval: bool | Literal["always"]
    step_tokens: int
    """Tokens of an update."""
    eval_tokens: int
    """Tokens of an evaluation, both splits."""
    final_tokens: int
    """Tokens of the whole validation split."""
    save_bytes: int

    @classmethod
    def of(cls, plan: Plan) -> Calendar:
        config, training, block_size = plan.config, plan.config.training, plan.config.model.block_size
        windows = training.eval_iters * config.data.batch_size
        return cls(
            plan.last_step, training.eval_interval, training.save_interval, not training.inclusive_max_iters,
            training.final_eval, plan.tokens_per_step, 2 * windows * block_size, len(plan.val_data),
            (plan.sizes.weights if plan.base is None else plan.sizes.gradients) + plan.sizes.optimizer,
        )  # fmt: skip

    def evaluations(self, step: int) -> int:
        """Evaluations from this step to the end, including the one after the last update."""
        last = int(self.evaluates_last and self.last > 0)
        return _multiples(self.eval_interval, step, self.last) + last

    def saves(self, step: int) -> int:
        """Checkpoints written in the background from this step on, without the last one of the run."""
        return _multiples(self.save_interval or self.eval_interval, max(1, step), self.last)

    def final_seconds(self, rate: float, trained: float) -> float:
        """Duration of the last evaluation, given tokens/s and the seconds of updates so far; 0 if it is skipped."""
        seconds = self.final_tokens / rate if rate and self.final_eval else 0.0
        is_run = self.final_eval == "always" or seconds <= max(LONG_FINAL_EVALUATION, trained)
        return seconds if is_run else 0.0


def _multiples(interval: int, begin: int, end: int) -> int:
    """The number of multiples of interval in range(begin, end)."""
    return max(0, (end - 1) // interval - (begin - 1) // interval)


class StepTimer:
    """Seconds per step since the last log line, without evaluations and checkpoints; and pauses between steps."""

    RECENT = 256  # updates used to predict the next ones

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.count, self.total, self._sum = 0, 0.0, 0.0
        self.updates = 0
        self.recent: collections.deque[float] = collections.deque(maxlen=self.RECENT)
        self.on_pause: Callable[[int, float], None] | None = None
        """Called after a pause between two updates, such as an evaluation: (updates before it, seconds)."""
        self._begin: float | None = None
        self._end = clock()

    def start(self) -> None:
        self._begin = self.clock()
        if self.on_pause is not None:
            self.on_pause(self.updates, self._begin - self._end)

    def pause(self) -> None:
        if self._begin is None:
            return
        self._end = self.clock()
        spent = self._end - self._begin
        self.count += 1
        self._sum, self.total, self._begin = self._sum + spent, self.total + spent, None
        if self.updates:  # the first warms up
            self.recent.append(spent)
        self.updates += 1

    def seconds_per_step(self) -> float:
        """Mean of the updates since the last call."""
        self.pause()
        mean = self._sum / max(1, self.count)
        self.count, self._sum = 0, 0.0
        return max(mean, 1e-9)


class Remaining:
    """Seconds to the end of a run, from the durations of its updates, evaluations and checkpoints so far."""

    def __init__(self, calendar: Calendar, timer: StepTimer, first: int):
        """first: updates before the timer started."""
        self.calendar, self.timer, self.first = calendar, timer, first
        self.rate: float | None = None
        """Tokens/s of the last evaluation, without the loading time of its first batches."""
        self.seen: dict[tuple[bool, bool], tuple[int, float]] = {}
        """(whether with an evaluation, with a checkpoint) -> (pauses between updates, their seconds)."""
        timer.on_pause, timer._end = self._paused, timer.clock()  # building the run is not a pause

    def seconds(self, step: int) -> float | None:
        """After `step` steps; None before the second step of this process."""
        calendar, timer = self.calendar, self.timer
        if not timer.recent:
            return None
        update, updates = statistics.fmean(timer.recent), max(0, calendar.last - step)
        plain, evaluation, save = self._pauses(update)
        ahead = updates * (update + plain)
        ahead += calendar.evaluations(step) * evaluation + calendar.saves(step) * save
        rate = self.rate or (calendar.eval_tokens / evaluation if evaluation > 0 else 0.0)
        return ahead + calendar.final_seconds(rate, timer.total + ahead) + calendar.save_bytes * SAVE_AWAITED

    def _paused(self, updates: int, seconds: float) -> None:
        step, calendar = self.first + updates, self.calendar
        kind = (
            calendar.evaluations(step) > calendar.evaluations(step + 1),
            calendar.saves(step) > calendar.saves(step + 1),
        )
        count, total = self.seen.get(kind, (0, 0.0))
        self.seen[kind] = (count + 1, total + seconds)

    def _pauses(self, update: float) -> tuple[float, float, float]:
        """Seconds between two updates for an evaluation and for a checkpoint, as measured, else as expected."""
        mean = {kind: seconds / count for kind, (count, seconds) in self.seen.items()}
        plain, both = mean.get((False, False), 0.0), mean.get((True, True))
        save = mean.get((False, True), self.calendar.save_bytes * SAVE_BESIDE)
        expected = FORWARD_SHARE * update * self.calendar.eval_tokens / self.calendar.step_tokens
        evaluation = mean.get((True, False), expected if both is None else max(0.0, both - save))
        if both is not None:  # the first evaluation also warms up: those with a checkpoint are more accurate
            evaluation = min(evaluation, both)
            save = mean.get((False, True), both - evaluation)
        return plain, evaluation, save


def with_prefix(number: float) -> str:
    """A number with two or three digits: 950, 2.8k, 1.2M."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.1f}{unit}" if unit and number < 9.95 else f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.1f}G"


def in_words(seconds: float, rounded: bool = False) -> str:
    """A duration, with two significant units. rounded: to minutes, unless it is shorter than one."""
    if rounded and seconds >= 59.5:
        return in_words(60 * round(seconds / 60)).removesuffix(" 00 s")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"


def clock_time(seconds: float, now: datetime.datetime | None = None) -> str:
    """The time of day in this many seconds, with the date if it is not today."""
    begin = now or datetime.datetime.now()
    end = begin + datetime.timedelta(seconds=seconds)
    return end.strftime("%H:%M" if end.date() == begin.date() else "%Y-%m-%d %H:%M")
