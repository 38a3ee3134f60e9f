"""The one loader: a run's folder, a step folder, a ckpt.pt, a Hugging Face folder or name to a Checkpoint."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..interop import GPT2_NAMES, is_hub_id, is_peft
from .adapter import weights_hash
from .contents import Checkpoint, is_dataset_name, load_checkpoint, stored_option
from .store import locate, valid_which

if TYPE_CHECKING:
    from ..core.tokenizer import Tokenizer

GPT2_VOCAB = (50257, 50304)
MAX_CHAIN = 8  # adapters of adapters


def load(
    where: str | Path, which: str | int | None = None, dataset: str | None = None, weights_only: bool = False,
    need_tokenizer: bool = True, set_aside: bool = False, merge: bool = True,
    depth: int = 0, lazily: bool = False,
) -> Checkpoint:  # fmt: skip
    """Weights, configuration and tokenizer from any kind of model source. For runs, `which` is as in find_checkpoint.

    dataset: a name or folder with the tokenizer, if the weights have none. A ckpt.pt names its dataset, which is
    looked up in data/. Without a dataset, a vocabulary of GPT-2's size is taken as GPT-2's. weights_only skips the
    optimizer and the random states. An adapter is merged into its base; with merge=False, `model` is the base. depth:
    number of adapters that were loaded on the way to this one. lazily: as in load_checkpoint. Raises UserError if
    nothing is found, or if need_tokenizer is set and there is no tokenizer.
    """
    if is_pretrained(where, hub=which is None and depth == 0):  # a file never names what to download
        return load_hf(where, dataset, need_tokenizer, depth)
    which = valid_which(which)
    found = locate(
        Path(where), which, set_aside, lambda path: load_checkpoint(path, weights_only, lazily),
        lambda path: _load_nanogpt(path, weights_only),
    )  # fmt: skip
    if isinstance(which, int) and found.step != which:
        raise UserError(f"{found.path} is at step {found.step}, not {which}: remove --which")
    if found.base is not None:
        _add_base(found, merge, depth)
    if found.tokenizer is None:
        found.tokenizer = _tokenizer_for(found, dataset, need_tokenizer)
    return found


def _add_base(found: Checkpoint, merge: bool, depth: int) -> None:
    """Loads the weights that an adapter was trained on. Raises UserError if they are gone or have changed."""
    from ..core.adapters import merged
    from ..core.weights import cropped

    base, config, path = found.base, found.model_config, found.path
    assert base is not None and path is not None
    places = base.places(path.parent)
    place = next((p for p in places if is_pretrained(p, hub=False) or os.path.lexists(p)), None)
    if place is None or Path(place).resolve() in (path.resolve(), path.parent.resolve()):
        raise UserError(f"{path} is an adapter of {places[0]}, which does not exist: restore that model")
    loaded = _load_base(path, place, depth)
    shape = dataclasses.replace(loaded.model_config, dropout=config.dropout, block_size=config.block_size)
    if weights_hash(loaded.model) != base.sha256 or shape != config:
        raise UserError(
            f"{path} is an adapter of {place}, which has changed since the adapter was trained (the SHA-256 of its "
            "weights differs): restore the original"
        )
    found.model = cropped(loaded.model, loaded.model_config, config.block_size)
    if merge:
        found.model = merged(config, found.model, found.adapter, base.scale)


def _load_base(path: Path, place: str, depth: int) -> Checkpoint:
    """The model that the adapter in path was trained on. Raises UserError."""
    if depth == MAX_CHAIN:
        raise UserError(f"{path}: more than {depth} adapters on top of each other; use an earlier one")
    try:
        return load(place, weights_only=True, need_tokenizer=False, depth=depth + 1)
    except UserError as error:
        raise UserError(f"{path} is an adapter of {place}, which cannot be loaded: {error}") from None


def load_hf(
    where: str | Path, dataset: str | None = None, need_tokenizer: bool = True, depth: int = 0
) -> Checkpoint:  # fmt: skip
    """Weights from a GGUF file, a folder in Hugging Face's format, or by name from the hub; peft's adapters are merged
    into their base. depth: as in load(). Raises UserError."""
    from ..interop.gguf import load_gguf
    from ..interop.hf import load_pretrained, read_config
    from ..interop.hf_files import get_folder

    if is_peft(Path(where)):
        return _load_peft(Path(where), dataset, need_tokenizer, depth)
    if is_hub_id(str(where)):  # its folder in the cache, by which an adapter finds its base
        where = get_folder(where, read_config)
    config, weights, tokenizer = load_gguf(Path(where)) if is_gguf(Path(where)) else load_pretrained(where)
    found = Checkpoint(Path(where), 0, config, weights)
    if tokenizer is None and need_tokenizer and dataset is None and (Path(where) / "tokenizer.model").is_file():
        way = f"transformers' AutoTokenizer.from_pretrained({str(where)!r}).save_pretrained({str(where)!r}) writes one"
        raise UserError(f"{where} has a tokenizer.model, but a tokenizer.json is needed: {way}")
    found.tokenizer = tokenizer or _tokenizer_for(found, dataset, need_tokenizer)
    return found


def _load_peft(folder: Path, dataset: str | None, need_tokenizer: bool, depth: int) -> Checkpoint:
    from ..core.adapters import merged
    from ..interop.hf_tokenizer import read_tokenizer
    from ..interop.peft import base_of, read_peft

    base = _load_base(folder, base_of(folder), depth)
    config, own = base.model_config, read_tokenizer(folder, gpt2=False)
    if own is not None and own.vocab_size > int(config.vocab_size or 0):
        raise UserError(f"{folder}: the tokenizer has {own.vocab_size} ids, the model only {config.vocab_size}")
    found = Checkpoint(folder, 0, config, merged(config, base.model, read_peft(folder, config), 1.0))
    found.tokenizer = own or base.tokenizer or _tokenizer_for(found, dataset, need_tokenizer)
    return found


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def tokenizer_place(name: str) -> str:
    """The folder with the tokenizer of owner/name on Hugging Face, downloaded if needed; another name as it is. Raises
    UserError."""
    if not is_hub_id(name) or name.endswith(".json"):
        return name
    from ..interop.hf_files import get_tokenizer_folder

    return str(get_tokenizer_folder(name))


def named_tokenizer(name: str, texts: Iterable[str] | None = None) -> Tokenizer:
    """Tokenizer.from_name, and also the tokenizer of a GGUF file. Raises UserError."""
    from ..core.tokenizer import Tokenizer

    if not is_gguf(Path(name)):
        return Tokenizer.from_name(name, texts)
    from ..interop.gguf import load_tokenizer

    return load_tokenizer(Path(name))


def is_pretrained(where: str | Path, hub: bool = True) -> bool:
    """Whether this is a GPT-2 name, a GGUF file or a folder in Hugging Face's format (or an adapter in peft's), not a
    run or a checkpoint. hub: or owner/name of a model on Hugging Face."""
    path = Path(where)
    # os.path, not Path: False on an I/O error, which the reader of the folder reports
    is_folder = os.path.isfile(path / "config.json") or is_peft(path)
    is_folder = is_folder and not os.path.isfile(path / "MANIFEST.json")
    is_name = (str(where) in GPT2_NAMES and not path.exists()) or (hub and is_hub_id(str(where)))
    return is_folder or path.suffix == ".gguf" or is_name


def _load_nanogpt(path: Path, weights_only: bool) -> Checkpoint:
    from ..interop.nanogpt import read_nanogpt

    read = read_nanogpt(path, weights_only)
    best = read.best_val_loss
    return Checkpoint(
        path, read.step, read.config, read.weights, read.optimizer, trainer={"best_val_loss": best},
        config=read.settings, manifest={"format": "nanogpt", "step": read.step, "val_loss": best, "run_id": None},
    )  # fmt: skip


def _tokenizer_for(ckpt: Checkpoint, dataset: str | None, needed: bool = True) -> Tokenizer | None:
    """The tokenizer for a checkpoint without one: that of `dataset` (a name or folder), else of the dataset that the
    checkpoint names (plain names only, looked up in data/), else GPT-2's if the vocabulary has its size.

    Raises UserError if none is found and one is needed, or if it is not the model's.
    """
    from ..core.dataset import resolve_dataset
    from ..core.tokenizer import Tokenizer, tokenizer_of

    vocab_size = ckpt.model_config.vocab_size
    found: Tokenizer | None = None
    named, is_gpt2 = ckpt.config.get("data", {}).get("dataset"), vocab_size in GPT2_VOCAB
    if dataset is not None:
        found = tokenizer_of(resolve_dataset(dataset))
        if found is None and not is_gpt2 and needed:
            raise UserError(f"dataset {dataset} does not have a tokenizer (tokenizer.meta.json or meta.pkl)")
    elif is_dataset_name(named):
        try:
            found = tokenizer_of(resolve_dataset(named))
        except UserError as error:
            if needed and not is_gpt2:
                raise UserError(f"{ckpt.path} needs the tokenizer of its dataset {named!r}: {error}") from None
    if found is None and is_gpt2 and needed:
        found = Tokenizer.from_name("gpt2")
    if found is None and needed:
        raise UserError(
            f"{ckpt.path} does not have a tokenizer, and its vocabulary of {vocab_size} is not GPT-2's: "
            f"name the dataset that it was trained on with {shlex.quote(stored_option('dataset', named))}"
        )
    if found is not None and vocab_size not in (found.vocab_size, 64 * math.ceil(found.vocab_size / 64)):
        if not needed:
            return None
        raise UserError(
            f"the tokenizer of dataset {dataset or named} has {found.vocab_size} ids, but {ckpt.path} was trained "
            f"with {vocab_size}: name the right dataset with --dataset=NAME_OR_FOLDER"
        )
    return found
