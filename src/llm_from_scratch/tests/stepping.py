"""What the tests of the optimizers do to small models."""

from __future__ import annotations

from typing import Any

import torch


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
