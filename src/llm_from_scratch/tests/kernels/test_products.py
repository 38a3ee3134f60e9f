"""kernels/products.py: the products of both libraries, and the choice between them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm_from_scratch.config import Config, GPTConfig, SystemConfig
from llm_from_scratch.core.model import GPT, Head, Linear
from llm_from_scratch.kernels import products
from llm_from_scratch.kernels.products import ALL_ONEDNN, CPUHead, CPULinear
from llm_from_scratch.kernels.swap import swap
from llm_from_scratch.machine.device import resolve
from llm_from_scratch.training import wrap

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="this torch has no oneDNN")
SHAPE: dict[str, Any] = {"block_size": 8, "vocab_size": 40, "n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("libraries", ["ooo", "ott", "tot", "tto"])
def test_products_and_gradients_are_those_of_float64(libraries: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer: Any = Linear(24, 33, bias=bias)
    layer.__class__ = CPULinear
    layer.libraries = libraries
    x, dy = torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 5, 33)
    y = layer(x)
    y.backward(dy)
    exact = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    expected = F.linear(*exact)
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    found: Any
    for found, wanted in zip((x, *layer.parameters()), exact, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_model_learns_the_same(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        wrap,
        "fastest_libraries",
        lambda model, rows: {products.name_of(m): ALL_ONEDNN for m in model.modules() if isinstance(m, Linear)},
    )
    torch.manual_seed(0)
    plain, said = GPT(GPTConfig(**SHAPE)), list[str]()
    config = Config(model=plain.config, system=SystemConfig(device="cpu", dtype="float32", compile=False))
    config.training.chunked_loss = chunked
    model = copy.deepcopy(plain)
    wrap.exchange(model, config, resolve(config.system), 3, said.append)
    assert type(model.lm_head) is CPUHead and type(model.transformer.h[0].mlp.c_fc) is CPULinear
    assert any(line.startswith("products: ") and "16x64 ooo" in line for line in said)
    ids = torch.arange(27).view(3, 9) * 7 % 40
    for one in (plain, model):
        one(ids[:, :-1], ids[:, 1:])[1].backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-5)
    assert set(products.libraries_of(model).values()) == {ALL_ONEDNN}


def test_a_product_in_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN would compute it with AMX if it were allowed to."""
    rounded = lambda a, b, library: (a.bfloat16() @ b.bfloat16()).float()  # noqa: E731
    monkeypatch.setattr(products, "multiply", rounded)
    model, said = GPT(GPTConfig(**SHAPE)), list[str]()
    assert swap(model, {Linear: CPULinear, Head: CPUHead}, said.append) == 0
    assert "returns a different result" in said[0]


def test_onednn_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(GPTConfig(**SHAPE))
    assert products.fastest_libraries(model, 24) == {}  # too small to measure
    monkeypatch.setattr(products, "LEAST", 0)
    measured = products.relative_time(torch.ones(9, 16), torch.ones(16, 8), "o", "t")
    assert 0 < measured < 1e4
    for ratio, expected in ((0.8, {"ooo"}), (0.95, set())):
        monkeypatch.setattr(products, "relative_time", lambda a, b, library, other, ratio=ratio: ratio)
        found = products.fastest_libraries(model, 24)
        assert set(found.values()) == expected and products.checked_libraries(found) == found
        assert set(found) == ({"16x48", "16x16", "16x64", "64x16", "16x40"} if expected else set())


@pytest.mark.parametrize("saved", [None, [], {"1x1": "oo"}, {"1x1": "oox"}, {"1x1": 3}])
def test_a_damaged_choice_is_measured_again(saved: Any) -> None:
    assert products.checked_libraries(saved) is None
