"""The optimizer over parameter groups that are complete by construction, and its state keyed by parameter names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from ..config import OptimizerConfig, UserError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: tensors of two or more dimensions (products, embeddings) decay; biases and gains do not.

    lr_scale: a group's learning rate over the setting, at every step of the schedule.
    The order within and of the groups is nanoGPT's, by which its optimizer states are stored.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [(name, p) for name, p in named if p.dim() >= 2]
    rest = [(name, p) for name, p in named if p.dim() < 2]
    # a parameter that no group holds would silently never train
    assert len(decay) + len(rest) == len(named) == len({id(p) for _, p in named})
    return [
        {
            "params": [p for _, p in decay],
            "names": [n for n, _ in decay],
            "lr_scale": 1.0,
            "weight_decay": weight_decay,
        },
        {"params": [p for _, p in rest], "names": [n for n, _ in rest], "lr_scale": 1.0, "weight_decay": 0.0},
    ]


def make_adamw(
    model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float], fused: bool = False
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101). fused: one kernel for the whole update."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, device: torch.device, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for; seed: of the rounding of a state in bfloat16.

    Raises UserError where fused is asked for and cannot be had, or the settings do not fit the model.
    """
    can_fuse = device.type in ("cuda", "cpu") and all(p.is_floating_point() for p in model.parameters())
    if config.fused == "on" and not can_fuse:
        raise UserError(f"--fused=on: torch has no fused AdamW for {device.type}; leave it at auto")
    fused = can_fuse and config.fused != "off"
    if config.optimizer_type == "muon" or config.optimizer_dtype != "float32":
        from .muon import make_muon_or_adamw

        return make_muon_or_adamw(model, config, fused, seed)
    betas = (config.beta1, config.beta2)
    return make_adamw(model, config.weight_decay, config.learning_rate, betas, fused=fused)


def step_unless(skip: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step() where skip (a 0-dim bool tensor) is false; else weights and moments stay as they are to the bit.

    On a GPU, fused kernels look at the flag themselves, so that nothing waits for it (as torch.amp.GradScaler does).
    """
    if skip.device.type == "cuda" and optimizer.defaults.get("fused"):
        vars(optimizer).update(grad_scale=None, found_inf=skip.float())
        optimizer.step()
        del vars(optimizer)["grad_scale"], vars(optimizer)["found_inf"]
    elif not skip:
        optimizer.step()


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"state": {parameter name: {moment: tensor}}, "param_groups": [{"names": [...], "lr": ...}]}.

    Keyed by name, so that it survives a change in the order of parameters and can be read without the model.
    """
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            if p in optimizer.state:
                state[name] = dict(optimizer.state[p])
        groups.append({k: v for k, v in group.items() if k != "params"})
    return {"state": state, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restores what optimizer_state() gave; the hyperparameters stay those of the present run.

    Raises UserError where a parameter's state is missing or of another shape.
    """
    ids: dict[str, int] = {}
    current = optimizer.state_dict()
    for group, packed in zip(optimizer.param_groups, current["param_groups"], strict=True):
        for name, p, index in zip(group["names"], group["params"], packed["params"], strict=True):
            entry = saved["state"].get(name)
            if saved["state"] and entry is None:
                raise UserError(f"the saved optimizer state lacks {name}: it belongs to another model")
            if entry and ("momentum_buffer" in entry) != ("momentum" in group):
                other = "muon" if "momentum_buffer" in entry else "adamw"
                raise UserError(
                    f"the saved optimizer state of {name} is not of this optimizer_type: go on with --optimizer_type="
                    f"{other}, or start a new run from the weights (--init_from=FOLDER, another --out_dir)"
                )
            for key, value in (entry or {}).items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != p.shape:
                    raise UserError(f"the saved {key} of {name} has shape {tuple(value.shape)}, not {tuple(p.shape)}")
            ids[name] = index
    # load_state_dict moves each tensor to its parameter's device and keeps the step counters where torch wants them
    current["state"] = {ids[name]: entry for name, entry in saved["state"].items() if name in ids}
    optimizer.load_state_dict(current)
