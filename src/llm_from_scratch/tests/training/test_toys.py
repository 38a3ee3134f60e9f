"""A new optimizer and a new schedule: one class and one function in the tables, usable in every part of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.config import OptimizerConfig, SchedulerConfig
from llm_from_scratch.errors import UserError
from llm_from_scratch.settings import type_hints
from llm_from_scratch.training.forecast import Rehearsal
from llm_from_scratch.training.optimizer import OPTIMIZERS, make_optimizer
from llm_from_scratch.training.rule import Rule, Slots, with_gradients
from llm_from_scratch.training.scheduler import SCHEDULES
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train

from ..tiny import read_metrics, tiny_config

pytestmark = pytest.mark.usefixtures("here", "toys")


class Lion(Rule):
    """Lion (arXiv 2302.06675): the sign of an interpolation between momentum and gradient."""

    def slots(self, p: Tensor) -> Slots:
        return {"exp_avg": (tuple(p.shape), self.dtype)}

    def step(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], found_inf: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        for _, p in with_gradients(group):
            state[p] = state[p] or self.new_state(p)
            m = state[p]["exp_avg"]
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(m.lerp(p.grad.to(m.dtype), 1 - beta1).sign().to(p.dtype), alpha=group["lr"])
            m.lerp_(p.grad.to(m.dtype), 1 - beta2)


class Paired(Lion):
    """Steps the matrices itself and leaves the other parameters to Lion."""

    @classmethod
    def groups(cls, model: Any, config: OptimizerConfig, default: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [default[0], {**default[1], "rule": "lion"}]


def sawtooth(step: int, peak: float, config: SchedulerConfig, end: int) -> float:
    return peak * (1 - step % 3 / 4)


SETTINGS: dict[str, Any] = {"optimizer_type": "lion", "schedule": "sawtooth", "learning_rate": 1e-3, "dropout": 0.1}


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "lion", Lion)
    monkeypatch.setitem(OPTIMIZERS, "paired", Paired)
    monkeypatch.setitem(SCHEDULES, "sawtooth", sawtooth)
    choices = Literal["adamw", "muon", "normuon", "lion", "paired"]
    monkeypatch.setitem(type_hints(OptimizerConfig), "optimizer_type", choices)
    monkeypatch.setitem(type_hints(SchedulerConfig), "schedule", Literal["cosine", "sawtooth"])


def test_a_run_trains_saves_and_resumes_bit_for_bit(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="whole", max_iters=8, **SETTINGS))
    train(tiny_config(tiny_data, out_dir="cut", max_iters=5, **SETTINGS))
    train(tiny_config(tiny_data, out_dir="cut", max_iters=8, init_from="resume", **SETTINGS))
    whole, cut = (load_checkpoint(find_checkpoint(name, "last")) for name in ("whole", "cut"))
    assert whole.step == cut.step == 8 and whole.optimizer is not None and cut.optimizer is not None
    assert all(torch.equal(whole.model[name], cut.model[name]) for name in whole.model)
    for name, slots in whole.optimizer["state"].items():
        assert set(slots) == {"exp_avg"} and torch.equal(slots["exp_avg"], cut.optimizer["state"][name]["exp_avg"])
    lines = [entry for entry in read_metrics(Path("whole")) if "loss" in entry]
    rates = [2e-3 / 6, 4e-3 / 6, 5e-4, 1e-3, 7.5e-4, 5e-4, 1e-3, 7.5e-4]  # two steps of warm-up
    assert [entry["lr"] for entry in lines] == pytest.approx(rates)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_its_first_step_is_worked_by_hand() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0]])
    settings: Any = OptimizerConfig("lion", weight_decay=0.5, learning_rate=0.1, beta2=0.95)  # type: ignore[arg-type]
    optimizer = make_optimizer(layer, settings, torch.device("cpu"))
    layer.weight.grad = torch.tensor([[3.0, -0.2]])
    optimizer.step()
    assert layer.weight.flatten().tolist() == pytest.approx([0.95 - 0.1, -1.9 + 0.1])
    assert optimizer.state[layer.weight]["exp_avg"].flatten().tolist() == pytest.approx([0.15, -0.01])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_counts_the_bytes_that_it_declares(tiny_data: Path, dtype: str) -> None:
    plan = make_plan(tiny_config(tiny_data, optimizer_dtype=dtype, **SETTINGS))
    assert plan.sizes.optimizer == plan.sizes.params * (4 if dtype == "float32" else 2)
    rehearsal = Rehearsal(dataclasses.replace(plan, runtime=plan.runtime))
    rehearsal.timed()
    assert rehearsal.held()[1].whole == plan.sizes.optimizer
    rehearsal.close()


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("before", "after"), [("lion", "adamw"), ("adamw", "lion"), ("muon", "lion"), ("paired", "adamw")]
)
def test_moments_of_another_optimizer_are_refused_by_name(tiny_data: Path, before: str, after: str) -> None:
    train(tiny_config(tiny_data, out_dir="run", **{**SETTINGS, "optimizer_type": before}))
    resumed = {**SETTINGS, "optimizer_type": after, "init_from": "resume", "max_iters": 9}
    rule = "adamw" if before == "muon" else before  # the first group of Muon's run that Lion compares
    with pytest.raises(UserError, match=rf"is {rule}'s, not {after}'s: resume with --optimizer_type={before}"):
        train(tiny_config(tiny_data, out_dir="run", **resumed))


def test_a_step_that_is_not_finite_is_skipped(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word about it in the class."""
    from llm_from_scratch.training import trainer

    step, states = trainer.train_step, []

    def spoiled(run: Any, x: Tensor, y: Tensor) -> Any:
        hook = run.model.register_forward_hook(lambda m, a, out: (out[0], out[1] * float("nan")))
        if run.state.step != 3:
            hook.remove()
        done = step(run, x, y)
        hook.remove()
        states.append([p.detach().clone() for p in run.model.parameters()])
        return done

    monkeypatch.setattr(trainer, "train_step", spoiled)
    assert train(tiny_config(tiny_data, out_dir="run", **SETTINGS)).step == 8
    same = [
        all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        for one, two in zip(states[:-1], states[1:], strict=True)
    ]
    assert same == [False, False, True, False, False, False, False]
