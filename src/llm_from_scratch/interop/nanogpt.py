"""nanoGPT's ckpt.pt, read and written.

It is a zip archive that torch.save makes of one dict:

    model           state dict, both names of the tied head, old ones with masks or torch.compile's prefixes
    optimizer       AdamW's state dict; parameters are numbered: all of two or more dimensions, then the others
    model_args      n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout
    iter_num        updates done
    best_val_loss   number or 0-dim tensor
    config          flat settings, `dataset` among them

Its architecture is GPT-2's with the exact GELU. A file is pickled data from elsewhere: the opcodes are looked through
before torch reads them (weights_only), and the contents are checked before anything is built from them.
Source: karpathy/nanoGPT train.py, sample.py, model.py.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import struct
import sys
import typing
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..checkpoint.contents import HEAD, checked_model_config, checked_weights, fits, parameter_shapes, plain_names
from ..checkpoint.hashed_folder import write_file
from ..checkpoint.store import Checkpoint
from ..config import Config, GPTConfig
from ..errors import DamagedError, UserError

if TYPE_CHECKING:
    from ..core.tokenizer import Tokenizer

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
SETTINGS = (
    "out_dir", "eval_interval", "log_interval", "eval_iters", "eval_only", "always_save_checkpoint", "init_from",
    "wandb_log", "wandb_project", "wandb_run_name", "dataset", "gradient_accumulation_steps", "batch_size",
    "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "learning_rate", "max_iters", "weight_decay",
    "beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "backend", "device",
    "dtype", "compile",
)  # fmt: skip
MARK = "llm-from-scratch export; it may be written anew"  # tells our files from the user's
MAX_PICKLE = 4 << 20  # bytes; a model of 48 layers has 0.2 MB of it
MAX_OPCODES, MAX_MADE, MAX_CALLS = 1 << 19, 1 << 18, 1 << 15  # in it; 48 layers: 70,000, 17,000, 7,000
MAX_MEMBERS = 4 << 20  # bytes of the archive's list of members; that of 48 layers has 0.2 MB
GPT2_VOCAB = (50257, 50304)
# What a dict of plain values and tensors is pickled with. torch's own list is longer, and part of it allocates memory
# by a number in the file.
_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage|storage UntypedStorage)"
)
_OPCODES = re.compile(
    r"PROTO|STOP|MARK|GLOBAL|REDUCE|BUILD|BINPERSID|NONE|NEWTRUE|NEWFALSE|EMPTY_(DICT|LIST|TUPLE)|APPENDS?|SETITEMS?"
    r"|TUPLE[123]?|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|BINPUT|LONG_BINPUT|BINGET|LONG_BINGET"
)
_DATASET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def read_nanogpt(path: str | Path, weights_only: bool = False) -> Checkpoint:
    """Reads a ckpt.pt; the tokenizer is left to tokenizer_for(). weights_only leaves the optimizer's state out.

    trainer holds best_val_loss (None where it was none), config those settings that this program has too. Raises
    UserError or DamagedError where the file is not what nanoGPT writes.
    """
    path = Path(path)
    content = load_plain(path)
    if missing := [key for key in ("model", "model_args") if not isinstance(content.get(key), dict)]:
        raise UserError(f"{path} is no checkpoint of nanoGPT's: it has no dict {' and no dict '.join(missing)}")
    args, model = dict(content["model_args"]), content["model"]
    if unknown := sorted(str(key)[:40] for key in args if key not in MODEL_ARGS):
        raise UserError(f"{path} is of another architecture than nanoGPT's: model_args has {', '.join(unknown[:5])}")
    if lacking := [key for key in MODEL_ARGS[:6] if key not in args and key != "bias"]:
        raise UserError(f"{path} is no checkpoint of nanoGPT's: model_args lacks {', '.join(lacking)}")
    config = checked_model_config(args, str(path))
    for name, tensor in model.items():
        if not isinstance(name, str) or not _is_plain_tensor(tensor):
            raise UserError(f"{path}: {str(name)[:80]} of the model is no plain tensor")
    # torch before 2.0 had no fused attention, and nanoGPT then kept the causal masks among the weights
    model = {name: tensor.detach() for name, tensor in model.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}
    weights = checked_weights(model, config, str(path))
    step = content.get("iter_num", 0)
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise UserError(f"{path}: iter_num is {str(step)[:40]!r}, expected a number of updates")
    best = _number(content.get("best_val_loss"))
    optimizer = None
    if not weights_only and content.get("optimizer") is not None:
        optimizer = _by_name(content["optimizer"], config, path)
    return Checkpoint(
        path=path,
        step=step,
        model_config=config,
        model=weights,
        optimizer=optimizer,
        trainer={"best_val_loss": best},
        config=_nested(content.get("config")),
        manifest={"format": "nanogpt", "step": step, "val_loss": best, "run_id": None},
    )


def tokenizer_for(ckpt: Checkpoint, dataset: str | None, needed: bool = True) -> Tokenizer | None:
    """The tokenizer of a checkpoint that holds none: that of `dataset` (a name or folder), else of the dataset that
    the checkpoint names (plain names only, looked up in data/), else GPT-2's where the vocabulary has its size.

    Raises UserError where none is found and one is needed, or the one found is not the model's.
    """
    from ..core.dataset import resolve_dataset
    from ..core.tokenizer import Tokenizer, tokenizer_of

    vocab_size = ckpt.model_config.vocab_size
    found: Tokenizer | None = None
    named = ckpt.config.get("data", {}).get("dataset")
    if dataset is not None:
        found = tokenizer_of(resolve_dataset(dataset))
        if found is None and vocab_size not in GPT2_VOCAB and needed:
            raise UserError(f"dataset {dataset} holds no tokenizer (tokenizer.meta.json or meta.pkl)")
    elif isinstance(named, str) and _DATASET.fullmatch(named):
        try:
            found = tokenizer_of(resolve_dataset(named))
        except UserError as error:
            if needed and vocab_size not in GPT2_VOCAB:
                raise UserError(f"{ckpt.path} needs the tokenizer of its dataset {named!r}: {error}") from None
    if found is None and vocab_size in GPT2_VOCAB and needed:
        found = Tokenizer.from_name("gpt2")
    if found is None and needed:
        raise UserError(
            f"{ckpt.path} holds no tokenizer, and its vocabulary of {vocab_size} is not GPT-2's: "
            "name the dataset that it was trained on with --dataset=NAME_OR_FOLDER"
        )
    if found is not None and vocab_size not in (found.vocab_size, 64 * math.ceil(found.vocab_size / 64)):
        if not needed:
            return None
        raise UserError(
            f"the tokenizer of dataset {dataset or named} has {found.vocab_size} tokens, but {ckpt.path} was trained "
            f"with {vocab_size}: name the right dataset with --dataset=NAME_OR_FOLDER"
        )
    return found


def is_ours(path: Path) -> bool:
    """Whether a ckpt.pt was written by write_nanogpt, and by nobody since. False where there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return MARK.encode() in archive.read(_pickle_member(archive, path))
    except (OSError, zipfile.BadZipFile, UserError, RuntimeError, NotImplementedError):
        return False


