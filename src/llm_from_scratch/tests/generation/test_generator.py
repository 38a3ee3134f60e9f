"""generation/generator.py: prompts, seeds, stop sequences, streaming and groups. Parity is tested in parity/."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from llm_from_scratch.config import GenerationConfig, GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import ByteTokenizer, CharTokenizer, TiktokenTokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation import batch as batching
from llm_from_scratch.generation.batch import Batch
from llm_from_scratch.generation.decode_step import DecodeStep
from llm_from_scratch.generation.generator import Decoder, Generator
from llm_from_scratch.generation.text_stream import TextStream

from ..memorised import BLOCK, SIGNS, TEXT, TOKENIZER, memorised, ragged_prompts

PARAMS = GenerationConfig(num_samples=3, max_new_tokens=2 * BLOCK, temperature=1.0, top_k=20)
BYTES = ByteTokenizer()


def one(params: GenerationConfig = PARAMS, **changes) -> GenerationConfig:
    return dataclasses.replace(params, num_samples=1, **changes)


@pytest.fixture
def writer() -> Generator:
    return Generator(memorised(), TOKENIZER)


@pytest.fixture(scope="module")
def babbler() -> Generator:
    """An untrained byte model: its tokens split characters and are no UTF-8."""
    torch.manual_seed(0)
    return Generator(
        GPT(GPTConfig(block_size=16, vocab_size=300, n_layer=1, n_head=2, n_embd=16, tie_embeddings=False)), BYTES
    )


def test_a_sample_does_not_depend_on_the_rest_of_the_batch(writer):
    prompts = ragged_prompts(4, 2 * BLOCK)
    together = writer.generate(prompts, PARAMS, seed=5)
    assert [c.seed for c in together] == [5, 6, 7] * 4
    assert len({tuple(c.tokens) for c in together}) == 12
    for k, completion in enumerate(together):
        (alone,) = writer.generate([prompts[k // 3]], one(), seed=completion.seed)
        assert alone == completion
    backwards = writer.generate(prompts[::-1], PARAMS, seed=5)
    assert sorted(c.tokens for c in backwards) == sorted(c.tokens for c in together)


def test_a_prompt_and_settings_give_a_text(writer):
    (sample,) = writer.generate([TEXT[:5]], one(max_new_tokens=40, temperature=0.7), seed=3)
    assert writer.generate(TEXT[:5], max_new_tokens=40, temperature=0.7, seed=3) == sample.text
    assert writer.generate([TEXT[:5]], max_new_tokens=40, temperature=0.7, seed=3) == [sample.text]
    assert len(writer.generate(TEXT[:5], num_samples=2, max_new_tokens=2)) == 2
    with pytest.raises(UserError, match="unknown setting 'max_new_token'; did you mean max_new_tokens?"):
        writer.generate(TEXT[:5], max_new_token=40)
    for name in ("max_new_tokens", "max_new_token"):
        with pytest.raises(UserError, match=f"{name} cannot be combined with params"):
            writer.generate([TEXT[:5]], one(), **{name: 5})


def test_more_tokens_begin_with_the_same_ones(writer):
    (short,), (long,) = (writer.generate(TEXT[:5], one(max_new_tokens=n)) for n in (30, 300))
    assert long.tokens[:30] == short.tokens and len(long.tokens) == 300 == len(long.text)


def test_without_a_cache_the_tokens_are_the_same(writer):
    prompts = ragged_prompts(3, BLOCK)
    assert writer.generate(prompts, PARAMS) == writer.generate(prompts, PARAMS, use_cache=False)


def test_equal_prompts_are_read_once(writer, monkeypatch):
    seen = []
    read, step = Decoder.read, DecodeStep.__call__
    monkeypatch.setattr(Decoder, "read", lambda self, idx, *a: seen.append(tuple(idx.shape)) or read(self, idx, *a))
    monkeypatch.setattr(
        DecodeStep, "__call__", lambda self, ids, c: seen.append(tuple(ids.shape)) or step(self, ids, c)
    )
    writer.generate([TEXT[:7], TEXT[:4], TEXT[:7]], dataclasses.replace(PARAMS, num_samples=5, max_new_tokens=4))
    assert seen == [(2, 7), (15,), (15,), (15,)]


def test_groups_of_rows_change_nothing(writer, monkeypatch):
    prompts = ragged_prompts(5, BLOCK)
    params = dataclasses.replace(PARAMS, stop=("é", "aB"))
    whole = writer.generate(prompts, params)
    sizes = (writer.model.config, 100, torch.float32, torch.device("cpu"))
    assert batching.rows_at_once(*sizes) > 1000
    monkeypatch.setattr(batching, "CACHE_BYTES", 4 * 2 * 2 * 64 * BLOCK * 4)
    assert batching.rows_at_once(*sizes) == 4
    assert writer.generate(prompts, params) == whole
    monkeypatch.setattr(batching, "CACHE_BYTES", 1)
    assert writer.generate(prompts, params) == whole


def test_padded_ids_are_never_drawn(babbler):
    flat = dataclasses.replace(PARAMS, temperature=50.0, top_k=None, max_new_tokens=500)
    drawn = {token for c in babbler.generate([[1]], flat) for token in c.tokens}
    assert max(drawn) < 256 and len(drawn) > 200
    with torch.no_grad():
        babbler.model.lm_head.weight[256:] *= 1000  # they would win every time
    greedy = babbler.generate([[1]], one(temperature=0.0, max_new_tokens=50))
    assert max(greedy[0].tokens) < 256


def test_ids_that_stand_for_nothing_are_never_drawn():
    ranks = {bytes([i]): i for i in range(256)}
    gappy = TiktokenTokenizer("cl100k_base", ranks, r"\w+|\W+", {"<|endoftext|>": 260})
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=8, tie_embeddings=False))
    flat = dataclasses.replace(PARAMS, temperature=50.0, top_k=None, max_new_tokens=1000)
    drawn = {token for c in Generator(model, gappy).generate("a", flat) for token in c.tokens}
    assert 260 in drawn and not drawn & {256, 257, 258, 259} and max(drawn) == 260


def test_the_text_ends_before_a_stop_text(writer):
    (free,) = writer.generate(TEXT[:5], one(temperature=0.0))
    for start, length in ((0, 1), (1, 3), (10, 7), (BLOCK + 3, 5)):
        stop = free.text[start : start + length]
        (cut,) = writer.generate(TEXT[:5], one(temperature=0.0, stop=(stop, "never there")))
        at = free.text.index(stop)
        assert (cut.text, cut.finish_reason) == (free.text[:at], "stop")
        assert cut.tokens == free.tokens[: at + length]
    assert free.finish_reason == "length"


def test_prompts_and_stop_texts_in_other_forms(writer):
    ids = TOKENIZER.encode(TEXT[:5])
    expected = writer.generate(TEXT[:5], one())
    for prompts in ([ids], ids[None], torch.from_numpy(ids.astype("int64"))[None], (TEXT[:5],)):
        assert writer.generate(prompts, one()) == expected
    stop = expected[0].text[10:13]
    assert writer.generate(TEXT[:5], one(stop=stop)) == writer.generate(TEXT[:5], one(stop=(stop,)))
    assert writer.generate(TEXT[:5], one(stop="")) == expected


def test_rows_that_stop_early_leave_the_others_alone(writer):
    prompts = ragged_prompts(6, 2 * BLOCK, seed=4)
    free = writer.generate(prompts, PARAMS)
    stops = tuple(free[row].text[at : at + 2] for row, at in ((0, 5), (7, 30), (11, BLOCK + 20)))
    cut = writer.generate(prompts, dataclasses.replace(PARAMS, stop=stops))
    for a, b in zip(free, cut, strict=True):
        ends = [a.text.index(s) for s in stops if s in a.text]
        assert b.text == a.text[: min(ends)] if ends else b == a
    assert {c.finish_reason for c in cut} == {"stop", "length"}


@pytest.mark.cases(1)
@pytest.mark.parametrize("overflow", ["recompute", "drop_half"])
def test_streamed_pieces_are_the_whole_text(writer, overflow):
    for stop in ((), ("é€",), (TEXT[20:23], TEXT[19:21])):
        params = one(stop=stop, max_new_tokens=3 * BLOCK)
        (whole,) = writer.generate(TEXT[:9], params, seed=3, overflow=overflow)
        pieces = list(writer.stream(TEXT[:9], params, seed=3, overflow=overflow))
        assert "".join(pieces) == whole.text and all(pieces)
        assert len(pieces) >= len(whole.text) - max(map(len, stop), default=0)


def test_streaming_gives_whole_characters(babbler):
    params = one(max_new_tokens=400, top_k=None)
    (whole,) = babbler.generate([[1]], params)
    assert whole.text == bytes(whole.tokens).decode("utf-8", "replace")
    assert "".join(babbler.stream([1], params)) == whole.text


def stream_of(text: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(lambda before, token: bytes([token]), 0, stop)
    pieces = []
    for byte in text:
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


def test_a_character_is_printed_after_its_last_byte():
    assert stream_of("a€b".encode())[0] == ["a", "", "", "€", "b", ""]
    assert stream_of("€".encode()[:2])[0] == ["", "", "\ufffd"]


def test_a_possible_stop_text_is_held_back():
    pieces, stream = stream_of(b"one <en <end> two", ("<end>", "<stop>"))
    assert "".join(pieces) == stream.text == "one <en " and stream.stopped
    assert pieces[4:9] == ["", "", "", "<en ", ""]  # "<en" might have been the beginning
    pieces, stream = stream_of(b"one <en", ("<end>",))
    assert pieces[-1] == "<en" and not stream.stopped  # nothing follows: it was none
    assert stream_of(b"aab", ("ab",))[0] == ["", "a", "", ""]  # "aa" holds the beginning at its second letter


def test_the_earliest_stop_text_counts_when_one_token_completes_two():
    stream = TextStream(lambda before, token: b"x END STOP y", 0, ("STOP", "END"))
    assert stream.push(0) == "x " and stream.stopped and stream.finish() == ""


def test_stop_texts_against_a_plain_search():
    """Random texts over three letters, cut into random tokens: what is given out is never part of a stop text."""
    rng = random.Random(0)
    for _ in range(2000):
        tokens = ["".join(rng.choices("abé", k=rng.randint(1, 4))).encode() for _ in range(8)]
        stops = tuple("".join(rng.choices("abé", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3)))
        stream = TextStream(lambda before, token: tokens[token], 0, stops)  # noqa: B023
        given = ""
        for i in range(len(tokens)):
            given += stream.push(i)
            so_far = b"".join(tokens[: i + 1]).decode()
            found = [so_far.index(s) for s in stops if s in so_far]
            if found:
                assert stream.stopped and given == so_far[: min(found)]
                break
            assert not stream.stopped and so_far.startswith(given)
            held = so_far[len(given) :]
            assert not held or any(s.startswith(held) for s in stops)
        else:
            assert given + stream.finish() == so_far


def test_a_space_that_no_token_holds_is_written():
    class Words(CharTokenizer):
        def decode_bytes(self, ids):
            return " ".join(self.chars[i] for i in ids).encode()

    words = Words("abc")
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=8))
    (sample,) = Generator(model, words).generate([[0, 1]], one(max_new_tokens=5))
    assert sample.text == "".join(" " + "abc"[i] for i in sample.tokens)


def test_a_prompt_longer_than_the_context_is_cropped_but_reported_whole(writer):
    prompt = TOKENIZER.encode(TEXT).tolist()
    (whole,), (cropped,) = (writer.generate([p], one()) for p in (prompt, prompt[-BLOCK:]))
    assert whole.tokens == cropped.tokens and whole.prompt_tokens == prompt


def test_contexts_of_one_and_two_tokens():
    for block in (1, 2, 3):
        model = GPT(GPTConfig(block_size=block, vocab_size=50, n_layer=1, n_head=1, n_embd=8, tie_embeddings=False))
        tokenizer = CharTokenizer(SIGNS[:50])
        for overflow in ("recompute", "drop_half"):
            runs = [
                Generator(model, tokenizer).generate([[1], [1, 2, 3]], PARAMS, use_cache=cached, overflow=overflow)
                for cached in (True, False)
            ]
            assert runs[0] == runs[1]


def test_bad_prompts_and_settings_are_refused(writer):
    for prompt, message in (
        ("", "empty"),
        ([[]], "empty"),
        ("\u2603", "U\\+2603"),
        ([[0, TOKENIZER.vocab_size]], f"token id {TOKENIZER.vocab_size} is outside"),
        ([[-1]], "token id -1 is outside"),
    ):
        with pytest.raises(UserError, match=message):
            writer.generate(prompt, PARAMS)
    with pytest.raises(UserError, match="empty"):
        writer.stream("", PARAMS)  # at once, not at the first piece
    with pytest.raises(UserError, match="top_p"):
        writer.generate("a", one(top_p=7.0))
    with pytest.raises(UserError, match="overflow='half'"):
        writer.generate("a", one(), overflow="half")
    assert writer.generate([], PARAMS) == []


def test_a_tokenizer_that_is_not_the_models_is_refused():
    with pytest.raises(UserError, match=f"256 ids, the model only {TOKENIZER.vocab_size + 3}"):
        Generator(memorised(), BYTES)


def test_a_diverged_model_is_refused():
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    for use_cache in (True, False):
        with pytest.raises(UserError, match="not finite"):
            Generator(model, BYTES).generate("a", one(), use_cache=use_cache)


def test_the_models_mode_is_given_back_and_dropout_is_off():
    model = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=16, dropout=0.5)).train()
    generator = Generator(model, BYTES)
    assert generator.generate("a", PARAMS) == generator.generate("a", PARAMS)
    assert model.training
    stream = generator.stream("a", PARAMS)
    next(stream)
    stream.close()
    assert model.training
    model.eval()
    generator.generate("a", PARAMS)
    assert not model.training


def test_generating_leaves_the_global_random_state_alone(writer):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    writer.generate(TEXT[:5], PARAMS)
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_weights(writer):
    generator = Generator(GPT(memorised("modern").config), TOKENIZER, dtype=torch.bfloat16)
    generator.model.load_state_dict(memorised("modern").state_dict())
    (sample,) = generator.generate(TEXT[:20], one(temperature=0.0))
    assert generator.model.lm_head.weight.dtype == torch.bfloat16
    assert len(set(sample.tokens)) >= 20


def test_rows_can_be_kept_in_any_state():
    """Rows leave while all are cached, while some have outgrown the cache, and when none is left in it."""
    model, prompts = memorised(), ragged_prompts(8, BLOCK, seed=9)
    decoder = Decoder(model)
    batch, alone = Batch(decoder, prompts, 60), [Batch(decoder, [p], 60, use_cache=False) for p in prompts]
    rows, states = list(range(8)), set()
    for step in range(60):
        logits = batch.logits()
        states.add((bool(batch.cached), bool(batch.uncached)))
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i : i + 1], alone[row].logits(), rtol=0, atol=1e-5)
            alone[row].append(logits[i : i + 1].argmax(-1))
        batch.append(logits.argmax(dim=-1))
        if step % 10 == 5 and len(rows) > 2:
            gone = step % len(rows)
            batch.keep([i for i in range(len(rows)) if i != gone])
            del rows[gone]
    assert states == {(True, False), (True, True), (False, True)}
