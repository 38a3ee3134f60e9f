"""kernels/products.py and blas.py: the products of each library, and the choice between them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from llm_from_scratch.config import Config, GPTConfig, SystemConfig
from llm_from_scratch.core.model import GPT, Head, Linear
from llm_from_scratch.kernels import blas, products
from llm_from_scratch.kernels.products import ALL_ONEDNN, CPUHead, CPULinear
from llm_from_scratch.kernels.swap import swap
from llm_from_scratch.machine.device import resolve
from llm_from_scratch.training import wrap

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="this torch has no oneDNN")
SHAPES = ("16x48", "16x16", "16x64", "64x16", "16x40")
SHAPE: dict[str, Any] = {"block_size": 8, "vocab_size": 40, "n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.fixture(autouse=True)
def measured_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor of this machine."""
    monkeypatch.setattr(blas, "is_fastest_here", lambda: False)


@pytest.fixture
def openblas(kernel: Any) -> None:
    if not blas.has_openblas():
        pytest.skip("numpy has another library")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("libraries", ["ooo", "ott", "tot", "tto", "bbb", "btb"])
def test_products_and_gradients_equal_float64(libraries: str, bias: bool, request: pytest.FixtureRequest) -> None:
    if "b" in libraries:
        request.getfixturevalue("openblas")
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


@pytest.mark.usefixtures("openblas")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "rows, inputs, outputs", [(1, 1, 1), (3, 5, 7), (64, 128, 97), (1, 64, 2000), (2000, 40, 50), (500, 33, 1)]
)
def test_slices_of_openblas_make_the_whole_product(threads: int, rows: int, inputs: int, outputs: int) -> None:
    random, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, w, dy, total = (
        torch.randn(*shape, generator=random)
        for shape in ((rows, inputs), (outputs, inputs), (rows, outputs), (rows, inputs))
    )
    torch.set_num_threads(threads)
    try:
        for a, b in ((x, w.t()), (dy, w), (dy.t(), x)):  # the layouts of an output and of both gradients
            expected = a.double() @ b.double()
            assert (products.multiply(a, b, "b") - expected).norm() <= 1e-6 * expected.norm()
        expected = total.double() + dy.double() @ w.double()
        assert (products.add_product(total, dy, w, "b") - expected).norm() <= 1e-6 * expected.norm()
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("openblas")
def test_openblas_leaves_other_tensors_to_torch() -> None:
    plain = torch.ones(4, 6)
    others = plain.double(), plain[:, ::2], plain[:1].expand(4, 6), plain[:0], plain[None]
    assert blas.fits(plain, plain.t()) and not any(blas.fits(plain, other) for other in others)
    with FakeTensorMode():  # tensors without memory
        rows, weight = torch.zeros(6, 16), torch.zeros(8, 16)
        assert products.linear(rows, weight, None, products.OPENBLAS).shape == (6, 8)
        assert products.multiply(rows, weight.t(), products.OPENBLAS).shape == (6, 8)


@pytest.mark.cases(2)
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("three", ["bbb", "oto", ALL_ONEDNN])
def test_a_model_learns_the_same(
    chunked: bool, three: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "b" in three:
        request.getfixturevalue("openblas")
    monkeypatch.setattr(
        wrap,
        "fastest_libraries",
        lambda model, rows, compiled: {products.name_of(m): three for m in model.modules() if isinstance(m, Linear)},
    )
    torch.manual_seed(0)
    plain, said = GPT(GPTConfig(**SHAPE)), list[str]()
    config = Config(model=plain.config, system=SystemConfig(device="cpu", dtype="float32", compile=False))
    config.training.chunked_loss = chunked
    model = copy.deepcopy(plain)
    wrap.exchange(model, config, resolve(config.system), 3, said.append)
    assert type(model.lm_head) is CPUHead and type(model.transformer.h[0].mlp.c_fc) is CPULinear
    faster = "faster here than torch"
    each = {ALL_ONEDNN: f"oneDNN, {faster}", "bbb": f"OpenBLAS, {faster}", "oto": "o: oneDNN, faster here; t: torch"}
    assert any(line.startswith("matrix products: ") and each[three] in line for line in said)
    assert any("16x64 oto" in line for line in said) is (three == "oto")
    ids = torch.arange(27).view(3, 9) * 7 % 40
    for one in (plain, model):
        one(ids[:, :-1], ids[:, 1:])[1].backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-5)
    assert set(products.libraries_of(model).values()) == {three}


