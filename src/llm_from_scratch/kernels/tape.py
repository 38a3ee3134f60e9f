"""A model's training step as one call in C (tape.c), recorded from its own forward.

GPT.forward runs once under a dispatch mode that notes the operations, from the token ids to the loss. If tape.c has all
of them, a step computes the loss and all gradients in C: threads share the sequences and do not wait for each other at
every operation, and the activations of a few sequences stay in the processor's cache. If it lacks one, as after an edit
of core/model.py, GPT's own forward runs.

The record shows operations only. So forward must not depend on anything else that may differ in the next step: Watch
refuses code that could, and notices a changed attribute.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.model import GPT
from ..errors import CannotRecord, one_line
from ..machine.device import forked_random
from .compiled import Kernel, load_kernel
from .once import differentiable_once
from .purity import Watch
from .step_recorder import KINDS, WHOLE, Recorder, need
from .swap import kept_buffers, unswapped

DEEP, WIDE = 256, 32  # of tape.c: rows and columns of a panel
ROWS = 192  # tokens that a thread processes at once
ALLOWED, TINY = 1e-4, 1e-7  # difference from the model's own gradients, relative to them and in itself


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


def record(model: GPT, ids: Tensor, targets: Tensor) -> Program:
    """The program of a training step on a batch of this shape. Raises CannotRecord."""
    watch = Watch(model)
    recorder = Recorder(ids.clone(), targets.clone())  # known by their memory, which a trainer's may share
    with unswapped(model), torch.inference_mode(), recorder:  # replacements act differently where nothing is learned
        _, loss = GPT.forward(model, recorder.ids, recorder.targets)
    if recorder.refused is not None:  # and forward continued, as with `except Exception`
        raise recorder.refused
    last = recorder.operations[-1] if recorder.operations else {"kind": -1}
    need(last["kind"] == KINDS.index("loss") and loss is recorder.loss, "the result is not the loss")
    return Program(recorder, watch)


class Program:
    """The operations with places in memory. A place is an offset in numbers per row."""

    def __init__(self, recorder: Recorder, watch: Watch):
        self.watch, self.parameters, self.tokens = watch, recorder.parameters, recorder.ids.size(1)
        self.shapes, self.lock = [p.shape for p in self.parameters], threading.Lock()
        self.operations = operations = recorder.operations
        self.per_row, self.packed, logits, self.widths = 0, 0, operations[-1]["x"], list(recorder.widths)
        self.widths[logits] = -(-self.widths[logits] // WIDE) * WIDE  # only they may be padded
        outputs = [self.widths[o["y"]] for o in operations if KINDS[o["kind"]] == "linear"]
        need(not any(width % WHOLE for width in self.widths), "a width is not a multiple of 16")
        need(not any(width % WIDE for width in outputs), "a linear layer's outputs are not a multiple of 32")
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
        tables = [self.parameters[o["weight"]] for o in operations if KINDS[o["kind"]] == "tokens"]
        need(bool(tables), "the loss does not depend on the tokens")
        self.limits = min(map(len, tables)), operations[-1]["inputs"]
        self.memory = _empty(0)

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
            need(y in found, "a result is not used")
            place = places[y] = found.pop(y)
            for name, add in (("other", "add_other"), ("x", "add")):
                b = o[name]
                if b < 0 or b == y:
                    continue
                others = [place, *(found[i] for i in found if i != b)]  # operands of a sum have one place
                if b in found:
                    need(found[b] not in others and kind not in ("activation", "attention"), "a gradient is shared")
                    o[add] = 1
                elif kind == "add":
                    found[b], o[add] = place, -1
                else:
                    spare = free.get(self.widths[b], [])
                    found[b], o[add] = spare.pop() if spare else self._take(self.widths[b]), 0
                places[b] = found[b]
            if place not in found.values():
                free.setdefault(self.widths[y], []).append(place)
        need(not found, "a gradient is not used")
        return places

    def split(self, flat: Tensor) -> list[Tensor]:
        """The gradients of the parameters, from run()."""
        places = zip(self.parameters, self.gradients, strict=True)
        return [flat[at : at + p.numel()].view(p.shape) for p, at in places]

    def fits(self) -> bool:
        """Whether C can read the parameters as they are now."""
        return all(
            p.requires_grad and p.is_cpu and p.dtype == torch.float32 and p.shape == shape and p.is_contiguous()
            for p, shape in zip(self.parameters, self.shapes, strict=True)
        )

    def run(self, ids: Tensor, targets: Tensor) -> tuple[float, Tensor]:
        """The loss and all gradients in one tensor."""
        with self.lock:
            return self._run(ids, targets)

    def _run(self, ids: Tensor, targets: Tensor) -> tuple[float, Tensor]:
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
            self.memory = _empty(needed)
        gradients = _empty(self.numbers)
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


def _empty(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")


class RecordedGPT(GPT):
    """A GPT with its training step as one call in C. All else, and a step that cannot be recorded, is GPT's."""

    def forward(self, idx: Tensor, targets: Tensor | None = None, *more: Any, **named: Any) -> tuple[Any, Any]:
        program = None
        if targets is not None and not more and not named and torch.is_grad_enabled():
            idx, targets = idx.contiguous(), targets.contiguous()
            program = _program(self, idx, targets)
        if program is None:
            return super().forward(idx, targets, *more, **named)
        return None, _Step.apply(program, idx, targets, *program.parameters)


