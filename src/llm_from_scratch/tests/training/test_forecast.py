"""training/forecast.py: the parts of a small rehearsal add up to the cost of a larger run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.cli import plan as command
from llm_from_scratch.errors import UserError
from llm_from_scratch.training import forecast as forecasts
from llm_from_scratch.training.forecast import Rehearsal, Split, extrapolate, forecast, reduced_plan, rehearsal_size
from llm_from_scratch.training.plan import Plan
from llm_from_scratch.training.progress import SAVE_AWAITED, SAVE_BESIDE
from llm_from_scratch.training.setup import make_plan

from ..tiny import arguments, tiny_config

pytestmark = pytest.mark.usefixtures("here")


def planned(data: Path, **leaves: Any) -> Plan:
    return make_plan(tiny_config(data, out_dir="run", **{"n_layer": 6, "max_iters": 20, "eval_interval": 8, **leaves}))


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "SETTLED", 0.0)
    monkeypatch.setattr(forecasts, "MOST", 2)


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"norm": "rmsnorm", "activation": "swiglu"},
        {"optimizer_type": "muon", "optimizer_dtype": "bfloat16"},
    ],
)
def test_bytes_of_a_part_predict_the_bytes_of_the_whole(tiny_data: Path, settings: dict[str, Any]) -> None:
    """Bytes of weights, moments and saved activations, of 2 layers and of all 6."""
    plan = planned(tiny_data, **settings)
    found = []
    for layers in (2, 6):
        rehearsal = Rehearsal(reduced_plan(plan, layers, plan.micro_batch))
        times = rehearsal.timed()
        assert 0 < times["stack"] < times["gradients"] and times["update"] > 0
        found.append((*rehearsal.held(), rehearsal.saved()))
        rehearsal.close()
    for part, whole in zip(*found, strict=True):
        assert part.stack > 0 and part.rest >= 0
        assert part.deeper(3) == whole.whole
    weights, moments, saved = found[1]
    assert weights.whole == plan.sizes.weights
    assert plan.sizes.optimizer <= moments.whole < 1.05 * plan.sizes.optimizer  # with the counts of the steps
    rows, width = plan.micro_batch * plan.config.model.block_size, plan.config.model.n_embd
    if not settings:  # the inputs of four products, of two norms, of the activation; queries, keys and values
        assert saved.stack >= 6 * 4 * rows * (6 + 4 + 4) * width
    if settings.get("gradient_checkpointing"):
        assert saved.stack == 6 * 4 * rows * width
    assert not Path("run").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_stack_is_updated_if_only_it_has_gradients(tiny_data: Path, optimizer: str) -> None:
    rehearsal = Rehearsal(reduced_plan(planned(tiny_data, optimizer_type=optimizer), 1, 4))
    rehearsal.timed()
    before = {name: p.detach().clone() for name, p in rehearsal.run.model.named_parameters()}
    assert rehearsal.update_of_stack() > 0 and not rehearsal.only_stack
    for name, p in rehearsal.run.model.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith("transformer.h."))
    rehearsal.close()


@pytest.mark.usefixtures("no_time")
def test_seconds_add_up(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 of 6 layers and 2 of 4 sequences, with known measurements."""
    plan = planned(tiny_data, gradient_accumulation_steps=3)
    rehearsal = Rehearsal(reduced_plan(plan, 2, 2))
    # a sequence takes 1 s for each layer and 3 s for the rest; an update 0.5 s for each layer and 2 s for the rest
    monkeypatch.setattr(rehearsal, "timed", lambda: {"gradients": 10.0, "stack": 4.0, "update": 3.0})
    monkeypatch.setattr(rehearsal, "update_of_stack", lambda: 1.0)
    monkeypatch.setattr(rehearsal, "evaluated", lambda windows: Split(2.0 * windows, 1.0 * windows))
    found = extrapolate(plan, rehearsal, 0, None, 3.0, 0.0, 7.0)
    assert found.step == pytest.approx(3 * 4 * (6 + 3) + 6 * 0.5 + 2)
    assert found.seconds["steps"] == 20 * found.step and found.tokens_per_s == plan.tokens_per_step / found.step
    # evaluations at 0, 8, 16 and 20: 2 * 8 windows of 6 + 1 s
    assert found.seconds["evaluations"] == pytest.approx(4 * 2 * 8 * (6 + 1))
    held = found.bytes["weights"] + found.bytes["optimizer"]
    assert found.seconds["checkpoints"] == pytest.approx((2 * SAVE_BESIDE + SAVE_AWAITED) * held)
    assert found.bytes["copies for a checkpoint"] == held
    assert found.seconds["start"] > 7.0 and found.total == sum(found.seconds.values())
    rehearsal.close()


