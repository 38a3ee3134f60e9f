"""core/model.py: each option against an explicit reference, and the cache against no cache."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.model import GPT, Attention, KVCache, apply_rotary
from llm_from_scratch.core.rope import plain_angles
from llm_from_scratch.errors import UserError
from llm_from_scratch.kernels.cpu import WrittenAttention, plain_attention

BASE = GPTConfig(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_embd=32)
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "no_bias": {"bias": False},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "narrow_mlp": {"mlp_hidden": 20},
    "rmsnorm": {"norm": "rmsnorm"},
    "rope": {"pos_embedding": "rope"},
    "gqa": {"n_kv_head": 2},
    "mqa_rope": {"n_kv_head": 1, "pos_embedding": "rope", "rope_theta": 500.0},
    "qk_norm": {"qk_norm": True},
    "untied": {"tie_embeddings": False},
    "softcap": {"logit_softcap": 2.0},
    "modern": {
        "pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "qk_norm": True,
        "tie_embeddings": False, "logit_softcap": 5.0, "bias": False,
    },
}  # fmt: skip
every_option = pytest.mark.parametrize("option", OPTIONS)


def make(option: str = "gpt2", **changes: Any) -> Any:
    """A model whose weights are large enough for every part to show in the logits."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(BASE, **{**OPTIONS[option], **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.2)
    return model


def tokens(*shape: int, seed: int = 0, vocab: int = 23) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def all_logits(model: GPT, idx: Tensor) -> Tensor:
    """Logits of every position, (B, T, V), without a cache."""
    with torch.no_grad():
        return model(idx, idx)[0]


# --- attention ---


