"""kernels/cpu.py: the same numbers and gradients as the plain operations of core/model.py and torch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from llm_from_scratch.config import Config, GPTConfig, SystemConfig
from llm_from_scratch.core.cache import Documents
from llm_from_scratch.core.model import GPT, ReLUSquared, SwiGLU, apply_rotary
from llm_from_scratch.core.rope import plain_angles
from llm_from_scratch.kernels import cpu as kernels
from llm_from_scratch.kernels.cpu import plain_attention
from llm_from_scratch.kernels.swap import swap
from llm_from_scratch.machine.device import resolve
from llm_from_scratch.training.wrap import exchange

DOUBLE = torch.float64


def qkv(B: int, H: int, Hkv: int, T: int, D: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, list[Tensor]]:
    """A fused projection, and the views of it that the model hands to attention."""
    torch.manual_seed(0)
    fused = torch.randn(B, T, H + 2 * Hkv, D, dtype=dtype, requires_grad=True)
    return fused, list(fused.transpose(1, 2).split((H, Hkv, Hkv), dim=1))


@pytest.mark.parametrize(
    "shape",
    [(3, 4, 4, 64, 8), (2, 4, 2, 100, 4), (5, 2, 1, 200, 4), (1, 2, 2, 2, 4), (2, 2, 2, 65, 4)],
    ids=["one block", "grouped", "several blocks", "two tokens", "a block of one query"],
)
@pytest.mark.parametrize("weights", [kernels.WEIGHTS, 1], ids=["many rows", "row by row"])
def test_attention_is_the_plain_one(
    shape: tuple[int, int, int, int, int], weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "WEIGHTS", weights)
    results = []
    for attend in (kernels.WrittenAttention(0.0), kernels.CPUAttention(0.0), kernels.LeanCPUAttention(0.0)):
        fused, (q, k, v) = qkv(*shape)
        y = attend(q, k, v, None, True)
        y.backward(torch.randn(y.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)))
        results.append((y.detach(), fused.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(results[2], results[1], atol=0, rtol=0)


def test_attention_without_gradients_or_with_a_mask_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.CausalAttention, "apply", None)
    fused, (q, k, v) = qkv(1, 2, 2, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    expected = plain_attention(q, k, v, None, 0.0, True)
    torch.testing.assert_close(kernels.CPUAttention(0.0)(q, k, v, mask, False), expected)
    with torch.no_grad():
        torch.testing.assert_close(kernels.CPUAttention(0.0)(q, k, v, None, True), expected)


@pytest.mark.parametrize("ends", [[9, 20, 70, 71, 130], [130], list(range(1, 131, 3))], ids=["some", "one", "many"])
def test_attention_of_documents_is_the_plain_one(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of documents of different lengths; keys of other documents are left out, not only masked."""
    number = torch.bucketize(torch.arange(130), torch.tensor(ends), right=True)
    numbers = torch.stack((number, number.flip(0).max() - number.flip(0), torch.zeros(130, dtype=torch.long)))
    mask, results = Documents(numbers).mask, []
    monkeypatch.setattr(kernels, "WEIGHTS", 2 * 4 * 64 * 130)  # two sequences at a time
    for attend in (kernels.WrittenAttention(0.0), kernels.CPUAttention(0.0), kernels.LeanCPUAttention(0.0)):
        fused, (q, k, v) = qkv(3, 4, 2, 130, 4)
        y = attend(q, k, v, mask, False)
        y.backward(torch.randn(y.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)))
        results.append((y.detach(), fused.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(results[2], results[1], atol=0, rtol=0)
    widths = [block.keys.stop - block.keys.start for block in kernels.masked_blocks(mask[:1, 0])]
    assert max(widths) <= 64 + max(np.diff([0, *ends, 130]))


def test_a_second_derivative_is_an_error() -> None:
    """What forward stored would count as a constant."""
    fused, (q, k, v) = qkv(1, 2, 1, 4, 8)
    x, angles = torch.randn(2, 8, requires_grad=True), torch.randn(1, 4, 4, dtype=DOUBLE)
    rotated = kernels.CPURotaryPositions(GPTConfig(pos_embedding="rope"))(q, k, angles.cos(), angles.sin())
    results = {
        "CausalAttention": (kernels.CPUAttention(0.0)(q, k, v, None, True), fused),
        "Rotate": (rotated[0], fused),
        "RMSNormalize": (kernels.CPURMSNorm(8)(x), x),
        "GatedSiLU": (kernels.CPUSwiGLU()(x, x), x),
        "SquaredReLU": (kernels.CPUReLUSquared()(x), x),
    }
    written = {name for name, f in vars(kernels).items() if isinstance(f, type) and issubclass(f, Function)}
    assert set(results) == written
    for y, given in results.values():
        with pytest.raises(RuntimeError, match="lack second derivatives; call"):
            torch.autograd.grad(y.sum(), given, create_graph=True)


@pytest.mark.parametrize("documents", [False, True])
def test_dropped_attention_weights_have_their_gradients(documents: bool) -> None:
    """Finite differences under one and the same mask."""
    mask = Documents((torch.arange(70) // 30)[None]).mask if documents else None
    _, (q, k, v) = qkv(1, 2, 1, 70, 3)

    def with_one_mask(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return kernels.CausalAttention.apply(*inputs, 0.4, False, mask)

    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(with_one_mask, inputs, fast_mode=True)


def test_attention_drops_whole_weights_and_keeps_the_mean() -> None:
    """Equal scores and values of one: each output is the share of the weights that stay, scaled up."""
    torch.manual_seed(0)
    q = k = torch.zeros(8, 4, 128, 4, requires_grad=True)
    y = kernels.CausalAttention.apply(q, k, torch.ones(8, 4, 128, 4), 0.25, True)
    kept = y[..., 0] * 0.75 * torch.arange(1, 129)  # weights that each query keeps
    assert torch.allclose(kept, kept.round(), atol=1e-3)
    assert (kept <= torch.arange(1, 129) + 1e-3).all()
    assert abs(y.mean().item() - 1) < 0.01 and y[:, :, 0].unique().numel() == 2


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.999])
def test_masks_drop_the_given_fraction(p: float) -> None:
    torch.manual_seed(0)
    mask, scale = kernels.keep_mask(torch.Size((1000, 1003)), p, torch.bfloat16)
    kept = 1 - round(p * 65536) / 65536
    assert set(mask.unique().tolist()) <= {0.0, 1.0} and scale == pytest.approx(1 / kept)
    count, n = mask.sum(dtype=DOUBLE).item(), mask.numel()
    assert abs(count - kept * n) <= 5 * (n * kept * (1 - kept)) ** 0.5  # five standard deviations
    again, _ = kernels.keep_mask(torch.Size((1000, 1003)), p, torch.bfloat16)
    torch.manual_seed(0)
    same, _ = kernels.keep_mask(torch.Size((1000, 1003)), p, torch.bfloat16)
    assert torch.equal(same, mask) and (p == 0.0 or not torch.equal(again, mask))


def test_dropout_scales_the_kept_values_and_their_gradient() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, requires_grad=True)
    y = kernels.CPUDropout(0.5)(x)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach()) and set(y.tolist()) == {0.0, 2.0}


def test_rotation_is_the_plain_one() -> None:
    cos, sin = plain_angles(torch.arange(5), 8, 100.0)
    results = []
    for rotate in (apply_rotary, kernels.Rotate.apply):
        fused, (q, _, _) = qkv(2, 3, 3, 5, 8)
        y = rotate(q, cos.double(), sin.double())
        y.backward(torch.arange(y.numel(), dtype=DOUBLE).view(y.shape).cos())
        results.append((y.detach(), fused.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("numbers", [kernels.PASS, 24], ids=["whole", "a few rows at a time"])
def test_rms_norm_is_torchs(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PASS", numbers)
    torch.manual_seed(0)
    results = []
    values = torch.randn(4, 5, 8, dtype=DOUBLE), torch.randn(8, dtype=DOUBLE)
    for norm in (lambda x, w: F.rms_norm(x, (8,), w, 1e-3), lambda x, w: kernels.RMSNormalize.apply(x, w, 1e-3)):
        x, w = (t.clone().requires_grad_() for t in values)
        y = norm(x, w)
        results.append((y.detach(), *torch.autograd.grad(y, (x, w), values[0].cos())))
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-10)
    x = values[0].transpose(0, 1).requires_grad_()  # as of heads: its rows cannot be viewed as a list
    y = kernels.RMSNormalize.apply(x, values[1], 1e-3)
    torch.testing.assert_close(y, results[0][0].transpose(0, 1), atol=1e-12, rtol=1e-10)
    (dx,) = torch.autograd.grad(y, x, values[0].cos().transpose(0, 1))  # the weight is frozen
    torch.testing.assert_close(dx, results[0][1].transpose(0, 1), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("numbers", [kernels.PASS, 12], ids=["whole", "a few rows at a time"])
@pytest.mark.parametrize("case", ["swiglu", "relu2"])
def test_activations_and_their_gradients_are_the_plain_ones(
    case: str, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PASS", numbers)
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, dtype=DOUBLE) for _ in range(2 if case == "swiglu" else 1)]
    kinds = (SwiGLU, kernels.CPUSwiGLU) if case == "swiglu" else (ReLUSquared, kernels.CPUReLUSquared)
    results = []
    for kind in kinds:
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = kind()(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, inputs[0].cos())])
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-10)
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(kinds[1](), leaves)


