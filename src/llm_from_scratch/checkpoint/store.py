"""Checkpoints of a run: saving, finding the right one, keeping what is needed, moving an earlier run aside.

    out_dir/step-00000250/
        model.safetensors  optimizer.safetensors  rng.safetensors      tensors
        optimizer.json  trainer.json  config.json  model.json          plain data
        tokenizer.meta.json ...                                        what Tokenizer.save writes
        MANIFEST.json                                                  step, run id, val loss, sizes and hashes

No pickle: reading a checkpoint runs no code. sealed.py writes such a folder so that it is whole or absent, state.py
checks the contents, nanogpt_ckpt.py reads and writes nanoGPT's ckpt.pt. An older checkpoint is removed only when a
newer one has been read back. Which one is newest is said by the manifests, not by names or clocks. Nothing here imports
torch before tensors are wanted, so that a missing checkpoint is reported at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import __version__
from ..config import GPTConfig
from ..errors import DamagedError, SaveError, UserError
from . import hashed_folder as sealed
from .hashed_folder import MANIFEST, from_json, read_member, to_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.tokenizer import Tokenizer

__all__ = [
    "Checkpoint", "DamagedError", "SaveError", "archive_previous", "clean_leftovers", "find_checkpoint",
    "list_checkpoints", "load_any", "load_checkpoint", "prune", "save_checkpoint", "verify_checkpoint", "write_nanogpt",
]  # fmt: skip
FORMAT = {"format": "llm-from-scratch-checkpoint", "version": 1}
OWN_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors",
             "optimizer.json", "trainer.json", "config.json", "model.json")  # fmt: skip
MAX_HEADER = 2 << 20  # bytes of a safetensors header, which opens to twenty times as much; 48 layers have 0.2 MB
RUN_FILES = ("metrics.jsonl", "samples.jsonl", "loss.png", "tensorboard")  # what a run leaves beside its checkpoints
_STEP = re.compile(r"step-(\d{1,15})(\.old)?")
T = TypeVar("T")


@dataclass
class Checkpoint:
    """The state of a run after `step` updates. Tensors lie on the CPU.

    model: state dict with both names of a tied head. optimizer: {"state": {parameter name: {slot: tensor or number}},
    "param_groups": [{"names": [...], "lr": ..., ...}]}, or None. trainer: plain data. config: {section: {leaf: value}}.
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
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Entry:
    """A step directory; manifest is None where it cannot be read, and step is then taken from the name."""

    step: int
    path: Path
    manifest: dict[str, Any] | None

    @property
    def val_loss(self) -> float | None:
        return self.manifest["val_loss"] if self.manifest else None


