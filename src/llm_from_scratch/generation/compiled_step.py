"""A recorded decode step as one call of the compiled kernels (kernels/step.c), without Python between its operations.

Every line of a record (recorder.py) that the kernel knows becomes an operation on memory at a fixed place. The
others, and what they depend on, run before it in torch: a model's own embedding of the tokens, for example. Results of
operations share an arena, in which memory that is no longer needed is used again.
"""

from __future__ import annotations

import array
import ctypes
import itertools
import math
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CannotRecord
from ..kernels.compiled import Kernel, Rows
from ..kernels.step_recorder import tensors
from .recorder import PARAMETERS, Line, Recorder, function_of

DIMS, OPERANDS = 4, 4
ALIGNED = 16  # numbers: a whole vector
OPERATIONS = (
    "copy", "neg", "rsqrt", "sqrt", "square", "reciprocal", "relu", "sigmoid", "silu", "exp", "tanh", "erf", "gelu",
    "gelu_tanh", "cos", "sin", "add", "sub", "mul", "div", "maximum", "minimum", "addcmul",
    "from_int", "choose", "norm", "layer_norm", "embed", "store_rows", "attend", "product",
)  # fmt: skip
WIDTHS = ("mm", "addmm", "Dense")  # products with a number of inputs that the kernel does not have
CODES = {name: code for code, name in enumerate(OPERATIONS)}


# A View of step.c as eight-byte numbers: block, offset, strides. An Operation: code, shape, views of the result and
# the operands, number, size, more, matrix
View = tuple[int, ...]
NOWHERE: View = (-1, 0, *[0] * DIMS)


