"""kernels/cross_entropy.py: the loss and gradients of the full logits, which it never computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.kernels import cross_entropy as losses
from llm_from_scratch.kernels.cross_entropy import ChunkedLoss, linear_cross_entropy

N, C, V = 37, 16, 50  # no multiple of a piece


def inputs(
    dtype: torch.dtype = torch.float64, weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(N, C).to(dtype).requires_grad_()
    weight = torch.randn(V, C).to(weight_dtype or dtype).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[[0, 7, 36]] = -1
    return x, weight, targets


def reference(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of x, gradient of weight) in float64."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    z = F.linear(x, weight)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, targets, ignore_index=-1)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))  # type: ignore[return-value]


@pytest.fixture(params=["cpu", "compilable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways over the rows; the CPU's in several blocks a piece."""
    monkeypatch.setattr(losses, "IN_CACHE", 3 * V)
    monkeypatch.setattr(losses, "SLICE", 7 * C)
    if request.param == "compilable":
        monkeypatch.setattr(losses, "CPULogitPasses", losses.LogitPasses)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("piece", [1, 10, 37, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_loss_and_gradients_equal_the_whole_logits(
    softcap: float, piece: int, dtype: torch.dtype, tolerance: float
) -> None:
    x, weight, targets = inputs(dtype, torch.promote_types(dtype, torch.float32))
    rounded = weight.detach().to(dtype)
    expected, dx, dw = reference(x, rounded, targets, softcap)
    loss = linear_cross_entropy(x, weight, targets, softcap, piece)
    (3 * loss).backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert x.grad is not None and x.grad.dtype == dtype and weight.grad is not None
    assert abs(loss.double() - expected) <= tolerance * expected
    assert (x.grad.double() - 3 * dx).norm() <= tolerance * (3 * dx).norm()
    assert (weight.grad.double() - 3 * dw).norm() <= tolerance * (3 * dw).norm()
    assert not x.grad[targets < 0].any()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(softcap: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3).double().requires_grad_(), torch.randn(7, 3).double().requires_grad_()
    targets = torch.tensor([6, -1, 0, 3, 3])
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, softcap, 2), (x, weight))


@pytest.mark.usefixtures("kernel")
def test_a_logit_far_above_the_others_does_not_overflow() -> None:
    x = torch.tensor([[200.0], [200.0], [-200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    targets = torch.tensor([0, 1, 0])  # sure and right, sure and wrong twice
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.item() == pytest.approx((0 + 400 + 400) / 3)
    torch.testing.assert_close(x.grad, torch.tensor([[0.0], [2.0], [-2.0]]) / 3)
    torch.testing.assert_close(weight.grad, torch.tensor([[400.0], [-400.0], [0.0]]) / 3)


@pytest.mark.usefixtures("kernel")
def test_the_head_gradient_of_bfloat16_pieces_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    rows = 4096
    x = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, requires_grad=True)
    targets = (torch.arange(rows) % 8 == 0).long()  # 1 where 8 divides
    linear_cross_entropy(x, weight, targets, piece=8).backward()
    # each piece adds 3 and takes 3: a sum in bfloat16 stops growing at 256 * 3
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.375], [0.375]]), rtol=0, atol=1e-7)


@pytest.mark.usefixtures("kernel")
def test_without_a_target_the_loss_is_nan_and_teaches_nothing() -> None:
    x, weight, targets = inputs(torch.float32)
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -1))
    loss.backward()
    assert loss.isnan() and not x.grad.any() and not weight.grad.any()  # type: ignore[union-attr]


def test_only_requested_inputs_have_a_gradient() -> None:
    x, weight, targets = inputs(torch.float32)
    linear_cross_entropy(x.detach(), weight, targets).backward()
    assert x.grad is None and weight.grad is not None
    alone, weight.grad = weight.grad, None
    linear_cross_entropy(x, weight.detach(), targets).backward()
    assert x.grad is not None and weight.grad is None
    linear_cross_entropy(x, weight, targets).backward()
    torch.testing.assert_close(weight.grad, alone)
    with torch.no_grad():
        plain = linear_cross_entropy(x, weight, targets)
    assert not plain.requires_grad
    assert plain.double() == pytest.approx(reference(x, weight, targets, 0.0)[0].item(), rel=1e-6)


