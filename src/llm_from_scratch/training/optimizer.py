"""The optimizer over parameter groups that are complete by construction, and its state keyed by parameter names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from ..config import OptimizerConfig
from ..errors import UserError
from .adagrad import NGRAMS
from .adamw import AdamW


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: tensors of two or more dimensions (products, embeddings) decay; biases and gains do not.

    The order within and of the groups is nanoGPT's, by which its optimizer states are stored.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name != NGRAMS]
    decay = [(name, p) for name, p in named if p.dim() >= 2]
    rest = [(name, p) for name, p in named if p.dim() < 2]
    # a parameter that no group holds would silently never train
    assert len(decay) + len(rest) == len(named) == len({id(p) for _, p in named})
    return [
        {"params": [p for _, p in decay], "names": [n for n, _ in decay], "weight_decay": weight_decay},
        {"params": [p for _, p in rest], "names": [n for n, _ in rest], "weight_decay": 0.0},
    ]


def ngram_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The table of n-gram embeddings, where there is one: a group whose gradients are sparse, for row-wise Adagrad."""
    tables = [p for name, p in model.named_parameters() if name == NGRAMS and p.requires_grad]
    group = {"params": tables, "names": [NGRAMS], "weight_decay": 0.0, "lr": config.ngram_learning_rate}
    return [group | {"lr_scale": 0.0}] if tables else []  # Adagrad's rates fall by themselves


def make_adamw(
    model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float], fused: bool = False
) -> torch.optim.AdamW:
    """torch's AdamW (arXiv 1711.05101). fused: one kernel for the whole update. Raises UserError for n-grams."""
    if any(name == NGRAMS for name, _ in model.named_parameters()):
        raise UserError("AdamW cannot step the sparse gradients of max_ngram: take training.optimizer.make_optimizer")
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
    kind, groups = AdamW, parameter_groups(model, config.weight_decay)
    if config.optimizer_type == "muon":
        from .muon import Muon, muon_groups

        kind, groups = Muon, muon_groups(model, config)
    groups = [{"lr_scale": 1.0, **group} for group in groups + ngram_groups(model, config)]
    betas, dtype = (config.beta1, config.beta2), getattr(torch, config.optimizer_dtype)
    return kind(groups, config.learning_rate, betas, can_fuse and config.fused != "off", dtype, seed)


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Each group's learning rate, its lr_scale times that of the schedule; one whose lr_scale is 0 keeps its own."""
    for group in optimizer.param_groups:
        if scale := group.get("lr_scale", 1.0):
            group["lr"] = lr * scale


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
                shape = (p.size(0), 1) if key == "sum" else p.shape  # Adagrad's has one number a row
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != shape:
                    raise UserError(f"the saved {key} of {name} has shape {tuple(value.shape)}, not {tuple(p.shape)}")
            ids[name] = index
    # load_state_dict moves each tensor to its parameter's device and keeps the step counters where torch wants them
    current["state"] = {ids[name]: entry for name, entry in saved["state"].items() if name in ids}
    optimizer.load_state_dict(current)
