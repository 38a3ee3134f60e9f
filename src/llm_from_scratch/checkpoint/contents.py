"""A checkpoint's contents: saved, loaded, checked against GPT(config) on the meta device.

    out_dir/step-00000250/
        model.safetensors  optimizer.safetensors  rng.safetensors      tensors
        optimizer.json  trainer.json  config.json  model.json          plain data
        tokenizer.meta.json ...                                        what Tokenizer.save writes
        adapter.safetensors  adapter.json                              instead of model.safetensors: see adapter.py
        reference.safetensors                                          of a run with --loss=dpo
        model-00001-of-00004.safetensors ...                           of four processes, likewise: see shards.py
        MANIFEST.json                                                  step, run id, val loss, sizes and hashes

No pickle: reading a checkpoint runs no code. Torch is imported when tensors are needed: it takes seconds.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config import GPTConfig
from ..errors import DamagedError, UserError
from ..machine.team import ALONE, Team
from ..mixture import read_mixture
from . import hashed_folder
from .adapter import Base, read_base
from .hashed_folder import MANIFEST, from_json, read_member, to_json, with_own_hash, write_synced
from .shards import SHARD, Joined, OnDisk, Place, SlotsOnDisk, file_name, files_of, metadata_of, places_in

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.tokenizer import Tokenizer

FORMAT = {"format": "llm-from-scratch-checkpoint", "version": 1}
VERSION_OF_SHARDS = 2
REFERENCE = "reference.safetensors"  # in a run's folder if its checkpoints are from before they held it
OWN_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors",
             "optimizer.json", "trainer.json", "config.json", "model.json",
             "adapter.safetensors", "adapter.json", REFERENCE)  # fmt: skip
MAX_HEADER = 2 << 20  # bytes of a safetensors header, which opens to twenty times as much; 48 layers have 0.2 MB
MAX_PATH = 4096  # characters


@dataclass
class Checkpoint:
    """The state of a run after `step` updates. Tensors are on the CPU, or on disk until they are asked for.

    model: state dict with both names of a tied head; empty if there is an adapter and its base is not loaded (see
    load.py). adapter: {name: A or B} as in core/adapters.py; base: what it adapts (adapter.py). optimizer:
    {"state": {parameter name: {slot: tensor or number}}, "param_groups": [{"names": [...], "lr": ..., ...}]}, or None.
    trainer: plain data. config: {section: {leaf: value}}. parts: of several processes that save together, where the
    tensors belong that are parts of others, by their names in the files. reference: the content of
    reference.safetensors, which training/preferences.py reads and writes.
    """

    path: Path | None
    step: int
    model_config: GPTConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    adapter: dict[str, Tensor] = field(default_factory=dict)
    base: Base | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Place] = field(default_factory=dict)
    reference: bytes | None = None


def write_checkpoint(
    out_dir: str | Path, *, run_id: str, val_loss: float | None = None, dataset_hash: str | None = None,
    team: Team = ALONE, **contents: Any,
) -> Path:  # fmt: skip
    """Writes out_dir/step-<step> and reads it back. A checkpoint of the same step is replaced.

    contents: fields of Checkpoint, from step to tokenizer. team: processes that call this together, each with the
    tensors that it writes. Raises SaveError if the disk fails, UserError if a tensor is not finite; out_dir then holds
    what it held before.
    """
    import torch
    from torch import Tensor

    from ..core.weights import buffers, file_of, not_finite, plain_names, tied_names

    saved = Checkpoint(path=None, **contents)
    weights, moments, numbers = dict[str, Tensor](), dict[str, Tensor](), dict[str, Any]()

    def prepare() -> None:
        state = plain_names(saved.model)
        for name, first in tied_names(saved.model_config).items():  # a tied tensor is stored under its first name
            if name in state and first in state and state[name].data_ptr() == state[first].data_ptr():
                del state[name]
        weights.update(portable(state | saved.adapter))
        tensors, plain = split_optimizer(saved.optimizer)
        moments.update(tensors)
        numbers.update(plain)
        if bad := not_finite(weights, buffers(saved.model_config)) or not_finite(moments):
            raise UserError(
                f"step {saved.step} is not saved: {bad} contains values that are not finite; try a lower learning_rate"
            )

    team.all(prepare)

    def tensor_file(tensors: dict[str, Tensor]) -> Iterable[Any]:
        return file_of(tensors, **metadata_of({name: saved.parts[name] for name in tensors if name in saved.parts}))

    def named(kind: str) -> str:
        return file_name(kind, team.rank, team.size)

    parts: dict[str, Callable[[], Iterable[Any]]] = {
        named("adapter" if saved.base else "model"): lambda: tensor_file(weights),
        named("optimizer"): lambda: tensor_file(moments),
    }
    if team.is_first:
        parts |= {
            "rng.safetensors": lambda: file_of(portable(saved.rng)),
            "optimizer.json": lambda: [to_json(numbers)],
            "trainer.json": lambda: [to_json(saved.trainer)],
            "config.json": lambda: [to_json(saved.config)],
            "model.json": lambda: [to_json(dataclasses.asdict(saved.model_config))],
        }
    if (reference := saved.reference) is not None and team.is_first:
        parts[REFERENCE] = lambda: [reference]
    if saved.base is not None and team.is_first:
        parts["adapter.json"] = lambda: [to_json(vars(saved.base))]
    fields = {
        **FORMAT,
        "version": FORMAT["version"] if team.size == 1 else VERSION_OF_SHARDS,
        "step": saved.step,
        "run_id": run_id,
        "val_loss": float(val_loss) if val_loss is not None and math.isfinite(val_loss) else None,
        "dataset_sha256": dataset_hash,
        "versions": {"llm_from_scratch": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    final = Path(out_dir) / f"step-{saved.step:08d}"
    save_tokenizer = saved.tokenizer.save if saved.tokenizer is not None else None
    hashed_folder.write_folder(final, parts, fields, save_tokenizer, team)
    return final


def load_checkpoint(path: str | Path, weights_only: bool = False, lazily: bool = False) -> Checkpoint:
    """Reads a step directory. Every file is checked against the manifest before its content is used.

    weights_only skips the optimizer and the random states (neither read nor checked). lazily: the tensors of the model
    and of the optimizer are read again each time they are asked for (shards.OnDisk), for processes that need a part of
    each. Raises DamagedError if the checkpoint differs from what was written, UserError if it cannot be read.
    """
    from safetensors.torch import load
    from torch import Tensor

    from ..core import weights
    from ..core.adapters import checked_adapter

    path = Path(path)
    manifest = read_manifest(path)

    def plain(name: str) -> dict[str, Any]:
        return from_json(read_member(path, name, manifest), path / name)

    def tensors(kind: str) -> dict[str, Tensor]:
        names, size = files_of(kind, manifest["files"]), 0
        for name in names:
            size += manifest["files"].get(name, {"size": 0})["size"]
        joined = Joined(size)
        for name in names:
            data = read_member(path, name, manifest)
            try:
                if int.from_bytes(data[:8], "little") > MAX_HEADER:
                    raise ValueError(f"its header is larger than {MAX_HEADER} bytes")
                joined.add(load(data), places_in(data))
            except Exception as error:  # the library's own errors, and those of a wrong header
                raise DamagedError(f"{path / name}: {error}") from None
        try:
            return joined.whole()
        except ValueError as error:
            raise DamagedError(f"{path}: {error}") from None

    def on_disk(kind: str) -> OnDisk:
        names = [name for name in files_of(kind, manifest["files"]) if name in manifest["files"]]
        hashed_folder.verify(path, names)
        try:
            return OnDisk(path, names, sum(manifest["files"][name]["size"] for name in names))
        except Exception as error:
            raise DamagedError(f"{path}: {error}") from None

    model_config = weights.checked_model_config(plain("model.json"), str(path))
    found, shapes = Checkpoint(path, manifest["step"], model_config, {}, manifest=manifest), dict[str, Tensor]()
    if "adapter.json" in manifest["files"]:
        found.base = read_base(plain("adapter.json"), str(path))
        found.adapter = tensors("adapter")
        weights.expected_tensors(model_config, len(found.adapter), str(path))  # before a model of this size is built
        checked_adapter(found.adapter, model_config, found.base.rank, str(path))
    elif lazily:
        model = on_disk("model")
        shapes = weights.checked_weights(model.meta, model_config, str(path), numbers=False)
        model.other_names = {name: first for name, first in weights.tied_names(model_config).items() if name in shapes}
        if bad := weights.not_finite(model, weights.buffers(model_config)):
            raise DamagedError(f"{path}: {bad} contains values that are not finite")
        found.model = model  # type: ignore[assignment]  # what reads weights needs no more than a mapping
    else:
        found.model = shapes = weights.checked_weights(tensors("model"), model_config, str(path))
    if not weights_only:
        moments = on_disk("optimizer") if lazily else tensors("optimizer")
        found.optimizer = join_optimizer(moments, plain("optimizer.json"), shapes | found.adapter, str(path))
        found.rng = tensors("rng")
        if REFERENCE in manifest["files"]:
            found.reference = read_member(path, REFERENCE, manifest)
    if others := [name for name in manifest["files"] if name not in OWN_FILES and not SHARD.fullmatch(name)]:
        from ..core.tokenizer import Tokenizer

        for name in others:
            read_member(path, name, manifest)
        found.tokenizer = Tokenizer.load(path)
    found.trainer, found.config = plain("trainer.json"), plain("config.json")
    return found


def verify_checkpoint(path: Path) -> Path:
    """The path of a checkpoint that load_checkpoint accepts. Raises what load_checkpoint raises."""
    load_checkpoint(path)
    return path


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a step directory, checked. Raises DamagedError, or UserError for another version."""
    manifest = hashed_folder.read_manifest(path)
    if manifest.get("format") != FORMAT["format"]:
        raise DamagedError(
            f"{path} is not a checkpoint: its format is {str(manifest.get('format'))[:40]!r}, "
            f"expected {FORMAT['format']!r}"
        )
    if manifest.get("version") not in (FORMAT["version"], VERSION_OF_SHARDS):
        raise UserError(f"{path} has format version {manifest.get('version')}; this program reads versions 1 and 2")
    step, loss = manifest.get("step"), manifest.setdefault("val_loss", None)
    is_loss = loss is None or (type(loss) is float and math.isfinite(loss))
    if type(step) is not int or not 0 <= step < 1 << 53 or not is_loss:
        raise DamagedError(f"{path / MANIFEST}: step or val_loss is not a number in range")
    return manifest


