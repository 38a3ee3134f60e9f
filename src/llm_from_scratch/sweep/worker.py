"""Workers: each trial is an ordinary run in its own process, which is watched, pruned, and continued if it was cut.

A trial's work is a generator that yields while it waits, so one process can look after several.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.store import resolved_init
from ..config import Config
from ..errors import TrainingError, one_line
from ..machine.budget import parse_budget
from ..machine.files import LOCK, lock_file, write_errors
from ..presets import parse
from ..training.loggers import METRICS, read_entries
from .length import updates_for_tokens
from .space import words_of
from .study import Claim, Study

OUTPUT = "output.txt"  # what the run printed
TAIL = 1 << 13  # bytes of it that are searched for an error
EVALUATIONS = 10  # of a run with a budget
DEATHS = 2  # times that a signal may end a run before the trial counts as failed
PAUSE, LOOK_AGAIN = 0.1, 5.0  # seconds between two looks at the runs; at trials that others left
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
MEASURE = "llm_from_scratch.sweep.length"  # a program
PR_SET_PDEATHSIG = 1  # of Linux
Waiting = Generator[None, None, Any]


@dataclass(frozen=True)
class Runs:
    """How the runs of a sweep are started and judged."""

    settings: Path
    """The preset that all of them share."""
    seeds: list[int]
    metric: str
    """The name in metrics.jsonl of the loss at the end."""
    starts_from: str = "scratch"
    budget: str | None = None
    """The length of each run, unless the point of the trial has another. None: the preset's."""
    own_interval: bool = False
    """Whether eval_interval was given, so that the budget does not change it."""
    more: dict[str, str] = field(default_factory=dict)
    """Settings of these runs only."""
    threads: int | None = None
    devices: tuple[str, ...] = ()
    """CUDA devices to share among the workers."""


class Trial:
    """A trial that this process works on."""

    def __init__(self, study: Study, claim: Claim, runs: Runs, slot: int, say: Callable[[str], Any]):
        self.study, self.claim, self.runs, self.say = study, claim, runs, say
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = dict(os.environ)
        if runs.threads is not None:
            self.environment["OMP_NUM_THREADS"] = str(runs.threads)
        if runs.devices:
            self.environment["CUDA_VISIBLE_DEVICES"] = runs.devices[slot % len(runs.devices)]
        self.work = self._work()

    def _work(self) -> Waiting:
        study, claim, losses = self.study, self.claim, dict[str, float]()
        name = f"trial {claim.number}"
        self.say(f"{name}: {' '.join(f'{key}={value}' for key, value in claim.settings.items())}")
        try:
            if "max_iters" not in claim.attributes:
                yield from self._choose_length()
            for seed in self.runs.seeds:
                if (yield from self._train(seed, may_prune=not losses)):
                    study.finish(claim, "pruned")
                    self.say(f"{name}: pruned")
                    return
                losses[str(seed)] = self._loss(seed)
        except TrainingError as failure:
            study.finish(claim, "failed", message=str(failure))
            self.say(f"{name}: failed: {failure}")
            return
        study.finish(claim, "complete", losses)
        self.say(f"{name}: {self.runs.metric} {statistics.fmean(losses.values()):.4f}")

    def words(self, seed: int) -> list[str]:
        """The command line of a run, without the program."""
        folder, settings = str(self.folder(seed)), self.runs.more | self.claim.settings | self._lengths()
        begin = "auto" if resolved_init("auto", folder) == "resume" else self.runs.starts_from
        seeds = [] if "seed" in settings else [f"--seed={seed}"]
        own = [f"--out_dir={folder}", f"--init_from={begin}", "--progress=lines"]
        return [str(self.runs.settings), "--before_after=False", *words_of(settings), *seeds, *own]

    def folder(self, seed: int) -> Path:
        return self.claim.folder if len(self.runs.seeds) == 1 else self.claim.folder / f"seed-{seed}"

    def _lengths(self) -> dict[str, str]:
        """The settings that follow from the budget."""
        max_iters = self.claim.attributes.get("max_iters")
        if max_iters is None:
            return {}
        interval = {} if self.runs.own_interval else {"eval_interval": str(math.ceil(max_iters / EVALUATIONS))}
        return {"max_iters": str(max_iters), **interval}

    def _choose_length(self) -> Waiting:
        """Stores max_iters before the first step, so that a resumed trial uses the same."""
        text = self.claim.point.get("budget", self.runs.budget)
        if text is None:
            return
        words, budget = [str(self.runs.settings), *words_of(self.claim.settings)], parse_budget(text)
        if budget.unit == "tokens":
            config = parse(Config, words, prog="llm-sweep").tree
            self.study.note(self.claim, "max_iters", updates_for_tokens(config, budget.amount))
            return
        output = self.claim.folder / "budget.txt"
        code = yield from self.run_command([sys.executable, "-m", MEASURE, text, *words], output)
        lines = _last_lines(output)
        if code or not lines or not lines[-1].isdecimal():
            raise TrainingError(f"the speed could not be measured: {_error(lines, code)}")
        self.study.note(self.claim, "max_iters", int(lines[-1]))

    def _train(self, seed: int, may_prune: bool) -> Waiting:
        """Runs, or continues, the run of a seed. Returns whether it was pruned. Raises TrainingError."""
        folder, deaths = self.folder(seed), 0
        while True:
            with write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            while (lock := lock_file(folder / LOCK)) is None:  # a run whose worker was killed is still saving
                yield
            lock.release()
            command = [sys.executable, "-m", "llm_from_scratch.cli.train", *self.words(seed)]
            judge = Judge(self.study, self.claim, folder) if may_prune else None
            code = yield from self.run_command(command, folder / OUTPUT, judge)
            if judge is not None and judge.stopped:
                return True
            if code == 0:
                return False
            deaths += 1
            # a run that somebody stopped or killed continues; if it happens again, memory may be short
            if deaths == DEATHS or not (code < 0 or code - 128 in STOPS):
                raise TrainingError(_error(_last_lines(folder / OUTPUT), code))
            until = time.monotonic() + 1  # a scheduler that ends all processes of a job also ends this one
            while time.monotonic() < until:
                yield

    def run_command(self, command: list[str], output: Path, judge: Judge | None = None) -> Waiting:
        """Runs a command and returns its exit code. Ends it if the judge finds it hopeless."""
        with write_errors(output):
            file = output.open("ab")
        with file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=self.environment,
                start_new_session=True, preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
        while self.process.poll() is None:
            if judge is not None and not judge.stopped and judge.is_hopeless():
                judge.stopped = True
                self.process.send_signal(signal.SIGTERM)
            yield
        if judge is not None and not judge.stopped:
            judge.is_hopeless()  # reports what is left; a run that is complete is not pruned
        return self.process.returncode

    def end(self, signum: int) -> bool:
        """Sends the signal to the run. Returns whether it has ended."""
        if self.process is None or self.process.poll() is not None:
            return True
        self.process.send_signal(signum)
        return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def _loss(self, seed: int) -> float:
        """The loss of a complete run. Raises TrainingError."""
        path = self.folder(seed) / METRICS
        entries = read_entries(path) if path.is_file() else []
        found = [entry[self.runs.metric] for entry in entries if type(entry.get(self.runs.metric)) is float]
        if not found:
            raise TrainingError(f"{path} does not have {self.runs.metric}: set another --metric")
        return min(found) if self.runs.metric == "val_loss" else found[-1]


