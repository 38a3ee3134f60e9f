"""Hugging Face's format, read and written without transformers: models shaped like GPT-2, Llama, Mistral and Qwen.

Reading and writing share tables of modules and settings, checked against core/model.py. A model that the other format
cannot represent is refused by name. Source: transformers' gpt2, llama, mistral, qwen2, qwen3, modeling_rope_utils.py.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import GPTConfig
from ..core.rope import high_turns
from ..core.sizes import meta_tensors, tied_names
from ..core.tokenizer import Tokenizer
from ..core.weights import build_model, checked_model_config, checked_weights, expected_tensors, file_of
from ..errors import UserError, one_line
from ..machine.files import read_json, to_json
from .hf_files import damage_is_a_user_error, get_folder, new_folder, open_weights
from .hf_tokenizer import probes, read_tokenizer, write_tokenizer
from .nanogpt import MODULES as GPT2_MODULES
from .nanogpt import every_layer

# Our module: Qwen3's; N is the layer. Names joined by + are stacked in one matrix of ours.
QWEN3_MODULES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h.N.ln_1": "model.layers.N.input_layernorm",
    "transformer.h.N.attn.c_attn": "+".join(f"model.layers.N.self_attn.{part}_proj" for part in "qkv"),
    "transformer.h.N.attn.c_proj": "model.layers.N.self_attn.o_proj",
    "transformer.h.N.attn.q_norm": "model.layers.N.self_attn.q_norm",
    "transformer.h.N.attn.k_norm": "model.layers.N.self_attn.k_norm",
    "transformer.h.N.ln_2": "model.layers.N.post_attention_layernorm",
    "transformer.h.N.mlp.c_gate": "model.layers.N.mlp.gate_proj",
    "transformer.h.N.mlp.c_fc": "model.layers.N.mlp.up_proj",
    "transformer.h.N.mlp.c_proj": "model.layers.N.mlp.down_proj",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
}
LLAMA_MODULES = {ours: theirs for ours, theirs in QWEN3_MODULES.items() if not ours.endswith(("q_norm", "k_norm"))}
BIASED = ("c_attn", "c_proj", "c_fc", "c_gate")  # their linear layers that may have biases
NEEDED = object()  # no default: a config.json without it is refused
# Our setting: its name in GPT-2's config.json and the default of transformers; the same for Llama. None: not there
_FIELDS: dict[str, tuple[str | None, Any, str, Any]] = {
    "vocab_size": ("vocab_size", 50257, "vocab_size", NEEDED),
    "block_size": ("n_positions", 1024, "max_position_embeddings", NEEDED),
    "n_layer": ("n_layer", 12, "num_hidden_layers", NEEDED),
    "n_head": ("n_head", 12, "num_attention_heads", NEEDED),
    "n_kv_head": (None, None, "num_key_value_heads", None),
    "n_embd": ("n_embd", 768, "hidden_size", NEEDED),
    "mlp_hidden": ("n_inner", None, "intermediate_size", NEEDED),
    "norm_eps": ("layer_norm_epsilon", 1e-5, "rms_norm_eps", 1e-6),
    "activation": ("activation_function", "gelu_new", "hidden_act", "silu"),
    "tie_embeddings": ("tie_word_embeddings", True, "tie_word_embeddings", False),
    "head_dim": (None, None, "head_dim", None),
    "bias": (None, None, "attention_bias", False),
}
GPT2_FIELDS = {ours: (name, default) for ours, (name, default, _, _) in _FIELDS.items() if name}
LLAMA_FIELDS = {ours: (name, default) for ours, (_, _, name, default) in _FIELDS.items()}
# Their activation: ours. Exports use the first name of each.
GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu2": "relu2"}
GPT2_ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "gelu_python": "gelu"}
LLAMA_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
# Their rope_type: {their name in rope_parameters: our setting}
ROPE = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor", "original_max_position_embeddings": "rope_original",
        "low_freq_factor": "rope_low", "high_freq_factor": "rope_high",
    },
    "yarn": {
        "factor": "rope_factor", "original_max_position_embeddings": "rope_original",
        "beta_slow": "rope_low", "beta_fast": "rope_high", "attention_factor": "rope_attention",
    },
}  # fmt: skip
WITHOUT_EFFECT = {"partial_rotary_factor": 1, "truncate": True}  # in rope_parameters


@dataclass(frozen=True)
class Family:
    """A model type of transformers that our model can represent."""

    model_type: str
    architecture: str
    modules: dict[str, str]
    fields: dict[str, tuple[str, Any]]
    activations: dict[str, str]
    ours: dict[str, Any]
    """Our settings that this type fixes, independent of its config.json."""
    fixed: dict[str, tuple[Any, ...]]
    """Their settings that change the arithmetic: the values that our model can compute."""

    @property
    def gpt2(self) -> bool:
        return self.model_type == "gpt2"

    def names(self, config: GPTConfig) -> dict[str, list[str]]:
        """{tensor of their model with this configuration, by our name: their names}, several if ours is stacked.
        Raises UserError if core/model.py has been edited so that it has other tensors."""
        names: dict[str, list[str]] = {}
        for ours, theirs in every_layer(self.modules, config.n_layer).items():
            plain = self.gpt2 and not ours.endswith(("wte", "wpe", "lm_head"))
            biased = plain or ((config.bias or config.qkv_bias) and ours.endswith(BIASED if config.bias else "c_attn"))
            for kind in ("weight", "bias") if biased else ("weight",):
                names[f"{ours}.{kind}"] = [f"{name}.{kind}" for name in theirs.split("+")]
        held = meta_tensors(config)
        for name in [*held, *names]:
            if name not in names:
                raise UserError(
                    f"{name} of the model in core/model.py is not supported by {self.architecture}'s format"
                )
            if name not in held and not (self.gpt2 and name.endswith(".bias")):  # a bias of zeros changes nothing
                raise UserError(
                    f"the model in core/model.py does not have {name}, which {self.architecture}'s format needs"
                )
        return names

    def transposed(self, key: str) -> bool:
        """Their GPT-2 stores the weights of its linear layers as (in, out)."""
        return self.gpt2 and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


NO, YES, LLAMA = (False, None), (True, None), {"pos_embedding": "rope", "norm": "rmsnorm"}
COMMON: dict[str, tuple] = {"quantization_config": (None,), "partial_rotary_factor": (None, 1.0), "is_causal": YES}
FAMILIES = {
    "gpt2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        {name: name for name in (*GPT2_MODULES, "lm_head")},
        GPT2_FIELDS,
        GPT2_ACTIVATIONS,
        {"pos_embedding": "learned", "norm": "layernorm", "bias": True},
        COMMON | {"scale_attn_weights": YES, "scale_attn_by_inverse_layer_idx": NO, "add_cross_attention": NO},
    ),
    "llama": Family("llama", "LlamaForCausalLM", LLAMA_MODULES, LLAMA_FIELDS, LLAMA_ACTIVATIONS, LLAMA, COMMON),
    # Read only: a Llama with a window of sliding_window tokens. The context is shortened to it.
    "mistral": Family(
        "mistral", "MistralForCausalLM", LLAMA_MODULES, LLAMA_FIELDS, LLAMA_ACTIVATIONS, LLAMA | {"bias": False}, COMMON
    ),
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        LLAMA_MODULES,
        LLAMA_FIELDS,
        LLAMA_ACTIVATIONS,
        LLAMA | {"bias": False, "qkv_bias": True},
        COMMON | {"use_sliding_window": NO},
    ),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        QWEN3_MODULES,
        LLAMA_FIELDS | {"n_kv_head": ("num_key_value_heads", NEEDED), "head_dim": ("head_dim", 128)},
        LLAMA_ACTIVATIONS,
        LLAMA | {"qk_norm": True, "bias": False},
        COMMON | {"attention_bias": NO, "use_sliding_window": NO},
    ),
}


def load_pretrained(name_or_folder: str | Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer | None]:
    """Settings, weights and tokenizer from a folder with config.json and model.safetensors (or its shards, or
    pytorch_model.bin), or from the hub's gpt2, gpt2-medium, gpt2-large, gpt2-xl or owner/name (extra `hf`). The state
    dict has our names, both of a tied head, and the stored dtype; dropout is 0. The tokenizer is None if the folder has
    none that is supported. Raises UserError if files are inconsistent or core/model.py does not support the model."""
    folder = get_folder(name_or_folder, read_config)
    family, config = read_config(folder, note=partial(print, file=sys.stderr))
    state = read_weights(open_weights(folder), family, config, str(folder))
    tokenizer = read_tokenizer(folder, family.gpt2)
    if tokenizer is not None and tokenizer.vocab_size > int(config.vocab_size or 0):
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    return config, state, tokenizer


def export_hf(
    config: GPTConfig, weights: dict[str, Tensor], tokenizer: Tokenizer | None, folder: str | Path,
    card: str | None = None, sampling: dict[str, Any] | None = None, free: bool = False,
) -> None:  # fmt: skip
    """Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer load without any flag. folder: new or
    empty; it appears complete or not at all, after it was read back (by transformers if it is installed) and its logits
    were compared with ours. Ids without a token (padding) are suppressed in generation_config.json. card: the text of
    its README.md. sampling: defaults for generation_config.json. free: empties `weights` once they are written, so that
    the check needs no memory for a second model. Raises UserError for a model that transformers does not support, and
    if the comparison fails."""
    folder = Path(folder)
    family = family_of(config)
    names = family.names(config)
    state = checked_weights(weights, config, "the checkpoint")
    # the widest: a merged adapter has float32 matrices in a bfloat16 model, which must not be rounded on loading
    widest = reduce(torch.promote_types, (t.dtype for t in state.values() if t.is_floating_point()))
    rows, dtype = int(config.vocab_size or 0), str(widest).split(".")[1]
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {rows}: they come from different runs"
        )
    described = write_config(family, config)
    eot = None if tokenizer is None else tokenizer.eot_id
    # a char or byte tokenizer has no end of a text, but its chat model has an end of a turn
    ends = [] if tokenizer is None else sorted(tokenizer.end_ids, key=lambda i: (i != eot, i))
    end = ends[0] if ends else None
    # None must be written: by default, transformers would end a text of Llama at id 2
    described |= {"bos_token_id": eot, "eos_token_id": end, "dtype": dtype}
    with new_folder(folder) as made:
        backend = None if tokenizer is None else write_tokenizer(tokenizer, made, config.block_size)
        used = set(range(rows)) if backend is None else set(backend.get_vocab(with_added_tokens=True).values())
        special = {"bos": eot, "eos": ends if len(ends) > 1 else end, "pad": end}
        generation: dict[str, Any] = {f"{kind}_token_id": i for kind, i in special.items() if i is not None}
        if sampling:
            generation |= {"do_sample": True} | sampling if sampling.get("temperature") else {"do_sample": False}
        if unused := sorted(set(range(rows)) - used):  # padding, and gaps in the vocabulary
            generation["suppress_tokens"] = unused
        (made / "generation_config.json").write_bytes(to_json(generation))
        if card is not None:
            (made / "README.md").write_text(card, encoding="utf-8")
        _write(made, described, written_weights(state, names, family, config))
        ids, logits = sample_logits(config, state)
        if free:
            weights.clear()
            state.clear()
        finding = _compare(ids, logits, tokenizer, made)
    print(f"wrote {folder}: {family.architecture}, {tokenizer.name if tokenizer else 'no'} tokenizer; {finding}")


def _write(folder: Path, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (folder / "config.json").write_bytes(to_json(described))
    with open(folder / "model.safetensors", "wb") as file:
        for part in file_of(tensors, format="pt"):
            file.write(part)


def check_formulas(config: GPTConfig, state: dict[str, Tensor], place: Path) -> str:
    """The result of comparing the first layers (a copy in `place`) with transformers'. That only this program reads a
    file back does not show that core/model.py's formulas are the family's. Raises UserError if they differ."""
    few = dataclasses.replace(config, n_layer=min(2, config.n_layer), vocab_size=min(256, int(config.vocab_size or 0)))
    part = {name: state[name][: len(tensor)].float() for name, tensor in meta_tensors(few).items()}
    family = family_of(few)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        _write(Path(folder), write_config(family, few), written_weights(part, family.names(few), family, few))
        return _compare(*sample_logits(few, part, 512), None, Path(folder))


def read_config(folder: Path, note: Callable[[str], None] = lambda text: None) -> tuple[Family, GPTConfig]:
    """The GPTConfig for a folder's config.json. Raises UserError if our model does not support it."""
    theirs, where = read_json(folder / "config.json"), str(folder / "config.json")
    family = FAMILIES.get(str(theirs.get("model_type")))
    if family is None:
        raise UserError(f"{where}: model_type={one_line(theirs.get('model_type'))} is not one of {', '.join(FAMILIES)}")
    values: dict[str, Any] = {}
    for ours, (name, default) in family.fields.items():
        values[ours] = default if theirs.get(name) is None else theirs[name]
        if values[ours] is NEEDED:
            raise UserError(f"{where} does not set {name}")
    values |= family.ours
    unusual = {name: theirs.get(name) for name, accepted in family.fixed.items() if theirs.get(name) not in accepted}
    if values["activation"] not in list(family.activations):
        unusual[family.fields["activation"][0]] = values["activation"]
    if family.model_type == "llama" and bool(theirs.get("mlp_bias")) != values["bias"]:
        unusual["mlp_bias"] = f"{theirs.get('mlp_bias')} with attention_bias={values['bias']}"
    if not family.gpt2:
        values |= _read_rope(theirs, unusual)
    kinds = theirs.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        unusual["layer_types"] = kinds
    window = theirs.get("sliding_window", 4096) if family.model_type == "mistral" else None
    if window is not None and (type(window) is not int or window < 1):
        unusual["sliding_window"] = window
    if unusual:
        name, value = next(iter(unusual.items()))
        raise UserError(f"{where}: {name}={one_line(value)} is not supported by this program's model")
    config = checked_model_config(values | {"activation": family.activations[values["activation"]]}, where)
    if config.head_dim == config.n_embd / config.n_head:
        config.head_dim = None
    if window is not None and window < config.block_size:
        note(f"note: {where}: the context is shortened to {window} tokens (sliding_window)")
        config.block_size = window
    return family, config


