"""The checkpoints of a run: last, best or a step; pruning; moving an earlier run aside.

An older checkpoint is removed only after a newer one has been read back. Which one is newest is decided by the
manifests, not by names or clocks.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DamagedError, UserError, one_line
from ..errors import SaveError as SaveError
from ..interop.torch_file import is_ours
from ..machine.files import make_folder, read_json, remove_tree, sync_folder
from ..machine.processes import is_restarted, launch
from ..machine.team import ALONE, Team
from . import hashed_folder
from .contents import OWN_FILES as OWN_FILES
from .contents import REFERENCE, Checkpoint, read_manifest, read_settings, verify_checkpoint, write_checkpoint
from .contents import check_storable as check_storable
from .contents import load_checkpoint as load_checkpoint
from .hashed_folder import MANIFEST

# A run's files next to its checkpoints
RUN_FILES = ("metrics.jsonl", "samples.jsonl", "loss.png", "tensorboard", "README.md", "before_after.json",
             REFERENCE)  # fmt: skip
_STEP = re.compile(r"step-(\d{1,15})(\.old)?")
T = TypeVar("T")


@dataclass
class _Entry:
    """A step directory; manifest is None if it cannot be read; step is then taken from the name."""

    step: int
    path: Path
    manifest: dict[str, Any] | None

    @property
    def val_loss(self) -> float | None:
        return self.manifest["val_loss"] if self.manifest else None


def save_checkpoint(
    out_dir: str | Path, *, keep_last: int | None = None, keep_every: int | None = None, team: Team = ALONE,
    in_use: Callable[[], Path | None] = lambda: None, **contents: Any,
) -> Path:  # fmt: skip
    """Writes a checkpoint (see write_checkpoint), then prunes if keep_last is given. Returns its folder. in_use: a
    checkpoint that is not removed yet."""
    final = write_checkpoint(out_dir, team=team, **contents)
    if keep_last is not None and team.is_first:
        prune(final, keep_last, keep_every, in_use())
    return final


def _last_launch(out_dir: str) -> object:
    """The launch that wrote the newest checkpoint."""
    for _, path in reversed(list_checkpoints(out_dir)):
        with contextlib.suppress(UserError):
            return read_json(path / "trainer.json").get("launch")
    return None


def check_shared(out_dir: Path, team: Team) -> None:
    """Raises UserError unless all processes see the same folder. All take part."""
    mark = out_dir / ".tmp-shared"

    def begin() -> str:
        token = secrets.token_hex(8)
        make_folder(out_dir)
        mark.write_text(token)
        return token

    try:
        token = team.first(begin)
        found = team.gather((socket.gethostname(), mark.is_file() and mark.read_text() == token))
    finally:
        if team.is_first:
            mark.unlink(missing_ok=True)
    if blind := sorted({host for host, sees in found if not sees}):
        raise UserError(
            f"out_dir={out_dir} is not the same folder on all machines: {', '.join(blind)} does not see the files of "
            f"{found[0][0]}; choose a folder on a shared file system"
        )


def resolved_init(init_from: str, out_dir: str) -> str:
    """auto is resume if out_dir holds a checkpoint, a damaged one too (never a silent fresh start), else scratch. So is
    any other value when torchrun restarts a run that has saved."""
    if init_from != "auto":
        return "resume" if is_restarted() and _last_launch(out_dir) == launch() else init_from
    kept = ("step-*", "damaged-step-*", "ckpt.pt")
    return "resume" if any(True for pattern in kept for _ in Path(out_dir).glob(pattern)) else "scratch"


def prune(verified: Path, keep_last: int, keep_every: int | None = None, in_use: Path | None = None) -> list[Path]:
    """Removes the checkpoints next to `verified`, which has just been read back, except the keep_last newest ones, the
    one with the lowest val loss, every keep_every-th step, and in_use. Returns the paths that it removed."""
    try:
        # an unreadable one is set aside at the next start, never removed
        entries = [e for e in find_entries(verified.parent, skip_foreign=True) if e.manifest is not None]
    except OSError:  # the next save removes the rest
        return []
    losses = {e.step: e.val_loss for e in reversed(entries)}
    kept = kept_steps(losses, keep_last, keep_every) | {e.step for e in entries if e.path in (verified, in_use)}
    return [e.path for e in entries if e.step not in kept and hashed_folder.remove_folder(e.path)]


def kept_steps(losses: dict[int, float | None], keep_last: int, keep_every: int | None = None) -> set[int]:
    """The steps that a run keeps: the newest, the one with the lowest val loss, multiples of keep_every. losses: val
    losses by step."""
    best = min(((loss, -step) for step, loss in losses.items() if loss is not None), default=None)
    kept = {*sorted(losses)[-max(1, keep_last) :], *(step for step in losses if keep_every and step % keep_every == 0)}
    return kept if best is None else kept | {-best[1]}


def clean_leftovers(out_dir: str | Path) -> None:
    """Removes what an interrupted save or removal left behind. Call it with out_dir locked. If the system refuses, the
    next start tries again."""
    out = Path(out_dir)
    try:
        found = sorted(out.iterdir()) if out.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read {out}: {error.strerror}; choose another --out_dir") from None
    for path in found:
        with contextlib.suppress(OSError, UserError):
            if hashed_folder.LEFTOVER.fullmatch(path.name):
                remove_tree(path)
            elif _STEP.fullmatch(path.name) and path.suffix == ".old":  # one that was being replaced
                twin = path.with_suffix("")
                if os.path.lexists(twin):
                    verify_checkpoint(twin)
                    hashed_folder.remove_folder(path)
                else:
                    os.rename(path, twin)


def archive_previous(out_dir: str | Path) -> Path | None:
    """Moves an earlier run's checkpoints, metrics and logs to out_dir/previous-<run id>/, so that runs never mix.

    Returns that folder, or None if there was no run. Moves a ckpt.pt only if this program wrote it. Raises UserError.
    """
    out = target = Path(out_dir)
    try:
        entries = find_entries(out)
        aside = sorted(p for p in out.iterdir() if p.name.startswith("damaged-step-")) if out.is_dir() else []
        exported = [out / "ckpt.pt"] if is_ours(out / "ckpt.pt") else []
        if not (entries or aside or exported or (out / "metrics.jsonl").exists()):
            return None
        run_id = next((str(e.manifest.get("run_id")) for e in entries if e.manifest), "unknown")
        logs = [out / name for name in RUN_FILES if (out / name).exists()]
        # a checkpoint with the run id goes last: an interrupted move is continued under the same name
        items = [*logs, *exported, *aside, *(e.path for e in sorted(entries, key=lambda e: e.manifest is not None))]
        stem = "previous-" + (re.sub(r"[^A-Za-z0-9_-]", "_", run_id)[:80] or "unknown")
        targets = (out / (stem + (f"-{n}" if n > 1 else "")) for n in range(1, 1 << 16))
        target = next(t for t in targets if not any((t / item.name).exists() for item in items))
        make_folder(target)
        for item in items:
            os.rename(item, target / item.name)
        sync_folder(target)
        sync_folder(out)
    except OSError as error:
        raise UserError(
            f"cannot move the earlier run in {out} to {target}: {error}; choose another --out_dir"
        ) from None
    return target


def list_checkpoints(out_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in out_dir, oldest first, by their manifests; unreadable ones are left out."""
    return [(e.step, e.path) for e in reversed(find_entries(Path(out_dir))) if e.manifest is not None]


