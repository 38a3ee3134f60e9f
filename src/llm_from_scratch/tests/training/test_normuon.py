"""training/normuon.py against its formula in float64, and what it is for: rows with steps of the same length."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from llm_from_scratch.training import muon, normuon

from .test_muon import made, make, polynomials_of


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.float32)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_updates_follow_the_formula(activation: str) -> None:
    """Three steps in float64, a matrix at a time. c_fc and c_gate are higher than wide; queries, keys and values, 16 x
    16 and 8 x 16, are not."""
    model = make(n_kv_head=2, bias=False, activation=activation)
    optimizer = made(model, optimizer_type="normuon", muon_learning_rate=0.1, muon_momentum=0.8, weight_decay=0.5)
    names = optimizer.param_groups[0]["names"]
    values = {n: p.detach().double().clone() for n, p in model.named_parameters() if n in names}
    momenta = {n: torch.zeros_like(p) for n, p in values.items()}
    squares = {n: torch.ones(len(p), 1).double() for n, p in values.items()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            p.grad *= torch.linspace(0.1, 3, len(p)).view(-1, *[1] * (p.dim() - 1))  # rows that stand out
            if name not in names:
                continue
            g = p.grad.double()
            momenta[name] = 0.8 * momenta[name] + 0.2 * g
            ahead = 0.2 * g + 0.8 * momenta[name]
            values[name] *= 1 - 0.1 * 0.5
            for part in [slice(16), slice(16, 24), slice(24, None)] if "c_attn" in name else [slice(None)]:
                step, (rows, cols) = polynomials_of(ahead[part]), ahead[part].shape
                if rows > cols:
                    squares[name] = 0.95 * squares[name] + 0.05 * rows * step.square().mean(1, keepdim=True)
                    step = step / (squares[name] + 1e-8).sqrt()
                values[name][part] -= 0.1 * max(1, rows / cols) ** 0.5 * step
        optimizer.step()
    assert sum(bool((of != 1).any()) for of in squares.values()) == (4 if activation == "swiglu" else 2)
    parameters = dict(model.named_parameters())
    for name in names:
        torch.testing.assert_close(parameters[name].double(), values[name], atol=2e-5, rtol=1e-4)
        kept = optimizer.state[parameters[name]]["row_squares"]
        torch.testing.assert_close(kept.double(), squares[name], atol=1e-4, rtol=1e-3)


def lengths_of_rows(kind: str) -> Tensor:
    """Of a step, after 20 with the same gradient: 24 x 6, with rows that stand out."""
    layer = nn.Linear(6, 24, bias=False)
    weight, settings = layer.weight, {"optimizer_type": kind, "muon_learning_rate": 0.01, "weight_decay": 0.0}
    optimizer = made(nn.Sequential(layer), **settings)
    gradient = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-0.5, 0.5, 24)[:, None]
    for _ in range(20):
        before, weight.grad = weight.detach().clone(), gradient.clone()
        optimizer.step()
    return (weight.detach() - before).norm(dim=1)


def test_all_neurons_learn_as_fast_as_their_mean_does_with_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normuon, "BETA2", 0.5)  # the mean forgets where it began
    plain, equal = lengths_of_rows("muon"), lengths_of_rows("normuon")
    assert plain.max() > 3 * plain.min()
    # the lengths of the columns of 24 x 6 orthogonal numbers are 1, so those of its rows have the mean square 6 / 24
    torch.testing.assert_close(equal, torch.full((24,), 0.01 * 2 * (6 / 24) ** 0.5), atol=0, rtol=0.03)
    assert equal.square().mean().item() == pytest.approx(plain.square().mean().item(), rel=0.05)
