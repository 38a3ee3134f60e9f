"""The common interface of optimizers: the state of a parameter, and the step of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..config import OptimizerConfig
from .rounding import Dither

Slots = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Rule:
    """How an optimizer changes parameters. One subclass per optimizer; it declares the tensors that it keeps. dtype: of
    the moments, float32 or bfloat16; dither: rounds to bfloat16."""

    skips_on_device = False
    """Whether step() changes nothing if found_inf is 1, so that the host does not wait for the check."""

    def __init__(self, dtype: torch.dtype, dither: Dither):
        self.dtype, self.dither = dtype, dither

    @classmethod
    def groups(cls, model: nn.Module, config: OptimizerConfig, default: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parameter groups; default: those with and without weight decay. "rule" names another optimizer."""
        return default

    def slots(self, p: Tensor) -> Slots:
        """Name, shape and dtype of each tensor that is kept for a parameter, apart from counters."""
        raise NotImplementedError

    def new_state(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step."""
        return {
            slot: torch.zeros(shape, dtype=dtype, device=p.device) for slot, (shape, dtype) in self.slots(p).items()
        }

    def step(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], found_inf: Tensor | None) -> None:
        """Steps the parameters of a group that have gradients. found_inf: 0-dim, 1 to skip the step; None: do not."""
        raise NotImplementedError

    def begin_epoch(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
        """Called before the first step of each further epoch."""


def with_gradients(group: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, parameter) of a group's parameters that have gradients."""
    return [(name, p) for name, p in zip(group["names"], group["params"], strict=True) if p.grad is not None]
