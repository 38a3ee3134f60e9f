"""GGUF, llama.cpp's format, for the model families of hf.py: its tables of modules, with gguf's names for the tensors.
Written with the package gguf. Source: llama.cpp's convert_hf_to_gguf.py, llama-context.cpp and llama-vocab.cpp."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import GPTConfig
from ..core.rope import SCALINGS, attention_factor, frequency_divisors, high_turns
from ..core.tokenizer import Tokenizer
from ..core.weights import checked_model_config, checked_weights, expected_tensors
from ..errors import UserError, one_line
from ..machine.extras import require
from ..machine.files import temporary_folder
from .gguf_file import GGUFFile
from .gguf_tokenizer import describe_tokenizer, read_tokenizer
from .hf import FAMILIES, Family, check_formulas, family_of, read_weights, sample_logits, written_weights
from .hf_tokenizer import probes

FAMILIES_THERE = {name: family for name, family in FAMILIES.items() if name != "mistral"}  # which is called llama
# Our setting: its key, after the name of the architecture
KEYS = {
    "block_size": "context_length", "n_layer": "block_count", "n_embd": "embedding_length",
    "mlp_hidden": "feed_forward_length", "n_head": "attention.head_count", "n_kv_head": "attention.head_count_kv",
    "norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base", "head_dim": "attention.key_length",
}  # fmt: skip
HEAD_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
# The same, for each scaling of RoPE. llama3 is a tensor with the divisor of each frequency.
SCALED = {
    "linear": {"rope_factor": "rope.scaling.factor"},
    "yarn": {"rope_factor": "rope.scaling.factor", "rope_original": "rope.scaling.original_context_length"},
}
DIVISORS, ATTENTION = "rope_freqs.weight", "rope.scaling.attn_factor"
LLAMA3 = {"rope_original": 8192, "rope_low": 1.0, "rope_high": 4.0}  # if the file does not have our own keys for them
OWN = "gptsmith."
GGUFType = Literal["f32", "f16", "q8_0"]
TOLERANCE = {"f32": 1e-5, "f16": 1e-2, "q8_0": 1e-1}  # of logits, read back


def load_gguf(path: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer]:
    """Settings, weights in float32 (dequantized one at a time) and tokenizer. Raises UserError if the file is damaged
    or core/model.py does not support the model."""
    with _opened(path) as file:
        arch = file.entries.get("general.architecture")
        family = FAMILIES_THERE.get(str(arch))
        if file.entries.get("split.count", 1) != 1:
            raise UserError(f"{path} is one of {one_line(file.entries['split.count'])} parts: merge the parts first")
        if family is None:
            raise UserError(f"{path}: the architecture {one_line(arch)} is not one of {', '.join(FAMILIES_THERE)}")
        config = _config(file, family, str(path))
        tokenizer = read_tokenizer(file.entries, str(path))
        expected_tensors(config, len(file.tensors), str(path))  # before names are made for each of its layers
        return config, read_weights(_tensors(file, family, config), family, config, str(path)), tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises UserError."""
    with _opened(path) as file:
        return read_tokenizer(file.entries, str(path))


@contextmanager
def _opened(path: Path) -> Iterator[GGUFFile]:
    require("gguf", "gguf", f"{path}", "name another checkpoint")
    try:
        yield GGUFFile(path)
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # of many kinds for a damaged file; a Rust panic is not an Exception
        raise UserError(f"{path} is damaged or not a GGUF file: {type(error).__name__}: {one_line(error)}") from None