def write_run_id(path: Path, run_id: str) -> None:
    """Makes a copy of a step directory that of another run. Raises DamagedError."""
    manifest = read_manifest(path)
    trainer = from_json(read_member(path, "trainer.json", manifest), path)
    entry = write_synced(path / "trainer.json", [to_json({**trainer, "run_id": run_id})])
    files = {**manifest["files"], "trainer.json": entry}
    write_synced(path / MANIFEST, [with_own_hash({**manifest, "run_id": run_id, "files": files})])


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the run that wrote a step directory: {section: {leaf: value}}. Raises DamagedError."""
    return from_json(read_member(path, "config.json", read_manifest(path)), path)


def is_dataset_name(value: object) -> bool:
    """Whether a stored dataset is a name, looked up in data/, or a mixture of names. A path from a checkpoint is never
    followed."""
    if not isinstance(value, str):
        return False
    try:
        names = [part.name for part in read_mixture(value)]
    except UserError:
        return False
    return all(Path(n).name == n and n[:1] not in ("", ".") for n in names or [value])


def stored_option(name: str, stored: object) -> str:
    """--NAME=VALUE with a value from a checkpoint, for a message; without the value if it could hide a command."""
    option = f"--{name}={stored}"
    is_shown = isinstance(stored, str) and stored and option.isprintable() and len(option) <= MAX_PATH
    return option if is_shown else f"--{name}={'NAME_OR_FOLDER' if name == 'dataset' else 'TASKS'}"


def check_storable(state: dict[str, Tensor], config: GPTConfig) -> None:
    """Raises UserError if a checkpoint of this model state would be refused, now or when it is loaded."""
    from ..core.weights import STORED, checked_weights, plain_names

    for name, tensor in plain_names(state).items():
        kind = str(getattr(tensor, "dtype", type(tensor).__name__))
        if kind not in STORED or str(tensor.layout) != "torch.strided":
            raise UserError(f"this model cannot be saved: {name} is {kind}, expected a dense float, integer or bool")
    try:
        checked_weights(state, config, "the model")
    except DamagedError as error:
        raise UserError(
            f"this model cannot be saved, because GPT(config) would not load it again: {error}. GPT.__init__ must "
            "create every parameter and persistent buffer from the configuration alone"
        ) from None


def portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the form needed for a file: dense, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def split_optimizer(optimizer: dict[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state (see Checkpoint) as tensors named "<parameter>/<slot>", and the rest as plain data."""
    if optimizer is None:
        return {}, {}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, slots in optimizer["state"].items():
        numbers[name] = {slot: value for slot, value in slots.items() if not hasattr(value, "detach")}
        tensors |= {f"{name}/{slot}": value for slot, value in slots.items() if hasattr(value, "detach")}
    groups = [{k: v.item() if hasattr(v, "item") else v for k, v in g.items()} for g in optimizer["param_groups"]]
    return portable(tensors), {"state": numbers, "param_groups": groups}


