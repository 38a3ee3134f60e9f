"""A run: what changes while it trains. Its parts are built in one order and closed together."""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import store as checkpoints
from ..checkpoint.load import load
from ..core.adapters import check_adapter
from ..core.cache import check_documents
from ..core.dataset import BatchLoader, load_on_device
from ..errors import Interrupted, NotFiniteError, TrainingError, UserError
from ..generation.generator import Generator
from ..machine import processes
from ..machine.device import forked_random
from ..machine.files import FolderLock
from ..machine.processes import any_rank, wait_for_all
from ..machine.team import Team
from ..machine.terminal import announce
from . import before_after
from .construction import build
from .evaluate import Evaluation, estimate_loss, evaluate_parts
from .guards import Finding, StepGuard, all_finite
from .harness import TaskModel, evaluate_tasks, figures
from .loggers import RunLog
from .microbatch import halved, retry_smaller
from .optimizer import make_optimizer
from .pace import Pace
from .plan import Plan, describe
from .progress import LONG_FINAL_EVALUATION, Calendar, Remaining, StepTimer
from .ranks import regroup, scaler_of
from .report import README, TrainResult, readme, write_readme
from .resume import eval_command, not_bit_exact, present_machine, resume_command
from .saver import Saver, take_folder
from .scheduler import learning_rate_at
from .shares import load_weights
from .signals import StopRequest
from .state import TrainState, restore
from .wrap import wrap

SHORT_SAMPLE = 200  # tokens of a sample that was not asked for


