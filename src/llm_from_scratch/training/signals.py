"""Signals that end a run after the step in progress."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..errors import Interrupted
from ..machine.processes import largest

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGPIPE")  # Windows has the first two only


class StopRequest:
    """The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP finishes the step, saves and stops. The second one stops at once. A
    context manager, which restores the previous handlers at its end. Outside the main thread it does nothing."""

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size
        self.signum: int | None = None
        self.shared: int | None = None
        """A signal that some process received, known to all processes after the same step."""
        self.is_second = False
        self.agree: Callable[[bool], bool] = bool
        """Whether it is true in any process. Set if the processes compute every batch together (sharded models)."""
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

    def stop_if_closed(self, stdout_is_closed: bool) -> None:
        """If stdout was closed (`| head`), stop as SIGPIPE would. Python ignores that signal."""
        if stdout_is_closed and self.signum is None:
            self.signum = getattr(signal, "SIGPIPE", signal.SIGTERM)  # Windows has none

    def agreed(self) -> bool:
        """Whether to stop after this step. All processes stop after the same one."""
        return (self.signum if self.world_size == 1 else self.shared) is not None

    def interrupt(self) -> None:
        """Raises Interrupted after a signal to this process; if `agree` is set, to any process. All must raise it
        before one of them acts on it."""
        if self.agree(self.signum is not None):
            raise Interrupted

    def share(self, device: Any) -> None:
        """Makes a signal of any process known to all, between two steps. All take part."""
        self.shared = int(largest(self.signum or 0, device, self.world_size)) or self.shared

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 without one."""
        signum = self.signum or self.shared
        return 128 + signum if signum else 0
