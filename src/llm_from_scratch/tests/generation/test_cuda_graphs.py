"""generation/cuda_graphs.py: which steps are recorded, with a recorder that needs no GPU; on a GPU the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.generation import cuda_graphs as graphs
from llm_from_scratch.generation import decode_step as packed
from llm_from_scratch.generation.cuda_graphs import GraphedStep
from llm_from_scratch.generation.decode_step import packed_forward
from llm_from_scratch.generation.generator import Generator

from ..memorised import BLOCK, TOKENIZER, memorised, ragged_prompts

PARAMS = GenerationConfig(num_samples=1, max_new_tokens=BLOCK, temperature=0.0)


class Tape:
    """Plays a step again on the memory that it was recorded on, as a graph does: what is not copied in is stale."""

    def __init__(self, step: Callable[..., Tensor], inputs: list[Tensor], rest: tuple[Any, ...], pool: Any):
        self.step, self.inputs, self.rest, self.played = step, [t.clone() for t in inputs], rest, 0

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.played += 1
        return self.step(*self.inputs, *self.rest)


@pytest.mark.parametrize("option", ["gpt2", "modern"])
def test_recorded_steps_give_the_same_tokens(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave, so that their number is now a power of two and now not; windows grow."""
    monkeypatch.setattr(packed, "BUCKET", 8)
    prompts = ragged_prompts(8, 9, seed=1)
    plain, recorded = (Generator(memorised(option), TOKENIZER) for _ in range(2))
    forward = packed_forward(recorded.model)[0]
    step = forward.step = GraphedStep(forward.step, Tape)  # type: ignore[attr-defined]
    monkeypatch.setattr(recorded, "_packed", (recorded_state(recorded), forward, "recorded"))
    free = plain.generate(prompts, PARAMS)
    stops = tuple(sample.text[at : at + 2] for sample, at in zip(free[:3], (3, 9, 14), strict=True))
    params = GenerationConfig(num_samples=1, max_new_tokens=BLOCK, temperature=0.0, stop=stops)
    assert recorded.generate(prompts, params) == plain.generate(prompts, params)
    assert {key[0] for key in step.graphs} <= {1, 2, 4, 8} and len({key[0] for key in step.graphs}) > 1
    assert all(tape.played > 0 for tape in step.graphs.values()) and len(step.graphs) > 3


def recorded_state(generator: Generator) -> list[tuple[int, int]]:
    return [(p._version, p.data_ptr()) for p in generator.model.parameters()]


def test_where_recording_fails_the_step_runs_as_it_is() -> None:
    calls = []

    def refuse(*arguments: Any) -> Any:
        calls.append(arguments)
        raise RuntimeError("no graphs here")

    step = GraphedStep(lambda x, *rest: x + 1, refuse)
    x, mask, memory = torch.zeros(2, 3), torch.zeros(1, 1, 4), [torch.zeros(8, 2)]
    for _ in range(3):
        out = step(x, torch.zeros(2), torch.zeros(2), mask, memory, [torch.zeros(2, 2, 4)], memory)
        assert torch.equal(out, x + 1)
    assert len(calls) == 1 and step.failure == "no graphs here"


def test_the_oldest_recording_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    step = GraphedStep(lambda x, *rest: x + 1, Tape)
    for size in (4, 8, 12, 16):
        keys = [torch.zeros(1, 2, size)]
        mask, memory = torch.zeros(1, 1, size), [torch.zeros(8, 2)]
        assert step(torch.zeros(1, 3), torch.zeros(1), torch.zeros(1), mask, memory, keys, memory).sum() == 3
    assert [key[1][-1] for key in step.graphs] == [12, 16]


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["gpt2", "modern"])
def test_cuda_graphs_give_the_tokens_of_the_cpu(option: str) -> None:
    import copy

    prompts = ragged_prompts(8, 9, seed=1)
    expected = Generator(memorised(option), TOKENIZER).generate(prompts, PARAMS)
    generator = Generator(copy.deepcopy(memorised(option)), TOKENIZER, "cuda")
    assert generator.generate(prompts, PARAMS) == expected
    step = generator.forward.step  # type: ignore[attr-defined]
    assert step.failure is None and step.graphs
