"""Resuming: what a run reuses from its checkpoint, what has changed since, and whether it is still bit-exact."""

from __future__ import annotations

import dataclasses
import os
import shlex
from typing import Any

import torch
from torch.optim import Optimizer

from ..checkpoint.contents import Checkpoint, is_dataset_name
from ..config import Config
from ..core.model import GPT
from ..kernels.layers import layers_in_c
from ..kernels.products import checked_libraries, libraries_of
from ..kernels.tape import RecordedGPT
from ..machine import device as runtimes
from ..machine.device import Runtime
from ..settings import flatten
from .wrap import may_have_layers

NOT_COMPARED = {"init_from", "eval_only", "allow_new_data", "progress", "mirror"}  # settings of a call, not of the run
BATCH = ("batch_size", "gradient_accumulation_steps", "micro_batch")


def not_bit_exact(now: dict[str, Any], resumed: Checkpoint) -> list[str]:
    """The notice that the machine, or a setting chosen for it, has changed since the checkpoint."""
    before = saved_machine(resumed)
    if not before:
        return ["not bit-exact from here on: the checkpoint does not name the machine that made it"]
    before = {"one_call": False} | before  # older checkpoints do not name it
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    return [f"not bit-exact from here on: {', '.join(changed)}"] if changed else []


def present_machine(
    model: GPT, optimizer: Optimizer, runtime: Runtime, is_compiled: bool, micro_batch: int
) -> dict[str, Any]:
    """Everything about the machine that affects the last bits of a run, as stored in its checkpoints."""
    device = runtime.device
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "compile": is_compiled,
        "products": libraries_of(model),
        "compiled_layers": layers_in_c(model),
        "one_call": isinstance(model, RecordedGPT),
        "fused": bool(optimizer.defaults.get("fused")),
        "micro_batch": micro_batch,
        "threads": torch.get_num_threads(),
        "processes": runtime.world_size,
        **({"parallel": runtime.parallel} if runtime.world_size > 1 else {}),
        "torch": torch.__version__,
    }


def saved_machine(resumed: Checkpoint) -> dict[str, Any]:
    """The checkpoint's record of the machine that made it."""
    found = resumed.trainer.get("machine")
    return found if isinstance(found, dict) else {}


def saved_settings(resumed: Checkpoint) -> dict[str, Any]:
    sections = [section for section in resumed.config.values() if isinstance(section, dict)]
    return {leaf: value for section in sections for leaf, value in section.items()}


def differences(config: Config, resumed: Checkpoint) -> list[str]:
    """Each setting that differs from the checkpoint's."""
    saved, lines = saved_settings(resumed), []
    for name, value in flatten(config).items():
        value = list(value) if isinstance(value, tuple) else value
        value = {str(key): number for key, number in value.items()} if isinstance(value, dict) else value  # as in JSON
        if name in saved and name not in NOT_COMPARED and saved[name] != value:
            lines.append(f"changed since the checkpoint: {name} {str(saved[name])[:80]} -> {str(value)[:80]}")
    return lines


def same_machine(config: Config, runtime: Runtime, resumed: Checkpoint) -> Runtime:
    """For automatic settings: the values chosen for the run on this kind of device."""
    before = saved_machine(resumed)
    if before.get("device") != runtime.device.type:
        return runtime
    system, reasons = config.system, dict(runtime.reasons)
    changes: dict[str, Any] = {}
    dtype = runtimes.DTYPES.get(str(before.get("dtype")))
    if system.dtype == "auto" and dtype is not None and dtype != runtime.dtype:
        changes["dtype"] = dtype
        reasons["dtype"] = f"{before['dtype']} (as at the start of the run)"
    compiled = before.get("compile")
    # a run that fell back to eager stays eager: compiled code rounds differently
    if system.compile == "auto" and isinstance(compiled, bool) and compiled != runtime.compile:
        if not compiled or runtimes.has_triton() or runtime.device.type == "cpu":
            changes["compile"] = compiled
            reasons["compile"] = f"{'on' if compiled else 'off'} (as at the start of the run)"
    if before.get("processor") == torch.backends.cpu.get_cpu_capability():
        changes |= {"products": checked_libraries(before.get("products")), "one_call": before.get("one_call") is True}
    threads = before.get("threads")
    if system.threads is None and type(threads) is int and 0 < threads <= (os.cpu_count() or 1):
        changes["threads"] = threads
    found = dataclasses.replace(runtime, **changes, reasons=reasons)
    has_layers = bool(before.get("compiled_layers")) and may_have_layers(found)
    return dataclasses.replace(found, compiled_layers=has_layers)


def same_micro_batch(config: Config, resumed: Checkpoint, local_batch: int, chosen: int) -> int:
    """The checkpoint's micro-batch, which was chosen for the machine or reduced because memory ran out, unless the user
    changes the settings of the batch."""
    saved, flat = saved_settings(resumed), flatten(config)
    if any(saved.get(name, flat[name]) != flat[name] for name in BATCH):
        return chosen
    micro = saved_machine(resumed).get("micro_batch")
    if type(micro) is not int or micro < 1 or local_batch % micro:
        return chosen
    return micro if micro < chosen or config.data.micro_batch == "auto" else chosen


def resume_command(config: Config, command: str, processes: int = 1) -> str:
    """The command that resumes a run."""
    words = [*command.split(), "--init_from=resume", f"--out_dir={config.training.out_dir}"]
    if not is_dataset_name(config.data.dataset):
        words.append(f"--dataset={config.data.dataset}")
    # not read from a checkpoint either
    if config.training.eval_tasks is not None:
        words.append(f"--eval_tasks={config.training.eval_tasks}")
    words += [f"--start={config.generation.start}"] if config.generation.start.startswith("FILE:") else []
    words += ["--wandb_log=True"] if config.logging.wandb_log else []
    words += [f"--mirror={config.training.mirror}"] if config.training.mirror is not None else []
    under_torchrun = f"  (with torchrun, {processes} processes)" if processes > 1 else ""
    return f"{shlex.join(words)}{under_torchrun}"


def eval_command(config: Config) -> str:
    """The command that evaluates a run on the whole validation split."""
    return shlex.join(["llm-eval", f"--out_dir={config.training.out_dir}", f"--dataset={config.data.dataset}"])
