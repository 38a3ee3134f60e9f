"""How many sequences fit in memory at once, and what to do when memory runs out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from ..config import Config
from ..errors import MemoryShortError, PeerMemoryError, TrainingError, UserError, one_line
from ..machine.device import Runtime, is_out_of_memory
from ..machine.files import read_json, write_whole
from ..machine.memory import free_memory, total_memory
from ..machine.processes import is_refused_exchange, is_restarted, launch, may_restart
from .plan import Plan, training_sizes

T = TypeVar("T")
SHARE = 0.85  # of the free memory: estimates are rough, and other programs grow
ENOUGH_ON_GPU = 1 << 16  # tokens of a micro-batch; more are not faster (an estimate)
ENOUGH_ON_CPU = 4096  # tokens of a micro-batch; more are not faster (measured)
SHORT = ".micro-batch.json"  # in out_dir: for the processes that torchrun starts after memory ran out
ENOUGH_FOR_ADAPTERS = 1024  # on a CPU: twice as many are a twentieth faster and need a quarter more memory (measured)


def largest_micro_batch(config: Config, runtime: Runtime, local_batch: int) -> int:
    """The largest divisor of a process's share of the batch that fits in free memory and is still faster."""
    free = _free(runtime)
    adapts = config.finetune.lora_rank is not None
    on_cpu = ENOUGH_FOR_ADAPTERS if adapts else ENOUGH_ON_CPU
    enough = on_cpu if runtime.device.type == "cpu" else ENOUGH_ON_GPU
    for size in range(min(local_batch, enough // config.model.block_size), 1, -1):
        if local_batch % size == 0:
            if free is None or training_sizes(config, runtime, size).memory <= SHARE * free:
                return size
    return 1


def keeps_memory(plan: Plan) -> bool:
    """Whether this process keeps a step's memory for the next one."""
    asked, free = plan.config.system.keep_memory, _free(plan.runtime)
    return asked if asked != "auto" else free is not None and 2 * plan.sizes.memory <= free


def _free(runtime: Runtime) -> int | None:
    """Bytes for this process; on a CPU the processes of the machine share them."""
    free, here = free_memory(runtime.device), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free if free is None or runtime.device.type != "cpu" else free // here


def retry_smaller(attempt: Callable[[], T], shrink: Callable[[str], None], regroups: bool = False) -> T:
    """Calls attempt(). Each time memory runs out, calls shrink(the allocator's message; empty if only another process
    ran short) and tries again. regroups:
    shrink() repairs the exchange with a process that has left it because its memory ran out."""
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error) and not (regroups and is_refused_exchange(error)):
                raise
            reason = "" if isinstance(error, PeerMemoryError) else str(error) or type(error).__name__
        shrink(reason)  # outside the except block: the error's traceback keeps the tensors of the step alive


@contextlib.contextmanager
def no_memory_for_moments(plan: Plan) -> Iterator[None]:
    """Around the optimizer's step, which allocates its moments the first time: a smaller micro-batch does not help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(_message(plan, "for the optimizer's moments", str(error), "")) from None


def halved(plan: Plan, micro_batch: int, reason: str, together: bool) -> int:
    """Half of the micro-batch, or the next smaller divisor of the batch. reason: the allocator's message; together:
    whether all processes do the same. Raises MemoryShortError if it cannot be smaller now; if torchrun starts the
    processes again, they do it."""
    runtime, out_dir = plan.runtime, Path(plan.config.training.out_dir)
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    if micro_batch == 1:
        raise MemoryShortError(_message(plan, "with one sequence at a time", reason, ""))
    size = _divisor(plan.global_batch // runtime.world_size, micro_batch // 2)
    if runtime.world_size == 1 or together:
        return size
    text = _message(plan, f"with {micro_batch} sequences at a time", reason, f"set --micro_batch={size}, ")
    if may_restart():  # the others wait in an exchange, and end with this process
        with contextlib.suppress(OSError):
            write_whole(out_dir / SHORT, json.dumps({"launch": launch(), "micro_batch": size}).encode())
            text += f". torchrun starts the run again, with {size} at a time"
    raise MemoryShortError(text)


def after_shortage(plan: Plan) -> Plan:
    """The plan of a run that is opened, with the micro-batch that halved() has left for it if torchrun has started it
    again because memory ran out. Rank 0 knows it, and all get the smallest of any process."""
    path = Path(plan.config.training.out_dir) / SHORT
    if not (is_restarted() and plan.runtime.is_master and path.is_file()):
        return plan
    found, share = read_json(path), plan.global_batch // plan.runtime.world_size
    if found.get("launch") != launch() or found["micro_batch"] >= plan.micro_batch:
        return plan
    size = _divisor(share, found["micro_batch"])
    notes = [note for note in plan.notes if not note.startswith("micro-batch: ")]
    notes.append(f"micro-batch: {size} of {share} sequences, because memory ran out")
    plan = dataclasses.replace(plan, micro_batch=size, notes=notes)
    return dataclasses.replace(plan, keep_memory=keeps_memory(plan))


def forget_shortage(out_dir: Path, saved: int) -> None:
    """Removes what halved() has left in the folder, when a checkpoint holds a micro-batch as small, or if it was left
    for another launch."""
    path = out_dir / SHORT
    with contextlib.suppress(OSError, UserError):
        if path.is_file():
            found = read_json(path)
            if found.get("launch") != launch() or saved <= found["micro_batch"]:
                path.unlink()


def _divisor(batch: int, most: int) -> int:
    return next(size for size in range(most, 0, -1) if batch % size == 0)


def _message(plan: Plan, when: str, reason: str, smaller: str) -> str:
    device, total = plan.runtime.device, total_memory(plan.runtime.device)
    has = f"{total / (1 << 30):.1f} GiB" if total else "less"
    return (
        f"out of memory {when}: the run needs about {plan.sizes.memory / (1 << 30):.1f} GiB, {device} has {has} "
        f"({one_line(reason)}). To save memory, {smaller}shorten --block_size, use a smaller model "
        "(--n_layer, --n_embd), or set --gradient_checkpointing=True"
    )
