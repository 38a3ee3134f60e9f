"""Head and cross-entropy in one, in chunks of rows: the logits of a whole batch never exist.

The forward pass already computes the gradients of the activations and of the head, chunk by chunk, and keeps only
these two for the backward pass (Liger Kernel, arXiv 2410.10989, section 3.2; Cut Cross-Entropy, arXiv 2411.09009).
Shapes: N rows, C width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.model import Head, NextTokenLoss
from ..machine.memory import empty
from .once import differentiable_once
from .products import ONEDNN, PLAIN, CPUHead, add_product, multiply

PIECE_ON_CPU = 512  # rows: fewer make the products slower, more gain nothing
PIECE_ELSEWHERE = 4096
IN_CACHE, SLICE = 1 << 19, 1 << 22  # numbers that a CPU works on at once: of the logits, of the head's gradient


class ChunkedLoss(NextTokenLoss):
    """NextTokenLoss that never computes all logits at once."""

    def passes(self) -> type[CPULogitPasses]:
        """The class of the passes on a CPU."""
        return CPULogitPasses

    def forward(self, x: Tensor, targets: Tensor, head: Head) -> tuple[None, Tensor]:
        x = x.reshape(-1, x.size(-1))
        libraries = head.libraries if isinstance(head, CPUHead) and x.dtype == torch.float32 else PLAIN
        options: Any = {"libraries": libraries, "passes": self.passes()}
        return None, linear_cross_entropy(x, head.weight, targets.reshape(-1), head.softcap, **options)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0, piece: int | None = None, libraries: str = PLAIN,
    passes: type[CPULogitPasses] | None = None,
) -> Tensor:  # fmt: skip
    """Mean cross-entropy (nats) of the logits x @ weight.T over the rows with a target other than -1.

    x: (N, C); weight: (V, C); targets: (N,) int64; softcap: a logit z becomes softcap * tanh(z / softcap), 0 is off;
    piece: rows per chunk, None: chosen for the device. The products use x's precision, or autocast's under autocast.
    Sums over the vocabulary, rows and chunks use float32 or better. If no row has a target, the loss is NaN, as in
    torch, and the gradients are 0.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    grad = torch.is_grad_enabled()
    wanted = (grad and x.requires_grad, grad and weight.requires_grad)
    piece = min(piece or (PIECE_ON_CPU if kind == "cpu" else PIECE_ELSEWHERE), max(1, len(x)))
    with torch.autocast(kind, enabled=False):
        given = libraries, passes or CPULogitPasses
        return _LinearCrossEntropy.apply(x, weight, targets, softcap, piece, *wanted, *given)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float, piece: int, for_x: bool, for_w: bool,
        libraries: str, passes: type[CPULogitPasses],
    ) -> Tensor:  # fmt: skip
        w, valid = weight.to(x.dtype), targets >= 0
        # rows without a target are excluded from all three results here, which saves a pass over their logits
        ids, seen = targets.clamp(min=0), x * valid[:, None] if for_w else x
        kernel = passes if x.device.type == "cpu" and not torch.compiler.is_compiling() else LogitPasses
        rows = kernel(w, piece, softcap, for_x or for_w, libraries)
        losses, dx, dw = [], [], None
        for at in range(0, len(x), piece):
            part = slice(at, at + piece)
            loss, g = rows.losses(x[part], ids[part])
            losses.append(loss)
            if for_x:
                dx.append(multiply(g, w, libraries[1]))
            if for_w:
                dw = rows.add_product(dw, g, seen[part])
        count = valid.sum()
        ctx.save_for_backward(torch.cat(dx).mul_(valid[:, None]) if for_x else None, dw, count)
        ctx.weight_dtype = weight.dtype
        return torch.cat(losses).masked_fill(~valid, 0).sum() / count

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, count = ctx.saved_tensors
        factor = grad / count.clamp(min=1)
        # not in place if the graph is retained: backward may run again
        scaled: Any = torch.mul if torch.compiler.is_compiling() or is_retained() else Tensor.mul_
        dx = None if dx is None else scaled(dx, factor).to(dx.dtype)
        dw = None if dw is None else scaled(dw, factor).to(ctx.weight_dtype)
        return dx, dw, *[None] * 7


