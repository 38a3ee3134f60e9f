"""Runs with adapters or frozen parameters: what trains, what resumes bit for bit, what is counted and refused."""

from __future__ import annotations

import dataclasses
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.adapters import adapter_of
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import NotFiniteError, UserError
from llm_from_scratch.kernels import recompute
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.machine import memory
from llm_from_scratch.machine.memory import ReusedMemory
from llm_from_scratch.training import wrap as wrapping
from llm_from_scratch.training.forecast import forecast
from llm_from_scratch.training.opening import open_run
from llm_from_scratch.training.plan import describe
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train, train_step

from ..tiny import tiny_config

pytestmark = pytest.mark.usefixtures("here")
SETTINGS: dict[str, Any] = {
    "init_from": "base", "lora_rank": 2, "lora_dropout": 0.1, "dropout": 0.1, "schedule": "constant",
    "eval_interval": 1000, "save_interval": 1000,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_config(tiny_data, out_dir=str(folder / "base"), max_iters=2, n_layer=2))
    return folder / "base"


@pytest.fixture
def base(tiny_data: Path, trained: Path, here: Path) -> Path:
    """The data of a run in the folder `base`."""
    shutil.copytree(trained, "base")
    return tiny_data


def assert_same_end(one: str, other: str) -> None:
    first, second = (load_checkpoint(find_checkpoint(name, "last")) for name in (one, other))
    assert first.step == second.step and first.adapter
    assert all(torch.equal(first.adapter[name], second.adapter[name]) for name in first.adapter)
    assert first.optimizer is not None and second.optimizer is not None
    for name, slots in first.optimizer["state"].items():
        for slot, value in slots.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.optimizer["state"][name][slot]))


def test_a_resumed_adapter_is_bit_equal_to_an_uninterrupted_one(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(base, **SETTINGS, out_dir="whole", max_iters=5))
    train(tiny_config(base, **SETTINGS, out_dir="parts", max_iters=2))
    capsys.readouterr()
    train(tiny_config(base, **{**SETTINGS, "init_from": "resume"}, out_dir="parts", max_iters=5))
    assert "not bit-exact" not in capsys.readouterr().out
    assert_same_end("whole", "parts")


@pytest.mark.slow
def test_an_adapter_cut_at_random_steps_resumes_bit_equal(base: Path) -> None:
    train(tiny_config(base, **SETTINGS, out_dir="whole", max_iters=12))
    for cut in random.Random(0).sample(range(1, 12), 6):
        train(tiny_config(base, **SETTINGS, out_dir=f"cut-{cut}", max_iters=cut))
        train(tiny_config(base, **{**SETTINGS, "init_from": "resume"}, out_dir=f"cut-{cut}", max_iters=12))
        assert_same_end("whole", f"cut-{cut}")


def test_only_the_adapter_trains(base: Path) -> None:
    with open_run(tiny_config(base, **SETTINGS, out_dir="run"), None, "llm-train", None) as run:
        plain = {n: t.clone() for n, t in run.model.state_dict().items() if "lora" not in n}
        train_step(run, *run.next_batch())
        train_step(run, *run.next_batch())
        held = [p for group in run.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in adapter_of(run.model).values()}
        assert all(torch.equal(run.model.state_dict()[name], tensor) for name, tensor in plain.items())
        assert all(t.any() for t in adapter_of(run.model).values())
        assert all(torch.equal(t, load("base").model[name]) for name, t in plain.items())


