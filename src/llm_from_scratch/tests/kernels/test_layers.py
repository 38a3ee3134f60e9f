"""The layers in C: against float64, with AVX2 and AVX-512, in whole models, and when they cannot be used."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.config import Config, GPTConfig, SystemConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.model import GPT, Attention, ReLUSquared, RMSNorm, SwiGLU
from llm_from_scratch.kernels import compiled, layers, recompute
from llm_from_scratch.kernels.compiled import Kernel
from llm_from_scratch.kernels.cpu import plain_attention
from llm_from_scratch.kernels.cross_entropy import CPULogitPasses
from llm_from_scratch.kernels.products import CPUHead, has_onednn
from llm_from_scratch.machine.device import Runtime, resolve
from llm_from_scratch.training import wrap
from llm_from_scratch.training.trainer import train
from llm_from_scratch.training.wrap import exchange, with_layers

from ..tiny import slow_except, tiny_config

DOUBLE = torch.float64


def as_compiled(module: Any) -> Any:
    module.__class__ = layers.REPLACEMENTS[type(module)]
    return module


def values(module: Callable[..., Tensor], parameters: list[Tensor], *inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients of a weighted sum of them."""
    leaves = [*[x.detach().requires_grad_() for x in inputs], *parameters]
    y = module(*leaves[: len(inputs)])
    weights = torch.arange(y.numel(), dtype=DOUBLE).cos().view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights.to(y.dtype)).sum(), leaves)]


def compare(module: Any, *inputs: Tensor, tolerance: float = 1e-6) -> None:
    exact = copy.deepcopy(module).double()
    expected = values(exact, list(exact.parameters()), *(x.double() for x in inputs))
    found = values(as_compiled(module), list(module.parameters()), *inputs)
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == torch.float32 and (b - a).norm() <= tolerance * a.norm()
        assert (b - a).abs().max() <= 4 * tolerance * a.abs().max()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "relu2": ReLUSquared, "swiglu": SwiGLU
}  # fmt: skip


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_equal_float64(level: Kernel, name: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.cat((torch.linspace(-12, 12, 20_000), torch.randn(20_000))).view(-1, 32) for _ in range(2)]
    inputs[1] = inputs[1].flip(0)
    compare(ACTIVATIONS[name](), *inputs[: 2 if name == "swiglu" else 1])


