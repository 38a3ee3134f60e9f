"""The library of each float32 product of a linear layer on a CPU: torch's own (MKL in its wheels), oneDNN, which is in
the same wheels, or OpenBLAS, which is in numpy's.

On AMD processors MKL uses less than all of AVX2. There OpenBLAS takes 0.9 of its time, not enough to be found by timing
a few products, so it is always used; with AVX-512 oneDNN is up to twice as fast. On Intel's they are even. So elsewhere
the products of each shape are timed once, at the start of a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.model import GPT, Head, Linear
from . import blas
from .once import differentiable_once

TORCH, ONEDNN, OPENBLAS = "t", "o", "b"
NAMES = {ONEDNN: "oneDNN", OPENBLAS: "OpenBLAS"}
PLAIN, ALL_ONEDNN = TORCH * 3, ONEDNN * 3  # of the output, of the input's gradient, of the weight's gradient
LEAST = 1 << 22  # multiplications of a model's largest product below which nothing is measured
ROWS, SIZE, ROUNDS = 512, 1 << 28, 3  # of a probe: rows, multiplications of a product, repetitions
MARGIN = 0.85  # of torch's time: a choice must not depend on noise


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_here(library: str) -> bool:
    """Whether this machine has a library of NAMES."""
    return has_onednn() if library == ONEDNN else blas.has_openblas()


def multiply(a: Tensor, b: Tensor, library: str, out: Tensor | None = None) -> Tensor:
    """a @ b for matrices, which may be transposed views. out: memory for the result, which oneDNN does not use."""
    if library == OPENBLAS and blas.fits(a, b):
        return blas.multiply(a, b, out)
    if library != ONEDNN:
        return torch.mm(a, b, out=out)
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def add_product(total: Tensor, a: Tensor, b: Tensor, library: str) -> Tensor:
    """total + a @ b, in total's memory, by torch or OpenBLAS."""
    if library == OPENBLAS and blas.fits(a, b) and total.is_contiguous():
        return blas.multiply(a, b, total, add=True)
    return total.addmm_(a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, library: str) -> Tensor:
    """x @ weight.T + bias. x: (..., inputs); weight: (outputs, inputs)."""
    if library == ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    rows = x.flatten(0, -2)
    if library == TORCH or not blas.fits(rows, weight.t()):
        return F.linear(x, weight, bias)
    y = x.new_empty(len(rows), len(weight))
    if bias is not None:
        y.copy_(bias)
    return blas.multiply(rows, weight.t(), y, add=bias is not None).view(*x.shape[:-1], len(weight))


class CPULinear(Linear):
    """Linear with a library for each of its three float32 products."""

    libraries = ALL_ONEDNN  # or those of set_libraries(); swap refuses less than float32's precision

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or self.weight.dtype != x.dtype or self.libraries == PLAIN:
            return super().forward(x)
        return _LinearProduct.apply(x, self.weight, self.bias, self.libraries)


class CPUHead(Head, CPULinear):
    """Head with the same."""


class _LinearProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, libraries: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.libraries = libraries
        return linear(x, weight, bias, libraries[0])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy, (for_x, for_weight, for_bias, _) = grads[0].flatten(0, -2), ctx.needs_input_grad
        dx = multiply(dy, weight, ctx.libraries[1]).view(x.shape) if for_x else None
        dw = multiply(dy.t(), x.flatten(0, -2), ctx.libraries[2]) if for_weight else None
        return dx, dw, dy.sum(0) if for_bias else None, None


def name_of(layer: Linear) -> str:
    return f"{layer.in_features}x{layer.out_features}"


def fastest_libraries(model: GPT, rows: int, compiled: bool) -> dict[str, str]:
    """{"INPUTSxOUTPUTS": a library for each product}: OpenBLAS where it is always faster, else measured on this many
    rows in milliseconds; empty if torch's own is the best for the largest layer. compiled: the compiled kernels, which
    OpenBLAS needs, may be built."""
    layers = sorted((m for m in model.modules() if isinstance(m, Linear)), key=lambda m: m.weight.numel())
    if rows * layers[-1].weight.numel() < LEAST:
        return {}
    if compiled and blas.is_fastest_here():
        return {name_of(layer): OPENBLAS * 3 for layer in layers}
    if not has_onednn():
        return {}
    found: dict[str, str] = {}
    for layer in reversed(layers):
        if (name := name_of(layer)) not in found:
            found[name] = _fastest(layer.in_features, layer.out_features, min(rows, ROWS))
        if found[name] == PLAIN and len(found) == 1:
            return {}
    return found


@torch.no_grad()
def _fastest(inputs: int, outputs: int, rows: int) -> str:
    # a head is probed with a part of its vocabulary, but with too few outputs another library would be the fastest
    outputs = max(1, min(outputs, SIZE // (rows * inputs)))
    x, w, dy = (torch.full(shape, 0.5) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    return "".join(
        ONEDNN if relative_time(a, b, ONEDNN, TORCH) < MARGIN else TORCH for a, b in ((x, w.t()), (dy, w), (dy.t(), x))
    )


def relative_time(a: Tensor, b: Tensor, library: str, other: str) -> float:
    """The processor time of a product by one library, in units of its time by another one."""
    times: dict[str, list[float]] = {library: [], other: []}
    for _ in range(1 + ROUNDS):  # interleaved; the first ones prepare the libraries
        for one, measured in times.items():
            begin = time.process_time()
            multiply(a, b, one)
            measured.append(time.process_time() - begin)
    return min(times[library][1:]) / min(times[other][1:])


def set_libraries(model: GPT, chosen: dict[str, str]) -> None:
    """Gives each linear layer its libraries, before swap() compares CPULinear with it."""
    layers: Iterator[Any] = (m for m in model.modules() if isinstance(m, Linear))
    for layer in layers:
        layer.libraries = chosen.get(name_of(layer), PLAIN)


def libraries_of(model: GPT) -> dict[str, str]:
    """The libraries of set_libraries(); empty if all products are torch's."""
    return {name_of(m): m.libraries for m in model.modules() if isinstance(m, CPULinear)}


def checked_libraries(saved: Any) -> dict[str, str] | None:
    """A choice as a checkpoint has it; None if it is not one, or if this machine lacks one of its libraries."""
    if not isinstance(saved, dict):
        return None
    good = all(isinstance(v, str) and len(v) == 3 and set(v) <= {TORCH, *NAMES} for v in saved.values())
    if not good or not all(is_here(one) for one in set("".join(saved.values())) - {TORCH}):
        return None
    return {str(name): v for name, v in saved.items()}
