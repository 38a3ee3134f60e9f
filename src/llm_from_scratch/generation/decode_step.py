"""One new token per row, by a record of the model's own forward (recorder.py) if possible.

A record is compared with the model's own forward before it is used, unless it differs from a compared one only in
sizes. If the logits differ, or if the forward cannot be recorded, the model's own forward decodes, and one line reports
it. Records contain constants of the model: after a change of a parameter, create a new DecodeStep.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.cache import KVCache
from ..core.model import GPT
from ..errors import CannotRecord, one_line
from ..kernels.int8 import Linears
from ..kernels.step_recorder import tensors
from .compiled_step import compiled_step
from .cuda_graphs import GraphedStep
from .recorder import PARAMETERS, Record, Recorder, mapped
from .window import StandIn, Window

MOST = 256  # records; one more replaces the oldest
TRIAL = 24  # tokens
LARGE = 1 << 22  # numbers in the residual stream, over all layers: a recording keeps about 16 times as many
aten = torch.ops.aten
INNER = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)  # of the last dimension


class LastToken(Recorder):
    """Records a forward over sequences, (B, T), for the logits of the last token. From the n-th attention on, computes
    this token alone, and expands it, with stride 0, to the shape that the model expects. Raises CannotRecord if tokens
    are mixed after this attention."""

    def __init__(self, linears: Linears, ids: Tensor, n: int):
        super().__init__(linears, {"ids": ids})
        self.T, self.left = ids.size(1), n

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        axis = min(map(self._axis, tensors(args)), default=0)
        alone = axis and not func._schema.is_mutable and (func in INNER or torch.Tag.pointwise in func.tags)
        if func is aten.scaled_dot_product_attention.default and args[5:6] == (True,) and args[0].size(2) == self.T:
            self.left -= 1
            if self.left == 0:
                axis, alone, args = -2, True, (args[0][:, :, -1:], *args[1:5])
        elif alone:
            n = 1 if func in INNER else len(args)  # weights stay whole
            args = (*mapped(args[:n], lambda t: self._last(t, axis)), *args[n:])
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if alone:
            return found.expand([self.T if d == axis else -1 for d in range(-found.ndim, 0)])
        is_last = func in (aten.slice.Tensor, aten.select.int) and args[2] in (-1, self.T - 1)
        if axis and not is_last and not all(map(self._axis, tensors(found))):
            raise CannotRecord(f"tokens are mixed after the last attention ({func})")
        return found

    def _axis(self, t: Tensor) -> int:
        """The dimension of the tokens, counted from the end, of an expanded tensor. 0 for others."""
        each = zip(range(-t.ndim, -1), t.shape, t.stride(), strict=False)
        return next((axis for axis, n, stride in each if n == self.T and stride == self.left == 0), 0)

    def _last(self, t: Tensor, axis: int) -> Tensor:
        return t.narrow(axis, -1, 1) if t.ndim >= -axis and t.size(axis) == self.T else t


def record_last(model: GPT, ids: Tensor, linears: Linears, attention: int) -> Record:
    """attention: number of the last one."""
    try:
        with linears.computing(exact=True), LastToken(linears, ids, attention) as recorder:
            logits = model(ids)[0]
    except (CannotRecord, RuntimeError):
        if attention < 0:
            raise
        return record_last(model, ids, linears, -1)  # all tokens
    return recorder.record(logits[:, -1:], "whole")


@torch.inference_mode()
def record(model: GPT, ids: Tensor, cache: KVCache, linears: Linears) -> Record:
    """The decode step of the model for the cache's rows and window. Raises CannotRecord."""
    window, every = Window.of(cache), PARAMETERS
    values: dict[str, Any] = dict(
        zip(every, (*window.inputs(ids, cache, frozenset(every)), *window.parts), strict=True)
    )
    inputs = {name: t for name, t in values.items() if isinstance(t, Tensor)}
    for name in ("keys", "values", "memory"):  # the last is the one that other views are taken of
        inputs |= {f"{name}[{i}]": t for i, t in enumerate(values[name])}
    shown = inputs["visible"][:, None, None]
    positions = inputs["lengths"][:, None] if cache.ragged else inputs["lengths"][:1]
    recorder = Recorder(linears, inputs)
    stand_in: Any = StandIn(window, positions, shown, inputs["where"])
    with linears.computing(exact=True), recorder:
        logits = model(inputs["ids"][:, None], cache=stand_in)[0]
    logits = recorder.shaped(logits, (-1, logits.size(-1)))
    found = recorder.record(logits, cache.ragged)
    if linears.kernel is not None:
        try:
            found.kernel = compiled_step(recorder, logits, linears.kernel)
        except CannotRecord as error:
            found.lacks = str(error)
    return found


