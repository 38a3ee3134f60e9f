"""What a training step on a GPU is to be, as far as a CPU can tell: tokens on the device, and nothing that waits."""

from __future__ import annotations

from pathlib import Path

import torch

from llm_from_scratch.core.checkpoint import find_checkpoint, load_checkpoint
from llm_from_scratch.training.trainer import train

from .tiny import read_metrics, tiny_config


def test_a_run_with_its_tokens_on_the_device_is_the_run_without(here: Path, tiny_data: Path) -> None:
    for name, on_device in (("files", False), ("device", True)):
        train(tiny_config(tiny_data, out_dir=name, data_on_device=on_device, gradient_accumulation_steps=2))
    files, device = (load_checkpoint(find_checkpoint(name, "last")).model for name in ("files", "device"))
    assert all(torch.equal(files[name], device[name]) for name in files)
    assert len(read_metrics(Path("device"))) == len(read_metrics(Path("files")))
