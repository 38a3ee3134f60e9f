"""kernels/float8.py on a CPU, where torch multiplies float8 too, against numbers rounded by the formats' definition.
Speed and results on a GPU are untested."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm_from_scratch.config import Config, GPTConfig, SystemConfig
from llm_from_scratch.core.model import GPT, Linear
from llm_from_scratch.errors import UserError
from llm_from_scratch.kernels import float8 as fp8
from llm_from_scratch.kernels import recompute as activations
from llm_from_scratch.kernels.swap import swap
from llm_from_scratch.machine import device as runtime
from llm_from_scratch.training.wrap import wrap

from ..stepping import needs_float8

CPU = torch.device("cpu")


def numbers(exponent: int, mantissa: int, largest: float) -> Tensor:
    """A float8 format's finite numbers, by its definition: subnormals, then 2^(e - bias) * (1 + m / 2^mantissa)."""
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    values = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    values += [(1 + m / steps) * 2.0 ** (e - bias) for e in range(1, 2**exponent) for m in range(steps)]
    kept = [v for v in values if v <= largest]
    return torch.tensor([-v for v in kept[:0:-1]] + kept, dtype=torch.float64)


FORMATS = {"activations": numbers(4, 3, 448.0), "gradients": numbers(5, 2, 57344.0)}


def rounded(x: Tensor, kind: str) -> Tensor:
    """x with every element at its nearest number of the format, under the scale of the largest; float64."""
    table, x = FORMATS[kind], x.double()
    scale = x.abs().max() / table[-1]
    near = (x / scale).flatten()[:, None].sub(table).abs().argmin(dim=1)
    return (table[near] * scale).view(x.shape)


def product(N: int = 32, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Linear, Tensor]:
    """Rows whose columns differ in size, a layer and a gradient of its output."""
    torch.manual_seed(0)
    x = torch.randn(2, N // 2, 48).mul(torch.randn(48).exp()).to(dtype).requires_grad_()
    layer = fp8.Float8Linear(48, 80)
    return x, layer, torch.randn(2, N // 2, 80).to(dtype)


@needs_float8
def test_products_and_gradients_equal_the_rounded_operands() -> None:
    x, layer, dy = product()
    y = layer(x)
    y.backward(dy)
    x8, w8 = rounded(x.detach(), "activations").flatten(0, 1), rounded(layer.weight.detach(), "activations")
    g8 = rounded(dy, "gradients").flatten(0, 1)
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    close: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-5, "check_dtype": False}  # sums of elements up to 20, in float32
    torch.testing.assert_close(y.detach().flatten(0, 1), x8 @ w8.T + layer.bias.detach(), **close)
    torch.testing.assert_close(x.grad.flatten(0, 1), g8 @ w8, **close)
    torch.testing.assert_close(layer.weight.grad, g8.T @ x8, **close)
    torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)), **close)


@needs_float8
def test_it_is_a_few_percent_from_the_exact_product() -> None:
    x, layer, dy = product(dtype=torch.bfloat16)
    y = layer(x)
    y.backward(dy)
    exact_x, weight = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    exact = exact_x @ weight.T + layer.bias.detach()
    exact.backward(dy.double())
    assert y.dtype == torch.bfloat16 and layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    for ours, theirs in ((y, exact), (x.grad, exact_x.grad), (layer.weight.grad, weight.grad)):
        assert ours is not None and theirs is not None
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert 0.001 < error < 0.1  # 3 or 2 bits of mantissa: 2 to 5%; not 0, or nothing was rounded


@needs_float8
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_detected(bad: float) -> None:
    x, layer, dy = product()
    with torch.no_grad():
        x[0, 0, 0] = bad
    assert layer(x).isnan().all()
    x, layer, dy = product()
    dy[0, 0, 0] = bad
    layer(x).backward(dy)
    assert x.grad is not None and x.grad.isnan().all()


@needs_float8
def test_zeros_stay_zeros() -> None:
    x, layer, dy = product()
    y = layer(torch.zeros_like(x).requires_grad_())
    torch.testing.assert_close(y, layer.bias.expand_as(y))


@pytest.mark.parametrize("case", ["rows", "no gradients"])
def test_layers_without_float8_do_not_change(case: str) -> None:
    x, layer, _ = product(N=30 if case == "rows" else 32)
    with torch.set_grad_enabled(case == "rows"):
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


def model(**shape: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"block_size": 16, "vocab_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, **shape}))


def use_fp8(model: GPT) -> int:
    replacements, keep = fp8.float8_replacements(model)
    said: list[str] = []
    count = swap(model, replacements, said.append, keep)
    assert not said
    return count


def test_the_blocks_and_only_they_change() -> None:
    changed = model()
    assert use_fp8(changed) == 8
    assert {name for name, m in changed.named_modules() if isinstance(m, fp8.Float8Linear)} == {
        f"transformer.h.{i}.{part}"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert list(changed.state_dict()) == list(model().state_dict())
    with pytest.raises(UserError, match="no layer has dimensions divisible by 16"):
        use_fp8(model(n_embd=24))


@needs_float8
def test_a_model_learns_as_it_does_without() -> None:
    losses = []
    for in_float8 in (False, True):
        trained = model()
        trained.compute_dtype = torch.bfloat16
        assert not in_float8 or use_fp8(trained)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        x = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(1))
        for _ in range(20):
            _, loss = trained(x[:, :-1], x[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] < 1.0 and losses[1] == pytest.approx(losses[0], abs=0.15) and losses[0] != losses[1]


@pytest.mark.slow  # in a whole model: test_gpu_step
@needs_float8
def test_the_compiler_can_follow_it() -> None:
    x, layer, dy = product()
    plain = layer(x)
    plain.backward(dy)
    expected, x.grad = x.grad, None
    traced = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    traced.backward(dy)
    torch.testing.assert_close(traced, plain)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.cases(1)
@needs_float8
@pytest.mark.parametrize("again", ["blocks", "cheap"])
def test_wrap_announces_it_and_activations_may_be_recomputed_around_it(
    again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "WORTH_IT", 1)
    config = Config(model=model().config, system=SystemConfig(device="cpu", fp8=True))
    config.training.gradient_checkpointing = again == "blocks"
    wrapped, told = model(), list[str]()
    wrap(wrapped, config, runtime.resolve(SystemConfig(device="cpu", compile=False)), 2, told.append)
    wrap(wrapped, config, runtime.resolve(SystemConfig(device="cpu", compile=False)), 1, told.append)  # memory ran out
    assert told.count("fp8: 8 linear layers of the blocks train in float8 (--fp8)") == 1
    x = torch.randint(32, (2, 16))
    wrapped(x, x)[1].backward()
    alone = model()
    use_fp8(alone)
    alone(x, x)[1].backward()
    torch.testing.assert_close(wrapped.lm_head.weight.grad, alone.lm_head.weight.grad)


def test_unsupported_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--fp8=True needs a CUDA device of compute capability 8\.9"):
        fp8.refuse_unfit(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match="compute capability"):
        fp8.refuse_unfit(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.refuse_unfit(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(UserError, match="--dtype=bfloat16, got float16"):
        fp8.refuse_unfit(torch.device("cuda"), torch.float16)
