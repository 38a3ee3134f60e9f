"""A command's main() in a forked child: its messages, time, memory, and forbidden actions."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.forkpty", "pty.spawn",
    "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind",
    "urllib.Request", "webbrowser.open", "code.__new__", "ftplib.connect", "http.client.connect", "smtplib.connect",
)  # fmt: skip


@dataclass
class Outcome:
    """How a command ended."""

    code: int | None
    """The exit code; None where it had to be killed."""
    err: str
    """What it wrote to stderr."""
    seconds: float
    """Of processor time, so that a busy machine changes nothing; those of the clock where it had to be killed."""
    grown: int
    """Bytes by which its anonymous memory grew at most."""
    events: list[str] = field(default_factory=list)
    """Forbidden things that it did: programs, connections."""

    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line]

    def refused(self) -> bool:
        """Whether it ended as it does for a user's mistake: exit code 2, the last line says why, no traceback."""
        lines = self.lines()
        return self.code == 2 and bool(lines) and lines[-1].startswith("error: ") and "Traceback" not in self.err


def call(main: Callable[[list[str]], int], argv: list[str], folder: Path, limit: float, stdin: bytes = b"") -> Outcome:
    """Runs main(argv) in a child that is killed after four times `limit` seconds. folder: for the child's output."""
    paths = {name: folder / f".door-{name}" for name in ("in", "err", "events")}
    for path in paths.values():
        path.write_bytes(stdin if path is paths["in"] else b"")
    sys.stdout.flush()
    sys.stderr.flush()
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(main, argv, paths)
    first = peak = _anonymous(pid)
    code: int | None = None
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
            break
        peak = max(peak, _anonymous(pid))
        if time.monotonic() - begin > 4 * limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            seconds = time.monotonic() - begin
            break
        time.sleep(0.002)
    events = [json.loads(line) for line in paths["events"].read_text().splitlines()]
    return Outcome(code, paths["err"].read_text(errors="replace"), seconds, peak - first, events)


def _child(main: Callable[[list[str]], int], argv: list[str], paths: dict[str, Path]) -> None:
    code = 99
    try:
        for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("err", os.O_WRONLY), ("err", os.O_WRONLY))):
            path = os.devnull if number == 1 else str(paths[name])
            os.dup2(os.open(path, flags), number)
        sys.stdin, sys.stdout = os.fdopen(0, "r"), os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
        events = os.open(paths["events"], os.O_WRONLY | os.O_APPEND)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in FORBIDDEN:
                os.write(events, (json.dumps(f"{event} {str(arguments)[:200]}") + "\n").encode())

        sys.addaudithook(watch)
        code = main(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _anonymous(pid: int) -> int:
    """Bytes of memory that belong to a process alone or, after a fork, to it and its parent."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(b"RssAnon")), 0)
    except OSError:
        return 0