@pytest.mark.parametrize("shape", [(1, 16), (3, 11, 48), (100, 384), (2100, 16)])
def test_norms_equal_float64(level: Kernel, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = RMSNorm(shape[-1])
    nn.init.normal_(module.weight)
    compare(module, torch.randn(shape) + 3)


@pytest.mark.parametrize("shape", [(2, 4, 2, 33, 32), (1, 1, 1, 7, 16)], ids=str)
def test_norms_of_queries_and_keys_equal_float64(level: Kernel, shape: tuple[int, int, int, int, int]) -> None:
    """Of views of one fused projection, as the model has them, and not by torch's operations."""
    B, H, G, T, D = shape
    torch.manual_seed(0)
    module = RMSNorm(D)
    nn.init.normal_(module.weight)
    exact, compiled_norm = copy.deepcopy(module).double(), as_compiled(module)

    def both(fused: Tensor, norm: nn.Module) -> Tensor:
        q, k, v = fused.transpose(1, 2).split((H, G, G), dim=1)
        found = [norm(q), norm(k)]
        assert norm is exact or {y.grad_fn.next_functions[0][0].name() for y in found} == {"_NormalizeBackward"}
        return torch.cat((*found, v), dim=1)

    fused = torch.randn(B, T, H + 2 * G, D) + 1
    expected = values(lambda x: both(x, exact), [exact.weight], fused.double())
    for a, b in zip(expected, values(lambda x: both(x, compiled_norm), [module.weight], fused), strict=True):
        assert (b - a).norm() <= 1e-6 * a.norm() and (b - a).abs().max() <= 4e-6 * a.abs().max()


SHAPES = [
    (2, 4, 4, 64, 32), (1, 4, 2, 200, 16), (3, 2, 1, 5, 48), (2, 1, 1, 2, 16), (1, 2, 2, 129, 64)
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_that_of_float64(level: Kernel, shape: tuple[int, int, int, int, int]) -> None:
    """Of views of one fused projection, as the model has them."""
    B, H, G, T, D = shape
    torch.manual_seed(0)

    def attend(fused: Tensor, module: Any = None) -> Tensor:
        q, k, v = fused.transpose(1, 2).split((H, G, G), dim=1)
        return plain_attention(q, k, v, None, 0.0, True) if module is None else module(q, k, v, None, True)

    fused, module = 2 * torch.randn(B, T, H + 2 * G, D), as_compiled(Attention(0.0))
    expected = values(attend, [], fused.double())
    for a, b in zip(expected, values(lambda x: attend(x, module), [], fused), strict=True):
        assert (b - a).norm() <= 1e-6 * a.norm() and (b - a).abs().max() <= 4e-6 * a.abs().max()


@pytest.mark.parametrize("shape", [(2, 3, 1, 70, 64), (1, 2, 2, 5, 32)], ids=str)
def test_positions_are_rotated_as_in_float64(level: Kernel, shape: tuple[int, int, int, int, int]) -> None:
    (B, H, G, T, D), results = shape, []
    config = GPTConfig(pos_embedding="rope", n_head=H, n_embd=H * D, block_size=T)
    fused = torch.randn(B, T, H + 2 * G, D)
    for dtype in (DOUBLE, torch.float32):
        positions = models.RotaryPositions(config)
        if dtype == torch.float32:
            as_compiled(positions)
        leaf = fused.to(dtype).requires_grad_()
        q, k, _ = leaf.transpose(1, 2).split((H, G, G), dim=1)
        where = [t.to(dtype) for t in positions.prepare(torch.arange(T), torch.float32)]
        found = positions(q, k, *where)
        assert ("_Rotate" in str(found[0].grad_fn)) == (dtype == torch.float32)
        weights = torch.arange(H * T * D, dtype=DOUBLE).cos().view(1, H, T, D).to(dtype)
        (gradient,) = torch.autograd.grad((found[0] * weights).sum() + (found[1] * weights[:, :G]).sum(), leaf)
        results.append([*found, gradient])
    for a, b in zip(*results, strict=True):
        assert (b - a).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize(("scale", "libraries"), [(1.0, "ttt"), (60.0, "ttt"), (1.0, "ott")])
def test_losses_of_a_large_vocabulary_equal_float64(
    level: Kernel, scale: float, libraries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "o" in libraries and not has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.delattr(CPULogitPasses, "_few")  # torch's passes
    head, x = CPUHead(32, 16 * 700, 0.0), torch.randn(70, 32) * scale
    head.libraries = libraries
    targets = torch.randint(16 * 700, (70,))
    targets[3] = -1
    results = []
    for dtype, loss in ((DOUBLE, models.NextTokenLoss()), (torch.float32, layers.CompiledLoss())):
        one, leaf = copy.deepcopy(head).to(dtype), x.to(dtype).requires_grad_()
        found = loss(leaf, targets, one)[1] * 3
        results.append([found.detach(), *torch.autograd.grad(found, (leaf, one.weight))])
    for a, b in zip(*results, strict=True):
        assert (b - a).norm() <= 2e-6 * a.norm()


def rotated(module: Any) -> Callable[..., Tensor]:
    cos, sin = torch.rand(2, 1, 6, 16).unbind()
    return lambda q, k: torch.cat(module(q, k, cos, sin), dim=1)


def attended(module: Any) -> Callable[..., Tensor]:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # torch's fused kernel gives 0 for a NaN
        scores = q @ k.mT / q.size(-1) ** 0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1).tril() @ v  # no NaN for a hidden key

    return plain if type(module) is Attention else lambda q, k, v: module(q, k, v, None, True)


def with_targets(module: Any) -> Callable[..., Tensor]:
    head = models.Head(32, 96, 0.0)
    return lambda x, weight: module(x, torch.arange(6).expand(4, 6), replaced(head, weight))[1]


def replaced(head: models.Head, weight: Tensor) -> models.Head:
    one = copy.copy(head)
    one._parameters = {"weight": weight, "bias": None}  # type: ignore[dict-item]
    return one


def same(module: Any) -> Any:
    return module


HEADS = (2, 2, 6, 32)
# the layer, how it is called, and the shapes of its inputs
BROKEN: dict[str, tuple[Callable[[], Any], Callable[[Any], Callable[..., Tensor]], list[tuple[int, ...]]]] = {
    "gelu": (ACTIVATIONS["gelu"], same, [(3, 32)]),
    "gelu_tanh": (ACTIVATIONS["gelu_tanh"], same, [(3, 32)]),
    "swiglu": (SwiGLU, same, [(3, 32), (3, 32)]),
    "relu2": (ReLUSquared, same, [(3, 32)]),
    "norm": (lambda: RMSNorm(32), same, [(3, 32)]),
    "rotation": (lambda: models.RotaryPositions(GPTConfig(n_head=2, n_embd=64)), rotated, [HEADS, HEADS]),
    "attention": (lambda: Attention(0.0), attended, [HEADS] * 3),
    "loss": (models.NextTokenLoss, with_targets, [(24, 32), (96, 32)]),
}


@pytest.mark.parametrize("value", slow_except([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -100.0], torch.nan, 1e30))
@pytest.mark.parametrize("name", list(BROKEN))
def test_numbers_not_finite_in_torch_are_not_finite(level: Kernel, name: str, value: float) -> None:
    """A number, then a row of numbers; the products of two large ones exceed float32."""
    make, call, shapes = BROKEN[name]
    in_c = layers.CompiledLoss() if name == "loss" else as_compiled(make())
    for at in range(len(shapes)):
        for numbers in (1, 32):
            torch.manual_seed(0)
            inputs = [torch.randn(shape) for shape in shapes]
            # the last query attends to the first key, so that no weight of the broken number is 0
            inputs[at].view(-1, 32)[-1 if name == "attention" and at == 0 else 0, -numbers:] = value
            if abs(value) == 1e30 and numbers == 32:
                inputs = [torch.full_like(x, value) if i == at else x.abs() * 1e30 for i, x in enumerate(inputs)]
            results = []
            for module in (make(), in_c):
                torch.manual_seed(1)
                results.append(values(call(module), list(module.parameters()), *inputs))
            for a, b in zip(*results, strict=True):
                assert not b[~a.isfinite()].isfinite().any()
                if name in ACTIVATIONS:
                    torch.testing.assert_close(b[a.isfinite()], a[a.isfinite()], atol=1e-6, rtol=1e-5)


def test_large_scores_equal_float64(level: Kernel) -> None:
    """Their rounding errors exceed the largest exponent; the attention chooses one token."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 32).unbind()
    for scale in (1e4, 1e8, 1e15):
        large = ((q * scale).double(), (k * scale).double(), v.double())
        expected = plain_attention(large[0], large[1], large[2], None, 0.0, True)
        found = values(lambda *x: as_compiled(Attention(0.0))(*x, None, True), [], q * scale, k * scale, v)
        torch.testing.assert_close(found[0].double(), expected, atol=1e-4, rtol=1e-4)
        assert all(b.isfinite().all() for b in found)


@pytest.mark.parametrize("target", [96, -2, 1 << 40])
def test_a_target_outside_the_vocabulary_is_an_error(kernel: Kernel, target: int) -> None:
    head, targets = models.Head(32, 96, 0.0), torch.tensor([3, -1, target])
    for loss in (models.NextTokenLoss(), layers.CompiledLoss()):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            loss(torch.randn(3, 32), targets, head)


def test_a_second_derivative_is_an_error(kernel: Kernel) -> None:
    for name, (make, call, shapes) in BROKEN.items():
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        if name != "loss":
            with pytest.raises(RuntimeError, match="lack second derivatives"):
                torch.autograd.grad(call(as_compiled(make()))(*inputs).sum(), inputs, create_graph=True)


def test_values_that_attention_stores_do_not_keep_the_whole_projection(kernel: Kernel) -> None:
    B, H, G, T, D = (2, 3, 1, 20, 64)
    fused = torch.randn(B, T, H + 2 * G, D, requires_grad=True)
    q, k, v = fused.transpose(1, 2).split((H, G, G), dim=1)
    for rotated in (False, True):
        given = (q * 1, k * 1, v) if rotated else (q, k, v)
        y = as_compiled(Attention(0.0))(*given, None, True)
        stored = y.grad_fn.saved_tensors[2]
        assert torch.equal(stored, v) and (stored.untyped_storage().nbytes() == stored.nbytes) == rotated


def test_threads_do_not_change_a_result(level: Kernel) -> None:
    torch.manual_seed(0)
    x, heads, before, results = torch.randn(300, 64), torch.randn(3, 8, 70, 16), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norm = as_compiled(RMSNorm(64))
            found = values(norm, list(norm.parameters()), x) + values(as_compiled(ReLUSquared()), [], x)
            attend = as_compiled(Attention(0.0))
            results.append(found + values(lambda q, a=attend: a(q, q, q, None, True), [], heads))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_unsupported_cases_use_torch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "load_kernel", lambda: pytest.fail("used"))
    odd, whole = torch.randn(3, 20), torch.randn(3, 32)
    for x in (odd, whole.double(), whole.bfloat16(), whole.repeat(1, 2)[:, ::2]):
        torch.testing.assert_close(as_compiled(nn.GELU("tanh"))(x), F.gelu(x, approximate="tanh"))
        norm = as_compiled(RMSNorm(x.size(-1)).to(x.dtype))
        torch.testing.assert_close(norm(x), F.rms_norm(x, (x.size(-1),), norm.weight, norm.eps))
    q, attend = torch.randn(1, 2, 8, 16), as_compiled(Attention(0.5))
    attend(q.double(), q.double(), q.double(), None, True)
    expected = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(attend.eval()(q, q, q, None, False), expected)
    attend = as_compiled(Attention(0.0))
    q, half, one = (torch.randn(shape) for shape in ((4, 2, 8, 16), (4, 2, 4, 16), (1, 2, 8, 16)))
    for k, v in ((half, half), (one, one), (q, torch.randn(4, 2, 8, 32))):
        torch.testing.assert_close(attend(q, k, v, None, True), Attention(0.0)(q, k, v, None, True))
    three = torch.randn(4, 3, 8, 16)
    with pytest.raises(RuntimeError):
        attend(q, three, three, None, True)
    with pytest.raises(RuntimeError):
        as_compiled(RMSNorm(16))(whole)
    head, few = models.Head(32, 96, 0.0), torch.tensor([3])
    with torch.no_grad(), pytest.raises(RuntimeError):
        layers.CompiledLoss()(whole, few, head)
    assert as_compiled(ReLUSquared())(torch.tensor(3.0)) == 9 and not as_compiled(nn.GELU("tanh"))(whole[:0]).numel()
    positions = as_compiled(models.RotaryPositions(GPTConfig(n_head=2, n_embd=64)))
    angles, q = torch.rand(1, 8, 16), torch.randn(1, 2, 8, 32)
    with pytest.raises(RuntimeError):
        positions(q, q[:, :, :4], angles, angles)
    with torch.inference_mode():  # a decode step is recorded
        torch.testing.assert_close(as_compiled(nn.GELU("tanh"))(whole), F.gelu(whole, approximate="tanh"))


SHAPE: dict[str, Any] = {"block_size": 40, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 32}
MODERN: dict[str, Any] = {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True}


def exchanged(one: GPT) -> tuple[GPT, list[str]]:
    config, said = Config(model=one.config), list[str]()
    config.system = SystemConfig(device="cpu", dtype="float32", compile=False)
    runtime = dataclasses.replace(resolve(config.system), compiled_layers=True)
    exchange(one, config, runtime, 4, said.append)
    return one, said


def loss_and_gradients(one: GPT) -> list[Tensor]:
    ids = torch.arange(123).view(3, 41) * 7 % 31
    loss = one(ids[:, :-1], ids[:, 1:])[1]
    return [loss.detach(), *torch.autograd.grad(loss, list(one.parameters()))]


@pytest.fixture
def allowed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "compiled")


VARIANTS: list[dict[str, Any]] = [{}, MODERN, {"activation": "gelu_tanh"}, {"activation": "relu2"}, {"dropout": 0.1}]


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_model_learns_as_without_them(
    allowed: None, changes: dict[str, Any], recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**SHAPE | changes))
    monkeypatch.setattr(recompute, "WORTH_IT", 0 if recomputed else 1 << 40)
    model, said = exchanged(copy.deepcopy(plain))
    assert not [line for line in said if "core/model.py" in line]
    assert [line for line in said if line.startswith("layers: ")]
    assert isinstance(model.transformer.h[0].attn.attend, layers.CompiledAttention)
    assert isinstance(model.transformer.h[0].ln_1, layers.CompiledRMSNorm) == (changes is MODERN)
    for a, b in zip(loss_and_gradients(plain.eval()), loss_and_gradients(model.eval()), strict=True):
        assert (b - a).norm() <= 1e-5 * a.norm()
    assert set(model.state_dict()) == set(plain.state_dict())


EDITS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "RMSNorm": (RMSNorm, lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight + 0.5, self.eps)),
    "GELU": (nn.GELU, lambda self, x: F.gelu(x) * 1.1),
    "Attention": (Attention, lambda self, q, k, v, mask, causal: plain_attention(2 * q, k, v, mask, 0.0, causal)),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edited_layer_is_used_and_reported(allowed: None, edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, forward = EDITS[edit]
    monkeypatch.setattr(cls, "forward", forward)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**SHAPE, norm="rmsnorm", activation="gelu_tanh"))
    model, said = exchanged(copy.deepcopy(plain))
    assert [line for line in said if f"using core/model.py's {edit}" in line and "different result" in line]
    for a, b in zip(loss_and_gradients(plain), loss_and_gradients(model), strict=True):
        assert (b - a).norm() <= 1e-5 * a.norm()


@pytest.mark.slow
def test_an_added_parameter_trains(allowed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before, forward = models.Block.__init__, models.Block.forward

    def init(self: Any, config: GPTConfig) -> None:
        before(self, config)
        self.gate = nn.Parameter(torch.full((config.n_embd,), 0.5))

    monkeypatch.setattr(models.Block, "__init__", init)
    monkeypatch.setattr(models.Block, "forward", lambda self, x, *rest: forward(self, x, *rest) * self.gate)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**SHAPE))
    model, said = exchanged(copy.deepcopy(plain))
    assert layers.layers_in_c(model)
    for a, b in zip(loss_and_gradients(plain), loss_and_gradients(model), strict=True):
        assert (b - a).norm() <= 1e-5 * a.norm()


def chosen(flops: float, **changes: Any) -> Runtime:
    config = Config()
    config.system = SystemConfig(device="cpu", dtype="float32", compile=False, threads=2)
    return with_layers(config, dataclasses.replace(resolve(config.system), **changes), flops)


def test_a_long_run_in_float32_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "auto")
    monkeypatch.setattr(wrap, "lacking", lambda: None)
    monkeypatch.setattr(wrap, "is_built", lambda: False)
    minute = 60 * 2 * wrap.CPU_FLOPS[torch.float32]
    assert chosen(minute).compiled_layers
    assert not chosen(minute / 2).compiled_layers
    assert not chosen(minute, dtype=torch.bfloat16).compiled_layers and not chosen(minute, compile=True).compiled_layers
    monkeypatch.setattr(wrap, "is_built", lambda: True)
    assert chosen(0).compiled_layers
    monkeypatch.setattr(wrap, "lacking", lambda: "there is no C compiler")
    assert not chosen(minute).compiled_layers
    monkeypatch.setenv(compiled.VARIABLE, "compiled")  # which reports that it is missing
    assert chosen(0).compiled_layers
    monkeypatch.setenv(compiled.VARIABLE, "torch")
    assert not chosen(minute).compiled_layers


IN_C = ["Attention", "GELU"]


@pytest.mark.slow
def test_a_resumed_run_makes_the_same_choice(
    allowed: None, here: Any, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"schedule": "constant", "dtype": "float32", "compile": False, "n_embd": 32}
    train(tiny_config(tiny_data, **settings, out_dir="whole", max_iters=6))
    train(tiny_config(tiny_data, **settings, out_dir="run", max_iters=3))
    assert "layers: Attention, GELU in C" in capsys.readouterr().out
    monkeypatch.setenv(compiled.VARIABLE, "auto")
    monkeypatch.setattr(wrap, "is_built", lambda: False)  # a short run would not build it
    train(tiny_config(tiny_data, **settings, out_dir="run", max_iters=6, init_from="resume"))
    assert "not bit-exact" not in capsys.readouterr().out
    one, other = (load_checkpoint(find_checkpoint(name, "last")) for name in ("run", "whole"))
    assert one.trainer["machine"]["compiled_layers"] == other.trainer["machine"]["compiled_layers"] == IN_C
    assert all(torch.equal(one.model[name], other.model[name]) for name in other.model)

    monkeypatch.setattr(compiled, "lacking", lambda: "there is no C compiler")
    train(tiny_config(tiny_data, **settings, out_dir="run", max_iters=7, init_from="resume"))
    assert f"not bit-exact from here on: compiled_layers {IN_C} -> []" in capsys.readouterr().out
    train(tiny_config(tiny_data, **settings, out_dir="old", max_iters=1))
    monkeypatch.setattr(compiled, "lacking", lambda: None)
    monkeypatch.setattr(wrap, "is_built", lambda: True)  # a run without it remains without it
    train(tiny_config(tiny_data, **settings, out_dir="old", max_iters=2, init_from="resume"))
    assert "not bit-exact" not in capsys.readouterr().out
