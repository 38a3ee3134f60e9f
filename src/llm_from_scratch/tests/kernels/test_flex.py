"""kernels/flex.py against attention in which every pair of tokens is decided by hand. Its kernel for CUDA is not
tested: on a CPU, flex_attention computes all scores, and refuses gradients unless its check is removed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm_from_scratch.config import Config, GPTConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.cache import Documents, document_blocks
from llm_from_scratch.core.model import GPT, Attention
from llm_from_scratch.kernels.flex import document_attention
from llm_from_scratch.kernels.swap import swap

pytestmark = pytest.mark.slow
ROPE: dict[str, Any] = {"pos_embedding": "rope", "n_kv_head": 1, "bias": False, "n_layer": 2, "n_head": 2, "n_embd": 32}


@pytest.fixture(autouse=True)
def gradients_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def numbers_of(*rows: list[int]) -> Tensor:
    """The documents at each position, from their lengths; the last one stands for padding."""
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows])


def with_blocks(numbers: Tensor) -> Documents:
    return Documents(numbers, blocks=True)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=["own keys", "grouped"])
def test_attention_and_its_gradients_equal_each_document_alone(heads: tuple[int, int]) -> None:
    rows = [1, 2, 130, 3, 160, 4], [300], [128, 128, 44]
    numbers, (H, G), T = numbers_of(*rows), heads, 300
    attend, generator = document_attention()(0.0), torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, n, T, 16, dtype=torch.float64, generator=generator, requires_grad=True) for n in (H, G, G)
    )
    weights = torch.randn(3, H, T, 16, dtype=torch.float64, generator=generator)
    found = attend(q, k, v, with_blocks(numbers).mask, False)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    parts = []
    for b, row in enumerate(rows):
        ends = torch.tensor(row).cumsum(0).tolist()
        for begin, end in zip([0, *ends], ends, strict=False):
            qi, ki, vi = (t[b : b + 1, :, begin:end] for t in (q, k, v))
            parts.append(F.scaled_dot_product_attention(qi, ki, vi, is_causal=True, enable_gqa=H > G))
    places = [sum(len(r) for r in rows[:b]) for b in range(4)]
    expected = torch.cat([torch.cat(parts[a:b], dim=2) for a, b in zip(places, places[1:], strict=False)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), rtol=1e-9, atol=1e-12
    )


def test_blocks_of_other_documents_are_skipped() -> None:
    blocks = document_blocks(numbers_of([128, 128, 256, 128], [640]))
    visited = blocks.to_dense()[:, 0].bool()
    one, whole = torch.zeros(5, 5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).tril()
    for begin, end in ((0, 1), (1, 2), (2, 4), (4, 5)):
        one[begin:end, begin:end] = whole[begin:end, begin:end]
    assert torch.equal(visited, torch.stack((one, whole)))


def model(**changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"block_size": 200, "vocab_size": 32, **ROPE, **changes}))


def results(one: GPT, idx: Tensor, documents: Documents) -> list[Tensor]:
    logits, loss = one(idx, (idx * 7 + 1) % 32, documents)
    assert loss is not None
    return [logits, loss, *torch.autograd.grad(loss, list(one.parameters()))]


def test_a_model_computes_the_same_compiled_too_and_is_compiled_once() -> None:
    numbers = numbers_of(
        [70, 5, 100, 25],
        [
            200,
        ],
    ), numbers_of([10, 10, 180], [1, 199])
    idx = torch.randint(32, (2, 200), generator=torch.Generator().manual_seed(1))
    expected = [results(model(), idx, Documents(n)) for n in numbers]
    assert not torch.equal(expected[0][1], expected[1][1])
    swapped, said, graphs = model(), list[str](), list[Any]()
    assert swap(swapped, {Attention: document_attention()}, said.append) == 2 and not said

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(swapped, backend=keep)
    for one in (swapped, compiled):
        for n, wanted in zip(numbers, expected, strict=True):
            torch.testing.assert_close(results(one, idx, with_blocks(n)), wanted, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1 and "flex_attention" in graphs[0].code
    plain = results(swapped, idx, Documents(numbers[0]))  # a mask that an edited model has changed has no blocks
    torch.testing.assert_close(plain, expected[0], rtol=1e-5, atol=1e-6)


def test_another_formula_is_kept_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def capped(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        scores = 2 * torch.tanh(q @ k.transpose(-2, -1) / 2)
        hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else ~mask
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v

    monkeypatch.setattr(models.Attention, "forward", capped)
    said = list[str]()
    assert swap(model(n_kv_head=2), {Attention: document_attention()}, said.append) == 0
    assert len(said) == 1 and "FlexAttention returns a different result" in said[0]


def test_blocks_are_built_if_a_module_reads_them() -> None:
    numbers, one = numbers_of([70, 5, 100, 25]), model()
    assert not hasattr(Documents.of([numbers], one)[0].mask, "blocks") and not Documents.of([], one)
    assert swap(one, {Attention: document_attention()}, pytest.fail) == 2
    assert hasattr(Documents.of([numbers], one)[0].mask, "blocks")


def test_it_is_used_if_requested_and_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_from_scratch.training import wrap

    chosen = list[Any]()
    monkeypatch.setattr(wrap, "swap", lambda model, replacements, *_: chosen.append(replacements))
    runtime: Any = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float32, is_sharded=False, compile=False, compiled_layers=False,
        world_size=1, products=None,
    )  # fmt: skip
    config = Config(model=model().config)
    config.data.documents, config.training.activation_budget = True, None
    wrap.exchange(model(), config, runtime, 2, pytest.fail)
    assert Attention not in chosen[-1]  # nobody measured it
    for documents, dropout in ((True, 0.0), (True, 0.1), (False, 0.0)):
        config, said = Config(model=model(dropout=dropout).config), list[str]()
        config.data.documents, config.training.activation_budget = documents, None
        config.training.flex_attention = True
        wrap.exchange(model(dropout=dropout), config, runtime, 2, said.append)
        assert (Attention in chosen[-1]) == (documents and not dropout)
        assert said == ["documents: with dropout, attention reads a dense mask and does not skip other documents"] * (
            dropout > 0
        )
