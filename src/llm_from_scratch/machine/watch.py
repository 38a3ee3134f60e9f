"""The watch over the processes of a run. One that dies, hangs or fails ends all, with a message that names its rank,
step and operation; torch alone reports a network address, after its timeout."""

from __future__ import annotations

import atexit
import contextlib
import json
import linecache
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import first_line
from .terminal import note

BEAT = 0.5  # seconds between two signs of life
SILENCE = 30.0  # seconds after which a silent process is reported
LAUNCHERS_GRACE = 30.0  # seconds to save after the launcher has died: as many as torchrun gives after SIGTERM
LAST_WORDS = 2.0  # seconds to clean up: of this process after the timeout, of its launcher before it
PACKAGE = str(Path(__file__).resolve().parents[1])
EXCHANGES = str(Path(__file__).with_name("processes.py"))
WAITS = ("_engine_run_backward", "synchronize")  # functions of torch in which a process may wait for another
FRAMES = ("train", "open_run", "__init__", "retry_smaller", "<lambda>")  # around an operation of the training loop
States = dict[int, dict[str, Any]]


class Watch:
    """Each process writes signs of life to torch's store, reads the next rank's, and looks at the stack of the
    thread that trains. One that does not move within the timeout hangs."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float):
        """store: a connection that nothing else uses. The caller's thread is the one that trains."""
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.step: Callable[[], int] = lambda: 0
        self.advice = "with --init_from=auto, the same command resumes the run"
        self.trainer, self.parent = threading.get_ident(), os.getppid()
        self.next = (rank + 1) % world_size
        self.moves = 0
        """Progress counter for work during which the stack of the thread does not change."""
        self.beats, self._is_waiting, self._doing = 0, False, dict[str, Any]()
        self._reset()
        self._ending = threading.Event()
        store.set(f"who/{rank}", json.dumps([socket.gethostname(), os.getpid(), self.parent, _namespace()]))
        self._beat()

    def follow(self, step: Callable[[], int], resume: str) -> None:
        """step: the run's present one; resume: the command that resumes it."""
        self.step, self.advice = step, f"resume with: {resume}"

    def begin(self) -> None:
        """Starts the thread, once every process has written its first sign of life."""
        self.who = [json.loads(who) for who in self.store.multi_get([f"who/{r}" for r in range(self.world_size)])]
        self._reset()
        for work in (self._run, self._exchange):
            threading.Thread(target=work, name="watch", daemon=True).start()
        atexit.register(self.end)

    def knows_the_reason(self) -> bool:
        """Whether a process is known to have died, or to be the reason for the others to end."""
        try:
            return self._fault() is not None or bool(self.missing())
        except RuntimeError:
            return True

    def missing(self) -> list[int]:
        """Ranks that have not come, or have already died."""
        found = []
        for rank in range(self.world_size):
            if not self.store.check([f"who/{rank}"]):
                found.append(rank)
            elif _local_state(json.loads(self.store.get(f"who/{rank}"))) == "died":
                found.append(rank)
        return found

    def end(self) -> None:
        """Nobody waits for this process any more."""
        if not self._ending.is_set():
            self._ending.set()
            with contextlib.suppress(Exception):
                self._beat(done=True)

    def fail(self, error: BaseException) -> None:
        """This process leaves because of an error of its own, which is the reason for all others to leave."""
        if not self._ending.is_set():
            self._ending.set()
            reason = first_line(error) if str(error) else type(error).__name__
            with contextlib.suppress(Exception):
                self._publish(f"{self._name(self.rank)} ended at step {self.step()}: {reason}", 0)

    def explain(self, error: BaseException) -> str:
        """The reason of a failed exchange: names the process that caused it."""
        tb = traceback.walk_tb(error.__traceback__)
        frames = [(frame.f_code, line, frame.f_lasti) for frame, line in tb][::-1]
        self._is_waiting, self._doing = True, self._operation(frames) | {"waits": True}  # the others look for it too
        text, hangs = f"the processes cannot communicate any more ({first_line(error)})", 0
        try:
            text, hangs = self._fault() or self._publish(*self._find_culprit())
        except RuntimeError:
            text = self._lost_store() if self.rank else text
        self._ending.set()
        self._kill_silent_siblings()
        seconds = LAST_WORDS if hangs else self.timeout
        # cleaning up may wait for a process that is gone
        threading.Thread(target=self._leave_after, args=(seconds,), daemon=True).start()
        return f"{text}: {self.advice}"

    # --- the threads ---

    def _run(self) -> None:
        """Looks after the launcher, and after the thread below: a store that is cut off may block it forever."""
        before = time.monotonic()
        while not self._ending.wait(BEAT):
            if time.monotonic() - before > 10 * BEAT:  # this process was stopped itself: it cannot judge others
                self._reset()
            before = time.monotonic()
            if _is_torchrun() and os.getppid() != self.parent:
                return self._stop_orphan()
            if before - self._answered > self.timeout + 1:  # other reasons come first
                self._leave(self._lost_store())

    def _reset(self) -> None:
        self._seen: dict[str, Any] = {}
        self._place: Any = None
        self._heard, self._is_reported = time.monotonic(), False
        self._answered = time.monotonic()

    def _exchange(self) -> None:
        while not self._ending.wait(BEAT):
            try:
                self._beat()
                self._look()
                self._answered = time.monotonic()
            except RuntimeError:  # torch's errors of a store that is gone
                if not self._ending.wait(LAUNCHERS_GRACE):
                    self._leave(self._lost_store())
                return

    def _stop_orphan(self) -> None:
        """Without its launcher, a process stops as after SIGTERM: it saves and ends."""
        note(f"rank {self.rank}: the launcher (process {self.parent}) is gone; stopping")
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._ending.wait(LAUNCHERS_GRACE):
            os._exit(128 + signal.SIGTERM)

    def _lost_store(self) -> str:
        holder = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else self._name(0)
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"{holder} is gone or stopped: no answer from {where}"

    def _beat(self, done: bool = False) -> None:
        self.beats += 1
        if not self._is_waiting and (top := sys._current_frames().get(self.trainer)) is not None:
            walk = traceback.walk_stack(top)
            self._doing = self._operation([(frame.f_code, line, frame.f_lasti) for frame, line in walk])
        state = {"beat": self.beats, "done": done, "step": self.step(), **self._doing}
        self.store.set(f"beat/{self.rank}", json.dumps(state))

    def _operation(self, stack: list[tuple[Any, int, int]]) -> dict[str, Any]:
        """The operation of the training thread, from its frames, the inner ones first; for how many seconds they have
        not moved; and whether it waits for other processes."""
        names, line, waits = list[str](), "", False
        for code, number, _ in stack:
            if code.co_filename.startswith(PACKAGE) and code.co_filename != __file__:
                waits |= not names and code.co_filename == EXCHANGES
                line = line or linecache.getline(code.co_filename, number).strip()
                names.append(code.co_name)
            elif not names:
                waits |= "torch/distributed" in code.co_filename or code.co_name in WAITS
        if (stack, self.moves) != self._place:
            self._place, self._moved = (stack, self.moves), time.monotonic()
        inner = names[: names.index("train")] if "train" in names else names[:1]
        where = next((name for name in reversed(inner) if name not in FRAMES), names[0] if names else "?")
        return {"where": f"{where} ({line})", "still": round(time.monotonic() - self._moved, 1), "waits": waits}

    def _look(self) -> None:
        now = time.monotonic()
        if found := self._fault():
            text, hangs = found
            # after an error of another process, ours ends by itself; its launcher needs the last seconds
            if hangs or not self._ending.wait(max(0.0, self.timeout - LAST_WORDS)):
                self._leave(text)
            return
        state = self._states([self.next])[self.next]
        if state != self._seen:
            self._seen, self._heard, self._is_reported = state, now, False
        silent = 0.0 if state["done"] else now - self._heard
        if self._local_state(self.next) == "died" and not state["done"]:
            state = self._states([self.next])[self.next]  # it may have said so in between
            if not state["done"]:
                self._publish(f"{self._name(self.next)} died {self._where(state)}", 0)
                self._look()  # not at the next beat: the timeout begins now
        elif silent > self.timeout:
            self._publish(self._silence(self.next, state, silent), 1)
        elif now - self._moved > self.timeout and self._is_stuck():
            self._publish(*self._find_culprit())
        elif silent > min(SILENCE, self.timeout / 2) and not self._is_reported:
            self._is_reported = True
            note(
                f"warning: {self._silence(self.next, state, silent)}; the run ends after {self.timeout:g} s "
                "(--collective_timeout)"
            )

    def _is_stuck(self) -> bool:
        """Whether a process that waits for nobody does not move, or none does. Others may wait longer than the timeout
        for one that evaluates, writes a sample or saves. One that is silent is found by the process before it."""
        active = [state for state in self._states(list(range(self.world_size))).values() if not state["done"]]
        still = [state for state in active if state["still"] > self.timeout]
        return len(still) == len(active) or any(not state["waits"] for state in still)

    def _find_culprit(self) -> tuple[str, int]:
        """The process that the others wait for, and whether it hangs. Takes three beats, unless one has died here."""
        ranks = list(range(self.world_size))
        before = self._states(ranks)
        for rank, state in before.items():
            if not state["done"] and self._local_state(rank) == "died":
                return f"{self._name(rank)} died {self._where(state)}", 0
        time.sleep(3 * BEAT)
        after = self._states(ranks)
        others = {rank: state for rank, state in after.items() if rank != self.rank and not state["done"]}
        for rank, state in others.items():
            alive = self._local_state(rank) == "runs"  # but a busy machine has not run its watch
            if state["beat"] == before[rank]["beat"] and not alive:
                return self._silence(rank, state, max(state["still"], 3 * BEAT)), 1
        active = {rank: state for rank, state in after.items() if not state["done"]}
        moves = {r: state["still"] <= self.timeout for r, state in active.items()}
        rank = min(active, key=lambda r: (active[r]["waits"], moves[r], active[r]["step"], -active[r]["still"]))
        state = active[rank]
        if all(one["waits"] and one["step"] == state["step"] for one in active.values()):
            return f"all ranks wait for each other {_at(state)}: does the network lose data?", 1
        return f"{self._name(rank)} hangs {_at(state)}, for {state['still']:.0f} s", 1

    def _silence(self, rank: int, state: dict[str, Any], seconds: float) -> str:
        what = "is stopped" if self._local_state(rank) == "stopped" else "does not answer"
        return f"{self._name(rank)} {what} {self._where(state)}, for {seconds:.0f} s"

    def _where(self, state: dict[str, Any]) -> str:
        """The place of a process that is silent. Its last sign of life may be older than the step."""
        if state["step"] == self.step():
            return _at(state)
        return f"at step {self.step()}, while rank {self.rank} waits for it in {self._doing['where']}"

    def _publish(self, text: str, hangs: int) -> tuple[str, int]:
        """Makes a text the reason for all processes to end, unless there is one. Returns the reason."""
        text, hangs = json.loads(self.store.compare_set("fault", "", json.dumps([text, hangs])))
        return text, hangs

    def _fault(self) -> tuple[str, int] | None:
        return tuple(json.loads(self.store.get("fault"))) if self.store.check(["fault"]) else None

    def _states(self, ranks: list[int]) -> States:
        found = self.store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: json.loads(text) for rank, text in zip(ranks, found, strict=True)}

    def _name(self, rank: int) -> str:
        host, pid, *_ = self.who[rank]
        return f"rank {rank} ({host}, process {pid})"

    def _local_state(self, rank: int) -> str:
        return _local_state(self.who[rank])

    def _leave(self, text: str) -> None:
        """Ends this process: its training thread may wait forever."""
        note(f"error: {text}: {self.advice}")
        self._kill_silent_siblings()
        self._leave_after(0)

    def _leave_after(self, seconds: float) -> None:
        time.sleep(seconds)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)

    def _kill_silent_siblings(self) -> None:
        """torchrun waits 30 seconds for a stopped process to end, which it cannot."""
        for rank, (_, pid, parent, _) in enumerate(self.who):
            if rank != self.rank and parent == self.parent and self._local_state(rank) == "stopped":
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def _at(state: dict[str, Any]) -> str:
    return f"at step {state['step']}, in {state['where']}"


def _is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _namespace() -> str:
    """Identifies the machine's (or container's) numbering of processes; empty if it is unknown."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _local_state(who: list[Any]) -> str:
    """died, stopped or runs, for a process of this machine. Empty for others."""
    host, pid, _, space = who
    if host != socket.gethostname() or not space or space != _namespace():
        return ""
    try:
        code = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "died"
    return "died" if code in "ZX" else "stopped" if code in "Tt" else "runs"
