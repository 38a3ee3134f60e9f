"""How a linear layer multiplies when a model decodes: in the weights' type, from float16, or in int8."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

WIDE = 1 << 18  # elements of a matrix from which on a few rows are multiplied faster from its other side
FEW = 64  # rows up to which that holds


def has_half() -> bool:
    """Whether torch multiplies float32 rows by float16 matrices here (fbgemm)."""
    return any(engine in torch.backends.quantized.supported_engines for engine in ("fbgemm", "x86"))


def has_int8() -> bool:
    """Whether torch has products of 8-bit integers here."""
    return torch.backends.quantized.engine != "none"


class Dense:
    """x @ weight.T + bias (+ add). weight: (out, in); x: (N, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, head: bool = False):
        self.wide = weight.device.type == "cpu" and weight.numel() >= WIDE
        # as (in, out) one row is multiplied faster where there are more outputs than inputs; but what is wide enough
        # for the product from the left wants (out, in), save the head, which is too long for either to lie in a cache
        if weight.device.type == "cpu" and weight.size(0) > weight.size(1) and (head or not self.wide):
            weight = weight.t().contiguous().t()
        self.weight, self.transposed, self.bias = weight, weight.t(), bias

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if self.wide and 1 < len(x) <= FEW and torch.get_num_threads() > 1:
            y = torch.mm(self.weight, x.t()).t()
            y = y if self.bias is None else y + self.bias
            return y if add is None else add + y
        if add is None:
            return torch.mm(x, self.transposed) if self.bias is None else torch.addmm(self.bias, x, self.transposed)
        y = torch.addmm(add, x, self.transposed)
        return y if self.bias is None else y.add_(self.bias)


class Half:
    """Dense with float16 weights and float32 sums, by fbgemm: half the memory to read, on any x86 CPU.

    bfloat16 weights above 6e-5 are float16 numbers exactly, smaller ones are rounded by 3e-8 at most.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, head: bool = False):
        bias = None if bias is None else bias.float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), bias)

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return y if add is None else y.add_(add)


class Int8:
    """Dense with int8 weights, one scale an output, and activations in 7 bits (8 where the CPU has VNNI), one scale a
    row: a row does not depend on its neighbours.

    fbgemm finds one scale for all rows: so each row is divided by its largest number, and two more inputs, 1 and -1
    with weights of 0, make the range that of every batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, head: bool = False):
        weight, self.bias = weight.float(), None if bias is None else bias.float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12).div(127).double()
        more = -(-(weight.size(1) + 2) // 16) * 16 - weight.size(1)  # whole vectors
        self.range = torch.zeros(1, more)
        self.range[0, :2] = torch.tensor([1.0, -1.0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the quantized tensor types are to go; what multiplies them is not
            quantized = torch.quantize_per_channel(
                F.pad(weight, (0, more)), scale, torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8
            )
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        # without VNNI products are added in pairs in 16 bits, which 8-bit activations overflow
        self.reduce_range = not getattr(torch.cpu, "_is_vnni_supported", bool)()

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).clamp_(min=1e-30)
        x = torch.cat((x / largest, self.range.expand(len(x), -1)), dim=-1)
        y = torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range).mul_(largest)
        y = y if self.bias is None else y.add_(self.bias)
        return y if add is None else y.add_(add)
