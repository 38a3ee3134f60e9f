"""Cool-downs from a step of a run with a constant rate: one run gives models of several lengths.

The step's checkpoint is copied to another folder. The new run resumes from it with the schedule wsd, and its cool-down
begins at this step. It is an ordinary run, with its own id: its settings are stored, and it resumes exactly.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shlex
import shutil
from pathlib import Path
from typing import Any

from ..checkpoint.contents import REFERENCE, read_manifest, write_run_id
from ..checkpoint.store import find_checkpoint, list_checkpoints, read_settings
from ..config import Config, SchedulerConfig
from ..errors import UserError
from ..machine.files import replace_folder, temporary_folder, write_whole
from ..settings import flatten
from .scheduler import learning_rate_at


def begin_cooldown(source: str, out_dir: str, share: float) -> dict[str, Any]:
    """Copies a checkpoint to out_dir. Returns the settings of the new run that differ from the old run, by
    leaf name. source: a step folder, or a run (its last step). share: steps of the cool-down, as a share of the steps
    before it. Raises UserError."""
    if not 0 < share <= 10:
        raise UserError(f"cooldown={share:g} is out of range: expected a fraction of the steps so far, such as 0.2")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--cooldown starts in one process: run it without torchrun, then resume with torchrun")
    found = find_checkpoint(source, "last" if list_checkpoints(source) else None)
    steps = {path.resolve(): step for step, path in list_checkpoints(found.parent)}
    if found.resolve() not in steps:
        raise UserError(f"--cooldown needs a step folder of a run, with its optimizer state; {found} is not one")
    step, target = steps[found.resolve()], Path(out_dir) / found.name
    settings = flatten(Config())  # of what is missing: the new run will have the defaults too
    for section in read_settings(found).values():
        settings |= section if isinstance(section, dict) else {}
    scheduler, reference = _check_rate(settings, step), _older_reference(settings, found)
    others = [path for _, path in list_checkpoints(out_dir) if path.name != found.name]
    if others or target.resolve() == found.resolve():
        hint = shlex.join(["--init_from=resume", f"--out_dir={out_dir}"])
        raise UserError(f"{out_dir} already holds a run: choose another --out_dir, or resume that run with {hint}")
    if target.exists():
        if _content(target) != _content(found):
            raise UserError(f"{out_dir} holds a step of another run: choose another --out_dir")
    else:
        with temporary_folder(target) as folder:
            shutil.copytree(found, folder, dirs_exist_ok=True)
            write_run_id(folder, secrets.token_hex(6))
            if reference is not None:
                write_whole(Path(out_dir) / REFERENCE, reference.read_bytes())
            replace_folder(target, folder)
    last = step + max(1, round(share * step))
    return {
        "schedule": "wsd", "decay_lr": True, "cooldown_frac": (last - step) / last, "lr_decay_iters": None,
        "lr_ends": {}, "warmup_iters": min(scheduler.warmup_iters, step),  # decay_lr=False has no warm-up
        "max_iters": last, "inclusive_max_iters": False, "epochs": None,
    }  # fmt: skip


def _content(folder: Path) -> dict[str, Any]:
    """The hashes of a step's files, without the one that holds the id of the run."""
    return {name: entry for name, entry in read_manifest(folder)["files"].items() if name != "trainer.json"}


def _older_reference(settings: dict[str, Any], step: Path) -> Path | None:
    """The reference of a run with --loss=dpo, if it is in the run's folder and not in the step. Raises UserError if it
    is in neither."""
    reference = step.parent / REFERENCE
    if settings["loss"] != "dpo" or REFERENCE in read_manifest(step)["files"]:
        return None
    if not reference.is_file():
        raise UserError(
            f"{step} does not hold the reference of its run with --loss=dpo, and {reference} does not exist: "
            "restore the reference, or start a new run from the weights (without --cooldown)"
        )
    return reference


def _check_rate(settings: dict[str, Any], step: int) -> SchedulerConfig:
    """The schedule of a step's run. Raises UserError unless the learning rate of the step is the peak, where a
    cool-down begins."""
    scheduler = SchedulerConfig(**{item.name: settings[item.name] for item in dataclasses.fields(SchedulerConfig)})
    scheduler.lr_ends = {int(begin): end for begin, end in scheduler.lr_ends.items()}  # JSON has text keys
    peak = settings["learning_rate"]
    rate = learning_rate_at(step, peak, scheduler, settings["max_iters"])
    if step < 1 or rate != peak:
        raise UserError(
            f"a cool-down begins at the peak learning rate, but step {step} of this run has {rate:.3g}, not "
            f"{peak:.3g}: choose another step, or train with --schedule=constant or wsd"
        )
    return scheduler
