"""Decode steps as CUDA graphs: the hundreds of short kernels of one token are launched together.

A graph replays its recorded kernels on the same memory, so there is one for each number of rows, window size and cache.
Inputs are copied into its memory, and its output is copied out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST = 256  # graphs; one more replaces the oldest


class Recorded:
    """One graph. step: works on tensors only, without host synchronization; inputs: as in later calls."""

    def __init__(self, step: Callable[..., Tensor], inputs: tuple[Any, ...], rest: tuple[Any, ...], pool: Any):
        self.inputs = [None if t is None else t.clone() for t in inputs]
        with torch.cuda.device(inputs[0].device):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                step(*self.inputs, *rest)  # kernels are loaded and workspaces allocated outside the recording
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self.output = step(*self.inputs, *rest)

    def __call__(self, inputs: tuple[Any, ...]) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        self.graph.replay()
        return self.output.clone()


class GraphedStep:
    """Decode steps as graphs, if the number of rows is a power of two. With a graph for every number of rows, a server
    would record all the time. If recording fails, the step runs without a graph."""

    def __init__(self, record: Callable[..., Any] = Recorded):
        self.record, self.pool = record, torch.cuda.graph_pool_handle() if record is Recorded else None
        self.graphs: dict[tuple[Any, ...], Any] = {}
        self.failure: str | None = None

    def __call__(self, step: Callable[..., Tensor], inputs: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
        """step(*inputs, *rest). inputs: ids, (B,), and more that changes from token to token; rest: tokens, a list of
        the memory of each layer, and more that stays."""
        rows, memory = len(inputs[0]), rest[1]
        key = (step, rows, memory[0].shape, memory[0].data_ptr())
        graph = self.graphs.get(key)
        if graph is None and self.failure is None and rows & (rows - 1) == 0:
            if len(self.graphs) >= MOST:
                self.graphs.pop(next(iter(self.graphs)))
            try:
                graph = self.graphs[key] = self.record(step, inputs, rest, self.pool)
            except RuntimeError as error:
                self.failure = str(error)
        return step(*inputs, *rest) if graph is None else graph(inputs)
