"""A block for training in float32 on a CPU, in few nodes of autograd: norm and product; attention; product; the whole
MLP. Between the products, each is one pass over the numbers in C (passes.c, layers.c).

Outputs of norms and activations are computed again in the backward pass instead of stored. Where a part of the block
is not one of core/model.py's, or has hooks, core/model.py's Block runs.
Shapes: N rows, C width.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..core.model import (
    GPT,
    MLP,
    Attention,
    Block,
    CausalSelfAttention,
    GatedMLP,
    LayerNorm,
    LearnedPositions,
    Linear,
    NextTokenLoss,
    RMSNorm,
)
from ..machine.memory import empty, empty_like
from .cpu import drop_noise
from .layers import (
    LONGEST,
    REPLACEMENTS,
    WHOLE,
    CompiledAttention,
    CompiledLoss,
    Dropped,
    activated,
    activation_gradients,
    attend,
    attention_gradients,
    code_of,
    dropped,
    fits,
    norm_gradients,
    normalized,
)  # fmt: skip
from .once import differentiable_once
from .products import PLAIN, TORCH, CPULinear, multiply


def layer_replacements(model: GPT, documents: bool) -> dict[type, type]:
    """The replacements for kernels.swap of the model's layers that are faster in C. documents: rows are shared by
    documents, so that attention has a mask."""
    kinds = {type(m) for m in model.modules() if not isinstance(m, nn.Dropout) or m.p}
    if documents or model.config.block_size > LONGEST or model.config.head_width % WHOLE:
        kinds.discard(Attention)
    # a block with other parts, such as adapters, stores less as modules (kernels/recompute.py)
    if documents or not all(map(_is_whole, model.transformer.h)):
        kinds.discard(Block)
    found = REPLACEMENTS | {Block: CompiledBlock}
    return {kind: replacement for kind, replacement in found.items() if kind in kinds}


def layers_in_c(model: nn.Module) -> list[str]:
    """The names of core/model.py's layers that run in C."""
    kinds = REPLACEMENTS | {Block: CompiledBlock, NextTokenLoss: CompiledLoss}
    return [kind.__name__ for kind, c in kinds.items() if any(isinstance(m, c) for m in model.modules())]


class Normed(NamedTuple):
    """A norm's settings."""

    eps: float
    centred: bool


class CompiledBlock(Block):
    compared_in_training = True  # by swap
    _plan: _Plan | None = None

    def forward(self, x: Tensor, where: tuple[Tensor, ...] = (), cache: Any = None) -> Tensor:
        parts = [part for owner in (self, self.attn, self.mlp) for part in owner.children()]
        plan = self._plan
        if plan is None or plan.parts != parts or plan.kinds != [type(part) for part in parts]:
            plan = self._plan = _Plan(self, parts)
        if x.dim() != 3 or not fits(x) or any(plan.hooks) or x.shape[2:] != self.ln_1.weight.shape:
            return super().forward(x, where, cache)
        joined = cache is None and plan.joins_attention and _are_floats(self.ln_1, self.attn.c_attn)
        x = self._attended(plan, x, where) if joined else x + self.attn(self.ln_1(x), where, cache)
        if not plan.layers or not _are_floats(self.ln_2, *plan.layers):
            return x + self.mlp(self.ln_2(x))
        libraries = [_libraries(layer) for layer in plan.layers]
        weights = [weight for layer in (self.ln_2, *plan.layers) for weight in _weights(layer)]
        return _WholeMLP.apply(x, _settings(self.ln_2), plan.code, libraries, _rate(self.mlp.dropout), *weights)

    def _attended(self, plan: _Plan, x: Tensor, where: tuple[Tensor, ...]) -> Tensor:
        attn, (B, T, _) = self.attn, x.shape
        product, heads = attn.c_attn, (attn.n_head, attn.n_kv_head, attn.n_kv_head)
        settings = _settings(self.ln_1), _libraries(product)
        qkv, x = _NormProduct.apply(x, *settings, *_weights(self.ln_1), *_weights(product))
        qkv = qkv.view(B, T, -1, attn.head_dim)  # (B, T, H + 2 Hkv, D)
        if plan.attends_in_place:
            y = _Attention.apply(qkv, heads, attn.attend.dropout if self.training else 0.0)
        else:
            q, k, v = (t.transpose(1, 2) for t in qkv.split(heads, dim=2))
            q, k = attn.positions(attn.q_norm(q), attn.k_norm(k), *where)
            y = attn.attend(q, k, v, None, T > 1).transpose(1, 2)
        y, last = y.reshape(B, T, -1), attn.c_proj
        simple = plan.ends_plainly and _libraries(last) == PLAIN and last.weight.dtype == torch.float32
        if simple and last.bias is None and not _rate(attn.resid_dropout):
            return torch.addmm(x.flatten(0, -2), y.flatten(0, -2), last.weight.t()).view(x.shape)
        return x + attn.resid_dropout(last(y))


