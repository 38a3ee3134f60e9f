"""generation/speculative.py: proposals change the time, never the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation.generator import Decoder, Generator
from llm_from_scratch.generation.speculative import Draft, DraftModel, Lookup, SpeculativeBatch

from ..memorised import BLOCK, TEXT, TOKENIZER, memorised, ragged_prompts

PARAMS = GenerationConfig(num_samples=1, max_new_tokens=3 * BLOCK, temperature=0.9, top_k=20, frequency_penalty=0.2)


class Oracle:
    """Proposes what comes, with a wrong token now and then."""

    def __init__(self, whole: list[int], wrong_every: int = 0):
        self.whole, self.wrong_every = whole, wrong_every

    def begin(self) -> None:
        self.asked = 0

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        proposed = self.whole[len(tokens) : len(tokens) + n]
        self.asked += 1
        if self.wrong_every and self.asked % self.wrong_every == 0 and proposed:
            proposed[len(proposed) // 2] = (proposed[len(proposed) // 2] + 1) % TOKENIZER.vocab_size
        return proposed


class Nonsense:
    """Proposes ids that are no tokens, too many, or none."""

    def begin(self) -> None:
        pass

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        return [[], [10**6], [1] * n, [TOKENIZER.vocab_size, 3]][len(tokens) % 4]


def draft_model(option: str) -> DraftModel:
    name = TOKENIZER.fingerprint()
    return DraftModel(Decoder(memorised(option)), name, name)


DRAFTS: dict[str, Callable[[], Draft]] = {
    "lookup": lambda: Lookup(3, 1),
    "the model itself": lambda: draft_model("gpt2"),
    "another model": lambda: draft_model("rope"),
    "nonsense": Nonsense,
}


# one prompt of a right draft and of a wrong one; six of every draft among the slow tests
CASES: list[Any] = [("recompute", "lookup", 1), ("drop_half", "nonsense", 1)]
CASES += [pytest.param(o, name, 6, marks=pytest.mark.slow) for o in ("recompute", "drop_half") for name in DRAFTS]


@pytest.mark.cases(1)
@pytest.mark.parametrize(("overflow", "name", "prompts"), CASES)
def test_the_text_equals_decoding_without_proposals(name: str, overflow: Any, prompts: int) -> None:
    """Greedy and drawn, with penalties, past block_size, whole and streamed, text after text with the same draft."""
    plain, fast = (Generator(memorised("gpt2"), TOKENIZER) for _ in range(2))
    fast.draft = DRAFTS[name]()
    for prompt in ragged_prompts(prompts, BLOCK + 3, seed=3):
        for params in (PARAMS, dataclasses.replace(PARAMS, temperature=0.0, stop=(TEXT[40:42],))):
            (expected,) = plain.generate([prompt], params, seed=5, overflow=overflow)
            assert fast.generate([prompt], params, seed=5, overflow=overflow) == [expected]
            assert "".join(fast.stream(prompt, params, seed=5, overflow=overflow)) == expected.text


@pytest.mark.cases(1)
@pytest.mark.parametrize("wrong_every", [0, 1, 3])
def test_right_proposals_save_passes_and_wrong_ones_are_forgotten(wrong_every: int) -> None:
    model, prompt = memorised("modern"), TOKENIZER.encode(TEXT[:3]).tolist()
    steps = BLOCK - len(prompt)
    params = dataclasses.replace(PARAMS, max_new_tokens=steps, temperature=0.0, frequency_penalty=0.0)
    (sample,) = Generator(model, TOKENIZER).generate([prompt], params)
    draft = Oracle(prompt + sample.tokens, wrong_every)
    batch = SpeculativeBatch(Decoder(model), prompt, steps, draft, TOKENIZER.vocab_size)
    drawn = []
    for _ in range(steps):
        ids = batch.logits()[:, : TOKENIZER.vocab_size].argmax(-1)
        batch.append(ids)
        drawn.append(int(ids))
    assert drawn == sample.tokens
    if wrong_every:
        assert batch.wrong >= 1 and 4 < batch.passes < steps + 1
    else:  # the prompt, then 4, 8 and the rest with a token of their own each
        assert batch.wrong == 0 and batch.passes <= 4 and batch.right >= steps - 4


def test_a_text_that_proposals_do_not_fit_is_left_alone() -> None:
    """Passes that read proposals in vain become rare: the time is nearly that without any."""
    model, prompt = memorised("gpt2"), TOKENIZER.encode(TEXT[:1]).tolist()
    steps = BLOCK - 1
    params = dataclasses.replace(PARAMS, max_new_tokens=steps, temperature=0.0, frequency_penalty=0.0)
    (sample,) = Generator(model, TOKENIZER).generate([prompt], params)
    whole = [(token + 1) % TOKENIZER.vocab_size for token in prompt + sample.tokens]  # never right
    batch = SpeculativeBatch(Decoder(model), prompt, steps, Oracle(whole), TOKENIZER.vocab_size)
    for _ in range(steps):
        batch.append(batch.logits()[:, : TOKENIZER.vocab_size].argmax(-1))
    assert batch.history == prompt + sample.tokens
    assert batch.passes == steps and 2 <= batch.wrong <= 4  # rests of 2, 4, 8, 16 tokens between them


def test_lookup_finds_the_longest_run_and_its_latest_place() -> None:
    lookup = Lookup(longest=3, shortest=1)
    assert lookup.propose([1, 2, 3], 4) == []
    assert lookup.propose([1, 2, 3, 9, 2, 3], 2) == [9, 2]
    assert lookup.propose([1, 2, 3, 9, 2, 3, 8, 3], 3) == [8, 3]  # the later of the two places of 3
    assert lookup.propose([1, 2, 3, 9, 2, 3, 8, 3, 1, 2, 3], 2) == [9, 2]  # 1 2 3 goes before 2 3
    lookup.begin()
    assert lookup.propose([5, 6, 7, 3], 3) == []


def test_several_samples_do_without() -> None:
    generator = Generator(memorised("gpt2"), TOKENIZER)
    params = dataclasses.replace(PARAMS, num_samples=3, max_new_tokens=9)
    expected = generator.generate(TEXT[:5], params)
    generator.draft = Nonsense()
    assert generator.generate(TEXT[:5], params) == expected


def test_a_draft_of_another_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="must have the same vocabulary"):
        DraftModel(Decoder(memorised("gpt2")), "one", "two")
