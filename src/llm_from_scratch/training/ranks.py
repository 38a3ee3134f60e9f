"""Common decisions of the processes of a run: before it starts, and when one of them runs out of memory."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib
import json
from types import SimpleNamespace
from typing import Any

import torch

from ..kernels.compiled import find_kernel
from ..machine.device import Runtime
from ..machine.preflight import preflight
from ..settings import to_dict
from .guards import StepGuard
from .plan import Plan
from .sharding import local
from .wrap import Wrapped, data_parallel

OWN = ("device", "threads")  # settings that may differ between machines


def agreed(plan: Plan) -> Plan:
    """The plan, with the smallest micro-batch of any process, layers in C only if all can have them, and notes about
    hosts and network. All take part. Raises UserError if the processes would not train the same model on the same
    batches."""
    runtime = plan.runtime
    if runtime.world_size == 1:
        return plan
    settings = to_dict(plan.config)
    for name in OWN:
        del settings["system"][name]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    facts = {
        "the first step": plan.start_step, "the number of training tokens": len(plan.train_data),
        "the number of validation tokens": len(plan.val_data), "the precision": str(runtime.dtype),
        "the checksum of the settings": digest[:12], "the checksum of the tokens": plan.hashes[1][:12],
        "the tokenizer": "unknown" if (known := plan.tokenizer) is None else f"{known.name} {known.fingerprint()[:12]}",
    }  # fmt: skip
    lines = preflight(runtime.device, facts)
    has_layers = runtime.compiled_layers and find_kernel(plan.notes.append) is not None
    least = torch.tensor([plan.micro_batch, has_layers], device=runtime.device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    micro_batch, layers = least.tolist()
    runtime = dataclasses.replace(runtime, compiled_layers=bool(layers))
    return dataclasses.replace(plan, runtime=runtime, micro_batch=micro_batch, notes=[*plan.notes, *lines])


def scaler_of(runtime: Runtime) -> torch.amp.GradScaler:
    """The loss scaler of float16. The processes agree on overflows, because they must have the same scale."""
    enabled, kind = runtime.dtype == torch.float16, torch.amp.GradScaler
    if not enabled or runtime.world_size == 1:
        return kind(runtime.device.type, enabled=enabled)
    agreeing: Any = importlib.import_module("torch.distributed.fsdp.sharded_grad_scaler").ShardedGradScaler

    class OfOwnRows(agreeing):
        def unscale_(self, optimizer: Any) -> None:
            """Unscales this process's rows of sharded gradients; torch cannot unscale them with whole ones."""
            with torch.no_grad():
                held = [SimpleNamespace(grad=local(p.grad)) for g in optimizer.param_groups for p in g["params"]]
                super().unscale_(SimpleNamespace(param_groups=[{"params": held}]))

    return OfOwnRows(runtime.device.type)


def regroup(models: Wrapped, guard: StepGuard, runtime: Runtime, reason: str) -> None:
    """Replaces the exchange of gradients, which has failed or would never end, by a new one. All take part. reason: why
    it fails in this process; empty if its own judge() found out that another one failed."""
    before: Any = models.train
    group, has_unused = before.process_group, before.find_unused_parameters
    del before
    models.train = models.compiled
    gc.collect()  # the hooks of the old one on the parameters
    torch.distributed.destroy_process_group(group)
    del group  # closes its connections: a process that waits for this one gets an error
    if reason:
        guard.judge_short(runtime.device)
    models.train = data_parallel(models.compiled, runtime, has_unused)
