"""Row-wise Adagrad, for tables of which a batch uses only a few rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..machine.processes import gather
from .rule import Rule, Slots, with_gradients


class RowAdagrad(Rule):
    """Moves the rows that a sparse gradient names; keeps one float32 number per row, "sum".

    Every process holds the whole table. Only the rows that gradients name are exchanged, here and not by DDP, because a
    row's accumulator needs the squares of all its occurrences."""

    skips_on_device = True

    def slots(self, p: Tensor) -> Slots:
        return {"sum": ((p.size(0), 1), torch.float32)}

    def step(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], found_inf: Tensor | None) -> None:
        for _, p in with_gradients(group):
            state[p] = state[p] or self.new_state(p)
            parts = occurrences(p)
            if self.processes > 1 or (len(parts) > 1 and p.device.type == "cpu"):  # one GPU adds in any order
                parts = [added([merged(*part) for part in parts])]
            if self.processes > 1:
                parts = [added(exchanged(*parts[0], self.processes))]
            step_rows(p, state[p]["sum"], group["lr"], parts, found_inf)

    def begin_epoch(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
        """Forgets rows from group["forget_from"] on. Most n-grams of three or more tokens occur once, so a second pass
        over the same text would read the next token from them."""
        for p in group["params"] if group["forget_from"] is not None else ():
            for tensor in (p, *state[p].values()):
                tensor[group["forget_from"] :] = 0


Rows = tuple[Tensor, Tensor, Tensor]  # numbers, (N,); sums of their gradients, (N, C); sums of the squares, (N, 1)


def occurrences(table: Any) -> list[Rows]:
    """The rows of a table's sparse gradient, by micro-batch; a row may occur several times."""
    rows, g = table.grad._indices()[0], table.grad._values()
    lengths = getattr(table, "occurrences", [len(rows)])
    return [*zip(*(t.split(lengths) for t in (rows, g, g.square().sum(dim=1, keepdim=True))), strict=True)]


def keep_occurrences(table: Any) -> None:
    """Gradients of several micro-batches are appended to each other. On a CPU, torch would add up some of the rows that
    occur in both, which changes the sum of their squares."""
    if hasattr(table, "occurrences"):  # of an attempt with another micro-batch
        return
    table.occurrences = list[int]()

    def apart(grad: Tensor) -> Tensor:
        values = grad._values()
        if table.grad is None:
            table.occurrences = [len(values)]
            return grad
        table.occurrences.append(len(values))
        # torch only appends values that are not contiguous
        spread = values.new_empty(len(values), table.size(1) + 1)[:, :-1].copy_(values)
        return torch.sparse_coo_tensor(grad._indices(), spread, grad.shape, check_invariants=False)

    table.register_hook(apart)


def merged(rows: Tensor, *values: Tensor) -> Rows:
    """Each row once, with the sums of its values in their order."""
    number = torch.arange(len(rows), device=rows.device)
    last = rows.new_empty(int(rows.max()) + 1 if len(rows) else 0)
    last[rows] = number  # of each row's occurrences one, on a CPU the last
    chosen = last[rows]
    is_chosen = chosen == number
    own = rows[is_chosen]
    places = (is_chosen.cumsum(0) - 1)[chosen]
    g, squares = (t.new_zeros(len(own), t.size(1)).index_add_(0, places, t) for t in values)
    return own, g, squares


def added(parts: list[Rows]) -> Rows:
    """The sums over parts that have each row once. Neighbours are added up first: 2, 4, ... micro-batches have the same
    bits in any number of processes."""
    while len(parts) > 1:
        parts = [merged(*map(torch.cat, zip(*parts[i : i + 2], strict=True))) for i in range(0, len(parts), 2)]
    return parts[0]


def exchanged(rows: Tensor, g: Tensor, squares: Tensor, processes: int) -> list[Rows]:
    """The rows of every process, in the order of the ranks. Their gradients are averaged over the processes. All
    processes get the same bits."""
    sums = torch.cat([g / processes, squares / processes**2], dim=1)
    counts = rows.new_empty(processes)
    gather(torch.tensor([len(rows)], device=rows.device), counts)()
    longest = int(counts.max())
    found = []
    for tensor in (rows, sums):
        shape = (longest, *tensor.shape[1:])
        own, every = tensor.new_zeros(shape), tensor.new_empty((processes, *shape))
        own[: len(tensor)] = tensor
        gather(own, every.flatten(0, 1))()
        found.append(every)
    parts = zip(*found, counts.tolist(), strict=True)
    return [(numbers[:n], values[:n, :-1], values[:n, -1:]) for numbers, values, n in parts]


@torch.no_grad()
def step_rows(table: Tensor, total: Tensor, lr: float, parts: list[Rows], found_inf: Tensor | None = None) -> None:
    """Moves rows of table, (R, C); total, (R, 1): one accumulator per row.

    A row with gradient g (sum of squares: s) moves by lr * g / sqrt(s / C). Its first step has rms lr, whatever
    the size of the gradient; later steps are smaller the more often the row occurred (Adagrad, Duchi et al. 2011, with
    a row's mean square in place of each element's). Nothing decays, and rows outside the batch cost nothing.
    found_inf: a 0-dim tensor that is 1 to skip the step.
    """
    for rows, _, squares in parts:
        total.index_add_(0, rows, squares if found_inf is None else torch.where(found_inf.bool(), 0.0, squares))
    for rows, g, _ in parts:
        scale = (total[rows] + 1e-20).rsqrt_().mul_(-lr * math.sqrt(table.size(1)))
        table.index_add_(0, rows, scale * (g if found_inf is None else torch.where(found_inf.bool(), 0.0, g)))
