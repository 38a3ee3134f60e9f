"""The checkpoints of a run: when one is due, what it holds, and whether it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config import to_dict
from ..core.model import GPT
from .loggers import RunLog
from .optimizer import optimizer_state
from .plan import Plan
from .state import TrainState, Writer, random_states


class Saver:
    """Copies the state of a step; a thread writes it and removes older checkpoints."""

    def __init__(self, plan: Plan, state: TrainState, log: RunLog):
        self.plan, self.state, self.log, self.writer = plan, state, log, Writer()
        self.saved_to: Path | None = None
        self.failed = False  # the last save

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
        """Saves the state of this step. All processes take part; the first one writes."""
        plan, state, training = self.plan, self.state, self.plan.config.training
        state.saved_at = state.step
        rng = random_states(plan.runtime)
        if not plan.runtime.is_master:
            return
        best_only = not training.always_save_checkpoint  # nanoGPT's ckpt.pt then holds the best
        rest = {"scaler": scaler.state_dict(), "machine": machine, "train_sha256": plan.hashes[0]}
        contents = {
            "step": state.step, "model": model.state_dict(), "optimizer": optimizer_state(optimizer),
            "trainer": vars(state) | rest, "rng": rng, "config": to_dict(plan.config), "model_config": model.config,
            "tokenizer": plan.tokenizer,
        }  # fmt: skip
        self.writer.start(
            contents, self.log.out_dir, self.log.sync, run_id=state.run_id, dataset_hash=plan.hashes[1],
            val_loss=state.val_loss if state.evaluated_at == state.step else None,
            keep_last=training.keep_last, keep_every=training.keep_every,
            export=training.save_nanogpt_ckpt and (state.best_step == state.step or not best_only),
        )  # fmt: skip

    def report(self, wait: bool = False) -> None:
        """Prints the result of the last save, once it is known."""
        saved = self.writer.finished(wait)
        if saved is None:
            return
        self.failed = saved.path is None
        if saved.path is not None:
            self.saved_to = saved.path
            self.log.say(f"saved checkpoint {saved.path}")
        elif self.state.saved_at == saved.step and self.plan.runtime.world_size == 1:
            self.state.saved_at = -1  # the end of the run tries again; other processes would not know
        if saved.error is not None:
            what = f"step {saved.step} is not saved" if saved.path is None else "ckpt.pt is not written"
            self.log.say(f"warning: {what}: {str(saved.error).removeprefix(f'{what}: ')}")