def _read_rope(theirs: dict[str, Any], unusual: dict[str, Any]) -> dict[str, Any]:
    """Our settings of RoPE. What our model cannot compute is added to `unusual`."""
    if theirs.get("rope_parameters") and theirs.get("rope_scaling"):
        unusual["rope_scaling"] = f"{one_line(theirs['rope_scaling'])} next to rope_parameters"
    given = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # since transformers 5, and before
    rope = {"rope_type": given} if not isinstance(given, dict) else {k: v for k, v in given.items() if v is not None}
    kind = rope.pop("rope_type", rope.get("type", "default"))
    names = ROPE.get(str(kind))
    values = {"rope_theta": rope.pop("rope_theta", theirs.get("rope_theta", 10000.0))}
    if names and rope.get("factor") is not None:
        original = theirs.get("original_max_position_embeddings") or theirs["max_position_embeddings"]
        rope = {"original_max_position_embeddings": original} | rope if len(names) > 1 else rope
        values |= {names[name]: rope.pop(name) for name in list(rope) if name in names}
        values |= {"rope_scaling": kind}
    left = any(v != WITHOUT_EFFECT.get(k) for k, v in rope.items() if k != "type")
    if names is None or left or (names and "rope_scaling" not in values) or (kind == "llama3" and len(values) < 6):
        unusual["rope_parameters"] = given
    return values


