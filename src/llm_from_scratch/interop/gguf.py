"""GGUF, llama.cpp's format, read and written with the package gguf, for the model families of hf.py. hf.py's tables of
modules are used, with gguf's names for the tensors. Byte-level BPE only. Source: llama.cpp's convert_hf_to_gguf.py and
llama-vocab.cpp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import GPTConfig
from ..core.chat import ChatTemplate, template_of
from ..core.tokenizer import HFTokenizer, Tokenizer
from ..core.weights import build_model, checked_model_config, checked_weights
from ..errors import UserError, one_line
from ..machine.extras import require
from ..machine.files import parse_json, temporary_folder
from .hf import FAMILIES, Family, family_of, read_weights, written_weights
from .hf_tokenizer import byte_level, probes, to_backend

if TYPE_CHECKING:
    from gguf import GGUFReader

# Our setting: its key, after the name of the architecture
KEYS = {
    "block_size": "context_length", "n_layer": "block_count", "n_embd": "embedding_length",
    "mlp_hidden": "feed_forward_length", "n_head": "attention.head_count", "n_kv_head": "attention.head_count_kv",
    "norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
}  # fmt: skip
HEAD_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens: of BPE, special, added but not special
# How a tokenizer splits text into words: its name in llama.cpp, the pattern, and whether GPT-2's pattern follows
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, True),
    "smollm": (r"\p{N}", True),
    "llama-bpe": (_LLAMA3, False),
    "qwen2": (_LLAMA3.replace("{1,3}", ""), False),
}
GGUFType = Literal["f32", "f16", "q8_0"]
TOLERANCE = {"f32": 1e-5, "f16": 1e-2, "q8_0": 1e-1}  # of logits, read back


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def load_gguf(path: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer]:
    """Settings, weights in float32 (dequantized one at a time) and tokenizer. Raises UserError if the file is damaged
    or core/model.py does not support the model."""
    reader = _open(path)
    try:
        arch = str(_value(reader, "general.architecture"))
        family = FAMILIES.get(arch)
        if family is None:
            raise UserError(f"{path}: the architecture {one_line(arch)} is not one of {', '.join(FAMILIES)}")
        config = _config(reader, family, str(path))
        state = read_weights(_tensors(reader, family, config), family, config, str(path))
        return config, state, _tokenizer(reader, path)
    except UserError:
        raise
    except Exception as error:  # any error of the package for a damaged file
        raise UserError(f"{path} is damaged or not a GGUF file: {type(error).__name__}: {one_line(error)}") from None


def _chat(reader: GGUFReader) -> ChatTemplate | None:
    """The chat template, if there is one."""
    chat = {"chat_template": _value(reader, "tokenizer.chat_template", None)}
    for kind in ("bos", "eos"):
        number = _value(reader, f"tokenizer.ggml.{kind}_token_id", None)
        if number is not None:
            chat[f"{kind}_token"] = reader.fields["tokenizer.ggml.tokens"].contents(number)
    return template_of(chat)


def _open(path: Path) -> GGUFReader:
    require("gguf", "gguf", f"{path}", "name another checkpoint")
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # of many kinds for a damaged file
        raise UserError(f"{path} is damaged or not a GGUF file: {type(error).__name__}: {one_line(error)}") from None


def _value(reader: GGUFReader, key: str, *default: Any) -> Any:
    if key in reader.fields:
        return reader.fields[key].contents()
    if default:
        return default[0]
    raise UserError(f"the file does not have {key}")


def _config(reader: GGUFReader, family: Family, where: str) -> GPTConfig:
    arch, held = family.model_type, {tensor.name: tensor for tensor in reader.tensors}
    theirs = {
        key[len(arch) + 1 :]: field.contents() for key, field in reader.fields.items() if key.startswith(f"{arch}.")
    }
    values = family.ours | {ours: theirs.pop(key) for ours, key in _keys(family).items() if key in theirs}
    values |= {"vocab_size": int(held["token_embd.weight"].shape[1]), "tie_embeddings": "output.weight" not in held}
    values["bias"] = family.gpt2 or "blk.0.attn_q.bias" in held
    values["activation"] = "gelu_tanh" if family.gpt2 else next(iter(family.activations.values()))
    config = checked_model_config(values, where)
    own: dict[str, Any] = {"vocab_size": config.vocab_size, "rope.scaling.type": "none"}
    own |= dict.fromkeys(HEAD_WIDTHS, config.n_embd // config.n_head)
    for key, value in theirs.items():
        if key not in own or value != own[key]:
            raise UserError(f"{where}: {arch}.{key}={one_line(value)} is not supported by this program's model")
    return config


def _keys(family: Family) -> dict[str, str]:
    if not family.gpt2:
        return KEYS
    return {ours: key.replace("_rms", "") for ours, key in KEYS.items() if ours not in ("n_kv_head", "rope_theta")}


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


def _tensors(reader: GGUFReader, family: Family, config: GPTConfig) -> dict[str, Callable[[], Tensor]]:
    """{Hugging Face's name: function that reads the tensor}."""
    import gguf

    held = {tensor.name: tensor for tensor in reader.tensors}
    theirs = {name for names in family.names(config).values() for name in names}
    name_of = _name_of(family, config.n_layer)

    def read(tensor: Any, heads: int, is_transposed: bool) -> Tensor:
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
        if heads:
            values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)
        return values.t() if is_transposed else values

    found: dict[str, Callable[[], Tensor]] = {}
    for name in theirs:
        if tensor := held.pop(name_of(name), None):
            found[name] = partial(read, tensor, _pairs(family, name, config), family.transposed(name))
    return found | {name: partial(read, tensor, 0, False) for name, tensor in held.items()}


