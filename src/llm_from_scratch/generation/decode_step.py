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
from .cuda_graphs import GraphedStep
from .recorder import Record, record
from .window import Window

MOST = 256  # records; one more replaces the oldest
TRIAL = 24  # tokens


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

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids: (B,), the newest token of each row. Stores its keys and values; returns logits, (B, V)."""
        if cache.end >= cache.max_len:
            raise ValueError(f"{cache.end} cached + 1 new tokens exceed the cache's max_len={cache.max_len}")
        window = Window.of(cache, whole=self.compiled)  # a growing window would be compiled again
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

    def own(self, ids: Tensor, cache: KVCache, exact: bool = False) -> Tensor:
        """The same step by the model's own forward."""
        with self.linears.computing(exact):
            return self.model(ids[:, None], cache=cache)[0][:, -1]

    def _checked(self, found: Record | None, ids: Tensor, cache: KVCache) -> Record | None:
        """A record that agrees with the model's own forward on these tokens, or None."""
        if self.failure is not None:
            return None
        try:
            if found is None:
                found = record(self.model, ids, cache, self.linears)
                if self.compiled:
                    found.step = torch.compile(found.step)
                while len(self.records) >= MOST:
                    self.records.pop(next(iter(self.records)))
                if found.program in self.programs:
                    return found
            window = Window.of(cache, whole=self.compiled)
            expected = self.own(ids, cache, exact=True)
            logits = found.exact(*window.inputs(ids, cache, found.needs), *window.parts)
        except Exception as error:
            reason = str(error) if isinstance(error, CannotRecord) else f"{type(error).__name__}: {error}"
            self._fail(one_line(reason))
            return None
        if not expected.isfinite().all():  # an error in the model, which the caller reports
            return None
        if not near(logits, expected):
            self._fail("its record gives different logits")
            return None
        # without a masked key, code that confuses the size of the window with the length would pass
        if cache.end + 1 < window.size:
            self.programs.add(found.program)
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
