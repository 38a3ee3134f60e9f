"""Records GPT.forward for one token per row as a flat Python function with the same result, which is faster.

A decode step of a small model is bound by Python and by the dispatch of operations, not by arithmetic. So the model's
own forward runs once under a dispatch mode that writes every operation as a line of a function: no modules, no
branches. The recorder sees only operations, so an edited model is recorded as well as the original.

Operations that depend on no input are constants. Views are not written: a tensor is its variable, or one `as_strided`
of it. Row-wise operations run on (B, C). Linear layers use their layout for few rows (kernels/int8.py), and a few
operations become faster ones: see RULES and FUSED.

A record is valid for one number of rows and one window of the cache. Python code that reads numbers from tensors,
random numbers, and writes to the model's own tensors raise CannotRecord. The caller compares a new record with the
model's own forward (decode_step.py), because Python code may also depend on things that no operation shows.

Shapes: B rows, C channels, H heads, Hkv key heads, D their width, S keys in the window, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import re
import timeit
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CannotRecord
from ..kernels.int8 import Dense, Linears
from ..kernels.step_recorder import tensors

aten = torch.ops.aten
PARAMETERS = ("ids", "lengths", "visible", "where", "tokens", "memory", "keys", "values")  # of a recorded step
SMALL = 1 << 12  # numbers up to which GELU may be faster in parts


@dataclass
class Record:
    """A recorded step: step(ids, lengths, visible, where, tokens, memory, keys, values) -> logits, (B, V)."""

    step: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    """The same with exact linear layers, if the layers of step approximate."""
    needs: frozenset[str]
    """The parameters that the step reads."""
    program: Any
    """Equal for records that differ only in sizes."""
    kernel: Callable[..., Tensor] | None = None
    """The same step in the compiled kernels, if they have the operations."""
    lacks: str = ""
    """The reason if there is none."""


@dataclass
class Line:
    """targets = function(*words, **options). Without targets, the function writes into its first argument."""

    targets: tuple[str, ...]
    function: Any
    words: list[str]
    options: dict[str, str]
    several: bool = False
    given: tuple[Any, dict[str, Any], Any] | None = None
    """The arguments and the result. None for a view."""

    def names(self) -> set[str]:
        return set(re.findall(r"\bx\d+\b", " ".join([*self.words, *self.options.values()])))


def mapped(tree: Any, of: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, (list, tuple)):
        return tuple([mapped(item, of) for item in tree])
    return of(tree) if isinstance(tree, Tensor) else tree


def place(t: Tensor) -> tuple[int, torch.dtype]:
    """Its memory. Views of a tensor have the same."""
    return t.untyped_storage()._cdata, t.dtype


def layout(t: Tensor) -> tuple[Any, ...]:
    """Arguments of as_strided. The stride of a dimension of size 1 does not matter."""
    strides = tuple(stride if n > 1 else 1 for n, stride in zip(t.shape, t.stride(), strict=True))
    return tuple(t.shape), strides, t.storage_offset()


def narrow(t: Tensor) -> Tensor:
    """(B, T, C) as (B T, C) if that is a view; others unchanged."""
    return t.flatten(0, 1) if t.ndim == 3 and (t.size(1) == 1 or t.is_contiguous()) else t


@functools.cache
def quick(func: Any) -> Any:
    """torch's own Python function for an operation: half the overhead of calling the operation directly."""
    name = func._schema.name.partition("::")[2]
    for module in (torch, torch._C._nn, torch.Tensor):
        found = getattr(module, name, None)
        if found is not None and type(found).__name__ in ("builtin_function_or_method", "method_descriptor"):
            return found
    return func


@functools.cache
def gelu_is_slow() -> bool:
    """Whether GELU of a few numbers takes longer than its parts, which depends on the processor."""
    x = torch.linspace(-3, 3, 512)[None]
    whole = min(timeit.repeat(lambda: F.gelu(x), repeat=20, number=1))
    return whole > 1e-6 + min(timeit.repeat(lambda: torch.addcmul(x, x, (x * 0.5).erf_()), repeat=20, number=1))


