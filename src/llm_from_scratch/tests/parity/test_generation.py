"""Decoding against independent references: the naive loop of GPT.generate, transformers' logits processors and its
generate on the same weights, and torch's own multinomial for nanoGPT's sampling."""

from __future__ import annotations

import queue

import pytest
import torch

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.generation import sampling
from llm_from_scratch.generation.batch import Batch
from llm_from_scratch.generation.engine import Engine, Request
from llm_from_scratch.generation.generator import Decoder, Generator
from llm_from_scratch.generation.nanogpt_sampler import NanoGPTSampler, random_stream

from ..memorised import BLOCK, OPTIONS, TOKENIZER, memorised, ragged_prompts

GREEDY = {"temperature": 0.0, "num_samples": 1}


@torch.no_grad()
def naive(model: GPT, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy decoding, the whole window again for every token, without padding: rows with equally long windows share a
    forward pass. Returns the tokens of each row, and the logits of each step."""
    rows, logits = [list(prompt) for prompt in prompts], []
    for _ in range(steps):
        windows = [row[-BLOCK:] for row in rows]
        last = torch.empty(len(rows), TOKENIZER.vocab_size)
        for length in set(map(len, windows)):
            alike = [i for i, window in enumerate(windows) if len(window) == length]
            last[alike] = model(torch.tensor([windows[i] for i in alike]))[0][:, -1, : TOKENIZER.vocab_size]
        for row, token in zip(rows, last.argmax(-1).tolist(), strict=True):
            row.append(token)
        logits.append(last)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)], logits


# One model with few rows. The slow tests have all models and many rows; test_decode_step.py has each step of all.
GPT2_TOO = ["modern", "gpt2"]


@pytest.mark.parametrize(
    ("option", "rows"), [("modern", 3), *(pytest.param(o, 10, marks=pytest.mark.slow) for o in OPTIONS)]
)
def test_cached_greedy_equals_the_naive_loop_past_block_size(option, rows):
    model = memorised(option)
    prompts = [*ragged_prompts(rows, 2 * BLOCK, seed=1), *ragged_prompts(2, 3, seed=2)]
    steps = 2 * BLOCK
    expected, reference = naive(model, prompts, steps)
    assert min(len(set(tokens)) for tokens in expected) >= 20, "the model is not trained: the test proves nothing"
    batch = Batch(Decoder(model), prompts, steps)
    crossed_apart = False
    for step in range(steps):
        logits = batch.logits()[:, : TOKENIZER.vocab_size]
        crossed_apart |= bool(batch.cached) and bool(batch.uncached)
        torch.testing.assert_close(logits, reference[step], rtol=0, atol=1e-5)
        batch.append(logits.argmax(dim=-1))
    assert crossed_apart and not batch.cached
    generated = Generator(model, TOKENIZER).generate(prompts, GenerationConfig(**GREEDY, max_new_tokens=steps))
    assert [c.tokens for c in generated] == expected


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_500_ragged_prompts_past_block_size(option):
    """Cached, together and as an engine's requests, against the model's own forward on whole windows."""
    model, steps = memorised(option), BLOCK + 12
    prompts = ragged_prompts(500, 2 * BLOCK, seed=11)
    expected: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in rows])
        for _ in range(steps):
            with torch.no_grad():
                logits = model(ids[:, -BLOCK:])[0][:, 0, : TOKENIZER.vocab_size]
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
        expected |= dict(zip(rows, ids[:, length:].tolist(), strict=True))
    assert min(len(set(tokens)) for tokens in expected.values()) >= 20
    generator, params = Generator(model, TOKENIZER), GenerationConfig(**GREEDY, max_new_tokens=steps)
    together = generator.generate(prompts, params)
    assert [sample.tokens for sample in together] == [expected[i] for i in range(500)]
    engine, answers = Engine(generator), queue.Queue()
    for i, prompt in enumerate(prompts):
        engine.submit(Request(prompt, params), lambda update, i=i: answers.put((i, update)))
    drawn: dict[int, list[int]] = {i: [] for i in range(500)}
    left = 500
    while left:
        i, update = answers.get(timeout=60)
        drawn[i] += [token.id for delta in update.deltas for token in delta.tokens]
        left -= update.done
    engine.close()
    assert drawn == expected


@pytest.mark.slow
@pytest.mark.parametrize("option", GPT2_TOO)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_equals_the_models_own_generate(option, rows):
    model = memorised(option, padding=0)
    for prompt in ragged_prompts(rows, BLOCK):
        expected = model.generate(torch.tensor([prompt]), 3 * BLOCK, temperature=1.0, top_k=1)[0, len(prompt) :]
        params = GenerationConfig(**GREEDY, max_new_tokens=3 * BLOCK)
        assert Generator(model, TOKENIZER).generate([prompt], params)[0].tokens == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("option", GPT2_TOO)
def test_dropping_half_of_the_window_is_the_same_with_and_without_a_cache(option):
    model = memorised(option)
    prompts = ragged_prompts(8, 2 * BLOCK, seed=3)
    cached, plain = Batch(Decoder(model), prompts, 100, overflow="drop_half"), Batch(
        Decoder(model), prompts, 100, False, "drop_half"
    )
    drops = set()
    for _ in range(100):
        logits = cached.logits()
        torch.testing.assert_close(logits, plain.logits(), rtol=0, atol=1e-5)
        drops.add(tuple(cached.dropped))
        cached.append(logits.argmax(dim=-1))
        plain.append(logits.argmax(dim=-1))
    assert not cached.uncached and len(drops) > 8  # rows drop at different times, and more than once
    contexts = [length - dropped for length, dropped in zip(cached.lengths, cached.dropped, strict=True)]
    assert all(BLOCK // 2 <= n <= BLOCK + 1 for n in contexts)


@pytest.mark.slow
@pytest.mark.parametrize("option", GPT2_TOO)
def test_nanogpts_samples_are_one_batch(option):
    model = memorised(option, padding=0)
    prompt, params = ragged_prompts(1, 9)[0], GenerationConfig(num_samples=4, max_new_tokens=60, top_k=5)
    torch.manual_seed(1337)
    one_by_one = [model.generate(torch.tensor([prompt]), 60, temperature=0.8, top_k=5) for _ in range(4)]
    stream = random_stream(1337, torch.device("cpu"), built=None)
    sampler = NanoGPTSampler(params, stream, TOKENIZER.vocab_size, TOKENIZER.vocab_size)
    together = Generator(model, TOKENIZER).generate([prompt], params, sampler=sampler)
    assert [prompt + c.tokens for c in together] == [ids[0].tolist() for ids in one_by_one]
    assert len({tuple(c.tokens) for c in together}) > 1


def random_logits(rows: int = 40, vocab: int = 101) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "ours, processor, value",
    [
        (sampling.temperature, "TemperatureLogitsWarper", 0.7),
        (sampling.temperature, "TemperatureLogitsWarper", 1.9),
        (sampling.top_k, "TopKLogitsWarper", 1),
        (sampling.top_k, "TopKLogitsWarper", 17),
        (sampling.top_k, "TopKLogitsWarper", 500),
        (sampling.top_p, "TopPLogitsWarper", 0.1),
        (sampling.top_p, "TopPLogitsWarper", 0.5),
        (sampling.top_p, "TopPLogitsWarper", 0.95),
        (sampling.min_p, "MinPLogitsWarper", 0.05),
        (sampling.min_p, "MinPLogitsWarper", 0.5),
    ],
)
def test_filters_equal_transformers(ours, processor, value):
    transformers = pytest.importorskip("transformers")
    logits = random_logits()
    theirs = getattr(transformers, processor)(value)(torch.zeros(40, 1, dtype=torch.long), logits.clone())
    torch.testing.assert_close(ours(logits, value), theirs, rtol=0, atol=0)


def test_ties_at_top_k_are_transformers_when_kept():
    transformers = pytest.importorskip("transformers")
    logits = random_logits().round()  # many equal logits
    theirs = transformers.TopKLogitsWarper(9)(torch.zeros(40, 1, dtype=torch.long), logits.clone())
    assert torch.equal(sampling.top_k(logits, 9, keep_ties=True), theirs)
    assert (theirs.isfinite().sum(-1) > 9).any() and (sampling.top_k(logits, 9).isfinite().sum(-1) == 9).all()


def test_repetition_penalty_equals_transformers():
    transformers = pytest.importorskip("transformers")
    logits, ids = random_logits(), torch.randint(101, (40, 12), generator=torch.Generator().manual_seed(6))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    seen = torch.zeros(40, 101, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(sampling.repetition_penalty(logits, seen, 1.3), theirs)


def test_the_whole_chain_equals_transformers():
    transformers = pytest.importorskip("transformers")
    params = GenerationConfig(temperature=0.9, top_k=30, top_p=0.9, min_p=0.02)
    chain = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(0.9),
            transformers.TopKLogitsWarper(30),
            transformers.TopPLogitsWarper(0.9),
            transformers.MinPLogitsWarper(0.02),
        ]
    )
    theirs = chain(torch.zeros(40, 1, dtype=torch.long), random_logits())
    torch.testing.assert_close(sampling.keep_likely(random_logits(), params), theirs, rtol=0, atol=0)


def test_greedy_text_equals_transformers_generate():
    transformers = pytest.importorskip("transformers")
    ours = memorised("gpt2", padding=0)
    config = transformers.GPT2Config(
        vocab_size=TOKENIZER.vocab_size, n_positions=BLOCK, n_embd=64, n_layer=2, n_head=4, activation_function="gelu"
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    state = ours.state_dict()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            value = state[name]
            parameter.copy_(
                value.T if value.shape != parameter.shape or "c_attn.w" in name or "c_proj.w" in name else value
            )
    for penalty in (1.0, 1.4):
        prompts, steps = ragged_prompts(4, 6, seed=8), BLOCK - 6
        params = GenerationConfig(**GREEDY, max_new_tokens=steps, repetition_penalty=penalty)
        mine = Generator(ours, TOKENIZER).generate(prompts, params)
        for prompt, completion in zip(prompts, mine, strict=True):
            expected = theirs.generate(
                torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=steps,
                repetition_penalty=penalty,
                pad_token_id=0,
                eos_token_id=None,
            )
            assert completion.tokens == expected[0, len(prompt) :].tolist()
