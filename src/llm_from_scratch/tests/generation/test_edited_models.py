"""Edited models: their text equals that of their own forward over the whole sequence, token by token, without a change
in generation/. Most are recorded; the others report why not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_from_scratch.config import GenerationConfig, GPTConfig
from llm_from_scratch.core.cache import KVCache
from llm_from_scratch.core.model import GPT, MLP, Attention, Block, CausalSelfAttention, Linear
from llm_from_scratch.generation import window
from llm_from_scratch.generation.decode_step import DecodeStep
from llm_from_scratch.generation.generator import Decoder, Generator
from llm_from_scratch.kernels.int8 import Linears

from ..memorised import BLOCK, TEXT, TOKENIZER

V = TOKENIZER.vocab_size
SIZES: dict[str, Any] = {"block_size": BLOCK, "n_layer": 2, "n_head": 4, "n_embd": 64}  # benchmarks/ has others
SCALE = 1.0


def model_of(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=V, **{**SIZES, **options})).eval()


def vivid(model: GPT) -> GPT:
    """Weights so large that every part of the model shows in the tokens, and texts are far from constant."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(SCALE * (0.2 if p.ndim > 1 else 0.3) * torch.randn(p.shape, generator=generator))
    return model


def with_blocks(kind: type[Block], **options: Any) -> GPT:
    model = model_of(**options)
    model.transformer.h = nn.ModuleList([kind(model.config) for _ in range(model.config.n_layer)])
    return vivid(model.eval())


def with_parts(change: Callable[[Any, GPTConfig], None], **options: Any) -> GPT:
    """change(block, config) replaces modules of each block."""
    model = model_of(**options)
    for block in model.transformer.h:
        change(block, model.config)
    return vivid(model.eval())


# --- blocks ---


class GatedBlock(Block):
    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.gate = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        x = x + self.gate * self.attn(self.ln_1(x), where, cache)
        return x + self.gate.sigmoid() * self.mlp(self.ln_2(x))


class ParallelBlock(Block):
    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        h = self.ln_1(x)
        return x + self.attn(h, where, cache) + self.mlp(h)


class InPlaceBlock(Block):
    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        x = x.clone()
        x += self.attn(self.ln_1(x), where, cache)
        x.add_(self.mlp(self.ln_2(x)), alpha=0.5)
        return x


class ScratchBlock(Block):
    """Writes into memory of its own, which must be empty again for every token."""

    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        kept = torch.zeros(2, *x.shape)
        kept[0] += self.attn(self.ln_1(x), where, cache)
        kept[1] += self.mlp(self.ln_2(x + kept[0]))
        return x + kept.sum(0)


class BranchingBlock(Block):
    """A branch that depends on the data."""

    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        x = super().forward(x, where, cache)
        return torch.cat([2 * row if float(row[..., -1:, 0].sum()) > 0 else row for row in x.split(1)])


class NoisyBlock(Block):
    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        return super().forward(x, where, cache) + 1e-9 * torch.randn_like(x)


class ShiftedBlock(Block):
    """Mixes tokens outside attention: with a cache it does not see the token before."""

    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return super().forward(x + 0.5 * before, where, cache)


# --- attention ---


class SoftCapped(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        scores = 5 * torch.tanh(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) / 5)
        if causal:
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v


class Scaled(Attention):
    """Another scale than 1 / sqrt(D)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=0.5)


class Sink(Attention):
    """A key of zeros that every query sees, with a value of zeros."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        if causal:
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.pad(scores, (1, 0)).softmax(-1)[..., 1:] @ v


