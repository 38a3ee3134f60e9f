"""generation/engine.py: requests that join and leave get the same result as alone."""

from __future__ import annotations

import copy
import dataclasses
import queue
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_from_scratch.config import GenerationConfig, GPTConfig
from llm_from_scratch.core.cache import KVCache
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import ByteTokenizer, TiktokenTokenizer
from llm_from_scratch.errors import EngineError, UserError
from llm_from_scratch.generation import engine as batcher
from llm_from_scratch.generation.batch import Batch, Prefill
from llm_from_scratch.generation.decode_step import DecodeStep
from llm_from_scratch.generation.engine import Engine, Handle, Request, Token, Update
from llm_from_scratch.generation.generator import Decoder, Generator

from ..memorised import BLOCK, OPTIONS, TEXT, TOKENIZER, memorised, ragged_prompts

GREEDY = GenerationConfig(num_samples=1, max_new_tokens=2 * BLOCK, temperature=0.0)
WILD = GenerationConfig(num_samples=1, max_new_tokens=2 * BLOCK, temperature=1.0, top_k=None)
PATIENCE = 60  # seconds, for what takes milliseconds


class Call:
    """A request and what was delivered for it."""

    def __init__(self, engine: Engine, request: Request):
        self.updates: list[Update] = []
        self.ended, self.begun = threading.Event(), threading.Event()
        self.handle: Handle = engine.submit(request, self.take)

    def take(self, update: Update) -> None:
        self.updates.append(update)
        self.begun.set()
        if update.done:
            self.ended.set()

    def wait(self) -> Call:
        assert self.ended.wait(PATIENCE)
        return self

    def text(self, sample: int = 0) -> str:
        return "".join(d.text for u in self.updates for d in u.deltas if d.sample == sample)

    def tokens(self, sample: int = 0) -> list[Token]:
        return [t for u in self.updates for d in u.deltas if d.sample == sample for t in d.tokens]

    def ids(self, sample: int = 0) -> list[int]:
        return [token.id for token in self.tokens(sample)]

    def reasons(self) -> dict[int, str]:
        return {d.sample: d.finish_reason for u in self.updates for d in u.deltas if d.finish_reason}


@pytest.fixture
def writer() -> Generator:
    return Generator(memorised(), TOKENIZER)


@pytest.fixture
def engine(writer: Generator) -> Iterator[Engine]:
    engine = Engine(writer)
    yield engine
    engine.close()


# modern has every option that changes the cache; parity/test_generation.py has 500 requests of each
@pytest.mark.parametrize(
    ("option", "count"), [("modern", 12), *(pytest.param(o, 64, marks=pytest.mark.slow) for o in OPTIONS)]
)
def test_many_requests_together_equal_each_alone(option: str, count: int) -> None:
    generator = Generator(memorised(option), TOKENIZER)
    prompts = ragged_prompts(count, 2 * BLOCK, seed=3)
    engine = Engine(generator)
    calls = [Call(engine, Request(prompt, GREEDY)) for prompt in prompts]
    together = [call.wait().ids() for call in calls]
    engine.close()
    alone = [generator.generate([prompt], GREEDY)[0].tokens for prompt in prompts]
    assert together == alone
    assert min(len(set(tokens)) for tokens in alone) >= 20


