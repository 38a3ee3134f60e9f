"""How the processes of a run share its model: DDP, FSDP or HSDP. Decided before the run."""

from __future__ import annotations

import dataclasses
import os

from ..checkpoint.store import Checkpoint
from ..config import Config
from ..errors import SharedError, UserError
from ..machine.device import Runtime
from ..machine.memory import total_memory
from .plan import training_sizes
from .resume import saved_machine

GIB = 1 << 30
SHARE = 0.85  # of a device's memory, for what does not depend on the batch


def with_parallel(config: Config, runtime: Runtime, resumed: Checkpoint | None) -> Runtime:
    """The runtime with the way in which processes share the model. Raises UserError for a setting that does not fit."""
    asked, world = config.system.parallel, runtime.world_size
    if world == 1 and (asked != "fsdp" or "RANK" not in os.environ):  # torchrun may restart hsdp with one process
        told = {} if asked in ("auto", "ddp") else {"parallel": f"{asked} has no effect in one process"}
        return dataclasses.replace(runtime, reasons=runtime.reasons | told)
    kind: str = asked
    why = "as set"
    if asked == "auto":
        before = saved_machine(resumed).get("parallel") if resumed is not None else None
        kind, why = (before, "as at the start of the run") if before in ("ddp", "fsdp") else _fitting(config, runtime)
    shards = {"ddp": 1, "fsdp": world}.get(kind) or _group(config, world)
    if kind != "ddp":
        _refuse(config, kind)
    if kind == "hsdp":
        why += f", {world // shards} groups of {shards} processes"
    reasons = runtime.reasons | {"parallel": f"{kind} ({why})"}
    return dataclasses.replace(runtime, parallel=kind, shards=shards, reasons=reasons)


def _fitting(config: Config, runtime: Runtime) -> tuple[str, str]:
    """ddp if what does not depend on the batch fits on every device, else fsdp; and the arithmetic."""
    sizes, has = training_sizes(config, runtime, 1), total_memory(runtime.device)
    if has is None:
        return "ddp", "the memory of the device is unknown"
    if runtime.device.type == "cpu":
        has //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # with several micro-batches, DDP's buckets are a second copy of the gradients
    parts = {"weights": sizes.weights, "gradients": 2 * sizes.gradients, "moments": sizes.optimizer}
    needed, limit = sum(parts.values()), SHARE * has
    shown = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    kind, relation = ("ddp", "within") if needed <= limit else ("fsdp", "more than")
    return kind, f"{shown} = {needed / GIB:.2f} GiB, {relation} {SHARE:.0%} of a process's {has / GIB:.2f} GiB"


def _group(config: Config, world: int) -> int:
    """Processes that share one copy of the model with hsdp."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    group = config.system.shard_group or int(here)
    source = "the processes of a machine" if config.system.shard_group is None else f"shard_group={group}"
    if world % group or group == 1:
        fits = ", ".join(str(n) for n in range(2, world + 1) if world % n == 0)
        raise SharedError(
            f"--parallel=hsdp cannot divide {world} processes into groups of {group} ({source}): set --shard_group to "
            f"one of {fits}"
        )
    return group


def _refuse(config: Config, kind: str) -> None:
    """Raises UserError for what does not work with a sharded model."""
    unfit = {
        "before_after": config.finetune.before_after is True,
        "eval_tasks": config.training.eval_tasks is not None,
        "fp8": config.system.fp8,
    }
    for name in (name for name, is_set in unfit.items() if is_set):
        chosen = " (chosen because the model does not fit on one device)" if config.system.parallel == "auto" else ""
        raise UserError(f"parallel={kind}{chosen} does not support {name}: remove it, or use --parallel=ddp")