def write_config(family: Family, config: GPTConfig) -> dict[str, Any]:
    """The config.json for one of our models."""
    theirs: dict[str, Any] = {name: getattr(config, ours) for ours, (name, _) in family.fields.items()}
    theirs[family.fields["norm_eps"][0]] = float(config.norm_eps)  # transformers refuses a whole number
    theirs |= {"architectures": [family.architecture], "model_type": family.model_type}
    name = family.fields["activation"][0]
    theirs[name] = next(name for name, ours in family.activations.items() if ours == config.activation)
    if family.gpt2:
        return theirs | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    theirs |= {"intermediate_size": config.mlp_width, "num_key_value_heads": config.n_kv_head or config.n_head}
    theirs |= {"head_dim": config.head_width, "attention_dropout": config.dropout}
    theirs |= {"mlp_bias": config.bias} if family.model_type == "llama" else {}
    rope: dict[str, Any] = {"rope_theta": float(config.rope_theta)}
    rope["rope_type"] = "default" if config.rope_scaling == "none" else config.rope_scaling
    values = vars(config) | {"rope_high": high_turns(config)}
    rope |= {name: values[ours] for name, ours in ROPE[rope["rope_type"]].items() if values[ours] is not None}
    return theirs | {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}  # since transformers 5, and before


