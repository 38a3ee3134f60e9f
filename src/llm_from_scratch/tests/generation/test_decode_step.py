"""generation/decode_step.py and recorder.py: recorded steps against the model's own forward, in every form of its
linear layers. Edited models are in test_edited_models.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llm_from_scratch.config import GenerationConfig, GPTConfig
from llm_from_scratch.core.cache import KVCache
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation import decode_step, window
from llm_from_scratch.generation.generator import Decoder, Generator
from llm_from_scratch.generation.window import Window
from llm_from_scratch.kernels import int8
from llm_from_scratch.kernels.int8 import Dense, Half, Int8, Scorer
from llm_from_scratch.machine.device import cpu_has_native_bf16

from ..memorised import BLOCK, OPTIONS, TEXT, TOKENIZER, memorised, ragged_prompts

V = TOKENIZER.vocab_size
VARIANTS = {**OPTIONS, "embedding_norm": {"embedding_norm": True}, "wide_bias": {"pos_embedding": "rope", "bias": True}}


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def model_of(option: str, **changes: object) -> GPT:
    if option in OPTIONS and not changes:
        return memorised(option)
    torch.manual_seed(0)
    sizes = {"block_size": BLOCK, "n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": V}
    model = GPT(GPTConfig(**{**sizes, **VARIANTS[option], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too, must matter
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def own(model: GPT, idx: Tensor, cache: KVCache | None = None) -> Tensor:
    return model(idx, cache=cache)[0]


# "modern" has what these have alone
@pytest.mark.parametrize(
    "option",
    [pytest.param(o, marks=() if o in ("gpt2", "modern") else pytest.mark.slow) for o in VARIANTS],
)
def test_every_step_is_the_models_own(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One row, rows of one length, ragged rows; the cache holds the same afterwards."""
    model = model_of(option)
    decoder = Decoder(model)
    for rows, lengths in ((1, [9]), (3, [9, 9, 9]), (3, [1, 9, 5])):
        caches, idx = [KVCache(model.config, rows) for _ in range(2)], ids(rows, 9)
        for cache in caches:
            own(model, idx, cache)
            cache.advance(lengths)
        for start in range(4):
            new = ids(rows, 1, seed=start)
            close(decoder.step(new[:, 0], caches[0]), own(model, new, caches[1])[:, 0])
            for cache in caches:
                cache.advance(1)
        for row, n in enumerate(lengths):
            close(caches[0].kv[:, :, row, :, : n + 4], caches[1].kv[:, :, row, :, : n + 4])
    assert decoder.recorded.failure is None and len(decoder.recorded.records) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "option", [pytest.param(o, marks=() if o in ("gpt2", "modern") else pytest.mark.slow) for o in VARIANTS]
)
def test_the_window_slides_as_by_the_models_own_forward(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the last layer with the last token's products alone, all but queries, keys and values."""
    model = model_of(option)
    decoder, C = Decoder(model), model.config.n_embd
    for rows in (1, 3):
        for seed in range(3):
            idx = ids(rows, BLOCK, seed)
            close(decoder.slide(idx), own(model, idx))
        with FlopCounterMode(display=False) as theirs:
            own(model, idx)
        with FlopCounterMode(display=False) as ours:
            decoder.slide(idx)
        matrices = C * C + (3 if model.config.is_gated else 2) * C * model.config.mlp_width
        saved = [count.get_flop_counts()["Global"] for count in (theirs, ours)]
        products = [sum(n for op, n in found.items() if "mm" in str(op)) for found in saved]
        assert products[0] - products[1] == 2 * matrices * rows * (BLOCK - 1)
    assert len(decoder.recorded.records) == 2 and capsys.readouterr().err == ""


def test_a_large_window_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording keeps every activation."""
    model = model_of("gpt2")
    monkeypatch.setattr(decode_step, "LARGE", 2 * BLOCK * 64 * 2)
    decoder = Decoder(model)
    for rows in (2, 3):
        close(decoder.slide(ids(rows, BLOCK)), own(model, ids(rows, BLOCK)))
    assert list(decoder.recorded.records) == [(2, BLOCK)]


def test_the_mask_is_made_once_for_all_layers() -> None:
    model = model_of("gpt2")
    decoder, cache, new = Decoder(model), KVCache(model.config, 1), ids(1, 1)[:, 0]
    with torch.inference_mode():
        decoder.step(new, cache)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.where: lambda *_, **__: 1}) as found:
            decoder.step(new, cache)
    assert model.config.n_layer > 1 and found.get_flop_counts()["Global"][torch.ops.aten.where] == 1


def test_rows_of_one_length_and_a_window_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a new record when the longest row outgrows the window, and when rows come or go."""
    monkeypatch.setattr(window, "BUCKET", 4)
    model = model_of("modern")
    decoder, idx = Decoder(model), ids(4, BLOCK)
    whole = [own(model, idx[:, : n + 1])[:, 0] for n in range(BLOCK)]
    cache, rows = KVCache(model.config, 4), [0, 1, 2, 3]
    own(model, idx[:, :2], cache)
    cache.advance(2)
    sizes = set()
    for n in range(2, BLOCK):
        close(decoder.step(idx[rows, n], cache), whole[n][rows])
        cache.advance(1)
        sizes.add(Window.of(cache).size if cache.end < BLOCK else None)
        if n == 8:  # the last row takes the place of the one that goes
            cache.drop(1)
            rows = [0, 3, 2]
        if n == 12:  # what was read ahead is taken back
            cache.advance(-1)
            close(decoder.step(idx[rows, n], cache), whole[n][rows])
            cache.advance(1)
    assert len(sizes) > 4 and len(decoder.recorded.records) > 4 and decoder.recorded.failure is None


def test_caches_join() -> None:
    """Rows that come from another cache, more than there was memory for."""
    model = model_of("modern")
    decoder, idx = Decoder(model), ids(6, 12)
    caches = []
    for part, n in ((idx[:2], 5), (idx[2:], 8)):
        cache = KVCache(model.config, len(part), n)
        own(model, part[:, :n], cache)
        cache.advance(n)
        caches.append(cache)
    first, second = caches
    first.join(second, [3, 0, 0], max_len=12)
    rows, lengths = [0, 1, 5, 2, 2], [5, 5, 8, 8, 8]
    assert first.counts == lengths and first.rows == 5
    new = torch.stack([idx[row, n] for row, n in zip(rows, lengths, strict=True)])
    logits = decoder.step(new, first)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        close(logits[i], own(model, idx[row, None, : n + 1])[0, 0])


@pytest.mark.parametrize("lengths", [[5], [5, 5], [5, 3]])
def test_ngrams_are_read(lengths: list[int]) -> None:
    torch.manual_seed(0)
    sizes = {"block_size": 12, "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 7, "pos_embedding": "rope"}
    model = GPT(GPTConfig(**sizes, max_ngram=4, ngram_rows=64)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        model.transformer.ngrams.weight.normal_()
    decoder, idx = Decoder(model), torch.randint(7, (2, 12))[: len(lengths)]
    cache = KVCache(model.config, len(lengths))
    own(model, idx[:, :5], cache)
    cache.advance(lengths)
    texts = [row[:n].tolist() for row, n in zip(idx, lengths, strict=True)]
    for step in range(6):
        new = torch.tensor([(step * 3 + row) % 7 for row in range(len(lengths))])
        logits = decoder.step(new, cache)
        cache.advance(1)
        for text, token, found in zip(texts, new.tolist(), logits, strict=True):
            text.append(token)
            close(found, own(model, torch.tensor([text]))[0, 0])
    assert decoder.recorded.failure is None and decoder.recorded.records


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65])
@pytest.mark.parametrize("shape", [(600, 512), (512, 600), (40, 24), (24, 40)])
def test_dense_is_a_linear_layer(rows: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # the product from the left is for several
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    x = torch.randn(rows, shape[1])
    for head in (False, True):
        for b in (None, bias):
            dense = Dense(weight, b, head)
            expected = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            torch.testing.assert_close(dense(x).double(), expected, rtol=0, atol=1e-3)


def test_half_and_int8_against_weights_rounded_by_hand() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(3, 24)
    expected = x @ weight.half().float().T + bias
    torch.testing.assert_close(Half(weight, bias)(x), expected, rtol=0, atol=1e-4)
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    # activations: 127 (or 255) steps from minus to plus a row's largest
    step = 2 * x.abs().amax(1, keepdim=True) / 127
    error = (Int8(weight, bias)(x) - (x @ rounded.T + bias)).abs()
    assert (error < step / 2 * rounded.abs().sum(1) + 1e-4).all() and 0 < error.mean() < 0.1


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_an_int8_row_does_not_depend_on_its_neighbours(count: int) -> None:
    torch.manual_seed(0)
    layer, x = Int8(torch.randn(40, 24), torch.randn(40)), torch.randn(9, 24) * torch.logspace(-3, 3, 9)[:, None]
    x[4] = 0
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))
    assert layer.bias is not None and torch.equal(together[4], layer.bias)
    prompts = ragged_prompts(count, BLOCK)
    params = GenerationConfig(num_samples=2, max_new_tokens=BLOCK, temperature=1.0)
    generator = Generator(memorised("modern"), TOKENIZER, quantize="int8")
    both = generator.generate(prompts, params)
    assert both == [sample for prompt in prompts for sample in generator.generate([prompt], params)]


