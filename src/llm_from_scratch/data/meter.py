"""The progress of an encoding: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable
from typing import Any

EVERY = 10.0  # seconds between two lines


class Meter:
    """total: bytes of the sources, 0 if unknown. position: returns the bytes of them that were read."""

    def __init__(self, total: int, position: Callable[[], int], report: Callable[[str], None]) -> None:
        self.total, self.position, self.report = total, position, report
        self.bytes = 0  # of text
        self.start: tuple[float, int] | None = None  # time and position when the first text was encoded
        self._shown = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.percentage:3.0f}% {task.description}")
            self._bar = Progress(BarColumn(), text, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total or None)
            self._bar.start()

    def update(self, tokens: int, text_bytes: int) -> None:
        """tokens: written so far; text_bytes: encoded since the last call."""
        now, read = time.monotonic(), self.position()
        self.start = self.start or (now, read)
        self.bytes += text_bytes
        seconds = now - self.start[0]
        said = f"{tokens:,} tokens, {self.bytes / 1e6 / max(seconds, 0.001):.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=read, description=said)
        elif now - self._shown > EVERY:
            self._shown = now
            if self.total and (done := read - self.start[1]) > 0:
                left = datetime.timedelta(seconds=round(seconds * (self.total - read) / done))
                said += f", {100 * read / self.total:.0f}%, {left} left"
            self.report(f"  {said}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
