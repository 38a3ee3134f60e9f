"""Training: train_step is one update, train is the whole run.

A step is one optimizer update on one global batch. At step s the model has had s updates; evaluation, checkpoint and
samples of step s come before its update. Evaluation, logging and samples draw nothing from training's random numbers.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import Config
from ..core.cache import Documents
from ..errors import Interrupted, MemoryShortError, NotFiniteError, UserError
from ..machine.budget import Deadline
from .microbatch import no_memory_for_moments, retry_smaller
from .opening import open_run
from .optimizer import clip_gradients, set_learning_rates, step_unless
from .run import Run, TrainResult
from .scheduler import learning_rate_at


@dataclass(frozen=True)
class Step:
    """The results of a step. The tensors have no dimensions and are on the device: reading one waits for it."""

    number: int
    learning_rate: float
    loss: Tensor
    """Mean over this process's share of the batch, nats per token."""
    grad_norm: Tensor
    """Before clipping."""
    skipped: Tensor
    """Whether weights and moments were left as they were."""


def train_step(run: Run, x: Tensor, y: Tensor, *packed: Tensor) -> Step:
    """One step on this process's share of a global batch: x and y, (rows, T) int64. Skipped if it is not finite. Goes
    through micro-batches that fit in memory. Raises the device's error if memory runs out before the update.

    packed: of packed documents, their numbers, (rows, T), and the share of each row in the loss, (rows,); of pairs also
    what they are compared with, (rows, pairs)."""
    config, model, optimizer, scaler = run.config, run.model, run.optimizer, run.scaler
    number, loss = run.state.step, torch.zeros((), device=x.device)
    lr = learning_rate_at(number, config.optimizer.learning_rate, config.scheduler, config.training.max_iters)
    set_learning_rates(optimizer, lr)

    parts = list(zip(*(t.split(run.micro_batch) for t in (x, y, *packed)), strict=True))
    if run.models.is_recorded and len(parts) > 1:  # otherwise a pass would overwrite the gradients of the previous one
        for p in (p for p in model.parameters() if p.requires_grad):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for i, (xi, yi, *of_rows) in enumerate(parts):
        with run.models.gradient_exchange(is_last=i == len(parts) - 1):  # several processes exchange gradients once
            with run.runtime.autocast():
                _, part = run.models.train(xi, yi, *Documents.of(of_rows[::2], model))
            # the gradient of the mean over all tokens of the batch that are learned, not of the sum
            part = part * of_rows[1].sum() if of_rows else part / len(parts)
            scaler.scale(part).backward()
        loss += part.detach()

    scaler.unscale_(optimizer)
    norm = clip_gradients(model, config.optimizer.grad_clip)
    skip = run.guard.judge(number, lr, loss, norm, run.stop)  # on the device
    with no_memory_for_moments(run.plan):
        step_unless(skip, optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    run.state.step += 1
    return Step(number, lr, loss, norm, skip)


def train(
    config: Config, sources: dict[str, str] | None = None, command: str = "llm-train", quiet: bool = False,
    deadline: Deadline | None = None,
) -> TrainResult:  # fmt: skip
    """Trains a model with these settings and returns the result. quiet: prints nothing. deadline: the number of
    updates is adjusted on the way so that the process ends then.

    sources: where each setting was set (see presets.parse); command: what the resume hint names.
    Raises UserError before anything is written if settings, data, weights and machine are not compatible, and
    TrainingError if the run cannot continue.
    """
    if quiet:
        config = replace(config, logging=replace(config.logging, progress="none"))
    with open_run(config, sources, command, deadline) as run:
        training, state, last = run.config.training, run.state, run.plan.last_step
        if training.eval_only:
            with contextlib.suppress(Interrupted):
                run.evaluate()
            return run.result()
        if state.step >= last:
            run.say(f"already finished (step {state.step} of {last}). To train longer, raise --max_iters.")
        while True:
            try:
                with contextlib.suppress(Interrupted):  # a signal during an evaluation
                    while state.step < (last := run.last_step()) and not run.stop.agreed():
                        if state.step % training.eval_interval == 0 and state.evaluated_at != state.step:
                            run.evaluate()
                        if run.saver.is_due():
                            run.save()
                        if training.sample_interval and state.step % training.sample_interval == 0:
                            run.write_sample()
                        if run.should_stop_early():
                            break
                        batch = run.next_batch()
                        attempt = lambda batch=batch: train_step(run, *batch)  # noqa: E731
                        retry_smaller(attempt, run.shrink, run.runtime.can_regroup)
                        run.report_steps(wait=state.step == last)
                return run.finish()
            except NotFiniteError as error:
                run.roll_back(error)
            except (UserError, MemoryShortError):  # data or memory failed during the run: save the progress
                run.save_alone()
                raise
