"""AdamW with torch's kernels; its moments may be bfloat16, rounded stochastically."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .rule import Rule, Slots, pieces, with_gradients
from .sharding import first_element, local


class AdamW(Rule):
    """AdamW (arXiv 1711.05101).

    With bfloat16, moments are converted to float32, updated and rounded piece by piece, so no float32 copy of the whole
    model exists. Each parameter counts its roundings ("draws"), which makes them repeatable. Of sharded parameters each
    process steps its own rows.
    """

    skips_on_device = True  # if fused: one kernel for many tensors, which reads found_inf

    def slots(self, p: Tensor) -> Slots:
        return {"exp_avg": (tuple(p.shape), self.dtype), "exp_avg_sq": (tuple(p.shape), self.dtype)}

    def step(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], found_inf: Tensor | None) -> None:
        named = with_gradients(group)
        for _, p in named:
            if not state[p]:
                count = torch.zeros((), device=p.device if group["fused"] else "cpu")
                state[p] = {"step": count, **self.new_state(p)}
        beta1, beta2 = group["betas"]
        update = functools.partial(
            adamw, fused=group["fused"], found_inf=found_inf, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        if self.dtype == torch.float32:
            params = [p for _, p in named]
            m, v, steps = ([local(state[p][slot]) for p in params] for slot in ("exp_avg", "exp_avg_sq", "step"))
            update([local(p) for p in params], [local(p.grad) for p in params], m, v, [], steps)
            return
        for batch in pieces(named):
            all_four = [(p, p.grad, state[p]["exp_avg"], state[p]["exp_avg_sq"], part) for _, p, part in batch]
            flat = [[local(t).reshape(-1)[part] for t in tensors] for *tensors, part in all_four]
            params, grads, m, v = (list(column) for column in zip(*flat, strict=True))
            m32, v32 = [t.float() for t in m], [t.float() for t in v]
            update(params, grads, m32, v32, [], [state[p]["step"].clone() for _, p, _ in batch])  # p may come again
            for i, (name, p, part) in enumerate(batch):
                begin, draws = first_element(p) + part.start, state[p].get("draws", 0)
                self.dither.round([(m[i], m32[i]), (v[i], v32[i])], name, draws, 0, begin)
        for _, p in named:
            state[p]["draws"] = state[p].get("draws", 0) + 1
            state[p]["step"] += 1 if found_inf is None else 1 - found_inf
