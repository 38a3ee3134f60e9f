"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from ..config import SchedulerConfig


def learning_rate_at(step: int, peak: float, config: SchedulerConfig, max_iters: int) -> float:
    """Learning rate of the update at `step` (0 is the first). max_iters stands in for an unset lr_decay_iters.

    Linear warm-up, (step + 1) / (warmup_iters + 1) of the peak, so that the first step already learns; then

    | schedule | from the warm-up's end to lr_decay_iters                                           |
    |----------|-------------------------------------------------------------------------------------|
    | cosine   | half a cosine from the peak to min_lr (arXiv 1608.03983, as nanoGPT uses it)        |
    | linear   | a straight line from the peak to min_lr                                             |
    | constant | the peak, also afterwards                                                           |
    | wsd      | the peak, and a straight line to min_lr over the last cooldown_frac of the run      |

    and min_lr afterwards. decay_lr=False is the peak at every step.
    """
    if not config.decay_lr:
        return peak
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return peak
    end = max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    if step > end:
        return config.min_lr
    begin = config.warmup_iters
    if config.schedule == "wsd":
        begin = max(begin, end - round(config.cooldown_frac * end))
    done = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))  # 0 to 1
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return config.min_lr + left * (peak - config.min_lr)
