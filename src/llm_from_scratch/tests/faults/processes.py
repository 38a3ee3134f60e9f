"""SIGKILL to real processes: `python -m llm_from_scratch.cli.train` is killed, another resumes and is killed again.

The kill comes at a random time after the run's first lines, every second time after its first save, or when the folder
of a save in progress appears. A run is killed a few times; the last process may finish.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from llm_from_scratch.cli import train

from ..tiny import arguments
from . import kills
from .rows import Report, Row
from .runs import Whole, acknowledged, leftovers, newest, small_data, tail

SETTINGS: list[dict[str, Any]] = [
    {"dropout": 0.1, "keep_last": 1},
    {"dropout": 0.2, "keep_last": 2, "sample_order": "shuffled", "gradient_accumulation_steps": 2},
]
EACH = {"max_iters": 400, "save_interval": 10, "eval_interval": 50, "eval_iters": 1, "loss_plot": False}
DEADLINE = 300.0  # seconds that a process may take; importing torch takes most of the few that it needs
A_RUN = 8  # kills in a row before a run is let be
AIMED = 0.6  # share of the kills that wait for a save
BEGUN = "length:"  # how the last line of the announcement begins
SAVED = "saved checkpoint "
WINDOW = 0.8  # seconds: of a random time after it
PROGRAM = "llm_from_scratch.cli.train"
COMMAND = ["-m", PROGRAM]


def run(count: int, seed: int, folder: Path) -> Report:
    report = Report()
    data = small_data(folder / "data")
    lengths = [min(A_RUN, count - done) for done in range(0, count, A_RUN)]
    with ThreadPoolExecutor(2) as pool:  # more than half of a process's time is one thread's imports
        wholes = [Whole({**EACH, **settings}, data) for settings in SETTINGS[: len(lengths)]]
        references = [pool.submit(_learn, whole, folder / f"whole-{i}") for i, whole in enumerate(wholes)]
        chains = [
            pool.submit(
                _chain,
                wholes[i % len(wholes)],
                references[i % len(wholes)],
                folder / f"run-{i}",
                length,
                random.Random(f"{seed}-{i}"),
            )
            for i, length in enumerate(lengths)
        ]
    for chain in chains:
        found = chain.result()
        report.done += found.done
        report.failures += found.failures
        for what, number in found.counts.items():
            report.count(what, number)
    return report


def _learn(whole: Whole, out_dir: Path) -> None:
    """Trains without a cut. By the program itself: a defect must not reach what it is measured by."""
    process = _start(whole, out_dir, ["-m", PROGRAM], keep_last=1000)
    if code := process.wait(DEADLINE):
        raise RuntimeError(f"the uninterrupted run ended with {code}: {tail(_output(out_dir))}")
    whole.learn(out_dir)


def _chain(whole: Whole, known: Future[None], out_dir: Path, length: int, rng: random.Random) -> Report:
    """Kills a run several times, each time in the next process; the last one may finish."""
    report, output = Report(), _output(out_dir)
    case = out_dir.name
    while report.done < length:
        begin = newest(out_dir) or 0
        if begin >= whole.steps - EACH["save_interval"]:  # through, or nearly: another run takes the rest
            _let_be(whole, known, out_dir, report, case)
            shutil.rmtree(out_dir)
            output.unlink()
            case = out_dir.name
        process = _start(whole, out_dir, COMMAND)
        try:
            hit = _wait_for_moment(process, out_dir, rng, after_save=report.done % 2 == 1)
        finally:
            process.kill()
            code = process.wait()
        if code == 0:
            continue
        case += f", killed {'in a save' if hit else 'at some time'} after step {begin}"
        report.done += 1
        inside = any(out_dir.glob(".tmp-step-*"))
        report.count("inside a save", inside)
        report.check(code == -signal.SIGKILL, f"{case}: exit code {code}: {tail(output)}")
        said, found = acknowledged(output), newest(out_dir)
        report.check((found or 0) >= (said or 0), f"{case}: step {said} was said to be saved, the newest is {found}")
    _let_be(whole, known, out_dir, report, case)
    return report


def _let_be(whole: Whole, known: Future[None], out_dir: Path, report: Report, case: str) -> None:
    """Resumes to the end; the result must equal that of the uninterrupted run."""
    begin, output = newest(out_dir) or 0, _output(out_dir)
    seen = output.stat().st_size
    code = _start(whole, out_dir, COMMAND).wait(DEADLINE)
    report.check(code == 0, f"{case}: the resumed run ended with {code}: {tail(output)}")
    steps = re.findall(r"^step (\d+)/\d+  loss", output.read_text()[seen:], re.MULTILINE)
    expected = [str(step) for step in range(begin, whole.steps)]
    report.check(steps == expected, f"{case}: went on with the steps {steps[:1]} to {steps[-1:]}, saved was {begin}")
    known.result()
    for line in [*whole.differences(out_dir), *leftovers(out_dir)]:
        report.check(False, f"{case}: {line}")


def _start(whole: Whole, out_dir: Path, command: list[str], **leaves: Any) -> subprocess.Popen[bytes]:
    words = [f"--out_dir={out_dir}", f"--dataset={whole.data}"]
    if newest(out_dir) is None:
        words += arguments(**{**whole.settings, **leaves})
    else:
        words.append("--init_from=resume")
    with _output(out_dir).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *command, *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def _output(out_dir: Path) -> Path:
    return out_dir.with_name(out_dir.name + ".txt")


def _wait_for_moment(process: subprocess.Popen[bytes], out_dir: Path, rng: random.Random, after_save: bool) -> bool:
    """Waits for the moment of the kill; returns whether a save was seen.

    after_save: not before the process has saved, however slow the machine is. The next one resumes.
    """
    end, output = time.monotonic() + DEADLINE, _output(out_dir)
    line = SAVED if after_save else BEGUN
    seen = output.read_text().count(line)

    def until(happened: Callable[[], bool], pause: float) -> bool:
        while process.poll() is None and time.monotonic() < end:
            if happened():
                return True
            time.sleep(pause)
        return False

    until(lambda: output.read_text().count(line) > seen, 0.01)
    time.sleep(rng.uniform(0.0, WINDOW))
    return rng.random() < AIMED and until(lambda: any(out_dir.glob(".tmp-step-*")), 0.0005)


@contextlib.contextmanager
def _defect(name: str) -> Iterator[None]:
    """Lets the processes be started with a defect of the row of kills."""
    with mock.patch.object(sys.modules[__name__], "COMMAND", ["-m", __name__, name]):
        yield


ROW = Row(
    title="SIGKILL to real processes, resumed by others: nothing lost, the curve bit-identical",
    target=100,
    quick=0,
    prove=4,
    run=run,
    defects={
        "older ones removed first": lambda: _defect("older ones removed first"),
        "random states not restored": lambda: _defect("random states not restored"),
    },
)

if __name__ == "__main__":
    with kills.ROW.defects[sys.argv[1]]():
        sys.exit(train.main(sys.argv[2:]))
