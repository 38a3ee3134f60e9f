"""generation/decode_step.py: the packed forward against the model's own, in every form that its matrices take."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch.config import GenerationConfig, GPTConfig
from llm_from_scratch.core.cache import KVCache
from llm_from_scratch.core.model import GPT, Attention
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation import decode_step as packing
from llm_from_scratch.generation.decode_step import Dense, Half, Int8, Window, packed_forward, plain_forward
from llm_from_scratch.generation.generator import Generator
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


@pytest.mark.parametrize("option", VARIANTS)
def test_every_pass_is_the_models_own(option: str) -> None:
    """Whole windows, ragged prompts, single tokens, several at once, with and without logits_at."""
    model = model_of(option)
    forward, what = packed_forward(model)
    assert what == "packed"
    plain, idx, lengths = plain_forward(model), ids(3, BLOCK), [1, 9, 5]
    at = torch.tensor([0, 11, BLOCK - 1])
    with torch.no_grad():
        close(forward(idx), plain(idx))
        close(forward(idx, logits_at=at), plain(idx, logits_at=at))
        caches = [KVCache(model.config, 3) for _ in range(2)]
        runs = (forward, plain)
        a, b = (run(idx[:, :9], cache=cache) for run, cache in zip(runs, caches, strict=True))
        for row, n in enumerate(lengths):
            close(a[row, :n], b[row, :n])
        for cache in caches:
            cache.advance(lengths)
        for T, start in ((1, 0), (1, 1), (4, 2), (1, 6), (2, 7)):
            new = ids(3, T, seed=start)
            where = torch.tensor([0, T - 1, T // 2])
            a, b = (run(new, cache=cache) for run, cache in zip(runs, caches, strict=True))
            close(a, b)
            a, b = (run(new, cache=cache, logits_at=where) for run, cache in zip(runs, caches, strict=True))
            close(a, b)
            for cache in caches:
                cache.advance(T)
        assert caches[0].counts == [n + 9 for n in lengths]


def test_rows_of_one_length_and_a_window_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of the cache are made anew when the longest row outgrows them, and when rows come or go."""
    monkeypatch.setattr(packing, "BUCKET", 4)
    model = model_of("modern")
    forward, idx = packed_forward(model)[0], ids(4, BLOCK)
    whole = [model(idx[:, : n + 1])[0] for n in range(BLOCK)]
    cache, rows = KVCache(model.config, 4), [0, 1, 2, 3]
    with torch.no_grad():
        forward(idx[:, :2], cache=cache)
        cache.advance(2)
        sizes = set()
        for n in range(2, BLOCK):
            close(forward(idx[rows, n : n + 1], cache=cache), whole[n][rows])
            cache.advance(1)
            sizes.add(Window.of(cache).size if cache.end < BLOCK else None)
            if n == 8:  # the last row takes the place of the one that goes
                cache.drop(1)
                rows = [0, 3, 2]
            if n == 12:  # what was read ahead is taken back
                cache.advance(-1)
                close(forward(idx[rows, n : n + 1], cache=cache), whole[n][rows])
                cache.advance(1)
    assert len(sizes) > 4


def test_caches_join() -> None:
    """Rows that come from another cache, more than there was memory for."""
    model = model_of("gqa")
    forward, idx = packed_forward(model)[0], ids(6, 12)
    caches = []
    with torch.no_grad():
        for part, n in ((idx[:2], 5), (idx[2:], 8)):
            cache = KVCache(model.config, len(part), n)
            forward(part[:, :n], cache=cache)
            cache.advance(n)
            caches.append(cache)
        first, second = caches
        first.join(second, [3, 0, 0], max_len=12)
        rows, lengths = [0, 1, 5, 2, 2], [5, 5, 8, 8, 8]
        assert first.counts == lengths and first.rows == 5
        new = torch.stack([idx[row, n] for row, n in zip(rows, lengths, strict=True)])[:, None]
        logits = forward(new, cache=first)
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            close(logits[i], model(idx[row, None, : n + 1])[0][0])


def test_ngrams_are_read() -> None:
    torch.manual_seed(0)
    sizes = {"block_size": 12, "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 7, "pos_embedding": "rope"}
    model = GPT(GPTConfig(**sizes, max_ngram=4, ngram_rows=64)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        model.transformer.ngrams.weight.normal_()
    forward, what = packed_forward(model)
    idx = torch.randint(7, (2, 12))
    assert what == "packed"
    close(forward(idx), model(idx)[0].detach())


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65])
@pytest.mark.parametrize("shape", [(600, 512), (512, 600), (40, 24), (24, 40)])
def test_dense_is_a_linear_layer(rows: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # the product from the left is for several
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    x, add = torch.randn(rows, shape[1]), torch.randn(rows, shape[0])
    for head in (False, True):
        for b in (None, bias):
            dense = Dense(weight, b, head)
            expected = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            torch.testing.assert_close(dense(x).double(), expected, rtol=0, atol=1e-3)
            torch.testing.assert_close(dense(x, add).double(), expected + add, rtol=0, atol=1e-3)


def test_half_and_int8_against_weights_rounded_by_hand() -> None:
    torch.manual_seed(0)
    weight, bias, x, add = torch.randn(40, 24), torch.randn(40), torch.randn(3, 24), torch.randn(3, 40)
    expected = x @ weight.half().float().T + bias
    torch.testing.assert_close(Half(weight, bias)(x), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(Half(weight, bias)(x, add.clone()), expected + add, rtol=0, atol=1e-4)
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    # activations: 127 (or 255) steps from minus to plus a row's largest
    step = 2 * x.abs().amax(1, keepdim=True) / 127
    error = (Int8(weight, bias)(x) - (x @ rounded.T + bias)).abs()
    assert (error < step / 2 * rounded.abs().sum(1) + 1e-4).all() and 0 < error.mean() < 0.1
    torch.testing.assert_close(Int8(weight, bias)(x, add.clone()), Int8(weight, bias)(x) + add, rtol=0, atol=1e-6)


def test_an_int8_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    layer, x = Int8(torch.randn(40, 24), torch.randn(40)), torch.randn(9, 24) * torch.logspace(-3, 3, 9)[:, None]
    x[4] = 0
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))
    assert layer.bias is not None and torch.equal(together[4], layer.bias)
    prompts = ragged_prompts(20, BLOCK)
    params = GenerationConfig(num_samples=2, max_new_tokens=BLOCK, temperature=1.0)
    generator = Generator(memorised("modern"), TOKENIZER, quantize="int8")
    both = generator.generate(prompts, params)
    assert both == [sample for prompt in prompts for sample in generator.generate([prompt], params)]


