"""Muon for the hidden matrices, AdamW for all else, in one optimizer.

Muon (K. Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix, U S V^T, by nearly
U V^T: a step of the same length in every direction. Where torch.optim.Muon takes one matrix after the other, here all
matrices of one shape go through each product together.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..config import OptimizerConfig
from ..core.model import CausalSelfAttention
from ..errors import UserError
from ..machine.device import cpu_has_native_bf16
from .adagrad import NGRAMS
from .adamw import AdamW

# The odd polynomials x -> a x + b x^3 + c x^5 that one after the other bring [0.01, 1] nearest to 1: each is the best
# in the maximum norm on the interval that those before it leave (Polar Express, arXiv 2505.16932), widened by 2%
# upwards for the rounding of bfloat16, beyond which it would run away. They leave [0.984, 1.016]; what is smaller grows
# by 149. From 0.003 on, the first would bring some large singular values down to 0.02, where they drown in rounding.
COEFFICIENTS = (
    (7.9424, -22.2873, 15.8239),
    (3.5875, -2.5845, 0.4893),
    (2.6604, -1.9134, 0.4194),
    (1.9688, -1.3507, 0.3852),
)
MARGIN = 1.02  # likewise, for the norm
CHUNKS = {"cuda": 1 << 26}  # elements that go through the products together: what keeps a GPU busy;
CHUNK = 1 << 22  # a processor gains nothing above it


def orthogonalized(x: Tensor, coefficients: tuple[tuple[float, float, float], ...] = COEFFICIENTS) -> Tensor:
    """The singular values of n matrices brought near 1. x: (n, rows, cols) with rows <= cols, overwritten.

    Each matrix is first divided by the 8-norm of its singular values, (sum of s^8)^(1/8), which is read off the square
    of its Gram matrix: above the largest, but nearer to it than the Frobenius norm that is usual, which is worth about
    one polynomial. Where columns are many, two polynomials are worked out on the Gram matrix between two products with
    x ("Gram Newton-Schulz"); with three, rounding makes it indefinite and the result endless in bfloat16.
    """
    at_once = 2 if x.size(2) > 2 * x.size(1) else 1
    for begin in range(0, len(coefficients), at_once):
        a, b, c = coefficients[begin]
        gram = x @ x.mT
        if begin:
            q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        else:
            size = gram.diagonal(dim1=1, dim2=2).sum(-1, dtype=torch.float32)[:, None, None].clamp(min=1e-30)
            gram /= size.to(x.dtype)  # now no square leaves the range of the numbers
            square = gram @ gram
            norm = torch.linalg.vector_norm(square, dim=(1, 2), keepdim=True, dtype=torch.float32)
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
    """bfloat16 where products of it are fast: half the time, and the singular values end in the same interval."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_native_bf16() else torch.float32


