"""The state of a run in a checkpoint: copied between two steps, written by a thread, restored on resume."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..checkpoint import store as checkpoints
from ..checkpoint.store import Checkpoint
from ..errors import SaveError, UserError
from ..machine.device import Runtime, is_out_of_memory
from ..machine.memory import free_memory
from .optimizer import load_optimizer_state


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
    """Steps by which roll-backs have advanced the order of the data."""


def copied(value: Any, _known: dict[tuple, Tensor] | None = None) -> Any:
    """A copy of nested state on the CPU, which later steps do not change. Names of one tensor share one copy."""
    known = {} if _known is None else _known
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in known:
            known[key] = value.detach().to("cpu", copy=True)
        return known[key]
    if isinstance(value, dict):
        return {name: copied(item, known) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item, known) for item in value)
    return value


def _room_for_a_copy(contents: Any) -> bool:
    """Whether a copy leaves at least as much memory free, for the steps that run meanwhile."""
    free = free_memory(torch.device("cpu"))
    tensors = [leaf for leaf in tree_leaves(contents) if isinstance(leaf, Tensor)]
    if free is None or any(tensor.device.type != "cpu" for tensor in tensors):
        return True
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return 2 * sum(storages.values()) <= free


@dataclass
class Saved:
    """The result of a save."""

    step: int
    path: Path | None = None
    """None if there is no checkpoint of this step."""
    error: UserError | None = None
    """Why not. With a path: why ckpt.pt, the file for nanoGPT, is missing."""


class Writer:
    """Saves in a thread, one checkpoint at a time. A process that must stop at once does not wait for it."""

    def __init__(self) -> None:
        self._result: Future[Saved] | None = None
        self._thread: threading.Thread | None = None

    def start(
        self, contents: dict[str, Any], out_dir: Path, first: Callable[[], None], export: bool, **of_the_run: Any
    ) -> None:
        """contents: a Checkpoint's fields. They are copied before this returns; if memory is short, written instead.

        first: called before the checkpoint is written; export: also write out_dir/ckpt.pt for nanoGPT;
        of_the_run: the other arguments of save_checkpoint().
        """
        assert self._result is None
        result = self._result = Future[Saved]()
        saved, waits = Saved(contents["step"]), not _room_for_a_copy(contents)
        try:
            contents = contents if waits else copied(contents)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            saved.error = SaveError("out of memory")
            result.set_result(saved)
            return

        def work() -> None:
            try:
                first()
                saved.path = checkpoints.save_checkpoint(out_dir, **contents, **of_the_run)
                if export:
                    whole = Checkpoint(path=None, **contents)
                    checkpoints.write_nanogpt(out_dir / "ckpt.pt", whole, accept_erf_gelu=True)
            except UserError as error:
                saved.error = error
            except OSError as error:  # from first()
                saved.error = SaveError(error.strerror or str(error))
            except BaseException as error:
                if not is_out_of_memory(error):  # else for a copy for the file
                    result.set_exception(error)  # raised again in the thread of the loop
                    return
                saved.error = SaveError("out of memory")
            result.set_result(saved)

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()
        if waits:
            self._thread.join()

    def finished(self, wait: bool) -> Saved | None:
        """The result of the save, once. None if there is none, or it is still running."""
        result = self._result
        if result is None or not (wait or result.done()):
            return None
        if self._thread is not None:  # a thread that still frees tensors when Python exits would abort the process
            self._thread.join()
        self._result = self._thread = None
        return result.result()


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


@contextlib.contextmanager
def _state_checked(path: Path | None) -> Iterator[None]:
    """Turns the errors of a state that is not a run's into one line."""
    try:
        yield
    except UserError:
        raise  # its message is complete
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold the state of a run ({why}); start a new one from it") from None


_KINDS = {"run_id": (str,), "recent_losses": (list,), "best_val_loss": (int, float), "val_loss": (int, float)}


def restore(
    saved: Checkpoint, state: TrainState, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    runtime: Runtime, dropout: bool,
) -> list[str]:  # fmt: skip
    """Restores optimizer, scaler, counters and random states. Returns what cannot be restored, one line each. Raises
    UserError if the checkpoint's entries do not belong to a run."""
    with _state_checked(saved.path):
        notes = []
        if saved.optimizer is None:
            notes.append("the checkpoint has no optimizer state: the moments start from zero")
        else:
            load_optimizer_state(optimizer, saved.optimizer)
        trainer = dict(saved.trainer)
        known = trainer.pop("scaler", None)
        if known and scaler.is_enabled():
            scaler.load_state_dict(known)
        for name in vars(state):
            value = trainer.get(name)
            if value is None:
                continue
            if type(value) not in _KINDS.get(name, (int,)):
                raise ValueError(f"{name} is {str(value)[:40]!r}")
            if type(value) is int and not (0 if name in ("rollbacks", "data_shift") else -1) <= value < 1 << 53:
                raise ValueError(f"{name} is {str(value)[:40]}")
            setattr(state, name, value)
        state.recent_losses = [(int(step), float(loss)) for step, loss in state.recent_losses]
        state.step = saved.step
        # if the run stopped before the evaluation of this step, it is saved again afterwards: it may be the best
        state.saved_at = saved.step if state.evaluated_at == saved.step else -1
        generators = _generators(runtime)
        processes = sum(name.startswith("cpu.") for name in saved.rng)
        if processes == runtime.world_size and all(f"{kind}.{runtime.rank}" in saved.rng for kind in generators):
            for kind, (_, put) in generators.items():
                put(saved.rng[f"{kind}.{runtime.rank}"])
        elif dropout:
            others = "other processes or devices than the checkpoint's"
            why = others if saved.rng else "the checkpoint has no random states"
            notes.append(f"{why}: dropout draws other masks, not bit-exact")
        return notes
