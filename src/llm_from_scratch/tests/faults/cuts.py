"""Random interruptions over many configurations: every resumed run ends bit-equal to the uninterrupted one.

An interruption is a stop signal during a step, an exception from the loop, or the death of the process. A run is
interrupted up to three times in a row.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.core.dataset import BatchLoader
from llm_from_scratch.training import loggers, opening, setup
from llm_from_scratch.training import state as snapshot

from .rows import Report, Row
from .runs import Marks, Whole, newest, nothing, replaced, small_data, tail, wait, warm_up, whole_run

CONFIGURATIONS = 24
MODELS: list[dict[str, Any]] = [
    {},
    {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1, "qk_norm": True},
    {"bias": True, "tie_embeddings": False, "n_layer": 2},
    {"activation": "relu2", "logit_softcap": 5.0, "pos_embedding": "rope", "tie_embeddings": False},
]
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "cosine"}, {"schedule": "linear"}, {"schedule": "constant"}, {"schedule": "wsd"}, {"decay_lr": False},
]  # fmt: skip
DIED = 77


def settings_of(index: int) -> dict[str, Any]:
    """The index-th configuration. Each choice goes round in a cycle of its own length, so that all come up."""
    rng = random.Random(index)
    settings = {
        "max_iters": 12 + index % 4,
        "eval_interval": (4, 5, 3, 7)[index % 4],
        "save_interval": (None, 3, 2, 4, None)[index % 5],
        "keep_last": (2, 50, 1)[index % 3],
        "always_save_checkpoint": index % 6 != 4,
        "dtype": ("float32", "bfloat16", "float16")[index % 3],
        "dropout": (0.2, 0.1, 0.0)[(index + index // 3) % 3],
        "gradient_accumulation_steps": (1, 2, 3)[rng.randrange(3)],
        "sample_order": ("shuffled", "random")[(index + index // 3) % 2],
        "batch_size": (4, 6)[rng.randrange(2)],
        "fused": ("on", "off")[(index // 3) % 2],
        "gradient_checkpointing": index % 7 == 2,
        "grad_clip": (1.0, 0.05, 0.0)[(index // 2) % 3],
        "log_interval": 3 if index % 8 == 5 else 1,
        "final_eval": index % 12 == 7,
        "sample_interval": 5 if index % 9 == 4 else None,
        "max_new_tokens": 3,
        **MODELS[(index // 2) % len(MODELS)],
        **SCHEDULES[index % len(SCHEDULES)],
    }
    if settings["sample_order"] == "shuffled":
        settings["stride"] = (None, 5, 11)[index % 3]
    return settings


def run(count: int, seed: int, folder: Path) -> Report:
    report = Report()
    plain, shards = small_data(folder / "plain"), small_data(folder / "shards", dtype="uint32")
    warm_up(plain)
    rng = random.Random(seed)
    order = list(range(CONFIGURATIONS))
    rng.shuffle(order)
    wholes: dict[int, Whole] = {}
    for case in range(count):
        index = order[case % CONFIGURATIONS]
        if index not in wholes:
            data = shards if index % 3 == 1 else plain
            wholes[index] = whole_run(data, folder / f"whole-{index}", **settings_of(index))
        _cut_and_resume(wholes[index], folder / "cut", rng, report, f"case {case} (configuration {index})")
        shutil.rmtree(folder / "cut", ignore_errors=True)
        report.done += 1
    report.counts["configurations"] = len(wholes)
    return report


def _cut_and_resume(whole: Whole, out_dir: Path, rng: random.Random, report: Report, case: str) -> None:
    marks, output = Marks(), out_dir.with_name("cut.txt")
    output.unlink(missing_ok=True)
    for _ in range(rng.choice((1, 1, 2, 3))):
        begin = newest(out_dir) or 0
        if begin >= whole.steps:
            break
        at, how = rng.randrange(begin, whole.steps), rng.choice(("stop", "stop", "raise", "die"))
        case += f", {how} in step {at}"
        code = _go_on(whole, out_dir, output, marks, at, how)
        report.count("cuts")
        if how == "stop":
            report.check(code == 128 + signal.SIGTERM, f"{case}: exit code {code}: {tail(output)}")
            report.check(newest(out_dir) == at + 1, f"{case}: saved is step {newest(out_dir)}")
        report.check(marks.first == begin, f"{case}: began with step {marks.first}, the newest checkpoint is {begin}")
        if report.failures and report.failures[-1].startswith(case):
            return
    begin = newest(out_dir) or 0
    code = _go_on(whole, out_dir, output, marks)
    report.check(code == 0, f"{case}: the resumed run ended with {code}: {tail(output)}")
    first = begin if begin < whole.steps else -1
    report.check(marks.first == first, f"{case}: began with step {marks.first}, the newest checkpoint is {begin}")
    for line in whole.differences(out_dir):
        report.check(False, f"{case}: {line}")


def _go_on(whole: Whole, out_dir: Path, output: Path, marks: Marks, at: int = -1, how: str = "") -> int:
    def cut(step: int) -> None:
        if step != at:
            return
        if how == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif how == "die":
            os._exit(DIED)
        else:
            raise RuntimeError("cut")

    marks.clear()
    return wait(whole.start(out_dir, output, lambda: marks.watch(cut)))


def _order_from_zero(get: Any = BatchLoader.get) -> Any:
    """The order counts the steps of the process in place of those of the run."""

    def faulty(loader: Any, step: int) -> Any:
        loader.begun = getattr(loader, "begun", step)
        return get(loader, step - loader.begun)

    return faulty


def _fresh_start(config: Any, *args: Any) -> Any:
    """What cannot be noticed in the final numbers: a resume that begins again."""
    config.training.init_from = "scratch"
    return setup.make_plan(config, *args)


ROW = Row(
    title="random cuts over many configurations, resumed: bit-equal to the uninterrupted run",
    target=200,
    quick=2,
    prove=12,
    run=run,
    defects={
        "random states not restored": lambda: replaced(torch, "set_rng_state", nothing),
        "moments not restored": lambda: replaced(snapshot, "load_optimizer_state", nothing),
        "loss scale not restored": lambda: replaced(torch.amp.GradScaler, "load_state_dict", nothing),
        "order begins at 0 again": lambda: replaced(BatchLoader, "get", _order_from_zero()),
        "metrics not truncated": lambda: replaced(loggers.JsonLines, "forget_from", nothing),
        "quiet fresh start": lambda: replaced(opening, "make_plan", _fresh_start),
    },
)