def join_optimizer(
    tensors: Mapping[str, Tensor], plain: dict[str, Any], model: dict[str, Tensor], where: str
) -> dict[str, Any] | None:
    """Rejoins the parts from split_optimizer. Raises DamagedError if they do not fit the model."""
    from ..core.weights import not_finite

    if not plain and not tensors:
        return None
    try:
        state: dict[str, Any] = {name: dict(slots) for name, slots in plain["state"].items()}
        for key, tensor in (tensors.meta if isinstance(tensors, OnDisk) else tensors).items():
            name, _, slot = key.rpartition("/")
            own = model[name].shape
            one_per_row = (*own[:1], *[1] * (len(own) - 1))
            if tensor.dim() and tensor.shape not in (own, one_per_row):
                raise DamagedError(f"{where}: {key} of the optimizer has shape {tuple(tensor.shape)}")
            state[name][slot] = tensor
        groups = [
            {k: tuple(v) if isinstance(v, list) and k != "names" else v for k, v in group.items()}
            for group in plain["param_groups"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedError(f"{where}: the optimizer's state does not fit the model ({error!r})") from None
    if bad := not_finite(tensors):
        raise DamagedError(f"{where}: {bad} of the optimizer contains values that are not finite")
    if isinstance(tensors, OnDisk):
        state = {name: SlotsOnDisk(name, slots, tensors) for name, slots in state.items()}
    return {"state": state, "param_groups": groups}
