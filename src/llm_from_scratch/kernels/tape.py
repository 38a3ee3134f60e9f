"""A model's training step as one call in C (tape.c), recorded from its own forward.

GPT.forward runs once under a dispatch mode that notes the operations, from the token ids to the loss. If tape.c has all
of them, a step computes the loss and all gradients in C: threads share the sequences and do not wait for each other at
every operation, and the activations of a few sequences stay in the processor's cache. If it lacks one, as after an edit
of core/model.py, GPT's own forward runs.

The record shows operations only. So forward must not depend on anything else that may differ in the next step: Watch
refuses code that could, and notices a changed attribute.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.model import GPT
from ..errors import CannotRecord
from .compiled import Kernel, load_kernel
from .layers import ACTIVATIONS
from .once import differentiable_once
from .purity import Watch
from .swap import unswapped

aten = torch.ops.aten
DEEP, WIDE, WHOLE = 256, 32, 16  # of tape.c: rows and columns of a panel; a width is a multiple of WHOLE
ROWS = 192  # tokens that a thread processes at once
KINDS = ("tokens", "places", "add", "norm", "linear", "activation", "attention", "loss")


class _Operation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in (
            "kind", "x", "other", "y", "inputs", "outputs", "add", "add_other", "weight", "bias", "packed", "kept",
            "which", "heads", "groups",
        )),
        ("epsilon", ctypes.c_double),
    ]  # fmt: skip


class _Buffer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("values", "slopes", "width")]


class _Parameter(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("gradient", ctypes.c_long)]


class _Tape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "operations", "buffers", "parameters", "ids", "targets", "gradients", "others", "memory", "packed",
            "losses",
        )),
        *((name, ctypes.c_long) for name in (
            "count", "batch", "tokens", "few", "size", "numbers", "learned", "shares", "has_avx512", "next",
        )),
        ("failed", ctypes.c_int),
    ]  # fmt: skip


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)


def _place(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _need(fits: bool, what: str) -> None:
    if not fits:
        raise CannotRecord(what)


class Recorder(TorchDispatchMode):
    """Runs the operations of a forward pass and notes them. A tensor is known by its memory: a buffer, the ids, the
    targets or a parameter."""

    def __init__(self, ids: Tensor, targets: Tensor):
        super().__init__()
        self.ids, self.targets = ids, targets
        self.operations: list[dict[str, Any]] = []
        self.widths: list[int] = []
        self.rows: list[int] = []  # of each buffer
        self.places: dict[int, int | None] = {_place(ids): None, _place(targets): None}
        self.parameters: list[Tensor] = []
        self.half: dict[int, tuple[str, int]] = {}  # buffers that are not written: the first half of an activation
        self.kept: list[Any] = []  # so that memory is not used again

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.kept.append(found)
        known, results = list(_tensors((args, tuple(kwargs.values())))), list(_tensors(found))
        drawn = torch.Tag.nondeterministic_seeded in func.tags and func not in (*RULES, aten.dropout.default)
        _need(bool(results) and not drawn and not func._schema.is_mutable, f"the kernel lacks {func}")
        if not any(isinstance(t, nn.Parameter) or _place(t) in self.places for t in known):
            return found  # a constant
        if func in RULES:
            return RULES[func](self, found, *args, **kwargs)
        is_view = all(_place(t) in self.places for t in results)
        is_same = found is args[0] and isinstance(found, nn.Parameter)  # a weight in its own dtype
        _need(is_view or is_same, f"the kernel lacks {func}")
        return found

    def buffer(self, y: Tensor, width: int, rows: int | None = None) -> int:
        self.places[_place(y)] = at = len(self.widths)
        self.widths.append(width)
        self.rows.append(self.ids.numel() if rows is None else rows)
        return at

    def add(self, kind: str, y: int, **of: Any) -> None:
        self.operations.append({"kind": KINDS.index(kind), "x": y, "other": -1, "y": y, "weight": -1, "bias": -1, **of})

    def whole(self, t: Any) -> int:
        """The buffer that t is, row by row."""
        _need(isinstance(t, Tensor) and t.is_contiguous(), "an operand is not a list of rows")
        at = self.places.get(_place(t))
        _need(at is not None and at not in self.half and t.dtype == torch.float32, "an operand is not a list of rows")
        assert at is not None
        fits = t.numel() == self.rows[at] * self.widths[at] and t.size(-1) == self.widths[at]
        _need(fits, "an operand is not a list of rows")
        return at

    def parameter(self, t: Any, *shape: int) -> int:
        if t is None:
            return -1
        fits = isinstance(t, nn.Parameter) and t.requires_grad and t.is_contiguous() and t.dtype == torch.float32
        _need(fits and tuple(t.shape) == shape and t.is_cpu, "a weight is not a parameter that is trained")
        for at, p in enumerate(self.parameters):
            if p is t:
                return at
        self.parameters.append(t)
        return len(self.parameters) - 1

    # --- operations ---

    def embedding(self, y: Tensor, weight: Tensor, ids: Tensor, *more: Any, **rest: Any) -> Tensor:
        _need(not any(more[1:]) and not rest and (not more or more[0] == -1) and ids.is_contiguous(), "embedding")
        T, width = self.ids.size(1), weight.size(1)
        table = self.parameter(weight, *weight.shape)
        _need(width % WHOLE == 0, "a width is not a multiple of 16")
        if _place(ids) == _place(self.ids):
            _need(ids.numel() == self.ids.numel(), "embedding")
            self.add("tokens", self.buffer(y, width), weight=table)
        else:
            _need(ids.numel() == T and bool((ids.flatten() == torch.arange(T)).all()), "embedding")
            self.add("places", self.buffer(y, width, T), weight=table)
        return y

    def sum(self, y: Tensor, a: Any, b: Any, alpha: float = 1) -> Tensor:
        both = [self.whole(t) for t in (a, b)]
        _need(alpha == 1 and both[0] != both[1] and len({self.widths[i] for i in both}) == 1, "add")
        _need(y.numel() == self.ids.numel() * self.widths[both[0]], "add")
        self.add("add", self.buffer(y, self.widths[both[0]]), x=both[0], other=both[1])
        return y

    def norm(self, y: Tensor, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float, is_centred: int) -> Tensor:
        at, width = self.whole(x), x.size(-1)
        _need(len(shape) == 1 and width % WHOLE == 0 and weight is not None, "a norm")
        weight, bias = self.parameter(weight, width), self.parameter(bias, width)
        self.add(
            "norm", self.buffer(y, width), x=at, inputs=width, weight=weight, bias=bias, epsilon=eps, which=is_centred
        )
        return y

    def layer_norm(self, y: Tensor, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
                   *rest: Any) -> Tensor:  # fmt: skip
        return self.norm(y, x, shape, weight, bias, eps, 1)

    def rms_norm(self, y: Tensor, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        _need(eps is not None, "a norm")
        return self.norm(y, x, shape, weight, None, eps or 0.0, 0)

    def linear(self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        at, (outputs, inputs) = self.whole(x), weight.shape
        _need(inputs == x.size(-1) and inputs % WHOLE == 0, "a linear layer")
        weights = self.parameter(weight, outputs, inputs), self.parameter(bias, outputs)
        to = self.buffer(y, outputs)
        self.add("linear", to, x=at, inputs=inputs, outputs=outputs, weight=weights[0], bias=weights[1])
        return y

    def activation(self, name: str, y: Tensor, x: int, other: int = -1) -> Tensor:
        self.add("activation", self.buffer(y, self.widths[x]), x=x, other=other, which=ACTIVATIONS[name])
        return y

    def gelu(self, y: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
        return self.activation("gelu" if approximate == "none" else "gelu_tanh", y, self.whole(x))

    def first_half(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        at = self.whole(x)
        self.half[self.buffer(y, self.widths[at])] = name, at
        return y

    def square(self, y: Tensor, x: Tensor) -> Tensor:
        name, at = self.half.get(self.places.get(_place(x)) or -1, ("", -1))
        _need(name == "relu", "square")
        return self.activation("relu2", y, at)

    def product(self, y: Tensor, a: Any, b: Any) -> Tensor:
        name, at = self.half.get(self.places.get(_place(a)) or -1, ("", -1)) if isinstance(a, Tensor) else ("", -1)
        _need(name == "silu", "mul")
        other = self.whole(b)
        _need(other != at and self.widths[other] == self.widths[at] and y.numel() == b.numel() == a.numel(), "mul")
        return self.activation("swiglu", y, at, other)

    def attention(self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout: float = 0.0,
                  causal: bool = False, *, scale: Any = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        at, (B, H, T, D), G = self.places.get(_place(q)), q.shape, k.size(1)
        _need(at is not None and mask is None and not dropout and causal and scale is None, "attention")
        assert at is not None
        width, ends = self.widths[at], (0, H * D, (H + G) * D, (H + 2 * G) * D)
        for t, heads, begin in zip((q, k, v), (H, G, G), ends, strict=False):
            lies = (
                t.shape == (B, heads, T, D) and t.stride() == (T * width, D, width, 1) and t.storage_offset() == begin
            )
            _need(lies and self.places.get(_place(t)) == at and at not in self.half, "attention")
        _need(width == ends[-1] and D % WHOLE == 0 and (B, T) == self.ids.shape and H % G == 0, "attention")
        y = y.transpose(1, 2).contiguous().transpose(1, 2)  # the heads side by side
        self.kept.append(y)
        self.add("attention", self.buffer(y, H * D), x=at, outputs=H * D, heads=H, groups=G)
        return y

    def cross_entropy(self, y: Tensor, x: Tensor, targets: Tensor, weight: Any = None, reduction: int = 1,
                      ignored: int = -100, smoothing: float = 0.0) -> Tensor:  # fmt: skip
        at = self.whole(x)
        plain = weight is None and reduction == 1 and ignored == -1 and not smoothing
        given = _place(targets) == _place(self.targets) and targets.is_contiguous()
        _need(plain and given and targets.numel() == self.targets.numel(), "cross_entropy")
        self.add("loss", at, x=at, inputs=x.size(-1))
        self.loss = y
        return y


RULES: dict[Any, Callable[..., Any]] = {
    aten.embedding.default: Recorder.embedding,
    aten.add.Tensor: Recorder.sum,
    aten.layer_norm.default: Recorder.layer_norm,
    aten.rms_norm.default: Recorder.rms_norm,
    aten.linear.default: Recorder.linear,
    aten.gelu.default: Recorder.gelu,
    aten.relu.default: lambda recorder, y, x: recorder.first_half(y, x, "relu"),
    aten.silu.default: lambda recorder, y, x: recorder.first_half(y, x, "silu"),
    aten.square.default: Recorder.square,
    aten.mul.Tensor: Recorder.product,
    aten.scaled_dot_product_attention.default: Recorder.attention,
    aten.cross_entropy_loss.default: Recorder.cross_entropy,
}


def record(model: GPT, ids: Tensor, targets: Tensor) -> Program:
    """The program of a training step on rows of this length. Raises CannotRecord."""
    watch = Watch(model)
    few = slice(0, 2)  # sequences: operations depend on the length only
    recorder = Recorder(ids[few].contiguous(), targets[few].contiguous())
    with unswapped(model), torch.inference_mode(), recorder:  # replacements act differently where nothing is learned
        _, loss = GPT.forward(model, recorder.ids, recorder.targets)
    last = recorder.operations[-1] if recorder.operations else {"kind": -1}
    _need(last["kind"] == KINDS.index("loss") and loss is recorder.loss, "the result is not the loss")
    return Program(recorder, watch)


class Program:
    """The operations with places in memory. A place is an offset in numbers per row."""

    def __init__(self, recorder: Recorder, watch: Watch):
        self.watch, self.parameters, self.tokens = watch, recorder.parameters, recorder.ids.size(1)
        self.operations = operations = recorder.operations
        self.per_row, self.packed, logits, self.widths = 0, 0, operations[-1]["x"], list(recorder.widths)
        self.widths[logits] = -(-self.widths[logits] // WIDE) * WIDE  # only they may be padded
        outputs = [self.widths[o["y"]] for o in operations if KINDS[o["kind"]] == "linear"]
        _need(not any(width % WHOLE for width in self.widths), "a width is not a multiple of 16")
        _need(not any(width % WIDE for width in outputs), "a linear layer's outputs are not a multiple of 32")
        self.values = [0 if i in recorder.half else self._take(width) for i, width in enumerate(self.widths)]
        self.slopes = self._place_slopes(operations, logits)
        for o in operations:
            kind = KINDS[o["kind"]]
            if kind == "linear":
                o["packed"] = self.packed
                self.packed += o["inputs"] * self.widths[o["y"]]
            elif kind in ("norm", "attention"):
                o["kept"] = self._take(2 if kind == "norm" else o["heads"])
        self.gradients, self.numbers = [], 0
        for p in self.parameters:
            self.gradients.append(self.numbers)
            self.numbers += -(-p.numel() // WHOLE) * WHOLE
        first, head = (next(o for o in operations if KINDS[o["kind"]] == kind) for kind in ("tokens", "loss"))
        self.limits = self.parameters[first["weight"]].size(0), head["inputs"]
        self.memory = torch.empty(0)

    def _take(self, width: int) -> int:
        self.per_row += width
        return self.per_row - width

    def _place_slopes(self, operations: list[dict[str, Any]], logits: int) -> list[int]:
        """Where the gradient of each buffer is. Backward overwrites one that is not there yet, and adds to others."""
        places = [0] * len(self.widths)
        found: dict[int, int] = {logits: self.values[logits]}  # of buffers whose gradient is there and not used yet
        free: dict[int, list[int]] = {}
        for o in reversed(operations[:-1]):
            kind, y = KINDS[o["kind"]], o["y"]
            _need(y in found, "a result is not used")
            place = places[y] = found.pop(y)
            for name, add in (("other", "add_other"), ("x", "add")):
                b = o[name]
                if b < 0 or b == y:
                    continue
                others = [found[i] for i in found if i != b]
                if b in found:
                    _need(found[b] not in others and kind not in ("activation", "attention"), "a gradient is shared")
                    o[add] = 1
                elif kind == "add":
                    found[b], o[add] = place, -1
                else:
                    spare = free.get(self.widths[b], [])
                    found[b], o[add] = spare.pop() if spare else self._take(self.widths[b]), 0
                places[b] = found[b]
            if place not in found.values():
                free.setdefault(self.widths[y], []).append(place)
        _need(not found, "a gradient is not used")
        return places

    def run(self, ids: Tensor, targets: Tensor) -> tuple[float, Tensor]:
        """The loss and all gradients in one tensor."""
        kernel, threads = load_kernel(), torch.get_num_threads()
        assert isinstance(kernel, Kernel)
        batch = ids.size(0)
        shares = min(threads, batch)
        few = max(1, min(ROWS // self.tokens, -(-batch // shares)))
        rows = few * self.tokens
        room = DEEP * (WIDE + max(self.widths) + WIDE)
        at = lambda place: room + -(-rows // 16) * 16 * place  # noqa: E731
        size = at(self.per_row)
        needed = shares * size + self.packed + (shares - 1) * self.numbers
        if self.memory.numel() != needed:
            self.memory = torch.empty(needed)
        gradients = torch.empty(self.numbers)
        operations = (_Operation * len(self.operations))()
        for made, o in zip(operations, self.operations, strict=True):
            for name, value in o.items():
                setattr(made, name, at(value) if name == "kept" else value)
        buffers = (_Buffer * len(self.widths))()
        for i, width in enumerate(self.widths):
            buffers[i] = _Buffer(at(self.values[i]), at(self.slopes[i]), width)
        parameters = (_Parameter * len(self.parameters))()
        for i, p in enumerate(self.parameters):
            parameters[i] = _Parameter(p.data_ptr(), self.gradients[i])
        losses = (ctypes.c_double * shares)()
        memory = self.memory.data_ptr()
        packed = memory + 4 * shares * size
        job = _Tape(
            ctypes.addressof(operations), ctypes.addressof(buffers), ctypes.addressof(parameters), ids.data_ptr(),
            targets.data_ptr(), gradients.data_ptr(), packed + 4 * self.packed, memory, packed,
            ctypes.addressof(losses), len(operations), batch, self.tokens, few, size, self.numbers, 0, shares,
            kernel.has_avx512, 0, 0,
        )  # fmt: skip
        wrong = kernel.layers.train(ctypes.addressof(job), *self.limits, threads)
        if wrong:
            raise MemoryError if wrong == 1 else IndexError("a token or target is out of range")
        return sum(losses) / job.learned if job.learned else float("nan"), gradients


class RecordedGPT(GPT):
    """A GPT whose training step is one call in C. All else, and a step that cannot be recorded, is GPT's."""

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Any = None, logits_at: Tensor | None = None
    ) -> tuple[Any, Tensor | None]:
        program = None
        if targets is not None and cache is None and torch.is_grad_enabled():
            program = _program(self, idx, targets)
        if program is None:
            return super().forward(idx, targets, cache, logits_at)
        return None, _Step.apply(program, idx, targets, *program.parameters)