@pytest.mark.parametrize(
    ("overflow", "count"),
    [("recompute", 9), *(pytest.param(o, 40, marks=pytest.mark.slow) for o in ("recompute", "drop_half"))],
)
def test_requests_of_every_kind_join_and_leave(
    overflow: Any, count: int, writer: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other lengths, samplers, seeds and numbers of samples; more of them than slots; prompts read in small parts."""
    monkeypatch.setattr(batcher, "CHUNK", 7)
    rng, engine = random.Random(0), Engine(writer, 6, overflow)
    requests = []
    for prompt in ragged_prompts(count, 2 * BLOCK, seed=4):
        params = GenerationConfig(
            num_samples=rng.randint(1, 3),
            max_new_tokens=rng.randint(1, 60),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
            top_k=rng.choice([None, 0, 1, 5, 40]),
            top_p=rng.choice([1.0, 0.9, 0.5]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.3]),
            logit_bias=rng.choice([{}, {3: 2.0, 7: -100.0}]),
            stop=rng.choice([(), (TEXT[30:32],)]),
        )
        requests.append(Request(prompt, params, seed=rng.randint(0, 9)))
    calls = [Call(engine, request) for request in requests]
    for request, call in zip(requests, calls, strict=True):
        call.wait()
        expected = writer.generate([request.prompt], request.params, request.seed, overflow=overflow)
        assert [call.ids(k) for k in range(len(expected))] == [c.tokens for c in expected]
        assert [call.text(k) for k in range(len(expected))] == [c.text for c in expected]
        assert call.reasons() == {k: c.finish_reason for k, c in enumerate(expected)}
    assert engine.stats().running == engine.stats().waiting == 0
    assert engine.stats().prompt_tokens == sum(len(request.prompt) for request in requests)
    engine.close()


def test_a_seed_gives_the_same_text_next_to_other_requests(engine: Engine) -> None:
    request = Request(ragged_prompts(1, 9)[0], WILD, seed=11)
    alone = Call(engine, request).wait().ids()
    others = [Call(engine, Request(p, WILD, seed=k)) for k, p in enumerate(ragged_prompts(20, BLOCK, seed=6))]
    amid = Call(engine, request)
    assert amid.wait().ids() == alone and len(set(alone)) > 20
    assert all(call.wait().ids() != alone for call in others)


def test_samples_of_one_prompt_share_its_prefill(writer: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    read, step = Decoder.read, DecodeStep.__call__

    def reads(self: Decoder, idx: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen.append(tuple(idx.shape))
        return read(self, idx, *arguments)

    def steps(self: DecodeStep, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return step(self, ids, cache)

    monkeypatch.setattr(Decoder, "read", reads)
    monkeypatch.setattr(DecodeStep, "__call__", steps)
    engine = Engine(writer)
    params = dataclasses.replace(WILD, num_samples=5, max_new_tokens=3)
    Call(engine, Request([1, 2, 3, 4, 5, 6, 7], params)).wait()
    engine.close()
    assert seen == [(1, 7), (5,), (5,)]


def test_a_long_prompt_does_not_block_the_others(writer: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is read in parts, those that run get a token for each part."""
    monkeypatch.setattr(batcher, "CHUNK", 2)
    engine = Engine(writer)
    order: queue.Queue[str] = queue.Queue()
    endless = dataclasses.replace(GREEDY, max_new_tokens=100_000)
    running = engine.submit(Request([1, 2], endless), lambda update: order.put("running"))
    assert order.get(timeout=PATIENCE) == "running"
    late = engine.submit(Request(ragged_prompts(1, 1)[0] * 20, endless), lambda update: order.put("late"))
    steps = 0
    while order.get(timeout=PATIENCE) != "late":
        steps += 1
    assert steps >= 9
    running.cancel()
    late.cancel()
    engine.close()


def test_log_probabilities_are_the_models_own(engine: Engine, writer: Generator) -> None:
    """Before temperature, penalties and bias; of the prompt, too; against the naive forward pass."""
    prompt = TOKENIZER.encode(TEXT[:10]).tolist()
    params = dataclasses.replace(WILD, max_new_tokens=10, temperature=1.7, frequency_penalty=1.0, logit_bias={5: 3.0})
    call = Call(engine, Request(prompt, params, logprobs=4, prompt_logprobs=True)).wait()
    whole = torch.tensor([prompt + call.ids()])
    with torch.no_grad():
        logits = writer.model(whole, whole)[0][0, :, : TOKENIZER.vocab_size]
    logs = logits.double().log_softmax(-1)
    told = [*call.updates[0].prompt, *call.tokens()]
    assert [token.id for token in told] == whole[0].tolist()
    assert told[0].logprob is None and told[0].top == ()
    for i, token in enumerate(told[1:]):
        assert token.logprob == pytest.approx(logs[i, token.id].item(), abs=1e-4)
        best = logs[i].topk(4)
        assert [t for t, _, _ in token.top] == best.indices.tolist()
        assert [value for _, _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert token.bytes == TOKENIZER.decode_bytes([token.id])
        assert [b for _, b, _ in token.top] == [TOKENIZER.decode_bytes([t]) for t, _, _ in token.top]
    assert all(not update.prompt for update in call.updates[1:])
    few = Call(engine, Request(prompt, params, logprobs=0)).wait()
    assert [t.logprob for t in few.tokens()] == pytest.approx([t.logprob for t in call.tokens()], abs=1e-4)
    assert all(t.top == () for t in few.tokens())
    assert all(t.logprob is None for t in Call(engine, Request(prompt, params)).wait().tokens())


def test_a_long_prompt_has_logprobs_within_the_context(engine: Engine) -> None:
    prompt = TOKENIZER.encode(TEXT[: BLOCK + 6]).tolist()
    call = Call(engine, Request(prompt, dataclasses.replace(GREEDY, max_new_tokens=1), prompt_logprobs=True)).wait()
    told = call.updates[0].prompt
    assert [token.id for token in told] == prompt
    assert [token.logprob is None for token in told] == [True] * 7 + [False] * (BLOCK - 1)


def test_a_stop_token_ends_a_sample_and_is_left_out(engine: Engine) -> None:
    prompt = TOKENIZER.encode(TEXT[:5]).tolist()
    free = Call(engine, Request(prompt, GREEDY)).wait().ids()
    at = next(i for i in range(5, len(free)) if free[i] not in free[:i])
    call = Call(engine, Request(prompt, GREEDY, stop_tokens=frozenset([free[at]]))).wait()
    assert call.ids() == free[:at] and call.reasons() == {0: "stop"}
    assert call.text() == TOKENIZER.decode(free[:at])


def test_logit_bias_of_a_request_is_added(engine: Engine) -> None:
    call = Call(engine, Request([1, 2, 3], GREEDY, logit_bias={9: 100.0})).wait()
    assert set(call.ids()) == {9}


def test_a_cancelled_request_frees_its_slot_and_sends_nothing_more(engine: Engine) -> None:
    endless = dataclasses.replace(GREEDY, max_new_tokens=10**6, num_samples=64)
    call = Call(engine, Request([1], endless))
    assert call.begun.wait(PATIENCE)
    waiting = Call(engine, Request([1], GREEDY))
    call.handle.cancel()
    told = len(call.updates)
    assert waiting.wait().ids()
    assert len(call.updates) <= told + 1 and not call.ended.is_set()
    queued = engine.submit(Request([1], endless), lambda update: None)
    queued.cancel()
    assert Call(engine, Request([2], GREEDY)).wait().ids()
    assert engine.stats().waiting == 0


def test_bad_requests_are_refused_at_once(engine: Engine) -> None:
    for request, message in (
        (Request([]), "empty"),
        (Request([TOKENIZER.vocab_size]), "outside the vocabulary"),
        (Request([1], dataclasses.replace(GREEDY, top_p=3.0)), "top_p"),
        (Request([1], dataclasses.replace(GREEDY, num_samples=65)), "64 slots"),
        (Request([1], GREEDY, logit_bias={999: 1.0}), "token 999"),
        (Request([1], GREEDY, logit_bias={1: float("nan")}), "logit_bias"),
        (Request([1], GREEDY, logprobs=-1), "logprobs=-1"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(request, lambda update: None)


def test_a_failing_step_is_reported_to_all_requests(writer: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(writer)
    endless = dataclasses.replace(GREEDY, max_new_tokens=10**6)
    calls = [Call(engine, Request([k + 1], endless)) for k in range(3)]
    for call in calls:
        assert call.begun.wait(PATIENCE)

    def broken(self: Batch) -> torch.Tensor:
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(Batch, "logits", broken)
    for call in calls:
        assert call.wait().updates[-1].error == "RuntimeError: no memory"
    assert not engine.alive and engine.failure == "RuntimeError: no memory"
    with pytest.raises(EngineError, match="no memory"):
        engine.submit(Request([1], GREEDY), lambda update: None)
    assert engine.stats().running == 0


def test_closing_reports_to_the_remaining_requests(writer: Generator) -> None:
    engine = Engine(writer, slots=1)
    endless = dataclasses.replace(GREEDY, max_new_tokens=10**6)
    calls = [Call(engine, Request([1], endless)), Call(engine, Request([2], endless))]
    assert calls[0].begun.wait(PATIENCE)
    engine.close()
    for call in calls:
        assert call.wait().updates[-1].error == "the engine was closed"
    assert not engine.alive


def test_equal_lengths_that_fill_their_windows_together(writer: Generator) -> None:
    """One of them leaves before: the others are then in another order in the cache than in the batch."""
    prompts = [TOKENIZER.encode(TEXT[at : at + 6]).tolist() for at in (0, 70, 140)]
    free = writer.generate(prompts, GREEDY, overflow="drop_half")
    params = dataclasses.replace(GREEDY, stop=(free[0].text[4:7],))
    expected = [writer.generate([p], params, overflow="drop_half", use_cache=False)[0] for p in prompts]
    assert writer.generate(prompts, params, overflow="drop_half") == expected
    assert [sample.finish_reason for sample in expected] == ["stop", "length", "length"]


def test_large_settings_with_small_ones(engine: Engine) -> None:
    """A top_k beyond every integer of the device, and the most extreme temperature."""
    calls = [
        Call(engine, Request([1, 2, 3], dataclasses.replace(WILD, top_k=2**70), seed=3)),
        Call(engine, Request([1, 2, 3], dataclasses.replace(WILD, top_k=5))),
        Call(engine, Request([1, 2, 3], dataclasses.replace(WILD, temperature=1e30))),
    ]
    alone = Call(engine, Request([1, 2, 3], WILD, seed=3))
    assert calls[0].wait().ids() == alone.wait().ids()
    assert all(len(call.wait().ids()) == 2 * BLOCK for call in calls)


def test_a_receiver_that_fails_loses_its_own_request_alone(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(update: Update) -> None:
        raise ConnectionError("gone")

    others = [Call(engine, Request([1], GREEDY))]
    engine.submit(Request([2], GREEDY), fail)
    others += [Call(engine, Request([3], GREEDY))]
    assert all(len(call.wait().ids()) == 2 * BLOCK for call in others)
    assert Call(engine, Request([4], GREEDY)).wait().ids() and engine.alive
    assert "ConnectionError: gone" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["decoder", "keep"])
def test_any_failure_is_reported_to_all_requests(
    where: str, writer: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are just being taken from the queue, and those that end in the step that fails."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    if where == "decoder":
        monkeypatch.setattr(Generator, "decoder", property(fail))
    else:
        monkeypatch.setattr(Batch, "keep", fail)
    engine = Engine(writer)
    calls = [Call(engine, Request([k + 1], dataclasses.replace(GREEDY, max_new_tokens=4 + k))) for k in range(3)]
    for call in calls:
        last = call.wait().updates[-1]
        assert last.error == "RuntimeError: out of memory" or (last.deltas and last.deltas[-1].finish_reason)
    assert any(call.updates[-1].error for call in calls) and not engine.alive
    assert sum(update.done for call in calls for update in call.updates) == 3


def test_tokens_of_a_cancelled_prompt_reach_no_other_request(
    writer: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "CHUNK", 2)
    engine, begun, goes_on = Engine(writer), threading.Event(), threading.Event()
    step = Prefill.step

    def slow(self: Prefill, tokens: int | None = None) -> bool:
        begun.set()
        assert goes_on.wait(PATIENCE)
        return step(self, tokens)

    monkeypatch.setattr(Prefill, "step", slow)
    first = engine.submit(Request(list(range(10, 17)), GREEDY, prompt_logprobs=True), lambda update: None)
    assert begun.wait(PATIENCE)
    other = Call(engine, Request([1, 2, 3], GREEDY))
    assert engine.stats().running + engine.stats().waiting == 2
    first.cancel()
    goes_on.set()
    assert all(update.prompt == () for update in other.wait().updates)
    engine.close()


def test_numbers_that_go_wrong_midway_fail_that_request_alone() -> None:
    """A row becomes nan after some tokens; its neighbour, and who gets its memory afterwards, do not see it."""
    model = copy.deepcopy(memorised())
    generator = Generator(model, TOKENIZER)
    poison = 7
    with torch.no_grad():
        model.transformer.wte.weight = torch.nn.Parameter(model.transformer.wte.weight.clone())  # no longer the head's
        model.transformer.wte.weight[poison] = float("nan")
    engine = Engine(generator, slots=2)
    innocent = [Call(engine, Request([1, 2, 3], dataclasses.replace(WILD, logit_bias={poison: -1000.0}), seed=4))]
    bad = Call(engine, Request([1], dataclasses.replace(GREEDY, logit_bias={poison: 1000.0})))
    assert "not finite" in str(bad.wait().updates[-1].error) and bad.ids() == [poison]
    innocent += [Call(engine, Request([1, 2, 3], innocent[0].handle.request.params, seed=4)) for _ in range(3)]
    told = [call.wait().ids() for call in innocent]
    assert all(ids == told[0] and len(ids) == 2 * BLOCK for ids in told) and len(set(told[0])) > 20
    read = Call(engine, Request([1, poison, 2], GREEDY, logprobs=1, prompt_logprobs=True)).wait()
    assert "not finite" in str(read.updates[-1].error) and engine.alive
    engine.close()


def test_an_id_without_a_token_is_refused() -> None:
    ranks = {bytes([i]): i for i in range(256)}
    gappy = TiktokenTokenizer("cl100k_base", ranks, r"\w+|\W+", {"<|endoftext|>": 260})
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=8))
    engine = Engine(Generator(model, gappy))
    for prompt in ([1, 257], [257]):
        with pytest.raises(UserError, match="257 is outside"):
            engine.submit(Request(prompt, GREEDY), lambda update: None)
    engine.close()


def test_a_diverged_model_fails_the_request_and_not_the_engine() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    engine = Engine(Generator(model, ByteTokenizer()))
    for told in (False, True):
        call = Call(engine, Request([1, 2], GREEDY, prompt_logprobs=told)).wait()
        assert "not finite" in str(call.updates[-1].error) and engine.alive
    engine.close()
