"""Signals at random moments: the step is finished and saved, exit code and command are right; a second one kills.

A signal comes after a random time, or while the child evaluates, saves, samples or makes a batch. In cases with two
signals, the child hangs long enough that only the second can end it in time.
"""

from __future__ import annotations

import os
import random
import re
import select
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_from_scratch.checkpoint import store as checkpoints
from llm_from_scratch.cli.train import main
from llm_from_scratch.core.dataset import BatchLoader
from llm_from_scratch.core.model import GPT
from llm_from_scratch.training import run as runs
from llm_from_scratch.training import signals

from .rows import Report, Row
from .runs import (
    DEADLINE,
    Marks,
    Whole,
    acknowledged,
    fork,
    leftovers,
    newest,
    replaced,
    small_data,
    tail,
    wait,
    warm_up,
    whole_run,
)  # fmt: skip

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SETTINGS = {
    "max_iters": 12, "save_interval": 4, "eval_interval": 4, "eval_iters": 1, "sample_interval": 3, "max_new_tokens": 2,
    "dropout": 0.1, "sample_order": "shuffled",
}  # fmt: skip
PHASES: dict[str, tuple[Any, str]] = {
    "an evaluation": (runs, "estimate_loss"),
    "a save": (checkpoints, "save_checkpoint"),
    "a sample": (GPT, "generate"),
    "a batch": (BatchLoader, "get"),
}
AT_MOST = {"an evaluation": 6, "a save": 3, "a sample": 4, "a batch": 12}  # times that the whole run comes by
LIMIT = 2.0  # seconds from the signal to the end
HANG = 10.0
STOPPED = re.compile(r"^stopped at step (\d+); resume with: (.+)$", re.MULTILINE)


def run(count: int, seed: int, folder: Path) -> Report:
    report, rng = Report(), random.Random(seed)
    data = small_data(folder / "data")
    warm_up(data)
    whole = whole_run(data, folder / "whole", **SETTINGS)
    marks, out_dir = Marks(), folder / "run"
    for case in range(count):
        signum, double = SIGNALS[case % len(SIGNALS)], case % 3 == 2
        phase = rng.choice([*PHASES, ""])
        name = f"case {case}: {signum.name}{' twice' if double else ''} {f'in {phase}' if phase else 'at some time'}"
        output = folder / "run.txt"
        output.unlink(missing_ok=True)
        if double:
            _two(whole, out_dir, output, marks, (signum, rng.choice(SIGNALS)), phase or "a batch", rng, report, name)
        else:
            _one(whole, out_dir, output, marks, signum, phase, rng, report, name)
        for line in [*whole.differences(out_dir), *leftovers(out_dir)]:
            report.check(False, f"{name}: {line}")
        shutil.rmtree(out_dir)
        report.done += 1
    return report


def _one(
    whole: Whole, out_dir: Path, output: Path, marks: Marks, signum: int, phase: str, rng: random.Random,
    report: Report, case: str,
) -> None:  # fmt: skip
    pid, came = _start_and_meet(whole, out_dir, output, marks, phase, rng, 0.01)
    begin = time.monotonic()
    os.kill(pid, signum)
    code = wait(pid)
    seconds = time.monotonic() - begin
    text = output.read_text()
    report.count(f"in {phase}" if came and phase else "at other times")
    said = STOPPED.search(text)
    if marks.last == whole.steps - 1 and said is None:  # the run is complete: nothing to resume
        report.check(code in (0, 128 + signum), f"{case}: exit code {code}: {tail(output)}")
        return
    if marks.first < 0 and said is None and code in (-signum, 128 + signum):  # the run had not begun
        report.check(_go_on(whole, out_dir, output) == 0, f"{case}: the run after it failed: {tail(output)}")
        return
    report.check(code == 128 + signum, f"{case}: exit code {code}: {tail(output)}")
    report.check(seconds < LIMIT, f"{case}: the end came after {seconds:.1f} s")
    if report.check(said is not None, f"{case}: no command to resume with: {tail(output)}") and said:
        step = int(said[1])
        report.check(step == marks.last + 1, f"{case}: stopped at step {step}, the last update was {marks.last}")
        report.check(newest(out_dir) == step, f"{case}: stopped at step {step}, saved is {newest(out_dir)}")
        words = shlex.split(said[2])
        code = wait(fork(lambda: main(words[1:]), output))
        report.check(code == 0, f"{case}: {said[2]} ended with {code}: {tail(output)}")