def naive_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Query by query and head by head. allowed: (B, T, S) bool."""
    B, H, T, D = q.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            kv = h // (H // k.size(1))  # consecutive query heads share a key/value head
            for t in range(T):
                seen = allowed[b, t].nonzero().flatten()
                weights = torch.softmax(torch.stack([q[b, h, t] @ k[b, kv, s] for s in seen]) / math.sqrt(D), dim=0)
                out[b, h, t] = sum(w * v[b, kv, s] for w, s in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("attention", [WrittenAttention(0.0), Attention(0.0)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_a_loop(attention: Any, kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 8)
    k, v = torch.randn(2, kv_heads, 5, 8), torch.randn(2, kv_heads, 5, 8)
    expected = naive_attention(q, k, v, torch.ones(2, 5, 5).tril().bool())
    torch.testing.assert_close(attention(q, k, v, None, True), expected, atol=1e-5, rtol=1e-5)
    k, v = torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 8)
    allowed = torch.rand(2, 5, 7) > 0.5
    allowed[..., 0] = True
    result = attention(q, k, v, allowed[:, None], False)
    torch.testing.assert_close(result, naive_attention(q, k, v, allowed), atol=1e-5, rtol=1e-5)


@every_option
def test_plain_attention_gives_the_logits_of_the_fused_kernels(option: str) -> None:
    model, idx = make(option), tokens(2, 16)
    fused = all_logits(model, idx)
    for block in model.transformer.h:
        block.attn.attend = WrittenAttention(0.0)
    torch.testing.assert_close(all_logits(model, idx), fused, atol=1e-5, rtol=1e-5)


def test_attention_drops_out_in_training_only() -> None:
    model, idx = make(dropout=0.5), tokens(2, 16)
    assert torch.equal(all_logits(model, idx), all_logits(model, idx))
    model.train()
    assert not torch.equal(all_logits(model, idx), all_logits(model, idx))
    assert torch.equal(all_logits(make(dropout=0.5), idx), all_logits(make(dropout=0.0), idx))


def test_plain_attention_drops_out_whole_weights() -> None:
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 64, 4)
    v = torch.ones(1, 1, 64, 4)
    out = plain_attention(q, k, v, None, 0.25, False)
    assert abs(out.mean().item() - 1.0) < 0.05 and out.std() > 0.01  # scaled up by 1 / (1 - p)


def test_grouped_query_attention_is_attention_with_repeated_heads() -> None:
    grouped = make("gqa")
    full = make()
    state, head = grouped.state_dict(), 8
    for name in [n for n in state if ".c_attn." in n]:
        q, k, v = state[name].split((4 * head, 2 * head, 2 * head))
        k, v = (t.view(2, head, *t.shape[1:]).repeat_interleave(2, dim=0).flatten(0, 1) for t in (k, v))
        state[name] = torch.cat((q, k, v))
    full.load_state_dict(state)
    idx = tokens(3, 16)
    torch.testing.assert_close(all_logits(grouped, idx), all_logits(full, idx), atol=1e-5, rtol=1e-5)


# --- positions ---


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(query_at: int, key_at: int) -> float:
        rotated = (
            apply_rotary(x, *plain_angles(torch.tensor([at]), 8, 100.0)) for x, at in ((q, query_at), (k, key_at))
        )
        return float((next(rotated) * next(rotated)).sum())

    assert score(3, 1) == pytest.approx(score(10, 8), abs=1e-5)
    assert score(7, 7) == pytest.approx(float((q * k).sum()), abs=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3 and abs(score(3, 1) - score(1, 3)) > 1e-3


def test_rotary_pairs_by_hand() -> None:
    """The pair (x[0], x[2]) turns by the position, (x[1], x[3]) by position / theta**(2 / 4)."""
    cos, sin = plain_angles(torch.tensor([2]), 4, 100.0)
    assert cos.shape == (1, 1, 2) and cos.dtype == torch.float32
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    a, b = 2.0, 2.0 / 10
    expected = [
        math.cos(a) * 1 - math.sin(a) * 3, math.cos(b) * 2 - math.sin(b) * 4,
        math.cos(a) * 3 + math.sin(a) * 1, math.cos(b) * 4 + math.sin(b) * 2,
    ]  # fmt: skip
    assert apply_rotary(x, cos, sin).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_a_rope_model_is_blind_to_absolute_position() -> None:
    """With one block, the same tokens further right give the same logits as long as they see only themselves."""
    model = make("rope", n_layer=1)
    idx = tokens(1, 5)
    cache = KVCache(model.config, 1)
    with torch.no_grad():
        plain = all_logits(model, idx)
        cache.positions = None
        begin = cache.begin
        cache.begin = lambda T: begin(T) + 7  # type: ignore[method-assign]
        moved = model(idx, cache=cache)[0]
    torch.testing.assert_close(moved, plain, atol=1e-5, rtol=1e-5)
    assert "transformer.wpe.weight" not in model.state_dict()


# --- what every configuration must hold to ---


@every_option
def test_the_past_does_not_see_the_future(option: str) -> None:
    model, idx = make(option), tokens(1, 16)
    before = all_logits(model, idx)
    for t in (0, 7, 15):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 23
        after = all_logits(model, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert all((after[0, s] - before[0, s]).abs().max() > 1e-6 for s in range(t, 16))


@every_option
def test_loss_is_the_mean_cross_entropy_of_learned_tokens(option: str) -> None:
    model, idx, targets = make(option), tokens(2, 16), tokens(2, 16, seed=1)
    targets[0, 3:9] = -1
    with torch.no_grad():
        logits, loss = model(idx, targets)
    log_probabilities = logits.double().log_softmax(-1)
    counted = [-log_probabilities[b, t, targets[b, t]] for b in range(2) for t in range(16) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx(float(sum(counted) / len(counted)), rel=1e-5)
    assert logits.shape == (2, 16, 23)


@every_option
def test_every_parameter_gets_a_gradient(option: str) -> None:
    model, idx = make(option), tokens(2, 16)
    model(idx, idx.roll(-1, 1))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@every_option
def test_last_and_chosen_positions(option: str) -> None:
    model, idx = make(option), tokens(3, 9)
    full = all_logits(model, idx)
    with torch.no_grad():
        last, loss = model(idx)
        assert loss is None and last.shape == (3, 1, 23)
        torch.testing.assert_close(last, full[:, -1:], atol=1e-6, rtol=1e-6)
        at = torch.tensor([0, 8, 4])
        chosen, _ = model(idx, logits_at=at)
        torch.testing.assert_close(chosen[:, 0], full[torch.arange(3), at], atol=1e-6, rtol=1e-6)


def test_softcap_bounds_the_logits() -> None:
    plain, capped = make(), make("softcap")
    capped.load_state_dict(plain.state_dict())
    idx = tokens(2, 16)
    expected = 2.0 * torch.tanh(all_logits(plain, idx) / 2.0)
    torch.testing.assert_close(all_logits(capped, idx), expected)
    assert all_logits(plain, idx).abs().max() > 2 > all_logits(capped, idx).abs().max()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2", "swiglu"])
def test_mlp_written_out(activation: Any) -> None:
    mlp = make(activation=activation).transformer.h[0].mlp
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    up = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    if activation == "gelu":
        hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    elif activation == "gelu_tanh":
        hidden = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    elif activation == "relu2":
        hidden = up.clamp(min=0) ** 2
    else:
        gate = x @ mlp.c_gate.weight.T + mlp.c_gate.bias
        hidden = gate * torch.sigmoid(gate) * up
    expected = hidden @ mlp.c_proj.weight.T + mlp.c_proj.bias
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)


def test_rms_norm_by_hand() -> None:
    norm = models.RMSNorm(4, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.tensor([1.0, -2.0, 3.0, 0.0])  # mean of squares 3.5
    assert norm(x).tolist() == pytest.approx([0.5, -2.0, 4.5, 0.0], abs=1e-6)


@every_option
def test_initial_weights_follow_the_table(option: str) -> None:
    torch.manual_seed(1)
    model = GPT(dataclasses.replace(BASE, vocab_size=200, n_embd=64, **OPTIONS[option]))
    for name, p in model.named_parameters():
        kind = name.split(".")[-2]
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 2) if kind == "c_proj" else 0.02
            assert abs(p.mean()) < 5 * std / math.sqrt(p.numel()), name
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name


def test_tied_and_untied_heads() -> None:
    tied, untied = make(), make("untied")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert untied.get_num_params() - tied.get_num_params() == 23 * 32


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="a sequence of 17 tokens exceeds the model's block_size=16"):
        make()(tokens(1, 17))
    with pytest.raises(UserError, match="vocab_size is not set"):
        GPT(dataclasses.replace(BASE, vocab_size=None))
    with pytest.raises(UserError, match="not divisible"):
        GPT(dataclasses.replace(BASE, n_head=5))


# --- the cache ---


@every_option
def test_cached_equals_uncached_for_a_ragged_batch(option: str) -> None:
    """Prompts of different length, read once, then grown by one token and by several."""
    model = make(option)
    lengths = [1, 7, 4, 9]
    rows = [tokens(16, seed=10 + b) for b in range(4)]
    prompt = torch.zeros(4, 9, dtype=torch.long)
    for b, n in enumerate(lengths):
        prompt[b, :n] = rows[b][:n]
        prompt[b, n:] = 22  # padding must not matter
    cache = KVCache(model.config, 4)
    expected = [all_logits(model, row[None])[0] for row in rows]
    at = list(lengths)

    def compare(logits: Tensor, counts: list[int]) -> None:
        for b, n in enumerate(counts):
            torch.testing.assert_close(logits[b, :n], expected[b][at[b] - n : at[b]], atol=1e-5, rtol=1e-4)

    with torch.no_grad():
        logits, _ = model(prompt, cache=cache)
        assert cache.lengths.tolist() == [0, 0, 0, 0]  # advance() is the caller's
        compare(logits, lengths)
        cache.advance(torch.tensor(lengths))
        for step in (1, 1, 3, 2):  # 7 more tokens each: the longest row ends at block_size
            new = torch.stack([rows[b][at[b] : at[b] + step] for b in range(4)])
            logits, _ = model(new, cache=cache)
            at = [n + step for n in at]
            compare(logits, [step] * 4)
            cache.advance(step)
    assert cache.lengths.tolist() == at == [8, 14, 11, 16]


@pytest.mark.parametrize("option", ["gpt2", "modern"])
def test_cached_equals_uncached_for_rows_of_one_length(option: str) -> None:
    model, idx = make(option), tokens(3, 16)
    expected, cache = all_logits(model, idx), KVCache(model.config, 3)
    at = 0
    with torch.no_grad():
        for step in (5, 1, 4, 1, 5):
            logits, _ = model(idx[:, at : at + step], cache=cache)
            torch.testing.assert_close(logits, expected[:, at : at + step], atol=1e-5, rtol=1e-4)
            cache.advance(step)
            at += step
    assert not cache.ragged


@pytest.mark.parametrize("option", ["gpt2", "modern"])
def test_rows_of_a_cache_can_be_selected_and_repeated(option: str) -> None:
    model = make(option)
    lengths, rows = [2, 6, 4], [tokens(16, seed=b) for b in range(3)]
    prompt = torch.stack([row[:6] for row in rows])
    cache = KVCache(model.config, 3)
    pick = [2, 0, 2]
    with torch.no_grad():
        model(prompt, cache=cache)
        cache.advance(torch.tensor(lengths))
        chosen = cache.select(torch.tensor(pick))
        assert chosen.lengths.tolist() == [4, 2, 4] and cache.lengths.tolist() == lengths
        new = torch.tensor([[1], [2], [3]])
        logits, _ = model(new, cache=chosen)
        for row, (b, token) in enumerate(zip(pick, (1, 2, 3), strict=True)):
            whole = torch.cat((rows[b][: lengths[b]], torch.tensor([token])))
            torch.testing.assert_close(logits[row, -1], all_logits(model, whole[None])[0, -1], atol=1e-5, rtol=1e-4)
        model(torch.full((3, 1), 5), cache=cache)  # the first cache is still its own
        cache.advance(1)
        logits, _ = model(torch.full((3, 1), 6), cache=cache)
        whole = torch.cat((rows[0][:2], torch.tensor([5, 6])))
        torch.testing.assert_close(logits[0, -1], all_logits(model, whole[None])[0, -1], atol=1e-5, rtol=1e-4)
        alone = cache.select(torch.tensor([1]))
        assert not alone.ragged and alone.end == 7


def test_a_full_cache_is_an_error() -> None:
    model, cache = make(), KVCache(BASE, 1, max_len=4)
    with torch.no_grad():
        model(tokens(1, 3), cache=cache)
        cache.advance(3)
        with pytest.raises(ValueError, match="3 cached . 2 new tokens exceed the cache's max_len=4"):
            model(tokens(1, 2), cache=cache)


def test_a_cache_in_bfloat16_is_close() -> None:
    model, idx = make("modern").bfloat16(), tokens(2, 16)
    cache = KVCache(model.config, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        model(idx[:, :15], cache=cache)
        cache.advance(15)
        logits, _ = model(idx[:, 15:], cache=cache)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, all_logits(model, idx)[:, 15:], atol=0.15, rtol=0.1)


# --- nanoGPT's methods ---


@pytest.mark.parametrize("option", ["gpt2", "modern"])
def test_crop_block_size_shortens_the_context_only(option: str) -> None:
    config = dataclasses.replace(BASE, **OPTIONS[option])
    model = make(option)
    idx = tokens(2, 8)
    before = all_logits(model, idx)
    model.crop_block_size(8)
    assert torch.equal(all_logits(model, idx), before)
    assert model.config.block_size == 8 and config.block_size == 16  # the caller's configuration is its own
    rebuilt = GPT(model.config)
    rebuilt.load_state_dict(model.state_dict())
    with pytest.raises(UserError):
        model(tokens(1, 9))
    for wrong in (0, 9):
        with pytest.raises(UserError, match="must be between 1 and the model's 8"):
            model.crop_block_size(wrong)


def test_generate_keeps_all_ties_at_the_kth_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    logits = torch.tensor([[[0.0, 3.0, 2.0, 2.0, 2.0, 1.0, 0.0]]])
    monkeypatch.setattr(model, "forward", lambda idx, **_: (logits.expand(len(idx), 1, 7), None))
    torch.manual_seed(0)
    drawn = model.generate(torch.zeros(4000, 1, dtype=torch.long), 1, top_k=2)[:, 1]
    counts = torch.bincount(drawn, minlength=7).tolist()
    assert counts[0] == counts[5] == counts[6] == 0
    expected = (torch.tensor([3.0, 2.0, 2.0, 2.0]).softmax(0) * 4000).tolist()
    assert counts[1:5] == pytest.approx(expected, abs=150)
    assert model.generate(torch.zeros(2, 1, dtype=torch.long), 3, top_k=1)[:, 1:].tolist() == [[1] * 3] * 2
    assert model.generate(torch.zeros(1, 1, dtype=torch.long), 3, top_k=100).shape == (1, 4)


def test_generate_follows_the_window_past_the_context() -> None:
    model = make()
    out = model.generate(tokens(2, 3), 20, temperature=1e-4)
    for t in range(3, 23):
        window = out[:, max(0, t - 16) : t]
        assert out[:, t].tolist() == all_logits(model, window)[:, -1].argmax(-1).tolist()


def test_mfu_by_hand() -> None:
    model = make()
    n = sum(p.numel() for p in model.parameters()) - 16 * 32
    per_token = 6 * n + 12 * 2 * 32 * 16
    assert model.estimate_mfu(5, 0.25, 1e9) == pytest.approx(per_token * 16 * 5 / 0.25 / 1e9)
