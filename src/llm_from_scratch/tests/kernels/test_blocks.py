"""Blocks in few nodes: against float64, with dropout, hooks and edits of core/model.py."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.model import GPT, Block
from llm_from_scratch.kernels import blocks, layers
from llm_from_scratch.kernels.blocks import CompiledBlock, layer_replacements
from llm_from_scratch.kernels.compiled import Kernel
from llm_from_scratch.kernels.cpu import CPUAttention, CPUDropout
from llm_from_scratch.kernels.products import CPULinear, has_onednn
from llm_from_scratch.kernels.swap import swap

SHAPE: dict[str, Any] = {"block_size": 70, "vocab_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "bias": False}
MODERN: dict[str, Any] = {
    "pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "n_kv_head": 1
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "bias": {"bias": True}, "tanh": {"activation": "gelu_tanh"}, "relu2": {"activation": "relu2"},
    "modern": MODERN, "modern, bias": MODERN | {"bias": True},
}  # fmt: skip


@pytest.fixture(params=["AVX2", "AVX-512"])
def level(kernel: Kernel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    if request.param == "AVX-512" and not kernel.has_avx512:
        pytest.skip("this processor has no AVX-512")
    found = dataclasses.replace(kernel, has_avx512=request.param == "AVX-512")
    monkeypatch.setattr(layers, "load_kernel", lambda: found)
    return found


def made(changes: dict[str, Any]) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def exchanged(model: GPT) -> tuple[GPT, list[str]]:
    said = list[str]()
    swap(model, layer_replacements(model, False), said.append)
    return model, said


def results(model: GPT, x: Tensor) -> list[Tensor]:
    """The first block's output, and the gradients of a weighted sum of it."""
    block, leaf = model.transformer.h[0], x.detach().to(next(model.parameters()).dtype).requires_grad_()
    where = model.positions.prepare(torch.arange(x.size(1)), leaf.dtype)
    y = block(leaf, where)
    weights = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [leaf, *block.parameters()])]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_blocks_are_those_of_float64(level: Kernel, name: str) -> None:
    plain = made(VARIANTS[name])
    model, said = exchanged(copy.deepcopy(plain))
    assert not said and all(type(block) is CompiledBlock for block in model.transformer.h)
    x = torch.randn(3, 70, 32) * 2 + 1
    found = results(model, x)
    for a, b in zip(results(plain.double(), x), found, strict=True):
        assert (b - a).norm() <= 2e-6 * a.norm()


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
def test_products_by_another_library(kernel: Kernel) -> None:
    plain = made(MODERN | {"bias": True})
    model, _ = exchanged(copy.deepcopy(plain))
    swap(model, {models.Linear: CPULinear}, pytest.fail)
    x = torch.randn(3, 70, 32)
    for a, b in zip(results(plain, x), results(model, x), strict=True):
        assert (b - a).norm() <= 4e-6 * a.norm()


@pytest.mark.parametrize("name", ["plain", "modern, bias"])
def test_dropout_draws_the_same_masks(level: Kernel, name: str) -> None:
    """Those of kernels/cpu.py, of several sequences and blocks of queries per draw."""
    plain = made(VARIANTS[name] | {"dropout": 0.3})
    model, said = exchanged(copy.deepcopy(plain))
    swap(plain, {models.Attention: CPUAttention, nn.Dropout: CPUDropout}, said.append)
    assert not said
    both = []
    for one in (plain.train(), model.train()):
        torch.manual_seed(1)
        both.append([*results(one, torch.arange(5 * 70 * 32).sin().view(5, 70, 32)), torch.rand(1)])
    for a, b in zip(*both, strict=True):
        assert (b - a).norm() <= 4e-6 * a.norm()


