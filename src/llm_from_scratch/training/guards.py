"""Checks of every step: numbers that are not finite, and spikes of the loss."""

from __future__ import annotations

import collections
import math
import signal
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..machine.device import Runtime
from .signals import SIGNALS, StopRequest


class SpikeDetector:
    """Finds losses far above those of the last WINDOW steps.

    A spike exceeds the median by more than REACH times the distance from the median to the 95th percentile: a few
    spikes in the window change neither. The previous step's loss is not used, so the host does not wait for the device.
    """

    WINDOW, LEAST, REACH, FLOOR = 128, 32, 8.0, 0.1

    def __init__(self, recent: list[tuple[int, float]]):
        self.recent = recent

    def threshold(self, step: int) -> float:
        """Losses above this are spikes at `step`. Infinite until enough losses are known."""
        known = sorted([loss for before, loss in self.recent if before < step - 1][-self.WINDOW :])
        if len(known) < self.LEAST:
            return math.inf
        median = statistics.median(known)
        return median + max(self.REACH * (known[int(0.95 * len(known))] - median), self.FLOOR * abs(median))

    def add(self, step: int, loss: float) -> None:
        if math.isfinite(loss):
            self.recent.append((step, loss))
            del self.recent[: -self.WINDOW - 1]


@dataclass(frozen=True)
class Finding:
    """The result of a step, read from the device."""

    step: int
    learning_rate: float
    loss: float
    """Mean over the global batch, nats per token."""
    grad_norm: float
    skipped: bool = False
    spike: bool = False
    signum: int | None = None
    """A signal that some process received."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"


class StepGuard:
    """Judges each step on the device, and gives the results to the host once the device has computed them. On a GPU,
    results of step n are read while step n + 1 runs, so the host never waits."""

    def __init__(self, recent_losses: list[tuple[int, float]], skip_spikes: bool, runtime: Runtime):
        self.detector, self.skip_spikes, self.runtime = SpikeDetector(recent_losses), skip_spikes, runtime
        self.pending: collections.deque[tuple[int, float, Tensor, Any]] = collections.deque()

    def judge(self, step: int, learning_rate: float, loss: Tensor, norm: Tensor, stop: StopRequest) -> Tensor:
        """Whether to skip the update: a 0-dim bool tensor on the device. loss: of this process's share of the batch;
        norm: of the gradient. Both 0-dim, on the device."""
        sent = torch.zeros(len(SIGNALS), device=loss.device)  # filled there: a copy from the host would wait
        if stop.signum is not None:
            sent[SIGNALS.index(signal.Signals(stop.signum).name)] = 1
        shared = torch.cat([loss.reshape(1) / self.runtime.world_size, sent])
        if self.runtime.world_size > 1:
            torch.distributed.all_reduce(shared)
        spike = shared[0] > self.detector.threshold(step)
        skip = ~(torch.isfinite(shared[0]) & torch.isfinite(norm)) | (spike & self.skip_spikes)
        row = torch.cat([shared, torch.stack([norm, skip, spike])])
        event = None
        if row.device.type == "cuda":
            host = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            row = host.copy_(row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, learning_rate, row, event))
        return skip

    def collect(self, wait: bool = False) -> Iterator[Finding]:
        """The results that are known, oldest first. wait: waits for the device and returns all."""
        late = 1 if self.runtime.device.type == "cuda" and not wait else 0
        while len(self.pending) > late:
            step, learning_rate, row, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            loss, *flags, norm, skipped, spike = row.tolist()
            self.detector.add(step, loss)
            sent = [name for name, flag in zip(SIGNALS, flags, strict=True) if flag]
            signum = int(getattr(signal, sent[0])) if sent else None
            yield Finding(step, learning_rate, loss, norm, bool(skipped), bool(spike), signum)


def all_finite(model: torch.nn.Module) -> bool:
    """Whether every parameter is finite. Waits for the device."""
    return bool(torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all())
