"""Ends a run at a given time: from time to time, the number of updates is chosen again from their speed so far.

The learning rate continues from where it is to the new end (lr_ends), so a change does not touch the steps before it.
The settings of the finished run train the same model without a clock, and an interrupted run resumes with the
settings in its checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from ..core.dataset import SampleOrder
from ..machine.budget import Deadline
from ..machine.processes import sum_over_ranks
from .loggers import RunLog
from .plan import Plan
from .progress import Remaining

FIRST = 2  # updates before the first look at the clock; then after twice as many, and so on, because the plan may be
PART = 8  # far off; later after an 8th of those that are left
SMALL = 0.01  # of the updates that are left: a smaller change is not made
NOTED = 0.1  # a larger change of what was printed last is printed
EARLY = 0.125  # of a run: before that, its planned length changes much
FEW = 0.04  # of a run: fewer steps than these are left out if they would begin another epoch
ALIGNED = 0.03  # of an epoch: a smaller distance from its end is not corrected
EXIT = 0.7  # seconds from the last line of a run to the end of its process


class Pace:
    """When to look at the clock, and how many updates are left."""

    def __init__(self, deadline: Deadline | None, plan: Plan, clock: Callable[[], float] = time.monotonic):
        """deadline: on the clock; None: the number of updates does not change."""
        self.ends_at, self.clock, scheduler = (deadline.at if deadline else 0.0) - EXIT, clock, plan.config.scheduler
        self.most = plan.last_step if deadline and not deadline.may_extend else math.inf
        self.most = min(self.most, plan.order.samples / plan.global_batch)
        self.announced, self.expected = plan.last_step, deadline.expected if deadline else None
        self.is_free = (
            deadline is not None
            and scheduler.schedule == "linear"
            and scheduler.decay_lr
            and scheduler.lr_decay_iters is None
        )
        self.first, self.next_look = plan.start_step, plan.start_step + FIRST

    def replan(self, plan: Plan, step: int, log: RunLog) -> Plan:
        """The plan with the number of updates that fit into the time. All processes get the same number."""
        last = plan.last_step
        if not self.is_free or not self.next_look <= step < last:
            return plan
        assert log.remaining is not None
        fitting = self._fitting(log.remaining, step, last) if plan.runtime.is_master else 0
        chosen = round(sum_over_ranks([fitting], plan.runtime.device, plan.runtime.world_size)[0])
        if plan.order.shifts:  # a few steps of another epoch would be repetitions
            order = with_last_step(plan, step, chosen).order
            over = past_epoch(order.first_sample(chosen, plan.global_batch), order.windows_per_epoch)
            more = math.ceil(over / plan.global_batch)
            chosen -= more if 0 < more < min(FEW * chosen, chosen - step) else 0
        if abs(chosen - last) > max(1, SMALL * (last - step)):
            if abs(chosen - self.announced) > NOTED * self.announced:
                then = f"; {self.expected(chosen)}" if self.expected is not None else ""
                log.say(f"pace: {chosen:,} steps fit into the budget instead of {self.announced:,}{then}")
                self.announced = chosen
            log.expect(chosen)
            plan, last = with_last_step(plan, step, chosen), chosen
        self.next_look = step + max(1, min(step - self.first, (last - step) // PART))
        return plan

    def _fitting(self, left: Remaining, step: int, last: int) -> int:
        """Updates after which the run would end in time."""
        ahead, calendar = left.seconds(step), left.calendar
        if ahead is None:
            return last
        left.calendar = replace(calendar, last=step)
        end = left.seconds(step) or 0.0  # the last evaluation and the last checkpoint
        left.calendar = calendar
        update = (ahead - end) / (last - step)
        fitting = step + max(1, int((self.ends_at - self.clock() - end) / update))
        return int(min(fitting, self.most))


def with_last_step(plan: Plan, step: int, last: int) -> Plan:
    """The plan with another end. From `step` on, the learning rate falls in a straight line from where it is."""
    scheduler, training = plan.config.scheduler, plan.config.training
    ends = {at: end for at, end in (scheduler.lr_ends or {0: training.max_iters}).items() if at < step} | {step: last}
    config = replace(
        plan.config, training=replace(training, max_iters=training.max_iters + last - plan.last_step),
        scheduler=replace(scheduler, lr_ends=ends),
    )  # fmt: skip
    order = ending_whole(plan.order, ends, plan.global_batch) if plan.config.optimizer.forget_ngrams else plan.order
    return replace(plan, config=config, last_step=last, order=order)


def ending_whole(order: SampleOrder, ends: dict[int, float], batch: int) -> SampleOrder:
    """The order of a run that forgets n-grams after each epoch: if it has more than an epoch, the first one is the
    partial one, and the last is whole. ends: by step, the length of the run that was planned then. A change repeats or
    leaves out samples; in the last epoch it does not, because the n-grams would memorize the repeated ones."""
    size, shift, shifts, last = order.windows_per_epoch, 0, list[tuple[int, int]](), 0
    for step, end in sorted(ends.items()):
        begin = step + (step > 0)  # the batch of the step itself is already read
        is_last_epoch = begin * batch + shift >= last - size and step > EARLY * end
        last = int(end) * batch + shift
        over = past_epoch(last, size)
        if last > size and abs(over) > size * ALIGNED and not is_last_epoch:
            shift -= over
            if begin * batch + shift < 0:
                shift += size
            last = int(end) * batch + shift
        shifts.append((begin, shift))
    return replace(order, shifts=tuple(shifts))


def past_epoch(sample: int, size: int) -> int:
    """Samples from the nearest end of an epoch of this size to a sample; negative if the sample is before it."""
    return (sample + size // 2) % size - size // 2
