"""SIGKILL at random moments, most of them inside a save: no checkpoint is lost, and the resumed run is bit-exact.

A child trains. It is killed after a random time, or, to hit a save, at a random file operation of its saves: before it,
after it, or when half of a write is done. Another child resumes.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llm_from_scratch.checkpoint import hashed_folder as sealed
from llm_from_scratch.checkpoint import store as checkpoints
from llm_from_scratch.machine import files
from llm_from_scratch.training import loggers

from .rows import Report, Row
from .runs import (
    DEADLINE,
    Marks,
    Whole,
    acknowledged,
    newest,
    nothing,
    replaced,
    small_data,
    tail,
    wait,
    warm_up,
    whole_run,
)  # fmt: skip

SETTINGS: list[dict[str, Any]] = [
    {"dropout": 0.1},
    {"dtype": "float16", "sample_order": "shuffled", "gradient_accumulation_steps": 2, "keep_last": 1},
    {"dropout": 0.2, "sample_order": "shuffled", "stride": 5, "keep_last": 3, "always_save_checkpoint": False},
]
EACH = {"max_iters": 6, "save_interval": 2, "eval_interval": 6, "eval_iters": 1}
CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "open")
PARTS = ("before", "amid", "after")
AIMED = 0.6  # share of the kills that are aimed at a save
AGAIN = 0.2  # share of the resumed runs that are killed too


def run(count: int, seed: int, folder: Path) -> Report:
    report, rng, marks = Report(), random.Random(seed), Marks()
    data = small_data(folder / "data")
    warm_up(data)
    wholes = [whole_run(data, folder / f"whole-{i}", **EACH, **s) for i, s in enumerate(SETTINGS[:count])]
    operations = [_count_operations(whole, folder / "counted", marks) for whole in wholes]
    report.counts["inside a save"] = 0
    for case in range(count):
        which = case % len(wholes)
        _trial(wholes[which], operations[which], folder / "run", rng, marks, report, f"case {case}")
        shutil.rmtree(folder / "run", ignore_errors=True)
        report.done += 1
    inside, kills = report.counts["inside a save"], report.counts["kills"]
    report.check(3 * inside >= kills, f"{inside} of {kills} kills hit a save, expected a third")
    return report


def _trial(
    whole: Whole, operations: int, out_dir: Path, rng: random.Random, marks: Marks, report: Report, case: str
) -> None:
    output, kills = out_dir.with_name("run.txt"), 0
    output.unlink(missing_ok=True)
    while not kills or rng.random() < AGAIN:
        if rng.random() < AIMED:
            at, part = rng.randint(1, operations), rng.choice(PARTS)
            code = _kill_at(whole, out_dir, output, marks, at, part, rng.choice((0.0, 0.002)))
            how = f"{part} file operation {at}"
        else:
            delay = rng.uniform(0.1, 1.0) * whole.seconds
            code = _kill_after(whole, out_dir, output, marks, delay)
            how = f"after {delay * 1e3:.0f} ms"
        if code == 0:  # it was through before
            if kills:
                break
            shutil.rmtree(out_dir)
            output.unlink()
            continue
        kills += 1
        case += f", killed {how}"
        report.count("kills")
        report.count("inside a save", int(marks.saving))
        report.check(code == -signal.SIGKILL, f"{case}: exit code {code}: {tail(output)}")
        said, found = acknowledged(output), newest(out_dir)
        report.check((found or 0) >= (said or 0), f"{case}: step {said} was said to be saved, the newest is {found}")
    begin = newest(out_dir) or 0
    marks.clear()
    code = wait(whole.start(out_dir, output, marks.watch))
    report.check(code == 0, f"{case}: the resumed run ended with {code}: {tail(output)}")
    first = begin if begin < whole.steps else -1
    report.check(marks.first == first, f"{case}: began with step {marks.first}, the newest checkpoint is {begin}")
    left = [
        path.name for path in out_dir.glob("*") if path.name.startswith((".tmp", "damaged")) or path.suffix == ".old"
    ]
    for line in [*whole.differences(out_dir), *(f"left behind: {name}" for name in left)]:
        report.check(False, f"{case}: {line}")


def _kill_after(whole: Whole, out_dir: Path, output: Path, marks: Marks, delay: float) -> int:
    marks.clear()
    pid = whole.start(out_dir, output, marks.watch)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)  # a zombie takes it in silence
    return wait(pid)


def _kill_at(whole: Whole, out_dir: Path, output: Path, marks: Marks, at: int, part: str, delay: float) -> int:
    """Kills a child while its save halts at its at-th file operation and the rest continues."""
    reader, writer = os.pipe()

    def halt() -> None:
        os.write(writer, b".")
        time.sleep(DEADLINE)

    def watched() -> None:
        os.close(reader)
        marks.watch()
        _mind_operations(marks, lambda number: part if number == at else "", halt)

    marks.clear()
    pid = whole.start(out_dir, output, watched)
    os.close(writer)
    if select.select([reader], [], [], DEADLINE)[0] and os.read(reader, 1):  # else it has ended
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    return wait(pid)


def _count_operations(whole: Whole, out_dir: Path, marks: Marks) -> int:
    def watched() -> None:
        marks.watch()
        _mind_operations(marks, lambda number: "", lambda: None)

    marks.clear()
    wait(whole.start(out_dir, out_dir.with_name("counted.txt"), watched))
    shutil.rmtree(out_dir)
    return marks[Marks.OPERATIONS]


def _mind_operations(marks: Marks, halts: Callable[[int], str], halt: Callable[[], None]) -> None:
    """Counts the file operations of this process's saves, and halts where halts() says: before, amid or after one."""

    def next_part() -> str:
        if not marks.saving:
            return ""
        marks.values[Marks.OPERATIONS] += 1
        return halts(marks[Marks.OPERATIONS])

    def minded(call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(*args: Any, **kwargs: Any) -> Any:
            part = next_part()
            if part == "before":
                halt()
            result = call(*args, **kwargs)
            if part:
                halt()
            return result

        return calling

    class Writing(io.FileIO):
        """A file that may halt with half of a write done."""

        def write(self, data: Any) -> int:
            part, data = next_part(), memoryview(data).cast("B")
            if part == "before":
                halt()
            done = super().write(data[: len(data) // 2] if part == "amid" else data)
            if part:
                halt()
            return done

    def opening(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Writing(path, "w") if mode == "wb" else open(path, mode, *args, **kwargs)

    for name in CALLS:
        setattr(os, name, minded(getattr(os, name)))
    files.open = opening  # type: ignore[attr-defined]


@contextlib.contextmanager
def _said_too_early() -> Iterator[None]:
    save = checkpoints.save_checkpoint

    def faulty(out_dir: Path, **contents: Any) -> Path:
        print(f"saved checkpoint {out_dir}/step-{contents['step']:08d}", flush=True)
        return save(out_dir, **contents)

    with mock.patch.object(checkpoints, "save_checkpoint", faulty):
        yield


@contextlib.contextmanager
def _old_one_first() -> Iterator[None]:
    """The older checkpoints go before the new one is there."""
    write = sealed.write_folder

    def faulty(final: Path, *args: Any) -> None:
        for older in final.parent.glob("step-*"):
            shutil.rmtree(older)
        write(final, *args)

    with mock.patch.object(sealed, "write_folder", faulty):
        yield


ROW = Row(
    title="SIGKILL at random moments in forked trials: nothing lost, the curve bit-identical",
    target=1000,
    quick=2,
    prove=25,
    run=run,
    defects={
        "acknowledged before it is written": _said_too_early,
        "older ones removed first": _old_one_first,
        "random states not restored": lambda: replaced(torch, "set_rng_state", nothing),
        "metrics not truncated": lambda: replaced(loggers.JsonLines, "forget_from", nothing),
    },
)