class Judge:
    """Reports the evaluations of a run to the study, which decides whether it continues."""

    def __init__(self, study: Study, claim: Claim, folder: Path):
        self.study, self.claim, self.folder = study, claim, folder
        self.size = self.reported = -1
        self.stopped = False

    def is_hopeless(self) -> bool:
        """Runs of different lengths are compared at the same tenth of their steps, at the first evaluation in it."""
        path = self.folder / METRICS
        size = path.stat().st_size if path.is_file() else -1
        if size in (self.size, -1):
            return False
        self.size, last = size, self._last_step()
        for entry in read_entries(path) if last else ():
            tenth = EVALUATIONS * entry["step"] // last
            if type(entry.get("val_loss")) is float and max(0, self.reported) < tenth < EVALUATIONS:
                self.reported = tenth
                if self.study.is_hopeless(self.claim, tenth, entry["val_loss"]):
                    return True
        return False

    def _last_step(self) -> int:
        """The length of the run, from the lines that it prints: "step 400/1300 ..."."""
        with (self.folder / OUTPUT).open("rb") as file:
            found = re.findall(rb"^step \d+/(\d+) ", file.read(), re.MULTILINE)
        return int(found[-1]) if found else 0


def run_trials(study: Study, runs: Runs, workers: int, say: Callable[[str], Any]) -> int:
    """Works on trials until none is left to start. Returns 0, or 128 + the number of the signal that stopped it; then
    the runs are saved, and a later worker continues them."""
    stops: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOPS}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda signum, frame: stops.append(signum))
    trials: dict[int, Trial] = {}
    look_at = 0.0
    try:
        while not stops:
            for slot in range(workers) if time.monotonic() >= look_at else ():
                if slot not in trials:
                    if (claim := study.claim()) is None:
                        look_at = time.monotonic() + LOOK_AGAIN
                        break
                    trials[slot] = Trial(study, claim, runs, slot, say)
            if not trials:
                return 0
            for slot, trial in list(trials.items()):
                try:
                    next(trial.work)
                except StopIteration:
                    del trials[slot]
                    look_at = 0.0
            time.sleep(PAUSE)
        say(f"stopping: {len(trials)} {'run is' if len(trials) == 1 else 'runs are'} being saved")
        return 128 + stops[0]
    finally:
        waiting = [trial for trial in trials.values() if not trial.end(signal.SIGTERM)]
        while waiting := [trial for trial in waiting if trial.process and trial.process.poll() is None]:
            if len(stops) > 1:
                for trial in waiting:
                    trial.kill()
            time.sleep(PAUSE)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """If its worker is killed, a run is stopped, and saves. In the child of a fork, before the program is loaded."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_lines(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]


def _error(lines: list[str], code: int) -> str:
    """The last printed line of a failed run, or the signal that killed it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", perhaps because memory ran out" if name == "SIGKILL" else "")
    errors = [line for line in lines if line.startswith("error: ")] or lines
    return one_line(errors[-1].removeprefix("error: "), 300) if errors else f"exit code {code}"