def _two(
    whole: Whole, out_dir: Path, output: Path, marks: Marks, signums: tuple[int, int], phase: str, rng: random.Random,
    report: Report, case: str,
) -> None:  # fmt: skip
    pid, came = _start_and_meet(whole, out_dir, output, marks, phase, rng, HANG)
    report.check(came, f"{case}: the child never came there: {tail(output)}")
    os.kill(pid, signums[0])
    while _is_pending(pid, signums[0]):  # two of a kind that are pending together count as one
        time.sleep(0.001)
    time.sleep(rng.uniform(0.005, 0.05))
    begin = time.monotonic()
    os.kill(pid, signums[1])
    code = wait(pid)
    seconds = time.monotonic() - begin
    report.count("double")
    report.check(seconds < LIMIT, f"{case}: the end came after {seconds:.1f} s")
    report.check(code in {128 + s for s in (*signums, signal.SIGINT)}, f"{case}: exit code {code}: {tail(output)}")
    said, found = acknowledged(output), newest(out_dir)
    report.check((found or 0) >= (said or 0), f"{case}: step {said} was said to be saved, the newest is {found}")
    code = _go_on(whole, out_dir, output)
    report.check(code == 0, f"{case}: the resumed run ended with {code}: {tail(output)}")


def _is_pending(pid: int, signum: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"^ShdPnd:\s*(\w+)$", status.read_text() if status.exists() else "", re.MULTILINE)
    return bool(found and int(found[1], 16) >> (signum - 1) & 1)


def _go_on(whole: Whole, out_dir: Path, output: Path) -> int:
    return wait(whole.start(out_dir, output, lambda: None))


def _start_and_meet(
    whole: Whole, out_dir: Path, output: Path, marks: Marks, phase: str, rng: random.Random, stay: float
) -> tuple[int, bool]:
    """Starts a run; returns its id and True when it is in the phase, where it stays for so many seconds.

    Without a phase: after a random time.
    """
    reader, writer = os.pipe()
    at = rng.randint(1, AT_MOST[phase]) if phase else 0

    def watched() -> None:
        os.close(reader)
        marks.watch()
        if phase:
            _stay_in(*PHASES[phase], at, lambda: os.write(writer, b"."), stay)

    marks.clear()
    pid = whole.start(out_dir, output, watched)
    os.close(writer)
    wakes = select.select([reader], [], [], DEADLINE if phase else rng.uniform(0.0, 1.1) * whole.seconds)[0]
    came = bool(wakes and os.read(reader, 1))
    os.close(reader)
    return pid, came


def _stay_in(owner: Any, name: str, at: int, tell: Callable[[], object], seconds: float) -> None:
    """Lets the at-th call of a function tell that it has begun, and last longer."""
    call, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def staying(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            tell()
            time.sleep(seconds)
        return call(*args, **kwargs)

    setattr(owner, name, staying)


def _only_multiples(save: Callable[..., Path] = checkpoints.save_checkpoint) -> Callable[..., Path]:
    """What a stop wants saved is left out."""

    def faulty(out_dir: Path, *, step: int, **contents: Any) -> Path:
        if step % SETTINGS["save_interval"]:  # type: ignore[operator]
            return Path(out_dir) / f"step-{step:08d}"
        return save(out_dir, step=step, **contents)

    return faulty


def _first_only(stop: Any, signum: int, frame: object) -> None:
    stop.signum = stop.signum or signum


ROW = Row(
    title="signals at random moments, double ones included: exact step saved, final weights equal",
    target=200,
    quick=3,
    prove=18,
    run=run,
    defects={
        "stop's step not saved": lambda: replaced(checkpoints, "save_checkpoint", _only_multiples()),
        "second signal ignored": lambda: replaced(signals.StopRequest, "_on_signal", _first_only),
        "no handler": lambda: replaced(signals, "SIGNALS", ()),
    },
)