class Builder:
    """Translates lines into operations. origin(t): the name of the variable that a tensor is a view of, or None for a
    constant. Blocks of memory: 0 is the arena; then inputs, constants and results of torch."""

    def __init__(self, origin: Callable[[Tensor], str | None]):
        self.origin = origin
        self.operations = array.array("q")
        self.count = 0
        self.blocks: dict[Any, int] = {}  # by name, or by the address of a constant
        self.constants: list[Any] = []  # which stay in memory
        self.given: set[int] = set()  # memory of the constants of a line: anything else is a copy of what varies
        self.fixed: dict[int, int] = {}  # address of a block
        self.places: dict[str, int] = {}  # in the arena, by name
        self.free: dict[int, list[int]] = {}  # by size
        self.size = 0

    # --- memory ---

    def reserve(self, name: str, t: Tensor) -> None:
        if free := self.free.get(size := _room(t)):
            self.places[name] = free.pop()
        else:
            self.places[name], self.size = self.size, self.size + size

    def release(self, name: str, t: Tensor) -> None:
        self.free.setdefault(_room(t), []).append(self.places.pop(name))

    def view(self, t: Tensor, shape: Sequence[int] | None = None) -> View:
        """t, broadcast to a shape."""
        strides = t.stride() if shape is None or t.shape == shape else t.expand(shape).stride()
        padded = [0] * (DIMS - len(strides)) + list(map(int, strides))
        name = self.origin(t)
        if name in self.places:
            return (0, self.places[name] + int(t.storage_offset()), *padded)
        if name is not None:
            return (self.blocks.setdefault(name, 1 + len(self.blocks)), int(t.storage_offset()), *padded)
        if t.untyped_storage()._cdata not in self.given:
            raise CannotRecord("an operand is a copy")
        if (address := t.data_ptr()) not in self.blocks:
            self.blocks[address] = at = 1 + len(self.blocks)
            self.fixed[at] = address
            self.constants.append(t)
        return (self.blocks[address], 0, *padded)

    def scalar(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CannotRecord("the kernel lacks it")
        found = torch.tensor(float(value))
        self.constants.append(found)  # so that its address stays its own
        self.given.add(found.untyped_storage()._cdata)
        return found

    # --- operations ---

    def add(self, code: str, shape: Sequence[int], y: View, operands: Sequence[View], number: float = 0.0,
            size: int = 0, more: int = 0, matrix: int = 0) -> None:  # fmt: skip
        if len(shape) > DIMS:
            raise CannotRecord("the kernel lacks it")
        bits = struct.unpack("q", struct.pack("d", number))
        padded = (*[1] * (DIMS - len(shape)), *shape)
        views = [y, *operands, *[NOWHERE] * (OPERANDS - len(operands))]
        self.operations.extend((CODES[code], *padded, *itertools.chain(*views), *bits, size, more, matrix))
        self.count += 1

    def each(self, code: str, y: Tensor, *operands: Any, number: float = 1.0) -> None:
        """An operation number by number."""
        given = [self.scalar(t) for t in operands]
        _floats(y, *given)
        self.add(code, y.shape, self.view(y), [self.view(t, y.shape) for t in given], number)

    def to(self, y: Tensor, x: Tensor, dtype: torch.dtype) -> None:
        if x.dtype == torch.int64 and y.dtype == torch.float32:
            self.add("from_int", y.shape, self.view(y), [self.view(x, y.shape)])
        else:
            self.each("copy", y, x)

    def cat(self, y: Tensor, parts: Sequence[Tensor], dim: int = 0) -> None:
        at = 0
        for part in parts:
            self.each("copy", y.narrow(dim, at, part.size(dim)), part)
            at += part.size(dim)

    def where(self, y: Tensor, shown: Tensor, a: Any, b: Any) -> None:
        if shown.dtype != torch.bool:
            raise CannotRecord("the kernel lacks it")
        _floats(y, a, b)
        self.add("choose", y.shape, self.view(y), [self.view(t, y.shape) for t in (shown, a, b)])

    def norm(self, y: Tensor, x: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False) -> None:
        last = dim in (-1, x.ndim - 1, (-1,), [-1])
        if order != 2 or not last or not keepdim or x.stride(-1) != 1:
            raise CannotRecord("the kernel lacks it")
        _floats(y, x)
        self.add("norm", y.shape, self.view(y), [self.view(x)], size=x.size(-1))

    def layer_norm(self, y: Tensor, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
                   eps: float = 1e-5, *rest: Any) -> None:  # fmt: skip
        given = [x, *(t for t in (weight, bias) if t is not None)]
        _floats(y, *given)
        if len(shape) != 1 or any(t.stride(-1) != 1 for t in (y, *given)):
            raise CannotRecord("the kernel lacks it")
        both = [NOWHERE if t is None else self.view(t) for t in (weight, bias)]
        self.add("layer_norm", y.shape, self.view(y), [self.view(x), *both], eps)

    def embedding(self, y: Tensor, table: Tensor, ids: Tensor, *rest: Any) -> None:
        _floats(y, table)
        if ids.dtype != torch.int64 or table.stride(1) != 1 or not y.is_contiguous():
            raise CannotRecord("the kernel lacks it")
        rows = y.view(-1, 1, y.size(-1))
        which = self.view(ids.view(-1, 1, 1))
        self.add("embed", rows.shape, self.view(rows), [which, self.view(table)], size=table.size(0))

    def store_rows(self, memory: Tensor, dim: int, where: Tensor, rows: Tensor) -> None:
        _floats(memory, rows)
        if self.origin(memory) != "memory":
            raise CannotRecord("the kernel writes rows only to the cache")
        if dim or memory.ndim != 2 or memory.stride(1) != 1 or rows.stride(1) != 1 or where.dtype != torch.int64:
            raise CannotRecord("the kernel lacks it")
        n, width = rows.shape
        block, offset, *strides = self.view(memory)
        target = (block, offset, 0, 0, *strides[2:])  # the row is an index's
        given = [self.view(where.view(n, 1, 1)), self.view(rows.view(n, 1, width))]
        self.add("store_rows", (n, 1, width), target, given, size=memory.size(0))

    def attend(self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
               causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> None:  # fmt: skip
        _floats(y, q, k, v, *([] if mask is None else [mask]))
        lies = any(t.stride(3) != 1 for t in (q, k, v, y)) or v.size(3) != q.size(3)
        if dropout or causal or q.size(2) != 1 or lies or q.size(1) % k.size(1):
            raise CannotRecord("the kernel lacks it")
        views = [self.view(t) for t in (q, k, v)]
        views += [] if mask is None else [self.view(mask, (*q.shape[:3], k.size(2)))]
        factor = 1 / math.sqrt(q.size(3)) if scale is None else scale
        self.add("attend", y.shape, self.view(y), views, factor, k.size(2), q.size(1) // k.size(1))

    def product(self, y: Tensor, rows: Rows, x: Tensor) -> None:
        if x.ndim != 2 or not x.is_contiguous() or not y.is_contiguous():
            raise CannotRecord("the kernel lacks it")
        _floats(y, x)
        self.constants.append(rows)
        self.add("product", y.shape, self.view(y), [self.view(x)], size=len(x), matrix=rows.address)

    def translate(self, line: Line) -> None:
        """Raises CannotRecord."""
        if line.given is None:
            raise CannotRecord("the kernel lacks it")
        function, (args, options, found) = line.function, line.given
        self.given = {t.untyped_storage()._cdata for t in tensors((args, options))}
        try:
            if isinstance(function, Rows):
                self.product(found, function, *args)
            elif function is torch.Tensor.index_copy_:
                self.store_rows(*args, **options)
            elif function in KNOWN:
                KNOWN[function](self, found, *args, **options)
            else:
                raise CannotRecord("the kernel lacks it")
        except (TypeError, AttributeError, RuntimeError, LookupError):  # other arguments than those above
            raise CannotRecord("the kernel lacks it") from None


def _room(t: Tensor) -> int:
    """Numbers in the arena for the memory of t."""
    return -(-t.untyped_storage().nbytes() // t.itemsize // ALIGNED) * ALIGNED


def _floats(*given: Any) -> None:
    if any(not isinstance(t, Tensor) or t.dtype != torch.float32 for t in given):
        raise CannotRecord("the kernel lacks it")


def _each(code: str) -> Callable[..., None]:
    return lambda builder, y, *operands: builder.each(code, y, *operands)


def _add(code: str) -> Callable[..., None]:
    return lambda builder, y, a, b, alpha=1.0: builder.each(code, y, a, b, number=alpha)


def _gelu(builder: Builder, y: Tensor, x: Tensor, approximate: str = "none") -> None:
    builder.each({"none": "gelu", "tanh": "gelu_tanh"}[approximate], y, x)


def _copy(builder: Builder, y: Tensor, x: Tensor, *rest: Any, **options: Any) -> None:
    builder.each("copy", y.view(x.shape), x)


KNOWN: dict[Any, Callable[..., None]] = {
    **{
        function: _each(name)
        for name in OPERATIONS[1:16]
        for function in (getattr(torch, name, None), getattr(torch._C._nn, name, None), getattr(F, name, None))
        if function is not None and name != "gelu"
    },
    **{getattr(torch, name): _each(name) for name in ("mul", "maximum", "minimum")},
    torch.add: _add("add"),
    torch.sub: _add("sub"),
    torch.div: lambda builder, y, a, b: builder.each("div", y, a, b),
    torch.addcmul: lambda builder, y, a, b, c, value=1.0: builder.each("addcmul", y, a, b, c, number=value),
    torch._C._nn.gelu: _gelu,
    torch.reshape: _copy,
    torch.clone: _copy,
    torch.Tensor.contiguous: _copy,
    torch.Tensor.to: Builder.to,
    torch.cat: Builder.cat,
    torch.where: Builder.where,
    torch.linalg.vector_norm: Builder.norm,
    torch.layer_norm: Builder.layer_norm,
    torch.embedding: Builder.embedding,
    torch._C._nn.scaled_dot_product_attention: Builder.attend,
}


class CompiledStep:
    """step(ids, lengths, visible, where, tokens, memory, keys, values) -> logits, by the kernel.

    first: the part in torch, with the same parameters; returns the tensors that `names` are. One call at a time.
    """

    lock = threading.Lock()  # the arena is shared
    arena = torch.empty(0)

    def __init__(self, kernel: Kernel, builder: Builder, names: Sequence[str], first: Any, result: Tensor):
        self.run, self.first, self.size = kernel.run, first, builder.size
        self.operations, self.count, self.constants = builder.operations, builder.count, builder.constants
        self.start = self.operations.buffer_info()[0]
        self.blocks = (ctypes.c_void_p * (1 + len(builder.blocks)))()
        for at, address in builder.fixed.items():
            self.blocks[at] = address
        self.inputs = [(builder.blocks[name], at) for at, name in enumerate(PARAMETERS[:5]) if name in builder.blocks]
        self.cache = builder.blocks.get("memory")
        self.made = [(builder.blocks[name], at) for at, name in enumerate(names) if name in builder.blocks]
        if len(builder.fixed) + len(self.inputs) + len(self.made) + (self.cache is not None) < len(builder.blocks):
            raise CannotRecord("an operand is not the result of an operation")
        self.at, self.shape = builder.view(result)[1], result.shape

    def __call__(self, *given: Any) -> Tensor:
        with self.lock:
            results = self.first(*given) if self.made else ()
            if CompiledStep.arena.numel() < self.size:
                CompiledStep.arena = torch.empty(self.size)
            blocks = self.blocks
            blocks[0] = CompiledStep.arena.data_ptr()
            for block, at in self.inputs:
                blocks[block] = given[at].data_ptr()
            if self.cache is not None:
                blocks[self.cache] = given[5][0].untyped_storage().data_ptr()
            for block, at in self.made:
                blocks[block] = results[at].data_ptr()
            wrong = self.run(self.start, self.count, blocks, torch.get_num_threads())
            if wrong:
                raise MemoryError if wrong == 1 else IndexError("a token or position is out of range")
            count = math.prod(self.shape)
            return CompiledStep.arena[self.at : self.at + count].clone().view(self.shape)


def compiled_step(recorder: Recorder, logits: Tensor, kernel: Kernel) -> CompiledStep:
    """The record in the kernel, except what the kernel lacks and what this depends on. Raises CannotRecord if it
    depends on keys or values; without a reason if the shapes do not fit."""
    result = recorder.origin_of(logits)
    if result is None or not logits.is_contiguous():
        raise CannotRecord
    live: list[tuple[Line, set[str]]] = []
    needed = {result}
    for line in reversed(recorder.lines):
        if line.given is not None and (not line.targets or not needed.isdisjoint(line.targets)):
            reads = {name for t in tensors(line.given[:2]) if (name := recorder.origin_of(t))}
            needed |= reads
            live.insert(0, (line, reads))
    lacking = unknown(recorder, live)
    first, wanted = set(lacking), {name for at in lacking for name in live[at][1]}
    for at in reversed(range(len(live))):
        if at in first or not wanted.isdisjoint(live[at][0].targets):
            first.add(at)
            wanted |= live[at][1]
    in_torch = [live[at][0] for at in sorted(first)]
    if not all(line.targets for line in in_torch) or "memory" in wanted:
        function = live[lacking[-1]][0].function
        name = getattr(function, "__name__", type(function).__name__)
        raise CannotRecord(f"the compiled kernels lack {name}" if name not in WIDTHS else "")
    builder, last = Builder(recorder.origin_of), {name: at for at, (_, reads) in enumerate(live) for name in reads}
    for at, (line, reads) in enumerate(live):
        if at not in first:
            for name in line.targets:
                builder.reserve(name, recorder.tensors[name])
            builder.translate(line)
            for name in reads & builder.places.keys():
                if last[name] == at and name != result:
                    builder.release(name, recorder.tensors[name])
    if result not in builder.places:
        raise CannotRecord
    made = [name for line in in_torch for name in line.targets]
    kept = [line for line in recorder.lines if line.given is None or line in in_torch]
    source = recorder.source(f"({''.join(name + ', ' for name in made)})", kept)
    return CompiledStep(kernel, builder, made, function_of(source, recorder.constants), logits)


def unknown(recorder: Recorder, live: list[tuple[Line, set[str]]]) -> list[int]:
    """The lines that the kernel lacks."""
    trial, found = Builder(recorder.origin_of), list[int]()
    for at, (line, _) in enumerate(live):
        try:
            trial.translate(line)
        except CannotRecord:
            found.append(at)
    return found
