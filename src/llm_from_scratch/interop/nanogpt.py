"""nanoGPT's ckpt.pt, read and written.

torch.save writes it from one dict:

    model           state dict with both names of the tied head; old files hold masks or torch.compile's prefixes
    optimizer       AdamW's state dict; parameters are numbered: all of two or more dimensions, then the others
    model_args      n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout
    iter_num        updates done
    best_val_loss   number or 0-dim tensor
    config          flat settings, `dataset` among them

Its architecture is GPT-2's with the exact GELU. The file is not trusted: see torch_file.py for the pickle; the contents
are checked before anything is built from them. Source: karpathy/nanoGPT train.py, sample.py, model.py.
"""

from __future__ import annotations

import re
import shlex
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..config import Config, GPTConfig
from ..core.sizes import meta_tensors, tied_names
from ..core.weights import checked_model_config, checked_weights, fits, not_finite, plain_names
from ..errors import DamagedError, UserError
from ..machine.files import write_file
from ..machine.terminal import note
from .torch_file import MARK, is_ours, is_plain_tensor, load_plain

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
SETTINGS = (
    "out_dir", "eval_interval", "log_interval", "eval_iters", "eval_only", "always_save_checkpoint", "init_from",
    "wandb_log", "wandb_project", "wandb_run_name", "dataset", "gradient_accumulation_steps", "batch_size",
    "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "learning_rate", "max_iters", "weight_decay",
    "beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "backend", "device",
    "dtype", "compile",
)  # fmt: skip

# The modules of nanoGPT's model (N: the layer) and the shapes of their weights, in the letters of _nanogpt_shapes
MODULES = {
    "transformer.wte": "VC",
    "transformer.wpe": "TC",
    "transformer.h.N.ln_1": "C",
    "transformer.h.N.attn.c_attn": "QC",
    "transformer.h.N.attn.c_proj": "CC",
    "transformer.h.N.ln_2": "C",
    "transformer.h.N.mlp.c_fc": "HC",
    "transformer.h.N.mlp.c_proj": "CH",
    "transformer.ln_f": "C",
}


@dataclass
class NanoGPTCheckpoint:
    """The contents of a ckpt.pt. optimizer: state by parameter name; settings: {section: {leaf: value}}."""

    config: GPTConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    step: int
    best_val_loss: float | None
    settings: dict[str, Any]


def read_nanogpt(path: str | Path, weights_only: bool = False) -> NanoGPTCheckpoint:
    """Reads a ckpt.pt. weights_only skips the optimizer's state. Settings that this program does not have are dropped.
    Raises UserError or DamagedError if the file is not what nanoGPT writes."""
    path = Path(path)
    content = load_plain(path)
    if missing := [key for key in ("model", "model_args") if not isinstance(content.get(key), dict)]:
        raise UserError(f"{path} is not a nanoGPT checkpoint: it does not contain the dict {' and '.join(missing)}")
    args, model = dict(content["model_args"]), content["model"]
    if unknown := sorted(str(key)[:40] for key in args if key not in MODEL_ARGS):
        raise UserError(f"{path} does not have nanoGPT's architecture: model_args has {', '.join(unknown[:5])}")
    if lacking := [key for key in MODEL_ARGS[:6] if key not in args and key != "bias"]:
        raise UserError(f"{path} is not a nanoGPT checkpoint: model_args lacks {', '.join(lacking)}")
    config = checked_model_config(args, str(path))
    for name, tensor in model.items():
        if not isinstance(name, str) or not is_plain_tensor(tensor):
            raise UserError(f"{path}: {str(name)[:80]} of the model is not a plain tensor")
    # torch before 2.0 had no fused attention, and nanoGPT then kept the causal masks among the weights
    model = {name: tensor.detach() for name, tensor in model.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}
    weights = checked_weights(model, config, str(path))
    step = content.get("iter_num", 0)
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise UserError(f"{path}: iter_num is {str(step)[:40]!r}, expected a number of steps")
    best = _number(content.get("best_val_loss"))
    optimizer = None
    if not weights_only and content.get("optimizer") is not None:
        optimizer = _by_name(content["optimizer"], config, path)
    return NanoGPTCheckpoint(config, weights, optimizer, step, best, _nested(content.get("config")))


