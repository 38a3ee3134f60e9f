"""OpenBLAS, which numpy's wheels carry, for products of training on a CPU.

On AMD processors with AVX2 it is faster than the libraries in torch's wheels. Its own threads and OpenMP's
would wait for each other, so it works with one thread, on slices that torch's threads share (blas.c). numpy's
products in this process use one thread from then on.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from .compiled import Kernel, lacking, load_kernel, wanted_kernel

PATTERN, PREFIX = "libscipy_openblas64_*.so", "scipy_"


class _Product(ctypes.Structure):
    """Product of blas.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sgemm", "a", "b", "c")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "inner")),
        *((name, ctypes.c_int64) for name in ("a_row", "a_column", "b_row", "b_column", "add")),
    ]


@functools.cache
def _functions() -> tuple[Kernel, int] | None:
    """The compiled kernels and the address of OpenBLAS's product; None if one of them is missing."""
    numpy = importlib.util.find_spec("numpy")
    if lacking() or numpy is None or numpy.origin is None:
        return None
    kernel, found = load_kernel(), list(Path(numpy.origin).parent.with_name("numpy.libs").glob(PATTERN))
    if isinstance(kernel, str) or len(found) != 1:
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
        product = getattr(library, f"{PREFIX}cblas_sgemm64_")
        getattr(library, f"{PREFIX}openblas_set_num_threads64_")(1)
    except (OSError, AttributeError):
        return None
    return kernel, ctypes.cast(product, ctypes.c_void_p).value or 0


def has_openblas() -> bool:
    return wanted_kernel() != "torch" and _functions() is not None


def is_fastest_here() -> bool:
    """Whether torch's own products (MKL) are slower in every shape: on AMD processors with AVX2 and without AVX-512."""
    found = _functions() if torch.backends.mkl.is_available() and has_openblas() else None
    return found is not None and bool(found[0].layers.is_amd()) and not found[0].has_avx512


def fits(a: Tensor, b: Tensor) -> bool:
    """Whether these are matrices in float32 with rows or columns without gaps."""
    return _functions() is not None and all(
        t.dim() == 2 and (_has_rows(t) or t.stride(1) != 1 and _has_rows(t.t())) for t in (a, b)
    )


def _has_rows(t: Tensor) -> bool:
    has_memory = type(t) in (Tensor, torch.nn.Parameter)  # other kinds, such as FakeTensor, may have none
    plain = has_memory and t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0
    return plain and t.stride(1) == 1 and t.stride(0) >= t.size(1)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a @ b, or out + a @ b, for tensors that fit. out: contiguous memory for the result."""
    kernel, sgemm = _functions() or (None, 0)
    assert kernel is not None
    c = a.new_empty(a.size(0), b.size(1)) if out is None else out
    sizes = a.size(0), b.size(1), a.size(1)
    product = _Product(sgemm, a.data_ptr(), b.data_ptr(), c.data_ptr(), *sizes, *a.stride(), *b.stride(), add)
    kernel.layers.blas_product(ctypes.addressof(product), torch.get_num_threads())
    return c