def check_nanogpt(path: str | Path, config: GPTConfig, overwrite: bool = False, accept_erf_gelu: bool = False) -> None:
    """Raises UserError where write_nanogpt would: nanoGPT lacks what the model needs, or the file is not ours."""
    path = Path(path)
    plain = GPTConfig(activation="gelu")
    wants = []
    names = ("pos_embedding", "norm", "norm_eps", "activation", "qk_norm", "tie_embeddings", "logit_softcap")
    for name in (*names, "embedding_norm", "max_ngram"):
        value = getattr(config, name)
        if value != getattr(plain, name) and not (name == "activation" and value == "gelu_tanh" and accept_erf_gelu):
            wants.append(f"{name}={value}")
    if config.n_kv_head not in (None, config.n_head):
        wants.append(f"n_kv_head={config.n_kv_head}")
    if config.mlp_hidden not in (None, 4 * config.n_embd):
        wants.append(f"mlp_hidden={config.mlp_hidden}")
    if wants:
        hint = "use --format=hf"
        if wants == ["activation=gelu_tanh"]:
            hint = "--accept_erf_gelu=True writes it all the same, to be run with the exact GELU, a little differently"
        raise UserError(f"nanoGPT's model has no {', '.join(wants)}: {hint}")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file such as {path / 'ckpt.pt'}")
    if path.exists() and not overwrite and not is_ours(path):
        raise UserError(
            f"{path} is not a file that this program wrote, and stays as it is: move it away or name another "
            "(llm-export overwrites it with --overwrite=True)"
        )


