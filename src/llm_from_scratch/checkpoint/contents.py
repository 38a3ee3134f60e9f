"""What a checkpoint's contents must look like, checked before anything is built from them; and how they are stored."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..config import GPTConfig
from ..errors import DamagedError, UserError

if TYPE_CHECKING:
    from torch import Tensor

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
# What torch's types are called in a safetensors file
STORED = {"torch.bfloat16": "BF16", "torch.uint8": "U8", "torch.bool": "BOOL"}
STORED |= {f"torch.float{bits}": f"F{bits}" for bits in (16, 32, 64)}
STORED |= {f"torch.int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}


def checked_model_config(raw: dict[str, Any], where: str) -> GPTConfig:
    """A GPTConfig from plain data that is not trusted. Raises UserError for unknown names, wrong types, bad values."""
    hints = typing.get_type_hints(GPTConfig)
    if unknown := sorted(str(key)[:40] for key in raw if key not in hints):
        raise UserError(f"{where} describes a model with unknown settings: {', '.join(unknown[:5])}")
    for key, value in raw.items():
        if not fits(value, hints[key]) or (type(value) is int and abs(value) >= 1 << 31):
            raise UserError(f"{where} describes a model with {key}={str(value)[:80]!r}, which is no value for {key}")
    config = GPTConfig(**raw)
    try:
        config.validate()
        if config.vocab_size is None:
            raise UserError("vocab_size is not set")
    except UserError as error:
        raise UserError(f"{where} describes a model that cannot be built: {error}") from None
    return config


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of plain data is one that a setting of this type may have."""
    options = typing.get_args(hint) or (hint,)
    if isinstance(value, str):
        return str in options or value in options or any(value in typing.get_args(option) for option in options)
    if type(value) is int:
        return (int in options or float in options) and abs(value) < 1 << 63
    return type(value) in options and not (isinstance(value, float) and not math.isfinite(value))


def checked_weights(model: dict[str, Tensor], config: GPTConfig, where: str) -> dict[str, Tensor]:
    """The state dict under its plain names, with both names of a tied head. Raises DamagedError where names, shapes or
    types are not those of a model of this configuration, or a number is not finite."""
    state = plain_names(model)
    if len(state) != len(model):
        raise DamagedError(f"{where} holds a tensor twice")
    if config.tie_embeddings:
        for name, twin in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
            if name not in state and twin in state:
                state[name] = state[twin]
    expected = parameter_shapes(config, at_most=len(state), where=where)
    if config.tie_embeddings:
        expected[HEAD] = expected[EMBEDDING]
    for name in [*expected, *state]:
        if name not in expected or name not in state:
            what = "lacks" if name in expected else "holds the unknown"
            raise DamagedError(f"{where} {what} tensor {name[:80]} for the model that it describes")
    for name, tensor in state.items():
        if tuple(tensor.shape) != expected[name] or not tensor.is_floating_point():
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise DamagedError(f"{where}: {name} is {found}, expected floats of shape {expected[name]}")
    if config.tie_embeddings and state[HEAD].data_ptr() != state[EMBEDDING].data_ptr():
        if not bool((state[HEAD] == state[EMBEDDING]).all()):
            raise DamagedError(f"{where}: {HEAD} and {EMBEDDING} differ, but the model ties them")
        state[HEAD] = state[EMBEDDING]
    if bad := not_finite(state):
        raise DamagedError(f"{where}: {bad} holds numbers that are not finite")
    return state


