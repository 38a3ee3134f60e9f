"""kernels/swap.py: an edit of core/model.py always counts, whatever faster module would replace it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from llm_from_scratch.config import Config, GPTConfig, SystemConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.model import GPT, NextTokenLoss
from llm_from_scratch.kernels import recompute as activations
from llm_from_scratch.kernels import swap as swapping
from llm_from_scratch.kernels.cpu import CPUAttention, CPUDropout, CPURMSNorm, LeanCPUAttention, cpu_replacements
from llm_from_scratch.kernels.cross_entropy import ChunkedLoss
from llm_from_scratch.kernels.float8 import Float8Linear, float8_replacements
from llm_from_scratch.kernels.swap import swap, unswap
from llm_from_scratch.machine.device import resolve
from llm_from_scratch.training.wrap import exchange

MODERN: dict[str, Any] = {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True}


def model(**changes: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 16, "vocab_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_kv_head": 1, "bias": False}
    return GPT(GPTConfig(**{**shape, **MODERN, **changes}))


def exchanged(one: GPT, **settings: Any) -> tuple[GPT, list[str]]:
    """The model with every module exchanged that a run would exchange, and what was said."""
    config, said = Config(model=one.config), list[str]()
    config.system = SystemConfig(device="cpu", dtype="bfloat16", compile=False)  # asks for most replacements
    for name, value in settings.items():
        setattr(config.training, name, value)
    exchange(one, config, resolve(config.system), 4, said.append)
    return one, said


def logits_and_gradients(one: GPT) -> list[Tensor]:
    idx = torch.arange(34).view(2, 17) * 7 % 32
    logits = one(idx[:, :-1])[0].detach()
    loss = one(idx[:, :-1], idx[:, 1:])[1]
    return [logits, loss.detach(), *torch.autograd.grad(loss, list(one.parameters()))]


def scaled_attention(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True, scale=0.9)


def squared_loss(self: Any, x: Tensor, targets: Tensor, head: Any) -> tuple[None, Tensor]:
    return None, F.mse_loss(head(x).flatten(0, 1).amax(1), targets.flatten().float())


EDITS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "norm": ("RMSNorm", "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight + 0.5, self.eps)),
    "rotation": ("", "apply_rotary", lambda x, cos, sin: x * torch.cat((cos, cos), -1)),
    "scale of attention": ("Attention", "forward", scaled_attention),
    "activation": ("SwiGLU", "forward", lambda self, gate, x: F.gelu(gate) * x),
    "head": ("Head", "forward", lambda self, x: 1.5 * F.linear(x, self.weight.to(x.dtype))),
    "loss": ("NextTokenLoss", "forward", squared_loss),
}


def windowed_attention(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril().triu(-8)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


def late_loss(self: Any, x: Tensor, targets: Tensor, head: Any) -> tuple[None, Tensor]:
    """The first eight tokens of a row count half."""
    weights = torch.ones(targets.shape)
    weights[:, :8] = 0.5
    each = F.cross_entropy(head(x).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return None, (each * weights).sum() / weights.sum()


# In a few tokens they change nothing.
EDITS |= {"window": ("Attention", "forward", windowed_attention), "late": ("NextTokenLoss", "forward", late_loss)}


@pytest.mark.cases(3)
@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edited_module_is_used_and_reported(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "WORTH_IT", 0)
    before = logits_and_gradients(model())
    where, name, new = EDITS[edit]
    monkeypatch.setattr(getattr(models, where) if where else models, name, new)
    expected = logits_and_gradients(copy.deepcopy(model()))
    trained, said = exchanged(model(), chunked_loss=True)
    found = logits_and_gradients(trained)
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(expected, before, strict=True))
    assert apart > 0.03, "the edit must show"
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    lines = [line for line in said if "; using core/model.py's " in line]
    assert len(lines) == 1 and "returns a different result (relative difference" in lines[0]


@pytest.mark.parametrize("replacement", [CPUAttention, LeanCPUAttention])
def test_a_long_window_counts_in_a_longer_context(replacement: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def windowed(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril().triu(-511)
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)

    monkeypatch.setattr(models.Attention, "forward", windowed)
    for length, count in ((512, 2), (1024, 0)):  # in a shorter context it changes nothing
        said = list[str]()
        assert swap(model(block_size=length), {models.Attention: replacement}, said.append) == count
        assert len(said) == (not count)


def test_few_heads_of_many_are_compared_in_a_long_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many groups as fit, with the heads that share their keys."""
    monkeypatch.setattr(swapping, "LONG_WEIGHTS", 4 * 64 * 64)
    shapes = set()

    class Noted(models.Attention):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
            shapes.add((q.shape, k.shape))
            return super().forward(q, k, v, mask, causal)

    one = model(block_size=64, n_head=8, n_kv_head=4)
    assert swap(one, {models.Attention: Noted}, pytest.fail) == 2
    assert shapes == {((2, 8, 5, 4), (2, 4, 5, 4)), ((1, 4, 64, 4), (1, 2, 64, 4))}


