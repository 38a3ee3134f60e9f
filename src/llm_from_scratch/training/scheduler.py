"""The learning rate as a pure function of the step, so there is no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config import SchedulerConfig


def learning_rate_at(step: int, peak: float, config: SchedulerConfig, max_iters: int) -> float:
    """Learning rate of the update at `step` (0 is the first). max_iters is the default of lr_decay_iters.

    Linear warm-up, (step + 1) / (warmup_iters + 1) of the peak, so that the first step already learns; then the
    schedule that config names. decay_lr=False is the peak at every step.
    """
    if not config.decay_lr:
        return peak
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    end = max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    return SCHEDULES[config.schedule](step, peak, config, end)


def cosine(step: int, peak: float, config: SchedulerConfig, end: int) -> float:
    """Half a cosine from the peak to min_lr (arXiv 1608.03983, as nanoGPT uses it), then min_lr."""
    left = 0.5 * (1.0 + math.cos(math.pi * _done(step, config.warmup_iters, end)))
    return _between(step, peak, config, end, left)


def linear(step: int, peak: float, config: SchedulerConfig, end: int) -> float:
    """A straight line from the peak to min_lr, then min_lr. lr_ends bends it without changing the steps before; the
    last line ends at `end`, which a longer run moves."""
    left, lines = 1.0, sorted((config.lr_ends or {0: end}).items())
    lines[-1] = (lines[-1][0], end)
    for (begin, aim), (until, _) in zip(lines, [*lines[1:], (step, 0)], strict=True):
        left *= 1.0 - _done(min(step, until), max(config.warmup_iters, begin), int(aim))
    return _between(step, peak, config, end, left)


def constant(step: int, peak: float, config: SchedulerConfig, end: int) -> float:
    """The peak, also after `end`."""
    return peak


def wsd(step: int, peak: float, config: SchedulerConfig, end: int) -> float:
    """The peak; over the last cooldown_frac of the run a straight line to min_lr, then min_lr."""
    begin = max(config.warmup_iters, end - round(config.cooldown_frac * end))
    return _between(step, peak, config, end, 1.0 - _done(step, begin, end))


# each after the warm-up: (step, peak, config, the step at which the decay ends) -> learning rate
Schedule = Callable[[int, float, SchedulerConfig, int], float]
SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def _done(step: int, begin: int, end: int) -> float:
    """The share of the decay that is over, from 0 to 1."""
    return min(1.0, max(0.0, (step - begin) / max(1, end - begin)))


def _between(step: int, peak: float, config: SchedulerConfig, end: int, left: float) -> float:
    return config.min_lr if step > end else config.min_lr + left * (peak - config.min_lr)