def test_draws_of_several_sequences_at_a_time(level: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_from_scratch.kernels.cpu.WEIGHTS", 2 * 3 * 64 * 130)
    q, k, v = torch.randn(3, 5, 3, 130, 16).unbind()
    found = []
    for module in (CPUAttention(0.4), layers.CompiledAttention(0.4)):
        torch.manual_seed(2)
        leaves = [t.clone().requires_grad_() for t in (q, k[:, :1], v[:, :1])]
        y = module(*leaves, None, True)
        found.append([y, *torch.autograd.grad((y * q.cos()).sum(), leaves), torch.rand(1)])
    for a, b in zip(*found, strict=True):
        assert (b - a).norm() <= 2e-6 * a.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_in_torch_is_not_finite(level: Kernel, value: float) -> None:
    plain = made({"bias": True})
    model, _ = exchanged(copy.deepcopy(plain))
    x = torch.randn(2, 6, 32)
    x[0, 2, 3] = value
    for a, b in zip(results(plain, x), results(model, x), strict=True):
        assert not b[~a.isfinite()].isfinite().any()
        assert b[a.isfinite()].isfinite().all()


def test_gradients_that_are_not_contiguous(kernel: Kernel) -> None:
    plain = made({})
    model, _ = exchanged(copy.deepcopy(plain))
    found = []
    for one in (plain, model):
        x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        block = one.transformer.h[0]
        found.append(torch.autograd.grad(block(x)[:, ::2].sum(), [x, *block.parameters()]))
        assert not block(x[:, ::2]).isnan().any() and block(x.detach()).requires_grad
    for a, b in zip(*found, strict=True):
        assert (b - a).norm() <= 4e-6 * a.norm()


def test_a_hook_in_a_block_runs(kernel: Kernel) -> None:
    model, seen = exchanged(made({}))[0], list[Any]()
    x = torch.randn(1, 4, 32)
    before = model.transformer.h[0](x)
    model.transformer.h[0].mlp.act.register_forward_hook(lambda *args: seen.append(args[2].shape))
    torch.testing.assert_close(model.transformer.h[0](x), before, atol=1e-5, rtol=1e-5)
    assert seen == [(1, 4, 128)]


def test_frozen_weights_get_no_gradient(kernel: Kernel) -> None:
    model, _ = exchanged(made({"bias": True}))
    block = model.transformer.h[0]
    for layer in (block.attn.c_attn, block.mlp.c_fc, block.mlp.c_proj):
        layer.requires_grad_(False)
    block(torch.randn(1, 4, 32)).sum().backward()
    assert {name for name, p in block.named_parameters() if p.grad is not None} == {
        name for name, p in block.named_parameters() if p.requires_grad
    }


Forward = Callable[..., Tensor]


def noisy(forward: Forward) -> Forward:
    return lambda self, x, *rest: forward(self, x, *rest) + (torch.rand(()) if self.training else 0.0)


def gated(forward: Forward) -> Forward:
    return lambda self, x, *rest: x + self.gate * (forward(self, x, *rest) - x)


def scaled_by_layer(forward: Forward) -> Forward:
    return lambda self, x, *rest: x + self.scale * (forward(self, x, *rest) - x)


@pytest.mark.parametrize("edit", [noisy, gated, scaled_by_layer])
def test_an_edited_block_is_not_replaced(kernel: Kernel, edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit that acts in training only; a parameter that changes nothing at first; a factor of one layer only."""
    before = Block.__init__

    def init(self: Any, config: GPTConfig) -> None:
        before(self, config)
        self.gate, self.scale = nn.Parameter(torch.ones(())), 1.0

    monkeypatch.setattr(Block, "__init__", init)
    monkeypatch.setattr(Block, "forward", edit(Block.forward))
    model = made({})
    nn.init.ones_(model.transformer.h[0].gate)
    model.transformer.h[1].scale = 0.5
    if edit is not gated:
        for block in model.transformer.h:
            del block.gate
    model, said = exchanged(model)
    assert [line for line in said if "using core/model.py's Block" in line]
    kinds = [type(block) for block in model.transformer.h]
    assert kinds == ([CompiledBlock, Block] if edit is scaled_by_layer else [Block, Block])
    assert blocks.layers_in_c(model)


def test_blocks_with_other_parts_stay_modules(kernel: Kernel) -> None:
    """Adapters, documents, a missing norm: what they store is chosen per module."""
    assert Block in layer_replacements(made({}), False) and Block not in layer_replacements(made({}), True)
    model = made({})
    del model.transformer.h[1].ln_2
    assert Block not in layer_replacements(model, False)
    model = made({})
    model.transformer.h[0].mlp.c_fc = nn.Linear(32, 128)
    assert Block not in layer_replacements(model, False)


def test_a_second_derivative_is_an_error(kernel: Kernel) -> None:
    block, x = exchanged(made({}))[0].transformer.h[0], torch.randn(1, 4, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


def test_an_edit_of_later_tokens_counts(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = models.CausalSelfAttention.forward

    def forward(self: Any, x: Tensor, *rest: Any) -> Tensor:
        y = before(self, x, *rest)
        return y * (torch.arange(x.size(1)) < 50)[:, None]

    monkeypatch.setattr(models.CausalSelfAttention, "forward", forward)
    model, said = exchanged(made(MODERN))
    assert type(model.transformer.h[0]) is Block and any("using core/model.py's Block" in line for line in said)