def family_of(config: GPTConfig) -> Family:
    """The model type of transformers. Raises UserError if it has none for this configuration."""
    rope, gated = config.pos_embedding == "rope", config.activation == "swiglu"
    obstacles = {
        "a logit softcap": config.logit_softcap > 0,
        "a norm of the embeddings": config.embedding_norm,
        "n-gram embeddings": config.max_ngram > 0,
        "learned positions with RMSNorm": not rope and config.norm == "rmsnorm",
        "learned positions with SwiGLU": not rope and gated,
        "learned positions with grouped-query attention": not rope and config.n_kv_head not in (None, config.n_head),
        "learned positions with QK-norm": not rope and config.qk_norm,
        "RoPE with LayerNorm": rope and config.norm == "layernorm",
        f"RoPE with the {config.activation} activation": rope and not gated,
        "QK-norm with biases": rope and config.qk_norm and (config.bias or config.qkv_bias),
        "learned positions with head_dim": not rope and config.head_width * config.n_head != config.n_embd,
    }
    if found := [what for what, present in obstacles.items() if present]:
        raise UserError(
            f"the model cannot be exported: transformers does not support {found[0]}. Its GPT-2 has learned positions, "
            "LayerNorm and a plain MLP; its Llama and Qwen have RoPE, RMSNorm and SwiGLU"
        )
    qwen = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias and not config.bias else None
    return FAMILIES["gpt2" if not rope else qwen or "llama"]


