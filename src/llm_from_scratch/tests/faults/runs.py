"""Interrupted runs: forked children that train, and their files, compared with the uninterrupted run's.

The bytes of the files and the numbers of the log are compared, without the program's own readers.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import mmap
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from llm_from_scratch.checkpoint import store as checkpoints
from llm_from_scratch.core.dataset import BatchLoader
from llm_from_scratch.training.trainer import train

from ..tiny import TOKENIZER, babble, read_metrics, tiny_config, write_data

DEADLINE = 60.0  # seconds that a child may take; it needs less than one
TIMES = {"time_ms", "tokens_per_s", "mfu"}  # what differs between the logs of two equal runs
OWN_SETTINGS = {"out_dir", "init_from", "keep_last"}  # in which the whole run differs
FAILED = 70  # exit code of a child whose training raised
Hook = Callable[[int], None]


def small_data(folder: Path, **manifest: Any) -> Path:
    """300 training tokens, so that short runs cross the border of an epoch. With a manifest: in two shards."""
    ids = TOKENIZER.encode(babble(300))
    return write_data(folder, train=[ids[:130], ids[130:]] if manifest else ids, val=ids[:60], **manifest)


def warm_up(data: Path) -> None:
    """Does what is done once in a process, so that no child has to."""
    with contextlib.redirect_stdout(io.StringIO()):
        train(tiny_config(data, out_dir="warm-up", max_iters=1))
    gc.collect()
    gc.freeze()  # the children's collector leaves the shared pages alone


# --- children ---


def count_threads() -> int:
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else threading.active_count()


def fork(work: Callable[[], int], output: Path) -> int:
    """Starts a child that does `work`, whose value is its exit code, and prints into `output`. Returns its id."""
    deadline = time.monotonic() + DEADLINE
    while count_threads() > 1:  # one that has been joined is gone a moment later
        assert time.monotonic() < deadline, "a fork takes only its own thread along"
        time.sleep(0.001)
    output.touch()  # a child that is killed at once leaves an output too
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
        code = work()
    except KeyboardInterrupt:  # as the commands do
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def wait(pid: int, seconds: float = DEADLINE) -> int:
    """The child's exit code, -N where signal N ended it. One that takes longer is killed: -9."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Marks:
    """What a child has done, in memory that its parent shares and that outlives it."""

    FIRST, LAST, SAVING, SAVES, OPERATIONS, EVALUATING, SAMPLING = range(7)

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.values = np.frombuffer(self.memory, dtype=np.int64)
        self.clear()

    def clear(self) -> None:
        self.values[:] = 0
        self.values[[self.FIRST, self.LAST]] = -1

    def __getitem__(self, index: int) -> int:
        return int(self.values[index])

    @property
    def first(self) -> int:
        """The first step whose update was begun; -1 where none was."""
        return self[self.FIRST]

    @property
    def last(self) -> int:
        return self[self.LAST]

    @property
    def saving(self) -> bool:
        return bool(self[self.SAVING])

    def watch(self, before_step: Hook = lambda step: None) -> None:
        """Marks what this process does from now on. Only in a child: nothing is put back."""
        values, get, save = self.values, BatchLoader.get, checkpoints.save_checkpoint

        def getting(loader: BatchLoader, step: int) -> Any:
            if values[self.FIRST] < 0:
                values[self.FIRST] = step
            values[self.LAST] = step
            before_step(step)
            return get(loader, step)

        def saving(*args: Any, **kwargs: Any) -> Path:
            values[self.SAVING] = 1
            values[self.SAVES] += 1
            try:
                return save(*args, **kwargs)
            finally:
                values[self.SAVING] = 0

        BatchLoader.get = getting  # type: ignore[method-assign, assignment]
        checkpoints.save_checkpoint = saving


# --- what a run leaves ---


def good_checkpoints(out_dir: Path) -> dict[int, Path]:
    """{step: folder} of the complete checkpoints, oldest first: read with json and hashlib alone."""
    found = {}
    for folder in sorted(out_dir.glob("step-*"), reverse=True):  # step-N before step-N.old in the end
        try:
            manifest = json.loads((folder / "MANIFEST.json").read_bytes())
            hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
        except (OSError, ValueError):
            continue
        if all(hashes[name] == entry["sha256"] for name, entry in manifest["files"].items()):
            found[manifest["step"]] = folder
    return dict(sorted(found.items()))


def newest(out_dir: Path) -> int | None:
    return max(good_checkpoints(out_dir), default=None)


def acknowledged(output: Path) -> int | None:
    """The newest step that the run said it had saved."""
    steps = re.findall(r"^saved checkpoint .*step-(\d+)$", output.read_text(errors="replace"), re.MULTILINE)
    return max(map(int, steps), default=None)


