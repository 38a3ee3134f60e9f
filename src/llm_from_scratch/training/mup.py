"""Learning rates that transfer across widths: the part of muP (arXiv 2203.03466) that belongs to the optimizer.

A matrix that sums over the width gets AdamW's rate times base_width / n_embd: hidden matrices and the head. Embeddings
are looked up, not summed over, and keep their rate, as vectors do. The decay of a matrix per step does not change.
Initial weights are the model's: zero_init scales them with the width. Muon's updates have the right size already.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn as nn

from ..config import GPTConfig, OptimizerConfig
from ..core.sizes import meta_model
from ..errors import UserError


def wider(config: GPTConfig, times: int) -> GPTConfig:
    """The same model with more heads of the same size, and everything else in proportion."""
    sizes = {name: getattr(config, name) for name in ("n_embd", "n_head", "n_kv_head", "mlp_hidden")}
    return dataclasses.replace(config, **{name: size and size * times for name, size in sizes.items()})


def summed_over_width(model: Any) -> set[str]:
    """The parameters that the rule scales: not tables, and with a last dimension that grows with the width. Found by
    comparing shapes with a model of twice the width. Raises UserError for a parameter that
    the plain model does not have."""
    twice = {name: p.shape for name, p in meta_model(wider(model.config, 2)).named_parameters()}
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = {id(p) for module in modules for p in module.parameters(recurse=False)}
    found = set()
    for name, p in model.named_parameters():
        if name not in twice:
            raise UserError(f"lr_scaling=mup: the width scaling of {name} is unknown: use --lr_scaling=none")
        if p.dim() >= 2 and p.shape[-1] != twice[name][-1]:
            if id(p) not in tables:
                found.add(name)
            elif any(
                p is getattr(module, "weight", None) for module in model.modules() if isinstance(module, nn.Linear)
            ):
                raise UserError(
                    f"lr_scaling=mup needs --tie_embeddings=False: {name} is both embedding and head, which need "
                    "different learning rates"
                )
    return found


def scale_by_width(model: Any, config: OptimizerConfig, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with AdamW's rates scaled; a group is divided if only a part of it is."""
    if config.base_width is None:
        return groups
    scaled, factor, result = summed_over_width(model), config.base_width / model.config.n_embd, []
    for group in groups:
        for is_scaled in (True, False):
            pairs = zip(group["names"], group["params"], strict=True)
            part = [(name, p) for name, p in pairs if (group["rule"] == "adamw" and name in scaled) == is_scaled]
            if not part:
                continue
            new = {**group, "names": [name for name, _ in part], "params": [p for _, p in part]}
            if is_scaled:
                new |= {"lr": group.get("lr", config.learning_rate) * factor, "lr_scale": group["lr_scale"] * factor}
                new["weight_decay"] = group["weight_decay"] / factor
            result.append(new)
    return result