def _config(file: GGUFFile, family: Family, where: str) -> GPTConfig:
    arch, held = family.model_type, file.tensors
    theirs = {key[len(arch) + 1 :]: value for key, value in file.entries.items() if key.startswith(f"{arch}.")}
    values = family.ours | {ours: theirs.pop(key) for ours, key in _keys(family).items() if key in theirs}
    values |= {"vocab_size": held["token_embd.weight"].shape[0], "tie_embeddings": "output.weight" not in held}
    values["bias"] = family.gpt2 or "blk.0.ffn_up.bias" in held
    values["qkv_bias"] = not values["bias"] and "blk.0.attn_q.bias" in held
    values["activation"] = "gelu_tanh" if family.gpt2 else next(iter(family.activations.values()))
    if not family.gpt2:
        values |= _read_scaling(theirs, file)
        values.setdefault("head_dim", theirs.get(HEAD_WIDTHS[0]))
    config = checked_model_config(values, where)
    if config.head_dim == config.n_embd / config.n_head:
        config.head_dim = None
    own: dict[str, Any] = {"vocab_size": config.vocab_size} | dict.fromkeys(HEAD_WIDTHS, config.head_width)
    if config.rope_scaling == "yarn":
        own |= {"rope.scaling.finetuned": theirs.get("rope.scaling.finetuned")}  # changes nothing
        own |= {"rope.scaling.yarn_beta_slow": 1.0, "rope.scaling.yarn_beta_fast": 32.0}
    for key, value in theirs.items():
        if key not in own or value != own[key]:
            raise UserError(f"{where}: {arch}.{key}={one_line(value)} is not supported by this program's model")
    if config.rope_scaling == "llama3" and (
        held[DIVISORS].shape != (config.head_width // 2,)  # first: a width that the file only claims needs no memory
        or not torch.allclose(file.read(DIVISORS), frequency_divisors(config), rtol=1e-4)
    ):
        raise UserError(f"{where}: {DIVISORS} is not supported by this program's model: it is not Llama 3's scaling")
    return config


def _read_scaling(theirs: dict[str, Any], file: GGUFFile) -> dict[str, Any]:
    """Our settings for the scaling of RoPE; their entries are removed from `theirs`."""
    if DIVISORS in file.tensors:
        if theirs.get("rope.scaling.type") == "none":
            del theirs["rope.scaling.type"]
        given = {ours: file.entries.get(OWN + ours, usual) for ours, usual in LLAMA3.items()}
        return given | {"rope_scaling": "llama3", "rope_factor": float(file.read(DIVISORS).max())}
    kind = theirs.get("rope.scaling.type", "linear" if "rope.scaling.factor" in theirs else "none")
    if kind not in SCALINGS:
        return {}  # and so it is refused
    theirs.pop("rope.scaling.type", None)
    values = {ours: theirs.pop(key) for ours, key in SCALED.get(kind, {}).items() if key in theirs}
    if kind == "yarn":
        values.setdefault("rope_original", theirs.get("context_length"))
        if ATTENTION in theirs:
            values["rope_attention"] = theirs.pop(ATTENTION) * (0.1 * math.log(max(1.0, values["rope_factor"])) + 1)
    return values | {"rope_scaling": kind}


def _keys(family: Family) -> dict[str, str]:
    if not family.gpt2:
        return KEYS
    absent = ("n_kv_head", "rope_theta", "head_dim")
    return {ours: key.replace("_rms", "") for ours, key in KEYS.items() if ours not in absent}


def _name_of(family: Family, layers: int) -> Callable[[str], str]:
    """Hugging Face's name of a tensor to gguf's."""
    import gguf

    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.model_type)
    names = gguf.get_tensor_name_map(arch, layers)
    return lambda theirs: names.get_name(theirs, try_suffixes=(".weight", ".bias")) or theirs


def _pairs(family: Family, theirs: str, config: GPTConfig) -> int:
    """The heads of a matrix whose rows llama.cpp stores in pairs, for its way to rotate; 0 for the others."""
    part = theirs.rpartition(".self_attn.")[2].partition("_proj")[0]
    heads = {"q": config.n_head, "k": config.n_kv_head or config.n_head}
    return heads.get(part, 0) if family.model_type == "llama" else 0


def _tensors(file: GGUFFile, family: Family, config: GPTConfig) -> dict[str, Callable[[], Tensor]]:
    """{Hugging Face's name: function that reads the tensor}."""
    held, name_of = set(file.tensors), _name_of(family, config.n_layer)
    if config.rope_scaling == "llama3":
        held.remove(DIVISORS)

    def read(name: str, heads: int, is_transposed: bool) -> Tensor:
        values = file.read(name)
        if heads:
            values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)
        return values.t() if is_transposed else values

    found: dict[str, Callable[[], Tensor]] = {}
    for theirs in {name for names in family.names(config).values() for name in names}:
        if (name := name_of(theirs)) in held:
            held.remove(name)
            found[theirs] = partial(read, name, _pairs(family, theirs, config), family.transposed(theirs))
    return found | {name: partial(read, name, 0, False) for name in held}