def test_a_product_in_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN would compute it with AMX if it were allowed to."""
    rounded = lambda a, b, library: (a.bfloat16() @ b.bfloat16()).float()  # noqa: E731
    monkeypatch.setattr(products, "multiply", rounded)
    model, said = GPT(GPTConfig(**SHAPE)), list[str]()
    assert swap(model, {Linear: CPULinear, Head: CPUHead}, said.append) == 0
    assert "returns a different result" in said[0]


@pytest.mark.usefixtures("openblas")
def test_a_wrong_product_of_openblas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = blas.multiply
    monkeypatch.setattr(blas, "multiply", lambda *given, **named: multiply(*given, **named).mul_(1.5))
    monkeypatch.setattr(wrap, "fastest_libraries", lambda model, *_: dict.fromkeys(SHAPES, "bbb"))
    model, said = GPT(GPTConfig(**SHAPE)), list[str]()
    config = Config(model=model.config, system=SystemConfig(device="cpu", dtype="float32", compile=False))
    wrap.exchange(model, config, resolve(config.system), 3, said.append)
    assert products.libraries_of(model) == {}
    assert any("CPULinear returns a different result" in line for line in said)


def test_onednn_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(GPTConfig(**SHAPE))
    assert products.fastest_libraries(model, 24, True) == {}  # too small to measure
    monkeypatch.setattr(products, "LEAST", 0)
    measured = products.relative_time(torch.ones(9, 16), torch.ones(16, 8), "o", "t")
    assert 0 < measured < 1e4
    for ratio, expected in ((0.8, {"ooo"}), (0.95, set())):
        monkeypatch.setattr(products, "relative_time", lambda a, b, library, other, ratio=ratio: ratio)
        found = products.fastest_libraries(model, 24, True)
        assert set(found.values()) == expected and products.checked_libraries(found) == found
        assert set(found) == (set(SHAPES) if expected else set())


def test_a_large_layer_is_probed_with_many_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Zen 3, oneDNN was slower than MKL with 80 outputs, and faster with 700."""
    shapes: list[tuple[int, ...]] = []

    def even(a: torch.Tensor, b: torch.Tensor, *libraries: str) -> float:
        shapes.append((*a.shape, b.size(1)))
        return 1.0

    monkeypatch.setattr(products, "relative_time", even)
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=1, n_head=12, n_embd=768))
    assert products.fastest_libraries(model, 2048, False) == {}
    assert len(shapes) == 3 and all(min(shape) >= 512 for shape in shapes)


def test_openblas_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of one seed choose the same."""
    model = GPT(GPTConfig(**SHAPE))
    monkeypatch.setattr(blas, "is_fastest_here", lambda: True)
    monkeypatch.setattr(products, "relative_time", lambda *_: pytest.fail("measured"))
    assert products.fastest_libraries(model, 24, True) == {}
    monkeypatch.setattr(products, "LEAST", 0)
    assert set(products.fastest_libraries(model, 24, True).values()) == {"bbb"}
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    assert products.fastest_libraries(model, 24, False) == {}  # a short run, which compiles nothing


def test_a_choice_of_a_library_that_is_not_here_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for here in (True, False):
        monkeypatch.setattr(blas, "has_openblas", lambda here=here: here)
        assert products.checked_libraries({"1x1": "tbt"}) == ({"1x1": "tbt"} if here else None)
        assert products.checked_libraries({"1x1": "ttt"}) == {"1x1": "ttt"}


@pytest.mark.parametrize("saved", [None, [], {"1x1": "oo"}, {"1x1": "oox"}, {"1x1": 3}])
def test_a_damaged_choice_is_measured_again(saved: Any) -> None:
    assert products.checked_libraries(saved) is None
