"""Processes: torchrun's variables, process groups, reductions over ranks, and the children that multiprocessing and
torch.compile start. Imports torch only to communicate."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    import torch

YOUNG, OLD = 1.5, 30.0  # seconds that a command's imports take, and that they take at most on a busy machine


def distributed_env() -> tuple[int, int, int]:
    """(rank, local rank, world size) from torchrun; (0, 0, 1) without it. Raises UserError if it is half set."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 0, 1
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the distributed environment is incomplete: {', '.join(missing)} missing; start with torchrun, "
            "or unset RANK and WORLD_SIZE"
        )
    try:
        rank, local_rank, world = (int(os.environ[name]) for name in names[:3])
    except ValueError:
        raise UserError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers; start with torchrun") from None
    if not 0 <= rank < world or local_rank < 0:
        raise UserError(f"RANK={rank} must be between 0 and WORLD_SIZE - 1 = {world - 1}")
    return rank, local_rank, world


def process_age(otherwise: float) -> float:
    """Seconds since this process started. `otherwise`: the answer if the system does not tell, or if the process is so
    old that it must have done something else before."""
    with contextlib.suppress(OSError, AttributeError, ValueError, IndexError):
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
        if 0 <= age < OLD:
            return age
    return min(otherwise, YOUNG)


def stop() -> None:
    """Leaves the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all(world_size: int) -> None:
    """Returns when every process has called it."""
    if world_size > 1:
        import torch.distributed as dist

        dist.barrier()


def sum_over_ranks(values: list[float], device: torch.device, world_size: int) -> list[float]:
    """The sums over all processes, in float64."""
    if world_size == 1:
        return values
    import torch

    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def any_rank(condition: bool, device: torch.device, world_size: int) -> bool:
    """Whether the condition is true in one of the processes."""
    return sum_over_ranks([float(condition)], device, world_size)[0] > 0


def shield_children() -> None:
    """Keeps the working directory out of the module search of child processes: `python -c` searches it first, so a
    ctypes.py in a downloaded folder would run there. Call it before any is started. Python 3.10 has no switch for this,
    so there it raises UserError if the directory holds a module that would shadow another."""
    os.environ["PYTHONSAFEPATH"] = "1"  # ours is already running: only the children read it
    if sys.version_info < (3, 11) and (names := shadowing(Path.cwd())):
        raise UserError(
            f"child processes of Python 3.10 would import {names[0]} of the working directory instead of the real "
            "module: rename it, start from another directory, or use Python 3.11"
        )


def shadowing(folder: Path) -> list[str]:
    """The names of files and packages in a folder that a child would import in place of modules it needs."""
    loaded = {name.partition(".")[0]: vars(module).get("__file__") for name, module in [*sys.modules.items()] if module}
    own = {name for name, file in loaded.items() if file and Path(file).is_relative_to(folder)}
    needed = sys.stdlib_module_names | loaded.keys() - own
    return sorted(path.name for path in folder.iterdir() if path.name.partition(".")[0] in needed and _is_module(path))


def _is_module(path: Path) -> bool:
    if path.is_dir():  # without an __init__ it is found only if nothing else is
        return any(path.glob("__init__.*"))
    return path.suffix in (".py", ".pyc", ".so", ".pyd")