def is_retained() -> bool:
    """In a backward pass: whether its graph is retained, so that it may run again. True if it is unknown."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class LogitPasses:
    """The passes over the logits of a chunk, written for a compiler to fuse, and for a GPU without a compiler."""

    def __init__(self, w: Tensor, piece: int, softcap: float, with_gradient: bool, libraries: str = PLAIN):
        self.libraries = libraries
        self.w, self.softcap, self.with_gradient = w, softcap, with_gradient
        self.high = torch.promote_types(w.dtype, torch.float32)
        self.vocabulary = torch.arange(len(w), device=w.device)

    def losses(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Any]:
        """The losses of the rows, and the gradient of their logits if requested."""
        z, slope = (x @ self.w.t()).to(self.high), None
        if self.softcap:
            z = torch.tanh(z / self.softcap)
            slope = 1 - z * z
            z = z * self.softcap
        norm = torch.logsumexp(z, dim=-1, keepdim=True)
        losses = (norm - z.gather(1, ids[:, None])).squeeze(1)
        if not self.with_gradient:
            return losses, None
        g = (z - norm).exp() - (self.vocabulary == ids[:, None]).to(self.high)
        return losses, (g if slope is None else g * slope).to(x.dtype)

    def add_product(self, total: Tensor | None, g: Tensor, x: Tensor) -> Tensor:
        """total + g.T @ x."""
        product = (g.t() @ x).to(self.high)
        return product if total is None else total + product


class CPULogitPasses(LogitPasses):
    """The same with one buffer for the logits of every chunk. The passes process a few rows that fit in the processor's
    cache, and cost a tenth of the products."""

    def __init__(self, w: Tensor, piece: int, softcap: float, with_gradient: bool, libraries: str = PLAIN):
        super().__init__(w, piece, softcap, with_gradient, libraries)
        vocabulary = len(w)
        self.logits = empty((0 if libraries[0] == ONEDNN else piece, vocabulary), w.dtype)
        self.few = min(piece, max(1, IN_CACHE // vocabulary))
        self.z = torch.empty(self.few, vocabulary, dtype=self.high)
        self.p = torch.empty(self.few, vocabulary, dtype=self.high)
        rows = min(vocabulary, max(1, SLICE // w.size(1)))
        self.slices = [slice(at, min(vocabulary, at + rows)) for at in range(0, vocabulary, rows)]
        self.product = torch.empty(rows, w.size(1), dtype=w.dtype)

    def losses(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Any]:
        logits = self.product_of(x)
        losses = [self._few(few, at) for few, at in zip(logits.split(self.few), ids.split(self.few), strict=True)]
        return torch.cat(losses), logits

    def product_of(self, x: Tensor) -> Tensor:
        """The logits of the rows, before a softcap."""
        out = None if self.libraries[0] == ONEDNN else self.logits[: len(x)]
        return multiply(x, self.w.t(), self.libraries[0], out)

    def _few(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The losses of a few rows. Their logits are overwritten by their gradient."""
        z, p, at = self.z[: len(ids)].copy_(logits), self.p[: len(ids)], ids[:, None]
        if self.softcap:
            p = torch.tanh(z.div_(self.softcap), out=p)
            z = torch.mul(p, self.softcap, out=z)
            slope = p.square().neg_().add_(1)
        norm = z.amax(dim=-1)
        picked = z.gather(1, at).squeeze(1)
        torch.softmax(z, dim=-1, out=p)
        norm -= p.amax(dim=-1).log_()  # the largest logit's share is 1 / sum(exp(z - max)): cheaper than logsumexp
        if self.with_gradient:
            p.scatter_add_(1, at, p.new_full((), -1).expand_as(at))
            logits.copy_(p.mul_(slope) if self.softcap else p)
        return norm.sub_(picked)

    def add_product(self, total: Tensor | None, g: Tensor, x: Tensor) -> Tensor:
        if x.dtype == self.high:
            if self.libraries[2] != ONEDNN and total is not None:
                return add_product(total, g.t(), x, self.libraries[2])
            product = multiply(g.t(), x, self.libraries[2])
            return product if total is None else total.add_(product)
        total, first = (torch.empty_like(self.w, dtype=self.high), True) if total is None else (total, False)
        for part in self.slices:  # a third faster than the whole at once, without a second head's worth of memory
            product = torch.mm(g[:, part].t(), x, out=self.product[: part.stop - part.start])
            total[part].copy_(product) if first else total[part].add_(product)
        return total
