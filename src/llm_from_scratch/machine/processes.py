"""What can be known of processes and folders without torch, so that a mistake is told at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import UserError


def distributed_env() -> tuple[int, int, int]:
    """(rank, local rank, world size) from torchrun's environment; (0, 0, 1) without it.

    Raises UserError where it is half set.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 0, 1
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the distributed environment is half set: {', '.join(missing)} missing; start through torchrun, "
            "or unset RANK and WORLD_SIZE"
        )
    try:
        rank, local_rank, world = (int(os.environ[name]) for name in names[:3])
    except ValueError:
        raise UserError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers; start through torchrun") from None
    if not 0 <= rank < world or local_rank < 0:
        raise UserError(f"RANK={rank} must lie from 0 to WORLD_SIZE - 1 = {world - 1}")
    return rank, local_rank, world


def check_writable(out_dir: Path) -> None:
    """Raises UserError where the run's folder cannot be written. Leaves nothing behind."""
    try:
        if out_dir.exists() and not out_dir.is_dir():
            raise UserError(f"out_dir={out_dir} is a file; name a folder with --out_dir")
        parent = out_dir
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file")
        with tempfile.TemporaryFile(dir=parent):  # permission bits say nothing where the user is root
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"out_dir={out_dir} cannot be written ({reason}); name another with --out_dir") from None