def test_bfloat16_weights_are_exact_as_float16() -> None:
    weight = torch.randn(64, 64).mul(0.02).bfloat16().float()
    assert torch.equal(weight[weight.abs() > 6.2e-5].half().float(), weight[weight.abs() > 6.2e-5])
    assert (weight.half().float() - weight).abs().max() <= 2**-25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    model = copy.deepcopy(memorised("modern")).to(dtype)
    forward, what = packed_forward(model)
    native = dtype == torch.bfloat16 and cpu_has_native_bf16()
    assert what == ("packed" if native else "packed, products from float16")
    exact = copy.deepcopy(model).float()
    idx = ids(2, BLOCK)
    allowed = 0.03 if native else 1e-3
    assert (forward(idx).float() - exact(idx)[0]).norm() < allowed * exact(idx)[0].norm()
    cache = KVCache(model.config, 2, dtype=getattr(forward, "dtype", dtype))  # and the decode step
    forward(idx[:, :-1], cache=cache)
    cache.advance(BLOCK - 1)
    decoded = forward(idx[:, -1:], cache=cache).float()
    assert (decoded - exact(idx)[0]).norm() < allowed * exact(idx)[0].norm()


def test_int8_writes_nearly_what_float32_writes() -> None:
    """The text is memorised, far from ties: the greedy continuation stays; log-probabilities move a little."""
    prompt = TOKENIZER.encode(TEXT[:12]).tolist()
    params = GenerationConfig(num_samples=1, max_new_tokens=10, temperature=0.0)
    for option in ("gpt2", "modern"):
        model = memorised(option)
        exact, rounded = Generator(model, TOKENIZER), Generator(model, TOKENIZER, quantize="int8")
        assert rounded.generate([prompt], params)[0].tokens == exact.generate([prompt], params)[0].tokens
        idx = ids(4, BLOCK)
        a, b = (g.forward(idx)[:, 0, :V].log_softmax(-1) for g in (exact, rounded))
        assert 0 < (a - b).norm() / a.norm() < 0.05


def test_a_model_that_computes_otherwise_decodes_by_its_own_forward() -> None:
    """Somebody changed the model in one place: what is packed here does not know of it, and notices."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner, self.weight, self.bias, self.eps = inner, inner.weight, inner.bias, inner.eps

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    unknown = copy.deepcopy(memorised())
    unknown.transformer.ln_f = Doubled(unknown.transformer.ln_f)
    other = copy.deepcopy(memorised())
    other.transformer.h[1].forward = lambda x, rope=None, cache=None: x  # no layer there
    third = copy.deepcopy(memorised())
    third.transformer.h[0].attn = nn.Identity()
    third.transformer.h[0].forward = lambda x, rope=None, cache=None: x + x.tanh()
    near = copy.deepcopy(memorised())

    class Unknown(Attention):  # might be anything
        pass

    near.transformer.h[0].attn.attend = Unknown(0.0)
    for model in (unknown, other, third, near):
        forward, what = packed_forward(model)
        assert what == "its own forward"
        assert torch.equal(forward(ids(1, 9)), model(ids(1, 9))[0])
        with pytest.raises(UserError, match="computes otherwise"):
            packed_forward(model, "int8")


def test_changed_weights_are_packed_anew() -> None:
    generator = Generator(copy.deepcopy(memorised()), TOKENIZER, quantize="int8")
    params = GenerationConfig(num_samples=1, max_new_tokens=5, temperature=0.0)
    before, packed = generator.generate([[1, 2, 3]], params), generator.forward
    assert generator.forward is packed
    with torch.no_grad():
        generator.model.transformer.wte.weight.copy_(generator.model.transformer.wte.weight.flip(0))
    assert generator.forward is not packed
    assert generator.generate([[1, 2, 3]], params) != before


def test_int8_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "has_int8", lambda: False)
    with pytest.raises(UserError, match="quantize=int8 is for a CPU"):
        packed_forward(memorised(), "int8")


def test_a_full_cache_is_not_written_beyond() -> None:
    model = memorised()
    forward, cache = packed_forward(model)[0], KVCache(model.config, 2, 4)
    forward(ids(2, 4), cache=cache)
    cache.advance(4)
    with pytest.raises(ValueError, match="max_len=4"):
        forward(ids(2, 1), cache=cache)


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(UserError, match=f"block_size={BLOCK}"):
        packed_forward(memorised())[0](ids(1, BLOCK + 1))
