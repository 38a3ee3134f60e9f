"""train(config): the loop, from top to bottom.

A step is one optimizer update on one global batch. At step s the model has had s updates; evaluation, checkpoint and
samples of step s come before its update. Nothing that watches (evaluation, logging, samples) draws from the random
numbers that training uses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import store as checkpoints
from ..checkpoint.load import load
from ..config import Config
from ..core.dataset import BatchLoader
from ..core.model import GPT
from ..core.resident import tokens_on
from ..errors import Interrupted, MemoryShortError, NotFiniteError, TrainingError, UserError
from ..machine import device as runtimes
from ..machine.files import FolderLock
from ..machine.processes import distributed_env
from .adagrad import forget_long_ngrams
from .evaluate import Evaluation, any_process, estimate_loss, evaluate_split
from .guards import Finding, StepGuard, StopRequest, all_finite, not_finite_error
from .loggers import RunLog, teller
from .microbatch import fitted, halve_micro_batch, no_room_to_step
from .optimizer import make_optimizer, set_learning_rates, step_unless
from .progress import LONG_FINAL_EVALUATION, Calendar, Remaining, StepTimer
from .resume import machine_of, not_bit_exact, resume_command, take_folder
from .samples import write_sample
from .saver import Saver
from .scheduler import learning_rate_at
from .setup import Plan, describe, prepare
from .state import TrainState, restore
from .step import clip_gradients, gradients
from .wrap import Wrapped, wrap


@dataclass
class TrainResult:
    """How a run ended."""

    step: int
    out_dir: Path
    checkpoint: Path | None
    best_val_loss: float
    final: Evaluation | None
    """The whole validation split at the last step; None where it was turned off, too long, or the run was stopped."""
    exit_code: int
    """0, 128 + the number of the signal that stopped the run, or 1 where the last state could not be saved."""


def train(config: Config, sources: dict[str, str] | None = None, command: str = "llm-train") -> TrainResult:
    """Trains a model as the settings say; returns how it ended.

    sources: where each setting was set (see presets.parse); command: what the resume hint names.
    Raises UserError before anything is written where settings, data, weights or machine do not fit, and
    TrainingError where the run cannot go on.
    """
    out_dir = Path(config.training.out_dir)
    lock = FolderLock(out_dir)
    with contextlib.ExitStack() as leave:
        leave.callback(lock.release)
        training, is_first = config.training, distributed_env()[0] == 0
        if is_first and out_dir.is_dir() and training.init_from in ("resume", "auto") and not training.eval_only:
            lock.acquire()  # now, since damaged checkpoints are set aside before the run starts
        plan = prepare(config, sources)
        leave.callback(runtimes.stop)
        runtimes.start(plan.runtime, plan.config.system)
        stop = leave.enter_context(StopRequest(plan.runtime.world_size))
        trainer = Trainer(plan, command, stop, lock)
        leave.callback(trainer.close)
        result = trainer.run()
    return result


class Trainer:
    """One run: its model, its optimizer and its state."""

    def __init__(self, plan: Plan, command: str, stop: StopRequest, lock: FolderLock):
        self.plan, self.config, self.runtime = plan, plan.config, plan.runtime
        self.command, self.stop, self.lock = command, stop, lock
        self.out_dir = Path(self.config.training.out_dir)
        self.state = TrainState(run_id=secrets.token_hex(6), step=plan.start_step)
        model = GPT(self.config.model)
        if plan.weights is not None:
            model.load_state_dict(plan.weights)
        checkpoints.check_storable(model.state_dict(), self.config.model)
        self.runtime.place(model)
        self.optimizer = make_optimizer(model, self.config.optimizer, self.runtime.device, self.config.system.seed)
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.dtype == torch.float16)
        say = teller(self.runtime.is_master)
        for line in describe(plan):
            say(line)
        self.models: Wrapped = fitted(plan, lambda: wrap(model, self.config, self.runtime, plan.micro_batch, say), say)
        # a compiled model is compiled for one shape; else evaluation chooses a larger batch
        self.eval_batch = plan.micro_batch if self.models.is_compiled else None
        self.eval_rate: float | None = None  # tokens/s
        self.mfu: float | None = None
        self.timer = StepTimer()
        self.guard = StepGuard(self.state.recent_losses, self.config.training.skip_spikes, self.runtime)
        vocab_size = self.config.model.vocab_size
        self.loader = BatchLoader(
            plan.train_data, plan.order, plan.global_batch, self.runtime.device, self.runtime.rank,
            self.runtime.world_size, vocab_size,
            tokens_on(self.runtime.device, plan.train_data, vocab_size, self.config.system.data_on_device, say),
        )  # fmt: skip
        if plan.resumed is not None:
            for line in self._restore(plan.resumed) + not_bit_exact(self._machine(), plan.resumed):
                say(line)
        self.log = self._open_log()  # the first that is written: all that can fail before step 0 is behind
        self.saver = Saver(plan, self.state, self.log)
        plan.weights = plan.resumed = None  # free the memory

    def run(self) -> TrainResult:
        training, state, last = self.config.training, self.state, self.plan.last_step
        if training.eval_only:
            with contextlib.suppress(Interrupted):
                self._evaluate()
            return self._result(None, self.stop.exit_code)
        if state.step >= last:
            self.log.say(f"nothing to do: the run stands at step {state.step} of {last}; raise --max_iters")
        while True:
            try:
                return self._finish(self._loop())
            except NotFiniteError as error:
                self._roll_back(error)
            except (UserError, MemoryShortError):  # data or memory fail under the run: what has been learned is kept
                if state.step and self.runtime.world_size == 1:  # others would not take part
                    self._save()
                raise

    def _loop(self) -> bool:
        """Trains to the last step. Returns whether it was stopped before."""
        training, state, last = self.config.training, self.state, self.plan.last_step
        stopped = self.stop.agreed()
        while state.step < last and not stopped:
            try:
                if state.step % training.eval_interval == 0 and state.evaluated_at != state.step:
                    self._evaluate()
                if self.saver.is_due():
                    self._save()
                if training.sample_interval and state.step % training.sample_interval == 0 and self.runtime.is_master:
                    self.log.sample(state.step, write_sample(self.models.raw, self.plan))
                if self._should_stop_early():
                    break
                self._update()
                self._heed(all_of_them=state.step == last)
                self.timer.pause()
                self.stop.if_unheard(self.log.reader_is_gone)
                stopped = self.stop.agreed()
            except Interrupted:
                stopped = True
        return stopped

    def _update(self) -> None:
        """One optimizer update on one global batch; left out where loss or gradient is not finite."""
        state, clip, lr = self.state, self.config.optimizer.grad_clip, self._learning_rate()
        self.saver.tell()
        self.timer.start()
        set_learning_rates(self.optimizer, lr)
        place = state.step + state.data_shift  # in the order of the data
        if self.config.optimizer.forget_ngrams and self.plan.order.begins_epoch(place, self.plan.global_batch):
            forget_long_ngrams(self.optimizer, self.config.model.ngram_rows)
        loss = self._gradients(place)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.models.raw, clip)
        skip = self.guard.judge(state.step, lr, loss, norm, self.stop)
        with no_room_to_step(self.plan):
            step_unless(skip, self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        self.timer.count += 1

    def _gradients(self, place: int) -> Tensor:
        """Forward and backward over this process's share of the batch, in parts that fit. Returns the mean loss."""
        for scan in self.plan.scans:
            scan.raise_if_bad()
        x, y = self.loader.get(place)  # (rows, T)
        while True:
            try:
                return gradients(self.models, x, y, self.plan.micro_batch, self.runtime, self.scaler)
            except Exception as error:
                if not runtimes.is_out_of_memory(error):
                    raise
                reason = str(error)
            # outside the except block: the error's traceback holds on to the tensors of the step
            self._halve_micro_batch(reason)

    def _halve_micro_batch(self, reason: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.log.say(halve_micro_batch(self.plan, reason))
        if self.models.is_compiled:
            self.eval_batch = self.plan.micro_batch

    def _learning_rate(self) -> float:
        """That of the update at the present step."""
        config = self.config
        peak, max_iters = config.optimizer.learning_rate, config.training.max_iters
        return learning_rate_at(self.state.step, peak, config.scheduler, max_iters)

    def _heed(self, all_of_them: bool) -> None:
        """Logs the steps that the device is done with. Raises NotFiniteError where a bad one is one too many."""
        for found in self.guard.findings(all_of_them):
            self.stop.heard = self.stop.heard or found.signum
            self._log_step(found)
            self._count_skipped(found)

    def _log_step(self, found: Finding) -> None:
        if found.step % self.config.logging.log_interval and not (found.skipped or found.spike):
            return
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
            self.log.say(f"warning: {found}, a spike far above the last losses{', left out' * found.skipped}")
        if found.is_finite:
            state.skipped_in_a_row = 0
        elif not math.isfinite(found.loss) or not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
            state.skipped_in_a_row += 1
            self.log.say(f"warning: {found}, left out; {state.skipped_in_a_row} in a row")
            too_many = state.skipped_in_a_row >= self.config.training.max_skipped_steps
            if too_many or not all_finite(self.models.raw):
                raise self._not_finite(found)
        # else float16 looks for the largest scale of the gradients that does not overflow

    def _not_finite(self, found: Finding) -> NotFiniteError:
        begins = self.plan.order.starts(found.step + self.state.data_shift, self.plan.global_batch)
        return not_finite_error(found, begins.tolist(), self.models.raw, self.config, self.runtime)

    def _roll_back(self, error: NotFiniteError) -> None:
        """Back to the newest good checkpoint, with other batches from there on. Raises TrainingError in the end."""
        state, limit = self.state, self.config.training.max_rollbacks
        self.saver.tell(wait=True)
        if self.runtime.world_size > 1:
            torch.distributed.barrier()
        if state.rollbacks >= limit:
            raise TrainingError(f"{error}; stopped after {limit} roll-backs; the last good checkpoint is kept")
        try:
            saved = load(self.out_dir, "last", need_tokenizer=False)
        except UserError as reason:
            raise TrainingError(f"{error}; stopped: no checkpoint to go back to ({reason})") from None
        rollbacks, reached, shift = state.rollbacks + 1, state.step, state.data_shift
        self.models.raw.load_state_dict(saved.model)
        self._restore(saved)
        state.rollbacks, state.data_shift, state.skipped_in_a_row = rollbacks, shift + reached - saved.step, 0
        state.saved_at = -1  # the checkpoint does not know of the roll-back
        self.guard.pending.clear()
        self.log.forget_from(saved.step, state.evaluated_at == saved.step)
        told = f"back to {saved.path}, with other batches from there on (roll-back {rollbacks}/{limit})"
        self.log.say(f"warning: {error}; {told}")

    def _evaluate(self) -> None:
        """Estimates the losses on fixed batches, and keeps count of the best. Raises NotFiniteError."""
        self._heed(all_of_them=True)
        training, state = self.config.training, self.state
        windows = training.eval_iters * self.config.data.batch_size
        block_size, losses, begin = self.config.model.block_size, {}, time.perf_counter()
        for split, data in (("train", self.plan.train_data), ("val", self.plan.val_data)):
            losses[split] = estimate_loss(
                self.models.compiled, data, block_size, windows, self.runtime, self.eval_batch, self.stop.pulse
            )
        self.eval_rate = 2 * windows * block_size / (time.perf_counter() - begin)
        lr = self._learning_rate()
        metrics = {"train_loss": losses["train"], "val_loss": losses["val"], "lr": lr}
        self.log.evaluation(state.step, metrics | ({"mfu": self.mfu} if self.mfu is not None else {}))
        if not math.isfinite(sum(losses.values())):
            raise self._not_finite(Finding(state.step, lr, sum(losses.values()), math.nan))
        state.evaluated_at, state.val_loss = state.step, losses["val"]
        if losses["val"] < state.best_val_loss:
            state.best_val_loss, state.best_step, state.evaluations_without_gain = losses["val"], state.step, 0
        else:
            state.evaluations_without_gain += 1

    def _should_stop_early(self) -> bool:
        patience, state = self.config.training.early_stopping_patience, self.state
        if patience is None or state.evaluations_without_gain < patience:
            return False
        self.log.say(f"stopping early: {patience} evaluations without a better val loss than {state.best_val_loss:.4f}")
        return True

    def _save(self) -> None:
        self.saver.tell(wait=True)  # one at a time
        if self.state.saved_at != self.state.step:
            self._heed(all_of_them=True)
            self.saver.save(self.models.raw, self.optimizer, self.scaler, self._machine())

    def _machine(self) -> dict[str, Any]:
        return machine_of(self.runtime, self.optimizer, self.models.is_compiled, self.plan.micro_batch)

    def _restore(self, saved: checkpoints.Checkpoint) -> list[str]:
        """Takes all but the weights from a checkpoint. Returns what cannot be as it was."""
        notes = restore(saved, self.state, self.optimizer, self.scaler, self.runtime, self.config.model.dropout > 0)
        self.guard.detector.recent = self.state.recent_losses
        return notes

    def _open_log(self) -> RunLog:
        moved, first, resumed = take_folder(self.plan, self.lock), self.plan.start_step, self.plan.resumed is not None
        evaluated = self.state.evaluated_at == first
        left = Remaining(Calendar.of(self.plan), self.timer, first)
        log = RunLog(
            self.config, self.runtime.is_master, first, self.plan.last_step, resumed, evaluated, left, self.state.run_id
        )  # fmt: skip
        if moved is not None:
            log.say(f"{self.out_dir} held an earlier run: moved to {moved}")
        return log

    def _finish(self, stopped: bool) -> TrainResult:
        """The last evaluation, the final checkpoint, the picture; or just the checkpoint where the run was stopped."""
        training, state = self.config.training, self.state
        final = None
        fresh = state.step > 0 and state.evaluated_at != state.step
        if not stopped and fresh and not training.inclusive_max_iters:  # nanoGPT's last line is that of max_iters
            try:
                self._evaluate()
            except Interrupted:
                stopped = True
        if state.step and not all_finite(self.models.raw):
            raise self._not_finite(Finding(state.step, self._learning_rate(), math.nan, math.nan))
        if state.step > 0 or stopped:  # the command to go on with must have something to go on from
            self._save()
            self.saver.tell(wait=True)
        if self.runtime.world_size > 1:  # one that leaves early has torchrun end the one that writes
            torch.distributed.barrier()
        if stopped:
            hint = resume_command(self.config, self.command, self.runtime.world_size)
            self.log.say(f"stopped at step {state.step}{', not saved' * self.saver.failed}; go on with: {hint}")
        elif training.final_eval:
            try:
                final = self._evaluate_whole()
            except Interrupted:
                self.log.say(f"the run is complete; its last evaluation: llm-eval --out_dir={self.out_dir}")
        if self.runtime.is_master and not stopped and state.step:
            self._plot()
        return self._result(final, self.stop.exit_code)

    def _evaluate_whole(self) -> Evaluation | None:
        plan, expected = self.plan, len(self.plan.val_data) / self.eval_rate if self.eval_rate else 0.0
        if any_process(expected > max(LONG_FINAL_EVALUATION, self.timer.total), self.runtime):  # clocks differ
            self.log.say(
                f"the whole validation split would take about {expected / 60:.0f} min: left to "
                f"llm-eval --out_dir={self.out_dir} --dataset={self.config.data.dataset}"
            )
            return None
        block_size, model = self.config.model.block_size, self.models.compiled
        final = evaluate_split(
            model, plan.val_data, block_size, self.runtime, plan.tokenizer, self.eval_batch, self.stop.pulse
        )
        self.log.final(self.state.step, final)
        return final

    def _plot(self) -> None:
        wanted = self.config.logging.loss_plot
        if wanted or (wanted is None and importlib.util.find_spec("matplotlib") is not None):
            self.log.plot()

    def close(self) -> None:
        """Waits for a checkpoint that is being written, unless a second signal asked to end at once."""
        if not self.stop.is_second:
            self.saver.tell(wait=True)
        self.loader.close()
        for scan in self.plan.scans:
            scan.close()
        self.log.close(self.state.step)

    def _result(self, final: Evaluation | None, exit_code: int) -> TrainResult:
        state, code = self.state, int(self.saver.failed) or exit_code
        return TrainResult(state.step, self.out_dir, self.saver.saved_to, state.best_val_loss, final, code)