@pytest.mark.usefixtures("no_time")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_memory_adds_up(tiny_data: Path, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 of 6 layers: what was resident, less what is known of it, is what lives for a moment."""
    plan = planned(tiny_data, gradient_accumulation_steps=accumulation)
    rehearsal = Rehearsal(reduced_plan(plan, 2, 2))
    monkeypatch.setattr(rehearsal, "held", lambda: (Split(20, 5), Split(40, 10)))
    monkeypatch.setattr(rehearsal, "trained", lambda: Split(20, 5))
    monkeypatch.setattr(rehearsal, "saved", lambda: Split(200, 30))
    base, fixed, moment = 1000, 10, 60
    peaks = [base + (20 + 5) + 230 // 2 + fixed]  # after one sequence of two; from then on all there is
    known = base + (20 + 5) + (40 + 10) + 230
    monkeypatch.setattr(forecasts, "peak_memory", lambda device: peaks.pop() if peaks else known + moment + fixed)
    found = extrapolate(plan, rehearsal, base, None, 3.0, 0.0, 0.0)
    size = found.bytes
    assert (size["weights"], size["gradients"], size["optimizer"], size["the program"]) == (65, 65, 130, base)
    at_once = 2 * (3 * 200 + 30 + moment) + fixed  # twice the sequences
    assert size["gradients"] + size["activations"] == (at_once if accumulation == 1 else at_once + 65)
    assert found.memory == base + 65 + 130 + size["gradients"] + size["activations"] + 65 + 130
    scarce = extrapolate(plan, rehearsal, base, 100, 3.0, 0.0, 0.0)  # too little is free
    assert scarce.bytes["copies for a checkpoint"] == 0
    rehearsal.close()


def test_a_rehearsal_is_as_large_as_time_allows(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tiny_data, batch_size=600)
    assert rehearsal_size(plan, 3.0) == (6, 600)
    flops = plan.sizes.flops_per_token * 600 * 8
    monkeypatch.setattr(forecasts, "products_per_second", lambda: flops)  # an update takes 2 s, a fourth of 3 is less
    layers, rows = rehearsal_size(plan, 3.0)
    assert 1 <= layers < 6 and rows == 600
    monkeypatch.setattr(forecasts, "products_per_second", lambda: 1.0)
    assert rehearsal_size(plan, 3.0) == (
        1,
        150,
    )  # 300 sequences are 2,400 tokens: halved once more, no further
    compiled = dataclasses.replace(plan, runtime=dataclasses.replace(plan.runtime, compile=True))
    assert rehearsal_size(compiled, 3.0) == (6, 600)


@pytest.mark.usefixtures("no_time")
def test_a_model_that_does_not_fit_is_rehearsed_in_part(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = planned(tiny_data), []

    def short(limit: int) -> None:
        def build(reduced: Plan) -> Rehearsal:
            tried.append((reduced.config.model.n_layer, reduced.micro_batch))
            if len(tried) <= limit:
                raise torch.OutOfMemoryError("no room")
            return Rehearsal(reduced)

        monkeypatch.setattr(forecasts, "Rehearsal", build)

    short(3)
    found = forecast(plan, budget=0.1)
    assert tried == [(6, 4), (3, 4), (1, 4), (1, 2)]
    assert found.bytes["weights"] == plan.sizes.weights and "1 of 6 layers and 2 of 4 sequences" in found.measured
    tried.clear()
    short(99)
    with pytest.raises(UserError, match="one layer and one sequence"):
        forecast(plan, budget=0.1)


@pytest.mark.usefixtures("no_time")
def test_the_command_prints_the_whole_report(
    tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(arguments(dataset=tiny_data, out_dir="run")) == 0
    out = capsys.readouterr().out
    assert "memory: about" in out and "step: about" in out and "time: about" in out and "until" in out
    assert "does not fit" not in out and not Path("run").exists() and out.endswith("nothing was written\n")
    monkeypatch.setattr(forecasts, "total_memory", lambda device: 1 << 20)
    assert command.main(arguments(dataset=tiny_data, out_dir="run")) == 0
    assert "warning: the run does not fit into the 0.0 GiB of cpu" in capsys.readouterr().out


def test_a_sharded_run_is_rehearsed_in_one_process(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, no_time: None
) -> None:
    torchrun = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "x",
        "MASTER_PORT": 1,
    }
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    plan = planned(tiny_data, n_layer=2, parallel="fsdp", backend="gloo")
    assert (plan.runtime.world_size, plan.runtime.shards) == (2, 2)
    found = forecast(plan, 0.01)
    assert not torch.distributed.is_initialized() and found.step > 0
    assert found.bytes["weights"] == plan.sizes.weights
