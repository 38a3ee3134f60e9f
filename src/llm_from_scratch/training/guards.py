"""What keeps a run alive, or ends it well: signals, and losses that are not numbers."""

from __future__ import annotations

import math
import signal
import threading
from types import FrameType
from typing import Any

import torch

from ..config import Config
from ..core.runtime import Runtime


class TrainingError(RuntimeError):
    """The run cannot go on. The message says at which step, why, and what to try."""


class StopRequest:
    """Turns the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP into "finish the step, save, leave"; the second ends at once.

    Used as a context manager; the former handlers come back at its end. Outside the main thread it does nothing.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Windows has the first two only

    def __init__(self) -> None:
        self.signum: int | None = None
        self.former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in self.NAMES:
                signum = getattr(signal, name, None)
                if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:  # nohup's SIGHUP
                    self.former[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self.former.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    def agreed(self, runtime: Runtime) -> bool:
        """Whether to stop after this step. All processes leave at the same one."""
        if runtime.world_size == 1:
            return self.signum is not None
        flag = torch.tensor([self.signum or 0], device=runtime.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        self.signum = int(flag) or None
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 without one."""
        return 128 + self.signum if self.signum else 0


def check_finite(loss: float, step: int, learning_rate: float, config: Config, runtime: Runtime) -> None:
    """Raises TrainingError where the loss is not a finite number: such a run never recovers."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {step} (learning rate {learning_rate:.3g}, {runtime.dtype}): stopped; the "
            f"last good checkpoint is kept. Try --learning_rate={config.optimizer.learning_rate / 3:.1g}, a longer "
            "--warmup_iters, or --dtype=float32"
        )
