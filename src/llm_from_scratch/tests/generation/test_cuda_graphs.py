"""generation/cuda_graphs.py: which steps become graphs, with a recorder that needs no GPU; on a GPU the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.generation import cuda_graphs as graphs
from llm_from_scratch.generation import window
from llm_from_scratch.generation.cuda_graphs import GraphedStep
from llm_from_scratch.generation.generator import Generator

from ..memorised import BLOCK, TOKENIZER, memorised, ragged_prompts

PARAMS = GenerationConfig(num_samples=1, max_new_tokens=BLOCK, temperature=0.0)


class Tape:
    """Plays a step again on the memory that it was recorded on, as a graph does: what is not copied in is stale."""

    def __init__(self, step: Callable[..., Tensor], inputs: tuple[Any, ...], rest: tuple[Any, ...], pool: Any):
        self.step, self.rest, self.played = step, rest, 0
        self.inputs = [None if t is None else t.clone() for t in inputs]

    def __call__(self, inputs: tuple[Any, ...]) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        self.played += 1
        return self.step(*self.inputs, *self.rest)


@pytest.mark.parametrize("option", ["modern", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_recorded_steps_give_the_same_tokens(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave, so that their number is now a power of two and now not; windows grow."""
    monkeypatch.setattr(window, "BUCKET", 8)
    prompts = ragged_prompts(8, 9, seed=1)
    plain, recorded = (Generator(memorised(option), TOKENIZER) for _ in range(2))
    step = recorded.decoder.recorded.graphs = GraphedStep(Tape)
    free = plain.generate(prompts, PARAMS)
    stops = tuple(sample.text[at : at + 2] for sample, at in zip(free[:3], (3, 9, 14), strict=True))
    params = GenerationConfig(num_samples=1, max_new_tokens=BLOCK, temperature=0.0, stop=stops)
    assert recorded.generate(prompts, params) == plain.generate(prompts, params)
    assert {key[1] for key in step.graphs} <= {1, 2, 4, 8} and len({key[1] for key in step.graphs}) > 1
    assert all(tape.played > 0 for tape in step.graphs.values()) and len(step.graphs) > 3


def inputs(size: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (torch.zeros(2), None, torch.zeros(1, 1, size)), (None, [torch.zeros(size, 2)])


def test_if_recording_fails_the_step_runs_as_it_is() -> None:
    calls = []

    def refuse(*arguments: Any) -> Any:
        calls.append(arguments)
        raise RuntimeError("no graphs here")

    step = GraphedStep(refuse)
    for _ in range(3):
        assert torch.equal(step(lambda x, *rest: x + 1, *inputs(4)), torch.ones(2))
    assert len(calls) == 1 and step.failure == "no graphs here"


def test_the_oldest_graph_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    step = GraphedStep(Tape)
    for size in (4, 8, 12, 16):
        assert step(lambda x, *rest: x + 1, *inputs(size)).sum() == 2
    assert [key[2][0] for key in step.graphs] == [12, 16]


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["gpt2", "modern"])
def test_cuda_graphs_give_the_tokens_of_the_cpu(option: str) -> None:
    prompts = ragged_prompts(8, 9, seed=1)
    expected = Generator(memorised(option), TOKENIZER).generate(prompts, PARAMS)
    generator = Generator(copy.deepcopy(memorised(option)), TOKENIZER, "cuda")
    assert generator.generate(prompts, PARAMS) == expected
    step = generator.decoder.recorded
    assert step.failure is None and step.graphs is not None
    assert step.graphs.failure is None and step.graphs.graphs