def read_weights(
    tensors: dict[str, Callable[[], Tensor]], family: Family, config: GPTConfig, where: str
) -> dict[str, Tensor]:
    """Our state dict from {their name: function that reads the tensor}. Raises UserError for a missing, surplus or
    misshapen tensor."""
    state: dict[str, Tensor] = {}
    surplus, expected = set(tensors), expected_tensors(config, len(tensors), where)
    names, tied = family.names(config), tied_names(config)
    for key in expected:
        if key in tied and names[key][0] not in surplus:
            continue  # stored once
        if lacking := [name for name in names[key] if name not in tensors]:
            raise UserError(f"the weights in {where} lack {lacking[0]}, which the model needs")
        with damage_is_a_user_error(where):
            parts = [tensors[name]() for name in names[key]]
        if len(parts) > 1 and len({part.shape[1:] for part in parts}) == 1:
            parts = [torch.cat(parts)]
        state[key] = (parts[0].t() if family.transposed(key) and parts[0].dim() == 2 else parts[0]).contiguous()
        surplus -= set(names[key])
    if surplus:
        raise UserError(f"{where}: the weights contain {min(surplus)}, which the model does not have")
    return checked_weights(state, config, where)


def written_weights(
    state: dict[str, Tensor], names: dict[str, list[str]], family: Family, config: GPTConfig
) -> dict[str, Tensor]:
    """Their tensors of our state dict: views, which need no memory."""
    tensors: dict[str, Tensor] = {}
    tied, kv = tied_names(config), config.n_kv_head or config.n_head
    stacked = [config.head_width * count for count in (config.n_head, kv, kv)]
    for key, theirs in names.items():
        if key in tied:
            continue
        if key in state:
            tensor = state[key].detach().cpu()
        else:  # GPT-2 always has biases there; zeros change nothing
            weight = state[key.removesuffix("bias") + "weight"]
            tensor = torch.zeros(weight.size(0), dtype=weight.dtype)
        if len(theirs) > 1 and tensor.size(0) != sum(stacked):
            raise UserError(f"{key} has {tensor.size(0)} rows, {family.architecture}'s format needs {sum(stacked)}")
        parts = tensor.split(stacked) if len(theirs) > 1 else (tensor.t() if family.transposed(key) else tensor,)
        tensors |= zip(theirs, parts, strict=True)
    return tensors


