"""Linear layers with float8 matrix products in training. The weights keep their dtype, usually float32.

Each operand of a product is divided by its own scale, which maps its largest element to the largest number of the
format: e4m3 (4 exponent bits, 3 mantissa bits, up to 448) for activations and weights, e5m2 (up to 57,344) for the
output gradients, which have a wider range (FP8 formats, arXiv 2209.05433). The scale is computed for each product
("tensorwise, dynamic"), so there is no state between steps. torch._scaled_mm sums in float32. Tensors stored for the
backward pass are float8 too: half the bytes of bfloat16.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..core.model import GPT, Linear
from ..errors import UserError
from .once import differentiable_once

MULTIPLE = 16  # both dimensions of a product's second operand must be divisible by it
CAPABILITY = (8, 9)  # compute capability from which CUDA devices multiply float8: Ada, Hopper
LEAST = 1e-12  # of the largest element, so that zeros have a scale too


def refuse_unfit(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError if fp8 was requested and the machine or dtype does not support it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"--fp8=True needs a CUDA device of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or higher (Ada, "
            f"Hopper), but the device is {device}; remove --fp8"
        )
    if dtype != torch.bfloat16:
        raise UserError(f"--fp8=True needs --dtype=bfloat16, got {str(dtype).removeprefix('torch.')}")


def float8_replacements(model: GPT) -> tuple[dict[type, type], list[nn.Module]]:
    """The replacements for kernels.swap, {class: replacement}, and the linear layers that stay unchanged: outside
    the blocks, or with unsupported dimensions. Raises UserError if no layer is supported."""
    blocks = [m for m in model.transformer.h.modules() if type(m) is Linear]
    fit = {m for m in blocks if not (m.in_features % MULTIPLE or m.out_features % MULTIPLE)}
    if not fit:
        raise UserError(f"--fp8=True: no layer has dimensions divisible by {MULTIPLE}; choose an --n_embd that is")
    return {Linear: Float8Linear}, [m for m in model.modules() if type(m) is Linear and m not in fit]


class Float8Linear(Linear):
    """A linear layer with float8 products in training. Without gradients (evaluation, samples) it computes in its usual
    precision, so evaluation measures the saved model."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))  # (N, I)
        if not torch.is_grad_enabled() or rows.size(0) % MULTIPLE:  # the rows are a side of the weight's gradient
            return super().forward(x)
        return self._finish(Float8Product.apply(rows, self.weight), x)

    def exact(self, x: Tensor) -> Tensor:
        """forward without rounding to float8, for the comparison in kernels.swap."""
        return self._finish(x.reshape(-1, x.size(-1)) @ self.weight.to(x.dtype).t(), x)

    def _finish(self, rows: Tensor, x: Tensor) -> Tensor:
        y = rows.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Float8Product(torch.autograd.Function):
    """x @ weight.T in float8, and both products of its gradient too. x: (N, I); weight: (O, I). Returns x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = quantized(x, torch.float8_e4m3fn)
        w8, w_scale = quantized(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = (x.dtype, weight.dtype)
        return _product(x8, w8.t(), x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        g8, g_scale = quantized(grads[0], torch.float8_e5m2)
        # the hardware needs contiguous rows of the first operand and contiguous columns of the second
        dx = _product(g8, w8.t().contiguous().t(), g_scale, w_scale, x_dtype)
        dw = _product(g8.t().contiguous(), x8.t().contiguous().t(), g_scale, x_scale, x_dtype)
        return dx, dw.to(w_dtype)


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in a float8 dtype, and the scale (0-dim, float32). If x is not finite, the products are NaN."""
    top = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=LEAST) / top
    # rounding errors may lift the quotient above the largest number; the conversion rounds it down
    return (x.float() / scale).to(dtype).contiguous(), scale


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a @ b times both scales. fast: sums with fewer bits on some devices, usual for the forward pass only."""
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)
