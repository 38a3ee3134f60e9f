"""Folders in Hugging Face's format as files: downloaded, read tensor by tensor, written atomically. Reading runs no
code from the folder: safetensors, JSON, and pickled tensors after an inspection of the opcodes."""

from __future__ import annotations

import pickle
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, first_line, one_line
from ..machine.extras import require
from ..machine.files import read_json, temporary_folder
from . import GPT2_NAMES, is_hub_id
from .torch_file import load_plain

FETCHED = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
FETCHED += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
FETCHED += ["chat_template.jinja", "generation_config.json"]  # the ids that end a turn
BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")  # constants in old files


def get_folder(name_or_folder: str | Path, check: Callable[[Path], Any]) -> Path:
    """A local folder, or a model's folder in Hugging Face's cache, downloaded if needed. check: called with a folder
    that may contain only config.json, before gigabytes are downloaded. Raises UserError if there is no such folder and
    it cannot be downloaded."""
    folder, name = Path(name_or_folder).expanduser(), str(name_or_folder)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() and name not in GPT2_NAMES:
        raise UserError(f"{folder} does not contain config.json: expected a folder in Hugging Face's format")
    if name not in GPT2_NAMES and not is_hub_id(name):
        raise UserError(
            f"{name!r} is not a folder or a Hugging Face name: expected {', '.join(GPT2_NAMES)} or owner/name"
        )
    require("huggingface_hub", "hf", f"{name!r} is not a local folder, and a download", "name a folder")
    check(_download(name, FETCHED[:1]))
    folder = _download(name, FETCHED)
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{name!r} does not have safetensors weights on Hugging Face (offline: in its cache). Other formats "
            "are not downloaded."
        )
    return folder


def get_tokenizer_folder(name: str) -> Path:
    """The folder in Hugging Face's cache with the tokenizer of owner/name, downloaded if needed. Raises UserError."""
    require("huggingface_hub", "hf", f"{name!r} is not a local folder, and a download", "name a folder")
    folder = _download(name, [file for file in FETCHED if not file.startswith("model")])
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{name!r} does not have a tokenizer.json on Hugging Face (offline: in its cache)")
    return folder


def _download(name: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the client raises its own errors, httpx's and OSError
        kind = type(error).__name__
        if re.search("LocalEntryNotFound|Connect|Offline|Timeout", kind):
            raise UserError(f"Cannot load {name!r}: no such folder, and Hugging Face could not be reached.") from None
        if kind == "RepositoryNotFoundError":
            raise UserError(
                f"Cannot load {name!r}: no such folder, and Hugging Face does not have this model."
            ) from None
        reason = first_line(error)
        raise UserError(f"Cannot load {name!r}: no such folder, and the download failed ({kind}: {reason}).") from None


def cached_folder(name: str) -> Path | None:
    """A model's folder in Hugging Face's cache, if it is there."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=FETCHED, local_files_only=True))
    except Exception:  # the client raises its own errors; without it there is no cache
        return None


def check_push(name: str) -> None:
    """Raises UserError if push() could not work: before a model is exported for it."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise UserError(f"--push={name} is not a Hugging Face name: expected owner/name")
    require("huggingface_hub", "hf", "--push", "upload the files yourself")


def push(path: Path, name: str) -> None:
    """Uploads a folder or a file to a model on the hub, which is created (private) if it does not exist."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repo = api.create_repo(name, private=True, exist_ok=True).repo_id
        if path.is_dir():
            api.upload_folder(repo_id=repo, folder_path=path)
        else:
            api.upload_file(repo_id=repo, path_or_fileobj=path, path_in_repo=path.name)
    except Exception as error:  # the client raises its own errors, httpx's and OSError
        again = shlex.join(["hf", "upload", name, str(path)])
        raise UserError(
            f"{path} is complete, but was not uploaded to {name} ({type(error).__name__}: {first_line(error)}). Log in "
            f"with hf auth login, then upload it with: {again}"
        ) from None
    print(f"uploaded {path} to {repo}")


def open_weights(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """{full name: function that reads the tensor} for the weights of a folder. Raises UserError for damage."""
    found: dict[str, Callable[[], Tensor]] = {}
    for file in _weight_files(folder):
        with damage_is_a_user_error(file):
            if file.suffix == ".safetensors":
                found |= open_tensors(file)
            else:
                loaded = load_plain(file)
                if not all(isinstance(t, Tensor) for t in loaded.values()):
                    raise UserError(f"{file} is not a dictionary of tensors")
                found |= {str(key): partial(Tensor.detach, tensor) for key, tensor in loaded.items()}
    if not any(key.startswith(("transformer.", "model.")) for key in found):  # saved without the head
        gpt2 = ("wte.", "wpe.", "h.", "ln_f.")
        prefixes = {key: "transformer." if key.startswith(gpt2) else "model." for key in found}
        found = {key if key.startswith("lm_head.") else prefixes[key] + key: read for key, read in found.items()}
    return {key: read for key, read in found.items() if not BUFFERS.search(key)}


def open_tensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    """{name: function that reads the tensor} of a safetensors file."""
    handle = safe_open(file, framework="pt")
    return {key: partial(handle.get_tensor, key) for key in handle.keys()}  # noqa: SIM118


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name when the block ends. Raises UserError if there is one with
    content, or if it cannot be written."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not an empty folder: name a new one, or remove it first")
        with temporary_folder(folder) as made:
            yield made
            if folder.is_dir():
                folder.rmdir()  # empty; Windows cannot rename onto it
            made.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index} does not contain weight_map: expected the file of each tensor")
            for shard in shards.values():
                if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
                    raise UserError(f"{index} names {one_line(shard)!r}, which is not a file in the same folder")
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise UserError(
        f"{folder} does not contain weights: expected model.safetensors (or its shards), or pytorch_model.bin"
    )


@contextmanager
def damage_is_a_user_error(path: Path | str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"the weights in {path} are damaged or cannot be read: {one_line(error)}") from None