class _Plan:
    """Which parts of a block are core/model.py's and fit the C code. Made again if its modules or their classes
    change."""

    def __init__(self, block: Block, parts: list[Any]):
        self.parts, self.kinds, attn, mlp = parts, [type(part) for part in parts], block.attn, block.mlp
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        inner = itertools.islice(block.modules(), 1, None)
        self.hooks = [getattr(module, name) for module in inner for name in names]  # of each module, filled later
        norms = [isinstance(norm, (LayerNorm, RMSNorm)) for norm in (block.ln_1, block.ln_2)]
        self.joins_attention = type(attn) is CausalSelfAttention and norms[0] and _is_linear(attn.c_attn)
        self.attends_in_place = self.ends_plainly = False
        if self.joins_attention:
            unchanged = (
                type(attn.positions) is LearnedPositions and type(attn.q_norm) is type(attn.k_norm) is nn.Identity
            )
            self.attends_in_place = unchanged and isinstance(attn.attend, CompiledAttention)
            self.ends_plainly = _is_linear(attn.c_proj)
        self.layers: list[Any] = []
        self.code = code_of(mlp.act) if type(mlp) in (MLP, GatedMLP) and norms[1] else None
        if self.code is not None:
            layers = [*([mlp.c_gate] if isinstance(mlp, GatedMLP) else []), mlp.c_fc, mlp.c_proj]
            self.layers = layers if all(map(_is_linear, layers)) and not mlp.c_fc.out_features % WHOLE else []
        self.is_whole = self.joins_attention and bool(self.layers)


def _is_whole(block: Any) -> bool:
    try:
        return _Plan(block, []).is_whole
    except AttributeError:  # an edited block may lack any of the parts
        return False


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) in (Linear, CPULinear)


def _are_floats(*layers: Any) -> bool:
    """Whether the weights are as the C code reads them."""
    for layer in layers:
        weight = layer.weight
        if weight.dtype != torch.float32 or not weight.is_contiguous() or not weight.is_cpu:
            return False
    return True


def _libraries(layer: nn.Module) -> str:
    return getattr(layer, "libraries", PLAIN)


def _weights(layer: Any) -> tuple[Tensor, Tensor | None]:
    return layer.weight, getattr(layer, "bias", None)


def _settings(norm: Any) -> Normed:
    return Normed(norm.eps, isinstance(norm, LayerNorm))


def _rate(dropout: Any) -> float:
    return dropout.p if dropout.training else 0.0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, library: str) -> Tensor:
    """x @ weight.T + bias. x: (N, inputs)."""
    if library != TORCH:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    y = empty((len(x), len(weight)), x.dtype)
    return torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)


def _back(dy: Tensor, weight: Tensor, library: str) -> Tensor:
    """The gradient of a product's input."""
    return multiply(dy, weight, library, empty((len(dy), weight.size(1)), dy.dtype))


