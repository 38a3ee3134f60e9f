"""Layers for training in float32 on a CPU, forward and backward in C (layers.c, passes.c): activations, RMSNorm,
rotations, attention, dropout, and the loss of a large vocabulary.

Each equals the module of core/model.py that it replaces, except for rounding. Where the C code does not fit, the
replaced module's own forward runs: in inference mode too, because decoding records torch's operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..core.model import GPT, Attention, Head, NextTokenLoss, ReLUSquared, RMSNorm, RotaryPositions, SwiGLU
from ..machine.memory import empty, empty_like
from .compiled import Kernel, load_kernel
from .cpu import (
    CausalAttention,
    CPUDropout,
    CPUReLUSquared,
    CPURMSNorm,
    CPURotaryPositions,
    CPUSwiGLU,
    drop_noise,
    drop_threshold,
    few_rows,
    query_blocks,
)  # fmt: skip
from .cross_entropy import ChunkedLoss, CPULogitPasses
from .once import differentiable_once

WHOLE = 16  # the length of a row is a multiple of it
ACTIVATIONS = {"gelu_tanh": 0, "swiglu": 2, "relu2": 4, "gelu": 6}  # of passes.c; the gradient has the next number
LONGEST = 512  # tokens of a row up to which attention is faster than torch's


def layer_replacements(model: GPT, documents: bool) -> dict[type, type]:
    """The replacements for kernels.swap of the model's layers that are faster in C. documents: rows are shared by
    documents, so that attention has a mask."""
    kinds = {type(m) for m in model.modules() if not isinstance(m, nn.Dropout) or m.p}
    if documents or model.config.block_size > LONGEST or model.config.head_width % WHOLE:
        kinds.discard(Attention)
    return {kind: replacement for kind, replacement in REPLACEMENTS.items() if kind in kinds}


def layers_in_c(model: nn.Module) -> list[str]:
    """The names of core/model.py's layers that run in C."""
    kinds = REPLACEMENTS | {NextTokenLoss: CompiledLoss}
    return [kind.__name__ for kind, c in kinds.items() if any(isinstance(m, c) for m in model.modules())]


def _kernel() -> Kernel:
    kernel = load_kernel()
    assert isinstance(kernel, Kernel)
    return kernel


def _fits(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() for t in tensors) and _are_rows(*tensors)


def _are_rows(*tensors: Tensor) -> bool:
    """Whether the C code can read them: float32 on a CPU, rows of whole vectors. None in inference mode or autocast."""
    for t in tensors:
        if t.dtype != torch.float32 or not t.is_cpu or not t.numel() or not t.dim():
            return False
        if t.stride(-1) != 1 or t.size(-1) % WHOLE:
            return False
    return not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


class CompiledGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        code = ACTIVATIONS["gelu_tanh" if self.approximate == "tanh" else "gelu"]
        return _Activation.apply(code, x) if _fits(x) else super().forward(x)


class CompiledSwiGLU(CPUSwiGLU):
    def forward(self, gate: Tensor, x: Tensor) -> Tensor:
        fit = _fits(gate, x) and gate.shape == x.shape
        return _Activation.apply(ACTIVATIONS["swiglu"], gate, x) if fit else super().forward(gate, x)


class CompiledReLUSquared(CPUReLUSquared):
    def forward(self, x: Tensor) -> Tensor:
        return _Activation.apply(ACTIVATIONS["relu2"], x) if _fits(x) else super().forward(x)