class DecodeStep:
    """The decode step of a model. compiled: use torch.compile; graphed: otherwise, use CUDA graphs on CUDA."""

    def __init__(
        self,
        model: GPT,
        linears: Linears,
        compiled: bool = False,
        graphed: bool = True,
        say: Callable[[str], None] | None = None,
    ):
        self.model, self.linears, self.compiled = model, linears, compiled
        self.say = say or (lambda line: print(line, file=sys.stderr))
        self.graphs = GraphedStep() if graphed and not compiled and linears.device.type == "cuda" else None
        self.records: dict[Any, Record] = {}
        self.programs: set[str] = set()  # compared with the model's own forward
        self.failure: str | None = None
        self.in_kernel = linears.kernel is not None and not compiled

    @torch.inference_mode()
    def last(self, ids: Tensor) -> Tensor:
        """Logits, (B, V), of the last token of whole sequences, (B, T), without a cache."""
        found, config = self.records.get(ids.shape), self.model.config
        if found is None and ids.numel() * config.n_embd * config.n_layer <= LARGE:
            found = self._checked(None, ids, None)
        if found is None:
            return self.own(ids, None)
        self.records[ids.shape] = found
        return found.step(ids)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids: (B,), the newest token of each row. Stores its keys and values; returns logits, (B, V)."""
        if cache.end >= cache.max_len:
            raise ValueError(f"{cache.end} cached + 1 new tokens exceed the cache's max_len={cache.max_len}")
        window = Window.of(cache, self.compiled, self.in_kernel)  # a growing window would be compiled again
        key = window.key, cache.ragged
        found = self.records.get(key)
        if found is None or found.program not in self.programs:
            found = self._checked(found, ids, cache)
            if found is None:
                return self.own(ids, cache)
            self.records[key] = found
        inputs = window.inputs(ids, cache, found.needs)
        if self.graphs is not None:
            return self.graphs(found.step, inputs, window.parts)
        return found.step(*inputs, *window.parts)

    def own(self, ids: Tensor, cache: KVCache | None, exact: bool = False) -> Tensor:
        """The same by the model's own forward."""
        with self.linears.computing(exact):
            return self.model(ids.view(len(ids), -1), cache=cache)[0][:, -1]

    def _checked(self, found: Record | None, ids: Tensor, cache: KVCache | None) -> Record | None:
        """A record that agrees with the model's own forward on these tokens, or None."""
        if self.failure is not None:
            return None
        inputs: tuple[Any, ...] = (ids,)
        partly = True
        try:
            if cache is None:
                found = record_last(self.model, ids, self.linears, self.model.config.n_layer)
            elif found is None:
                found = record(self.model, ids, cache, self.linears)
                if self.compiled:
                    found.step = torch.compile(found.step)
            while len(self.records) >= MOST:
                self.records.pop(next(iter(self.records)))
            if found.program in self.programs:
                return found if cache is None else self._in_kernel(found, ids, cache)
            if cache is not None:
                window = Window.of(cache, self.compiled, self.in_kernel)
                inputs, partly = (*window.inputs(ids, cache, found.needs), *window.parts), cache.end + 1 < window.size
            expected = self.own(ids, cache, exact=True)
            logits = found.exact(*inputs)
        except Exception as error:
            reason = str(error) if isinstance(error, CannotRecord) else f"{type(error).__name__}: {error}"
            self._fail(one_line(reason))
            return None
        if not expected.isfinite().all():  # an error in the model, which the caller reports
            return None
        if not near(logits, expected):
            self._fail("the recorded step's logits differ")
            return None
        # without a masked key, code that confuses the size of the window with the length would pass
        if partly:
            self.programs.add(found.program)
        return found if cache is None else self._in_kernel(found, ids, cache)

    def _in_kernel(self, found: Record, ids: Tensor, cache: KVCache) -> Record:
        """The record with its compiled step, if that gives the same for other tokens: a copy of these would pass."""
        if not self.in_kernel:
            return found
        reason = found.lacks
        if found.kernel is not None:
            window = Window.of(cache, self.compiled, self.in_kernel)
            rest = (*window.inputs(ids, cache, found.needs)[1:], *window.parts)
            others = (ids + 1) % int(self.model.config.vocab_size or 1)
            with self.linears.unrounded():
                same = near(found.kernel(others, *rest), found.step(others, *rest))
            if same:
                found.step = found.kernel
                return found
            reason = "the compiled step's logits differ"
        self.in_kernel = False
        if reason:
            self.say(f"decoding with torch: {reason}")
        return found

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.say(f"decoding with the model's own forward: {reason}")


def near(found: Tensor, expected: Tensor) -> bool:
    allowed = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05
    found, expected = found.float(), expected.float()
    return bool(((found - expected).norm(dim=-1) <= allowed * expected.norm(dim=-1)).all())


@torch.inference_mode()
def works_with_cache(model: GPT, linears: Linears) -> bool:
    """Whether the model's own forward gives the same logits with a cache as over the whole sequence, for a few tokens.

    It does not if, for example, a layer mixes tokens outside attention.
    """
    config, device = model.config, model.lm_head.weight.device
    n = min(TRIAL, config.block_size)
    if n < 4:
        return True
    ids = torch.randint(int(config.vocab_size or 1), (2, n), generator=torch.Generator().manual_seed(0)).to(device)
    training = model.training
    model.eval()
    try:
        with linears.computing(exact=True):
            for lengths in ([n - 2], [n - 2, n - 3]):  # one row, and two of different length
                rows = ids[: len(lengths)]
                cache = KVCache(config, len(rows), n, device, linears.dtype)
                model(rows[:, : n - 2], cache=cache)
                cache.advance(lengths)
                for step in range(2):
                    new = torch.stack([row[length + step] for row, length in zip(rows, lengths, strict=True)])
                    logits = model(new[:, None], cache=cache)[0][:, -1]
                    cache.advance(1)
                for row, length, found in zip(rows, lengths, logits, strict=True):
                    expected = model(row[None, : length + 2])[0][0, -1]
                    if expected.isfinite().all() and not near(found, expected):
                        again = model(row[None, : length + 2])[0][0, -1]
                        return not torch.equal(again, expected)  # random numbers: nothing can be compared
    finally:
        model.train(training)
    return True
