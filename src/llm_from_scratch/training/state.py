"""The state of a run in a checkpoint: copied between two steps, restored on resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..checkpoint.store import Checkpoint
from ..config import Config
from ..errors import UserError, one_line
from ..machine.device import Runtime
from ..machine.processes import launch
from .moments import load_optimizer_state
from .resume import saved_settings


@dataclass
class TrainState:
    """Everything that a checkpoint holds next to weights, optimizer state and random states."""

    run_id: str
    step: int = 0
    best_val_loss: float = 1e9
    best_step: int = 0
    evaluations_without_gain: int = 0
    evaluated_at: int = -1
    saved_at: int = -1
    val_loss: float | None = None
    """Estimated at evaluated_at."""
    recent_losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss) pairs that spikes are measured against."""
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    data_shift: int = 0
    """Steps by which rollbacks have advanced the order of the data."""
    launch: str = ""
    """Identifies the torchrun start that is training; see processes.launch."""


def copied(state: Any) -> Any:
    """A copy of nested state on the CPU, which later steps do not change. Names of one tensor share one copy. From a
    GPU the copies run together, to pinned memory."""
    known: dict[tuple, Tensor] = {}
    devices: set[torch.device] = set()

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in known and tensor.is_cuda:
            devices.add(tensor.device)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            known[key] = host.copy_(tensor, non_blocking=True)
        elif key not in known:
            known[key] = tensor.to("cpu", copy=True)
        return known[key]

    result = tree_map_only(Tensor, copy, state)
    for device in devices:
        torch.cuda.synchronize(device)
    return result


def random_states(runtime: Runtime) -> dict[str, Tensor]:
    """The generators' states of every process: {"cpu.RANK": uint8 tensor, "cuda.RANK": ...}. All take part."""
    states: dict[str, Tensor] = {}
    for kind, (get, _) in _generators(runtime).items():
        tensor = get()
        parts = [tensor]
        if runtime.world_size > 1:
            local = tensor.to(runtime.device)
            parts = [torch.empty_like(local) for _ in range(runtime.world_size)]
            torch.distributed.all_gather(parts, local)
        states |= {f"{kind}.{rank}": part.cpu() for rank, part in enumerate(parts)}
    return states


def _generators(runtime: Runtime) -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """{kind: (get state, set state)} of the random generators that this process uses."""
    found: dict[str, Any] = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    if (device := runtime.device).type == "cuda":
        get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
        found["cuda"] = (lambda: get(device), lambda state: put(state, device))
    if device.type == "mps":
        found["mps"] = (torch.mps.get_rng_state, torch.mps.set_rng_state)
    return found


_KINDS = {
    "run_id": (str,), "launch": (str,), "recent_losses": (list,), "best_val_loss": (int, float),
    "val_loss": (int, float),
}  # fmt: skip


def restore(
    saved: Checkpoint, state: TrainState, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    runtime: Runtime, config: Config,
) -> list[str]:  # fmt: skip
    """Restores optimizer, scaler, counters and random states. Returns what cannot be restored, one line each. Raises
    UserError if the checkpoint's entries do not belong to a run."""
    try:
        notes = []
        if saved.optimizer is None:
            notes.append("the checkpoint does not contain the optimizer state: the moments start from zero")
        else:
            kind = saved_settings(saved).get("optimizer_type")
            load_optimizer_state(optimizer, saved.optimizer, kind)
        known = saved.trainer.get("scaler")
        if known and scaler.is_enabled():
            scaler.load_state_dict(known)
        for name in vars(state):
            value = saved.trainer.get(name)
            if value is None:
                continue
            if type(value) not in _KINDS.get(name, (int,)):
                raise ValueError(f"{name} is {str(value)[:40]!r}")
            if type(value) is int and not (0 if name in ("rollbacks", "data_shift") else -1) <= value < 1 << 53:
                raise ValueError(f"{name} is {str(value)[:40]}")
            setattr(state, name, value)
        state.recent_losses = [(int(step), float(loss)) for step, loss in state.recent_losses]
        state.step, state.launch = saved.step, launch()
        # if the run stopped before the evaluation of this step, it is saved again afterwards: it may be the best
        state.saved_at = saved.step if state.evaluated_at == saved.step else -1
        generators = _generators(runtime)
        processes = sum(name.startswith("cpu.") for name in saved.rng)
        if processes == runtime.world_size and all(f"{kind}.{runtime.rank}" in saved.rng for kind in generators):
            for kind, (_, put) in generators.items():
                put(saved.rng[f"{kind}.{runtime.rank}"])
        elif config.model.dropout + config.finetune.lora_dropout > 0:
            others = "other processes or devices than the checkpoint's"
            why = others if saved.rng else "the checkpoint does not contain random states"
            notes.append(f"{why}: dropout masks will differ (not bit-exact)")
        return notes
    except UserError:
        raise  # its message is complete
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        why = one_line(error)
        raise UserError(
            f"{saved.path} does not hold the state of a run ({why}); start a new run from its weights"
        ) from None
