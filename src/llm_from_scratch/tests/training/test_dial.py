"""training/dial.py: what a budget chooses on a machine whose speed is given."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_from_scratch.config import Config
from llm_from_scratch.machine.budget import Deadline, parse_budget
from llm_from_scratch.machine.device import Runtime
from llm_from_scratch.training import dial as dials
from llm_from_scratch.training.dial import Dialed, dial, least_over_ranks, with_settings
from llm_from_scratch.training.law import Law

pytestmark = pytest.mark.usefixtures("here")
CPU = Runtime(torch.device("cpu"), torch.float32, False, True, 0, 1, "gloo", None, {})
SHAPE = {"n_layer": 1, "n_embd": 128, "block_size": 64, "max_ngram": 0}  # one candidate


def dialed(
    data: Path, budget: str, patch: pytest.MonkeyPatch, runtime: Runtime = CPU, began: float | None = None,
    step: float = 0.01, rate: float = 1e11, law: Law | None = None, **fixed: Any
) -> Dialed:  # fmt: skip
    """On a machine that makes an update in `step` seconds, without a measurement."""
    fixed = {**SHAPE, **fixed}
    patch.setattr(dials.runtimes, "resolve", lambda system: runtime)
    patch.setattr(dials.runtimes, "start", lambda *_: None)
    patch.setattr(dials, "free_memory", lambda device: 1 << 34)
    patch.setattr(dials, "products_per_second", lambda device: rate)
    patch.setattr(dials, "make_plan", lambda config: None)
    patch.setattr(dials, "forecast", lambda plan, seconds: SimpleNamespace(step=step, busy=1.0))
    config = with_settings(Config(), {**fixed, "dataset": str(data)})
    return dial(config, fixed, parse_budget(budget), time.monotonic() if began is None else began, law=law)


def test_every_budget_of_time_has_a_deadline(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    timed = dialed(tiny_data, "10s", monkeypatch, began=began, step=0.2, rate=1e9).deadline
    assert timed is not None and timed[:2] == Deadline(began + 10.0)[:2]
    limited = dialed(tiny_data, "1h", monkeypatch, began=began)  # 2,000 tokens: 60 epochs are over after seconds
    assert limited.deadline is not None and limited.deadline[:2] == (began + 3600, False)
    assert 59 * 2000 < limited.config.training.max_iters * limited.config.data.batch_size * 64 <= 60 * 2000
    assert dialed(tiny_data, "1h", monkeypatch, max_iters=9).deadline is None
    assert dialed(tiny_data, "1h", monkeypatch, epochs=2.0).deadline is None
    assert dialed(tiny_data, "20ktokens", monkeypatch).deadline is None


def test_another_length_has_another_expected_loss_by_hand(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 bit and 100 / text. An update is 4 sequences of 64 tokens of a byte each."""
    law = Law(E=1.0, A=0.0, alpha=1.0, B=100.0, beta=1.0, spread=0.0)
    found = dialed(tiny_data, "10s", monkeypatch, step=0.2, rate=1e9, law=law, batch_size=4)
    assert found.deadline is not None and found.deadline.expected is not None
    bits = 1 + 100 / 512
    nats = f"{bits * math.log(2):.3f}"
    assert found.deadline.expected(2) == f"expected: val loss {nats} ({nats} to {nats}), {bits:.3f} bits per byte"
    assert found.lines[-1] == found.deadline.expected(found.config.training.max_iters)


def test_a_short_run_on_a_gpu_does_not_compile(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = dataclasses.replace(CPU, device=torch.device("cuda"))

    def compiles(budget: str, runtime: Runtime = gpu, **fixed: Any) -> Any:
        return dialed(tiny_data, budget, monkeypatch, runtime, **fixed).config.system.compile

    assert compiles("19min") is False and compiles("20min") == "auto" and compiles("20ktokens") == "auto"
    assert compiles("19min", compile=True) is True and compiles("19min", CPU) == "auto"


def test_all_processes_choose_for_the_least_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [0.0, 7e9, 9e9]
    monkeypatch.setattr(
        dials, "sum_over_ranks", lambda own, device, size: [a + b for a, b in zip(own, others, strict=True)]
    )
    first = dataclasses.replace(CPU, world_size=3)
    assert least_over_ranks(8 << 30, first) == 7_000_000_000 and least_over_ranks(6 << 30, first) == 6 << 30
    assert least_over_ranks(None, first) is None


def test_one_process_keeps_its_memory() -> None:
    assert least_over_ranks(8 << 30, CPU) == 8 << 30 and least_over_ranks(None, CPU) is None
