"""What is put around the model, in this order: activation checkpointing, compilation, data parallelism."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from ..config import Config, UserError
from ..core.model import GPT
from ..core.runtime import Runtime, forked_random, is_out_of_memory


@dataclass
class Wrapped:
    """One model in the forms that the loop needs; all share their parameters."""

    raw: GPT
    """The bare model: state, sampling."""
    compiled: nn.Module
    """For evaluation: compiled where the run compiles."""
    train: nn.Module
    """For training: with gradients averaged over the processes."""
    is_compiled: bool


def wrap(model: GPT, config: Config, runtime: Runtime, micro_batch: int, say: Callable[[str], None]) -> Wrapped:
    """Raises UserError where compile=True is asked for and fails; under auto a failure falls back to eager."""
    if config.training.gradient_checkpointing:
        for block in model.transformer.h:
            # the attribute shadows the method: state-dict keys stay, and the model has no branch for it
            block.forward = functools.partial(_recompute, block.forward)
    compiled: nn.Module = model
    if runtime.compile:
        compiled = _compile(model, config, runtime, micro_batch, say)
    train = compiled
    if runtime.world_size > 1:
        ids = [runtime.device.index] if runtime.device.type == "cuda" else None
        train = nn.parallel.DistributedDataParallel(compiled, device_ids=ids)
    return Wrapped(model, compiled, train, compiled is not model)


def _recompute(forward: Callable, *args: object) -> object:
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False)
    return forward(*args)


def _compile(model: GPT, config: Config, runtime: Runtime, micro_batch: int, say: Callable[[str], None]) -> nn.Module:
    """The compiled model, tried once on a batch of the run's shape, so that a failure shows before step 0."""
    say("compiling the model (about a minute)")
    shape = (micro_batch, config.model.block_size)
    x, y = torch.zeros((2, *shape), dtype=torch.long, device=runtime.device)
    try:
        compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
        with forked_random(runtime.device):  # the trial must not move the run's random numbers
            with runtime.autocast():
                _, loss = compiled(x, y)
            loss.backward()
            compiled.eval()
            with runtime.autocast(), torch.no_grad():
                compiled(x, y)
    except Exception as error:
        if is_out_of_memory(error):
            raise  # a smaller batch may fit
        reason = " ".join(str(error).split())[:200]
        if not runtime.compile_may_fail:
            raise UserError(f"torch.compile failed ({reason}); run with --compile=False") from None
        say(f"torch.compile failed ({reason}); going on without it")
        torch._dynamo.reset()
        compiled = model
    finally:
        model.train().zero_grad(set_to_none=True)
    return compiled