class _NormProduct(torch.autograd.Function):
    """(product(norm(x)), x). That x is a result too makes its gradient one sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: Normed, libraries: str, gain: Tensor, shift: Tensor | None, weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h, stats = normalized(x.view(-1, x.size(-1)), gain, shift, *settings)
        ctx.save_for_backward(x, gain, shift, weight, bias, stats)
        ctx.settings, ctx.libraries = settings, libraries
        return _product(h, weight, bias, libraries[0]).view(*x.shape[:-1], -1), x

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, gain, shift, weight, bias, stats = ctx.saved_tensors
        dy, rows = grads[0].reshape(-1, len(weight)).contiguous(), x.view(-1, x.size(-1))
        h, _ = normalized(rows, gain, shift, ctx.settings.eps, ctx.settings.centred, stats)
        dw = multiply(dy.t(), h, ctx.libraries[2]) if ctx.needs_input_grad[5] else None
        dh = _back(dy, weight, ctx.libraries[1])
        dx, *of_norm = norm_gradients(rows, gain, shift, stats, ctx.settings.centred, dh, grads[1].contiguous())
        return dx.view(x.shape), None, None, *of_norm, dw, None if bias is None else dy.sum(0)


class _Attention(torch.autograd.Function):
    """CompiledAttention of (B, T, H + 2 Hkv, D), whose gradient is one tensor too. Returns (B, T, H, D)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: tuple[int, int, int], dropout: float) -> Tensor:
        q, k, v = qkv.transpose(1, 2).split(heads, dim=1)
        found = Dropped.drawn(q, dropout)
        y, norms = attend(q, k, v, found)
        ctx.save_for_backward(qkv, norms, *(found.noise if found else []))
        ctx.heads, ctx.dropped = heads, found and Dropped([], *found[1:])
        return y.transpose(1, 2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        qkv, norms, *noise = ctx.saved_tensors
        gradients, left_out = empty_like(qkv), ctx.dropped and Dropped(noise, *ctx.dropped[1:])
        views = (t.transpose(1, 2).split(ctx.heads, dim=1) for t in (qkv, gradients))
        attention_gradients(norms, left_out, grads[0].transpose(1, 2), *views)
        return gradients, None, None


class _WholeMLP(torch.autograd.Function):
    """x + dropout(product(activation(products(norm(x)))))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: Normed, code: int, libraries: list[str], rate: float, gain: Tensor,
        shift: Tensor | None, *weights: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows, layers = x.view(-1, x.size(-1)), _pairs(weights)
        h, stats = normalized(rows, gain, shift, *settings)
        inner = [_product(h, w, b, library[0]) for (w, b), library in zip(layers[:-1], libraries, strict=False)]
        act, (weight, bias), library = activated(code, *inner), layers[-1], libraries[-1]
        del h
        noise = drop_noise(x.numel()) if rate else None
        if noise is not None:
            y = dropped(_product(act, weight, bias, library[0]), noise, rate, rows)
        elif library[0] == TORCH:
            y = torch.addmm(rows, act, weight.t(), out=empty_like(rows))
            y = y if bias is None else y.add_(bias)
        else:
            y = _product(act, weight, bias, library[0]).add_(rows)
        ctx.save_for_backward(x, gain, shift, stats, noise, *inner, *weights)
        ctx.settings, ctx.code, ctx.libraries, ctx.rate = settings, code, libraries, rate
        return y.view(x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, gain, shift, stats, noise, *rest = ctx.saved_tensors
        count, rows, dy = len(ctx.libraries) - 1, x.view(-1, x.size(-1)), grads[0].contiguous().view(-1, x.size(-1))
        inner, layers, libraries = rest[:count], _pairs(rest[count:]), ctx.libraries
        needed = _pairs(ctx.needs_input_grad[7:])
        dz = dy if noise is None else dropped(dy, noise, ctx.rate)
        dact = _back(dz, layers[-1][0], libraries[-1][1])
        act, dinner = empty_like(dact), [dact, *(empty_like(t) for t in inner[1:])]
        activation_gradients(ctx.code, inner, dact, dinner, act)
        last = _weight_gradients(dz, act, libraries[-1], needed[-1])
        del act, dz
        h, _ = normalized(rows, gain, shift, ctx.settings.eps, ctx.settings.centred, stats)
        found, dh = list[Any](), None
        for (weight, _), d, library, wanted in zip(layers[:-1], dinner, libraries, needed, strict=False):
            found += _weight_gradients(d, h, library, wanted)
            one = _back(d, weight, library[1])
            dh = one if dh is None else dh.add_(one)
        assert dh is not None
        dx, *of_norm = norm_gradients(rows, gain, shift, stats, ctx.settings.centred, dh, dy)
        return dx.view(x.shape), *[None] * 4, *of_norm, *found, *last


def _pairs(values: Any) -> list[Any]:
    """Of a list: weight and bias of each layer."""
    return list(zip(values[::2], values[1::2], strict=True))


def _weight_gradients(dy: Tensor, x: Tensor, library: str, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
    return multiply(dy.t(), x, library[2]) if wanted[0] else None, dy.sum(0) if wanted[1] else None
