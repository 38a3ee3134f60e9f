"""generation/likelihoods.py: equal to the naive path, which runs the whole sequence for every token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import ByteTokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation import likelihoods
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.generation.likelihoods import Ids, Likelihoods, Score, families

BLOCK = 24
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "rope, grouped heads": {"pos_embedding": "rope", "n_kv_head": 1, "norm": "rmsnorm", "activation": "swiglu"},
    "n-grams": {"max_ngram": 3, "ngram_rows": 64},
}


def make(**changes: Any) -> Generator:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=256, n_layer=2, n_head=2, n_embd=16, dropout=0.5, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)  # far from uniform
    return Generator(model, ByteTokenizer())


def naive(model: GPT, context: Ids, continuation: Ids) -> Score:
    """One token after another, each predicted from what the harness's hf model shows of the text before it."""
    text = (context + continuation)[-(BLOCK + 1) :]
    total, is_best = 0.0, True
    for at in range(len(text) - len(continuation), len(text)):
        logits = model.eval()(torch.tensor([text[:at]]))[0][0, -1].double()
        total += float(logits.log_softmax(-1)[text[at]])
        is_best = is_best and int(logits.argmax()) == text[at]
    return total, is_best


def questions(seed: int = 0) -> list[tuple[Ids, Ids]]:
    """Contexts with one or several continuations, alone or with a common beginning, short and beyond the context."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> Ids:
        return tuple(rng.randrange(40, 60) for _ in range(rng.randint(low, high)))

    pairs = []
    for beginning in ((), (), (), text(17, 17), text(40, 40)):
        for _ in range(4):
            context = beginning + text(1, 6 if len(beginning) < 20 else 3)
            pairs += [(context, text(1, 1)) for _ in range(2)]
            pairs += [(context, text(1, 7)) for _ in range(rng.randint(0, 3))]
    pairs += [(text(1, 2), text(20, BLOCK)) for _ in range(3)]
    pairs += [pairs[3], pairs[-1]]  # asked twice
    rng.shuffle(pairs)
    return pairs


@pytest.mark.parametrize(
    "shape", [pytest.param(name, marks=() if name == "rope, grouped heads" else pytest.mark.slow) for name in SHAPES]
)
@torch.no_grad()
def test_scores_equal_whole_sequences(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, pairs = make(**SHAPES[shape]), questions()
    with torch.no_grad():  # some continuations are what the model finds most likely
        for i in range(0, len(pairs), 3):
            context, continuation = pairs[i]
            best = int(generator.model.eval()(torch.tensor([context[-BLOCK:]]))[0][0, -1].argmax())
            pairs[i] = context, (best,)
    expected = [naive(generator.model, *pair) for pair in pairs]
    assert 5 < sum(is_best for _, is_best in expected) < len(pairs)
    generator.model.train()
    monkeypatch.setattr(likelihoods, "WORTH_A_PASS", 16)
    for tokens, rows in ((4096, None), (60, None), (4096, 1), (4096, 3)):
        monkeypatch.setattr(likelihoods, "PASS_TOKENS", tokens)
        found = Likelihoods(generator, rows).scores(pairs)
        assert [best for _, best in found] == [best for _, best in expected]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-5)
    assert generator.model.training


def test_a_shared_beginning_and_a_shared_context_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, beginning = make(), tuple(range(12))
    contexts = [(*beginning, *range(at, at + 3)) for at in (100, 110, 120)]
    pairs = [(context, (at, at + 1)) for context in contexts for at in (30, 40, 50, 60)]
    read, sizes = generator.decoder.read, []

    def watch(ids: torch.Tensor, *more: Any) -> torch.Tensor:
        sizes.append(tuple(ids.shape))
        return read(ids, *more)

    monkeypatch.setattr(generator.decoder, "read", watch)
    monkeypatch.setattr(likelihoods, "LEAST_SHARED", 12)
    monkeypatch.setattr(likelihoods, "WORTH_A_PASS", 24)
    Likelihoods(generator).scores(pairs)
    assert sizes == [(1, 12), (3, 3), (12, 1)]


def test_a_model_without_a_cache_reads_whole_sequences_without_padding() -> None:
    generator, pairs = make(), questions()[:12]
    expected = Likelihoods(generator).scores(pairs)
    generator.decoder.cacheable = False
    found = Likelihoods(generator).scores(pairs)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-5)


def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, pairs = make(), questions()
    expected, read = Likelihoods(generator).scores(pairs), generator.decoder.read

    def small(ids: torch.Tensor, *more: Any) -> torch.Tensor:
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return read(ids, *more)

    monkeypatch.setattr(generator.decoder, "read", small)
    few = [pair for pair in pairs if len(pair[1]) == 1]
    found = Likelihoods(generator).scores(few)
    assert [score for score, _ in found] == pytest.approx([expected[pairs.index(pair)][0] for pair in few], abs=2e-5)
    monkeypatch.setattr(generator.decoder, "read", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        Likelihoods(generator).scores(few)


def test_a_continuation_beyond_the_context_is_refused() -> None:
    generator = make()
    assert len(Likelihoods(generator).scores([((1, 2, 3), tuple(range(BLOCK)))])) == 1
    with pytest.raises(UserError, match=f"a continuation has {BLOCK + 1} tokens, more than block_size={BLOCK}"):
        Likelihoods(generator).scores([((1,), tuple(range(BLOCK + 1)))])
    assert Likelihoods(generator).scores([]) == []


def test_families_of_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihoods, "LEAST_SHARED", 3)
    monkeypatch.setattr(likelihoods, "WORTH_A_PASS", 6)
    a, b, c = (1, 2, 3, 4), (1, 2, 3, 5, 6), (1, 2, 3)
    assert families([a, (7,), b, (1, 2, 3, 9)]) == [(0, [(7,)]), (3, [a, b, (1, 2, 3, 9)])]
    assert families([a, b]) == [(0, [a, b])], "three tokens saved are not worth a pass"
    assert families([c, a, b]) == [(0, [c, a, b])], "two tokens: the last of c is its own"
    assert families([]) == []


def test_work_may_be_ended_before_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihoods, "PASS_TOKENS", 16)
    calls = []

    def end() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Likelihoods(make(), before_batch=end).scores(questions())
    assert len(calls) == 3
