"""Records GPT.forward for one token per row as a flat function with the same result, which is faster
(flat_function.py).

A decode step of a small model is bound by Python and by the dispatch of operations, not by arithmetic. So the model's
own forward runs once under a dispatch mode that records every operation. The recorder sees only operations, so an
edited model is recorded as well as the original.

A record is valid for one number of rows and one window of the cache. Python code that reads numbers from tensors,
random numbers, and writes to the model's own tensors raise CannotRecord. The caller compares every new record with the
model's own forward (decode_step.py), because Python code may also depend on things that no operation shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.cache import KVCache
from ..core.model import GPT
from ..errors import CannotRecord
from .flat_function import MakeProduct, Node, Value, Var, Writer, aten, storage, swap, tensors, update_cache
from .window import StandIn, Window


class Tape(TorchDispatchMode):
    """Records operations. Products of linear layers are skipped and return zeros, because only shapes are needed."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.nodes: list[Node] = []
        self.kept: list[Tensor] = []  # so that identities stay unique
        self.inputs, self.varying = inputs, {id(t) for t in inputs}
        self.origin: dict[int, Tensor] = {}  # weights in another dtype, by identity of the tensors in their place

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not aten.linear.default and self.origin:
            args = swap(args, self._converted)
        given = {id(t) for t in tensors((args, tuple(kwargs.values())))}
        if func is aten.to.dtype and isinstance(args[0], torch.nn.Parameter) and args[0].dtype != args[1]:
            stand_in = torch.zeros((), dtype=args[1], device=args[0].device).expand(args[0].shape)
            self.origin[id(stand_in)] = args[0]  # a linear layer's product converts it once for all records
            self.kept.append(stand_in)
            return stand_in
        varies = not given.isdisjoint(self.varying)
        if varies and func is aten.linear.default and id(args[1]) not in self.varying:
            out = args[0].new_zeros((*args[0].shape[:-1], args[1].size(0)))
        else:
            out = func(*args, **kwargs)
        outs = list(tensors(out))
        if varies and not outs and out is not None:
            raise CannotRecord(f"Python code reads numbers out of tensors ({func})")
        if func._schema.is_mutable:
            varies = self._write(kwargs.get("out", args[0]), func, varies)
        elif outs and all(id(t) in given for t in outs):
            return out  # dropout in evaluation, `to` the same dtype: nothing happens
        if torch.Tag.nondeterministic_seeded in func.tags and not (func in SEEDED and not any(SEEDED[func](args))):
            raise CannotRecord(f"random numbers are drawn ({func})")
        by_place = func is aten.index.Tensor and not any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
        if varies and torch.Tag.dynamic_output_shape in func.tags and not by_place:
            raise CannotRecord(f"a shape depends on the data ({func})")
        self.note(Node(func, tuple(args), kwargs, outs, varies))
        return out

    def _converted(self, t: Tensor) -> Tensor:
        """The weight itself in the other dtype, if t only represents it."""
        return self.origin[id(t)].to(t.dtype) if id(t) in self.origin else t

    def note(self, node: Node) -> None:
        self.nodes.append(node)
        if node.varies:
            self.varying.update(map(id, node.outs))

    def _write(self, target: Tensor, func: Any, varies: bool) -> bool:
        """Allows an operation to write into a tensor that is created in this step, and again in every replay."""
        place = storage(target)
        makers = [node for node in self.nodes if place in map(storage, node.outs)]
        if not makers or place in map(storage, tensors(makers[0].args)):
            raise CannotRecord(f"a tensor that outlives the step is written to ({func})")
        for node in makers:
            node.varies = True
            self.varying.update(map(id, node.outs))
        return True


# operations that draw random numbers only with a probability above 0
SEEDED: dict[Any, Callable[[Any], Any]] = {
    aten.scaled_dot_product_attention.default: lambda args: args[4:5],
    aten.dropout.default: lambda args: [args[1] and args[2]],
}


@dataclass
class Record:
    """A recorded step: step(ids, lengths, visible, mask, where, tokens, memory, ...) -> logits, (B, V)."""

    step: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    """The same with exact linear layers, if those of step approximate."""
    source: str
    needs: frozenset[str]
    """The parameters that the step reads."""
    checked: bool = False
    """Whether it was compared with the model's own forward."""


PARAMETERS = "ids, lengths, visible, mask, where, tokens, memory, turned, flat, keys, values"


@torch.inference_mode()
def record(model: GPT, cache: KVCache, make_product: MakeProduct) -> Record:
    """The decode step of the model for the cache's rows and window. Raises CannotRecord."""
    window, ragged = Window.of(cache), cache.ragged
    # not the values of the next step: if Python code reads them, the comparison shows it
    ids, lengths = torch.zeros_like(cache.lengths), (cache.lengths - 1).clamp_(min=0)
    end = int(lengths.max())
    visible, mask = window.visible(lengths, ragged), window.mask(lengths, end, ragged)
    where = window.where(lengths)
    idx, shown = ids[:, None], visible[:, None, None]
    positions = lengths[:, None] if ragged else lengths[:1]
    tape = Tape([idx, positions, shown, window.tokens, *window.keys, *window.values])

    def on_update(layer: int, k: Tensor, v: Tensor) -> None:
        if k.size(2) != 1 or k.dtype != cache.kv.dtype or v.dtype != cache.kv.dtype:
            raise CannotRecord(f"keys of {k.size(2)} tokens in {k.dtype} do not fit the cache")
        tape.note(Node(update_cache, (k, v, layer), {}, [], True))

    stand_in: Any = StandIn(window, positions, shown, window.tokens, on_update)
    with tape:
        logits = model(idx, cache=stand_in)[0]
    writer = Writer(tape.nodes, tape.origin, logits, window, make_product)
    writer.mask, writer.additive, writer.where = shown, Var("mask", mask), Var("where", where)
    writer.layers = {id(k): layer for layer, k in enumerate(window.keys)}
    for name, memory, view in (
        ("ids", ids, idx),
        ("lengths", lengths, positions),
        ("visible", visible, shown),
        ("tokens", window.tokens, window.tokens),
        *((f"keys[{i}]", k, k) for i, k in enumerate(window.keys)),
        *((f"values[{i}]", v, v) for i, v in enumerate(window.values)),
    ):
        writer.values[id(view)] = Value(Var(name, memory), view)
    writer.write()
    source = f"def step({PARAMETERS}):\n    " + "\n    ".join(writer.lines) + "\n"
    code = compile(source, "<decode step>", "exec")

    needs = frozenset(name for name in PARAMETERS.split(", ") if re.search(rf"\b{name}\b", source.partition("\n")[2]))

    def function(constants: dict[str, Any]) -> Callable[..., Tensor]:
        exec(code, constants)  # source generated above from names of operations and numbers
        return constants["step"]

    exact = function({**writer.constants, **writer.exact})
    return Record(function(writer.constants) if writer.exact else exact, exact, source, needs)