def test_reused_memory_changes_no_bit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in reused memory are NaN until they are written: memory that is reused too early would show."""
    modern = {"norm": "rmsnorm", "activation": "swiglu", "pos_embedding": "rope", "bias": False, "n_layer": 2}
    train(tiny_config(base, **modern, max_iters=1, out_dir="modern"))
    monkeypatch.setattr(recompute, "WORTH_IT", 0)
    plain = ReusedMemory.empty
    monkeypatch.setattr(ReusedMemory, "empty", lambda *given: plain(*given).fill_(math.nan))
    leaves = {"init_from": "modern", "lora_rank": 2, "batch_size": 64, "micro_batch": 32, "out_dir": "run"}
    found = []
    for least in (1 << 60, 1):
        monkeypatch.setattr(memory, "LEAST_REUSED", least)
        with open_run(tiny_config(base, **leaves), None, "llm-train", None) as run:
            for _ in range(3):
                train_step(run, *run.next_batch())
            blocks = [block for same in run.models.memory.blocks.values() for block in same]
            found.append({name: t.detach().clone() for name, t in adapter_of(run.model).items()})
    assert len(blocks) > 10
    assert all(torch.equal(t, found[0][name]) and t.any() for name, t in found[1].items())


def test_frozen_parameters_do_not_change_or_have_state(base: Path) -> None:
    train(tiny_config(base, init_from="base", out_dir="run", freeze=("wte", "h.0"), max_iters=2))
    before, after = load("base").model, load_checkpoint(find_checkpoint("run", "last"))
    kept = {name for name, t in after.model.items() if torch.equal(t, before[name])}
    assert kept == {n for n in before if "wte" in n or "lm_head" in n or ".h.0." in n}
    assert after.optimizer is not None and kept.isdisjoint(after.optimizer["state"])


def test_plan_and_forecast_count_trained_parameters(base: Path) -> None:
    plan = make_plan(tiny_config(base, **SETTINGS, out_dir="run"))
    layers = [(16, 48, 3), (16, 16, 1), (16, 64, 1), (64, 16, 1)]  # inputs, outputs, stacked matrices
    trained = 2 * sum(2 * (count * inputs + outputs) for inputs, outputs, count in layers)
    whole = make_plan(tiny_config(base, init_from="base", out_dir="run")).sizes
    sizes = plan.sizes
    assert sizes.trained == trained and sizes.params == whole.params + trained
    assert sizes.gradients == 4 * trained and sizes.optimizer == 8 * trained
    assert whole.trained == whole.params
    told = next(line for line in describe(plan) if line.startswith("model:"))
    assert f"{sizes.params:,} parameters ({trained:,} of them train: {trained / sizes.params:.2%})" in told
    found = forecast(plan, budget=0.2)
    counters = 4 * 2 * 8  # a step for each of the tensors
    assert found.bytes["gradients"] == 4 * trained and found.bytes["optimizer"] == 8 * trained + counters
    assert all(seconds >= 0 for seconds in found.seconds.values()) and found.step > 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scratch": ({"init_from": "scratch"}, "name it with --init_from"),
    "no match": ({"lora_targets": ("c_fcc",)}, r"--lora_targets='c_fcc' matches nothing; .*mlp\.c_fc"),
    "muon": ({"optimizer_type": "muon"}, "lora_rank does not support optimizer_type=muon"),
    "fp8": ({"fp8": True}, "lora_rank does not support fp8=True"),
    "ckpt.pt": ({"save_nanogpt_ckpt": True}, "lora_rank does not support save_nanogpt_ckpt=True"),
    "freeze": ({"freeze": ("wte",)}, "remove --freeze"),
    "alone": ({"lora_rank": None}, "lora_dropout has no effect without lora_rank"),
    "rank": ({"lora_rank": 0}, "lora_rank=0 is out of range"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_contradict_each_other_are_refused(base: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        train(tiny_config(base, **{**SETTINGS, **changes}, out_dir="run"))


def test_a_resumed_run_keeps_its_kind(base: Path) -> None:
    train(tiny_config(base, **SETTINGS, out_dir="run", max_iters=1))
    for change, message in (
        ({"lora_rank": 3}, "has lora_rank=2, not 3"),
        ({"lora_targets": ("c_fc",)}, "other layers than --lora_targets"),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny_config(base, **{**SETTINGS, "init_from": "resume", **change}, out_dir="run", max_iters=2))
    with pytest.raises(UserError, match="has lora_rank=None, not 2"):
        train(tiny_config(base, **{**SETTINGS, "init_from": "resume"}, out_dir="base", max_iters=3))


def test_a_shorter_context_is_reported(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(base, init_from="base", out_dir="run", block_size=4, lora_rank=1, max_iters=1))
    assert "context: shortened from the 8 tokens of the weights to 4 (--block_size)" in capsys.readouterr().out
    found = load("run")
    assert found.model_config.block_size == 4 and found.model["transformer.wpe.weight"].shape[0] == 4
    train(tiny_config(base, init_from="resume", out_dir="run", block_size=4, lora_rank=1, max_iters=2))


def test_a_roll_back_restores_the_adapter(base: Path) -> None:
    with open_run(tiny_config(base, **SETTINGS, out_dir="run"), None, "llm-train", None) as run:
        train_step(run, *run.next_batch())
        saved = {name: t.detach().clone() for name, t in adapter_of(run.model).items()}
        run.save()
        train_step(run, *run.next_batch())
        run.roll_back(NotFiniteError("broken"))
        assert run.state.step == 1
        assert all(torch.equal(t, saved[name]) for name, t in adapter_of(run.model).items())


# --- an edited model ---

CPU = torch.device("cpu")


class Edited(GPT):
    """It counts its steps, drops its first block out at random, and has a parameter without a use."""

    failure: Exception | None = None
    calls: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(1))
        self.idle = torch.nn.Parameter(torch.ones(3))
        self.transformer.h[0].register_forward_hook(lambda m, args, out: args[0] if torch.rand(()) < 0.5 else out)

    def forward(self, *given: Any, **named: Any) -> tuple[Tensor | None, Tensor | None]:
        if self.failure is not None:
            raise self.failure
        if self.training:
            self.calls += 1
        return super().forward(*given, **named)


@pytest.fixture
def edited() -> Edited:
    return Edited(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16))


def test_the_search_for_unused_parameters_changes_nothing(edited: Edited) -> None:
    """All processes find the same, each with random numbers of its own."""
    found = set[tuple[str, ...]]()
    for seed in range(8):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.add(tuple(name for name, _ in wrapping.unused_parameters(edited, CPU)))
        assert torch.equal(torch.get_rng_state(), before) and not edited.calls
    assert len(found) == 1 and "idle" in found.pop()


def test_the_search_for_unused_parameters_reports_that_memory_ran_out(edited: Edited) -> None:
    edited.failure = ValueError("needs more than tokens")
    assert wrapping.unused_parameters(edited, CPU) == []
    edited.failure = torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
    with pytest.raises(torch.OutOfMemoryError):
        wrapping.unused_parameters(edited, CPU)


@pytest.mark.parametrize("freeze, own, others, expected", [
    ((), True, False, "does not depend on idle"),
    (("idle",), False, False, None),
    (("idle",), False, True, "does not depend on some parameters of another process"),
])  # fmt: skip
def test_ddp_learns_the_unused_parameters_of_all_processes(
    freeze: tuple[str, ...], own: bool, others: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("none", vocab_size=20, freeze=freeze, compile=False, device="cpu", dtype="float32")
    edited, said, told = Edited(config.model), list[str](), list[bool]()
    edited.transformer.h[0]._forward_hooks.clear()
    runtime = dataclasses.replace(runtimes.resolve(config.system), world_size=2)

    def agree(condition: bool, *_: Any) -> bool:
        assert condition == own
        return condition or others

    def in_parallel(model: GPT, _: Any, has_unused: bool) -> GPT:
        told.append(has_unused)
        return model

    monkeypatch.setattr(wrapping, "any_rank", agree)
    monkeypatch.setattr(wrapping, "data_parallel", in_parallel)
    wrapping.wrap(edited, config, runtime, 1, said.append)
    assert told == [expected is not None] and not edited.calls
    lines = [line for line in said if line.startswith("DDP searches")]
    assert [line.endswith(str(expected)) for line in lines] == [True] * len(told) * (expected is not None)
