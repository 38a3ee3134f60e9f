"""Models trained by one worker and read by the others, in a folder of the whole test run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

FOLDER = "LLM_TEST_SHARED"  # the environment variable; conftest.py makes the folder and removes it


def weights_of(model: torch.nn.Module, name: str, train: Callable[[], None]) -> None:
    """Trains the model, or reads the weights that another worker has trained under this name."""
    path = Path(os.environ[FOLDER]) / f"{name}.pt"
    with FileLock(f"{path}.lock"):
        if path.exists():
            model.load_state_dict(torch.load(path))
        else:
            train()
            torch.save(model.state_dict(), path)
