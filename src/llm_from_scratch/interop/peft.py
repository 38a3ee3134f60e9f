"""Adapters (LoRA) in the format of peft, read and written without it: adapter_config.json and
adapter_model.safetensors.

peft adapts its model's matrices one by one; ours may be stacked. Reading keeps what B A adds to each matrix, with the
adapter's scale in B. A module's settings that change the arithmetic in another way are refused by name.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import GPTConfig
from ..core.adapters import blocks, checked_adapter, linear_layers, merged, stacked
from ..core.sizes import meta_model
from ..core.tokenizer import Tokenizer
from ..core.weights import file_of
from ..errors import UserError, one_line
from ..machine.files import read_json, to_json
from . import GPT2_NAMES, is_hub_id
from .hf import family_of, sample_logits
from .hf_files import cached_folder, damage_is_a_user_error, new_folder, open_tensors
from .hf_tokenizer import write_tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_PATH = 4096  # characters
# Their settings that change the arithmetic: what this program computes, too
COMPUTED: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none",), "use_dora": (None, False)}
COMPUTED |= {name: (None, False, [], {}) for name in ("modules_to_save", "layer_replication", "target_parameters")}
COMPUTED |= {name: (None, False, {}) for name in ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config")}
COMPUTED |= {name: (None, False, []) for name in ("alora_invocation_tokens", "trainable_token_indices")}
# the others move the base's weights at the start of training
COMPUTED |= {"init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva")}


def base_of(folder: Path) -> str:
    """The model that an adapter was trained on: a path, or the folder in Hugging Face's cache, from which it is never
    downloaded because a file names it. Raises UserError."""
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_PATH:
        raise UserError(f"{folder / CONFIG} does not name its model (base_model_name_or_path)")
    if os.path.lexists(name):
        return name
    is_name = name in GPT2_NAMES or is_hub_id(name)
    if is_name and (found := cached_folder(name)) is not None:
        return str(found)
    way = f"download it (hf download {name})" if is_name else "restore it"
    raise UserError(
        f"{folder} is an adapter of {name}, which is not on this machine: {way}, or change base_model_name_or_path in "
        f"{CONFIG}"
    )


def read_peft(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """{name: A or B}, as in core/adapters.py with a scale of 1, of an adapter of a model with this configuration.
    Raises UserError if it adapts anything else, or in another way."""
    theirs = read_json(folder / CONFIG)
    for name, accepted in COMPUTED.items():
        if name in theirs and theirs[name] not in accepted:
            raise UserError(f"{folder / CONFIG}: {name}={one_line(theirs[name])} is not supported")
    with damage_is_a_user_error(folder / WEIGHTS):
        tensors = {name: read().float() for name, read in open_tensors(folder / WEIGHTS).items()}
    names, layers = family_of(config).names(config), linear_layers(meta_model(config))
    adapter: dict[str, Tensor] = {}
    for key, layer in layers.items():
        modules, pairs = [name.removesuffix(".weight") for name in names[f"{key}.weight"]], []
        heights = stacked(layer) if len(modules) > 1 else (layer.out_features,)
        for module, height in zip(modules, heights, strict=True):
            a, b = (tensors.pop(f"{PREFIX}{module}.lora_{part}.weight", None) for part in "AB")
            if a is None and b is None:  # not adapted; another one of the stacked matrices may be
                pairs.append((torch.zeros(0, layer.in_features), torch.zeros(height, 0)))
                continue
            shapes = [() if t is None else tuple(t.shape) for t in (a, b)]
            own = shapes[0][0] if shapes[0] else 0
            if a is None or b is None or not own or shapes != [(own, layer.in_features), (height, own)]:
                raise UserError(f"{folder}: lora_A and lora_B of {module} do not fit the model: their shapes are "
                                f"{shapes[0]} and {shapes[1]}")  # fmt: skip
            pairs.append((a, b * _scale(theirs, module, own, folder)))
        if not (rank := max(len(a) for a, _ in pairs)):
            continue
        if len(modules) < len(stacked(layer)):  # theirs is stacked, too, with one A for all
            pairs = [(pairs[0][0], part) for part in pairs[0][1].split(stacked(layer))]
        pad = torch.nn.functional.pad
        adapter[f"{key}.lora_A"] = torch.cat([pad(a, (0, 0, 0, rank - len(a))) for a, _ in pairs])
        adapter[f"{key}.lora_B"] = torch.cat([pad(b, (0, rank - b.size(1))) for _, b in pairs])
    if tensors:
        raise UserError(f"{folder}: {min(tensors)[:100]} is not supported: expected adapters of linear layers of the "
                        "blocks")  # fmt: skip
    return checked_adapter(adapter, config, None, str(folder))


def _scale(theirs: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    """By what the product of a module's adapter is multiplied."""
    alpha, patterns = theirs.get("lora_alpha", 8), theirs.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", key) for key in patterns):
        raise UserError(f"{folder / CONFIG}: alpha_pattern={one_line(patterns)} is not supported: expected names")
    alpha = next((value for key, value in patterns.items() if f".{module}".endswith(f".{key}")), alpha)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise UserError(f"{folder / CONFIG}: lora_alpha={one_line(alpha)} is not a number")
    return alpha / (math.sqrt(rank) if theirs.get("use_rslora") else rank)


def export_peft(
    config: GPTConfig, weights: dict[str, Tensor], adapter: dict[str, Tensor], rank: int, scale: float, base: str,
    tokenizer: Tokenizer | None, folder: Path,
) -> None:  # fmt: skip
    """Writes a folder for peft's PeftModel.from_pretrained. weights: of the base; base: its name or path. The folder
    is new or empty, and appears after it was read back and the merged model's logits were the same. Raises
    UserError for a model that transformers does not support."""
    family, layers = family_of(config), linear_layers(meta_model(config))
    names, tensors, ranks = family.names(config), dict[str, Tensor](), dict[str, int]()
    for key in dict.fromkeys(name.rpartition(".")[0] for name in adapter):
        a, b = adapter[f"{key}.lora_A"], adapter[f"{key}.lora_B"]
        heights, modules = stacked(layers[key]), [name.removesuffix(".weight") for name in names[f"{key}.weight"]]
        pairs = list(zip(a.split(rank), b.split(heights), strict=True))
        if len(modules) == 1:
            pairs = [(a, blocks(b, heights))]
        for module, (down, up) in zip(modules, pairs, strict=True):
            ranks[module] = len(down)
            tensors |= {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
    larger = {module.rpartition(".")[2]: one for module, one in ranks.items() if one != rank}
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": scale * rank, "rank_pattern": larger, "lora_dropout": 0.0, "bias": "none",
        "alpha_pattern": {module: scale * one for module, one in larger.items()}, "init_lora_weights": True,
        "target_modules": list(ranks), "fan_in_fan_out": family.gpt2,
    }  # fmt: skip
    with new_folder(folder) as made:
        (made / CONFIG).write_bytes(to_json(described))
        with open(made / WEIGHTS, "wb") as file:
            file.writelines(file_of({name: t.contiguous() for name, t in tensors.items()}, format="pt"))
        if tokenizer is not None:
            write_tokenizer(tokenizer, made, config.block_size)
        expected = sample_logits(config, merged(config, weights, adapter, scale))[1]
        found = sample_logits(config, merged(config, weights, read_peft(made, config), 1.0))[1]
        apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not apart <= 1e-5:
            raise UserError(f"the export is wrong: its logits differ from ours by up to {apart:.1e} of the largest")
    print(f"wrote {folder}: an adapter of {base} for peft; read back, its logits differ by up to {apart:.0e} of the "
          "largest")  # fmt: skip