def test_bfloat16_weights_are_exact_as_float16() -> None:
    weight = torch.randn(64, 64).mul(0.02).bfloat16().float()
    assert torch.equal(weight[weight.abs() > 6.2e-5].half().float(), weight[weight.abs() > 6.2e-5])
    assert (weight.half().float() - weight).abs().max() <= 2**-25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy.deepcopy(memorised("modern")).to(dtype)
    decoder = Decoder(model)
    native = dtype == torch.bfloat16 and cpu_has_native_bf16()
    assert decoder.linears.kind is (Dense if native else Half)
    exact, idx = copy.deepcopy(model).float(), ids(2, BLOCK)
    allowed = 0.03 if native else 1e-3
    expected = own(exact, idx)
    assert (decoder.read(idx).float() - expected).norm() < allowed * expected.norm()
    cache = KVCache(model.config, 2, dtype=decoder.dtype)  # and the decode step
    decoder.read(idx[:, :-2], cache)
    cache.advance(BLOCK - 2)
    for n in (2, 1):
        decoded = decoder.step(idx[:, -n], cache).float()
        cache.advance(1)
    for found in (decoded, decoder.slide(idx)[:, 0].float()):
        assert (found - expected[:, 0]).norm() < allowed * expected.norm()
    assert (2, BLOCK) in decoder.recorded.records and capsys.readouterr().err == "" and model.compute_dtype is None