def write_nanogpt(
    path: str | Path, checkpoint: Checkpoint, overwrite: bool = False, accept_erf_gelu: bool = False
) -> Path:
    """Writes a ckpt.pt that nanoGPT's train.py (--init_from=resume) and sample.py read; whole or not at all.

    A file of ours is replaced, any other only with overwrite. AdamW's state goes along; another optimizer's cannot, and
    nanoGPT then starts with fresh moments. Raises UserError (see check_nanogpt), SaveError where the disk fails.
    """
    import torch

    path, config = Path(path), checkpoint.model_config
    check_nanogpt(path, config, overwrite, accept_erf_gelu)
    weights = plain_names(checkpoint.model)
    weights[HEAD] = weights["transformer.wte.weight"]  # one storage, as in nanoGPT
    best = _number(checkpoint.trainer.get("best_val_loss")) or _number(checkpoint.manifest.get("val_loss"))
    flat = {key: value for section in checkpoint.config.values() if isinstance(section, dict)
            for key, value in section.items()}  # fmt: skip
    content = {
        "model": weights,
        "optimizer": _by_number(checkpoint, flat),
        "model_args": {name: getattr(config, name) for name in MODEL_ARGS},
        "iter_num": checkpoint.step,
        "best_val_loss": 1e9 if best is None else best,  # nanoGPT's own beginning
        "config": {name: flat[name] for name in SETTINGS if name in flat},
        "written_by": MARK,
    }

    def write(f: IO[bytes]) -> None:
        try:
            torch.save(content, f)
        except RuntimeError as error:  # how torch's archive writer reports a full disk
            raise OSError(str(error).split("\n")[0]) from error

    write_file(path, write)
    return path


