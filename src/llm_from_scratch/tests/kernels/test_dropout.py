"""Dropout in C, of attention weights too: the draws, the rate and mode that decide, edits, and values not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.model import GPT, Attention
from llm_from_scratch.kernels.compiled import Kernel
from llm_from_scratch.kernels.cpu import CPUAttention, CPUDropout
from llm_from_scratch.kernels.layers import CompiledAttention, CompiledDropout, layer_replacements
from llm_from_scratch.kernels.swap import swap

SHAPE: dict[str, Any] = {"block_size": 40, "vocab_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.3}


def exchanged(**changes: Any) -> tuple[GPT, list[str]]:
    torch.manual_seed(0)
    model, said = GPT(GPTConfig(**SHAPE | changes)), list[str]()
    swap(model, layer_replacements(model, False), said.append)
    return model, said


def drawn(module: Any, *inputs: Tensor) -> list[Tensor]:
    """Output, gradients, and the next random number."""
    torch.manual_seed(2)
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = module(*leaves, None, True) if isinstance(module, Attention) else module(*leaves)
    return [y, *torch.autograd.grad((y * inputs[0].cos()).sum(), leaves), torch.rand(1)]


def test_dropout_draws_the_same_masks(level: Kernel) -> None:
    for shape in ((3, 70, 32), (1, 16), (3, 1000, 16)):
        x = torch.randn(shape)
        for a, b in zip(drawn(CPUDropout(0.3), x), drawn(CompiledDropout(0.3), x), strict=True):
            torch.testing.assert_close(b, a, atol=0, rtol=1e-6)


@pytest.mark.parametrize("few", [False, True])
def test_attention_draws_the_same_masks(level: Kernel, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sequences and blocks of queries per draw."""
    if few:
        monkeypatch.setattr("llm_from_scratch.kernels.cpu.WEIGHTS", 2 * 3 * 64 * 130)
    q, k, v = torch.randn(3, 5, 3, 130, 16).unbind()
    inputs = q, k[:, :1], v[:, :1]
    for a, b in zip(drawn(CPUAttention(0.4), *inputs), drawn(CompiledAttention(0.4), *inputs), strict=True):
        assert (b - a).norm() <= 2e-6 * a.norm()


@pytest.mark.parametrize("module", [CompiledDropout(0.5), CompiledAttention(0.5)], ids=["dropout", "attention"])
def test_the_modules_own_mode_and_rate_decide(kernel: Kernel, module: Any) -> None:
    x, name = torch.randn(2, 2, 8, 16), "p" if isinstance(module, nn.Dropout) else "dropout"
    inputs = [x] * (1 if name == "p" else 3)
    kept = drawn(module.eval(), *inputs)
    assert not torch.equal(drawn(module.train(), *inputs)[0], kept[0])
    setattr(module, name, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(drawn(module, *inputs), kept, strict=True))
    setattr(module, name, 0.5)
    model, _ = exchanged()
    block, row = model.train().transformer.h[0], torch.randn(1, 8, 32)
    block.attn.eval(), block.mlp.eval()
    assert torch.equal(block(row), block(row))
    block.attn.attend.train()
    assert not torch.equal(block(row), block(row))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_infinities_and_nans_are_kept(level: Kernel, value: float) -> None:
    x = torch.randn(4, 32)
    x[0, 3] = value
    for a, b in zip(drawn(CPUDropout(0.5), x), drawn(CompiledDropout(0.5), x), strict=True):
        torch.testing.assert_close(b, a, equal_nan=True)


class RowDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[:-1]) >= self.p)[..., None] if self.training else x


def test_a_dropout_of_another_class_is_not_replaced(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = models.CausalSelfAttention.__init__

    def init(self: Any, config: GPTConfig) -> None:
        before(self, config)
        self.resid_dropout = RowDropout(config.dropout)

    monkeypatch.setattr(models.CausalSelfAttention, "__init__", init)
    block = exchanged()[0].transformer.h[0]
    assert type(block.attn.resid_dropout) is RowDropout and type(block.mlp.dropout) is CompiledDropout


def test_an_edit_that_acts_in_training_counts(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Attention.forward

    def edited(self: Any, q: Tensor, *others: Any) -> Tensor:
        return forward(self, q * 1.5 if self.training else q, *others)

    monkeypatch.setattr(Attention, "forward", edited)
    model, said = exchanged()
    attend = model.transformer.h[0].attn.attend
    assert type(attend) is Attention and (attend.training, attend.dropout) == (True, 0.3)
    assert len(said) == 1 and "using core/model.py's Attention" in said[0]


def test_an_edit_of_one_layer_counts(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Attention.forward
    monkeypatch.setattr(Attention, "scale", 1.0, raising=False)
    monkeypatch.setattr(Attention, "forward", lambda self, q, *others: forward(self, q * self.scale, *others))
    model = GPT(GPTConfig(**SHAPE))
    model.transformer.h[1].attn.attend.scale = 0.5
    swap(model, layer_replacements(model, False), lambda line: None)
    assert [type(block.attn.attend) for block in model.transformer.h] == [CompiledAttention, Attention]