class _Programs(dict[tuple[int, int], Program | None]):
    """The programs of a model: (rows, tokens) of a batch -> program; None: it cannot be recorded."""

    say: Any = None  # of report_to()


_programs: Any = weakref.WeakKeyDictionary()  # model -> its _Programs
MOST = 8  # programs of a model, of which each has memory


def _program(model: GPT, ids: Tensor, targets: Tensor) -> Program | None:
    plain = all(t.dtype == torch.int64 and t.is_cpu and t.is_contiguous() and t.dim() == 2 for t in (ids, targets))
    if not plain or ids.shape != targets.shape or not ids.numel() or torch.is_autocast_enabled("cpu"):
        return None
    known, shape = _programs.setdefault(model, _Programs()), (ids.size(0), ids.size(1))
    program = known.get(shape)
    if shape not in known or (program is not None and not program.watch.is_same(model)):
        try:
            if len(known) >= MOST and shape not in known:
                known.clear()
            program = known[shape] = _compared(record(model, ids, targets), model, ids, targets)
        except CannotRecord as error:
            known.setdefault(shape)  # an old program stays: perhaps for a few steps, such as by hooks
            _report(known, str(error))
            return None
    if program is not None and not program.fits():
        _report(known, "a weight is not a trained parameter, or has another type")
        return None
    return program


def report_to(model: GPT, say: Callable[[str], None]) -> None:
    """Where to report that a step is no longer recorded, once."""
    found: Any = weakref.WeakMethod(say) if inspect.ismethod(say) else lambda: say  # a run holds the model
    _programs.setdefault(model, _Programs()).say = found


def _report(known: _Programs, reason: str) -> None:
    reference, known.say = known.say, None
    if reference is not None and (say := reference()) is not None:
        say(f"training with torch from now on: the step cannot be recorded ({reason})")


@contextlib.contextmanager
def _drawn(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters with random numbers, for a while: a weight of 0 would hide the gradients before it."""
    random, own = torch.Generator().manual_seed(0), [p.data for p in parameters]
    try:
        for p in parameters:
            drawn = torch.randn(p.shape, generator=random, dtype=torch.float32, device="cpu")
            p.data = (drawn / math.sqrt(p.size(-1)) if p.dim() > 1 else 1 + drawn / 4).to(p.dtype)
        yield
    finally:
        for p, data in zip(parameters, own, strict=True):
            p.data = data


def _compared(program: Program, model: GPT, ids: Tensor, targets: Tensor) -> Program:
    """The program, if its loss and gradients are the model's own, with random weights. Raises CannotRecord."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    need(program.fits(), "a weight is not a trained parameter")
    with _drawn(parameters), torch.enable_grad():
        loss = GPT.forward(model, ids, targets)[1]
        assert loss is not None
        expected = torch.autograd.grad(loss, parameters, allow_unused=True)
        found, flat = program.run(ids, targets)
    own = {id(p): g for p, g in zip(program.parameters, program.split(flat), strict=True)}
    pairs = [(own.get(id(p)), g) for p, g in zip(parameters, expected, strict=True)]
    same = abs(found - loss.item()) <= ALLOWED * max(1.0, abs(found)) and all(
        (a is None) == (b is None) for a, b in pairs
    )
    same = same and all(
        bool((a - b).norm() <= ALLOWED * b.norm() + TINY) for a, b in pairs if a is not None and b is not None
    )
    need(same, "the kernel's loss or gradients differ")
    return program


def why_not(model: GPT, rows: int = 2, tokens: int | None = None) -> str | None:
    """The reason that a training step on a batch of this shape cannot be recorded; None if it can."""
    ids, targets = _batch(model, rows, tokens)
    modes = [(m, m.training) for m in model.modules()]
    try:
        with forked_random(torch.device("cpu")), kept_buffers(model):
            model.train()
            _compared(record(model, ids, targets), model, ids, targets)
    except Exception as error:
        return one_line(error)
    finally:
        for module, mode in modes:
            module.training = mode
    return None


def _batch(model: GPT, rows: int, tokens: int | None) -> tuple[Tensor, Tensor]:
    random, shape = torch.Generator().manual_seed(0), (rows, tokens or model.config.block_size)
    known = len(model.lm_head.weight)
    ids, targets = (torch.randint(known, shape, generator=random, device="cpu") for _ in range(2))
    return ids, targets


class _Step(torch.autograd.Function):
    """The loss of a program. Its gradients are computed with it."""

    @staticmethod
    def forward(ctx: Any, program: Program, ids: Tensor, targets: Tensor, *parameters: Tensor) -> Tensor:
        loss, ctx.gradients = program.run(ids, targets)
        ctx.program = program
        return torch.tensor(loss, dtype=torch.float32, device="cpu")

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "retain_graph: a recorded step has one backward pass; call kernels.swap.unswap(model) first"
            )
        flat, ctx.gradients = ctx.gradients if grads[0] == 1 else ctx.gradients.mul_(grads[0]), None
        return None, None, None, *ctx.program.split(flat)