def parameter_shapes(
    config: GPTConfig, at_most: int | None = None, where: str = "the model"
) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a model's parameters, in the order of its named_parameters(); a tied head has none of its own.

    Written out: it allocates nothing, and needs no torch. at_most bounds n_layer by the number of tensors that a file
    holds. Raises DamagedError.
    """
    if at_most is not None and config.n_layer > at_most:
        raise DamagedError(f"{where} claims n_layer={config.n_layer} and holds {at_most} tensors")
    C, V = config.n_embd, int(config.vocab_size or 0)
    D, H = C // config.n_head, config.mlp_width
    qkv = (config.n_head + 2 * (config.n_kv_head or config.n_head)) * D
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, C)}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if config.bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (C,)
        if config.bias and config.norm == "layernorm":
            shapes[f"{name}.bias"] = (C,)

    if config.pos_embedding == "learned":
        shapes["transformer.wpe.weight"] = (config.block_size, C)
    if config.max_ngram:
        shapes["transformer.ngrams.weight"] = ((config.max_ngram - 1) * config.ngram_rows, C)
    if config.embedding_norm:
        norm("transformer.norm_e")
    for layer in (f"transformer.h.{i}" for i in range(config.n_layer)):
        norm(f"{layer}.ln_1")
        linear(f"{layer}.attn.c_attn", qkv, C)
        linear(f"{layer}.attn.c_proj", C, C)
        if config.qk_norm:
            shapes[f"{layer}.attn.q_norm.weight"] = shapes[f"{layer}.attn.k_norm.weight"] = (D,)
        norm(f"{layer}.ln_2")
        linear(f"{layer}.mlp.c_fc", H, C)
        linear(f"{layer}.mlp.c_proj", C, H)
        if config.activation == "swiglu":
            linear(f"{layer}.mlp.c_gate", H, C)
    norm("transformer.ln_f")
    if not config.tie_embeddings:
        shapes[HEAD] = (V, C)
    return shapes


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor with a NaN or an infinity, or None."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())  # a NaN passes through both, and no copy is made
            if not (math.isfinite(low) and math.isfinite(high)):
                return name
    return None


def plain_names(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that torch.compile puts into names."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in model.items()}


def weights_to_save(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict on the CPU; a head that is tied to the embedding is left out."""
    state = plain_names(model)
    if HEAD in state and EMBEDDING in state and state[HEAD].data_ptr() == state[EMBEDDING].data_ptr():
        del state[HEAD]
    return portable(state)


def portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file takes them: dense, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def file_of(tensors: dict[str, Tensor]) -> Iterator[Any]:
    """A safetensors file of dense tensors on the CPU, piece after piece; safetensors' own writer holds all twice.

    The format (github.com/huggingface/safetensors): the header's length, 8 bytes, little end first; the header, JSON
    with what each tensor is and where, filled up with blanks to a multiple of 8; the tensors' bytes. Those of wide
    numbers come first, so that each begins at a multiple of its size.
    """
    import torch

    header: dict[str, Any] = {}
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


def split_optimizer(optimizer: dict[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state (see Checkpoint) as tensors named "<parameter>/<slot>", and the rest as plain data."""
    if optimizer is None:
        return {}, {}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, slots in optimizer["state"].items():
        numbers[name] = {}
        for slot, value in slots.items():
            if not hasattr(value, "detach"):
                numbers[name][slot] = value
            else:  # step counters may share a storage, which safetensors refuses
                tensors[f"{name}/{slot}"] = value.detach().clone() if value.dim() == 0 else value
    groups = [{k: v.item() if hasattr(v, "item") else v for k, v in g.items()} for g in optimizer["param_groups"]]
    return portable(tensors), {"state": numbers, "param_groups": groups}


def join_optimizer(
    tensors: dict[str, Tensor], plain: dict[str, Any], model: dict[str, Tensor], where: str
) -> dict[str, Any] | None:
    """What split_optimizer took apart. Raises DamagedError where it does not fit the model."""
    if not plain and not tensors:
        return None
    try:
        state = {name: dict(slots) for name, slots in plain["state"].items()}
        for key, tensor in tensors.items():
            name, _, slot = key.rpartition("/")
            shape = (model[name].size(0), 1) if slot == "sum" else model[name].shape  # Adagrad's: one number a row
            if tensor.dim() and tensor.shape != shape:
                raise DamagedError(f"{where}: {key} of the optimizer has shape {tuple(tensor.shape)}")
            state[name][slot] = tensor
        groups = [
            {k: tuple(v) if isinstance(v, list) and k != "names" else v for k, v in group.items()}
            for group in plain["param_groups"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedError(f"{where}: the optimizer's state does not fit the model ({error!r})") from None
    if bad := not_finite(tensors):
        raise DamagedError(f"{where}: {bad} of the optimizer holds numbers that are not finite")
    return {"state": state, "param_groups": groups}