def find_checkpoint(
    location: str | Path, which: str | int | None = None, set_aside: bool = False, verify: bool = True
) -> Path:
    """The path of a checkpoint: a step directory, or nanoGPT's ckpt.pt.

    location: an out_dir, a step directory, a ckpt.pt, or an out_dir that holds only a ckpt.pt.
    which: "last", "best" (lowest val loss), a step, or None: best if the run saved only what improved
    (always_save_checkpoint=False), else last. A damaged one is skipped with a warning, and with set_aside renamed to
    damaged-<name>. Raises UserError if there is no good one.
    """
    return locate(Path(location), valid_which(which), set_aside, verify_checkpoint if verify else Path, Path)


def _other_runs(location: Path) -> str:
    """The runs next to a missing one, as a hint."""
    runs = sorted({one_line(path.parent.name) for path in location.parent.glob("*/step-*")})
    return f"existing runs: {', '.join(runs[:9])}" if runs else "train first, or name another folder"


def valid_which(which: str | int | None) -> str | int | None:
    """last, best, a step or None. Raises UserError for anything else."""
    if which is None or which in ("last", "best") or (isinstance(which, int) and which >= 0):
        return which
    if isinstance(which, str) and which.isdecimal() and len(which) < 16:
        return int(which)
    raise UserError(f"which={which!r} is not last, best or a step such as 250")