class CompiledRMSNorm(CPURMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if _are_rows(x, self.weight) and self.weight.shape == x.shape[-1:]:
            if x.is_contiguous():
                return _Normalize.apply(x, self.weight, self.eps)
            side_by_side = x.dim() == 4 and x.stride(1) == x.size(3) and x.stride(0) == x.size(2) * x.stride(2)
            if side_by_side:  # the heads of a fused projection
                return _Normalize.apply(x.transpose(1, 2), self.weight, self.eps).transpose(1, 2)
        return super().forward(x)


class CompiledDropout(CPUDropout):
    """The same masks in one pass that stores 2 bytes a number."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p and _fits(x)):
            return super().forward(x)
        return _Drop.apply(x, self.p)


class CompiledAttention(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        fit = causal and mask is None and _are_rows(q, k, v)
        fit = fit and q.dim() == k.dim() == 4 and k.shape == v.shape and q.size(2) <= LONGEST
        if fit and len(q) == len(k) and q.shape[2:] == k.shape[2:] and q.size(1) % k.size(1) == 0:
            return _CausalAttention.apply(q, k, v, dropout)
        if dropout and torch.is_grad_enabled() and causal:
            return CausalAttention.apply(q, k, v, dropout, False, mask)
        return super().forward(q, k, v, mask, causal)


class CompiledRotaryPositions(CPURotaryPositions):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        # one row of angles per token, which all sequences share
        fit = _are_rows(q, k) and _fits(cos, sin) and q.dim() == k.dim() == 4 and q.shape[2:] == k.shape[2:]
        if not fit or not cos.shape == sin.shape == (1, q.size(2), q.size(3) // 2):
            return super().forward(q, k, cos, sin)
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


class CompiledLoss(ChunkedLoss):
    def forward(self, x: Tensor, targets: Tensor, head: Head) -> tuple[None, Tensor]:
        if (wrong := targets[(targets < -1) | (targets >= len(head.weight))]).numel():
            raise IndexError(f"Target {wrong[0].item()} is out of bounds.")  # as NextTokenLoss
        return super().forward(x, targets, head)

    def passes(self) -> type[CPULogitPasses]:
        return CompiledLogitPasses


class CompiledLogitPasses(CPULogitPasses):
    """One pass over a row of logits in the processor's cache gives its loss and its gradient."""

    def losses(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Any]:
        fit = (
            _fits(self.w, x)
            and len(self.w) % WHOLE == 0
            and ids.is_contiguous()
            and ids.shape == x.shape[:1]
            and ids.dtype == torch.int64
        )
        if self.softcap or not fit:
            return super().losses(x, ids)
        logits, kernel = self.product_of(x), _kernel()
        found, how = x.new_empty(len(x)), (self.with_gradient, kernel.has_avx512, torch.get_num_threads())
        kernel.layers.entropy(*_places(logits, ids, found), *logits.shape, *how)
        return found, logits


REPLACEMENTS: dict[type, type] = {
    Attention: CompiledAttention, RMSNorm: CompiledRMSNorm, nn.GELU: CompiledGELU, SwiGLU: CompiledSwiGLU,
    ReLUSquared: CompiledReLUSquared, RotaryPositions: CompiledRotaryPositions, nn.Dropout: CompiledDropout,
}  # fmt: skip


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, code: int, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.code = code
        y = empty_like(inputs[0])
        _pass_over(code, inputs, [y])
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # read once: a checkpointed block's tensors are there once
        gradients = [empty_like(x) for x in inputs]
        _pass_over(ctx.code + 1, (*inputs, grads[0].contiguous()), gradients)
        return None, *gradients


def _pass_over(code: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    kernel, places = _kernel(), _places(*[*inputs, None, None][:3], *[*outputs, None][:2])
    kernel.layers.activation(code, *places, inputs[0].numel(), kernel.has_avx512, torch.get_num_threads())


class _Normalize(torch.autograd.Function):
    """RMSNorm over the last dimension. x: contiguous, or (B, T, H, D) with the heads of a token side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, kernel = empty(x.shape, x.dtype), _kernel()
        scale = x.new_empty(x.numel() // x.size(-1))
        places, how = _places(x, weight, y, scale), (kernel.has_avx512, torch.get_num_threads())
        kernel.layers.normalize(*places, *_rows(x), eps, *how)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dx, dweight, dy, kernel = empty(x.shape, x.dtype), torch.empty_like(weight), grads[0].contiguous(), _kernel()
        places, how = _places(x, weight, dy, scale, dx, dweight), (kernel.has_avx512, torch.get_num_threads())
        if kernel.layers.normalize_back(*places, *_rows(x), *how):
            raise MemoryError
        return dx, dweight, None


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.p, noise = p, drop_noise(x.numel())
        ctx.save_for_backward(noise)
        return _dropped(x, noise, p)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (noise,) = ctx.saved_tensors
        return _dropped(grads[0].contiguous(), noise, ctx.p), None


def _dropped(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """x with zeros at a fraction p of the places, scaled."""
    y, kernel, (least, scale) = empty_like(x), _kernel(), drop_threshold(p)
    kernel.layers.drop(*_places(x, noise, y), x.numel(), least, scale, kernel.has_avx512, torch.get_num_threads())
    return y


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """Rows, their width, rows side by side, and the distance to the next ones: as passes.c needs them."""
    width = x.size(-1)
    return x.numel() // width, width, *((1, width) if x.is_contiguous() else (x.size(-2), x.stride(-3)))


def _places(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


class _Rotation(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_long * 14), ("sign", ctypes.c_float)]


class _Rotate(torch.autograd.Function):
    """core/model.py's apply_rotary. x: (B, H, T, D); cos, sin: (1, T, D/2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    (B, H, T, D), kernel = x.shape, _kernel()
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(B, T, H, D).transpose(1, 2)
    views = [n for t in (x, y) for n in (t.data_ptr(), *t.stride()[:3])]
    job = _Rotation((ctypes.c_long * 14)(*views, cos.data_ptr(), sin.data_ptr(), B, H, T, D), sign)
    kernel.layers.rotate(ctypes.addressof(job), kernel.has_avx512, torch.get_num_threads())
    return y


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v; a token attends to itself and earlier ones. q: (B, H, T, D); k, v: (B, Hkv, T, D).
    Stores only the norm of each query's weights, which backward computes again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        (B, H, T, D), found = q.shape, _Dropped.drawn(q, dropout)
        y = empty((B, T, H, D), q.dtype).transpose(1, 2)  # the next product needs the heads side by side
        norms = q.new_empty(B, H, T)
        _attend(norms, k.size(1), found, q, k, v, y)
        if _shares(v) and not _shares(q):  # rotated: of queries, keys and values only the values would be kept for this
            v = v.transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q, k, v, norms, *(found.noise if found else []))
        ctx.dropped = found and _Dropped([], *found[1:])
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, norms, *noise = ctx.saved_tensors
        (B, H, T, D), G, dy = q.shape, k.size(1), grads[0]
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        gradients = q.new_empty(B, T, H + 2 * G, D).transpose(1, 2).split((H, G, G), dim=1)
        _attend(norms, G, ctx.dropped and _Dropped(noise, *ctx.dropped[1:]), q, k, v, dy, *gradients)
        return *gradients, None


class _Dropped(NamedTuple):
    """Dropout of attention weights, with the draws of kernels/cpu.py's CausalAttention."""

    noise: list[Tensor]
    few: int
    """Sequences per draw."""
    least: int

    @classmethod
    def drawn(cls, q: Tensor, dropout: float) -> _Dropped | None:
        if not dropout:
            return None
        B, H, T, _ = q.shape
        rows, blocks, least = list(few_rows(B, H, T)), query_blocks(T), drop_threshold(dropout)[0]
        sizes = [(some.stop - some.start) * H * (b.queries.stop - b.queries.start) * b.keys.stop
                 for some in rows for b in blocks]  # fmt: skip
        return cls([drop_noise(size) for size in sizes], rows[0].stop, least)


def _shares(view: Tensor) -> bool:
    """Whether a view is a part of a larger tensor, which it keeps in memory."""
    return view.untyped_storage().nbytes() > view.nbytes


VIEWS = 7


def _attend(norms: Tensor, groups: int, dropped: _Dropped | None, *views: Tensor) -> None:
    kernel, (B, H, T, D) = _kernel(), views[0].shape
    numbers = [n for t in views for n in (t.data_ptr(), *t.stride()[:3])] + [0] * (4 * (VIEWS - len(views)))
    noise, few, least = dropped or ([], 0, 0)
    table = (ctypes.c_void_p * len(noise))(*_places(*noise))
    numbers += [norms.data_ptr(), B, H, groups, T, D, ctypes.addressof(table) if noise else 0, few, least, 0, 0, 0, 0]
    job = (ctypes.c_long * len(numbers))(*numbers)
    if kernel.layers.attention(ctypes.addressof(job), kernel.has_avx512, torch.get_num_threads()):
        raise MemoryError
