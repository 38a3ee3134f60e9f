"""The progress of llm-prepare where a bar cannot be drawn."""

from __future__ import annotations

import io
import sys
import time

import pytest

from ...data.meter import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, times, places, lines = Terminal(), iter([0.0, 5.0, 12.0]), iter([10, 50]), list[str]()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    monkeypatch.setenv("TERM", term)
    meter = Meter(100, lambda: next(places), lines.append)
    meter.update(1000, 7_000_000)  # at 5 s, the first text: too early for a line
    meter.update(2000, 7_000_000)  # at 12 s: 40 of the remaining 90 bytes in 7 s
    meter.close()
    assert lines == ["  2,000 tokens, 2.0 MB/s, 50%, 0:00:09 left"] and terminal.getvalue() == ""
