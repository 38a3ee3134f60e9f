"""Linear layers with a low-rank adapter, put into a model by kernels/swap.py. Their tensors: core/adapters.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..config import FinetuneConfig
from ..core.adapters import add_parameters, blocks, change, stacked
from ..core.model import GPT, Linear
from ..errors import UserError, one_line
from ..machine.device import forked_random
from ..machine.memory import empty
from .once import differentiable_once
from .products import TORCH, CPULinear, linear, multiply
from .swap import kind_of, swap

TOLERANCE = 1e-4  # of an adapted layer's output, from that of a plain layer with the merged weight
MANY_ROWS = 256  # from which merging an adapter costs less than adding its product to every row


@functools.cache
def adapted(plain: Any) -> Any:
    """The class of linear layers of this class with an adapter."""

    class Adapted(plain):
        def forward(self, x: Tensor) -> Tensor:
            return add_change(self, x, super().forward(x), self.lora_B)

        def exact(self, x: Tensor) -> Tensor:
            """forward with the adapter at zero, for the comparison in kernels.swap."""
            return add_change(self, x, super().forward(x), torch.zeros_like(self.lora_B))

    Adapted.__name__ = Adapted.__qualname__ = f"Adapted{plain.__name__}"
    return Adapted


@functools.cache
def cpu_adapted() -> Any:
    """adapted(Linear) for a CPU: many rows are multiplied by the merged weight, which saves passes over them."""
    base: Any = adapted(CPULinear)

    class CPUAdapted(base):
        def forward(self, x: Tensor) -> Tensor:
            is_dropped = self.training and self.lora_dropout.p
            if is_dropped or x.dtype != torch.float32 or self.weight.dtype != x.dtype:  # bfloat16 would round B A away
                return super().forward(x)
            return self.product(x, self.lora_B) if x.numel() >= MANY_ROWS * x.size(-1) else super().forward(x)

        def exact(self, x: Tensor) -> Tensor:
            return self.product(x, torch.zeros_like(self.lora_B))

        def product(self, x: Tensor, b: Tensor) -> Tensor:
            numbers = self.lora_scale, stacked(self), self.libraries
            return _MergedProduct.apply(x, self.weight, self.bias, self.lora_A, b, *numbers)

    return CPUAdapted


class _MergedProduct(torch.autograd.Function):
    """x (W + scale B A)^T + bias. The merged weight is computed again for the backward pass, and B A's gradient, which
    is as large, never: A and B get theirs by products with a side as short as the rank."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
        heights: tuple[int, ...], libraries: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale, ctx.heights, ctx.libraries = scale, heights, libraries
        merged = _merged(weight, blocks(b, heights), a, scale)
        if libraries[0] != TORCH:
            return linear(x, merged, bias, libraries[0])
        rows, y = x.flatten(0, -2), empty((*x.shape[:-1], len(weight)), x.dtype)
        flat = y.view(-1, len(weight))
        torch.mm(rows, merged.t(), out=flat) if bias is None else torch.addmm(bias, rows, merged.t(), out=flat)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        for_x, for_weight, for_bias, for_a, for_b, *_ = ctx.needs_input_grad
        dy, rows, wide = grads[0].flatten(0, -2), x.flatten(0, -2), blocks(b, ctx.heights)  # (N, O), (N, I), (O, M R)
        dx = dw = da = db = None
        if for_x:
            merged = _merged(weight, wide, a, ctx.scale)
            dx = multiply(dy, merged, ctx.libraries[1], empty(rows.shape, x.dtype)).view(x.shape)
        if for_weight:
            dw = multiply(dy.t(), rows, ctx.libraries[2])
        if for_a or for_b:
            # the short side first; a product with few columns is up to four times as fast as its transpose
            da = (dy @ wide).t() @ rows * ctx.scale  # (M R, I)
            whole = (rows @ a.t()).t() @ dy * ctx.scale  # (M R, O), of which the diagonal blocks are B's
            parts = zip(whole.split(ctx.heights, dim=1), range(0, a.size(0), b.size(1)), strict=True)
            db = torch.cat([part[at : at + b.size(1)].t() for part, at in parts])
        return dx, dw, dy.sum(0) if for_bias else None, da, db, None, None, None


def _merged(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight, b, a, alpha=scale, out=empty(weight.shape, weight.dtype))


def add_change(layer: Any, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """y + scale * B A x. x: (..., I); y: (..., O)."""
    h = F.linear(layer.lora_dropout(x), layer.lora_A.to(x.dtype))  # (..., M R)
    b = blocks(b, stacked(layer)).to(h.dtype)  # (O, M R)
    flat = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.t(), alpha=layer.lora_scale)
    return flat.view(y.shape)


def attach(model: GPT, settings: FinetuneConfig, seed: int) -> None:
    """Adapts the target layers of a model with the loaded weights. B is zero: at first, the adapters change nothing.
    Raises UserError if no layer matches, or if one that does cannot be adapted."""
    if buffers := set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}:
        raise UserError(f"lora_rank does not support {min(buffers)}: a checkpoint of an adapter does not hold buffers")
    names, lines = add_parameters(model, settings, seed), list[str]()
    layers = {name: model.get_submodule(name) for name in names}
    before: dict[str, Any] = {name: type(layer) for name, layer in layers.items()}
    chosen = set(layers.values())
    others = [module for module in model.modules() if module not in chosen]
    swap(model, {kind: adapted(kind) for kind in set(before.values())}, lines.append, keep=others, lasting=True)
    reasons: dict[Any, str | None] = {}  # by kind
    for name, layer in layers.items():
        kind = kind_of(layer)
        if kind not in reasons:
            is_adapted = type(layer) is adapted(before[name])
            reasons[kind] = _why_not_merged(layer) if is_adapted else "; ".join(lines) or "the model does not call it"
        if reasons[kind]:
            raise UserError(f"--lora_rank cannot adapt {name}: {reasons[kind]}. Remove it from --lora_targets")


@torch.no_grad()
def _why_not_merged(layer: Any) -> str | None:
    """The reason, found by trying, that an adapter cannot be merged into a layer's weight; None if it can."""
    generator, device, training = torch.Generator().manual_seed(0), layer.weight.device, layer.training
    x, b = (torch.randn(*s, generator=generator).to(device) for s in ((4, layer.in_features), layer.lora_B.shape))
    weight = layer.weight + layer.lora_scale * change(layer.lora_A, b, stacked(layer))
    try:
        with forked_random(device):
            layer.eval()
            expected = functional_call(layer, {"weight": weight, "lora_B": torch.zeros_like(b)}, (x,))
            found = functional_call(layer, {"lora_B": b}, (x,))
    except Exception as error:
        return f"it fails ({type(error).__name__}: {one_line(error, 100)})"
    finally:
        layer.train(training)
    apart = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return None if apart <= TOLERANCE else f"it is not linear in its weight (relative difference {apart:.0e})"


def with_adapters(replacements: dict[type, type], eager_cpu: bool = False) -> dict[type, type]:
    """The replacements of linear layers, for layers with adapters too. eager_cpu: on a CPU, without a compiler."""
    linear: dict[Any, Any] = {plain: other for plain, other in replacements.items() if issubclass(plain, nn.Linear)}
    found = replacements | {adapted(plain): adapted(other) for plain, other in linear.items()}
    return found | {adapted(Linear): cpu_adapted()} if eager_cpu else found