def check_nanogpt(path: str | Path, config: GPTConfig, overwrite: bool = False, accept_erf_gelu: bool = False) -> None:
    """Raises UserError if write_nanogpt would: nanoGPT lacks a part of the model, or the file was not written by this
    program."""
    path, plain = Path(path), GPTConfig()
    theirs = {
        "activation": ("gelu", "gelu_tanh") if accept_erf_gelu else ("gelu",),
        "n_kv_head": (None, config.n_head),
        "qkv_bias": (False, config.bias),
        "mlp_hidden": (None, 4 * config.n_embd),
        "head_dim": (None, config.n_embd // config.n_head),
    }
    free = (*MODEL_ARGS, "rope_theta", "zero_init", "ngram_rows")  # the last three change nothing in such a model
    settings = {name: value for name, value in vars(config).items() if name not in free}
    wants = [f"{name}={v}" for name, v in settings.items() if v not in theirs.get(name, (getattr(plain, name),))]
    if wants:
        hint = "use --format=hf"
        if wants == ["activation=gelu_tanh"]:
            hint = "--accept_erf_gelu=True exports it anyway; nanoGPT uses the exact GELU, so results differ slightly"
        raise UserError(f"nanoGPT's model does not support {', '.join(wants)}: {hint}")
    _check_parameters(config)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file such as {path / 'ckpt.pt'}")
    if path.exists() and not overwrite and not is_ours(path):
        raise UserError(
            f"{path} was not written by this program and is not replaced: move it, or choose another name "
            "(llm-export replaces it with --overwrite=True)"
        )


def _nanogpt_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters of nanoGPT's own model, in its order; the head is tied."""
    C = config.n_embd
    size = {"V": int(config.vocab_size or 0), "T": config.block_size, "C": C, "Q": 3 * C, "H": 4 * C}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, letters in every_layer(MODULES, config.n_layer).items():
        shape = tuple(size[letter] for letter in letters)
        shapes[f"{name}.weight"] = shape
        if config.bias and not name.endswith(("wte", "wpe")):
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def every_layer(modules: dict[str, str], layers: int) -> dict[str, str]:
    """A table of modules with N replaced by each layer's number, one layer after the other, in names and values."""
    items = list(modules.items())
    inner = [i for i, (name, _) in enumerate(items) if ".N." in name]
    before, block, after = items[: inner[0]], items[inner[0] : inner[-1] + 1], items[inner[-1] + 1 :]
    for layer in range(layers):
        before += [(name.replace(".N.", f".{layer}."), value.replace(".N.", f".{layer}.")) for name, value in block]
    return dict(before + after)


def _check_parameters(config: GPTConfig) -> None:
    """Raises UserError if core/model.py has been edited so that nanoGPT's model has other parameters."""
    theirs, tied = _nanogpt_shapes(config), tied_names(config)
    ours = {name: tuple(tensor.shape) for name, tensor in meta_tensors(config).items() if name not in tied}
    for name in [*ours, *theirs]:
        if name not in theirs:
            raise UserError(f"the model in core/model.py cannot be exported: nanoGPT's format does not support {name}")
        if ours.get(name) != theirs[name]:
            found = f"has the shape {ours[name]}" if name in ours else "is missing"
            raise UserError(f"the model cannot be exported: {name} {found}, nanoGPT's format needs {theirs[name]}")


def write_nanogpt(
    path: str | Path, content: NanoGPTCheckpoint, overwrite: bool = False, accept_erf_gelu: bool = False
) -> Path:
    """Writes a ckpt.pt that nanoGPT's train.py (--init_from=resume) and sample.py read, atomically. A file
    written by this program is replaced, any other only with overwrite. AdamW's state is included; another optimizer's
    cannot be, and nanoGPT then starts with fresh moments. Raises UserError (see check_nanogpt), or SaveError if the
    disk fails."""
    path, config = Path(path), content.config
    check_nanogpt(path, config, overwrite, accept_erf_gelu)
    weights = plain_names(content.weights)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # one storage, as in nanoGPT
    best = _number(content.best_val_loss)
    flat = {key: value for section in content.settings.values() if isinstance(section, dict)
            for key, value in section.items()}  # fmt: skip
    saved = {
        "model": weights,
        "optimizer": _by_number(config, content.optimizer, flat),
        "model_args": {name: getattr(config, name) for name in MODEL_ARGS},
        "iter_num": content.step,
        "best_val_loss": 1e9 if best is None else best,  # nanoGPT's own initial value
        "config": {name: flat[name] for name in SETTINGS if name in flat},
        "written_by": MARK,
    }

    def write(f: IO[bytes]) -> None:
        try:
            torch.save(saved, f)
        except RuntimeError as error:  # how torch's archive writer reports a full disk
            raise OSError(str(error).split("\n")[0]) from error

    write_file(path, write)
    return path


def _number(value: Any) -> float | None:
    if is_plain_tensor(value) and value.numel() == 1:
        value = value.item()
    # compared, because a whole number can be too large to be a float
    return float(value) if type(value) in (int, float) and abs(value) <= sys.float_info.max else None


def _nested(flat: Any) -> dict[str, Any]:
    """nanoGPT's flat settings in this program's sections, if they have the same name and type."""
    result: dict[str, Any] = {}
    for section, kind in typing.get_type_hints(Config).items():
        for key, hint in typing.get_type_hints(kind).items():
            if isinstance(flat, dict) and key in SETTINGS and key in flat and fits(flat[key], hint):
                result.setdefault(section, {})[key] = flat[key]
    return result


def _numbered(config: GPTConfig) -> tuple[list[str], list[str]]:
    """Parameter names in the order of nanoGPT's optimizer: the decayed ones, then the others."""
    shapes = _nanogpt_shapes(config)
    return [n for n, s in shapes.items() if len(s) >= 2], [n for n, s in shapes.items() if len(s) < 2]


def _by_name(optimizer: Any, config: GPTConfig, path: Path) -> dict[str, Any]:
    """nanoGPT's optimizer state, by parameter name. Raises UserError if it does not belong to this model."""
    groups, shapes = _numbered(config), _nanogpt_shapes(config)
    names = dict(enumerate([*groups[0], *groups[1]]))
    option = shlex.quote(f"--init_from={path}")
    hint = f"only its weights can be used: {option} starts a new run from them"
    try:
        saved = optimizer["param_groups"]
        border = len(groups[0])
        if [list(group["params"]) for group in saved] != [list(range(border)), list(range(border, len(names)))]:
            raise UserError(f"{path}: the optimizer's groups are not nanoGPT's; {hint}")
        state = {names[number]: dict(slots) for number, slots in optimizer["state"].items()}
        param_groups = [
            {"names": group, **{k: v for k, v in old.items() if k != "params" and _is_simple(v)}}
            for group, old in zip(groups, saved, strict=True)
        ]
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: the optimizer's state is not nanoGPT's ({error!r}); {hint}") from None
    for name, slots in state.items():
        for slot, value in slots.items():
            shape, is_tensor = () if slot == "step" else shapes[name], isinstance(value, torch.Tensor)
            if is_tensor:
                good = is_plain_tensor(value) and tuple(value.shape) == shape and value.is_floating_point()
            else:
                good = slot == "step" and type(value) in (int, float)
            if not good:
                raise UserError(f"{path}: {slot} of {name} in the optimizer is not of shape {shape}; {hint}")
            if is_tensor and not_finite({name: value}):
                raise DamagedError(f"{path}: {slot} of {name} in the optimizer contains values that are not finite")
    return {"state": state, "param_groups": param_groups}


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(type(v) in (int, float) for v in value)
    return type(value) in (bool, int, float, str, type(None))


def _by_number(config: GPTConfig, optimizer: dict[str, Any] | None, flat: dict[str, Any]) -> dict[str, Any]:
    """The state dict of nanoGPT's AdamW; without moments if these are not AdamW's."""
    groups = _numbered(config)
    saved = optimizer or {"state": {}, "param_groups": []}
    of = {name: group for group in saved["param_groups"] for name in group["names"]}
    state: dict[int, dict[str, Any]] = {}
    slots = ("exp_avg", "exp_avg_sq", "step")
    for number, name in enumerate([*groups[0], *groups[1]] if saved["state"] else []):
        if not set(slots) <= set(saved["state"].get(name, ())):
            of, state = {}, {}
            note("note: nanoGPT's AdamW cannot use this optimizer's state and will start with fresh moments")
            break
        # in float32, to which torch's own AdamW would convert them
        state[number] = {slot: torch.as_tensor(saved["state"][name][slot]).float() for slot in slots}
    lr, betas = flat.get("learning_rate", 6e-4), (flat.get("beta1", 0.9), flat.get("beta2", 0.95))
    defaults = torch.optim.AdamW([torch.zeros(1)], lr=lr, betas=betas).defaults
    param_groups, decay = [], flat.get("weight_decay", 0.1)
    for members, weight_decay, first in ((groups[0], decay, 0), (groups[1], 0.0, len(groups[0]))):
        own = {key: value for key, value in of.get(next(iter(members), ""), {}).items() if key in defaults}
        group = {**defaults, "weight_decay": weight_decay, **own}
        group |= {"fused": None, "foreach": None, "capturable": False}  # these depend on the reader's machine
        param_groups.append({**group, "params": list(range(first, first + len(members)))})
    return {"state": state, "param_groups": param_groups}
