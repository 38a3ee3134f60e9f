"""training/optimizer.py: complete groups, torch's own AdamW, and state keyed by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn as nn

from llm_from_scratch.config import GPTConfig, OptimizerConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.training.moments import load_optimizer_state, optimizer_state
from llm_from_scratch.training.optimizer import clip_gradients, make_adamw, make_optimizer, parameter_groups

from ..stepping import same_weights as same
from ..stepping import train_steps as train

CPU = torch.device("cpu")


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16, **changes}))


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": False}, {"norm": "rmsnorm", "qk_norm": True, "activation": "swiglu", "tie_embeddings": False}],
)
def test_groups_hold_every_parameter_once(changes: dict[str, Any]) -> None:
    model = make(**changes)
    decay, rest = parameter_groups(model, 0.3)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    held = [id(p) for group in (decay, rest) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    names = dict(model.named_parameters())
    for group in (decay, rest):
        assert [id(names[name]) for name in group["names"]] == [id(p) for p in group["params"]]
    for name in names:
        is_matrix = name.split(".")[-2] not in ("ln_1", "ln_2", "ln_f", "q_norm", "k_norm") and name.endswith("weight")
        assert name in (decay if is_matrix else rest)["names"]


def test_frozen_parameters_are_left_out() -> None:
    model = make()
    model.transformer.wpe.weight.requires_grad_(False)
    names = [name for group in parameter_groups(model, 0.1) for name in group["names"]]
    assert "transformer.wpe.weight" not in names and len(names) == len(list(model.parameters())) - 1


@pytest.mark.cases(2)
@pytest.mark.parametrize("fused", ["off", "on", "auto"])
def test_updates_equal_torch(fused: Any) -> None:
    ours, theirs = make(), make()
    config = OptimizerConfig(learning_rate=3e-3, weight_decay=0.5, beta1=0.8, beta2=0.9, fused=fused)
    optimizer = make_optimizer(ours, config, CPU)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.5},
            {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=3e-3, betas=(0.8, 0.9), fused=fused != "off",
    )  # fmt: skip
    train(ours, optimizer, 10)
    train(theirs, reference, 10)
    assert same(ours, theirs)
    assert all(group["fused"] is (fused != "off") for group in optimizer.param_groups)


def test_one_update_by_hand() -> None:
    """The first AdamW step is p * (1 - lr * decay) - lr * sign(g), as both moments are one gradient old."""
    layer = nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, -2.0]]), torch.tensor([0.5])
    optimizer = make_adamw(layer, weight_decay=0.1, learning_rate=0.01, betas=(0.9, 0.95))
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, -0.2]]), torch.tensor([5.0])
    optimizer.step()
    assert layer.weight.flatten().tolist() == pytest.approx([1.0 * 0.999 - 0.01, -2.0 * 0.999 + 0.01], abs=1e-6)
    assert layer.bias.tolist() == pytest.approx([0.49], abs=1e-6)


@pytest.mark.parametrize("fused", ["off", "on"])
def test_state_is_saved_by_name_and_restored_exactly(fused: Any) -> None:
    config = OptimizerConfig(learning_rate=1e-2, fused=fused)
    model = make()
    optimizer = make_optimizer(model, config, CPU)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer_state(optimizer))
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    assert set(saved["state"]["transformer.wte.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert all("params" not in group for group in saved["param_groups"])
    # the order of names does not matter
    saved["state"] = dict(sorted(saved["state"].items(), reverse=True))
    twin = make()
    twin.load_state_dict(model.state_dict())
    resumed = make_optimizer(twin, config, CPU)
    load_optimizer_state(resumed, saved)
    train(model, optimizer, 3, seed=1)
    train(twin, resumed, 3, seed=1)
    assert same(model, twin)
    assert int(next(iter(optimizer.state.values()))["step"]) == 6


def test_hyperparameters_of_the_present_run_are_kept() -> None:
    model = make()
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=1e-2, weight_decay=0.1), CPU)
    train(model, optimizer, 1)
    now = make_optimizer(make(), OptimizerConfig(learning_rate=5e-4, weight_decay=0.7, beta2=0.5), CPU)
    load_optimizer_state(now, optimizer_state(optimizer))
    assert [group["lr"] for group in now.param_groups] == [5e-4, 5e-4]
    assert [group["weight_decay"] for group in now.param_groups] == [0.7, 0.0]
    assert now.param_groups[0]["betas"] == (0.9, 0.5)


def test_a_state_of_another_model_is_refused() -> None:
    model = make()
    optimizer = make_optimizer(model, OptimizerConfig(), CPU)
    train(model, optimizer, 1)
    saved = optimizer_state(optimizer)
    with pytest.raises(UserError, match=r"lacks transformer\.h\.2"):
        load_optimizer_state(make_optimizer(make(n_layer=3), OptimizerConfig(), CPU), saved)
    with pytest.raises(UserError, match=r"has shape \(8, 16\), not \(4, 16\)"):
        load_optimizer_state(make_optimizer(make(block_size=4), OptimizerConfig(), CPU), saved)


def test_an_empty_state_is_a_fresh_start() -> None:
    optimizer = make_optimizer(make(), OptimizerConfig(), CPU)
    load_optimizer_state(optimizer, {"state": {}, "param_groups": []})
    assert not optimizer.state


def test_fused_is_refused_if_torch_does_not_have_it() -> None:
    with pytest.raises(UserError, match="does not have a fused AdamW for mps"):
        make_optimizer(make(), OptimizerConfig(fused="on"), torch.device("mps"))


@pytest.mark.parametrize("norm", [0.5, 2.0, math.nan])
def test_clipping_is_torchs_and_leaves_small_gradients_alone(norm: float) -> None:
    model: Any = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.full_like(p, norm / math.sqrt(8))
    expected = copy.deepcopy(model)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        q.grad = p.grad.clone()
    versions = [p.grad._version for p in model.parameters()]
    found = clip_gradients(model, 1.0)
    torch.testing.assert_close(found, torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0), equal_nan=True)
    for p, q, version in zip(model.parameters(), expected.parameters(), versions, strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)
        assert (p.grad._version == version) is (norm < 1)  # no pass over gradients that need no clipping
