"""Products of a few rows, whole decode steps and layers of training by a library in C (rows.c, step.c, layers.c,
passes.c, tape.c), which the system's compiler builds on first use.

The library is kept in the user's cache folder, under a hash of its source. Each process compares it with torch before
it is used. Without a compiler, or if anything fails, torch computes all of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError, one_line
from ..machine.extras import DISTRIBUTION
from ..machine.files import open_whole

VARIABLE = "LLM_KERNEL"
CHOICES = ("auto", "compiled", "torch")
FILES = ("rows.c", "step.c", "layers.c", "passes.c", "tape.c", "blas.c", "vectors.h")
SOURCES = tuple(Path(__file__).with_name(name) for name in FILES)
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared")  # a row must not depend on its tile
LIMIT = 60  # seconds to compile
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
UNROUNDED = 4  # int8 weights and float32 rows
FEW = 32  # rows up to which the kernel is faster than torch in float16 and bfloat16
WHOLE = 64  # the number of inputs is a multiple of it


class _Matrix(ctypes.Structure):
    """Matrix of rows.c."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("kind", "has_avx512")),
        *((name, ctypes.c_long) for name in ("outputs", "inputs")),
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "sums", "bias")),
    ]


@dataclass(frozen=True)
class Kernel:
    """The loaded library."""

    multiply: Any
    run: Any
    """run(operations, count, blocks, threads): see step.c."""
    layers: Any
    """The functions of layers.c and passes.c."""
    has_avx512: bool

    def rows(self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> Rows | None:
        """The product with a matrix, (out, in), which is used in place; None if it does not fit. scales: of int8."""
        fits = weight.size(1) % WHOLE == 0 and weight.is_contiguous() and weight.dtype in KINDS
        return Rows(self, weight, bias, scales) if fits and weight.device.type == "cpu" else None


class Rows:
    """x @ weight.T + bias, in float32. x: (N, inputs). In int8, and up to FEW rows, a row does not depend on others."""

    def __init__(self, kernel: Kernel, weight: Tensor, bias: Tensor | None, scales: Tensor | None):
        self.kernel, self.weight, self.scales = kernel, weight, scales
        self.bias = None if bias is None else bias.float().contiguous()
        self.sums = None if scales is None else weight.sum(1, dtype=torch.int32)
        self.outputs, inputs = weight.shape
        others = [None if t is None else t.data_ptr() for t in (scales, self.sums, self.bias)]
        numbers = KINDS[weight.dtype], kernel.has_avx512, self.outputs, inputs
        self.matrix = _Matrix(*numbers, weight.data_ptr(), *others)
        self.address = ctypes.addressof(self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        kind, x = x.dtype, x.float().contiguous()  # an edited model may cast
        if len(x) > FEW and self.scales is None:  # a prompt: the arithmetic is the limit
            return F.linear(x, self.weight.float(), self.bias).to(kind)
        y = x.new_empty(len(x), self.outputs)
        if self.kernel.multiply(self.address, x.data_ptr(), y.data_ptr(), len(x), torch.get_num_threads()):
            raise MemoryError
        return y.to(kind)

    def round_rows(self, wanted: bool) -> None:
        """Whether an int8 product rounds its rows too. Rounding makes any difference before it larger."""
        if self.scales is not None:
            self.matrix.kind = KINDS[torch.int8] if wanted else UNROUNDED


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights, and a scale per output, float32."""
    scales = weight.abs().amax(dim=1).float().clamp(min=1e-12).div(127)
    rounded = torch.empty(weight.shape, dtype=torch.int8)
    for part, given, scale in zip(rounded.split(1024), weight.split(1024), scales.split(1024), strict=True):
        part.copy_(given.float().div(scale[:, None]).round_())
    return rounded, scales


def wanted_kernel() -> str:
    """The value of LLM_KERNEL. Raises UserError for a wrong one."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise UserError(f"{VARIABLE}={wanted}: expected {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")
    return wanted


def find_kernel(say: Callable[[str], None], large: bool = True, without: str = "decoding with torch") -> Kernel | None:
    """The compiled kernels, built for a large model or if LLM_KERNEL=compiled; a small one uses what is there. say:
    reports why they are not used, and what happens `without` them. Raises UserError for a wrong value of LLM_KERNEL."""
    wanted = wanted_kernel()
    if wanted == "torch":
        return None
    missing = lacking()
    if wanted == "auto" and not large and (missing or not is_built()):
        return None
    found = missing or load_kernel()
    if isinstance(found, Kernel):
        return found
    if wanted == "compiled" or not missing:
        say(f"{without}: {found}")
    return None


def compiler_here() -> list[str] | None:
    """The compiler's path, and the other words of CC="ccache gcc"."""
    given = os.environ.get("CC", "")
    try:
        words = shlex.split(given)
    except ValueError:  # a quote that is not closed
        words = [given]
    for first in words[:1] or ("cc", "gcc", "clang"):
        if path := shutil.which(first):
            return [path, *words[1:]]
    return None


def lacking() -> str | None:
    """The part that this machine lacks for the kernel."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the compiled kernels are for Linux on x86-64"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the compiled kernels need AVX2"
    return None if compiler_here() else "there is no C compiler (CC, cc, gcc or clang)"


def library_path() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / DISTRIBUTION
    texts = [source.read_text(encoding="utf-8") for source in SOURCES]
    key = hashlib.sha256("\0".join([*texts, *(compiler_here() or []), *FLAGS]).encode()).hexdigest()
    return folder / f"rows-{key[:32]}.so"


def is_built() -> bool:
    try:
        return library_path().exists()
    except (OSError, RuntimeError):  # no home, or one of somebody else
        return False


@functools.cache
def load_kernel() -> Kernel | str:
    """The library, compiled if it is not in the cache; or why it cannot be used."""
    try:
        path = library_path()
        try:
            library = _open(path)
        except OSError:  # not there, or damaged
            compiler = compiler_here()
            assert compiler is not None
            compile_library(compiler, path)
            library = _open(path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"the compiled kernels cannot be built or loaded ({one_line(error)})"
    library.multiply.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long, ctypes.c_int]
    level = min(library.instructions(), 2 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1)
    if not level:
        return "the compiled kernels need AVX2"
    library.run.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_int]
    places, number, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    library.activation.argtypes = [flag, *[places] * 5, number, flag, flag]
    library.normalize.argtypes = [*[places] * 4, *[number] * 4, ctypes.c_float, flag, flag]
    library.normalize_back.argtypes = [*[places] * 6, *[number] * 4, flag, flag]
    library.drop.argtypes = [*[places] * 3, number, flag, ctypes.c_float, flag, flag]
    library.attention.argtypes = library.rotate.argtypes = [places, flag, flag]
    library.entropy.argtypes = [*[places] * 3, number, number, *[flag] * 3]
    library.train.argtypes = [places, number, number, flag]
    library.blas_product.argtypes = [places, flag]
    kernel = Kernel(library.multiply, library.run, library, level == 2)
    return kernel if is_right(kernel) else "the compiled kernels give different results"


def _open(path: Path) -> ctypes.CDLL:
    """Loads a library that no other user could have written."""
    for place in (path, path.parent):
        info = place.stat()
        if info.st_uid != os.getuid() or info.st_mode & 0o022:
            raise OSError(f"{place} can be written by other users")
    return ctypes.CDLL(str(path))


def compile_library(compiler: list[str], path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        target, sources = Path(folder) / "rows.so", [file for file in SOURCES if file.suffix == ".c"]
        objects = [Path(folder) / f"{file.stem}.o" for file in sources]
        files = zip(objects, sources, strict=True)
        _compile(compiler, *(["-o", str(made), "-c", str(file)] for made, file in files))  # a first run waits for it
        _compile(compiler, ["-o", str(target), *map(str, objects), "-lm"])
        data = target.read_bytes()
    with open_whole(path, f".{path.name}.{os.getpid()}") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)


def _compile(compiler: list[str], *jobs: list[str]) -> None:
    """Runs the compiler with each list of words, side by side. An error or Ctrl-C ends all of them."""
    running: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        for job in jobs:
            command, pipe = [*compiler, *FLAGS, *job], subprocess.PIPE
            one = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=pipe, text=True, errors="replace")
            stack.enter_context(one)
            stack.callback(one.kill)
            running.append(one)
        for one in running:
            _, said = one.communicate(timeout=LIMIT)
            if one.returncode:
                first = next((line for line in said.splitlines() if "error" in line), said)
                raise OSError(f"{shlex.join(compiler)}: {one_line(first)}")


@torch.inference_mode()
def is_right(kernel: Kernel) -> bool:
    """Compares every kind of product with torch's, for a few shapes."""
    random = torch.Generator().manual_seed(0)
    for rows, outputs in ((1, 33), (7, 18), (2, 256)):  # the last by several threads
        x = torch.randn(rows, 3 * WHOLE, generator=random)
        weight, bias = torch.randn(outputs, x.size(1), generator=random), torch.randn(outputs, generator=random)
        for dtype in KINDS:
            held, scales = to_int8(weight) if dtype == torch.int8 else (weight.to(dtype), None)
            allowed = 1e-6 if scales is None else 0.02  # the rows of int8 are rounded too
            exact = held.double() if scales is None else held * scales[:, None].double()
            product = kernel.rows(held, bias, scales)
            expected = x.double() @ exact.T + bias
            if product is None or not (product(x) - expected).norm() <= allowed * expected.norm():
                return False
            product.round_rows(False)
            if not (product(x) - expected).norm() <= 1e-6 * expected.norm():
                return False
    return True