_programs: Any = weakref.WeakKeyDictionary()  # model -> {tokens of a row: its program; None: it cannot be recorded}


def _program(model: GPT, ids: Tensor, targets: Tensor) -> Program | None:
    plain = all(t.dtype == torch.int64 and t.is_cpu and t.is_contiguous() and t.dim() == 2 for t in (ids, targets))
    if not plain or ids.shape != targets.shape or not ids.numel() or torch.is_autocast_enabled("cpu"):
        return None
    known, tokens = _programs.setdefault(model, {}), ids.size(1)
    if tokens not in known or (known[tokens] is not None and not known[tokens].watch.is_same()):
        try:
            known[tokens] = record(model, ids, targets)
        except CannotRecord:
            if known.setdefault(tokens) is not None:  # perhaps for a few steps, such as by hooks
                return None
    found = known[tokens]
    return found if found is None or all(p.requires_grad for p in found.parameters) else None


def why_not(model: GPT) -> str | None:
    """Why a training step of the model cannot be recorded; None if it can."""
    ids = torch.zeros((1, model.config.block_size), dtype=torch.int64)
    try:
        record(model, ids, ids)
    except CannotRecord as error:
        return str(error)
    return None


class _Step(torch.autograd.Function):
    """The loss of a program, whose gradients are computed with it."""

    @staticmethod
    def forward(ctx: Any, program: Program, ids: Tensor, targets: Tensor, *parameters: Tensor) -> Tensor:
        loss, ctx.gradients = program.run(ids, targets)
        ctx.program = program
        return torch.tensor(loss)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "retain_graph: a recorded step has one backward pass; call kernels.swap.unswap(model) first"
            )
        flat, ctx.gradients = ctx.gradients if grads[0] == 1 else ctx.gradients.mul_(grads[0]), None
        places = zip(ctx.program.parameters, ctx.program.gradients, strict=True)
        return None, None, None, *(flat[at : at + p.numel()].view(p.shape) for p, at in places)
