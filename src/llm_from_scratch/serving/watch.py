"""The progress of a run for the page: its metrics.jsonl and samples.jsonl from a given position."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine.files import json_steps, open_file, read_file

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
        entries, place = self._lines("metrics.jsonl", after)
        return {"points": entries, **place}

    def samples(self, after: int) -> dict[str, Any]:
        entries, place = self._lines("samples.jsonl", after)
        samples = [{"step": e["step"], "text": e["text"]} for e in entries if isinstance(e.get("text"), str)]
        return {"samples": samples, **place}

    def _lines(self, name: str, after: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The entries from a position, the next position, and whether the file was replaced."""
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
            return [], {"next": 0, "reset": after > 0}
        end = data.rfind(b"\n") + 1
        if not end and len(data) == LONGEST:
            end = len(data)  # skip the rest of a line that is too long
        return json_steps(data[:end]), {"next": count * GENERATION + at + end, "reset": reset}

    def _last_step(self) -> int | None:
        with contextlib.suppress(OSError, UserError):
            with os.fdopen(open_file(self.folder / "metrics.jsonl"), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 14)))
                return next((entry["step"] for entry in reversed(json_steps(file.read(1 << 14)))), None)
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
        with contextlib.suppress(OSError, AttributeError, ValueError):
            lock = os.stat(self.folder / ".lock")
            held = f" {os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino} "
            if held in Path("/proc/locks").read_text(encoding="ascii"):
                return True
        with contextlib.suppress(OSError):
            return time.time() - os.stat(self.folder / "metrics.jsonl").st_mtime < RECENT
        return False
