"""Helpers for tests of training steps on small models."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def multiplies_float8() -> bool:
    """Whether torch multiplies float8 on a CPU; torch 2.6 does not."""
    operand, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(())
    try:
        torch._scaled_mm(operand, operand.t(), scale_a=scale, scale_b=scale, out_dtype=torch.float32)
    except NotImplementedError:
        return False
    return True


needs_float8 = pytest.mark.skipif(not multiplies_float8(), reason="this torch does not multiply float8 on a CPU")


def train_steps(model: Any, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Steps on random tokens of a vocabulary of 11, windows of 8."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        idx = torch.randint(11, (3, 9), generator=generator)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
