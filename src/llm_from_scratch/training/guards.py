"""What keeps a run alive, or ends it well: signals, numbers that are not finite, spikes."""

from __future__ import annotations

import collections
import math
import signal
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..errors import Interrupted, NotFiniteError
from ..machine.device import Runtime

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGPIPE")  # Windows has the first two only


class StopRequest:
    """Turns the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP into "finish the step, save, leave"; the second ends at once.

    Used as a context manager; the former handlers come back at its end. Outside the main thread it does nothing.
    """

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size
        self.signum: int | None = None
        self.heard: int | None = None
        """What some process was sent, as all of them know it after the same step."""
        self.is_second = False
        self.former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                signum = getattr(signal, name, None)
                if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:  # nohup's SIGHUP
                    self.former[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self.former.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            self.is_second = True
            raise KeyboardInterrupt
        self.signum = signum

    def if_unheard(self, reader_is_gone: bool) -> None:
        """Where whoever read the run's lines has left (`| head`), the run ends as by SIGPIPE, which Python ignores."""
        if reader_is_gone and self.signum is None:
            self.signum = getattr(signal, "SIGPIPE", signal.SIGTERM)  # Windows has none

    def agreed(self) -> bool:
        """Whether to stop after this step. All processes leave at the same one."""
        return (self.signum if self.world_size == 1 else self.heard) is not None

    def pulse(self) -> None:
        """Raises Interrupted after a signal. Several processes must leave together, so they finish their evaluation."""
        if self.signum is not None and self.world_size == 1:
            raise Interrupted

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 without one."""
        signum = self.signum or self.heard
        return 128 + signum if signum else 0


class SpikeDetector:
    """Knows a loss far above those of the last WINDOW steps.

    A spike lies above the median by more than REACH times the distance of the 95th percentile from it: both measures
    are blind to a few spikes in the window, follow a fall and a lasting change of level, and need no assumption on the
    shape of the noise. The loss of the step before is left out, so that a device need not be waited for.
    """

    WINDOW, LEAST, REACH, FLOOR = 128, 32, 8.0, 0.1

    def __init__(self, recent: list[tuple[int, float]]):
        self.recent = recent

    def threshold(self, step: int) -> float:
        """The loss from which on `step` is a spike; infinite while too few are known."""
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
    """What a step was found to be."""

    step: int
    learning_rate: float
    loss: float
    """Mean over the global batch, nats per token."""
    grad_norm: float
    skipped: bool = False
    spike: bool = False
    signum: int | None = None
    """A signal that some process was sent."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"


class StepGuard:
    """Judges each step on the device, in the step itself, and tells the host when the device has got there.

    On a GPU the host reads what was found one step late, and so never waits for the step that it has just begun.
    """

    def __init__(self, recent_losses: list[tuple[int, float]], skip_spikes: bool, runtime: Runtime):
        self.detector, self.skip_spikes, self.runtime = SpikeDetector(recent_losses), skip_spikes, runtime
        self.pending: collections.deque[tuple[int, float, Tensor, Any]] = collections.deque()

    def judge(self, step: int, learning_rate: float, loss: Tensor, norm: Tensor, stop: StopRequest) -> Tensor:
        """Whether the update must be left out: a 0-dim bool tensor on the device.

        loss: of this process's share of the batch; norm: of the gradient. Both 0-dim, on the device.
        """
        heard = torch.zeros(len(SIGNALS), device=loss.device)  # filled there: a copy from the host would wait
        if stop.signum is not None:
            heard[SIGNALS.index(signal.Signals(stop.signum).name)] = 1
        shared = torch.cat([loss.reshape(1) / self.runtime.world_size, heard])
        if self.runtime.world_size > 1:
            torch.distributed.all_reduce(shared)
        spike = shared[0] > self.detector.threshold(step)
        skip = ~(torch.isfinite(shared[0]) & torch.isfinite(norm))
        if self.skip_spikes:
            skip = skip | spike
        row = torch.cat([shared, torch.stack([norm, skip, spike])])
        event = None
        if row.device.type == "cuda":
            host = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            row = host.copy_(row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, learning_rate, row, event))
        return skip

    def findings(self, all_of_them: bool = False) -> Iterator[Finding]:
        """What is known by now, oldest first; all_of_them waits for the device."""
        late = 1 if self.runtime.device.type == "cuda" and not all_of_them else 0
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
    """Whether every parameter is; waits for the device."""
    return bool(torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all())


def not_finite_error(
    found: Finding, begins: list[int], model: torch.nn.Module, config: Config, runtime: Runtime
) -> NotFiniteError:
    """The diagnosis: begins are the positions of the batch's first tokens in the training data."""
    weights = "finite" if all_finite(model) else "not finite"
    shown = ", ".join(map(str, begins[:8])) + (", ..." if len(begins) > 8 else "")
    dtype = str(runtime.dtype).removeprefix("torch.")
    return NotFiniteError(
        f"the loss is {found.loss:.4g} at step {found.step} (gradient norm {found.grad_norm:.4g}, learning rate "
        f"{found.learning_rate:.3g}, {dtype}, weights {weights}, batch from the tokens at {shown}). "
        f"Try --learning_rate={config.optimizer.learning_rate / 3:.1g}, a longer --warmup_iters"
        + (", or --dtype=float32" if dtype != "float32" else "")
    )