def test_int8_text_is_close_to_float32_text() -> None:
    """The text is memorised, far from ties: the greedy continuation stays; log-probabilities move a little."""
    prompt = TOKENIZER.encode(TEXT[:12]).tolist()
    params = GenerationConfig(num_samples=1, max_new_tokens=10, temperature=0.0)
    for option in ("gpt2", "modern"):
        model = memorised(option)
        exact, rounded = Generator(model, TOKENIZER), Generator(model, TOKENIZER, quantize="int8")
        assert rounded.generate([prompt], params)[0].tokens == exact.generate([prompt], params)[0].tokens
        assert rounded.decoder.recorded.records and rounded.decoder.recorded.failure is None
        idx, losses = ids(4, BLOCK), []
        for cached in (False, True):  # a whole sequence, and a step
            found = []
            for decoder in (exact.decoder, rounded.decoder):
                cache = KVCache(model.config, 4)
                if cached:
                    decoder.read(idx[:, :-1], cache)
                    cache.advance(BLOCK - 1)
                logits = decoder.step(idx[:, -1], cache) if cached else decoder.read(idx)[:, 0]
                found.append(logits[:, :V].log_softmax(-1))
            assert 0 < (found[0] - found[1]).norm() / found[0].norm() < 0.05
        for scorer in (model, Scorer(model, "int8")):
            with torch.no_grad():
                losses.append(float(scorer(idx[:, :-1], idx[:, 1:])[1]))
        assert 0 < abs(losses[0] - losses[1]) < 0.05 * losses[0]


