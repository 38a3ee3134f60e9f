"""The optimizer: parameter groups that are complete by construction, clipping and the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..config import OptimizerConfig
from ..errors import UserError
from .adagrad import RowAdagrad
from .adamw import AdamW
from .muon import Muon
from .mup import scale_by_width
from .normuon import NorMuon
from .rule import Dither, Rule
from .sharding import local, total_norm

OPTIMIZERS: dict[str, type[Rule]] = {"adamw": AdamW, "muon": Muon, "normuon": NorMuon}  # --optimizer_type
SPARSE = "adagrad"  # the rule for tables whose gradients are sparse


def _rule(name: str) -> type[Rule]:
    return RowAdagrad if name == SPARSE else OPTIMIZERS[name]


def _plain(name: str) -> Any:
    """A method of torch's optimizer without the wrapper for torch.compile, which imports the compiler (a second)."""
    method = getattr(torch.optim.Optimizer, name)
    return getattr(method, "__wrapped__", method)


class Optimizer(torch.optim.Optimizer):
    """Several rules in one optimizer: each parameter group has its "names" and the "rule" that steps it. A 0-dim tensor
    `found_inf`, set as torch.amp.GradScaler sets it, skips the step on the device if it is 1."""

    found_inf: Tensor | None = None
    add_param_group, zero_grad = _plain("add_param_group"), _plain("zero_grad")

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], fused: bool,
        dtype: torch.dtype = torch.float32, seed: int = 0, processes: int = 1,
    ):  # fmt: skip
        """dtype: of the moments; fused: one kernel for many tensors, for rules that have one; processes: see Rule."""
        dither, names = Dither(seed), {group["rule"] for group in groups}
        self.rules = {name: _rule(name)(dtype, dither, processes) for name in sorted(names)}
        self.skips_on_device = fused and all(rule.skips_on_device for rule in self.rules.values())
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "fused": fused})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.rules[group["rule"]].step(group, self.state, self.found_inf)

    @torch.no_grad()
    def begin_epoch(self) -> None:
        """Called before the first step of each further pass over the training tokens."""
        for group in self.param_groups:
            self.rules[group["rule"]].begin_epoch(group, self.state)

    def slots(self, group: dict[str, Any], p: Tensor) -> Any:
        """Name, shape and dtype of the tensors that are kept for a parameter (see Rule.slots)."""
        return self.rules[group["rule"]].slots(p)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: tensors of two or more dimensions (products, embeddings) decay; biases and gains do not. The order
    within and of the groups is nanoGPT's, by which its optimizer states are stored."""
    sparse = {id(p) for module in sparse_tables(model) for p in module.parameters(recurse=False)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in sparse]
    decay = [(name, p) for name, p in named if p.dim() >= 2]
    rest = [(name, p) for name, p in named if p.dim() < 2]
    # a parameter that no group holds would silently never train
    assert len(decay) + len(rest) == len(named) == len({id(p) for _, p in named})
    return [
        {"params": [p for _, p in decay], "names": [n for n, _ in decay], "weight_decay": weight_decay},
        {"params": [p for _, p in rest], "names": [n for n, _ in rest], "weight_decay": 0.0},
    ]


def sparse_tables(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with sparse gradients. They have the attribute `sparse`, as nn.Embedding does."""
    return (module for module in model.modules() if getattr(module, "sparse", False))


def sparse_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """A group for each table with sparse gradients."""
    names, groups = {p: name for name, p in model.named_parameters()}, []
    for module in sparse_tables(model):
        table = [p for p in module.parameters(recurse=False) if p.requires_grad]
        forget = getattr(module, "forget_from", None) if config.forget_ngrams else None
        group = {"params": table, "names": [names[p] for p in table], "weight_decay": 0.0, "rule": SPARSE}
        group |= {"lr": config.ngram_learning_rate, "lr_scale": 0.0, "forget_from": forget}  # Adagrad's rates fall
        groups += [group] if table else []
    return groups


def make_adamw(
    model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float], fused: bool = False
) -> torch.optim.AdamW:
    """torch's AdamW (arXiv 1711.05101). fused: one kernel for the whole update. Raises UserError for n-grams."""
    if any(True for _ in sparse_tables(model)):
        raise UserError("AdamW cannot step the sparse gradients of max_ngram: use training.optimizer.make_optimizer")
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, device: torch.device, seed: int = 0, processes: int = 1
) -> Optimizer:
    """The optimizer that the settings choose. seed: of the stochastic rounding to bfloat16; processes: see Rule. Raises
    UserError if fused is set and not available, or if the settings do not fit the model."""
    can_fuse = device.type in ("cuda", "cpu") and all(p.is_floating_point() for p in model.parameters())
    if config.fused == "on" and not can_fuse:
        raise UserError(f"--fused=on: torch does not have a fused AdamW for {device.type}; leave it at auto")
    default = [{"rule": config.optimizer_type, **g} for g in parameter_groups(model, config.weight_decay)]
    groups = _rule(config.optimizer_type).groups(model, config, default) + sparse_groups(model, config)
    groups = scale_by_width(model, config, [{"lr_scale": 1.0, **group} for group in groups])
    betas, dtype = (config.beta1, config.beta2), getattr(torch, config.optimizer_dtype)
    return Optimizer(groups, config.learning_rate, betas, can_fuse and config.fused != "off", dtype, seed, processes)


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets each group's learning rate to lr_scale * lr. A group with lr_scale 0 keeps its own."""
    for group in optimizer.param_groups:
        if scale := group.get("lr_scale", 1.0):
            group["lr"] = lr * scale


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scales the gradients down to this global norm; 0 leaves them as they are. Returns the norm before. Sparse
    gradients do not count: the size of a step does not depend on theirs."""
    parameters = [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
    with torch.profiler.record_function("clipping"):  # a name that llm-bench --profile reads
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        # scaling by 1 would be a pass over all gradients; a GPU would wait for this comparison
        if limit and not (norm.device.type == "cpu" and norm + 1e-6 <= limit):
            torch._foreach_mul_([local(p.grad) for p in parameters], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step() unless skip (a 0-dim bool tensor) is true; then weights and moments do not change by a bit. On a
    GPU, kernels read the flag themselves, so the host does not wait (as with torch.amp.GradScaler)."""
    on_device = getattr(optimizer, "skips_on_device", optimizer.defaults.get("fused"))
    if skip.device.type == "cuda" and on_device:
        flagged: Any = optimizer
        flagged.grad_scale, flagged.found_inf = None, skip.float()
        optimizer.step()
        del flagged.grad_scale, flagged.found_inf
    elif not skip:
        optimizer.step()