def test_a_graph_that_is_kept_can_be_walked_twice() -> None:
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets, piece=10)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(loss + loss**2, (x, weight))
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(b, a * (1 + 2 * loss.detach()))


def test_the_gradient_of_the_head_is_scaled_in_place_unless_the_graph_is_kept() -> None:
    x, weight, targets = inputs()
    made = []
    for keep in (True, False):
        loss = linear_cross_entropy(x, weight, targets, piece=10)
        saved = loss.grad_fn.saved_tensors[1].data_ptr()  # type: ignore[union-attr]
        made.append(torch.autograd.grad(loss, weight, retain_graph=keep)[0])
        assert (made[-1].data_ptr() == saved) is not keep
    assert torch.equal(*made)


def test_float16_by_autocast_and_a_loss_scale() -> None:
    x, weight, targets = inputs(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    _, dx, dw = reference(x, weight, targets, 0.0)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(x, weight, targets, piece=10)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert loss.dtype == torch.float32 and x.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert (weight.grad - dw).norm() <= 2e-3 * dw.norm()  # type: ignore[operator]
    assert (x.grad / 2.0**16 - dx).norm() <= 2e-3 * dx.norm()  # type: ignore[operator]


@pytest.mark.slow  # with float8 and a whole model: test_gpu_step
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_compiled_whole(softcap: float) -> None:
    x, weight, targets = inputs(torch.float32)
    expected, dx, dw = reference(x, weight, targets, softcap)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w, t: linear_cross_entropy(x * 1, w, t, softcap, 10), backend="aot_eager", fullgraph=True
    )
    loss = compiled(x, weight, targets)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-4, atol=1e-7)  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad.double(), dw, rtol=1e-4, atol=1e-7)  # type: ignore[union-attr]


def test_under_activation_checkpointing() -> None:
    x, weight, targets = inputs()
    _, dx, dw = reference(x, weight, targets, 0.0)
    checkpoint(lambda x: linear_cross_entropy(x * 1, weight, targets, piece=10), x, use_reentrant=False).backward()
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(weight.grad, dw)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "logit_softcap": 5.0}])
def test_a_model_learns_the_same(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=V, n_layer=1, n_head=2, n_embd=C, **changes)).double()
    idx, targets = torch.randint(V, (2, 3, 8))
    targets[0, :2] = -1
    before: list[Tensor] = []
    model.transformer.ln_f.register_forward_hook(lambda _module, _args, out: before.append(out))
    model(idx)
    loss = F.cross_entropy(model.lm_head(before[0]).flatten(0, 1), targets.flatten(), ignore_index=-1)
    plain = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    none, ours = ChunkedLoss()(before[0], targets, model.lm_head)
    assert none is None
    torch.testing.assert_close(ours, loss)
    for a, b in zip(plain, torch.autograd.grad(ours, list(model.parameters())), strict=True):
        torch.testing.assert_close(b, a)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation gives, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_logits_never_exist_and_do_not_wait_for_the_backward_pass(softcap: float) -> None:
    rows, width, vocabulary, piece = 64, 4, 300, 8
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = linear_cross_entropy(x, weight, torch.randint(vocabulary, (rows,)), softcap, piece)
        loss.backward()
    assert largest.elements == piece * vocabulary
    assert sum(kept.values()) <= 4 * (x.numel() + weight.numel()) + 8 * 2  # and the count of targets


@pytest.mark.usefixtures("kernel")
def test_a_second_derivative_is_an_error() -> None:
    """What forward stored would count as a constant."""
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets)
    with pytest.raises(RuntimeError, match="lack second derivatives; call"):
        torch.autograd.grad(loss, (x, weight), create_graph=True)
