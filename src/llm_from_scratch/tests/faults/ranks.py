"""Two processes that train together: one is killed, stopped or told to stop at a random moment, a third of them inside
a save. The other one ends in time and names it, no checkpoint is lost, and the resumed run is bit-exact.

A third process holds torch's store, as torchrun does. Nothing else of torchrun is there: the processes that survive end
by themselves.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.machine import processes
from llm_from_scratch.machine import watch as watches
from llm_from_scratch.training import guards

from .rows import Report, Row
from .runs import (
    FAILED,
    Marks,
    Whole,
    acknowledged,
    fork,
    leftovers,
    newest,
    nothing,
    replaced,
    small_data,
    tail,
    wait,
    warm_up,
)  # fmt: skip

TIMEOUT, GRACE = 5.0, 3.0  # seconds: --collective_timeout, and what an end may take more
SAVING = 30.0  # seconds that torchrun waits after SIGTERM
SETTINGS: dict[str, Any] = {
    "dropout": 0.1, "gradient_accumulation_steps": 2, "max_iters": 12, "save_interval": 2, "eval_interval": 6,
    "eval_iters": 1, "backend": "gloo", "collective_timeout": TIMEOUT,
}  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
AIMED = 0.6  # share of the moments that wait for a save; some miss it


class Pair:
    """Two forked processes of a run, and the one that holds their store."""

    def __init__(self, whole: Whole, out_dir: Path, outputs: list[Path], watched: Callable[[int], None], **leaves: Any):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            self.store = fork(lambda: _hold_store(listener), outputs[0].with_name("store.txt"))
            port = listener.getsockname()[1]
            self.pids = [
                whole.start(out_dir, output, lambda rank=rank: _join(rank, port, watched), **leaves)  # type: ignore[misc]
                for rank, output in enumerate(outputs)
            ]

    def wait(self, rank: int, seconds: float = 300.0) -> int:
        return wait(self.pids[rank], seconds)

    def close(self) -> None:
        os.kill(self.store, signal.SIGKILL)
        wait(self.store)


def _hold_store(listener: socket.socket) -> int:
    store = torch.distributed.TCPStore(
        "127.0.0.1", listener.getsockname()[1], is_master=True, wait_for_workers=False,
        master_listen_fd=os.dup(listener.fileno()),
    )  # fmt: skip
    while store is not None:
        time.sleep(60)
    return 0


def _join(rank: int, port: int, watched: Callable[[int], None]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    watched(rank)


def run(count: int, seed: int, folder: Path) -> Report:
    report, rng, marks = Report(), random.Random(seed), Marks()
    data = small_data(folder / "data")
    warm_up(data)
    whole = Whole(SETTINGS, data)
    outputs = [folder / f"rank-{rank}.txt" for rank in range(2)]
    begin = time.monotonic()
    if not _finish(whole, folder / "whole", outputs, report, "the uninterrupted run", keep_last=1000):
        report.done = 1
        return report
    whole.seconds = time.monotonic() - begin
    whole.learn(folder / "whole")
    report.counts["inside a save"] = 0
    for case in range(count):
        _trial(whole, folder / "run", outputs, SIGNALS[case % 3], rng, marks, report, f"case {case}")
        shutil.rmtree(folder / "run", ignore_errors=True)
        report.done += 1
    return report


def _trial(
    whole: Whole, out_dir: Path, outputs: list[Path], signum: signal.Signals, rng: random.Random, marks: Marks,
    report: Report, case: str,
) -> None:  # fmt: skip
    limit = SAVING if signum == signal.SIGTERM else TIMEOUT + GRACE
    while True:
        for output in outputs:
            output.unlink(missing_ok=True)
        marks.clear()
        victim, aimed = rng.randrange(2), rng.random() < AIMED
        pair = Pair(whole, out_dir, outputs, lambda rank: marks.watch() if rank == 0 else None)
        moment = time.monotonic() + rng.uniform(0.1, 0.9) * whole.seconds
        if aimed:
            _await_save(marks, rng.randrange(1, 6))
        else:
            time.sleep(max(0.0, moment - time.monotonic()))
        saving, began = marks.saving, time.monotonic()
        os.kill(pair.pids[victim], signum)
        codes = {1 - victim: pair.wait(1 - victim, 2 * limit)}
        seconds = time.monotonic() - began
        os.kill(pair.pids[victim], signal.SIGCONT if signum == signal.SIGTERM else signal.SIGKILL)
        codes[victim] = pair.wait(victim)
        pair.close()
        if codes[1 - victim] != 0 or marks.last != whole.steps - 1:
            break
        shutil.rmtree(out_dir, ignore_errors=True)  # the run was complete before
    case = f"{case}, {signum.name} of rank {victim}{' inside a save' * saving}, step {marks.last}"
    report.count(signum.name)
    report.count("inside a save", int(saving))
    report.check(seconds < limit, f"{case}: the other process ended after {seconds:.1f} s: {tail(outputs[1 - victim])}")
    text = outputs[1 - victim].read_text()
    if signum == signal.SIGTERM and marks.last >= 0:
        right = {143} if victim in codes else set()
        report.check(set(codes.values()) == right, f"{case}: exit codes {codes}: {tail(outputs[0])}")
        step = newest(out_dir)
        stopped = f"stopped at step {step};" in outputs[0].read_text()
        report.check(stopped, f"{case}: saved is {step}: {tail(outputs[0])}")
    elif signum != signal.SIGTERM:
        named = re.search(rf"(?:^error: |Error: ).*rank {victim}\b.*", text, re.MULTILINE)
        report.check(named is not None, f"{case}: no message that names rank {victim}: {tail(outputs[1 - victim])}")
        started = marks.last >= 0
        report.check(not started or (named is not None and "at step" in named[0]), f"{case}: no step: {text[-200:]}")
        report.check(codes[1 - victim] in (1, FAILED), f"{case}: exit codes {codes}: {tail(outputs[1 - victim])}")
    said, found = acknowledged(outputs[0]) if outputs[0].exists() else None, newest(out_dir)
    report.check((found or 0) >= (said or 0), f"{case}: step {said} was said to be saved, the newest is {found}")
    if _finish(whole, out_dir, outputs, report, case):
        for line in [*whole.differences(out_dir), *leftovers(out_dir)]:
            report.check(False, f"{case}: {line}")


def _await_save(marks: Marks, number: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end and not (marks.saving and marks[Marks.SAVES] >= number):
        if marks[Marks.SAVES] > number:
            return
        time.sleep(0.0005)


def _finish(whole: Whole, out_dir: Path, outputs: list[Path], report: Report, case: str, **leaves: Any) -> bool:
    pair = Pair(whole, out_dir, outputs, lambda rank: None, **leaves)
    codes = [pair.wait(rank) for rank in range(2)]
    pair.close()
    ends = f"both processes ended with {codes}: {tail(outputs[0])} {tail(outputs[1])}"
    return report.check(codes == [0, 0], f"{case}: {ends}")


def _alone(guard: guards.StepGuard, values: torch.Tensor) -> torch.Tensor:
    """Every process decides for itself."""
    return values


@contextlib.contextmanager
def _nameless() -> Iterator[None]:
    with replaced(watches.Watch, "_name", lambda watch, rank: "a process"):
        yield


ROW = Row(
    title="one of two processes killed, stopped or told to stop: the other ends in time, the resumed run is bit-exact",
    target=100,
    quick=0,
    prove=9,
    run=run,
    defects={
        "silence not noticed": lambda: replaced(watches.Watch, "_look", nothing),
        "message without the rank": _nameless,
        "each process decides alone": lambda: replaced(guards.StepGuard, "_sum_over_ranks", _alone),
        "random states not restored": lambda: replaced(torch, "set_rng_state", nothing),
        "processes do not wait for the last save": lambda: replaced(processes, "join", nothing),
    },
)