def test_an_edited_model_decodes_in_int8_too(capsys: pytest.CaptureFixture[str]) -> None:
    """With the edit in its tokens: int8 is nothing that only the unedited model knows."""

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.inner(x).tanh()

    model = copy.deepcopy(memorised())
    model.transformer.ln_f = Scaled(model.transformer.ln_f)
    decoder, plain = Decoder(model, "int8"), Decoder(memorised(), "int8")
    logits = []
    for d in (decoder, plain):
        cache, idx = KVCache(model.config, 1), ids(1, 10)
        d.read(idx[:, :9], cache)
        cache.advance(9)
        logits.append(d.step(idx[:, 9], cache))
    expected = own(model, ids(1, 10))[:, 0]
    assert 0 < (logits[0] - expected).norm() < 0.05 * expected.norm()
    assert (logits[1] - expected).norm() > 0.2 * expected.norm()
    assert decoder.recorded.records and capsys.readouterr().err == ""


def test_changed_weights_are_recorded_again() -> None:
    generator = Generator(copy.deepcopy(memorised()), TOKENIZER, quantize="int8")
    params = GenerationConfig(num_samples=1, max_new_tokens=5, temperature=0.0)
    before, decoder = generator.generate([[1, 2, 3]], params), generator.decoder
    assert generator.decoder is decoder
    with torch.no_grad():
        generator.model.transformer.wte.weight.copy_(generator.model.transformer.wte.weight.flip(0))
    assert generator.decoder is not decoder
    assert generator.generate([[1, 2, 3]], params) != before


def test_a_record_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A recorder with a bug: the comparison sees it, the model's own forward decodes, and one line says so."""
    real_record = decode_step.record

    def wrong(*arguments: Any) -> Any:
        record = real_record(*arguments)
        step = record.step
        record.step = record.exact = lambda *inputs: step(*inputs) * 1.01
        return record

    monkeypatch.setattr(decode_step, "record", wrong)
    generator = Generator(memorised("gpt2"), TOKENIZER)
    params = GenerationConfig(num_samples=2, max_new_tokens=BLOCK, temperature=1.0)
    found = generator.generate(TEXT[:3], params)
    assert capsys.readouterr().err == "decoding with the model's own forward: the recorded step's logits differ\n"
    monkeypatch.undo()
    assert found == Generator(memorised("gpt2"), TOKENIZER).generate(TEXT[:3], params)
    assert generator.decoder.recorded.records == {}


def test_records_that_differ_only_in_sizes_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that join and leave a server's batch need many records. All of them are right, one was compared."""
    model = model_of("modern")
    decoder, compared = Decoder(model), list[Any]()
    its_own = decoder.recorded.own

    def counted(*args: Any, **settings: Any) -> Any:
        compared.append(args)
        return its_own(*args, **settings)

    monkeypatch.setattr(decoder.recorded, "own", counted)
    for rows in (2, 3, 5):
        cache, idx = KVCache(model.config, rows), ids(rows, 9)
        own(model, idx[:, :8], cache)
        cache.advance([8 - row for row in range(rows)])
        new = idx[range(rows), [8 - row for row in range(rows)]]
        found = decoder.step(new, cache)
        for row in range(rows):
            close(found[row], own(model, idx[row, None, : 9 - row])[0, -1])
    assert len(compared) == 1 and len(decoder.recorded.records) == 3


def test_a_step_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch.compile, for which there is one window: the whole cache."""
    compiled: list[Any] = []

    def compile(step: Any) -> Any:
        compiled.append(step)
        return step

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(window, "BUCKET", 4)
    generator = Generator(memorised("modern"), TOKENIZER)
    expected = generator.generate(TEXT[:3], PARAMS)
    assert not compiled
    generator = Generator(memorised("modern"), TOKENIZER)
    generator.compiled = True
    assert generator.generate(TEXT[:3], PARAMS) == expected
    assert len(compiled) == len(generator.decoder.recorded.records) == 1


PARAMS = GenerationConfig(num_samples=2, max_new_tokens=BLOCK - 3, temperature=1.0)


def test_int8_is_refused_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "has_int8", lambda: False)
    with pytest.raises(UserError, match="quantize=int8 needs a CPU"):
        Decoder(memorised(), "int8")


def test_a_full_cache_is_not_written_beyond() -> None:
    model = memorised()
    decoder, cache = Decoder(model), KVCache(model.config, 2, 4)
    decoder.read(ids(2, 4), cache)
    cache.advance(4)
    with pytest.raises(ValueError, match="max_len=4"):
        decoder.step(ids(2, 1)[:, 0], cache)


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(UserError, match=f"block_size={BLOCK}"):
        Decoder(memorised()).read(ids(1, BLOCK + 1))