def test_a_late_loss_counts_with_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_place(self: Any, x: Tensor, targets: Tensor, head: Any) -> tuple[None, Tensor]:
        weights = torch.where(torch.arange(targets.size(1)) < 64, 0.1, 1.0).expand(targets.shape)
        each = F.cross_entropy(head(x).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return None, (each * weights).sum() / weights.sum()

    def one() -> GPT:
        return model(block_size=128, vocab_size=50304, n_embd=16, n_layer=1)

    assert swap(one(), {NextTokenLoss: ChunkedLoss}, pytest.fail) == 1
    monkeypatch.setattr(NextTokenLoss, "forward", by_place)
    said = list[str]()
    assert swap(one(), {NextTokenLoss: ChunkedLoss}, said.append) == 0
    assert len(said) == 1 and "returns a different result" in said[0]


def test_without_an_edit_everything_is_exchanged_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "WORTH_IT", 0)
    plain = model(dropout=0.1).eval()
    names, classes = list(plain.state_dict()), [type(m) for m in plain.modules()]
    expected = logits_and_gradients(plain)
    trained, said = exchanged(plain, chunked_loss=True)
    assert not [line for line in said if "core/model.py" in line]
    kinds = {type(m).__name__ for m in trained.modules()}
    assert {"LeanBlock", "LeanCPURMSNorm", "CPUDropout", "CPURotaryPositions", "LeanCPUAttention"} <= kinds
    assert {"LeanCPUSwiGLU", "ChunkedLoss"} <= kinds and list(trained.state_dict()) == names
    for ours, theirs in zip(logits_and_gradients(trained), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    unswap(trained)
    assert [type(m) for m in trained.modules()] == classes


def test_random_state_and_mode_do_not_change() -> None:
    one = model(dropout=0.3).train()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert swap(one, cpu_replacements(one, True, False)[0], pytest.fail)
    assert torch.equal(torch.get_rng_state(), before) and all(m.training for m in one.modules())
    assert all(p.grad is None for p in one.parameters())


def test_float8_is_compared_before_it_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    one = model()
    replacements, keep = float8_replacements(one)
    assert swap(one, replacements, said.append, keep) == 10 and not said
    assert isinstance(one.transformer.h[0].attn.c_attn, Float8Linear) and type(one.lm_head) is models.Head
    monkeypatch.setattr(models.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight))
    edited = model()
    replacements, keep = float8_replacements(edited)
    assert swap(edited, replacements, said.append, keep) == 0 and len(said) == 1


def test_a_subclass_of_the_researchers_is_left_alone() -> None:
    class Mine(models.RMSNorm):
        pass

    one = model()
    one.transformer.ln_f = Mine(32)
    swap(one, {models.RMSNorm: CPURMSNorm}, pytest.fail)
    assert type(one.transformer.ln_f) is Mine and type(one.transformer.h[0].ln_1) is CPURMSNorm


