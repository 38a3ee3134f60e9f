"""The checkpoints of a run: when one is due, what it holds, and the thread that writes it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..checkpoint import store as checkpoints
from ..checkpoint.mirror import Mirror
from ..checkpoint.store import Checkpoint, load_checkpoint
from ..core.adapters import adapter_of
from ..core.model import GPT
from ..errors import SaveError, UserError
from ..machine import processes
from ..machine.device import is_out_of_memory
from ..machine.files import FolderLock
from ..machine.memory import free_memory
from ..machine.team import ALONE, Team
from ..settings import to_dict
from .loggers import RunLog
from .microbatch import forget_shortage
from .moments import optimizer_state
from .plan import Plan, part_hashes
from .shares import own_share
from .state import TrainState, copied, random_states

WAIT_STUCK, WAIT_STOPPED = 60.0, 10.0  # seconds that the end of a run waits for the mirror


@dataclass
class Saved:
    """The result of a save."""

    step: int
    path: Path | None = None
    """None if there is no checkpoint of this step."""
    error: UserError | None = None
    """The reason of a failure. With a path: why ckpt.pt, the file for nanoGPT, is missing."""
    bug: BaseException | None = None
    """Any other error. Raised again in the thread of the loop."""


def take_folder(plan: Plan, lock: FolderLock, team: Team, run_id: str) -> tuple[Path | None, Mirror | None]:
    """Locks and cleans the run's folder. Returns where an earlier run was moved, and the first process's mirror. Raises
    UserError if another process trains there, if the mirror holds another run, or if the machines do not share the
    folder."""
    training, mirror = plan.config.training, None
    out_dir = Path(training.out_dir)

    def begin() -> Path | None:
        nonlocal mirror
        lock.acquire()
        if training.mirror is not None:  # before the folder is changed
            mirror = Mirror(training.mirror, out_dir, run_id, training.keep_last, training.keep_every)
        _ = plan.hashes  # now: if the data fail later, a checkpoint is saved for just that
        moved = checkpoints.archive_previous(out_dir) if plan.resumed is None else None
        checkpoints.clean_leftovers(out_dir)
        return moved

    team.gather(None)  # all processes have read their weights: the folder may be moved
    moved = team.first(begin)
    if team.size > 1:
        checkpoints.check_shared(out_dir, team)
    if mirror is not None:
        mirror.start()
    return moved, mirror


class Saver:
    """Copies the state of a step; a thread writes it and removes older checkpoints. A process that must stop at once
    does not wait for the thread. Each process of a team copies and writes its share."""

    def __init__(self, plan: Plan, state: TrainState, log: RunLog, team: Team = ALONE, mirror: Mirror | None = None):
        self.plan, self.state, self.log, self.team = plan, state, log, team
        self.reference = plan.reference  # of preferences.py, stored with every checkpoint
        self.saved_to: Path | None = None
        self.failed = False  # the last save
        self.mirror = mirror
        self._saved: Saved | None = None  # of the save in progress
        self._thread: threading.Thread | None = None

    def is_due(self) -> bool:
        training, state = self.plan.config.training, self.state
        just_evaluated = state.evaluated_at == state.step
        improved = just_evaluated and state.best_step == state.step
        if training.save_interval:
            due = state.step % training.save_interval == 0 or improved
        else:
            due = just_evaluated and (improved or training.always_save_checkpoint)
        return due and state.step > 0

    def save(
        self, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, machine: dict[str, Any]
    ) -> None:
        """Saves the state of this step. All processes take part. The state is copied before this returns; if memory is
        short, it is written instead."""
        plan, state = self.plan, self.state
        state.saved_at = state.step
        rng = random_states(plan.runtime)
        rest: dict[str, Any] = {"scaler": scaler.state_dict(), "machine": machine}
        if self.team.is_first:
            parts = part_hashes(plan.train_data, plan.val_data)
            rest |= {"train_sha256": plan.hashes[0], **({"parts": parts} if parts else {})}
        adapter = adapter_of(model)
        given: dict[str, Any] = {
            "step": state.step, "model": {} if adapter else model.state_dict(), "adapter": adapter, "base": plan.base,
            "optimizer": optimizer_state(optimizer), "trainer": vars(state) | rest, "rng": rng,
            "config": to_dict(plan.config), "model_config": model.config, "tokenizer": plan.tokenizer,
            "reference": self.reference,
        }  # fmt: skip
        assert self._saved is None
        if self.team.size > 1 or plan.runtime.is_sharded:
            given = own_share(given, self.team)
        self._saved = Saved(state.step)
        waits = not _room_for_a_copy(given)
        contents: dict[str, Any] | None = None
        try:
            contents = given if waits else copied(given)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        val_loss = state.val_loss if state.evaluated_at == state.step else None
        is_best = state.best_step == state.step
        self._thread = threading.Thread(
            target=self._write, args=(contents, self._saved, val_loss, is_best), name="checkpoint", daemon=True
        )
        del given, contents  # the thread alone holds the copy
        self._thread.start()
        if waits:
            processes.join(self._thread)

    def _write(
        self, contents: dict[str, Any] | None, saved: Saved, val_loss: float | None, is_best: bool
    ) -> None:  # fmt: skip
        """contents: None if there was no memory for the copy."""
        training, out_dir = self.plan.config.training, self.log.out_dir

        def begin() -> None:
            if contents is None:
                raise SaveError("out of memory")
            self.log.sync()

        try:
            self.team.all(begin)
            assert contents is not None
            saved.path = checkpoints.save_checkpoint(
                out_dir, **contents, run_id=self.state.run_id, val_loss=val_loss, team=self.team,
                dataset_hash=self.plan.hashes[1] if self.team.is_first else None,
                keep_last=training.keep_last, keep_every=training.keep_every,
                in_use=lambda: self.mirror.uploading if self.mirror is not None else None,
            )  # fmt: skip
            if self.team.is_first:
                forget_shortage(out_dir, contents["trainer"]["machine"]["micro_batch"])
            if self.mirror is not None:
                self.mirror.saved()
            wanted = training.save_nanogpt_ckpt and (is_best or training.always_save_checkpoint)  # as nanoGPT does
            if wanted and self.team.is_first:
                whole = load_checkpoint(saved.path) if "parts" in contents else Checkpoint(None, **contents)
                checkpoints.write_nanogpt(out_dir / "ckpt.pt", whole, accept_erf_gelu=True)
        except UserError as error:
            saved.error = error
        except OSError as error:  # metrics.jsonl cannot be synced
            saved.error = SaveError(error.strerror or str(error))
        except BaseException as error:
            if is_out_of_memory(error):  # for a copy for the file
                saved.error = SaveError("out of memory")
            else:
                saved.bug = error

    def report(self, wait: bool = False) -> None:
        """Prints the result of the last save, once it is known. wait: for the save in progress."""
        saved, thread = self._saved, self._thread
        while self.mirror is not None and self.mirror.lines:
            self.log.say(self.mirror.lines.pop(0))
        if saved is None or (thread is not None and thread.is_alive() and not wait):
            return
        if thread is not None:  # a thread that still frees tensors when Python exits would abort the process
            processes.join(thread)
        self._saved = self._thread = None
        if saved.bug is not None:
            raise saved.bug
        self.failed = saved.path is None
        if saved.path is not None:
            self.saved_to = saved.path
            self.log.say(f"saved checkpoint {saved.path}")
        elif self.state.saved_at == saved.step:
            self.state.saved_at = -1  # the end of the run tries again
        if saved.error is not None:
            what = f"step {saved.step} is not saved" if saved.path is None else "ckpt.pt is not written"
            self.log.say(f"warning: {what}: {str(saved.error).removeprefix(f'{what}: ')}")

    def finish(self, stopped: bool) -> None:
        """Waits for the save in progress, and for the mirror. stopped: by a signal, so there is little time."""
        self.report(wait=True)
        begin, wait = time.monotonic(), 0.0
        while not self.team.first(partial(self._is_mirrored, wait, begin, stopped)):
            if not wait and self.mirror is not None:
                self.log.say(f"uploading to the mirror {self.mirror.store.url}")
            wait = 1.0
            processes.moved()
        self.report()

    def _is_mirrored(self, seconds: float, begin: float, stopped: bool) -> bool:
        """Whether the mirror has everything, or has made no progress for too long."""
        if self.mirror is None or self.mirror.wait(seconds):
            return True
        since = begin if stopped else max(begin, self.mirror.active)
        if time.monotonic() - since < (WAIT_STOPPED if stopped else WAIT_STUCK):
            return False
        self.log.say("warning: the last checkpoint is not in the mirror yet; resume the run to upload it")
        return True


def _room_for_a_copy(contents: Any) -> bool:
    """Whether a copy leaves at least as much memory free, for the steps that run meanwhile."""
    free = free_memory(torch.device("cpu"))
    tensors = [leaf for leaf in tree_leaves(contents) if isinstance(leaf, Tensor)]
    if free is None or any(tensor.device.type != "cpu" for tensor in tensors):
        return True
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return 2 * sum(storages.values()) <= free
