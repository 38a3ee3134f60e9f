"""Muon for the hidden matrices, AdamW for all other parameters.

Muon (K. Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix, U S V^T, by about
U V^T: a step of the same length in every direction. Unlike in torch.optim.Muon, matrices of one shape share a product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..config import OptimizerConfig
from ..errors import UserError
from ..machine.device import cpu_has_native_bf16
from .owners import Batch, Matrix, Sharded, Whole, matrices_of, rounds
from .rule import Rule, Slots, with_gradients
from .sharding import is_sharded

# The odd polynomials x -> a x + b x^3 + c x^5 that map [0.01, 1] to [0.984, 1.016], one after the other; smaller values
# grow by 149. Each is the best in the maximum norm on the interval that the previous ones leave (Polar Express, arXiv
# 2505.16932), widened by 2% upwards because values above it would diverge, and bfloat16 rounds. Starting from 0.003,
# the first would map some large singular values to 0.02, below the rounding error.
COEFFICIENTS = (
    (7.9424, -22.2873, 15.8239), (3.5875, -2.5845, 0.4893), (2.6604, -1.9134, 0.4194), (1.9688, -1.3507, 0.3852)
)  # fmt: skip
MARGIN = 1.02  # the same 2%, for the norm
CHUNKS = {"cuda": 1 << 26}  # elements that share a product: enough to keep a GPU busy;
CHUNK = 1 << 22  # a CPU gains nothing above this


def orthogonalized(x: Tensor, coefficients: tuple[tuple[float, float, float], ...] = COEFFICIENTS) -> Tensor:
    """The singular values of n matrices brought near 1. x: (n, rows, cols) with rows <= cols, overwritten.

    Each matrix is first divided by the 8-norm of its singular values, (sum of s^8)^(1/8), from the square of its Gram
    matrix: closer to the largest than the usual Frobenius norm, which saves about one polynomial. With many columns,
    two polynomials share a product with x ("Gram Newton-Schulz"); three would diverge in bfloat16.
    """
    at_once, wide = 2 if x.size(2) > 2 * x.size(1) else 1, torch.promote_types(x.dtype, torch.float32)
    for begin in range(0, len(coefficients), at_once):
        a, b, c = coefficients[begin]
        gram = x @ x.mT
        if begin:
            q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        else:
            size = gram.diagonal(dim1=1, dim2=2).sum(-1, dtype=wide)[:, None, None].clamp(min=1e-30)
            gram /= size.to(x.dtype)  # now no square overflows
            square = gram @ gram
            norm = torch.linalg.vector_norm(square, dim=(1, 2), keepdim=True, dtype=wide)
            scale = (MARGIN**2 * norm.sqrt()).clamp(min=1e-14)  # squared, as gram is
            gram /= scale.to(x.dtype)
            q = square.mul_((c / scale**2).to(x.dtype)).add_(gram, alpha=b)
            x /= (size * scale).sqrt().to(x.dtype)
        q.diagonal(dim1=1, dim2=2).add_(a)  # the polynomial of x is q @ x
        for a, b, c in coefficients[begin + 1 : begin + at_once]:
            gram = q @ gram @ q
            then = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            then.diagonal(dim1=1, dim2=2).add_(a)
            q = then @ q
        x = q @ x
    return x


@functools.cache
def iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if its products are fast: half the time, and the singular values end in the same interval."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_native_bf16() else torch.float32


class Muon(Rule):
    """Muon for groups of matrices.

    For a matrix W of r rows and c columns with gradient G, M = mu M + (1 - mu) G, and
    W = (1 - lr * weight_decay) W - lr * sqrt(max(1, r / c)) * orthogonalized((1 - mu) G + mu M):
    Nesterov's momentum and the scale of Jordan's Muon ("original" in torch.optim.Muon), with a rate of about 0.02.
    The gradients are overwritten. Several processes share the products, the costly part (arXiv 2502.16982); under DDP
    each keeps all momenta.
    """

    skips_on_device = True

    @classmethod
    def groups(cls, model: nn.Module, config: OptimizerConfig, default: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Up to four groups that hold every trained parameter once: the weights of linear layers except the head for
        Muon; embeddings, the head, and the rest for AdamW. A table that is tied to the head counts as the head.

        "rows": the heights of the matrices that are stacked in a weight: queries, keys and values are three. Only the
        matrices decay. Raises UserError if a rate is set for a group that the model does not have.
        """
        head = getattr(getattr(model, "lm_head", None), "weight", None)
        rows: dict[Tensor, tuple[int, ...]] = {}
        tables: set[Tensor] = set()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                tables.add(module.weight)
            elif isinstance(module, nn.Linear) and module.weight is not head:
                rows.setdefault(module.weight, getattr(module, "stacked", (module.out_features,)))
        trained = {p for group in default for p in group["params"]}
        named: dict[str, list[tuple[str, Tensor]]] = {"matrices": [], "embeddings": [], "head": [], "rest": []}
        for name, p in model.named_parameters():
            if p in trained:
                kind = "head" if p is head else "matrices" if p in rows else "embeddings" if p in tables else "rest"
                named[kind].append((name, p))
        rates = {
            "matrices": config.muon_learning_rate, "embeddings": config.embedding_learning_rate,
            "head": config.head_learning_rate,
        }  # fmt: skip
        groups = []
        for kind, members in named.items():
            rate = rates.get(kind)
            if not members and rate is not None and kind != "matrices":
                setting = f"--{kind.rstrip('s')}_learning_rate=None"
                raise UserError(f"the model does not have separate {kind} to train: set {setting}")
            peak = config.learning_rate if rate is None else rate
            group = {"params": [p for _, p in members], "names": [n for n, _ in members], "lr": peak, "rule": "adamw"}
            group |= {"lr_scale": peak / config.learning_rate, "weight_decay": 0.0}
            if kind == "matrices":
                group |= {"rule": config.optimizer_type, "momentum": config.muon_momentum}
                group |= {"weight_decay": config.weight_decay, "rows": [rows[p] for _, p in members]}
            groups += [group] if members else []
        return groups

    def slots(self, p: Tensor) -> Slots:
        return {"momentum_buffer": (tuple(p.shape), self.dtype)}

    def step(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], found_inf: Tensor | None) -> None:
        for _, p in with_gradients(group):
            state[p] = state[p] or self.new_state(p)
            if self.dtype != torch.float32:
                state[p]["draws"] = state[p].get("draws", 0) + 1
        matrices = [m for m in matrices_of(group) if m.p.grad is not None]
        if not matrices:
            return
        p, device = matrices[0].p, matrices[0].p.device
        ranks = Sharded(p) if is_sharded(p) else Whole(self.processes)
        limit, dtype = CHUNKS.get(device.type, CHUNK) // ranks.processes, iteration_dtype(device)
        finish: Callable[[], None] | None = None
        for batches in rounds(matrices, ranks.processes, limit):
            ahead = [
                self._look_ahead(ranks, batch, group, state, found_inf, owner == ranks.rank or ranks.sharded)
                for owner, batch in enumerate(batches)
            ]
            own = ranks.collect(batches, [[t.to(dtype) for t in part] for part in ahead])
            if own is not None:
                own = orthogonalized(own)
                if found_inf is not None:
                    own.masked_fill_(found_inf.bool(), 0.0)  # a skipped step may hold anything
            results = ranks.send(batches, own, torch.empty(0, dtype=dtype, device=device))
            if finish is not None:
                finish()  # the previous round's results have arrived in the meantime
            finish = functools.partial(self._move, ranks, batches, results, group, state, found_inf)
        assert finish is not None  # there is a round, because there are matrices
        finish()

    def finished(
        self, ranks: Whole | Sharded, m: Matrix, step: Tensor, kept: dict[str, Any], found_inf: Tensor | None
    ) -> Tensor:
        """The change of this process's rows of a matrix. kept: the state of its parameter."""
        return step

    def _look_ahead(
        self, ranks: Whole | Sharded, batch: Batch, group: dict[str, Any], state: dict[Tensor, dict[str, Any]],
        found_inf: Tensor | None, wanted: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Updates the momenta of a batch. Returns (1 - mu) G + mu M, if wanted."""
        if not batch:
            return []
        mu = group["momentum"]
        gradients = [ranks.of(m, m.gradient) for m in batch]
        kept = [ranks.of(m, state[m.p]["momentum_buffer"]) for m in batch]  # they do not change if the step is skipped
        if self.dtype == torch.float32 and found_inf is None:
            momenta = kept
            torch._foreach_lerp_(momenta, gradients, 1 - mu)
        else:
            momenta = list(torch._foreach_lerp([t.float() for t in kept], gradients, 1 - mu))
            for m, old, new in zip(batch, kept, momenta, strict=True):
                value = new if found_inf is None else torch.where(found_inf.bool(), old, new)
                if self.dtype == torch.float32:
                    old.copy_(value)
                else:
                    flat = (old.view(-1), value.clone().view(-1))
                    self.dither.round([flat], m.name, state[m.p]["draws"], m.begin * old.size(1), ranks.skipped(m))
        if wanted:
            torch._foreach_lerp_(gradients, momenta, mu)
        return gradients if wanted else []

    def _move(
        self, ranks: Whole | Sharded, batches: list[Batch], results: Callable[[], list[list[Tensor]]],
        group: dict[str, Any], state: dict[Tensor, dict[str, Any]], found_inf: Tensor | None,
    ) -> None:  # fmt: skip
        """Decays the weights of a round and adds the results."""
        decay = group["lr"] * group["weight_decay"]
        keep: float | Tensor = 1 - decay if found_inf is None else 1 - decay * (1 - found_inf)
        for batch, steps in zip(batches, results(), strict=True):
            weights = [ranks.of(m, m.p) for m in batch]
            if decay and weights:
                torch._foreach_mul_(weights, keep)
            for m, weight, step in zip(batch, weights, steps, strict=True):
                step = self.finished(ranks, m, step, state[m.p], found_inf)
                weight.add_(step.contiguous(), alpha=-group["lr"] * max(1.0, m.height / m.p.size(1)) ** 0.5)
