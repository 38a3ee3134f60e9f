"""The gradient of one global batch: what an update, a benchmark and a forecast have in common."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..machine.device import Runtime
from .wrap import Wrapped


def gradients(
    models: Wrapped, x: Tensor, y: Tensor, micro_batch: int, runtime: Runtime, scaler: torch.amp.GradScaler
) -> Tensor:
    """Adds the gradient of the mean loss over x and y, (rows, T) int64, to the parameters' grads. Returns the loss.

    Goes forward and backward over micro_batch rows at a time; several processes exchange gradients once, in the last.
    """
    total = torch.zeros((), device=runtime.device)
    parts = list(zip(x.split(micro_batch), y.split(micro_batch), strict=True))
    if models.is_recorded and len(parts) > 1:  # else the first pass's gradients would lie where the next one writes
        for p in models.raw.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for i, (xi, yi) in enumerate(parts):
        alone = runtime.world_size == 1 or i == len(parts) - 1
        with contextlib.nullcontext() if alone else models.train.no_sync():  # type: ignore[operator]
            with runtime.autocast():
                _, loss = models.train(xi, yi)
            loss = loss / len(parts)  # the gradient of the mean, not of the sum
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


def clip_gradients(model: torch.nn.Module, limit: float) -> Tensor:
    """Scales the gradients down to this global norm; 0 leaves them. Returns the norm that they had.

    Sparse ones do not count: what steps them takes no notice of their size.
    """
    parameters = [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
    if limit:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
