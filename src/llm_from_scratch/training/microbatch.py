"""How much of a batch fits into memory at once; and when it runs out: the same batch in smaller parts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from ..config import Config
from ..core.sizes import sizes
from ..errors import MemoryShortError, TrainingError
from ..machine.device import Runtime, is_out_of_memory
from .wrap import loss_is_chunked

if TYPE_CHECKING:  # which imports this
    from .setup import Plan

T = TypeVar("T")
SHARE = 0.85  # of the free memory: estimates err, and other programs grow
ENOUGH_ON_GPU = 1 << 16  # tokens of a micro-batch; more keep it no busier (an estimate)
ENOUGH_ON_CPU = 4096  # tokens of a micro-batch; measured: a CPU computes no faster with more


def largest_micro_batch(config: Config, runtime: Runtime, local_batch: int) -> int:
    """The largest divisor of a process's share of the batch that fits into the free memory, and pays."""
    free, most = free_memory(runtime.device), local_batch
    if runtime.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share it
        free = None if free is None else free // here
        most = min(local_batch, ENOUGH_ON_CPU // config.model.block_size)
    else:
        most = min(local_batch, max(1, ENOUGH_ON_GPU // config.model.block_size))
    for size in range(most, 1, -1):
        if local_batch % size == 0 and (free is None or _needed(config, runtime, size) <= SHARE * free):
            return size
    return 1


def _needed(config: Config, runtime: Runtime, micro_batch: int) -> int:
    """Bytes, an estimate."""
    model = config.model
    rest = (micro_batch, runtime.dtype.itemsize, config.training.gradient_checkpointing)
    whole = sizes(model, *rest)
    if not loss_is_chunked(config, micro_batch):
        return whole.memory
    blocks = sizes(dataclasses.replace(model, vocab_size=1), *rest).activations
    head = 4 * (model.vocab_size or 0) * model.n_embd
    return whole.memory - whole.activations + blocks + 2 * head  # its gradient as it is, and scaled


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; on a CPU within its container. None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [numbers["MemAvailable:"] * 1024 for numbers in _numbers("/proc/meminfo") if "MemAvailable:" in numbers]
    limit = "/sys/fs/cgroup/memory.max"  # control groups, version 2; without a limit it says "max"
    with contextlib.suppress(OSError, ValueError):
        for numbers in _numbers("/sys/fs/cgroup/memory.stat"):
            found.append(max(0, int(Path(limit).read_text()) - numbers["anon"]))
    return min(found, default=None)


def _numbers(path: str) -> list[dict[str, int]]:
    """A file of lines of a name and a number, as a dictionary; nothing where there is no such file."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
        return [{line[0]: int(line[1]) for line in lines}]
    except (OSError, ValueError, IndexError):
        return []


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
