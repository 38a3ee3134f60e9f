"""Linear layers for decoding: in the dtype of the weights, in float16, or in int8."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..core.cache import Documents
from ..core.model import GPT
from ..errors import UserError
from ..machine.device import cpu_has_native_bf16
from .compiled import Kernel, Rows, find_kernel, to_int8

Quantize = Literal["none", "int8"]
WIDE = 1 << 18  # elements of a matrix above which a few rows are multiplied faster from its other side
FEW = 64  # rows up to which that holds
KERNEL_ROWS = 16  # rows up to which the compiled kernels are faster than torch in float32
LARGE = 1 << 22  # weights of the linear layers above which the compiled kernels are used


def has_half() -> bool:
    """Whether torch multiplies float32 rows by float16 matrices here (fbgemm)."""
    return any(engine in torch.backends.quantized.supported_engines for engine in ("fbgemm", "x86"))


def has_int8() -> bool:
    """Whether torch has products of 8-bit integers here."""
    return torch.backends.quantized.engine != "none"


class Dense:
    """x @ weight.T + bias. weight: (out, in); x: (N, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, head: bool = False, kernel: Kernel | None = None):
        self.few = kernel.rows(weight, bias) if kernel and weight.dtype == torch.float32 else None
        self.wide = weight.device.type == "cpu" and weight.numel() >= WIDE
        # (in, out) is faster for one row if there are more outputs than inputs. But a matrix that is wide enough
        # for the product from the left needs (out, in), except the head, which does not fit in a cache either way
        wider = weight.device.type == "cpu" and weight.size(0) > weight.size(1)
        if wider and (head or not self.wide) and self.few is None:
            weight = weight.t().contiguous().t()
        self.weight, self.transposed, self.bias = weight, weight.t(), bias

    def is_wide(self, rows: int) -> bool:
        """Whether this many rows are multiplied from the other side."""
        return self.wide and 1 < rows <= FEW and torch.get_num_threads() > 1

    def is_few(self, rows: int) -> bool:
        """Whether this many rows are multiplied by the compiled kernels."""
        return self.few is not None and rows <= KERNEL_ROWS

    def __call__(self, x: Tensor) -> Tensor:
        if self.few is not None and self.is_few(len(x)):
            return self.few(x)
        if self.is_wide(len(x)):
            y = torch.mm(self.weight, x.t()).t()
            return y if self.bias is None else y + self.bias
        return torch.mm(x, self.transposed) if self.bias is None else torch.addmm(self.bias, x, self.transposed)


