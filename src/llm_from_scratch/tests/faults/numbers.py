"""NaN, infinities and spikes in loss, gradient, batch and weights: each is detected in its step and costs only it.

A child trains; one or more of its steps are poisoned. It records what the steps read, and hashes of weights and moments
before each of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from llm_from_scratch.core.dataset import BatchLoader
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import TrainingError
from llm_from_scratch.training import guards, trainer
from llm_from_scratch.training import run as runs
from llm_from_scratch.training import state as snapshot
from llm_from_scratch.training.trainer import train

from ..tiny import TOKENIZER, read_metrics, tiny_config, write_data
from .rows import Report, Row
from .runs import fork, good_checkpoints, replaced, wait, warm_up

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
IN_A_ROW, ROLLBACKS, SAVES, STEPS, LONG = 3, 2, 4, 14, 210
NORMAL_STEPS = 100_000  # of each kind of noise; at most one false alarm in this many
KINDS = (
    "loss", "gradient", "both", "weights", "spike of the loss", "spike of the gradient", "spike of the batch",
    "spike of the weights", "loss in a row", "gradient in a row", "loss without end", "loss from step 0",
)  # fmt: skip


@dataclass
class Poison:
    """What is put in, and where."""

    kind: str
    steps: range
    """Of the updates that the process makes, counted from 0."""
    value: float
    part: int
    """The micro-batch of the step."""
    place: int
    """Which parameter, which of its numbers."""

    @property
    def is_spike(self) -> bool:
        return self.kind.startswith("spike")


@dataclass
class Seen:
    """What a child noted."""

    steps: list[int] = field(default_factory=list)
    """Indices into the order of the data, an update each."""
    states: list[str] = field(default_factory=list)
    """Hashes of weights and moments before each update, and after the last."""
    begins: list[list[int]] = field(default_factory=list)
    """Positions of the batches' first tokens."""


def run(count: int, seed: int, folder: Path) -> Report:
    report, rng = Report(), random.Random(seed)
    _false_alarms(max(1, round(NORMAL_STEPS * count / ROW.target)), seed, report)
    # after some steps the next letter is all but certain, so that a wrong batch stands out
    data = write_data(folder / "data", train=TOKENIZER.encode("abcdefgh\n" * 60), val=TOKENIZER.encode("abcdefgh" * 9))
    warm_up(data)
    for case in range(count):
        kind = KINDS[case % len(KINDS)]
        _try(kind, case, data, folder / "run", rng, report)
        shutil.rmtree(folder / "run", ignore_errors=True)
        report.done += 1
    return report


