"""Records the operations of a training step's forward pass for tape.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import CannotRecord
from .layers import ACTIVATIONS

aten = torch.ops.aten
WHOLE = 16  # a width is a multiple of it
KINDS = ("tokens", "places", "add", "norm", "linear", "activation", "attention", "loss")


def _place(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def need(fits: bool, what: str) -> None:
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
        self.refused: CannotRecord | None = None  # the first time; forward may have caught it
        self.kept: list[Any] = []  # so that memory is not used again

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._note(func, args, kwargs or {})
        except CannotRecord as error:
            self.refused = self.refused or error
            raise

    def _note(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        self.kept.append(found)
        known, results = tensors((args, kwargs)), tensors(found)
        drawn = torch.Tag.nondeterministic_seeded in func.tags and func not in (*RULES, aten.dropout.default)
        need(bool(results) and not drawn and not func._schema.is_mutable, f"the kernel lacks {func}")
        if not any(isinstance(t, nn.Parameter) or _place(t) in self.places for t in known):
            return found  # a constant
        if func in RULES:
            return RULES[func](self, found, *args, **kwargs)
        is_view = all(_place(t) in self.places for t in results)
        is_same = found is args[0] and isinstance(found, nn.Parameter)  # a weight in its own dtype
        need(is_view or is_same, f"the kernel lacks {func}")
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
        need(isinstance(t, Tensor) and t.is_contiguous(), "an operand is not a list of rows")
        at = self.places.get(_place(t))
        need(at is not None and at not in self.half and t.dtype == torch.float32, "an operand is not a list of rows")
        assert at is not None
        fits = t.numel() == self.rows[at] * self.widths[at] and t.size(-1) == self.widths[at]
        need(fits, "an operand is not a list of rows")
        return at

    def parameter(self, t: Any, *shape: int) -> int:
        if t is None:
            return -1
        fits = isinstance(t, nn.Parameter) and t.requires_grad and t.is_contiguous() and t.dtype == torch.float32
        need(fits and tuple(t.shape) == shape and t.is_cpu, "a weight is not a trained parameter")
        for at, p in enumerate(self.parameters):
            if p is t:
                return at
        self.parameters.append(t)
        return len(self.parameters) - 1

    # --- operations ---

    def embedding(self, y: Tensor, weight: Tensor, ids: Tensor, *more: Any, **rest: Any) -> Tensor:
        need(not any(more[1:]) and not rest and (not more or more[0] == -1) and ids.is_contiguous(), "embedding")
        T, width = self.ids.size(1), weight.size(1)
        table = self.parameter(weight, *weight.shape)
        need(width % WHOLE == 0, "a width is not a multiple of 16")
        if _place(ids) == _place(self.ids):
            need(ids.numel() == self.ids.numel(), "embedding")
            self.add("tokens", self.buffer(y, width), weight=table)
        else:
            need(ids.numel() == T and bool((ids.flatten() == torch.arange(T)).all()), "embedding")
            self.add("places", self.buffer(y, width, T), weight=table)
        return y

    def sum(self, y: Tensor, a: Any, b: Any, alpha: float = 1) -> Tensor:
        both = [self.whole(t) for t in (a, b)]
        need(alpha == 1 and both[0] != both[1] and len({self.widths[i] for i in both}) == 1, "add")
        need(y.numel() == self.ids.numel() * self.widths[both[0]], "add")
        self.add("add", self.buffer(y, self.widths[both[0]]), x=both[0], other=both[1])
        return y

    def norm(self, y: Tensor, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float, is_centred: int) -> Tensor:
        at, width = self.whole(x), x.size(-1)
        need(len(shape) == 1 and width % WHOLE == 0 and weight is not None, "a norm")
        weight, bias = self.parameter(weight, width), self.parameter(bias, width)
        self.add(
            "norm", self.buffer(y, width), x=at, inputs=width, weight=weight, bias=bias, epsilon=eps, which=is_centred
        )
        return y

    def layer_norm(self, y: Tensor, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
                   *rest: Any) -> Tensor:  # fmt: skip
        return self.norm(y, x, shape, weight, bias, eps, 1)

    def rms_norm(self, y: Tensor, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        need(eps is not None, "a norm")
        return self.norm(y, x, shape, weight, None, eps or 0.0, 0)

    def linear(self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        at, (outputs, inputs) = self.whole(x), weight.shape
        need(inputs == x.size(-1) and inputs % WHOLE == 0, "a linear layer")
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
        need(name == "relu", "square")
        return self.activation("relu2", y, at)

    def product(self, y: Tensor, a: Any, b: Any) -> Tensor:
        name, at = self.half.get(self.places.get(_place(a)) or -1, ("", -1)) if isinstance(a, Tensor) else ("", -1)
        need(name == "silu", "mul")
        other = self.whole(b)
        need(other != at and self.widths[other] == self.widths[at] and y.numel() == b.numel() == a.numel(), "mul")
        return self.activation("swiglu", y, at, other)

    def attention(self, y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout: float = 0.0,
                  causal: bool = False, *, scale: Any = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        at, (B, H, T, D), G = self.places.get(_place(q)), q.shape, k.size(1)
        need(at is not None and mask is None and not dropout and causal and scale is None, "attention")
        assert at is not None
        width, ends = self.widths[at], (0, H * D, (H + G) * D, (H + 2 * G) * D)
        for t, heads, begin in zip((q, k, v), (H, G, G), ends, strict=False):
            lies = (
                t.shape == (B, heads, T, D) and t.stride() == (T * width, D, width, 1) and t.storage_offset() == begin
            )
            need(lies and self.places.get(_place(t)) == at and at not in self.half, "attention")
        need(width == ends[-1] and D % WHOLE == 0 and (B, T) == self.ids.shape and H % G == 0, "attention")
        y = y.transpose(1, 2).contiguous().transpose(1, 2)  # the heads side by side
        self.kept.append(y)
        self.add("attention", self.buffer(y, H * D), x=at, outputs=H * D, heads=H, groups=G)
        return y

    def cross_entropy(self, y: Tensor, x: Tensor, targets: Tensor, weight: Any = None, reduction: int = 1,
                      ignored: int = -100, smoothing: float = 0.0) -> Tensor:  # fmt: skip
        at = self.whole(x)
        plain = weight is None and reduction == 1 and ignored == -1 and not smoothing
        given = _place(targets) == _place(self.targets) and targets.is_contiguous()
        need(plain and given and targets.numel() == self.targets.numel(), "cross_entropy")
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
