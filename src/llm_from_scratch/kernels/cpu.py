"""Operations as a CPU does them fastest, each equal to the plain one in core/model.py but for rounding.

In eager mode a small model's time goes into many small kernels and into autograd's bookkeeping for them; and torch's
fused attention is slow backwards in bfloat16 on a CPU, and has no dropout there. Each operation here is one node of
autograd, with its gradient written out. Shapes in comments as in core/model.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import model as models

QUERIES = 64  # multiplied at once with the keys up to the last of them: the rest above the diagonal is never computed
SHORT = 128  # tokens up to which the compiler's attention is the faster one
WEIGHTS = 1 << 20  # attention weights computed at once: few enough for the processor's cache


def use_cpu_kernels(model: models.GPT, in_bfloat16: bool, compiled: bool = False) -> None:
    """Gives the model's parts the operations of this file, where they are the faster ones.

    compiled: the blocks are compiled, which fuses all but the attention as well or better; and that too where it is
    short.
    """
    for name, module in model.named_modules():
        is_fused = compiled and name.startswith("transformer.h.")
        if isinstance(module, models.CausalSelfAttention):
            module.attend = models.attention  # not that of a try to compile
            if is_fused and module.dropout == 0 and model.config.block_size <= SHORT:
                module.attend = models.plain_attention
            elif in_bfloat16 or module.dropout > 0:
                module.attend = torch.compiler.disable(attention) if is_fused else attention
            module.rotate = models.apply_rotary if is_fused else Rotate.apply
        elif isinstance(module, (models.RMSNorm, torch.nn.Dropout)):
            ours = _rms_norm if isinstance(module, models.RMSNorm) else _dropout
            # an attribute shadows a method: state-dict keys stay, and the model has no branch for it
            vars(module).pop("forward", None)
            if not is_fused:
                module.forward = functools.partial(ours, module)  # type: ignore[method-assign]


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return RMSNormalize.apply(x, module.weight, module.eps)


def _dropout(module: Any, x: Tensor) -> Tensor:
    return dropout(x, module.p) if module.training and module.p else x


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout in training, several times as fast. Draws one number from torch's global generator."""
    mask, scale = keep_mask(x.shape, p, x.dtype)
    return x * mask.mul_(scale)


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(ones, with zeros in a share p of the places; the factor that keeps the mean of what is masked).

    p is rounded to a multiple of 1 / 65,536. torch draws masks on one core, a number for each place; here its
    generator seeds numpy's SFC64, of whose numbers each serves four places.
    """
    count = math.prod(shape)
    seed = int(torch.randint(1 << 62, ()))
    noise = np.random.Generator(np.random.SFC64(seed)).integers(0, 1 << 64, -(-count // 4), dtype=np.uint64)
    values = torch.from_numpy(noise.view(np.int16)[:count]).view(shape)
    dropped = min(round(p * 65536), 65535)
    mask = torch.empty(shape, dtype=dtype)
    torch.ge(values, dropped - 32768, out=mask)
    return mask, 65536 / (65536 - dropped)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, keep: bool = True
) -> Tensor:
    """model.plain_attention; by torch's kernel where there is no gradient, or a mask of the cache. keep: the weights,
    which are else computed again for the gradient."""
    if causal and torch.is_grad_enabled():
        return CausalAttention.apply(q, k, v, dropout, keep)
    return models.fused_attention(q, k, v, mask, dropout, causal)


lean_attention = functools.partial(attention, keep=False)


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v, where a token sees itself and what is left of it.

    q: (B, H, T, D); k, v: (B, Hkv, T, D) with Hkv dividing H.

    Goes over a few sequences at a time, and in them over blocks of queries with the keys that one of them sees. The
    attention weights are kept for the backward pass in q's dtype (keep, which dropout implies) or computed again there.
    A weight that dropout removes is kept with its sign turned, so that weight and mask are one tensor.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float, keep: bool) -> Tensor:
        B, H, T, D = q.shape
        y = torch.empty(B, T, H, D, dtype=q.dtype).transpose(1, 2)  # the next product wants the heads side by side
        weights, scale = [], 1.0
        for rows in _rows(B, H, T):
            qr, kr, vr = _heads(q[rows]), _heads(k[rows], H), _heads(v[rows], H)  # (b H, T, D)
            out = torch.empty_like(qr)
            for at, end in _blocks(T):
                used = p = _weights(qr, kr, at, end)
                if dropout:
                    mask, scale = keep_mask(p.shape, dropout, p.dtype)
                    used = p * mask
                    p = torch.mul(p, mask.mul_(2).sub_(1), out=mask)
                weights += [p] if keep or dropout else []
                out[:, at:end] = torch.bmm(used, vr[:, :end])
            y[rows] = out.view(-1, H, T, D)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.dropout, ctx.scale = dropout, scale
        return y.mul_(scale) if dropout else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *weights = ctx.saved_tensors
        (B, H, T, D), (dy,) = q.shape, grads
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        saved = iter(weights)
        for rows in _rows(B, H, T):
            qr, kr, vr, dr = _heads(q[rows]), _heads(k[rows], H), _heads(v[rows], H), _heads(dy[rows])
            if ctx.dropout:
                dr = dr * ctx.scale
            dqr, dkr, dvr = torch.empty_like(qr), torch.zeros_like(kr), torch.zeros_like(vr)
            for at, end in _blocks(T):
                p, dout = next(saved) if weights else _weights(qr, kr, at, end), dr[:, at:end]
                dp = torch.bmm(dout, vr[:, :end].transpose(1, 2))
                used = p
                if ctx.dropout:
                    used = p.relu()
                    dp = torch.ops.aten.threshold_backward(dp, p, 0)  # zero where the weight was removed
                    p = p.abs()
                dvr[:, :end] += torch.bmm(used.transpose(1, 2), dout)
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(1 / math.sqrt(D))
                dqr[:, at:end] = torch.bmm(ds, kr[:, :end])
                dkr[:, :end] += torch.bmm(ds.transpose(1, 2), qr[:, at:end])
            dq[rows] = dqr.view(-1, H, T, D)
            dk[rows] = _summed(dkr, k.size(1), H)
            dv[rows] = _summed(dvr, k.size(1), H)
        return dq, dk, dv, None, None


def _weights(q: Tensor, k: Tensor, at: int, end: int) -> Tensor:
    """Attention weights of the queries at to end: (b H, T, D) each to (b H, end - at, end)."""
    scores = torch.bmm(q[:, at:end], k[:, :end].transpose(1, 2)).mul_(1 / math.sqrt(q.size(-1)))
    scores[:, :, at:].add_(_future(end - at, scores.dtype))
    return scores.softmax(dim=-1)


def _rows(B: int, H: int, T: int) -> Iterator[slice]:
    """Sequences of the batch, a few at a time."""
    size = max(1, WEIGHTS // (H * min(T, QUERIES) * T))
    return (slice(at, min(B, at + size)) for at in range(0, B, size))


def _blocks(T: int) -> Iterator[tuple[int, int]]:
    return ((at, min(T, at + QUERIES)) for at in range(0, T, QUERIES))


def _heads(t: Tensor, H: int | None = None) -> Tensor:
    """(b, h, T, D) to (b H, T, D), contiguous; fewer key heads are repeated."""
    if H is not None and t.size(1) < H:
        t = t.repeat_interleave(H // t.size(1), dim=1)
    return t.reshape(-1, t.size(2), t.size(3))


def _summed(t: Tensor, h: int, H: int) -> Tensor:
    """The gradient of what _heads() repeated: (b H, T, D) to (b, h, T, D)."""
    t = t.view(-1, h, H // h, t.size(1), t.size(2))
    return t.sum(2) if h < H else t.squeeze(2)


@functools.cache
def _future(size: int, dtype: torch.dtype) -> Tensor:
    """-inf above the diagonal, (size, size)."""
    return torch.full((size, size), -math.inf, dtype=dtype).triu(1)


class Rotate(torch.autograd.Function):
    """model.apply_rotary. x: (B, H, T, D); cos, sin: (..., 1, T, D/2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    # with the heads side by side, as the product left them, rows are long, and halves are exchanged by one copy
    x, half = x.transpose(1, 2), x.size(-1) // 2  # (B, T, H, D)
    cos, sin = torch.cat((cos, cos), dim=-1).transpose(-2, -3), torch.cat((-sin, sin), dim=-1).transpose(-2, -3)
    exchanged = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.mul(x, cos).addcmul_(exchanged, sin, value=sign).transpose(1, 2)


class RMSNormalize(torch.autograd.Function):
    """F.rms_norm over the last dimension. x: (..., C); weight: (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # (..., 1)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dy, scaled = grads[0], x * scale  # (..., C)
        dweight = (dy * scaled).flatten(0, -2).sum(0, dtype=weight.dtype)
        g = dy * weight.to(x.dtype)
        along = torch.linalg.vecdot(g, scaled).unsqueeze(-1).div_(-x.size(-1))  # (..., 1)
        return scaled.mul_(along).add_(g).mul_(scale), dweight, None
