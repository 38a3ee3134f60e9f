"""The progress of a run for the page: its metrics.jsonl and samples.jsonl from a given position."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine.files import open_file, read_file

AT_ONCE = 1 << 18  # bytes per response, unless a line is longer
LONGEST = 1 << 22  # bytes of a line; longer lines are skipped
GENERATION = 1 << 40  # added to positions each time a file is replaced
RECENT = 20.0  # seconds since the last line; if locks are not visible, such a run counts as live


class Watch:
    """A run's folder. Its files may appear, grow, be replaced or deleted at any time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: dict[str, tuple[int, int]] = {}  # file: its inode, and how often that has changed
        self._planned: tuple[str, int | None] = ("", None)

    def about(self) -> dict[str, Any]:
        facts = {"live": self._live(), "step": self._last_step(), "max_iters": self._max_iters()}
        return {"name": self.folder.resolve().name, **facts}

    def metrics(self, after: int) -> dict[str, Any]:
        entries, following, reset = self._lines("metrics.jsonl", after)
        points = [entry for entry in entries if type(entry.get("step")) is int]
        return {"points": points, "next": following, "reset": reset}

    def samples(self, after: int) -> dict[str, Any]:
        entries, following, reset = self._lines("samples.jsonl", after)
        samples = [
            {"step": entry["step"], "text": entry["text"]}
            for entry in entries
            if type(entry.get("step")) is int and isinstance(entry.get("text"), str)
        ]
        return {"samples": samples, "next": following, "reset": reset}

    def _lines(self, name: str, after: int) -> tuple[list[dict[str, Any]], int, bool]:
        """The objects from a position, the next position, and whether the file was replaced."""
        try:
            with os.fdopen(open_file(self.folder / name), "rb") as file:
                info = os.fstat(file.fileno())
                inode, count = self.seen.get(name, (info.st_ino, 0))
                count += inode != info.st_ino
                self.seen[name] = info.st_ino, count
                generation, at = divmod(after, GENERATION)
                reset = generation != count or at > info.st_size
                at = 0 if reset else at
                file.seek(at)
                data = file.read(AT_ONCE)
                if b"\n" not in data:
                    data += file.read(LONGEST - len(data))
        except (OSError, UserError):
            return [], 0, after > 0
        end = data.rfind(b"\n") + 1
        if not end and len(data) == LONGEST:
            end = len(data)  # skip the rest of a line that is too long
        return _objects(data[:end]), count * GENERATION + at + end, reset

    def _last_step(self) -> int | None:
        with contextlib.suppress(OSError, UserError):
            with os.fdopen(open_file(self.folder / "metrics.jsonl"), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 14)))
                steps = [entry.get("step") for entry in _objects(file.read(1 << 14))]
            return next((step for step in reversed(steps) if type(step) is int), None)
        return None

    def _max_iters(self) -> int | None:
        """From the newest checkpoint."""
        newest = max((path.name for path in self.folder.glob("step-*") if path.name[5:].isdigit()), default="")
        if newest != self._planned[0]:
            planned = None
            with contextlib.suppress(OSError, UserError, ValueError, RecursionError, KeyError, TypeError):
                planned = json.loads(read_file(self.folder / newest / "config.json", 1 << 20))["training"]["max_iters"]
            self._planned = newest, planned if type(planned) is int else None
        return self._planned[1]

    def _live(self) -> bool:
        """Whether a trainer holds the folder's lock. Does not take the lock, which would block a trainer."""
        try:
            lock = os.stat(self.folder / ".lock")
            major, minor = os.major(lock.st_dev), os.minor(lock.st_dev)
            held = Path("/proc/locks").read_text(encoding="ascii")
            if f" {major:02x}:{minor:02x}:{lock.st_ino} " in held:
                return True
        except (OSError, AttributeError, ValueError):
            pass
        try:
            return time.time() - os.stat(self.folder / "metrics.jsonl").st_mtime < RECENT
        except OSError:
            return False


def _objects(lines: bytes) -> list[dict[str, Any]]:
    """The JSON objects among some lines. NaN and infinities become null."""
    found = []
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line, parse_constant=lambda name: None)
            if isinstance(entry, dict):
                found.append(entry)
    return found