def leftovers(out_dir: Path) -> list[str]:
    """What a kill may leave and the next run has to clear; and what only damage makes."""
    names = sorted(path.name for path in out_dir.iterdir())
    return [f"left behind: {n}" for n in names if n.startswith((".tmp", "damaged")) or n.endswith(".old")]


def tail(output: Path) -> str:
    return " | ".join(output.read_text(errors="replace").splitlines()[-2:])


def contents(folder: Path) -> dict[str, Any]:
    """All that a checkpoint holds: the bytes of its tensors, and what else two equal runs share."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        found[path.name] = json.loads(data) if path.suffix == ".json" else hashlib.sha256(data).hexdigest()
    found["trainer.json"].pop("run_id")
    for group in found["optimizer.json"]["param_groups"]:
        del group["lr"]  # set before each update, and logged with it
    for section in found["config.json"].values():
        for name in OWN_SETTINGS & set(section):
            del section[name]
    manifest = found.pop("MANIFEST.json")
    return found | {name: manifest[name] for name in ("step", "val_loss", "dataset_sha256")}


def curve(out_dir: Path) -> list[dict[str, Any]]:
    """The numbers of the log, without the times."""
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in read_metrics(out_dir)]


@dataclass
class Whole:
    """An uninterrupted run, all of its checkpoints kept: what every cut run must come to."""

    settings: dict[str, Any]
    data: Path
    seconds: float = 0.0
    checkpoints: dict[int, dict[str, Any]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.settings["max_iters"]

    def start(self, out_dir: Path, output: Path, watched: Callable[[], None], **leaves: Any) -> int:
        """Forks a child that starts this run in out_dir, or resumes it. Returns its id."""
        resumed = "resume" if newest(out_dir) is not None else "scratch"
        values = {**self.settings, "init_from": resumed, **leaves}

        def work() -> int:
            watched()
            return train(tiny_config(self.data, out_dir=str(out_dir), **values)).exit_code

        return fork(work, output)

    def learn(self, out_dir: Path) -> None:
        """Reads the files of the uninterrupted run. Raises RuntimeError if a step is missing."""
        self.checkpoints = {step: contents(path) for step, path in good_checkpoints(out_dir).items()}
        self.curve = curve(out_dir)
        every = self.settings.get("log_interval", 1)
        steps = [entry["step"] for entry in self.curve if "loss" in entry]
        if steps != list(range(0, self.steps, every)) or self.steps not in self.checkpoints:
            raise RuntimeError(f"the uninterrupted run logged the steps {steps} and saved {[*self.checkpoints]}")

    def differences(self, out_dir: Path) -> list[str]:
        """What of a run that was cut and went on to its end is not as in this one."""
        found = good_checkpoints(out_dir)
        lines = [] if self.steps in found else [f"no checkpoint of the last step {self.steps}"]
        for step in found.keys() & self.checkpoints.keys():
            mine, theirs = self.checkpoints[step], contents(found[step])
            lines += [
                f"step {step}: {name}{_where(mine.get(name), theirs.get(name))}"
                for name in sorted(mine.keys() | theirs.keys())
                if mine.get(name) != theirs.get(name)
            ]
        theirs_curve = curve(out_dir)
        if theirs_curve != self.curve:
            pairs = zip([*self.curve, None], [*theirs_curve, None], strict=False)
            one, other = next((a, b) for a, b in pairs if a != b)
            lines.append(f"the log has {other}, expected {one}")
        return lines


def _where(mine: Any, theirs: Any) -> str:
    """The first place at which two trees of plain data differ."""
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        mine, theirs = dict(enumerate(mine)), dict(enumerate(theirs))
    if isinstance(mine, dict) and isinstance(theirs, dict):
        key = next(key for key in [*mine, *theirs] if mine.get(key) != theirs.get(key))
        return f".{key}{_where(mine.get(key), theirs.get(key))}"
    return f": {theirs!r:.100}, expected {mine!r:.100}"


def whole_run(data: Path, out_dir: Path, **settings: Any) -> Whole:
    """Trains without a cut, in a child."""
    run, marks = Whole(settings, data), Marks()
    output = out_dir.with_name(out_dir.name + ".txt")
    begin = time.monotonic()
    code = wait(run.start(out_dir, output, marks.watch, keep_last=1000))
    run.seconds = time.monotonic() - begin
    if code:
        raise RuntimeError(f"the uninterrupted run ended with {code}: {output.read_text()[-500:]}")
    run.learn(out_dir)
    return run


# --- defects ---


@contextlib.contextmanager
def replaced(target: Any, name: str, by: Any) -> Iterator[None]:
    with mock.patch.object(target, name, by):
        yield


def nothing(*args: Any, **kwargs: Any) -> None:
    """What a forgotten call does."""