def save_checkpoint(
    out_dir: str | Path,
    *,
    step: int,
    model_config: GPTConfig,
    model: dict[str, Tensor],
    run_id: str,
    optimizer: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    rng: dict[str, Tensor] | None = None,
    config: dict[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    val_loss: float | None = None,
    dataset_hash: str | None = None,
    keep_last: int | None = None,
    keep_every: int | None = None,
) -> Path:
    """Writes out_dir/step-<step> (fields: see Checkpoint), verifies it, then prunes where keep_last is given.

    A checkpoint of the same step is replaced. Raises SaveError where the disk fails, UserError where a tensor is not
    finite; out_dir then holds what it held before.
    """
    import torch

    from . import contents as state

    weights, (moments, numbers) = state.weights_to_save(model), state.split_optimizer(optimizer)
    if name := state.not_finite(weights | moments):
        raise UserError(
            f"step {step} is not saved: {name} holds numbers that are not finite; try a lower learning_rate"
        )
    parts: dict[str, Callable[[], Iterable[Any]]] = {
        "model.safetensors": lambda: state.file_of(weights),
        "optimizer.safetensors": lambda: state.file_of(moments),
        "rng.safetensors": lambda: state.file_of(state.portable(rng or {})),
        "optimizer.json": lambda: [to_json(numbers)],
        "trainer.json": lambda: [to_json(trainer or {})],
        "config.json": lambda: [to_json(config or {})],
        "model.json": lambda: [to_json(dataclasses.asdict(model_config))],
    }
    fields = {
        **FORMAT,
        "step": step,
        "run_id": run_id,
        "val_loss": float(val_loss) if val_loss is not None and math.isfinite(val_loss) else None,
        "dataset_sha256": dataset_hash,
        "versions": {"llm_from_scratch": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    final = Path(out_dir) / f"step-{step:08d}"
    sealed.write_sealed(final, parts, fields, tokenizer.save if tokenizer is not None else None)
    if keep_last is not None:
        with contextlib.suppress(OSError):  # it is saved; what could not be removed is removed after the next save
            _prune(final.parent, keep_last, keep_every, verified=final)
    return final


def prune(out_dir: str | Path, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Removes all but the keep_last newest checkpoints, the one with the lowest val loss, and every keep_every-th step.

    Removes nothing (DamagedError) unless the newest one verifies. Returns the paths that it removed.
    """
    try:
        entries = _scan(Path(out_dir))
        if not entries:
            return []
        verify_checkpoint(entries[0].path)
        return _prune(Path(out_dir), keep_last, keep_every, verified=entries[0].path)
    except OSError as error:
        raise UserError(f"cannot read {out_dir}: {error}; nothing more is removed") from None


def _prune(out: Path, keep_last: int, keep_every: int | None, verified: Path) -> list[Path]:
    # what cannot be read is set aside at the next start, never removed
    entries = [e for e in _scan(out, skip_foreign=True) if e.manifest is not None]
    kept = {e.step for e in [*entries[: max(1, keep_last)], *_by_val_loss(entries)[:1]]}
    kept |= {e.step for e in entries if e.path == verified or (keep_every and e.step % keep_every == 0)}
    return [e.path for e in entries if e.step not in kept and sealed.remove_folder(e.path)]


def clean_leftovers(out_dir: str | Path) -> list[Path]:
    """Removes what an interrupted save or removal of ours left behind. For the trainer that owns out_dir, at start.

    Returns the paths that it removed; what the system holds on to stays.
    """
    out, gone = Path(out_dir), []
    try:
        found = sorted(out.iterdir()) if out.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read {out}: {error.strerror}; take another --out_dir") from None
    for path in found:
        with contextlib.suppress(OSError, UserError):
            if sealed.LEFTOVER.fullmatch(path.name):
                sealed.remove_tree(path)
                gone.append(path)
            elif _STEP.fullmatch(path.name) and path.suffix == ".old":  # one that was being replaced
                twin = path.with_suffix("")
                if not os.path.lexists(twin):
                    os.rename(path, twin)
                elif verify_checkpoint(twin) and sealed.remove_folder(path):
                    gone.append(path)
    return gone


def archive_previous(out_dir: str | Path) -> Path | None:
    """Moves an earlier run's checkpoints, metrics and logs to out_dir/previous-<run id>/, so that runs never mix.

    Returns that folder, or None where there was no run. A ckpt.pt is moved only if we wrote it. Raises UserError.
    """
    from ..interop.nanogpt import is_ours

    out = Path(out_dir)
    target = out
    try:
        entries = _scan(out)
        aside = sorted(p for p in out.iterdir() if p.name.startswith("damaged-step-")) if out.is_dir() else []
        exported = [out / "ckpt.pt"] if is_ours(out / "ckpt.pt") else []
        if not (entries or aside or exported or (out / "metrics.jsonl").exists()):
            return None
        run_id = next((str(e.manifest.get("run_id")) for e in entries if e.manifest), "unknown")
        logs = [out / name for name in RUN_FILES if (out / name).exists()]
        # a checkpoint that says the run id goes last: an interrupted move is gone on with under the same name
        items = [*logs, *exported, *aside, *(e.path for e in sorted(entries, key=lambda e: e.manifest is not None))]
        stem = "previous-" + (re.sub(r"[^A-Za-z0-9_-]", "_", run_id)[:80] or "unknown")
        targets = (out / (stem + (f"-{n}" if n > 1 else "")) for n in range(1, 1 << 16))
        target = next(t for t in targets if not any((t / item.name).exists() for item in items))
        sealed.make_folder(target)
        for item in items:
            os.rename(item, target / item.name)
        sealed.sync_folder(target)
        sealed.sync_folder(out)
    except OSError as error:
        raise UserError(f"cannot move the earlier run in {out} to {target}: {error}; take another --out_dir") from None
    return target


def load_checkpoint(path: str | Path, weights_only: bool = False) -> Checkpoint:
    """Reads a step directory; every file is checked against the manifest before a byte of it is used.

    weights_only leaves the optimizer and the random states out (neither read nor checked). Raises DamagedError where
    the checkpoint is not the one that was written, UserError where it cannot be read.
    """
    from safetensors.torch import load

    from . import contents as state

    path = Path(path)
    manifest = _read_manifest(path)

    def plain(name: str) -> dict[str, Any]:
        return from_json(read_member(path, name, manifest), path / name)

    def tensors(name: str) -> dict[str, Tensor]:
        data = read_member(path, name, manifest)
        try:
            if int.from_bytes(data[:8], "little") > MAX_HEADER:
                raise ValueError(f"its header is larger than {MAX_HEADER} bytes")
            return load(data)
        except Exception as error:  # the library's own errors, and what it meets in a header that lies
            raise DamagedError(f"{path / name}: {error}") from None

    model_config = state.checked_model_config(plain("model.json"), str(path))
    model = state.checked_weights(tensors("model.safetensors"), model_config, str(path))
    optimizer: dict[str, Any] | None = None
    rng: dict[str, Tensor] = {}
    if not weights_only:
        moments, numbers = tensors("optimizer.safetensors"), plain("optimizer.json")
        optimizer = state.join_optimizer(moments, numbers, model, str(path))
        rng = tensors("rng.safetensors")
    tokenizer = None
    if others := [name for name in manifest["files"] if name not in OWN_FILES]:
        from ..core.tokenizer import Tokenizer

        for name in others:
            read_member(path, name, manifest)
        tokenizer = Tokenizer.load(path)
    return Checkpoint(
        path=path,
        step=manifest["step"],
        model_config=model_config,
        model=model,
        optimizer=optimizer,
        trainer=plain("trainer.json"),
        rng=rng,
        config=plain("config.json"),
        tokenizer=tokenizer,
        manifest=manifest,
    )


def verify_checkpoint(path: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint that load_checkpoint would take: every hash fits, the tensors are the model's and
    finite. Raises what load_checkpoint raises."""
    return load_checkpoint(path).manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = sealed.read_manifest(path)
    if manifest.get("format") != FORMAT["format"]:
        raise DamagedError(f"{path} is no checkpoint of ours: its format is {str(manifest.get('format'))[:40]!r}")
    if manifest.get("version") != FORMAT["version"]:
        raise UserError(f"{path} is in version {manifest.get('version')} of the format, this program reads version 1")
    step, loss = manifest.get("step"), manifest.setdefault("val_loss", None)
    if (
        type(step) is not int
        or not 0 <= step < 1 << 53
        or not (loss is None or (type(loss) is float and math.isfinite(loss)))
    ):
        raise DamagedError(f"{path / MANIFEST}: step or val_loss is not a number in range")
    return manifest


def list_checkpoints(out_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in out_dir, oldest first, by their manifests; unreadable ones are left out."""
    return [(e.step, e.path) for e in reversed(_scan(Path(out_dir))) if e.manifest is not None]


def find_checkpoint(
    location: str | Path, which: str | int | None = None, set_aside: bool = False, verify: bool = True
) -> Path:
    """The checkpoint that is meant: a step directory, or a ckpt.pt of nanoGPT's.

    location: an out_dir, a step directory, a ckpt.pt, or an out_dir that holds only a ckpt.pt.
    which: "last", "best" (lowest val loss), a step, or None: best where the run saved only what improved
    (always_save_checkpoint=False), else last. A damaged one is passed over with a warning, and with set_aside renamed
    to damaged-<name>. Raises UserError where there is no good one.
    """

    def check(path: Path) -> Path:
        if verify:
            verify_checkpoint(path)
        return path

    return _locate(Path(location), _which(which), set_aside, check, lambda path: path)


def load_any(
    location: str | Path,
    which: str | int | None = None,
    dataset: str | None = None,
    weights_only: bool = False,
    need_tokenizer: bool = True,
    set_aside: bool = False,
) -> Checkpoint:
    """Loads what find_checkpoint finds, step directory or ckpt.pt, passing over what is damaged.

    dataset: a name or folder whose tokenizer stands in where the checkpoint holds none. A ckpt.pt names its dataset,
    which is looked up in data/; without it, a vocabulary of GPT-2's size is GPT-2's. Raises UserError where no
    tokenizer is found and need_tokenizer is set.
    """
    from ..interop import nanogpt as nanogpt_ckpt

    which = _which(which)
    ckpt = _locate(
        Path(location),
        which,
        set_aside,
        lambda path: load_checkpoint(path, weights_only),
        lambda path: nanogpt_ckpt.read_nanogpt(path, weights_only),
    )
    if isinstance(which, int) and ckpt.step != which:
        raise UserError(f"{ckpt.path} is of step {ckpt.step}, not {which}")
    if ckpt.tokenizer is None:
        ckpt.tokenizer = nanogpt_ckpt.tokenizer_for(ckpt, dataset, need_tokenizer)
    return ckpt


def _which(which: str | int | None) -> str | int | None:
    if which is None or which in ("last", "best") or (isinstance(which, int) and which >= 0):
        return which
    if isinstance(which, str) and which.isdecimal() and len(which) < 16:
        return int(which)
    raise UserError(f"which={which!r} is not one of last, best or a step such as 250")


def _locate(
    location: Path, which: str | int | None, set_aside: bool, read: Callable[[Path], T], read_pt: Callable[[Path], T]
) -> T:
    try:
        if (location / MANIFEST).exists() or (_STEP.fullmatch(location.name) and location.is_dir()):
            return read(location)
        if location.is_file():
            return read_pt(location)
        if not location.is_dir():
            raise UserError(f"no checkpoint {location}: there is no such folder or file; train first, or name another")
        if entries := _scan(location):
            return _first_good(location, entries, which, set_aside, read)
        if (location / "ckpt.pt").is_file():
            return read_pt(location / "ckpt.pt")
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"cannot read {str(location)[:200]}: {error.strerror}; name another checkpoint") from None
    raise UserError(f"no checkpoint in {location}: expected step-* folders or a ckpt.pt; train first, or name another")


def _first_good(
    out: Path, entries: list[_Entry], which: str | int | None, set_aside: bool, read: Callable[[Path], T]
) -> T:
    if isinstance(which, int):
        for entry in entries:
            if entry.step == which:
                return read(entry.path)
        raise UserError(f"no checkpoint of step {which} in {out}: there are {', '.join(str(e.step) for e in entries)}")
    order = entries
    if which == "best" or (which is None and _saved_only_the_best(entries)):
        order = _by_val_loss(entries)
        if which is None:
            order += [entry for entry in entries if entry.val_loss is None]
        if not order:
            raise UserError(f"no checkpoint in {out} has a val loss: use --which=last or a step")
    damaged: list[tuple[Path, str]] = []
    for entry in order:
        try:
            found = read(entry.path)
        except DamagedError as error:
            if entry.path.exists():  # else a trainer has just removed it
                damaged.append((entry.path, str(error)))
            continue
        if damaged:
            moved = [f"{sealed.set_aside(p)} ({why})" if set_aside else f"{p} ({why})" for p, why in damaged]
            print(f"warning: damaged: {'; '.join(moved)}; using {entry.path} instead", file=sys.stderr)
        return found
    reasons = "; ".join(why for _, why in damaged)
    raise DamagedError(f"no good checkpoint in {out}: {reasons}; restore one, or start anew in another --out_dir")


def _saved_only_the_best(entries: list[_Entry]) -> bool:
    for entry in entries:
        if entry.manifest is not None:
            try:
                raw = read_member(entry.path, "config.json", entry.manifest)
                training = from_json(raw, entry.path).get("training")
            except DamagedError:
                continue
            return isinstance(training, dict) and training.get("always_save_checkpoint") is False
    return False


def _scan(out: Path, skip_foreign: bool = False) -> list[_Entry]:
    """The step directories in out, newest first. One that cannot be read though it may be whole (another version of
    the format, no permission) raises UserError, or is left out with skip_foreign."""
    entries = []
    for path in out.iterdir() if out.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            try:
                manifest = _read_manifest(path)
                entries.append(_Entry(manifest["step"], path, manifest))
            except DamagedError:
                if path.exists():
                    entries.append(_Entry(int(match[1]), path, None))
            except UserError:
                if not skip_foreign:
                    raise
    # of two with one step, the one that bears the step's own name
    return sorted(entries, key=lambda e: (e.step, e.path.name == f"step-{e.step:08d}", e.path.name), reverse=True)


def _by_val_loss(entries: list[_Entry]) -> list[_Entry]:
    return sorted((e for e in entries if e.val_loss is not None), key=lambda e: (e.val_loss, -e.step))


def write_nanogpt(
    path: str | Path, checkpoint: Checkpoint, overwrite: bool = False, accept_erf_gelu: bool = False
) -> Path:
    """Writes a ckpt.pt that nanoGPT reads; see nanogpt_ckpt.write_nanogpt."""
    from ..interop import nanogpt as nanogpt_ckpt

    return nanogpt_ckpt.write_nanogpt(path, checkpoint, overwrite, accept_erf_gelu)
