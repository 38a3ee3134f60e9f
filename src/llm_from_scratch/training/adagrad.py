"""Row-wise Adagrad, for tables of which a batch names few rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NGRAMS = "transformer.ngrams.weight"


@torch.no_grad()
def forget_long_ngrams(optimizer: torch.optim.Optimizer, ngram_rows: int) -> None:
    """Unlearns the n-grams of three tokens and more, of which there are so many that most were seen once: in a second
    pass over the same text they would give the answer away. ngram_rows: those of two tokens, which stay."""
    for group in optimizer.param_groups:
        if group["names"] == [NGRAMS]:
            (table,) = group["params"]
            table[ngram_rows:] = 0
            if "sum" in optimizer.state[table]:
                optimizer.state[table]["sum"][ngram_rows:] = 0


@torch.no_grad()
def step_rows(table: Tensor, state: dict[str, Tensor], lr: float, found_inf: Tensor | None = None) -> None:
    """Moves the rows of table, (R, C), that its sparse gradient names; one accumulator a row, state["sum"], (R, 1).

    A row with gradient g whose squares add up to s moves by lr * g / sqrt(s / C): at its first step a move of rms lr,
    whatever the size of the gradient, then smaller ones the more often it is named (Adagrad, Duchi et al. 2011, with a
    row's mean square in place of each element's). Nothing decays; what a batch does not name costs nothing.
    found_inf: a 0-dim tensor that is 1 where the step is to be left out.
    """
    assert table.grad is not None and table.grad.is_sparse
    rows, g = table.grad._indices()[0], table.grad._values()  # a row that is named twice stands there twice
    if found_inf is not None:
        g = torch.where(found_inf.bool(), 0.0, g)
    if not state:
        state["sum"] = torch.zeros(table.size(0), 1, device=table.device)
    total = state["sum"].index_add_(0, rows, g.square().sum(dim=1, keepdim=True))
    scale = (total[rows] + 1e-20).rsqrt_().mul_(-lr * math.sqrt(table.size(1)))
    table.index_add_(0, rows, g * scale)