@torch.no_grad()
def sample_logits(config: GPTConfig, state: dict[str, Tensor], length: int = 64) -> tuple[Tensor, Tensor]:
    """Random ids and the model's logits for them, in float32: to be compared with the logits of the written file."""
    shape, seeded = (2, min(config.block_size, length)), torch.Generator().manual_seed(0)
    ids = torch.randint(int(config.vocab_size or 0), shape, generator=seeded)
    model = build_model(config, {k: t.float() if t.is_floating_point() else t for k, t in state.items()}).eval()
    return ids, model(ids, targets=ids)[0]


@torch.no_grad()
def _compare(ids: Tensor, logits: Tensor, tokenizer: Tokenizer | None, folder: Path) -> str:
    """Loads the folder with transformers, or else our reader. Returns a summary. Raises UserError if results differ."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        missing = error.name == "transformers"
        why = "install transformers" if missing else f"transformers cannot be imported ({one_line(error)})"
        config, state, same = load_pretrained(folder)
        difference = _difference(logits, sample_logits(config, state, ids.size(1))[1], "its")
        if tokenizer is not None and (same is None or same.fingerprint() != tokenizer.fingerprint()):
            raise UserError("the export is wrong: its tokenizer differs") from None
        return f"read back with the same logits (largest difference {difference:.1e}); unverified: {why}"
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
        difference = _difference(logits, theirs(ids).logits, "transformers'")
        if tokenizer is not None:
            auto = transformers.AutoTokenizer.from_pretrained(folder)
            for text in probes(tokenizer):
                if auto.encode(text, add_special_tokens=False) != tokenizer.encode(text).tolist():
                    raise UserError("the export is wrong: transformers' tokenizer gives different ids")
        return f"transformers {transformers.__version__} gives the same logits (largest difference {difference:.1e})"
    except UserError:
        raise
    except Exception as error:  # any error that it finds in the folder
        raise UserError(f"the export is wrong: transformers cannot read it ({one_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _difference(ours: Tensor, theirs: Tensor, whose: str) -> float:
    difference = (ours - theirs).abs().max().item()
    if not difference <= 1e-4 * max(1.0, ours.abs().max().item()):  # this form refuses NaN, too
        raise UserError(
            f"the export is wrong: {whose} logits differ from ours by up to {difference:.1e} (edited core/model.py?)"
        )
    return difference
