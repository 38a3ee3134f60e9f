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

from ..errors import PeerMemoryError, TrainingError, listed
from ..machine.device import Runtime
from ..machine.processes import any_rank
from .sharding import local
from .signals import SIGNALS, StopRequest

CHECK = 100  # steps between two comparisons of the ranks' parameters: about a ten-thousandth of the time


class SpikeDetector:
    """Finds losses far above the losses of the last WINDOW steps.

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
    rank: int | None = None
    """The only process with a gradient that is not finite after the exchange: its device or memory is faulty."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __str__(self) -> str:
        alone = "" if self.rank is None else f" on rank {self.rank} only (its device may be faulty)"
        return f"step {self.step}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}{alone}"


class StepGuard:
    """Judges each step on the device, and gives the results to the host once the device has computed them. On a GPU,
    results of step n are read while step n + 1 runs, so the host never waits."""

    def __init__(self, recent_losses: list[tuple[int, float]], skip_spikes: bool, runtime: Runtime):
        self.detector, self.skip_spikes, self.runtime = SpikeDetector(recent_losses), skip_spikes, runtime
        self.pending: collections.deque[tuple[int, float, Tensor, Any]] = collections.deque()

    def judge(self, step: int, learning_rate: float, loss: Tensor, norm: Tensor, stop: StopRequest) -> Tensor:
        """Whether to skip the update: a 0-dim bool tensor on the device, the same on every process. loss: of this
        process's share of the batch; norm: of the gradient. Both 0-dim, on the device. Raises PeerMemoryError, before
        anything has changed, if another process ran out of memory in this step."""
        told = torch.zeros(len(SIGNALS) + 3, device=loss.device)  # filled there: a copy from the host would wait
        if stop.signum is not None:
            told[SIGNALS.index(signal.Signals(stop.signum).name)] = 1
        told[-3] = bad = (~torch.isfinite(norm)).to(told)
        told[-2] = bad * self.runtime.rank
        shared = self._sum_over_ranks(torch.cat([loss.reshape(1) / self.runtime.world_size, told]))
        if self.runtime.can_regroup and shared[-1] > 0:
            raise PeerMemoryError
        spike = shared[0] > self.detector.threshold(step)
        norm = torch.where(shared[-3] > 0, torch.nan, norm)
        skip = ~(torch.isfinite(shared[0]) & torch.isfinite(norm)) | (spike & self.skip_spikes)
        row = torch.cat([shared[:-1], torch.stack([norm, skip, spike])])
        event = None
        if row.device.type == "cuda":
            host = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            row = host.copy_(row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, learning_rate, row, event))
        return skip

    def judge_short(self, device: torch.device) -> None:
        """Takes part in the others' judge() without a gradient: this process ran out of memory."""
        told = torch.zeros(1 + len(SIGNALS) + 3, device=device)
        told[-1] = 1
        self._sum_over_ranks(told)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.runtime.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def collect(self, wait: bool = False) -> Iterator[Finding]:
        """The results that are known, oldest first. wait: waits for the device and returns all."""
        late = 1 if self.runtime.device.type == "cuda" and not wait else 0
        while len(self.pending) > late:
            step, learning_rate, row, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            loss, *flags, bad, ranks, norm, skipped, spike = row.tolist()
            self.detector.add(step, loss)
            sent = [name for name, flag in zip(SIGNALS, flags, strict=True) if flag]
            signum = int(getattr(signal, sent[0])) if sent else None
            rank = int(ranks) if bad == 1 < self.runtime.world_size else None
            yield Finding(step, learning_rate, loss, norm, bool(skipped), bool(spike), signum, rank)

    def compare(self, model: torch.nn.Module, step: int, now: bool = False) -> None:
        """Every CHECK steps, or now: raises TrainingError, in every process, if the parameters that each one holds
        whole differ between the processes."""
        if self.runtime.world_size == 1 or (step % CHECK and not now) or (found := checksum(model)) is None:
            return
        sums = [torch.empty_like(found) for _ in range(self.runtime.world_size)]
        torch.distributed.all_gather(sums, found)
        values = [int(value) for value in sums]
        ((common, count),) = collections.Counter(values).most_common(1)
        if count == len(values):
            return
        others = [rank for rank, value in enumerate(values) if value != common]
        which = f"rank{'s' * (len(others) > 1)} {listed(others)}"
        doubt = f"has different parameters from the {count} others" if len(others) == 1 else "have different parameters"
        doubt, advice = f"{doubt} at step {step}", "Leave that machine or device out, and resume"
        if 2 * count <= len(values):
            which, advice = f"ranks {listed(list(range(len(values))))}", "Resume"
            doubt = f"have different parameters at step {step}, without a majority"
        raise TrainingError(
            f"{which} {doubt}: a device or its memory is faulty. {advice} from the last checkpoint: parameters are "
            "compared before each save"
        )


def checksum(model: torch.nn.Module) -> Tensor | None:
    """A number of all bits of the parameters that every process holds whole: a (1,) int64 tensor on the device. None if
    there are none."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = [p.detach() for p in model.parameters() if not hasattr(p, "device_mesh")]
    sums = [p.view(integers[p.element_size()]).sum(dtype=torch.int64) for p in whole]
    if not sums:
        return None
    return (torch.stack(sums) * torch.arange(1, 2 * len(sums), 2, device=sums[0].device)).sum().reshape(1)


def all_finite(model: torch.nn.Module, runtime: Runtime) -> bool:
    """Whether every parameter of every process is finite. All take part. Waits for the device."""
    finite = torch.stack([local(p.detach()).isfinite().all() for p in model.parameters()]).all()
    return not any_rank(not finite, runtime.device, runtime.world_size)