def _try(kind: str, case: int, data: Path, out_dir: Path, rng: random.Random, report: Report) -> None:
    spike = kind.startswith("spike")
    parts, last = rng.choice((1, 2, 3)), LONG if spike else STEPS
    settings = {
        "out_dir": str(out_dir), "max_iters": last, "save_interval": SAVES, "eval_interval": SAVES * 2, "eval_iters": 1,
        "keep_last": 1000, "dtype": ("float32", "bfloat16", "float16")[(case // len(KINDS) + case) % 3],
        "grad_clip": 0.0 if rng.random() < 0.4 else 1.0, "gradient_accumulation_steps": parts, "batch_size": 2,
        "max_skipped_steps": IN_A_ROW, "max_rollbacks": ROLLBACKS, "dropout": rng.choice((0.0, 0.1)) * (not spike),
        "skip_spikes": spike and rng.random() < 0.5 and "weights" not in kind,
    }  # fmt: skip
    if kind == "gradient in a row" and settings["dtype"] == "float16":
        settings["dtype"] = "bfloat16"  # the search for the loss scale has gradients that overflow, in a row
    if kind == "spike of the gradient":
        settings["grad_clip"] = 1.0
    first = 0 if "step 0" in kind else rng.randint(SAVES + 1, STEPS - IN_A_ROW - 1) + (LONG - STEPS if spike else 0)
    length = IN_A_ROW if "row" in kind or "step 0" in kind else 1000 if "end" in kind else 1
    name = rng.choice([*BAD])
    poison = Poison(kind, range(first, first + length), BAD[name], rng.randrange(parts), rng.randrange(1 << 20))
    what = f"case {case}: {'' if spike else name + ' in '}{kind} at update {first}, {settings['dtype']}, {parts} parts"
    output, notes = out_dir.with_name("run.txt"), out_dir.with_name("seen.json")
    output.unlink(missing_ok=True)
    code = wait(fork(lambda: _train(data, settings, poison, notes), output))
    seen = Seen(**json.loads(notes.read_text()))
    text, log = output.read_text(), read_metrics(out_dir)
    _judge(poison, settings, seen, code, text, log, report, what)
    for step, path in good_checkpoints(out_dir).items():
        for file in ("model.safetensors", "optimizer.safetensors"):
            finite = all(np.isfinite(tensor).all() for tensor in load_file(path / file).values())
            report.check(finite, f"{what}: {file} of step {step} contains values that are not finite")


def _judge(
    poison: Poison, settings: dict[str, Any], seen: Seen, code: int, text: str, log: list[dict[str, Any]],
    report: Report, what: str,
) -> None:  # fmt: skip
    kind, first, last = poison.kind, poison.steps[0], settings["max_iters"]
    back = (first + min(IN_A_ROW, len(poison.steps)) - 1) // SAVES * SAVES  # the step of a rollback
    updates = [entry for entry in log if "grad_norm" in entry]
    lines = {entry["step"]: entry for entry in updates}
    if kind in ("loss without end", "loss from step 0"):
        rounds = ROLLBACKS if "end" in kind else 0
        report.check(code == 3, f"{what}: ended with {code}: {text[-300:]}")
        report.check(text.count("(rollback ") == rounds, f"{what}: {text.count('(rollback ')} rollbacks")
        at = back + IN_A_ROW - 1
        positions = ", ".join(map(str, seen.begins[-1]))
        for part in (f"at step {at} ", "learning rate ", f" {settings['dtype']}", f"token positions {positions})"):
            report.check(part in text.splitlines()[-1], f"{what}: the end does not say {part!r}: {text[-400:]}")
        return
    report.check(code == 0, f"{what}: ended with {code}: {text[-300:]}")
    report.check([e["step"] for e in updates] == [*range(last)], f"{what}: logged are {[e['step'] for e in updates]}")
    finals = [value for value in updates[-1].values() if value is None or not math.isfinite(value)]
    report.check(not finals, f"{what}: the last line is {updates[-1]}")
    left_out = {at for at in range(len(seen.steps)) if seen.states[at] == seen.states[at + 1]}
    if kind == "weights" or "row" in kind:
        report.check("(rollback 1/" in text, f"{what}: no rollback: {text[-300:]}")
        again = poison.steps[-1] + 1  # the first update after it
        repeated = set(seen.steps[:again]) & set(seen.steps[again:])
        report.check(not repeated, f"{what}: after the rollback, the batches {sorted(repeated)} came again")
        report.check(len(seen.steps) == last + again - back, f"{what}: {len(seen.steps)} updates in all")
        return
    report.check("(rollback" not in text, f"{what}: a rollback for one step")
    report.check(len(seen.steps) == last, f"{what}: {len(seen.steps)} updates in place of {last}")
    line = lines.get(first, {})
    # float16 looks for its loss scale by gradients that overflow, in the first steps
    others = {at for at in left_out - {first} if settings["dtype"] != "float16" or lines[at]["grad_norm"] is not None}
    report.check(not others, f"{what}: the steps {sorted(others)} are left out too")
    alarms = [step for step, entry in lines.items() if "spike" in entry and step < first]
    report.check(not alarms, f"{what}: false alarms at {alarms}")
    if kind == "spike of the gradient":
        report.check((line.get("grad_norm") or 0.0) > 1e3, f"{what}: it does not show in {line}")
    elif poison.is_spike:
        report.check(line.get("spike") == 1 and f"step {first}:" in text, f"{what}: not seen: {line}")
        wanted = settings["skip_spikes"] or line.get("grad_norm") is None  # as overflows of float16 always are
        report.check((first in left_out) == wanted, f"{what}: left out are {sorted(left_out)}")
    else:
        report.check(line.get("skipped") == 1, f"{what}: not seen: {line}")
        report.check(first in left_out, f"{what}: weights or moments have changed in the step")
        # a gradient that overflows is float16's way of finding its scale: no warning
        silent = settings["dtype"] == "float16" and kind == "gradient"
        report.check(silent or f"warning: step {first}:" in text, f"{what}: no line on the terminal")


def _train(data: Path, settings: dict[str, Any], poison: Poison, notes: Path) -> int:
    """In the child: trains with the poison. 3 stands for a TrainingError."""
    seen = Seen()
    made: list[Any] = []  # the model and its optimizer
    make, get, forward = runs.make_optimizer, BatchLoader.get, GPT.forward
    parts: Iterator[int] = iter(())

    def making(model: GPT, *rest: Any) -> torch.optim.Optimizer:
        made[:] = [model, make(model, *rest)]
        if "gradient" in poison.kind:
            parameters = [p for p in model.parameters()]
            parameters[poison.place % len(parameters)].register_hook(spoil)
        return made[1]

    def state() -> str:
        model, optimizer = made
        moments = [m for p in model.parameters() for _, m in sorted(optimizer.state.get(p, {}).items())]
        digest = hashlib.sha256()
        for tensor in [*model.parameters(), *moments]:
            digest.update(torch.as_tensor(tensor).detach().numpy().tobytes())
        return digest.hexdigest()

    def getting(loader: BatchLoader, step: int) -> Any:
        nonlocal parts
        seen.begins.append(loader.order.starts(step, loader.batch).tolist())
        seen.steps.append(step)
        if made and hit_step() and "weights" in poison.kind:
            spoil_weights(made[0])
        seen.states.append(state())
        parts = itertools.count()
        x, y = get(loader, step)
        if hit_step() and poison.kind == "spike of the batch":
            y = torch.randint_like(y, 20, generator=torch.Generator().manual_seed(poison.place))
        return x, y

    def hit_step() -> bool:
        return len(seen.steps) - 1 in poison.steps

    def spoil_weights(model: GPT) -> None:
        parameters = [p for p in model.parameters() if p.dim() > 1]
        with torch.no_grad():
            if poison.is_spike:
                parameters[0].mul_(-30.0)
            else:
                numbers = parameters[poison.place % len(parameters)].view(-1)
                numbers[poison.place % len(numbers)] = poison.value

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if not (hit_step() and part == poison.part):
            return gradient
        if poison.is_spike:
            return torch.full_like(gradient, 1e9)  # above what float16's scale takes off
        spoiled = gradient.clone()
        spoiled.view(-1)[poison.place % spoiled.numel()] = poison.value
        return spoiled

    part = -1

    def forwarding(model: GPT, *args: Any, **kwargs: Any) -> Any:
        nonlocal part
        loss: Any
        logits, loss = forward(model, *args, **kwargs)
        if not model.training:
            return logits, loss
        part = next(parts)
        if hit_step() and part == poison.part:
            if poison.kind == "spike of the loss":
                loss = loss + 100.0
            elif poison.kind == "both":
                loss = loss * poison.value
            elif "loss" in poison.kind:
                loss = loss + poison.value
        return logits, loss

    runs.make_optimizer, BatchLoader.get, GPT.forward = making, getting, forwarding  # type: ignore
    try:
        return train(tiny_config(data, **settings)).exit_code
    except TrainingError as error:
        print(f"error: {error}")
        return 3
    finally:
        seen.states.append(state())
        notes.write_text(json.dumps(vars(seen)))


def _false_alarms(steps: int, seed: int, report: Report) -> None:
    """Losses as they are where all is well: a falling curve, and noise of several shapes on it."""
    rng = np.random.default_rng(seed)
    fall = 2.0 + 8.0 / (1.0 + np.arange(steps) / 50.0)
    noises = {
        "normal": 0.1 * rng.standard_normal(steps),
        "small": 0.001 * rng.standard_normal(steps),
        "gamma": 0.2 * (rng.gamma(2.0, size=steps) - 2.0),
        "lognormal": 0.3 * (rng.lognormal(0.0, 0.5, steps) - 1.13),
        "slow": np.convolve(0.3 * rng.standard_normal(steps + 19), np.ones(20) / 20, "valid"),
    }
    for name, noise in noises.items():
        detector, alarms = guards.SpikeDetector([]), 0
        for step, loss in enumerate((fall + noise).tolist()):
            alarms += loss > detector.threshold(step)
            detector.add(step, loss)
        report.check(alarms <= math.ceil(steps / NORMAL_STEPS), f"{alarms} false alarms in {steps} steps, {name} noise")
        report.count("false alarms", alarms)
    report.count("normal steps", steps * len(noises))


def _updates_anyway(skip: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def _order_stays(state: Any, name: str, value: Any) -> None:
    object.__setattr__(state, name, 0 if name == "data_shift" else value)


ROW = Row(
    title="NaN, Inf and spikes in loss, gradient, batch and weights: each seen in its step, one step lost",
    target=60,
    quick=2,
    prove=12,
    run=run,
    defects={
        "guard never fires": lambda: replaced(torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool)),
        "guard sees but updates anyway": lambda: replaced(trainer, "step_unless", _updates_anyway),
        "order not moved on": lambda: replaced(snapshot.TrainState, "__setattr__", _order_stays),
        "spikes too near": lambda: replaced(guards.SpikeDetector, "REACH", 1.0),
        "spikes not known": lambda: replaced(guards.SpikeDetector, "threshold", lambda *_: math.inf),
    },
)