class Run:
    """Model, optimizer, data, log and checkpoints of one run, and its state."""

    def __init__(
        self, plan: Plan, stop: StopRequest | None = None, lock: FolderLock | None = None, command: str = "llm-train",
        say: Callable[[str], None] | None = None,
    ):  # fmt: skip
        """lock: of the folder that the run writes to; None: a run that writes nothing, for a forecast or a benchmark.
        say: prints a line before the log is open; by default on the first process, if the run writes."""
        prints = plan.runtime.is_master and lock is not None
        speaks = prints and plan.config.logging.progress != "none"
        default: Callable[[str], Any] = announce if speaks else lambda line: None
        self.say = say or default
        self.plan, self.micro_batch = replace(plan, weights=None, resumed=None), plan.micro_batch
        self.config, self.runtime, self.stop = plan.config, plan.runtime, stop or StopRequest()
        if self.runtime.is_sharded:
            self.stop.agree = partial(any_rank, device=self.runtime.device, world_size=self.runtime.world_size)
        self.command, self.out_dir = command, Path(plan.config.training.out_dir)
        self.is_nanogpt = command.endswith("train.py")  # its lines, and no others
        self.state = TrainState(run_id=secrets.token_hex(6), step=plan.start_step, launch=processes.launch())
        self.eval_rate: float | None = None  # tokens/s
        self.mfu: float | None = None
        self.sampled_at = -1
        self.task_model: TaskModel | None = None
        self.pace = Pace(None, plan)
        self.timer = StepTimer()
        self.scaler = scaler_of(self.runtime)
        self.model = build(self.config, self.runtime, plan.weights, self.say)
        checkpoints.check_storable(self.model.state_dict(), self.config.model)
        if self.config.data.documents is True:
            check_documents(self.model)
        self.runtime.place(self.model, plan.keep_memory)
        for line in describe(plan) if lock is not None else ():
            self.say(line)
        self.models = retry_smaller(
            lambda: wrap(self.model, self.config, self.runtime, self.micro_batch, self.say),
            partial(self.shrink, is_wrapped=False),
        )
        self.optimizer = make_optimizer(
            self.model, self.config.optimizer, self.runtime.device, self.config.system.seed, self.runtime.world_size
        )
        self.guard = StepGuard(self.state.recent_losses, self.config.training.skip_spikes, self.runtime)
        device, vocab_size = self.runtime.device, self.config.model.vocab_size
        keep = self.config.data.documents is not True and self.config.system.data_on_device
        tokens = load_on_device(device, plan.train_data, vocab_size, keep, self.say)
        self.loader = BatchLoader(
            plan.train_data, plan.order, plan.global_batch, device, self.runtime.rank, self.runtime.world_size,
            vocab_size, tokens,
        )  # fmt: skip
        if plan.resumed is not None:
            for line in self._restore(plan.resumed) + not_bit_exact(self._machine(), plan.resumed):
                self.say(line)
        # the first to write: all that can fail before step 0 has succeeded
        first, team = plan.start_step, Team(self.runtime.rank, self.runtime.world_size)
        moved, mirror = None, None
        if lock is not None and not self.config.training.eval_only:
            moved, mirror = take_folder(plan, lock, team, self.state.run_id)
        mfu = partial(self.model.estimate_mfu, plan.global_batch / self.runtime.world_size)
        self.log = RunLog(
            self.config, prints, first, plan.last_step, plan.resumed is not None, self.state.evaluated_at == first,
            Remaining(Calendar.of(plan), self.timer, first), self.state.run_id, mfu if self.is_nanogpt else None,
        )  # fmt: skip
        self.say = self.log.say
        if moved is not None:
            self.say(f"{self.out_dir} contained an earlier run, moved to {moved}")
        self.saver = Saver(self.plan, self.state, self.log, team, mirror)

    # --- one step ---

    def last_step(self) -> int:
        """Updates after which the run ends. If it has a time to end, they may change on the way."""
        self.plan = self.saver.plan = self.pace.replan(self.plan, self.state.step, self.log)
        self.config, self.loader.order = self.plan.config, self.plan.order
        return self.plan.last_step

    def next_batch(self) -> tuple[Tensor, ...]:
        """The batch of this process at the present step, as BatchLoader.get() has it. Starts the step's timer."""
        self.saver.report()
        self.timer.start()
        place = self.state.step + self.state.data_shift  # in the order of the data
        order, batch = self.plan.order, self.plan.global_batch
        left = (self.plan.last_step - self.state.step) * batch
        if order.begins_epoch(place, batch) and 2 * left > order.windows_per_epoch:
            self.optimizer.begin_epoch()  # with less text left than half an epoch, the new embeddings would be worse
        for scan in self.plan.scans:
            scan.raise_if_bad()
        return self.loader.get(place)

    def shrink(self, reason: str, is_wrapped: bool = True) -> None:
        """Halves the micro-batch of all processes. reason: the allocator's message; empty if another process ran short.
        is_wrapped: whether self.models exists. Raises MemoryShortError if the micro-batch cannot be smaller."""
        self.model.zero_grad(set_to_none=True)
        if is_wrapped:
            self.models.memory.blocks.clear()  # of the larger micro-batch
        self.scaler.scale(torch.zeros((), device=self.runtime.device))  # its scale exists from the first use on
        self.scaler.update(self.scaler.get_scale())  # unchanged, but the gradients no longer count as unscaled
        together = self.runtime.can_regroup and is_wrapped
        if together:
            regroup(self.models, self.guard, self.runtime, reason)
        self.micro_batch = halved(self.plan, self.micro_batch, reason or "on another process", together)
        batch = self.plan.global_batch // self.runtime.world_size
        self.say(
            f"warning: out of memory: from now on the batch of {batch} sequences is split into "
            f"{batch // self.micro_batch} micro-batches of {self.micro_batch}; the result is the same"
        )

    def report_steps(self, wait: bool = False) -> None:
        """Logs the steps that the device has finished. wait: all steps. Raises NotFiniteError after too many skipped
        steps, or if weights are not finite."""
        self.guard.compare(self.model, self.state.step)
        for found in self.guard.collect(wait):
            self.stop.shared = self.stop.shared or found.signum
            if found.step % self.config.logging.log_interval == 0 or found.skipped or found.spike:
                self._log_step(found)
            self._count_skipped(found)
            self.log.reached(found.step + 1)
        self.timer.pause()
        self.stop.stop_if_closed(self.log.reader_is_gone)

    def _log_step(self, found: Finding) -> None:
        seconds = self.timer.seconds_per_step()
        rate = self.plan.tokens_per_step / seconds
        metrics = {"loss": found.loss, "lr": found.learning_rate, "grad_norm": found.grad_norm}
        metrics |= {"time_ms": seconds * 1e3, "tokens_per_s": rate}
        if peak := self.runtime.peak_flops:
            metrics["mfu"] = rate * self.plan.sizes.flops_per_token / (peak * self.runtime.world_size)
        self.mfu = metrics.get("mfu")
        metrics |= {name: 1 for name in ("skipped", "spike") if getattr(found, name)}
        self.log.train_step(found.step, metrics)

    def _count_skipped(self, found: Finding) -> None:
        state = self.state
        if found.spike:
            self.say(f"warning: {found}, a spike far above the recent losses{', skipped' * found.skipped}")
        if found.is_finite:
            state.skipped_in_a_row = 0
        elif not math.isfinite(found.loss) or not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
            state.skipped_in_a_row += 1
            self.say(f"warning: {found}, skipped; {state.skipped_in_a_row} in a row")
            too_many = state.skipped_in_a_row >= self.config.training.max_skipped_steps
            if too_many or not all_finite(self.model, self.runtime):
                raise self._not_finite(found)
        # else float16 searches for the largest scale of the gradients that does not overflow

    def _not_finite(self, found: Finding) -> NotFiniteError:
        """The error with its diagnosis."""
        begins = self.plan.order.starts(found.step + self.state.data_shift, self.plan.global_batch).tolist()
        shown = ", ".join(map(str, begins[:8])) + (", ..." if len(begins) > 8 else "")
        weights = "finite" if all_finite(self.model, self.runtime) else "not finite"
        dtype = str(self.runtime.dtype).removeprefix("torch.")
        return NotFiniteError(
            f"the loss is {found.loss:.4g} at step {found.step} (gradient norm {found.grad_norm:.4g}, learning rate "
            f"{found.learning_rate:.3g}, {dtype}, weights {weights}, batch at token positions {shown}). "
            f"Try --learning_rate={self.config.optimizer.learning_rate / 3:.1g}, a longer --warmup_iters"
            + (", or --dtype=float32" if dtype != "float32" else "")
        )

    # --- between steps ---

    def evaluate(self) -> None:
        """Estimates the losses on fixed batches and tracks the best. Raises NotFiniteError, Interrupted."""
        self.report_steps(wait=True)
        state, windows = self.state, self.config.training.eval_iters * self.config.data.batch_size
        block_size, losses = self.config.model.block_size, {}
        parts: dict[str, float] = {}
        for split, data in (("train", self.plan.train_data), ("val", self.plan.val_data)):
            losses[split], each, begin = 0.0, -(-windows // len(data.weighted)), time.perf_counter()
            for name, weight, part in data.weighted:
                loss = estimate_loss(
                    self.models.compiled, part, block_size, each, self.runtime, self.eval_batch, self.stop.interrupt
                )
                losses[split] += weight * loss
                parts |= {f"{split}_loss/{name}": loss} if name else {}
        self.eval_rate = windows * block_size / (time.perf_counter() - begin)  # of the second split: the first warms up
        if self.log.remaining is not None:
            self.log.remaining.rate = self.eval_rate
        lr = self._learning_rate()
        metrics = {"train_loss": losses["train"], "val_loss": losses["val"], "lr": lr}
        metrics |= ({"mfu": self.mfu} if self.mfu is not None else {}) | parts | self._score_tasks()
        self.log.evaluation(state.step, metrics, min(losses["val"], state.best_val_loss))
        if not math.isfinite(sum(losses.values())):
            raise self._not_finite(Finding(state.step, lr, sum(losses.values()), math.nan))
        state.evaluated_at, state.val_loss = state.step, losses["val"]
        if losses["val"] < state.best_val_loss:
            state.best_val_loss, state.best_step, state.evaluations_without_gain = losses["val"], state.step, 0
        else:
            state.evaluations_without_gain += 1

    @torch.no_grad()
    def _score_tasks(self) -> dict[str, float]:
        """The scores of eval_tasks. Each process computes a part and gets all."""
        if not self.plan.tasks:
            return {}
        if self.task_model is None:
            assert self.plan.tokenizer is not None  # make_plan refuses tasks without one
            generator = Generator(self.model, self.plan.tokenizer)
            generator.graphed = False  # their memory is needed for training
            share = self.runtime.rank, self.runtime.world_size
            alone = self.runtime.world_size == 1 or self.runtime.is_sharded  # others would wait for the scores
            interrupt = self.stop.interrupt if alone else lambda: None
            self.task_model = TaskModel(generator, before_batch=interrupt, share=share)
        self.task_model.generator.weights_changed()
        with forked_random(self.runtime.device), self._eager():
            return figures(evaluate_tasks(self.task_model, self.plan.tasks, self.config.training.eval_limit))

    def _eager(self) -> contextlib.AbstractContextManager:
        """A compiled block would be compiled again for every length of a text."""
        return torch.compiler.set_stance("force_eager") if self.runtime.compile else contextlib.nullcontext()

    @property
    def eval_batch(self) -> int | None:
        """Sequences of an evaluation batch. A compiled model is compiled for one shape; else evaluation chooses."""
        return self.micro_batch if self.models.is_compiled else None

    def _learning_rate(self) -> float:
        peak, max_iters = self.config.optimizer.learning_rate, self.config.training.max_iters
        return learning_rate_at(self.state.step, peak, self.config.scheduler, max_iters)

    def should_stop_early(self) -> bool:
        """Whether the validation loss has not improved for early_stopping_patience evaluations."""
        patience, state = self.config.training.early_stopping_patience, self.state
        if patience is None or state.evaluations_without_gain < patience:
            return False
        self.say(f"stopping early: {patience} evaluations without a better val loss than {state.best_val_loss:.4f}")
        return True

    def write_sample(self) -> None:
        """Logs a text that the model continues."""
        self.sampled_at = self.state.step
        prompt, tokens = self.plan.prompt, self.config.generation.max_new_tokens
        if not prompt:  # only the last sample
            prompt, tokens = [int(self.plan.train_data.shards[0][0])], min(tokens, SHORT_SAMPLE)
        text = self.continued(prompt, tokens) if self.runtime.is_master or self.runtime.is_sharded else ""
        if self.runtime.is_master:
            self.log.sample(self.state.step, text)

    @torch.no_grad()
    def continued(self, prompt: list[int], tokens: int) -> str:
        """The prompt, continued by the model. Its draws do not change training's random numbers."""
        generation, tokenizer = self.config.generation, self.plan.tokenizer
        assert tokenizer is not None  # make_plan refuses samples without one
        idx = torch.tensor([prompt], device=self.runtime.device)
        self.model.eval()
        with forked_random(self.runtime.device), self.runtime.autocast(), self._eager():
            torch.manual_seed(self.config.system.seed)
            temperature = max(generation.temperature, 1e-5)
            out = self.model.generate(idx, tokens, temperature, generation.top_k or None)
        self.model.train()
        return tokenizer.decode([i for i in out[0].tolist() if i < tokenizer.vocab_size])

    def save(self) -> None:
        """Saves the state of this step, unless that is done. A thread writes it."""
        self.saver.report(wait=True)  # one at a time
        if self.state.saved_at != self.state.step:
            self.report_steps(wait=True)
            self.guard.compare(self.model, self.state.step, now=True)
            self.saver.save(self.model, self.optimizer, self.scaler, self._machine())

    def save_alone(self) -> None:
        """Saves before an error ends the run. Not with several processes, because the others would not participate."""
        if self.state.step and self.runtime.world_size == 1:
            self.save()

    def _machine(self) -> dict[str, Any]:
        compiled = self.models.is_compiled
        return present_machine(self.model, self.optimizer, self.runtime, compiled, self.micro_batch)

    def _restore(self, saved: checkpoints.Checkpoint) -> list[str]:
        """Restores all but the model's own weights from a checkpoint. Returns what cannot be restored."""
        check_adapter(self.model, saved.adapter)
        load_weights(self.model, saved.adapter)
        notes = restore(saved, self.state, self.optimizer, self.scaler, self.runtime, self.config)
        self.guard.detector.recent = self.state.recent_losses
        return notes

    def roll_back(self, error: NotFiniteError) -> None:
        """Rolls back to the newest good checkpoint and continues with different batches. Raises TrainingError after
        max_rollbacks, or without a checkpoint."""
        state, limit = self.state, self.config.training.max_rollbacks
        self.saver.report(wait=True)
        wait_for_all(self.runtime.world_size)
        if state.rollbacks >= limit:
            raise TrainingError(f"{error}; stopped: max_rollbacks={limit} reached; the last good checkpoint is kept")
        try:
            saved = load(self.out_dir, "last", need_tokenizer=False, merge=False, lazily=self.runtime.world_size > 1)
        except UserError as reason:
            raise TrainingError(f"{error}; stopped: no checkpoint to return to ({reason})") from None
        rollbacks, reached, shift = state.rollbacks + 1, state.step, state.data_shift
        load_weights(self.model, saved.model)
        self._restore(saved)
        state.rollbacks, state.data_shift, state.skipped_in_a_row = rollbacks, shift + reached - saved.step, 0
        state.saved_at = -1  # the checkpoint does not contain the rollback
        self.guard.pending.clear()
        self.log.forget_from(saved.step, state.evaluated_at == saved.step)
        done = f"rolled back to {saved.path}, continuing with different batches (rollback {rollbacks}/{limit})"
        self.say(f"warning: {error}; {done}")

    # --- the end ---

    def finish(self) -> TrainResult:
        """The last evaluation, the final checkpoint, the plot, README.md, a sample; only checkpoint and README.md if
        the run was stopped. Raises NotFiniteError if the last step broke the weights."""
        training, state, final = self.config.training, self.state, None
        self.stop.share(self.runtime.device)
        stopped = self.stop.agreed()
        fresh = state.step > 0 and state.evaluated_at != state.step
        if not stopped and fresh and not training.inclusive_max_iters:  # nanoGPT's last line is that of max_iters
            try:
                self.evaluate()
            except Interrupted:
                stopped = True
        if state.step and not all_finite(self.model, self.runtime):
            raise self._not_finite(Finding(state.step, self._learning_rate(), math.nan, math.nan))
        if state.step > 0 or stopped:  # the resume command needs a checkpoint
            self.save()
            self.saver.finish(stopped)
        if stopped:
            hint = resume_command(self.config, self.command, self.runtime.world_size)
            self.say(f"stopped at step {state.step}{', not saved' * self.saver.failed}; resume with: {hint}")
        elif training.final_eval:
            try:
                final = self._evaluate_whole()
            except Interrupted:
                self.say(f"the run is complete; to evaluate it: {eval_command(self.config)}")
        if not stopped and state.step:
            self.log.plot()
            before_after.end(self.plan, self.log, state.run_id, self.continued)
        if state.step and self.runtime.is_master:
            with self.log.writing(README):
                if not write_readme(self.out_dir / README, readme(self.plan, state, self.command)):
                    self.say(f"{self.out_dir / README} was edited, or was not written by a run: not overwritten")
        if not self.stop.exit_code and self._wants_last_sample():
            self.write_sample()
        return self.result(final)

    def _wants_last_sample(self) -> bool:
        """Whether to sample the finished model: if the run writes samples, or in a terminal. A sample costs
        about half a second, much of a short run."""
        seen = self.log.is_watched and not self.runtime.is_sharded  # then all processes write it, and one knows
        wanted = self.config.training.sample_interval or (seen and self.plan.tokenizer is not None)
        return bool(wanted) and not self.is_nanogpt and self.state.step not in (self.sampled_at, self.plan.start_step)

    def _evaluate_whole(self) -> Evaluation | None:
        plan, runtime = self.plan, self.runtime
        expected = len(plan.val_data) / self.eval_rate if self.eval_rate else 0.0
        is_long = self.config.training.final_eval is True and expected > max(LONG_FINAL_EVALUATION, self.timer.total)
        if any_rank(is_long, runtime.device, runtime.world_size):  # their clocks differ
            skipped = f"skipped: about {expected / 60:.0f} min. To run it: {eval_command(self.config)}"
            self.say(f"evaluation of the whole validation split {skipped}")
            return None
        final, parts = evaluate_parts(
            self.models.compiled, plan.val_data, self.config.model.block_size, runtime, plan.tokenizer,
            self.eval_batch, self.stop.interrupt,
        )  # fmt: skip
        self.log.final(self.state.step, final, {name: part.loss for name, part in parts.items()})
        return final

    def result(self, final: Evaluation | None = None) -> TrainResult:
        state, code = self.state, int(self.saver.failed) or self.stop.exit_code
        return TrainResult(state.step, self.out_dir, self.saver.saved_to, state.best_val_loss, final, code)

    def close(self) -> None:
        """Waits for a checkpoint that is being written, unless a second signal asked to stop at once."""
        if not self.stop.is_second:
            self.saver.report(wait=True)
        self.loader.close()
        for scan in self.plan.scans:
            scan.close()
        self.log.close(self.state.step)