def export_gguf(
    config: GPTConfig, weights: dict[str, Tensor], tokenizer: Tokenizer | None, path: Path, kind: GGUFType,
    about: dict[str, str | float] | None = None, free: bool = False,
) -> None:  # fmt: skip
    """Writes a file for llama.cpp, with matrices in this precision. It appears complete or not at all, after it was
    read back and its logits were compared. Rows without a token (padding) are left out. about: more entries, general.*.
    free: empties `weights` once they are written, so that the check needs no memory for a second model. Raises
    UserError for a model or a tokenizer that llama.cpp does not support."""
    require("gguf", "gguf", "--format=gguf", "use --format=hf")
    import gguf

    family, state = _family(config), checked_weights(weights, config, "the checkpoint")
    if tokenizer is None:
        raise UserError("the checkpoint does not have a tokenizer, which llama.cpp needs: name its data with --dataset")
    entries: dict[str, Any] = _entries(family, config) | (about or {}) | describe_tokenizer(tokenizer)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][: tokenizer.vocab_size]
    name_of, small = _name_of(family, config.n_layer), dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    try:
        if path.exists():
            raise UserError(f"{path} exists: name a new file, or remove it first")
        with temporary_folder(path) as made:
            writer = gguf.GGUFWriter(made / path.name, family.model_type)
            writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")])
            add: dict[type, Any] = {
                bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
                list: writer.add_array,
            }  # fmt: skip
            for key, entry in entries.items():
                add[type(entry)](key, entry)
            tensors = written_weights(state, family.names(small), family, small)
            if config.rope_scaling == "llama3":
                tensors[DIVISORS] = frequency_divisors(config)
            there = {theirs: name if (name := name_of(theirs)) else theirs for theirs in tensors}
            for theirs, tensor in tensors.items():
                shape = tuple(tensor.t().shape if family.transposed(theirs) else tensor.shape)
                dtype = _type_of(there[theirs], shape, kind)
                stored = gguf.quant_shape_to_byte_shape(shape, dtype) if dtype == _types().Q8_0 else shape
                size = {_types().F32: np.float32, _types().F16: np.float16}.get(dtype, np.uint8)
                nbytes = math.prod(stored) * np.dtype(size).itemsize
                writer.add_tensor_info(there[theirs], stored, np.dtype(size), nbytes, raw_dtype=dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for theirs, tensor in tensors.items():
                values = tensor.float().t() if family.transposed(theirs) else tensor.float()
                if heads := _pairs(family, theirs, config):
                    values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(values.shape)
                dtype = _type_of(there[theirs], tuple(values.shape), kind)
                writer.write_tensor_data(gguf.quants.quantize(values.contiguous().numpy(), dtype))
            writer.close()
            formulas = check_formulas(small, state, made)
            ids, logits = sample_logits(small, state)
            if free:
                weights.clear()
            state.clear()
            tensors.clear()
            finding = compare(made / path.name, ids, logits, tokenizer, kind)
            (made / path.name).rename(path)
    except OSError as error:
        reason = error.strerror or f"{error} (is the disk full?)"  # numpy names only the counts
        raise UserError(f"cannot write {path}: {reason}") from None
    print(f"wrote {path}: {family.model_type}, {kind}; {finding}; first layers: {formulas}")


def _family(config: GPTConfig) -> Family:
    """The architecture of llama.cpp. Raises UserError if it has none for this configuration."""
    family = family_of(config)
    if family.model_type == "qwen2" and (config.rope_scaling == "llama3" or config.head_dim is not None):
        return FAMILIES["llama"]  # which may have these biases there
    if config.rope_scaling == "llama3" and family.model_type != "llama":
        raise UserError(
            f"llama.cpp does not support rope_scaling=llama3 in {family.model_type} models: export with --format=hf"
        )
    if config.rope_scaling == "yarn" and (config.rope_low, high_turns(config)) != (1.0, 32.0):
        raise UserError("llama.cpp's yarn has rope_low=1 and rope_high=32 only: export with --format=hf")
    return family


def _entries(family: Family, config: GPTConfig) -> dict[str, Any]:
    """The entries for our settings."""
    ours = vars(config) | {"mlp_hidden": config.mlp_width, "n_kv_head": config.n_kv_head or config.n_head}
    ours |= {"head_dim": config.head_width, "rope_high": high_turns(config)}
    keys = _keys(family) | SCALED.get(config.rope_scaling, {})
    entries = {f"{family.model_type}.{key}": ours[name] for name, key in keys.items()}
    if not family.gpt2:
        entries |= {f"{family.model_type}.{key}": config.head_width for key in HEAD_WIDTHS}
    if config.rope_scaling == "llama3":
        entries |= {OWN + name: ours[name] for name in LLAMA3}
    elif config.rope_scaling != "none":
        entries[f"{family.model_type}.rope.scaling.type"] = config.rope_scaling
    if config.rope_scaling == "yarn" and config.rope_attention:
        usual = attention_factor(dataclasses.replace(config, rope_attention=None))
        entries[f"{family.model_type}.{ATTENTION}"] = config.rope_attention / usual
    floats = ("rope_theta", "norm_eps", "rope_factor", "rope_low", "rope_high")
    wide = {keys[name] for name in floats if name in keys} | {OWN + name for name in floats}
    return {key: float(v) if key.partition(".")[2] in wide or key in wide else v for key, v in entries.items()}


def _types() -> Any:
    import gguf

    return gguf.GGMLQuantizationType


def _type_of(name: str, shape: tuple[int, ...], kind: GGUFType) -> Any:
    """How a tensor is stored: vectors and positions in float32; q8_0 has blocks of 32 columns."""
    if len(shape) == 1 or kind == "f32" or name.startswith("position"):
        return _types().F32
    return _types().F16 if kind == "f16" or shape[1] % 32 else _types().Q8_0


def compare(path: Path, ids: Tensor, logits: Tensor, tokenizer: Tokenizer, kind: GGUFType) -> str:
    """The result of reading the file back, in a few words. Raises UserError if it holds another model."""
    config, state, same = load_gguf(path)
    difference = (logits - sample_logits(config, state)[1]).abs().max().item() / max(1.0, logits.abs().max().item())
    if not difference <= TOLERANCE[kind] or any(
        not np.array_equal(same.encode(text), tokenizer.encode(text)) for text in probes(tokenizer)
    ):
        raise UserError(f"the export is wrong: read back, its token ids or logits (up to {difference:.1e}) differ")
    return f"read back, its logits differ by up to {difference:.1e} of the largest"
