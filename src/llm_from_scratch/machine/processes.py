"""Processes: torchrun's variables, process groups, reductions over ranks. Imports torch only to communicate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    import torch


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
