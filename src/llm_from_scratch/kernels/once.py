"""Written-out gradients that cannot be differentiated a second time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a second derivative. torch's own once_differentiable returns a zero one for a constant gradient of the
    result, and without it, what forward stored counts as a constant."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph: the modules of kernels/ lack second derivatives; call kernels.swap.unswap(model) first"
            )
        return backward(ctx, *grads)

    return checked
