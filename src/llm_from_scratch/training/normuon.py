"""NorMuon (arXiv 2510.05491): Muon with steps of the same length for every neuron.

The rows of an orthogonal matrix that is higher than wide have different lengths, so that some neurons of a layer would
learn much faster than others. They are divided by the root of a running mean of their squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .muon import Muon
from .owners import Matrix, Sharded, Whole
from .rule import Slots
from .sharding import local

BETA2 = 0.95
EPSILON = 1e-8


class NorMuon(Muon):
    """For a matrix of r rows and c < r columns with Muon's step O, per row: v = beta2 v + (1 - beta2) r mean(O^2), and
    O / sqrt(v) instead of O. v begins at 1, the mean over the rows of an orthogonal O, so steps are as long as Muon's
    and its rates hold. The rows of other matrices have equal lengths already."""

    def slots(self, p: Tensor) -> Slots:
        return {**super().slots(p), "row_squares": ((p.size(0), 1), torch.float32)}

    def new_state(self, p: Tensor) -> dict[str, Any]:
        state = super().new_state(p)
        local(state["row_squares"]).fill_(1.0)
        return state

    def finished(
        self, ranks: Whole | Sharded, m: Matrix, step: Tensor, kept: dict[str, Any], found_inf: Tensor | None
    ) -> Tensor:
        if m.height <= m.p.size(1):
            return step
        squares = ranks.of(m, kept["row_squares"])
        new = squares.lerp(m.height * step.float().square().mean(dim=1, keepdim=True), 1 - BETA2)
        squares.copy_(new if found_inf is None else torch.where(found_inf.bool(), squares, new))
        return step * (new + EPSILON).rsqrt()
