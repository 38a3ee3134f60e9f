"""Row-wise Adagrad, for tables of which a batch uses only a few rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .rule import Rule, Slots, with_gradients


class RowAdagrad(Rule):
    """Moves the rows that a sparse gradient names; keeps one float32 number per row, "sum"."""

    skips_on_device = True

    def slots(self, p: Tensor) -> Slots:
        return {"sum": ((p.size(0), 1), torch.float32)}

    def step(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], found_inf: Tensor | None) -> None:
        for _, p in with_gradients(group):
            state[p] = state[p] or self.new_state(p)
            step_rows(p, state[p]["sum"], group["lr"], found_inf)

    def begin_epoch(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
        """Forgets rows from group["forget_from"] on. Most n-grams of three or more tokens occur once, so a second pass
        over the same text would read the next token from them."""
        for p in group["params"] if group["forget_from"] is not None else ():
            for tensor in (p, *state[p].values()):
                tensor[group["forget_from"] :] = 0


@torch.no_grad()
def step_rows(table: Tensor, total: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
    """Moves the rows of table, (R, C), that its sparse gradient names; total, (R, 1): one accumulator per row.

    A row with gradient g whose squares add up to s moves by lr * g / sqrt(s / C). Its first step has rms lr, whatever
    the size of the gradient; later steps are smaller the more often the row occurred (Adagrad, Duchi et al. 2011, with
    a row's mean square in place of each element's). Nothing decays, and rows outside the batch cost nothing.
    found_inf: a 0-dim tensor that is 1 to skip the step.
    """
    assert table.grad is not None and table.grad.is_sparse
    rows, g = table.grad._indices()[0], table.grad._values()  # a row may occur several times
    if found_inf is not None:
        g = torch.where(found_inf.bool(), 0.0, g)
    total.index_add_(0, rows, g.square().sum(dim=1, keepdim=True))
    scale = (total[rows] + 1e-20).rsqrt_().mul_(-lr * math.sqrt(table.size(1)))
    table.index_add_(0, rows, g * scale)
