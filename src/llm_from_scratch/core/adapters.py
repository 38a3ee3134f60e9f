"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685) and frozen parameters: which, their tensors, merging.

An adapted layer computes W x + scale * B A x; W is frozen, and B is zero at first. Each matrix that is stacked in a
weight (queries, keys and values are three) has an A and a B of its own, as if it were a layer of its own.
Shapes: I inputs, O outputs, R rank, M stacked matrices.
"""

from __future__ import annotations

import copy
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, FinetuneConfig, GPTConfig
from ..errors import DamagedError, UserError
from .model import GPT
from .sizes import meta_model, tied_names

PARTS = ("lora_A", "lora_B")  # (M R, I) and (O, R)
MAX_SHOWN = 12  # names in an error


def matching(names: Iterable[str], patterns: Iterable[str], option: str) -> list[str]:
    """The names that a pattern matches. A pattern is one or more whole parts of a dotted name, with * and ? as in file
    names: c_attn, attn.*, h.0, h.[0-3].mlp. Raises UserError for a pattern without a match, with the names that exist.
    """
    known, found = list(names), set[str]()
    for pattern in (one.strip() for text in patterns for one in text.split(",")):
        matches = {name for name in known if fnmatchcase(f".{name}.", f"*.{pattern}.*")}
        if not pattern or not matches:
            shown = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in known))
            rest = f", and {len(shown) - MAX_SHOWN} more" if len(shown) > MAX_SHOWN else ""
            raise UserError(f"--{option}={pattern!r} matches nothing; names: {', '.join(shown[:MAX_SHOWN])}{rest}")
        found |= matches
    return [name for name in known if name in found]


def linear_layers(model: GPT) -> dict[str, Any]:
    """{name: linear layer of the blocks}, except layers that share their weight with another module."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    in_blocks = set(model.transformer.h.modules())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in in_blocks and owners[id(module.weight)] == 1
    }


def stacked(layer: Any) -> tuple[int, ...]:
    """Heights of the matrices that are stacked in a layer's weight."""
    return getattr(layer, "stacked", (layer.out_features,))


def scale_of(settings: FinetuneConfig) -> float:
    assert settings.lora_rank is not None
    return (2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha) / settings.lora_rank


def add_parameters(model: GPT, settings: FinetuneConfig, seed: int) -> list[str]:
    """Gives the target layers A, B, scale and dropout. Returns the layers' names. A is a function of (seed, layer's
    name), and draws from none of torch's generators. Raises UserError for a pattern without a match."""
    layers = linear_layers(model)
    chosen, rank = matching(layers, settings.lora_targets, "lora_targets"), settings.lora_rank or 0
    for name in chosen:
        layer, generator = layers[name], torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        device, bound = layer.weight.device, 1 / math.sqrt(layer.in_features)
        a = torch.empty(len(stacked(layer)) * rank, layer.in_features, device="meta" if device.type == "meta" else None)
        a = a if a.is_meta else a.uniform_(-bound, bound, generator=generator)
        layer.lora_A = nn.Parameter(a.to(device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        layer.lora_scale, layer.lora_dropout = scale_of(settings), nn.Dropout(settings.lora_dropout)
    return chosen


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """{name: A or B} of a model's adapted layers; empty without adapters."""
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in model.named_modules()
        if getattr(module, "lora_scale", None) is not None
        for part in PARTS
    }


def check_adapter(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Raises UserError if a saved adapter is of other layers than the model's, or has another rank."""
    if {name: t.shape for name, t in adapter_of(model).items()} != {name: t.shape for name, t in saved.items()}:
        raise UserError(
            "the saved adapter has other layers than --lora_targets: restore the original value, or start a new run "
            "from the saved adapter (--init_from=FOLDER, another --out_dir)"
        )


def unfreeze(model: GPT) -> None:
    """Undoes freeze()."""
    own = dict(meta_model(model.config).named_parameters())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in own or own[name].requires_grad)  # an edited model may have constants


def freeze(model: GPT, settings: FinetuneConfig) -> None:
    """Freezes what does not train: everything except adapters, or what --freeze names. Raises UserError if that is
    everything."""
    adapter = {id(p) for p in adapter_of(model).values()}
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied tensor has both names
    frozen = {id(named[name]) for name in matching(named, settings.freeze, "freeze")}
    for p in model.parameters():
        if id(p) in frozen or (adapter and id(p) not in adapter):
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("--freeze matches every parameter: nothing is left to train")


def trained_model(config: Config) -> GPT:
    """GPT(config.model) on the meta device with the adapters and the frozen parameters of its run. Do not change it."""
    model, settings = meta_model(config.model), config.finetune
    if settings.lora_rank is None and not settings.freeze:
        return model
    model = copy.deepcopy(model)
    if settings.lora_rank is not None:
        add_parameters(model, settings, config.system.seed)
    freeze(model, settings)
    return model


def change(a: Tensor, b: Tensor, heights: tuple[int, ...]) -> Tensor:
    """B A of a layer, (O, I), without its scale."""
    return blocks(b, heights) @ a


def blocks(b: Tensor, heights: tuple[int, ...]) -> Tensor:
    """B as one matrix for all stacked ones, (O, M R): its parts on the diagonal."""
    return torch.block_diag(*b.split(heights)) if len(heights) > 1 else b


@torch.no_grad()
def merged(
    config: GPTConfig, weights: dict[str, Tensor], adapter: dict[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The state dict of the model with its adapter. Tensors that the adapter does not touch are shared."""
    layers, result = linear_layers(meta_model(config)), dict(weights)
    for name in dict.fromkeys(key.rpartition(".")[0] for key in adapter):
        a, b = (adapter[f"{name}.{part}"].float() for part in PARTS)
        key = f"{name}.weight"
        # float32, or wider: in bfloat16 a small change would be rounded away
        result[key] = weights[key].to(torch.promote_types(weights[key].dtype, torch.float32), copy=True)
        result[key] += scale * change(a, b, stacked(layers[name]))
    return result | {name: result[first] for name, first in tied_names(config).items() if name in result}


def checked_adapter(adapter: dict[str, Tensor], config: GPTConfig, rank: int | None, where: str) -> dict[str, Tensor]:
    """An adapter from a file that is not trusted. rank: None if each layer has its own. Raises DamagedError unless its
    layers and shapes are the model's."""
    layers = linear_layers(meta_model(config))
    if not adapter:
        raise DamagedError(f"{where} does not contain tensors")
    for key, tensor in adapter.items():
        name, _, part = key.rpartition(".")
        other = f"{name}.{PARTS[1 - PARTS.index(part)]}" if part in PARTS else ""
        if name not in layers or other not in adapter:
            raise DamagedError(f"{where}: {key[:80]} does not belong to an adapter of the model in core/model.py")
        layer, own = layers[name], rank or adapter[f"{name}.lora_B"].size(-1)
        shapes = (len(stacked(layer)) * own, layer.in_features), (layer.out_features, own)
        expected = dict(zip(PARTS, shapes, strict=True))[part]
        if tuple(tensor.shape) != expected or not tensor.is_floating_point():
            raise DamagedError(f"{where}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {expected}")
        if not bool(torch.isfinite(tensor).all()):
            raise DamagedError(f"{where}: {key} contains values that are not finite")
    return adapter
