"""train(config): the loop, from top to bottom.

A step is one optimizer update on one global batch. At step s the model has had s updates; evaluation, checkpoint and
samples of step s come before its update. Nothing that watches (evaluation, logging, samples) draws from the random
numbers that training uses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, to_dict
from ..core import checkpoint as checkpoints
from ..core import runtime as runtimes
from ..core.dataset import BatchLoader
from ..core.model import GPT
from .evaluate import Evaluation, estimate_loss, evaluate_split
from .guards import StopRequest, TrainingError, check_finite
from .loggers import METRICS, RunLog, plot_losses
from .optimizer import load_optimizer_state, make_optimizer, optimizer_state
from .parallel import Wrapped, wrap
from .scheduler import learning_rate_at
from .setup import Plan, describe, prepare, resume_command

LONG_FINAL_EVALUATION = 120.0  # seconds; a longer one is left to llm-eval, unless the run itself was longer


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


@dataclass
class TrainState:
    """All that must survive besides weights, optimizer state and random states."""

    run_id: str
    step: int = 0
    best_val_loss: float = 1e9
    best_step: int = 0
    evaluations_without_gain: int = 0
    evaluated_at: int = -1
    saved_at: int = -1
    val_loss: float | None = None
    """Estimated at evaluated_at."""


def train(config: Config, sources: dict[str, str] | None = None, command: str = "llm-train") -> TrainResult:
    """Trains a model as the settings say; returns how it ended.

    sources: where each setting was set (see presets.parse); command: what the resume hint names.
    Raises UserError before anything is written where settings, data, weights or machine do not fit, and
    TrainingError where the run cannot go on.
    """
    plan = prepare(config, sources)
    runtimes.start(plan.runtime, plan.config.system)
    try:
        with StopRequest() as stop:
            trainer = Trainer(plan, command)
            try:
                return trainer.run(stop)
            finally:
                trainer.close()
    finally:
        runtimes.stop()


class Trainer:
    """One run: its model, its optimizer and its state."""

    def __init__(self, plan: Plan, command: str):
        self.plan, self.config, self.runtime = plan, plan.config, plan.runtime
        self.command = command
        self.out_dir = Path(self.config.training.out_dir)
        self.state = TrainState(run_id=secrets.token_hex(6), step=plan.start_step)
        model = GPT(self.config.model)
        if plan.weights is not None:
            model.load_state_dict(plan.weights)
        model.to(self.runtime.device)
        self.optimizer = make_optimizer(model, self.config.optimizer, self.runtime.device)
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.dtype == torch.float16)
        say = print if self.runtime.is_master else _silent
        for line in describe(plan):
            say(line)
        self.models: Wrapped = wrap(model, self.config, self.runtime, plan.micro_batch, say)
        # a compiled model is compiled for one shape; else evaluation chooses a larger batch
        self.eval_batch = plan.micro_batch if self.models.is_compiled else None
        self.eval_rate: float | None = None  # tokens/s
        self.mfu: float | None = None
        self.saved_to: Path | None = None
        self.save_failed = False  # the last try
        self.loader = BatchLoader(
            plan.train_data, plan.order, plan.global_batch, self.runtime.device, self.runtime.rank,
            self.runtime.world_size,
        )  # fmt: skip
        if plan.resumed is not None:
            self._restore(say)
        self.log = self._open_log()  # the first that is written: all that can fail before step 0 is behind
        plan.weights = plan.resumed = None  # free the memory

    def run(self, stop: StopRequest) -> TrainResult:
        training, state, last = self.config.training, self.state, self.plan.last_step
        if training.eval_only:
            self._evaluate()
            return self._result(None, 0)
        if state.step >= last:
            self.log.say(f"nothing to do: the run stands at step {state.step} of {last}; raise --max_iters")
        stopped = False
        timer = StepTimer()
        while state.step < last and not stopped:
            if state.step % training.eval_interval == 0 and state.evaluated_at != state.step:
                self._evaluate()
            self._save_if_due()
            if training.sample_interval and state.step % training.sample_interval == 0:
                self._sample()
            if self._should_stop_early():
                break
            timer.start()
            loss, grad_norm, lr = self._update()
            timer.count += 1
            if state.step % self.config.logging.log_interval == 0:
                self._log_step(state.step, loss, grad_norm, lr, timer)
            timer.pause()
            state.step += 1
            stopped = stop.agreed(self.runtime)
        return self._finish(stop, stopped, timer)

    def _update(self) -> tuple[Tensor, Tensor | None, float]:
        """One optimizer update. Returns the mean loss over the global batch's share of this process, and the norm."""
        config, state = self.config, self.state
        lr = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, y = self.loader.get(state.step)  # (rows, T)
        micro_steps = self.plan.micro_steps
        total = torch.zeros((), device=self.runtime.device)
        parts = zip(x.split(self.plan.micro_batch), y.split(self.plan.micro_batch), strict=True)
        for i, (xi, yi) in enumerate(parts):
            with self._gradients_meet(i == micro_steps - 1):
                with self.runtime.autocast():
                    _, loss = self.models.train(xi, yi)
                loss = loss / micro_steps  # the gradient of the mean, not of the sum
                self.scaler.scale(loss).backward()
            total += loss.detach()
        norm = None
        if config.optimizer.grad_clip:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.models.raw.parameters(), config.optimizer.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm, lr

    def _learning_rate(self) -> float:
        """That of the update at the present step."""
        config = self.config
        peak, max_iters = config.optimizer.learning_rate, config.training.max_iters
        return learning_rate_at(self.state.step, peak, config.scheduler, max_iters)

    def _gradients_meet(self, last: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once an update, in the last backward pass."""
        if self.runtime.world_size == 1 or last:
            return contextlib.nullcontext()
        return self.models.train.no_sync()  # type: ignore[operator]

    def _log_step(self, step: int, loss: Tensor, grad_norm: Tensor | None, lr: float, timer: StepTimer) -> None:
        value = self._mean_over_ranks(loss)  # waits for the device: the one synchronisation, and only when logged
        check_finite(value, step, lr, self.config, self.runtime)
        seconds = timer.seconds_per_step()
        rate = self.plan.tokens_per_step / seconds
        metrics = {"loss": value, "lr": lr, "time_ms": seconds * 1e3, "tokens_per_s": rate}
        if grad_norm is not None:
            metrics["grad_norm"] = float(grad_norm)
        if peak := self.runtime.peak_flops:
            metrics["mfu"] = rate * self.plan.sizes.flops_per_token / (peak * self.runtime.world_size)
        self.mfu = metrics.get("mfu")
        self.log.train_step(step, metrics)

    def _mean_over_ranks(self, value: Tensor) -> float:
        if self.runtime.world_size > 1:
            torch.distributed.all_reduce(value)
            value = value / self.runtime.world_size
        return float(value)

    def _evaluate(self) -> None:
        """Estimates the losses on fixed batches, and keeps count of the best."""
        training, state = self.config.training, self.state
        windows = training.eval_iters * self.config.data.batch_size
        block_size, losses, begin = self.config.model.block_size, {}, time.perf_counter()
        for split, data in (("train", self.plan.train_data), ("val", self.plan.val_data)):
            losses[split] = estimate_loss(
                self.models.compiled, data, block_size, windows, self.runtime, self.eval_batch
            )
        self.eval_rate = 2 * windows * block_size / (time.perf_counter() - begin)
        lr = self._learning_rate()
        metrics = {"train_loss": losses["train"], "val_loss": losses["val"], "lr": lr}
        self.log.evaluation(state.step, metrics | ({"mfu": self.mfu} if self.mfu is not None else {}))
        check_finite(losses["val"], state.step, lr, self.config, self.runtime)
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

    def _save_if_due(self) -> None:
        training, state = self.config.training, self.state
        just_evaluated = state.evaluated_at == state.step
        improved = just_evaluated and state.best_step == state.step
        if training.save_interval:
            due = state.step % training.save_interval == 0 or improved
        else:
            due = just_evaluated and (improved or training.always_save_checkpoint)
        if due and state.step > 0:
            self._save()

    def _save(self) -> None:
        """Writes a checkpoint of this very step, then lets go of older ones."""
        state = self.state
        if state.saved_at == state.step:
            return
        state.saved_at = state.step
        rng = self._random_states()  # of all processes: each takes part
        if not self.runtime.is_master:
            return
        val_loss = state.val_loss if state.evaluated_at == state.step else None
        contents: dict[str, Any] = {
            "step": state.step,
            "model": self.models.raw.state_dict(),
            "model_config": self.models.raw.config,
            "optimizer": optimizer_state(self.optimizer),
            "trainer": vars(state)
            | {"scaler": self.scaler.state_dict(), "dtype": str(self.runtime.dtype).removeprefix("torch.")},
            "rng": rng,
            "config": to_dict(self.config),
            "tokenizer": self.plan.tokenizer,
        }
        try:
            self.saved_to = checkpoints.save_checkpoint(
                self.out_dir, **contents, run_id=state.run_id, dataset_hash=self.plan.dataset_hash, val_loss=val_loss,
                keep_last=self.config.training.keep_last, keep_every=self.config.training.keep_every,
            )  # fmt: skip
            best_only = not self.config.training.always_save_checkpoint  # nanoGPT's ckpt.pt then holds the best
            if self.config.training.save_nanogpt_ckpt and (state.best_step == state.step or not best_only):
                whole = checkpoints.Checkpoint(path=None, **contents)
                checkpoints.write_nanogpt(self.out_dir / "ckpt.pt", whole, accept_erf_gelu=True)
        except checkpoints.SaveError as error:
            self.save_failed = True
            self.log.say(f"warning: step {state.step} is not saved: {error}")
            return
        self.save_failed = False
        self.log.say(f"saved checkpoint {self.saved_to}")

    def _random_states(self) -> dict[str, Tensor]:
        """The generators' states of every process: {"cpu.RANK": uint8 tensor, "cuda.RANK": ...}."""
        mine = {"cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        states: dict[str, Tensor] = {}
        for kind, tensor in mine.items():
            parts = [tensor]
            if self.runtime.world_size > 1:
                local = tensor.to(self.runtime.device)
                parts = [torch.empty_like(local) for _ in range(self.runtime.world_size)]
                torch.distributed.all_gather(parts, local)
            states |= {f"{kind}.{rank}": part.cpu() for rank, part in enumerate(parts)}
        return states

    def _restore(self, say: Callable[[str], None]) -> None:
        """Takes optimizer, scaler, counters and random states from the checkpoint."""
        saved = self.plan.resumed
        assert saved is not None
        if saved.optimizer is not None:
            load_optimizer_state(self.optimizer, saved.optimizer)
        else:
            say("the checkpoint holds no optimizer state: the moments start from zero")
        trainer = dict(saved.trainer)
        scaler = trainer.pop("scaler", None)
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        for name in vars(self.state):
            if trainer.get(name) is not None:
                setattr(self.state, name, trainer[name])
        self.state.step = saved.step
        # where a cut came before the evaluation of its step, the checkpoint is made anew with it: it may be the best
        self.state.saved_at = saved.step if self.state.evaluated_at == saved.step else -1
        rank = self.runtime.rank
        kinds: dict[str, Callable[[Tensor], None]] = {"cpu": torch.set_rng_state}
        if self.runtime.device.type == "cuda":
            kinds["cuda"] = lambda state: torch.cuda.set_rng_state(state, self.runtime.device)
        processes = sum(name.startswith("cpu.") for name in saved.rng)
        if processes == self.runtime.world_size and all(f"{kind}.{rank}" in saved.rng for kind in kinds):
            for kind, restore in kinds.items():
                restore(saved.rng[f"{kind}.{rank}"])
        elif self.config.model.dropout:
            say("other processes or devices than the checkpoint's: dropout is drawn anew, not bit-exact")

    @torch.no_grad()
    def _sample(self) -> None:
        """Lets the model write a little, from its own generator, so that watching changes nothing."""
        tokenizer, generation, raw = self.plan.tokenizer, self.config.generation, self.models.raw
        if tokenizer is None or not self.runtime.is_master:
            return
        idx = torch.tensor([self.plan.prompt], device=self.runtime.device)
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        raw.eval()
        with torch.random.fork_rng(devices=devices), self.runtime.autocast():
            torch.manual_seed(self.config.system.seed)
            out = raw.generate(
                idx, generation.max_new_tokens, max(generation.temperature, 1e-5), generation.top_k or None
            )
        raw.train()
        text = tokenizer.decode([i for i in out[0].tolist() if i < tokenizer.vocab_size])
        self.log.say(f"--- sample at step {self.state.step} ---\n{text}\n---")
        with (self.out_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.state.step, "text": text}) + "\n")

    def _open_log(self) -> RunLog:
        plan, resumed = self.plan, self.plan.resumed is not None
        if self.runtime.world_size > 1:
            torch.distributed.barrier()  # all have read their weights: the folder may be one that is moved now
        moved = None
        if self.runtime.is_master and not self.config.training.eval_only:
            if not resumed:
                moved = checkpoints.archive_previous(self.out_dir)
            self.out_dir.mkdir(parents=True, exist_ok=True)
            checkpoints.clean_leftovers(self.out_dir)
        log = RunLog(self.config, self.runtime.is_master, plan.start_step, plan.last_step, resumed)
        if moved is not None:
            log.say(f"{self.out_dir} held an earlier run: moved to {moved}")
        return log

    def _finish(self, stop: StopRequest, stopped: bool, timer: StepTimer) -> TrainResult:
        """The last evaluation, the final checkpoint, the picture; or just the checkpoint where the run was stopped."""
        training, state = self.config.training, self.state
        final = None
        fresh = state.step > self.plan.start_step and state.evaluated_at != state.step
        if not stopped and fresh and not training.inclusive_max_iters:  # nanoGPT's last line is that of max_iters
            self._evaluate()
        if state.step > 0:
            self._save()
        if stopped:
            self.log.say(f"stopped at step {state.step}; go on with: {resume_command(self.config, self.command)}")
        elif training.final_eval:
            final = self._evaluate_whole(timer.total)
        if self.runtime.is_master and not stopped and state.step:
            self._plot()
        return self._result(final, stop.exit_code if stopped else 0)

    def _evaluate_whole(self, trained_for: float) -> Evaluation | None:
        data, block_size = self.plan.val_data, self.config.model.block_size
        expected = len(data) / self.eval_rate if self.eval_rate else 0.0
        # clocks differ between processes, and all must decide the same
        mine = float(expected > max(LONG_FINAL_EVALUATION, trained_for))
        too_long = torch.tensor(mine, device=self.runtime.device)
        if self._mean_over_ranks(too_long) > 0:
            self.log.say(
                f"the whole validation split would take about {expected / 60:.0f} min: left to "
                f"llm-eval --out_dir={self.out_dir} --dataset={self.config.data.dataset}"
            )
            return None
        final = evaluate_split(
            self.models.compiled, data, block_size, self.runtime, self.plan.tokenizer, self.eval_batch
        )
        metrics = {"val_loss_full": final.loss, "perplexity": final.perplexity}
        text = f"final: val loss {final.loss:.4f} over the whole split ({final.tokens:,} tokens), "
        text += f"perplexity {final.perplexity:.2f}"
        if (bits := final.bits_per_byte) is not None:
            metrics["bits_per_byte"] = bits
            text += f", {bits:.3f} bits per byte"
        self.log.final(self.state.step, metrics)
        self.log.say(text)
        return final

    def _plot(self) -> None:
        wanted = self.config.logging.loss_plot
        if wanted or (wanted is None and importlib.util.find_spec("matplotlib") is not None):
            plot_losses(self.out_dir / METRICS, self.out_dir / "loss.png")

    def close(self) -> None:
        self.loader.close()
        self.log.close(self.state.step)

    def _result(self, final: Evaluation | None, exit_code: int) -> TrainResult:
        state = self.state
        return TrainResult(
            state.step, self.out_dir, self.saved_to, state.best_val_loss, final, exit_code or int(self.save_failed)
        )


def _silent(line: str) -> None:
    """What processes other than the first say."""


class StepTimer:
    """Seconds per update since the last log line, evaluations and checkpoints left out."""

    def __init__(self) -> None:
        self.count, self.total, self._sum = 0, 0.0, 0.0
        self._begin: float | None = None

    def start(self) -> None:
        self._begin = time.perf_counter()

    def pause(self) -> None:
        if self._begin is not None:
            spent = time.perf_counter() - self._begin
            self._sum, self.total, self._begin = self._sum + spent, self.total + spent, None

    def seconds_per_step(self) -> float:
        self.pause()
        mean = self._sum / max(1, self.count)
        self.count, self._sum = 0, 0.0
        return max(mean, 1e-9)


__all__ = ["TrainResult", "TrainingError", "train"]
