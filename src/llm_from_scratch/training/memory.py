"""When memory runs out: the same batch in smaller parts."""

from __future__ import annotations

import os

import torch

from .guards import TrainingError
from .setup import Plan


def halve_micro_batch(plan: Plan, reason: str) -> str:
    """Halves the plan's micro-batch, or less where its batch has no such divisor; the batch itself stays. Returns what
    to tell the user. reason: the allocator's message. Raises TrainingError where there is nothing to halve.
    """
    runtime = plan.runtime
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    if plan.micro_batch == 1 or runtime.world_size > 1:  # other processes wait in an exchange of gradients
        size = "one sequence" if plan.micro_batch == 1 else f"{plan.micro_batch} sequences"
        smaller = "" if plan.micro_batch == 1 else f"lower --batch_size (now {plan.config.data.batch_size}), "
        raise TrainingError(
            f"out of memory with {size} at a time: about {plan.sizes.memory / (1 << 30):.1f} GiB are needed, "
            f"{_there(runtime.device)} ({' '.join(reason.split())[:200]}). To need less, {smaller}shorten "
            "--block_size, take a smaller model (--n_layer, --n_embd), or set --gradient_checkpointing=True"
        )
    batch = plan.global_batch // runtime.world_size
    plan.micro_batch = next(size for size in range(plan.micro_batch // 2, 0, -1) if batch % size == 0)
    return (
        f"warning: out of memory: the batch of {batch} sequences is cut into parts of {plan.micro_batch} from now on, "
        f"{plan.micro_steps} an update; the arithmetic is the same"
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