def load_plain(path: Path) -> dict[Any, Any]:
    """The dict that torch.save wrote into a file, if it holds plain values and tensors and nothing else.

    Takes about the memory that the file has, whatever it claims. Raises UserError, DamagedError.
    """
    import torch

    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        _check_list_of_members(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
                raise UserError(f"{path} is a compressed archive, not what torch.save writes")
            if sum(m.file_size for m in members) > path.stat().st_size:
                raise DamagedError(f"{path} claims more bytes than it has")
            _look_through(archive.read(_pickle_member(archive, path)), path)
        # memory-mapped tensors would die with a file that nanoGPT writes anew in place
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (UserError, MemoryError):
        raise
    except zipfile.BadZipFile as error:
        raise DamagedError(
            f"{path} is no file that torch.save (1.6 or newer) wrote, or was cut short: {error}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever torch's reader meets in a file that lies
        raise DamagedError(
            f"{path} cannot be read: {str(error).splitlines()[0][:200] if str(error) else error!r}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict")
    return content


def _check_list_of_members(path: Path) -> None:
    """A zip archive's list of its members stands at its end and is read whole."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16) - 22))
        tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        raise DamagedError(f"{path} is no file that torch.save (1.6 or newer) wrote, or was cut short")
    (length,) = struct.unpack_from("<I", tail, at + 12)
    if length == 0xFFFFFFFF and (at64 := tail.rfind(b"PK\6\6")) >= 0 and len(tail) >= at64 + 56:
        (length,) = struct.unpack_from("<Q", tail, at64 + 40)
    if length > MAX_MEMBERS:
        raise UserError(f"{path} has a list of members of {length} bytes: not what torch.save writes")


def _pickle_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    found = [m for m in archive.infolist() if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].file_size > MAX_PICKLE or found[0].compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path} is not what torch.save writes: expected one data.pkl of at most {MAX_PICKLE} bytes")
    return found[0]


def _look_through(pickled: bytes, path: Path) -> None:
    """Raises UserError where the pickle would do more than build plain values, dicts and tensors. Runs none of it."""
    made = calls = 0
    for count, (opcode, arg, _) in enumerate(pickletools.genops(pickled)):
        made += opcode.name[:5] in ("EMPTY", "TUPLE", "MARK", "BUILD")
        calls += opcode.name in ("REDUCE", "BINPERSID")
        if count > MAX_OPCODES or made > MAX_MADE or calls > MAX_CALLS:
            raise UserError(f"{path} holds more values than a checkpoint has")
        if not _OPCODES.fullmatch(opcode.name):
            raise UserError(f"{path} is pickled in a way that torch.save does not use ({opcode.name})")
        if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(arg)):
            raise UserError(f"{path} asks for {str(arg)[:80]!r}: it holds more than plain values and tensors")


def _is_plain_tensor(value: Any) -> bool:
    """A dense tensor that owns the memory for its shape; a view of stride 0 claims more than the file has."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _number(value: Any) -> float | None:
    if _is_plain_tensor(value) and value.numel() == 1:
        value = value.item()
    # compared, because a whole number can be too large to be a float
    return float(value) if type(value) in (int, float) and abs(value) <= sys.float_info.max else None


def _nested(flat: Any) -> dict[str, Any]:
    """nanoGPT's flat settings in our sections: those that we have too, of our type."""
    result: dict[str, Any] = {}
    for section, kind in typing.get_type_hints(Config).items():
        for key, hint in typing.get_type_hints(kind).items():
            if isinstance(flat, dict) and key in SETTINGS and key in flat and fits(flat[key], hint):
                result.setdefault(section, {})[key] = flat[key]
    return result


def _numbered(config: GPTConfig) -> tuple[list[str], list[str]]:
    """Parameter names in the order of nanoGPT's optimizer: the decayed ones, then the others."""
    shapes = parameter_shapes(config)
    return [n for n, s in shapes.items() if len(s) >= 2], [n for n, s in shapes.items() if len(s) < 2]


def _by_name(optimizer: Any, config: GPTConfig, path: Path) -> dict[str, Any]:
    """nanoGPT's optimizer state, by parameter name. Raises UserError where it is not that of this model."""
    import torch

    from ..checkpoint.contents import not_finite

    groups, shapes = _numbered(config), parameter_shapes(config)
    names = [*groups[0], *groups[1]]
    hint = f"only its weights can be used: --init_from={path} starts a new run from them"
    try:
        saved = optimizer["param_groups"]
        numbers = [list(group["params"]) for group in saved]
        if numbers != [list(range(len(groups[0]))), list(range(len(groups[0]), len(names)))]:
            raise UserError(f"{path}: the optimizer's groups are not nanoGPT's; {hint}")
        state: dict[str, dict[str, Any]] = {}
        for number, slots in optimizer["state"].items():
            name = names[number]
            for slot, value in slots.items():
                shape = () if slot == "step" else shapes[name]
                if isinstance(value, torch.Tensor):
                    good = _is_plain_tensor(value) and tuple(value.shape) == shape and value.is_floating_point()
                else:
                    good = slot == "step" and type(value) in (int, float)
                if not good:
                    raise UserError(f"{path}: {slot} of {name} in the optimizer is not of shape {shape}; {hint}")
                if isinstance(value, torch.Tensor) and not_finite({name: value}):
                    raise DamagedError(f"{path}: {slot} of {name} in the optimizer holds numbers that are not finite")
            state[name] = dict(slots)
        param_groups = [
            {"names": group, **{k: v for k, v in old.items() if k != "params" and _is_simple(v)}}
            for group, old in zip(groups, saved, strict=True)
        ]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: the optimizer's state is not nanoGPT's ({error!r}); {hint}") from None
    return {"state": state, "param_groups": param_groups}


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(type(v) in (int, float) for v in value)
    return type(value) in (bool, int, float, str, type(None))


def _by_number(checkpoint: Checkpoint, flat: dict[str, Any]) -> dict[str, Any]:
    """The state dict of nanoGPT's AdamW; without moments where the checkpoint has none that AdamW could use."""
    import torch

    groups = _numbered(checkpoint.model_config)
    names = [*groups[0], *groups[1]]
    saved = checkpoint.optimizer or {"state": {}, "param_groups": []}
    of = {name: group for group in saved["param_groups"] for name in group["names"]}
    state: dict[int, dict[str, Any]] = {}
    slots = {"step", "exp_avg", "exp_avg_sq"}
    if saved["state"]:
        if all(slots <= set(saved["state"].get(name, ())) for name in names):
            # in float32, whatever the run keeps them in: torch's own AdamW would, once it has read them
            state = {
                i: {slot: torch.as_tensor(saved["state"][name][slot]).float() for slot in sorted(slots)}
                for i, name in enumerate(names)
            }
        else:
            of = {}
            print("note: nanoGPT's AdamW cannot use this optimizer's state and will start afresh", file=sys.stderr)
    defaults = torch.optim.AdamW(
        [torch.nn.Parameter(torch.zeros(1))],
        lr=flat.get("learning_rate", 6e-4),
        betas=(flat.get("beta1", 0.9), flat.get("beta2", 0.95)),
    ).defaults
    param_groups = []
    decay = flat.get("weight_decay", 0.1)
    for members, weight_decay, first in ((groups[0], decay, 0), (groups[1], 0.0, len(groups[0]))):
        own = {key: value for key, value in of.get(next(iter(members), ""), {}).items() if key in defaults}
        group = {**defaults, "weight_decay": weight_decay, **own}
        group |= {"fused": None, "foreach": None, "capturable": False}  # the reader's machine is not ours
        param_groups.append({**group, "params": list(range(first, first + len(members)))})
    return {"state": state, "param_groups": param_groups}