def locate(
    location: Path, which: str | int | None, set_aside: bool, read: Callable[[Path], T], read_pt: Callable[[Path], T]
) -> T:
    """The result of `read` for the step directory that find_checkpoint describes, or `read_pt` for a ckpt.pt."""
    try:
        if (location / MANIFEST).exists() or (_STEP.fullmatch(location.name) and location.is_dir()):
            return read(location)
        if location.is_file():
            return read_pt(location)
        if not location.is_dir():
            raise UserError(f"no checkpoint {location}: there is no such folder or file; {_other_runs(location)}")
        if entries := find_entries(location):
            return first_good(location, entries, which, set_aside, read)
        if (location / "ckpt.pt").is_file():
            return read_pt(location / "ckpt.pt")
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"cannot read {str(location)[:200]}: {error.strerror}; name another checkpoint") from None
    raise UserError(f"no checkpoint in {location}: expected step-* folders or a ckpt.pt; train first, or name another")


def first_good(
    out: Path, entries: list[_Entry], which: str | int | None, set_aside: bool, read: Callable[[Path], T]
) -> T:
    if isinstance(which, int):
        if exact := [entry.path for entry in entries if entry.step == which]:
            return read(exact[0])
        raise UserError(f"no checkpoint of step {which} in {out}; available: {', '.join(str(e.step) for e in entries)}")
    order = entries
    if which == "best" or (which is None and _saved_only_the_best(entries)):
        order = sorted((e for e in entries if e.val_loss is not None), key=lambda e: (e.val_loss, -e.step))
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
            moved = [f"{hashed_folder.set_aside(p)} ({why})" if set_aside else f"{p} ({why})" for p, why in damaged]
            print(f"warning: damaged checkpoint: {'; '.join(moved)}; using {entry.path} instead", file=sys.stderr)
        return found
    reasons = "; ".join(why for _, why in damaged)
    raise DamagedError(f"no good checkpoint in {out}: {reasons}; restore one, or start a new run in another --out_dir")


def _saved_only_the_best(entries: list[_Entry]) -> bool:
    for entry in entries:
        with contextlib.suppress(DamagedError):
            training = read_settings(entry.path).get("training")
            return isinstance(training, dict) and training.get("always_save_checkpoint") is False
    return False


def find_entries(out: Path, skip_foreign: bool = False) -> list[_Entry]:
    """The step directories in out, newest first. One that may be whole but cannot be read (another version of the
    format, no permission) raises UserError, or is skipped with skip_foreign."""
    entries = []
    for path in out.iterdir() if out.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            try:
                manifest = read_manifest(path)
                entries.append(_Entry(manifest["step"], path, manifest))
            except DamagedError:
                if path.exists():
                    entries.append(_Entry(int(match[1]), path, None))
            except UserError:
                if not skip_foreign:
                    raise
    # of two with the same step, the one with the step's own name first
    return sorted(entries, key=lambda e: (e.step, e.path.name == f"step-{e.step:08d}", e.path.name), reverse=True)


def write_nanogpt(
    path: str | Path, checkpoint: Checkpoint, overwrite: bool = False, accept_erf_gelu: bool = False
) -> Path:
    """Writes a ckpt.pt that nanoGPT reads; see interop/nanogpt.py."""
    from ..interop import nanogpt

    best = checkpoint.trainer.get("best_val_loss") or checkpoint.manifest.get("val_loss")
    content = nanogpt.NanoGPTCheckpoint(
        checkpoint.model_config, checkpoint.model, checkpoint.optimizer, checkpoint.step, best, checkpoint.config
    )
    return nanogpt.write_nanogpt(path, content, overwrite, accept_erf_gelu)