def _tokenizer(reader: GGUFReader, path: Path) -> Tokenizer:
    kind, pre = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in WORDS:
        found = f"tokenizer.ggml.model={one_line(kind)} with tokenizer.ggml.pre={one_line(pre)}"
        raise UserError(f"{path}: {found} is not supported; supported: gpt2 with {', '.join(WORDS)}")
    tokens, types = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    pairs = [tuple(pair.split(" ")) for pair in _value(reader, "tokenizer.ggml.merges")]
    special = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = byte_level(vocab, pairs, special, *WORDS[pre])
    made = HFTokenizer(backend.to_str(), "hf", _value(reader, "tokenizer.ggml.eos_token_id", None))
    made.chat = _chat(reader)
    return made


def export_gguf(
    config: GPTConfig, weights: dict[str, Tensor], tokenizer: Tokenizer | None, path: Path, kind: GGUFType
) -> None:
    """Writes a file for llama.cpp, with matrices in this precision. It appears complete or not at all, after it was
    read back and its logits were compared. Rows without a token (padding) are left out. Raises UserError for a model or
    a tokenizer that llama.cpp does not support."""
    require("gguf", "gguf", "--format=gguf", "use --format=hf")
    import gguf

    family, state = family_of(config), checked_weights(weights, config, "the checkpoint")
    if tokenizer is None:
        raise UserError("the checkpoint does not have a tokenizer, which llama.cpp needs: name its data with --dataset")
    vocabulary = _vocabulary(tokenizer)
    rows = tokenizer.vocab_size
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][:rows]
    arch, name_of = family.model_type, _name_of(family, config.n_layer)
    whole = {"mlp_hidden": config.mlp_width, "n_kv_head": config.n_kv_head or config.n_head}
    try:
        if path.exists():
            raise UserError(f"{path} exists: name a new file, or remove it first")
        with temporary_folder(path) as made:
            writer = gguf.GGUFWriter(made / path.name, arch)
            for ours, key in _keys(family).items():
                value = whole.get(ours, getattr(config, ours))
                (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
            if not family.gpt2:
                writer.add_uint32(f"{arch}.{HEAD_WIDTHS[0]}", config.n_embd // config.n_head)
            writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")])
            add: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            add[list] = writer.add_array
            for key, content in vocabulary.items():
                add[type(content)](f"tokenizer.ggml.{key}", content)
            small = GPTConfig(**{**vars(config), "vocab_size": rows})
            for name, tensor in written_weights(state, family.names(small), family, small).items():
                values = tensor.float().t() if family.transposed(name) else tensor.float()
                if heads := _pairs(family, name, config):
                    values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(values.shape)
                _write_tensor(writer, name_of(name), values.contiguous().numpy(), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            finding = compare(made / path.name, small, state, tokenizer, kind)
            (made / path.name).rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    print(f"wrote {path}: {arch}, {kind}; {finding}")


def _write_tensor(writer: Any, name: str, values: np.ndarray, kind: GGUFType) -> None:
    import gguf

    types = gguf.GGMLQuantizationType
    if values.ndim == 1 or kind == "f32" or name.startswith("position"):
        writer.add_tensor(name, values)
    elif kind == "f16" or values.shape[1] % 32:  # q8_0 has blocks of 32 columns
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, types.Q8_0), raw_dtype=types.Q8_0)


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries tokenizer.ggml.* of a byte-level BPE tokenizer. Raises UserError for another kind."""
    eot = tokenizer.eot_id
    if eot is None:
        raise UserError(
            f"llama.cpp needs a token that ends a text, which the {tokenizer.name} tokenizer does not have: export "
            "with --format=hf, or train on data prepared with --tokenizer=bpe:N"
        )
    backend = to_backend(tokenizer)
    model, known = parse_json(backend.to_str().encode())["model"], backend.get_added_tokens_decoder()
    added = {token.content: i for i, token in known.items()}
    special = {token.content: i for i, token in known.items() if token.special}
    if model["type"] == "BPE":
        vocab = {**model["vocab"], **added}
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        expected = [backend.encode(text, add_special_tokens=False).ids for text in probes(tokenizer)]
        for pre, words in WORDS.items():
            same = byte_level(vocab, pairs, special, *words)
            if [same.encode(text).ids for text in probes(tokenizer)] == expected:
                tokens = [f"[UNUSED{i}]" for i in range(tokenizer.vocab_size)]
                types = [UNUSED] * len(tokens)
                for token, i in vocab.items():
                    tokens[i] = token
                    types[i] = CONTROL if token in special else USER_DEFINED if token in added else NORMAL
                merges = [" ".join(pair) for pair in pairs]
                return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges,
                        "bos_token_id": eot, "eos_token_id": eot, "add_bos_token": False}  # fmt: skip
    raise UserError(f"the {tokenizer.name} tokenizer splits text in a way that llama.cpp does not support")


def compare(path: Path, config: GPTConfig, state: dict[str, Tensor], tokenizer: Tokenizer, kind: GGUFType) -> str:
    """The result of reading the file back, in a few words. Raises UserError if it holds another model."""
    back_config, back, same = load_gguf(path)
    ids = torch.randint(
        tokenizer.vocab_size, (1, min(config.block_size, 64)), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        ours, theirs = (
            build_model(c, {k: t.float() for k, t in s.items()}).eval()(ids, targets=ids)[0]
            for c, s in ((config, state), (back_config, back))
        )
    difference = (ours - theirs).abs().max().item() / max(1.0, ours.abs().max().item())
    if not difference <= TOLERANCE[kind] or any(
        not np.array_equal(same.encode(text), tokenizer.encode(text)) for text in probes(tokenizer)
    ):
        raise UserError(f"the export is wrong: read back, its logits or its ids differ (by up to {difference:.1e})")
    return f"read back, its logits differ by up to {difference:.1e} of the largest"