def test_one_shape_that_differs_keeps_its_plain_module(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = models.RMSNorm.forward
    monkeypatch.setattr(
        models.RMSNorm, "forward", lambda self, x: plain(self, x) * (2 if x.size(-1) == 16 else 1)
    )  # the norms of queries and keys
    one, said = model(), list[str]()
    swap(one, {models.RMSNorm: CPURMSNorm}, said.append)
    assert type(one.transformer.h[0].attn.q_norm) is models.RMSNorm and type(one.transformer.ln_f) is CPURMSNorm
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["buffer", "frozen parameter"])
def test_a_constant_that_changes_nothing_in_the_first_layers_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no gradient in which the edit would show."""
    one, plain, said = model(qk_norm=False), models.RMSNorm.forward, list[str]()
    norms = [m for m in one.modules() if isinstance(m, models.RMSNorm)]
    for norm, value in zip(norms, (1.0, 1.0, 0.5, 1.0, 1.0), strict=True):
        scale = torch.tensor(value)
        if kind == "buffer":
            norm.register_buffer("scale", scale)
        else:
            norm.register_parameter("scale", nn.Parameter(scale, requires_grad=False))
    monkeypatch.setattr(models.RMSNorm, "forward", lambda self, x: plain(self, x) * self.scale)
    assert swap(one, {models.RMSNorm: CPURMSNorm}, said.append) == 4
    assert [type(norm) is models.RMSNorm for norm in norms] == [False, False, True, False, False]
    assert len(said) == 1 and "returns a different result" in said[0]


def test_a_module_that_replaces_its_buffer_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = models.RMSNorm.forward

    def counted(self: Any, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return plain(self, x)

    one = model(qk_norm=False)
    for norm in (m for m in one.modules() if isinstance(m, models.RMSNorm)):
        norm.register_buffer("calls", torch.zeros(()))
    monkeypatch.setattr(models.RMSNorm, "forward", counted)
    assert swap(one, {models.RMSNorm: CPURMSNorm}, pytest.fail) == 5


@pytest.mark.parametrize("in_place", [True, False])
def test_a_comparison_is_not_counted_in_a_buffer(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = models.RMSNorm.forward, list[float]()

    def counted(self: Any, x: Tensor) -> Tensor:
        if in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        seen.append(float(self.calls))
        return plain(self, x)

    one = model(qk_norm=False).train()
    norms = [m for m in one.modules() if isinstance(m, models.RMSNorm)]
    for norm in norms:
        norm.register_buffer("calls", torch.zeros(()))
    before = [norm.calls for norm in norms]
    monkeypatch.setattr(models.RMSNorm, "forward", counted)
    assert swap(one, {models.RMSNorm: CPURMSNorm}, pytest.fail) == 5
    assert len(seen) > 5 and set(seen) == {1.0}
    for norm, buffer in zip(norms, before, strict=True):
        assert norm.calls is buffer and not buffer


def test_a_replacement_that_raises_is_left_out() -> None:
    class Broken(models.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no\nkernel")

    one, said = model(), list[str]()
    assert swap(one, {models.RMSNorm: Broken}, said.append) == 0
    assert said == ["RMSNorm: Broken fails (RuntimeError: no kernel); using core/model.py's RMSNorm"]


def test_dropout_and_attention_are_chosen_by_dtype_and_dropout() -> None:
    assert cpu_replacements(model(), False, False)[0].get(models.Attention) is None
    assert cpu_replacements(model(dropout=0.1), False, False)[0][models.Attention] is CPUAttention
    for length, chosen in ((128, None), (256, CPUAttention)):  # of documents
        assert cpu_replacements(model(block_size=length), False, False, True)[0].get(models.Attention) is chosen
    assert cpu_replacements(model(), True, False)[0][nn.Dropout] is CPUDropout


def test_a_loss_without_logits_is_compared_by_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model(logit_softcap=3.0)
    assert swap(one, {NextTokenLoss: ChunkedLoss}, pytest.fail) == 1
