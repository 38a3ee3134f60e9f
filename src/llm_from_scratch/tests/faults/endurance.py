"""One long run with many saves and evaluations: memory, open files and threads do not grow.

/proc/self is read at the same point of a step, from the end of the run's first quarter on, when all buffers exist.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from llm_from_scratch.checkpoint import store as checkpoints
from llm_from_scratch.core.dataset import BatchLoader
from llm_from_scratch.training.trainer import train

from ..tiny import read_metrics, tiny_config
from .rows import Report, Row
from .runs import fork, replaced, small_data, tail, wait, warm_up

SAVES = 200  # and half as many evaluations
MAY_GROW = 8 << 20  # bytes of resident memory
LOOKS, FEW = 40, 8  # at the process; the first and the last of them that are compared
LIMIT = 600.0  # seconds


def run(count: int, seed: int, folder: Path) -> Report:
    """count: steps."""
    report = Report()
    data = small_data(folder / "data")
    warm_up(data)
    out_dir, output, notes = folder / "run", folder / "run.txt", folder / "usage.npy"
    interval = max(5, count // SAVES)
    settings = {
        "out_dir": str(out_dir), "max_iters": count, "save_interval": interval, "dropout": 0.1,
        "eval_interval": 2 * interval, "eval_iters": 1, "seed": seed, "progress": "lines",
        "sample_order": "shuffled", "batch_size": 2, "learning_rate": 3e-3,
    }  # fmt: skip
    code = wait(fork(lambda: _train(data, settings, notes), output), LIMIT)
    if not report.check(code == 0, f"the run ended with {code}: {tail(output)}"):
        return report
    memory, files, threads = np.load(notes).T
    growth = np.median(memory[-FEW:]) - np.median(memory[:FEW])
    report.check(growth < MAY_GROW, f"memory grew by {growth / 1e6:.1f} MB after the first quarter: {memory.tolist()}")
    for what, numbers in (("open files", files), ("threads", threads)):  # the next batch may be in the making
        report.check(numbers[-FEW:].min() <= numbers[:FEW].min(), f"{what}: {numbers.tolist()}")
    log = read_metrics(out_dir)
    report.done = len({entry["step"] for entry in log if "grad_norm" in entry})
    report.counts = {
        "saves": output.read_text().count("saved checkpoint "),
        "evaluations": sum("val_loss" in entry for entry in log),
        "kB of growth": max(0, int(growth)) // 1000,
        "false alarms of spikes": sum("spike" in entry for entry in log),
    }
    report.check(report.counts["saves"] >= count // interval, f"{report.counts['saves']} saves")
    report.check(report.counts["evaluations"] >= count // interval // 2, f"{report.counts['evaluations']} evaluations")
    report.check(report.counts["false alarms of spikes"] <= 1, "more than one false alarm")
    return report


def _train(data: Path, settings: dict[str, Any], notes: Path) -> int:
    """In the child: trains, and looks at itself at moments spread over the last three quarters."""
    get = BatchLoader.get
    usage: list[tuple[int, int, int]] = []
    moments = set(np.linspace(settings["max_iters"] // 4, settings["max_iters"] - 1, LOOKS).astype(int).tolist())

    def getting(loader: BatchLoader, step: int) -> Any:
        if step in moments:
            for thread in threading.enumerate():
                if thread.daemon:  # a checkpoint is being written
                    thread.join(LIMIT)
            usage.append(_usage())
        return get(loader, step)

    BatchLoader.get = getting  # type: ignore[method-assign, assignment]
    code = train(tiny_config(data, **settings)).exit_code
    np.save(notes, np.array(usage))
    return code


def _usage() -> tuple[int, int, int]:
    """(bytes of resident memory, open files, threads) of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def _file_left_open() -> Any:
    save = checkpoints.save_checkpoint
    held = []

    def faulty(out_dir: Path, **contents: Any) -> Path:
        path = save(out_dir, **contents)
        held.append((path / "MANIFEST.json").open())
        return path

    return replaced(checkpoints, "save_checkpoint", faulty)


def _state_kept() -> Any:
    save = checkpoints.save_checkpoint
    held = []

    def faulty(out_dir: Path, **contents: Any) -> Path:
        held.append([tensor.flatten().repeat(20) for tensor in contents["model"].values()])
        return save(out_dir, **contents)

    return replaced(checkpoints, "save_checkpoint", faulty)


ROW = Row(
    title="steps in one run, with 200 saves and 100 evaluations: memory, files and threads stay flat",
    target=20_000,
    quick=120,
    prove=600,
    run=run,
    defects={"a file left open by each save": _file_left_open, "a state kept by each save": _state_kept},
)