def muon_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Up to four groups that hold every trained parameter once: the weights of linear layers but the head's for Muon;
    for AdamW embeddings, the head, and all else. A table that is tied to the head is the head.

    "rows" tells which matrices a weight holds one above the other: queries, keys and values are three. Only the
    matrices decay. Raises UserError where a rate is set for a group that the model does not have.
    """
    head = getattr(getattr(model, "lm_head", None), "weight", None)
    rows: dict[Tensor, tuple[int, ...]] = {}
    tables: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tables.add(module.weight)
        elif isinstance(module, nn.Linear) and module.weight is not head:
            rows.setdefault(module.weight, (module.out_features,))
        elif isinstance(module, CausalSelfAttention):
            heads = (module.n_head, module.n_kv_head, module.n_kv_head)
            rows[module.c_attn.weight] = tuple(n * module.head_dim for n in heads)
    named: dict[str, list[tuple[str, Tensor]]] = {"matrices": [], "embeddings": [], "head": [], "rest": []}
    for name, p in model.named_parameters():
        if p.requires_grad and name != NGRAMS:
            kind = "head" if p is head else "matrices" if p in rows else "embeddings" if p in tables else "rest"
            named[kind].append((name, p))
    rates = {
        "matrices": config.muon_learning_rate,
        "embeddings": config.embedding_learning_rate,
        "head": config.head_learning_rate,
    }
    groups = []
    for kind, members in named.items():
        rate = rates.get(kind)
        if not members and rate is not None and kind != "matrices":
            raise UserError(
                f"the model has no {kind} of its own to train: leave --{kind.rstrip('s')}_learning_rate out"
            )
        peak = config.learning_rate if rate is None else rate
        group = {"params": [p for _, p in members], "names": [n for n, _ in members], "lr": peak}
        group |= {"lr_scale": peak / config.learning_rate, "weight_decay": 0.0}
        if kind == "matrices":
            parts = [rows[p] for _, p in members]
            group |= {"weight_decay": config.weight_decay, "momentum": config.muon_momentum, "rows": parts}
        groups += [group] if members else []
    return groups


class Muon(AdamW):
    """Groups with a "momentum" are stepped by Muon, the others by AdamW (see there for dtype, fused and found_inf).

    For a matrix W of r rows and c columns with gradient G, M = mu M + (1 - mu) G, and
    W = (1 - lr * weight_decay) W - lr * sqrt(max(1, r / c)) * orthogonalized((1 - mu) G + mu M):
    Nesterov's momentum and the scale of Jordan's Muon ("original" in torch.optim.Muon), whose rate is about 0.02.
    The gradients are overwritten. Every process of a data-parallel run works out the same. Raises UserError where
    parameters are sharded.
    """

    def __init__(self, groups: list[dict[str, Any]], *args: Any, **settings: Any):
        distributed = sys.modules.get("torch.distributed.tensor")  # whoever shards has imported it, which takes a while
        for name, p in ((name, p) for group in groups for name, p in zip(group["names"], group["params"], strict=True)):
            if distributed is not None and isinstance(p, distributed.DTensor):
                raise UserError(
                    f"optimizer_type=muon needs whole matrices, and {name} is shared out among processes (FSDP): "
                    "take --optimizer_type=adamw, or data parallelism without shards"
                )
        super().__init__(groups, *args, **settings)

    def step_group(self, group: dict[str, Any]) -> None:
        if "momentum" not in group:
            super().step_group(group)
            return
        shapes: dict[tuple[int, int], list[_Matrix]] = {}
        for name, p, heights in zip(group["names"], group["params"], group["rows"], strict=True):
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p, dtype=self.dtype)}
            if self.dtype != torch.float32:
                self.state[p]["draws"] = self.state[p].get("draws", 0) + 1
            begin = 0
            for height in heights:
                short, long = sorted((height, p.size(1)))
                shapes.setdefault((short, long), []).append(_Matrix(name, p, begin, begin + height))
                begin += height
        for (short, long), matrices in shapes.items():
            at_once = max(1, CHUNKS.get(matrices[0].p.device.type, CHUNK) // (short * long))
            for first in range(0, len(matrices), at_once):
                self._step_matrices(matrices[first : first + at_once], group)

    def _step_matrices(self, matrices: list[_Matrix], group: dict[str, Any]) -> None:
        """Steps matrices that have one shape once they lie on their longer side."""
        mu, lr, decay = group["momentum"], group["lr"], group["lr"] * group["weight_decay"]
        weights = [m.of(m.p) for m in matrices]
        gradients = [m.of(m.p.grad) for m in matrices]
        momenta = self._momenta(matrices, gradients, mu)
        torch._foreach_lerp_(gradients, momenta, mu)
        dtype = iteration_dtype(weights[0].device)
        x = torch.stack([m.lying(g.to(dtype)) for m, g in zip(matrices, gradients, strict=True)])
        del momenta
        x = orthogonalized(x)
        if self.found_inf is None:
            keep: float | Tensor = 1 - decay
        else:
            keep = 1 - decay * (1 - self.found_inf)
            x.masked_fill_(self.found_inf.bool(), 0.0)  # it may hold anything
        if decay:
            torch._foreach_mul_(weights, keep)
        for m, weight, step in zip(matrices, weights, x, strict=True):
            weight.add_(m.lying(step).contiguous(), alpha=-lr * max(1.0, weight.size(0) / weight.size(1)) ** 0.5)

    def _momenta(self, matrices: list[_Matrix], gradients: list[Tensor], mu: float) -> list[Tensor]:
        """The momenta with the gradients in them, float32; left as they are where the step is to be skipped."""
        momenta = [m.of(self.state[m.p]["momentum_buffer"]) for m in matrices]
        if self.dtype == torch.float32 and self.found_inf is None:
            torch._foreach_lerp_(momenta, gradients, 1 - mu)
            return momenta
        wide = list(torch._foreach_lerp([t.float() for t in momenta], gradients, 1 - mu))
        for m, old, new in zip(matrices, momenta, wide, strict=True):
            kept = new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new)
            if self.dtype == torch.float32:
                old.copy_(kept)
            else:
                self.dither.round_all(old, kept.clone(), m.name, self.state[m.p]["draws"], m.begin * old.size(1))
        return wide


class _Matrix(NamedTuple):
    """Rows begin to end of a parameter."""

    name: str
    p: Tensor
    begin: int
    end: int

    def of(self, tensor: Any) -> Tensor:
        return tensor[self.begin : self.end]

    def lying(self, matrix: Tensor) -> Tensor:
        """Rows and columns exchanged where the parameter's matrix is higher than wide; twice is once."""
        return matrix.mT if self.end - self.begin > self.p.size(1) else matrix