class Half:
    """Dense with float16 weights and float32 sums, by fbgemm: half the memory traffic, on any x86 CPU. bfloat16 weights
    above 6e-5 are exact in float16; smaller ones are rounded by at most 3e-8."""

    def __init__(self, weight: Tensor, bias: Tensor | None, head: bool = False):
        bias = None if bias is None else bias.float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8:
    """Dense with int8 weights, one scale per output, and 7-bit activations (8-bit with VNNI), one scale per row. A row
    does not depend on its neighbours.

    fbgemm computes one scale for all rows. So each row is divided by its largest number, and two more inputs, 1 and -1
    with zero weights, give every batch the same range.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, head: bool = False):
        weight, self.bias = weight.float(), None if bias is None else bias.float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12).div(127).double()
        more = -(-(weight.size(1) + 2) // 16) * 16 - weight.size(1)  # whole vectors
        self.range = torch.zeros(1, more)
        self.range[0, :2] = torch.tensor([1.0, -1.0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the quantized tensor types, not their products
            quantized = torch.quantize_per_channel(
                F.pad(weight, (0, more)), scale, torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8
            )
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        # without VNNI products are added in pairs in 16 bits, which 8-bit activations overflow
        self.reduce_range = not getattr(torch.cpu, "_is_vnni_supported", bool)()

    def __call__(self, x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).clamp_(min=1e-30)
        x = torch.cat((x / largest, self.range.expand(len(x), -1)), dim=-1)
        y = torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range).mul_(largest)
        return y if self.bias is None else y.add_(self.bias)


class Linears:
    """The linear layers for decoding: one product per weight, built once.

    quantize="int8": int8 weights with a scale per output, and activations with a scale per row. Otherwise float16
    weights on a CPU with slow products in the model's half precision, else the weights unchanged. kernels: a large
    model may use the compiled kernels (compiled.py). say: reports why it does not. Raises UserError if the device has
    no int8 products.
    """

    def __init__(
        self,
        model: GPT,
        quantize: Quantize = "none",
        kernels: bool = True,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ):
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        if quantize == "int8" and not (device.type == "cpu" and has_int8()):
            raise UserError(f"quantize=int8 needs a CPU with fbgemm or qnnpack, not {device}; remove it")
        half = dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_native_bf16())
        self.model, self.device, self.dtype = model, device, dtype
        self.kind: Any = Dense
        if quantize == "int8":
            self.kind, self.dtype = Int8, torch.float32
        elif device.type == "cpu" and half and has_half():
            self.kind, self.dtype = Half, torch.float32
        size = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        fits = kernels and device.type == "cpu" and self.dtype == torch.float32
        self.kernel = find_kernel(say, size >= LARGE) if fits else None
        self.products: dict[Any, Any] = {}
        self.packed: dict[int, Any] = {}  # by the identity of the weight: products that approximate
        self.kept: list[Any] = []  # so that identities stay unique
        for module in model.modules() if self.kind is not Dense else ():
            if isinstance(module, torch.nn.Linear):
                self.packed[id(module.weight)] = self._packed(module.weight.detach(), _detached(module.bias))
                self.kept += [module.weight, module.bias]

    def _packed(self, weight: Tensor, bias: Tensor | None) -> Any:
        if self.kernel is not None:
            held, scales = to_int8(weight) if self.kind is Int8 else (weight, None)
            if (product := self.kernel.rows(held, bias, scales)) is not None:
                return product
        return self.kind(weight, bias)

    def product(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
        """x -> x @ weight.T + bias, for x of this dtype."""
        if id(weight) in self.packed:
            return self.packed[id(weight)]
        key = id(weight), id(bias), dtype
        if key not in self.products:
            head = weight.size(0) == self.model.config.vocab_size
            weights = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
            self.products[key] = Dense(*weights, head, self.kernel)
            self.kept += [weight, bias]
        return self.products[key]

    @contextlib.contextmanager
    def computing(self, exact: bool = False) -> Iterator[None]:
        """A context in which the model's forward uses these products. exact: without approximation."""
        before, self.model.compute_dtype = self.model.compute_dtype, self.dtype
        try:
            with _Packed(self.packed, self.kept) if self.packed and not exact else contextlib.nullcontext():
                yield
        finally:
            self.model.compute_dtype = before

    @contextlib.contextmanager
    def unrounded(self) -> Iterator[None]:
        """A context in which int8 products of the compiled kernels do not round their rows."""
        kernels = [product for product in self.packed.values() if isinstance(product, Rows)]
        try:
            for product in kernels:
                product.round_rows(False)
            yield
        finally:
            for product in kernels:
                product.round_rows(True)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


class _Packed(TorchFunctionMode):
    """Replaces F.linear by products of packed weights. Conversions of these weights to another dtype are skipped."""

    def __init__(self, packed: dict[int, Any], kept: list[Any]):
        super().__init__()
        self.packed, self.kept = packed, {id(t) for t in kept}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self.packed:
            x = args[0].float()
            return self.packed[id(args[1])](x.flatten(0, -2)).view(*x.shape[:-1], -1)
        if func is Tensor.to and id(args[0]) in self.kept:
            return args[0]
        return func(*args, **(kwargs or {}))


class Scorer(torch.nn.Module):
    """A model that computes losses with the linear layers used for decoding. Called like the model."""

    def __init__(self, model: GPT, quantize: Quantize):
        super().__init__()
        self.model, self.config, self.linears = model, model.config, Linears(model, quantize)

    def forward(self, idx: Tensor, targets: Tensor, *documents: Documents) -> tuple[Tensor | None, Tensor]:
        with self.linears.computing():
            return self.model(idx, targets, *documents)
