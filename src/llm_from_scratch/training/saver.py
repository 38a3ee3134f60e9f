"""The checkpoints of a run: when one is due, what it holds, and the thread that writes it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..checkpoint import store as checkpoints
from ..checkpoint.store import Checkpoint
from ..core.adapters import adapter_of
from ..core.model import GPT
from ..errors import SaveError, UserError
from ..machine.device import is_out_of_memory
from ..machine.memory import free_memory
from ..settings import to_dict
from .loggers import RunLog
from .optimizer import optimizer_state
from .plan import Plan, part_hashes
from .sharding import gathered
from .state import TrainState, copied, random_states


@dataclass
class Saved:
    """The result of a save."""

    step: int
    path: Path | None = None
    """None if there is no checkpoint of this step."""
    error: UserError | None = None
    """Why not. With a path: why ckpt.pt, the file for nanoGPT, is missing."""
    bug: BaseException | None = None
    """Any other error. Raised again in the thread of the loop."""


class Saver:
    """Copies the state of a step; a thread writes it and removes older checkpoints. A process that must stop at once
    does not wait for the thread."""

    def __init__(self, plan: Plan, state: TrainState, log: RunLog):
        self.plan, self.state, self.log = plan, state, log
        self.saved_to: Path | None = None
        self.failed = False  # the last save
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
        """Saves the state of this step. All processes take part; the first one writes. The state is copied before this
        returns; if memory is short, it is written instead."""
        plan, state = self.plan, self.state
        state.saved_at = state.step
        rng = random_states(plan.runtime)
        adapter = adapter_of(model)
        states = gathered({"model": {} if adapter else model.state_dict(), "optimizer": optimizer_state(optimizer)})
        if not plan.runtime.is_master:
            return
        rest = {"scaler": scaler.state_dict(), "machine": machine, "train_sha256": plan.hashes[0]}
        if parts := part_hashes(plan.train_data, plan.val_data):
            rest["parts"] = parts
        contents = {
            **states, "step": state.step, "adapter": adapter, "base": plan.base, "trainer": vars(state) | rest,
            "rng": rng, "config": to_dict(plan.config), "model_config": model.config, "tokenizer": plan.tokenizer,
        }  # fmt: skip
        assert self._saved is None
        self._saved = Saved(state.step)
        waits = not _room_for_a_copy(contents)
        try:
            contents = contents if waits else copied(contents)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._saved.error = SaveError("out of memory")
            return
        val_loss = state.val_loss if state.evaluated_at == state.step else None
        is_best = state.best_step == state.step
        self._thread = threading.Thread(
            target=self._write, args=(contents, self._saved, val_loss, is_best), name="checkpoint", daemon=True
        )
        del contents  # the thread alone holds the copy
        self._thread.start()
        if waits:
            self._thread.join()

    def _write(self, contents: dict[str, Any], saved: Saved, val_loss: float | None, is_best: bool) -> None:
        training, out_dir = self.plan.config.training, self.log.out_dir
        try:
            self.log.sync()
            saved.path = checkpoints.save_checkpoint(
                out_dir, **contents, run_id=self.state.run_id, dataset_hash=self.plan.hashes[1], val_loss=val_loss,
                keep_last=training.keep_last, keep_every=training.keep_every,
            )  # fmt: skip
            if training.save_nanogpt_ckpt and (is_best or training.always_save_checkpoint):  # as nanoGPT does
                whole = Checkpoint(path=None, **contents)
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
        if saved is None or (thread is not None and thread.is_alive() and not wait):
            return
        if thread is not None:  # a thread that still frees tensors when Python exits would abort the process
            thread.join()
        self._saved = self._thread = None
        if saved.bug is not None:
            raise saved.bug
        self.failed = saved.path is None
        if saved.path is not None:
            self.saved_to = saved.path
            self.log.say(f"saved checkpoint {saved.path}")
        elif self.state.saved_at == saved.step and self.plan.runtime.world_size == 1:
            self.state.saved_at = -1  # the end of the run tries again; other processes would not know
        if saved.error is not None:
            what = f"step {saved.step} is not saved" if saved.path is None else "ckpt.pt is not written"
            self.log.say(f"warning: {what}: {str(saved.error).removeprefix(f'{what}: ')}")


def _room_for_a_copy(contents: Any) -> bool:
    """Whether a copy leaves at least as much memory free, for the steps that run meanwhile."""
    free = free_memory(torch.device("cpu"))
    tensors = [leaf for leaf in tree_leaves(contents) if isinstance(leaf, Tensor)]
    if free is None or any(tensor.device.type != "cpu" for tensor in tensors):
        return True
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return 2 * sum(storages.values()) <= free
