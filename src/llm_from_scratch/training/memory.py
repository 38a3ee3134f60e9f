"""When memory runs out: the same batch in smaller parts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ..core.runtime import is_out_of_memory
from .guards import TrainingError
from .setup import Plan

T = TypeVar("T")


class MemoryShortError(TrainingError):
    """Not even the smallest part of a batch fits. Weights and moments are those of the last step."""


def fitted(plan: Plan, build: Callable[[], T], say: Callable[[str], None]) -> T:
    """build(), with smaller micro-batches until it fits: compiling tries the model on one. Raises MemoryShortError."""
    while True:
        try:
            return build()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        say(halve_micro_batch(plan, reason))


@contextlib.contextmanager
def no_room_to_step(plan: Plan) -> Iterator[None]:
    """The optimizer's step, which makes its moments at the first: no smaller batch helps there."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(_message(plan, "for the optimizer's moments", str(error), "")) from None


def halve_micro_batch(plan: Plan, reason: str) -> str:
    """Halves the plan's micro-batch, or less where its batch has no such divisor; the batch itself stays. Returns what
    to tell the user. reason: the allocator's message. Raises MemoryShortError where there is nothing to halve.
    """
    runtime = plan.runtime
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    if plan.micro_batch == 1 or runtime.world_size > 1:  # other processes wait in an exchange of gradients
        size = "one sequence" if plan.micro_batch == 1 else f"{plan.micro_batch} sequences"
        smaller = "" if plan.micro_batch == 1 else f"lower --batch_size (now {plan.config.data.batch_size}), "
        raise MemoryShortError(_message(plan, f"with {size} at a time", reason, smaller))
    batch = plan.global_batch // runtime.world_size
    plan.micro_batch = next(size for size in range(plan.micro_batch // 2, 0, -1) if batch % size == 0)
    return (
        f"warning: out of memory: the batch of {batch} sequences is cut into parts of {plan.micro_batch} from now on, "
        f"{plan.micro_steps} an update; the arithmetic is the same"
    )


def _message(plan: Plan, where: str, reason: str, smaller: str) -> str:
    return (
        f"out of memory {where}: about {plan.sizes.memory / (1 << 30):.1f} GiB are needed, "
        f"{_there(plan.runtime.device)} ({' '.join(reason.split())[:200]}). To need less, {smaller}shorten "
        "--block_size, take a smaller model (--n_layer, --n_embd), or set --gradient_checkpointing=True"
    )


def _there(device: torch.device) -> str:
    try:
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[1]
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"{device} has {memory / (1 << 30):.1f} GiB"
    except (AttributeError, ValueError, OSError):
        return f"{device} has less"