class LengthScaled(Attention):
    """Takes the size of the keys for the length of the text; of a window it is not."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return super().forward(q * (1 + k.size(2) / 10), k, v, mask, causal)


class Positioned(CausalSelfAttention):
    """Attention whose scores depend on positions, which Where hands to every layer."""

    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if cache is not None:
            k, v, _ = cache.update(k, v)
        (pos,) = where
        apart = pos[..., None] - torch.arange(k.size(2))  # (T, S) or (B, T, S)
        scores = self.scores(q @ k.transpose(-2, -1) / math.sqrt(self.head_dim), apart.unsqueeze(-3))
        y = scores.masked_fill(apart.unsqueeze(-3) < 0, float("-inf")).softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    def scores(self, scores: Tensor, apart: Tensor) -> Tensor:
        raise NotImplementedError


class Alibi(Positioned):
    def scores(self, scores: Tensor, apart: Tensor) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, self.n_head + 1)
        return scores - slopes[:, None, None] * apart


class SlidingWindow(Positioned):
    def scores(self, scores: Tensor, apart: Tensor) -> Tensor:
        return scores.masked_fill(apart >= 5, float("-inf"))


class Where(nn.Module):
    """Positions as they are, in the place of transformer-wide position modules."""

    has_table = False

    def prepare(self, pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (pos,)


def positioned(kind: type[Positioned]) -> GPT:
    def change(block: Any, config: GPTConfig) -> None:
        block.attn = kind(config)

    model = with_parts(change)
    model.positions = Where()  # type: ignore[assignment]
    return model


def attending(kind: type[Attention]) -> GPT:
    def change(block: Any, config: GPTConfig) -> None:
        block.attn.attend = kind(0.0)

    return with_parts(change)


# --- MLPs and linear layers ---


class Mixture(nn.Module):
    """Four experts, all computed by einsum, mixed by a softmax over the best two."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.router = Linear(config.n_embd, 4)
        self.up = nn.Parameter(0.1 * torch.randn(4, config.n_embd, 32))
        self.down = nn.Parameter(0.1 * torch.randn(4, 32, config.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        best = self.router(x).topk(2, dim=-1)
        weights = torch.zeros(*x.shape[:-1], 4).scatter(-1, best.indices, best.values.softmax(-1))
        hidden = F.gelu(torch.einsum("btc,ech->bteh", x, self.up))
        return torch.einsum("bteh,ehc,bte->btc", hidden, self.down, weights)


class GatedByHand(MLP):
    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.c_gate = Linear(config.n_embd, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(torch.sigmoid(self.c_gate(x)) * F.elu(self.c_fc(x)))


class Lora(nn.Module):
    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner
        self.a, self.b = nn.Linear(inner.in_features, 4, bias=False), nn.Linear(4, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 2 * self.b(self.a(x))


class PlusOneNorm(nn.Module):
    """Weights around zero, computed in float64."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.double()
        return (y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(x.dtype) * (1 + self.weight)


def mlps(kind: type[nn.Module]) -> GPT:
    def change(block: Any, config: GPTConfig) -> None:
        block.mlp = kind(config)

    return with_parts(change)


def mish() -> GPT:
    def change(block: Any, config: GPTConfig) -> None:
        block.mlp.act = nn.Mish()

    return with_parts(change)


def lora() -> GPT:
    def change(block: Any, config: GPTConfig) -> None:
        block.attn.c_attn, block.mlp.c_fc = Lora(block.attn.c_attn), Lora(block.mlp.c_fc)

    return with_parts(change, pos_embedding="rope")


def other_norms() -> GPT:
    def change(block: Any, config: GPTConfig) -> None:
        block.ln_1, block.ln_2 = PlusOneNorm(config.n_embd), PlusOneNorm(config.n_embd)

    return with_parts(change, norm="rmsnorm", qk_norm=True)


def averaged_embeddings() -> GPT:
    """The residual stream keeps a share of the embedding: a closure over what another module computed."""
    model = with_blocks(GatedBlock, pos_embedding="rope", n_kv_head=2)
    first: dict[str, Tensor] = {}
    model.transformer.drop.register_forward_hook(lambda module, args, out: first.update(x=out))
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda module, args: (0.7 * args[0] + 0.3 * first["x"], *args[1:]))
    return model


RECORDED: dict[str, Callable[[], GPT]] = {
    "gates": lambda: with_blocks(GatedBlock),
    "alibi": lambda: positioned(Alibi),
    "parallel block": lambda: with_blocks(ParallelBlock),
    "soft-capped scores": lambda: attending(SoftCapped),
    "another scale": lambda: attending(Scaled),
    "attention sink": lambda: attending(Sink),
    "sliding window": lambda: positioned(SlidingWindow),
    "mixture by einsum": lambda: mlps(Mixture),
    "gated MLP": lambda: mlps(GatedByHand),
    "mish": mish,
    "lora": lora,
    "norms in float64": other_norms,
    "in-place additions": lambda: with_blocks(InPlaceBlock),
    "scratch memory": lambda: with_blocks(ScratchBlock),
    "n-grams": lambda: with_blocks(GatedBlock, max_ngram=3, ngram_rows=512),
    "hooks": averaged_embeddings,
}
OWN: dict[str, tuple[Callable[[], GPT], str]] = {
    "a branch on the data": (lambda: with_blocks(BranchingBlock), "Python code reads numbers out of tensors"),
    "random noise": (lambda: with_blocks(NoisyBlock), "random numbers are drawn"),
}
AFTER_BY_DEFAULT = ("the token before", "the first token", "one attention more", "in place")
BY_DEFAULT = ("gates", "alibi", "mixture by einsum")


@torch.no_grad()
def naive(model: GPT, prompt: list[int], steps: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(steps):
        ids = torch.cat((ids, model(ids[:, -BLOCK:])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids[0, len(prompt) :].tolist()


def prompts() -> list[list[int]]:
    return [TOKENIZER.encode(TEXT[at : at + n]).tolist() for at, n in ((0, 3), (20, 7), (50, 5))]


def assert_equal_to_the_naive_path(model: GPT, monkeypatch: pytest.MonkeyPatch) -> Generator:
    """One row, then three ragged rows, over several windows and past block_size."""
    monkeypatch.setattr(window, "BUCKET", 8)
    steps = BLOCK + 4
    expected = [naive(model, prompt, steps) for prompt in prompts()]
    assert len(set(expected[0])) > 3, "the model repeats itself: the test proves nothing"
    generator = Generator(model, TOKENIZER)
    params = GenerationConfig(num_samples=1, max_new_tokens=steps, temperature=0.0)
    for some in (prompts()[:1], prompts()):
        found = [sample.tokens for sample in generator.generate(some, params)]
        assert found == expected[: len(some)]
    return generator


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in RECORDED]
)
def test_an_edited_model_is_recorded_and_generates_the_same_text(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = assert_equal_to_the_naive_path(RECORDED[name](), monkeypatch)
    assert capsys.readouterr().err == ""
    assert (1, BLOCK) in generator.decoder.recorded.records and generator.decoder.cacheable


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", OWN)
def test_a_model_that_cannot_be_recorded_decodes_by_its_own_forward_with_a_reason(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = OWN[name]
    generator = assert_equal_to_the_naive_path(make(), monkeypatch)
    err = capsys.readouterr().err
    assert err.startswith(f"decoding with the model's own forward: {reason}") and err.count("\n") == 1
    assert not generator.decoder.recorded.records


def test_a_model_that_needs_whole_sequences_decodes_without_a_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = assert_equal_to_the_naive_path(with_blocks(ShiftedBlock), monkeypatch)
    err = capsys.readouterr().err
    assert err == "decoding without a cache: with a cache, this model's forward gives different logits\n"
    assert not generator.decoder.cacheable


def test_a_record_that_confuses_window_and_text_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    """Also if at first, in a full window, it is right: then it is compared again."""
    model = attending(LengthScaled)
    for first in (4, 7):
        decoder, cache = Decoder(model, say=print), KVCache(model.config, 1, 8)
        idx = torch.randint(V, (1, 9))
        decoder.read(idx[:, :first], cache)
        cache.advance(first)
        found = decoder.step(idx[:, first], cache)
        assert (decoder.recorded.failure is None) == (first == 7)
        cache.advance(-3)
        with torch.no_grad():
            expected = model(idx[:, 5, None], cache=cache)[0][:, 0]
        torch.testing.assert_close(decoder.step(idx[:, 5], cache), expected)
        assert decoder.recorded.failure == "the recorded step's logits differ" and found.isfinite().all()


def test_inputs_may_be_anywhere_in_memory() -> None:
    """The newest tokens as a column of a table: a record's views count from the beginning of their memory."""
    model = with_blocks(GatedBlock, max_ngram=3, ngram_rows=512)
    decoder, cache, table = Decoder(model), KVCache(model.config, 3), torch.randint(V, (3, 9))
    decoder.read(table[:, :4], cache)
    cache.advance([4, 3, 2])
    for at in (5, 6):
        with torch.no_grad():
            expected = model(table[:, at, None], cache=cache)[0][:, 0]
        torch.testing.assert_close(decoder.step(table[:, at], cache), expected, rtol=1e-4, atol=1e-4)
        cache.advance(1)
    assert decoder.recorded.records


class After(nn.Module):
    """In the place of the final norm: something with all tokens of the last layer."""

    def __init__(self, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "the token before": lambda x: x + F.pad(x, (0, 0, 1, 0))[:, :-1],
    "differences": lambda x: torch.cat((x[:, :1], x[:, 1:] - x[:, :-1]), dim=1),
    "the first token": lambda x: x - x[:, :1],
    "a token in the middle": lambda x: x + x.narrow(1, x.size(1) // 2, 1),
    "the mean": lambda x: x + x.mean(1, keepdim=True),
    "sums": lambda x: x.cumsum(1),
    "a turn": lambda x: x.flip(1) + x,
    "a softmax of tokens": lambda x: x.softmax(1),
    "products of tokens": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "one attention more": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "all in one row": lambda x: F.layer_norm(x, x.shape[1:]),
    "in place": lambda x: x.clone().add_(x[:, :1]),
    "a new shape": lambda x: x.reshape(x.size(0), -1, 2 * x.size(2)).repeat_interleave(2, dim=1)[..., : x.size(2)],
    "a window of tokens": lambda x: x.unfold(1, 3, 1).sum(-1),
}


@pytest.mark.parametrize(
    "width", [BLOCK, pytest.param(64, marks=pytest.mark.slow)]
)  # no dimension is known by its size
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in AFTER_BY_DEFAULT else pytest.mark.slow) for name in AFTER]
)
def test_mixing_after_the_last_attention_is_detected_when_the_window_slides(name: str, width: int) -> None:
    model = model_of(n_embd=width) if width == 64 else model_of(n_embd=width, n_head=2)
    model.transformer.ln_f = After(AFTER[name])
    model = vivid(model)
    step = DecodeStep(model, Linears(model))
    for rows in (1, 2):
        idx = torch.randint(V, (rows, BLOCK), generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            expected = model(idx)[0][:, -1]
        torch.testing.assert_close(step.last(idx), expected, rtol=1e-4, atol=1e-4)
    assert step.failure is None and len(step.records) == 2


def test_an_edit_of_a_weight_is_seen() -> None:
    """A parameter that is folded into a constant of the record."""
    model = with_parts(lambda block, config: None)
    for block in model.transformer.h:
        block.ln_1 = PlusOneNorm(64)
    generator = Generator(model, TOKENIZER)
    params = GenerationConfig(num_samples=1, max_new_tokens=BLOCK - 4, temperature=0.0)
    before = generator.generate(prompts()[:1], params)[0].tokens
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight.add_(torch.linspace(-2, 2, 64))
    after = generator.generate(prompts()[:1], params)[0].tokens
    assert after != before and after == naive(model, prompts()[0], BLOCK - 4)


def test_the_model_itself_is_left_as_it_was() -> None:
    model = copy.deepcopy(with_blocks(GatedBlock))
    names = {name: type(module) for name, module in model.named_modules()}
    state = {name: p.clone() for name, p in model.state_dict().items()}
    Generator(model, TOKENIZER).generate(prompts(), GenerationConfig(num_samples=1, max_new_tokens=9))
    assert {name: type(module) for name, module in model.named_modules()} == names
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert model.compute_dtype is None and not model.training