def test_a_tied_table_gets_the_gradients_of_both_its_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against nn.Embedding, over two micro-batches; and alone, as in a model whose loss does not use the head."""
    monkeypatch.setattr(kernels, "MANY_ROWS", 32)
    config = GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=1, n_embd=8)
    torch.manual_seed(0)
    plain = GPT(config)
    model, idx = copy.deepcopy(plain), torch.randint(32, (2, 3, 9), generator=torch.Generator().manual_seed(0))
    exchange(model, Config(model=config), resolve(SystemConfig(device="cpu", dtype="float32", compile=False)), 3, print)
    assert type(model.transformer.wte) is kernels.CPUTiedEmbedding and type(model.transformer.wpe) is torch.nn.Embedding
    for one in (plain, model):
        for ids in idx:
            one(ids[:, :-1], ids[:, 1:])[1].backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-7, rtol=1e-6)
    for one in (plain, model):
        one.zero_grad(set_to_none=True)
        one.transformer.wte(idx[0]).square().sum().backward()
    assert model.lm_head.weight.grad is not None and not model.lm_head.weight.grad.is_sparse
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad)


def test_autocast_may_leave_queries_and_values_in_two_types() -> None:
    """float16 with rotary positions and dropout: the rotation computes in float32."""
    _, (q, k, v) = qkv(2, 2, 1, 4, 4, torch.float32)
    attend, half = kernels.CPUAttention(0.1).train(), v.half().detach().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = attend(q, k, half, None, True)
    y.sum().backward()
    assert y.dtype == torch.float16 and half.grad is not None and half.grad.isfinite().all()


MODERN: dict[str, Any] = {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True}


@pytest.mark.parametrize("changes", [{}, {**MODERN, "n_kv_head": 2}], ids=["gpt2", "modern"])
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_a_model_trains_as_without_them(changes: dict[str, Any], in_bfloat16: bool) -> None:
    """float32 with them agrees with float32 without; bfloat16 with them as closely as bfloat16 without."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig(block_size=80, vocab_size=31, n_layer=2, n_head=4, n_embd=32, bias=False, **changes))
    model = copy.deepcopy(plain)
    said: list[str] = []
    assert swap(model, kernels.cpu_replacements(model, in_bfloat16, compiled=False)[0], said.append) and not said
    model.compute_dtype = torch.bfloat16 if in_bfloat16 else None
    idx = torch.randint(31, (3, 81))
    grads = []
    for one in (plain, model):
        _, loss = one(idx[:, :-1], idx[:, 1:])
        loss.backward()
        grads.append([loss.detach()] + [p.grad for p in one.parameters()])
    for expected, found in zip(*grads, strict=True):
        assert expected is not None and found is not None
        error = (found - expected).norm() / expected.norm()
        assert error < (0.03 if in_bfloat16 else 1e-5)
    assert set(model.state_dict()) == set(plain.state_dict())
