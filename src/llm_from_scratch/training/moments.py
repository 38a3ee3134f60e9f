"""The optimizer's state of each parameter: its size, saving and restoring it by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..config import OptimizerConfig
from ..errors import UserError
from .optimizer import OPTIMIZERS, SPARSE, Optimizer, make_optimizer, sparse_tables
from .rule import Slots
from .sharding import shard_of


def optimizer_bytes(model: nn.Module, config: OptimizerConfig, only_tables: bool = False) -> int:
    """Memory of the moments, by the declarations of the rules. The model may be on the meta device."""
    optimizer = make_optimizer(model, config, torch.device("cpu"))
    groups = [group for group in optimizer.param_groups if group["rule"] == SPARSE or not only_tables]
    slots = [optimizer.slots(group, p) for group in groups for p in group["params"]]
    return sum(torch.Size(shape).numel() * dtype.itemsize for of_one in slots for shape, dtype in of_one.values())


def share_of(
    bytes_by_part: Mapping[str, float], model: nn.Module, config: OptimizerConfig, shards: int
) -> dict[str, float]:
    """A process's share of the weights, gradients and optimizer of a sharded model. The tables with sparse gradients
    stay whole in every process."""
    tables = [p for module in sparse_tables(model) for p in module.parameters(recurse=False)]
    whole = {
        "weights": 4 * sum(p.numel() for p in tables),
        "gradients": 4 * sum(p.numel() for p in tables if p.requires_grad),
        "optimizer": optimizer_bytes(model, config, only_tables=True),
    }
    return {name: whole[name] + (size - whole[name]) / shards for name, size in bytes_by_part.items()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"state": {parameter name: {moment: tensor}}, "param_groups": [{"names": [...], "lr": ...}]}. Keyed by name, so
    it does not depend on the order of the parameters and can be read without the model."""
    groups = optimizer.param_groups
    named = [item for group in groups for item in zip(group["names"], group["params"], strict=True)]
    state = {name: dict(optimizer.state[p]) for name, p in named if p in optimizer.state}
    return {"state": state, "param_groups": [{k: v for k, v in g.items() if k != "params"} for g in groups]}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any], kind: Any = None) -> None:
    """Restores the state from optimizer_state(); the hyperparameters of the present run remain. kind: the
    --optimizer_type that saved it, if known. Raises UserError if a parameter's state is missing, or has another shape
    or optimizer than declared."""
    rules, state = _saved_rules(saved), dict[Tensor, dict[str, Any]]()
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            entry = saved["state"].get(name)
            if saved["state"] and entry is None:
                raise UserError(f"the saved optimizer state lacks {name}: it belongs to another model")
            if not entry:
                continue
            slots: Slots = {}
            if isinstance(optimizer, Optimizer):
                slots = optimizer.slots(group, p)
                _check_entry(entry, slots, group["rule"], name, rules, str(kind))
            state[p] = dict(sorted(entry.items()))  # in one order on all processes, which gather them one by one
            for key, value in entry.items():
                if key == "step":  # fused kernels read it on the device
                    device = p.device if group.get("fused") else "cpu"
                    state[p][key] = torch.as_tensor(value, dtype=torch.float32, device=device)
                elif isinstance(value, Tensor):
                    state[p][key] = shard_of(p, value.to(slots[key][1] if key in slots else p.dtype))
    optimizer.state.clear()
    optimizer.state.update(state)


def _check_entry(entry: dict[str, Any], slots: Slots, rule: str, name: str, rules: dict[str, str], kind: str) -> None:
    """Raises UserError unless a parameter's saved state is what its rule declares."""
    found = {key for key, value in entry.items() if key in slots or (isinstance(value, Tensor) and value.dim())}
    if rules[name] != rule or found != set(slots):
        known = kind if kind in OPTIMIZERS else next((each for each in rules.values() if "muon" in each), "adamw")
        raise UserError(
            f"the saved optimizer state of {name} is {rules[name]}'s, not {rule}'s: resume with "
            f"--optimizer_type={known}, or start a new run from the weights (--init_from=FOLDER, another --out_dir)"
        )
    for key, (shape, _) in slots.items():
        if tuple(entry[key].shape) != shape:
            raise UserError(f"the saved {key} of {name} has shape {tuple(entry[key].shape)}, not {shape}")


def _saved_rules(saved: dict[str, Any]) -> dict[str, str]:
    """{parameter name: the rule that stepped it}; checkpoints that do not name it are known by their slots."""
    rules = {name: str(group["rule"]) for group in saved["param_groups"] if "rule" in group for name in group["names"]}
    older = {"exp_avg": "adamw", "momentum_buffer": "muon", "sum": SPARSE}
    for name, entry in saved["state"].items():
        rules.setdefault(name, next((rule for slot, rule in older.items() if slot in entry), "unknown"))
    return rules