class Recorder(TorchDispatchMode):
    """Writes the operations of a forward pass, and runs them, to know the memory and strides of every tensor. Products
    of linear layers are zeros, because only shapes are needed."""

    def __init__(self, linears: Linears, inputs: dict[str, Tensor]):
        super().__init__()
        self.linears, self.inputs = linears, inputs
        self.lines: list[Line] = []
        self.constants: dict[str, Any] = {}
        self.exact: dict[str, Any] = {}  # constants in the place of approximate products
        self.names: dict[int, str] = {id(t): name for name, t in inputs.items()}  # of inputs and constants, by identity
        self.variables: dict[tuple[int, torch.dtype], str] = {place(t): name for name, t in inputs.items()}
        self.tensors = dict(inputs)  # by name of the variable
        self.views: dict[Any, str] = {}
        self.masks: dict[Any, Tensor] = {}  # to add to scores, by the memory and layout of masks of booleans
        self.made: dict[int, Tensor] = {}  # by its memory, what the step itself creates
        self.origin: dict[int, Tensor] = {}  # weights in another dtype, by identity of the tensors in their place
        self.kept: list[Tensor] = []  # so that identities stay unique

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.to.dtype and isinstance(args[0], Parameter) and args[0].dtype != args[1]:
            stand_in = torch.zeros((), dtype=args[1], device=args[0].device).expand(args[0].shape)
            self.origin[id(stand_in)] = args[0]  # a linear layer's product converts it once for all records
            self.kept.append(stand_in)
            return stand_in
        layer = func is aten.linear.default and all(self._original(t) is not None for t in tensors(args[1:]))
        if layer and self.varies(args[:1]):
            return self.linear(*args)
        args = mapped(args, lambda t: self.origin[id(t)].to(t.dtype) if id(t) in self.origin else t)
        writes, varies = func._schema.is_mutable, self.varies((args, tuple(kwargs.values())))
        self._refuse_unfit(func, args, varies)
        if writes:
            target = kwargs.get("out", args[0])
            if self.names.get(id(target), "").startswith("memory"):  # the cache itself: not now
                self.write(quick(func), args, kwargs, ())
                return target
            self._make_writable(target, func)
        elif not varies:
            out = func(*args, **kwargs)
            self.made.update({place(t)[0]: t for t in tensors(out)})
            return out
        elif func in RULES and (out := RULES[func](self, *args, **kwargs)) is not None:
            return out
        rows = self._rows(func, args)
        if rows:
            args, kwargs = mapped(args, narrow), {name: mapped(a, narrow) for name, a in kwargs.items()}
        if writes:
            quick(func)(*args, **kwargs)
            self.write(quick(func), args, kwargs, ())
            return target
        found = self.call(quick(func), *args, **kwargs)
        if found is not None and not tensors(found):
            raise CannotRecord(f"Python code reads numbers out of tensors ({func})")
        return mapped(found, lambda t: t.view(*rows, t.size(-1))) if rows else found

    def varies(self, tree: Any) -> bool:
        """Whether any of the tensors depends on an input."""
        return any(place(t) in self.variables for t in tensors(tree))

    def _original(self, weight: Tensor | None) -> Parameter | None:
        found = self.origin.get(id(weight), weight)
        return found if isinstance(found, Parameter) else None

    def _refuse_unfit(self, func: Any, args: Any, varies: bool) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags and not (func in SEEDED and not any(SEEDED[func](args))):
            raise CannotRecord(f"random numbers are drawn ({func})")
        by_place = func is aten.index.Tensor and not any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
        if varies and torch.Tag.dynamic_output_shape in func.tags and not by_place:
            raise CannotRecord(f"a shape depends on the data ({func})")

    def _make_writable(self, target: Tensor, func: Any) -> None:
        """Allows an operation to write into a tensor that is created in this step, and again in every replay."""
        self.masks.clear()
        name = self.variables.get(place(target))
        if name in self.inputs or (name is None and place(target)[0] not in self.made):
            raise CannotRecord(f"the step writes to a persistent tensor ({func})")
        if name is None:
            whole = target.as_strided((target.untyped_storage().nbytes() // target.itemsize,), (1,), 0)
            self.lines.append(Line((self.variable(whole),), torch.clone, [self.constant(whole.clone())], {}))

    @staticmethod
    def _rows(func: Any, args: Any) -> torch.Size | None:
        """(B, T) of an operation on (B, T, C) that gives the same on (B T, C)."""
        norm = func in (aten.layer_norm.default, aten.rms_norm.default) and len(args[1]) == 1
        wide = [t for t in tensors(args) if t.ndim > 1]
        rows = {t.shape[:2] for t in wide}
        fits = all(narrow(t) is not t for t in wide) and (len(rows) == 1 or all(T == 1 for _, T in rows))
        return max(rows) if rows and fits and (norm or torch.Tag.pointwise in func.tags) else None

    # --- writing ---

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs function(*args, **kwargs), which changes nothing, and writes it, unless it only returns views."""
        found = function(*args, **kwargs)
        if not all(place(t) in self.variables for t in tensors(found)):
            self.write(function, args, kwargs, found)
        return found

    def write(self, function: Any, args: Any, kwargs: Any, found: Any) -> None:
        words, options = [self.text(a) for a in args], {name: self.text(a) for name, a in kwargs.items()}
        targets = tuple([self.variable(t) for t in tensors(found)])
        several = isinstance(found, (list, tuple))
        self.lines.append(Line(targets, function, words, options, several, (args, kwargs, found)))

    def variable(self, t: Tensor) -> str:
        name = f"x{len(self.tensors)}"
        self.tensors[name], self.variables[place(t)] = t, name
        return name

    def origin_of(self, t: Tensor) -> str | None:
        """The variable that t is a view of; "memory" for the whole cache; None for a constant."""
        found = self.names.get(id(t), self.variables.get(place(t), ""))
        found = self.variables.get(place(t), "") if found.startswith("c") else found
        return found.partition("[")[0].replace("keys", "memory").replace("values", "memory") or None

    def constant(self, value: Any) -> str:
        if id(value) not in self.names:
            self.names[id(value)] = f"c{len(self.constants)}"
            self.constants[self.names[id(value)]] = value
        return self.names[id(value)]

    def text(self, a: Any) -> str:
        if isinstance(a, Tensor) and id(a) not in self.names and place(a) in self.variables:
            base = self.variables[place(a)]
            if layout(self.tensors[base]) == layout(a):
                return base
            if (base, layout(a)) not in self.views:
                self.views[base, layout(a)] = name = f"x{len(self.tensors)}"
                self.tensors[name] = a
                self.lines.append(Line((name,), torch.as_strided, [base, *map(repr, layout(a))], {}))
            return self.views[base, layout(a)]
        if isinstance(a, (list, tuple)):
            return f"({''.join(self.text(item) + ', ' for item in a)})"
        if a is None or isinstance(a, (bool, int, str)) or (isinstance(a, float) and math.isfinite(a)):
            return repr(a)
        return self.constant(a)

    def record(self, logits: Tensor, kind: object) -> Record:
        logits = self.shaped(logits, (-1, logits.size(-1)))
        result = self.text(logits)
        source = self.source(result, self._fused(result))
        kinds = [(c.dtype, c.ndim) if isinstance(c, Tensor) else id(c) for c in self.constants.values()]
        program = re.sub(r"(?<![\w.])\d+(?![\w.])", "n", source) + f"{kinds}, {kind}"
        exact = function_of(source, {**self.constants, **self.exact})
        step = function_of(source, self.constants) if self.exact else exact
        body = source.partition("\n")[2]
        needs = frozenset(name for name in PARAMETERS if re.search(rf"\b{name}\b", body))
        return Record(step, exact, needs, program)

    def source(self, result: str, lines: list[Line]) -> str:
        code, needed = [f"return {result}"], set(re.findall(r"\bx\d+\b", result))
        for line in reversed(lines):
            if line.targets and needed.isdisjoint(line.targets):
                continue
            needed |= line.names()
            words = [*line.words, *(f"{name}={word}" for name, word in line.options.items())]
            to = "".join(f"{target}, " if line.several else f"{target} " for target in line.targets)
            code.append(f"{to}{'= ' * bool(to)}{self.constant(line.function)}({', '.join(words)})")
        return (
            f"def step({', '.join(f'{name}=None' for name in PARAMETERS)}):\n    "
            + "\n    ".join(reversed(code))
            + "\n"
        )

    def _fused(self, result: str) -> list[Line]:
        """The lines, with a product that is only added to something as one operation."""
        uses = Counter([result, *(name for line in self.lines for name in line.names())])
        lines = [Line((), None, [], {})]
        known = {**self.constants, **self.tensors}
        for line in self.lines:
            last = lines[-1]
            fused = FUSED.get((last.function, line.function))
            rest = [word for word in line.words if word not in last.targets]
            if fused and not line.options and len(rest) == 1 and uses[last.targets[0]] == 1:
                operands: list[Any] = [known.get(word) for word in (*rest, *last.words, *line.targets)]
                minus = line.function is torch.sub
                same = all(isinstance(t, Tensor) and t.dtype == operands[-1].dtype for t in operands)
                if same and operands[0].shape == operands[-1].shape and (not minus or line.words[0] == rest[0]):
                    value = {"value": "-1"} if minus else {}
                    lines[-1] = Line(line.targets, fused, [*rest, *last.words], value)
                    continue
            lines.append(line)
        return lines[1:]

    # --- operations ---

    def shaped(self, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.call(torch.reshape, t, shape)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear layer in the layout for few rows."""
        weights: Any = self._original(weight), self._original(bias)
        product = self.linears.product(weights[0], weights[1], x.dtype)
        rows = self.shaped(x, (-1, x.size(-1)))
        y = rows.new_zeros(rows.size(0), weight.size(0))
        if not isinstance(product, Dense):
            self.exact[self.constant(product)] = functools.partial(exactly, *weights)
            self.write(product, (rows,), {}, y)
        elif product.is_few(len(rows)):
            self.write(product.few, (rows,), {}, y)
        elif product.is_wide(len(rows)):
            y = y.t().contiguous().t()  # the memory layout of a product from the other side
            self.write(product, (rows,), {}, y)
        elif product.bias is None:
            self.write(torch.mm, (rows, product.transposed), {}, y)
        else:
            self.write(torch.addmm, (product.bias, rows, product.transposed), {}, y)
        return y.view(*x.shape[:-1], -1)

    def gelu(self, x: Tensor, approximate: str = "none") -> Tensor | None:
        small = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() <= SMALL
        if approximate != "none" or not small or not gelu_is_slow():
            return None
        given = narrow(x)
        half = self.call(torch.mul, given, 0.5)
        error = self.call(torch.erf, self.call(torch.mul, given, math.sqrt(0.5)))
        return self.call(torch.addcmul, half, half, error).view(x.shape)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: Any, **how: Any) -> Any:
        """With a mask of numbers, made once for all layers: torch makes it from booleans in every layer."""
        if mask is None or mask.dtype != torch.bool or q.device.type != "cpu" or not self.varies([mask]):
            return None
        key = place(mask), layout(mask), q.dtype
        if key not in self.masks:
            numbers = [torch.tensor(number, dtype=q.dtype) for number in (0.0, -math.inf)]
            self.masks[key] = self.call(torch.where, mask, *numbers)
        return self.call(quick(aten.scaled_dot_product_attention.default), q, k, v, self.masks[key], *rest, **how)

    def rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor | None:
        """x / sqrt(norm(x)^2 / n + eps) * weight: torch on a CPU needs three times as long."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or len(shape) != 1 or eps is None:
            return None
        if weight is not None and weight.dtype != x.dtype:
            return None
        given = narrow(x)
        norm = self.call(torch.linalg.vector_norm, given, 2, -1, True)
        inverse = self.call(torch.rsqrt, self.call(torch.addcmul, torch.tensor(eps), norm, norm, value=1 / shape[0]))
        y = self.call(torch.mul, given, inverse)
        return (y if weight is None else self.call(torch.mul, y, weight)).view(x.shape)


RULES: dict[Any, Callable[..., Any]] = {
    aten.gelu.default: Recorder.gelu,
    aten.rms_norm.default: Recorder.rms_norm,
    aten.scaled_dot_product_attention.default: Recorder.attention,
}
FUSED = {
    (torch.mm, torch.add): torch.addmm,
    (torch.mul, torch.add): torch.addcmul,
    (torch.mul, torch.sub): torch.addcmul,
}
# operations that draw random numbers only with a probability above 0
SEEDED: dict[Any, Callable[[Any], Any]] = {
    aten.scaled_dot_product_attention.default: lambda args: args[4:5],
    aten.dropout.default: lambda args: [args[1] and args[2]],
}


def function_of(source: str, constants: dict[str, Any]) -> Callable[..., Any]:
    exec(compile(source, "<decode step>", "exec"), constants)  # generated from names of operations and numbers
    return constants["step"]


def exactly(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
