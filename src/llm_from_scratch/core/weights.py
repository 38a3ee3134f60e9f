"""A model's weights in files: configuration and state dict, checked against GPT(config); safetensors, written."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import settings
from ..config import GPTConfig
from ..errors import DamagedError, UserError
from .model import GPT
from .sizes import NoInit, meta_model, meta_tensors, tied_names

# What torch's types are called in a safetensors file
STORED = {"torch.bfloat16": "BF16", "torch.uint8": "U8", "torch.bool": "BOOL"}
STORED |= {f"torch.float{bits}": f"F{bits}" for bits in (16, 32, 64)}
STORED |= {f"torch.int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
FREE_LAYERS = 64  # that a file may claim with fewer tensors than layers: blocks may share their parameters


def checked_model_config(raw: dict[str, Any], where: str) -> GPTConfig:
    """A GPTConfig from plain data that is not trusted. Raises UserError for unknown names, wrong types, bad values."""
    hints = typing.get_type_hints(GPTConfig)
    if unknown := sorted(str(key)[:40] for key in raw if key not in hints):
        raise UserError(f"{where} describes a model with unknown settings: {', '.join(unknown[:5])}")
    for key, value in raw.items():
        if not fits(value, hints[key]) or (type(value) is int and abs(value) >= 1 << 31):
            raise UserError(f"{where} describes a model with {key}={str(value)[:80]!r}, not a valid value for {key}")
    config = GPTConfig(**raw)
    try:
        config.validate()
        if config.vocab_size is None:
            raise UserError("vocab_size is not set")
    except UserError as error:
        raise UserError(f"{where} describes a model that cannot be built: {error}") from None
    return config


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of plain data has a setting's type. Numbers are finite, and whole ones have 64 bits."""
    limit = {int: 1 << 63, float: math.inf}.get(type(value))
    return settings.fits(value, hint) and (limit is None or abs(value) < limit)


def expected_tensors(config: GPTConfig, held: int, where: str) -> dict[str, Tensor]:
    """meta_tensors(config) for a file with `held` tensors; this number limits the size of the model. Raises
    DamagedError."""
    if config.n_layer > max(held, FREE_LAYERS):
        raise DamagedError(f"{where} has n_layer={config.n_layer} but only {held} tensors")
    try:
        return meta_tensors(config)
    except UserError as error:
        raise DamagedError(f"{where}: {error}") from None


def checked_weights(
    model: dict[str, Tensor], config: GPTConfig, where: str, numbers: bool = True
) -> dict[str, Tensor]:  # fmt: skip
    """The state dict under its plain names, with every name of a tied tensor. Raises DamagedError if names, shapes or
    types differ from GPT(config)'s, or (numbers) a number is not finite."""
    state = plain_names(model)
    if len(state) != len(model):
        raise DamagedError(f"{where} contains a tensor twice")
    expected, tied = expected_tensors(config, len(state), where), tied_names(config)
    for name, first in tied.items():
        if name in state:
            state.setdefault(first, state[name])
    for name, first in tied.items():
        if first in state:
            state.setdefault(name, state[first])
    for name in [*expected, *state]:
        if name not in state:
            raise DamagedError(f"{where} lacks tensor {name[:80]}, which the model in core/model.py has")
        if name not in expected:
            raise DamagedError(
                f"{where} has an unexpected tensor {name[:80]}, which the model in core/model.py does not have"
            )
    for name, tensor in state.items():
        want = expected[name]
        same_type = tensor.is_floating_point() if want.is_floating_point() else tensor.dtype == want.dtype
        if tensor.shape != want.shape or not same_type:
            kind = "floats" if want.is_floating_point() else str(want.dtype)
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise DamagedError(f"{where}: {name} is {found}, expected {kind} of shape {tuple(want.shape)}")
    for name, first in tied.items():
        if state[name].data_ptr() != state[first].data_ptr() and not bool((state[name] == state[first]).all()):
            raise DamagedError(f"{where}: {name} and {first} differ, but the model ties them")
        state[name] = state[first]
    if numbers and (bad := not_finite(state, buffers(config))):
        raise DamagedError(f"{where}: {bad} contains values that are not finite")
    return state


def buffers(config: GPTConfig) -> set[str]:
    """Names of the state dict that are not parameters."""
    return {name for name, _ in meta_model(config).named_buffers(remove_duplicate=False)}


def not_finite(tensors: Mapping[str, Tensor], buffers: Collection[str] = ()) -> str | None:
    """The name of a tensor with a NaN or an infinity, or None. A buffer may hold infinities: masks do."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = (bound.item() for bound in torch.aminmax(tensor.detach()))  # a NaN passes through both
            if math.isnan(low) or (name not in buffers and not (math.isfinite(low) and math.isfinite(high))):
                return name
    return None


def plain_names(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that torch.compile puts into names."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in model.items()}


def build_model(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """A model that uses these tensors as its own. Raises UserError if they do not fit."""
    with NoInit():
        model = GPT(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the model: {error}") from None
    tensors = model.state_dict(keep_vars=True)
    for name, first in tied_names(config).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, tensors[first])
    return model


def file_of(tensors: dict[str, Tensor], **metadata: str) -> Iterator[Any]:
    """A safetensors file of dense tensors on the CPU, in chunks. safetensors' own writer needs twice the memory.

    The format (github.com/huggingface/safetensors): the header's length, 8 bytes, little-endian; the header, JSON
    padded with blanks to a multiple of 8; the tensors' bytes, wide numbers first, so that each is aligned.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    names, end = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)), 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": STORED[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def cropped(state: dict[str, Tensor], config: GPTConfig, block_size: int) -> dict[str, Tensor]:
    """The state dict of a model with a shorter context."""
    if block_size >= config.block_size:  # longer: only with rotary embeddings, which have no table
        return state
    model = build_model(config, state)
    model.crop_block_size(block_size)
    return model.state_dict()
