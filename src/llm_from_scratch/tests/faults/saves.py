"""Checkpoints for the storm: small contents with a tag, and whether the loaded ones are the saved ones."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.checkpoint.load import load as load_any
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.sizes import meta_model
from llm_from_scratch.core.tokenizer import CharTokenizer

from .rows import Defect

SHAPE = GPTConfig(block_size=2, vocab_size=6, n_layer=1, n_head=1, n_embd=4, bias=False, tie_embeddings=False)
TOKENIZER = CharTokenizer.from_text(["abcdef"])


@functools.lru_cache(64)
def contents(step: int, tag: int, val_loss: float | None = None) -> dict[str, Any]:
    """Arguments of save_checkpoint; what is drawn depends on the tag, which the trainer's state holds."""
    random = torch.Generator().manual_seed(tag)
    shapes = {n: tuple(p.shape) for n, p in meta_model(SHAPE).named_parameters()}
    slots = ("exp_avg", "exp_avg_sq")
    return {
        "step": step,
        "model_config": SHAPE,
        "model": {name: torch.randn(shape, generator=random) for name, shape in shapes.items()},
        "run_id": "run-a",
        "optimizer": {
            "state": {
                name: {"step": torch.tensor(float(step)), **{s: torch.rand(shape, generator=random) for s in slots}}
                for name, shape in shapes.items()
            },
            "param_groups": [{"names": list(shapes), "lr": 1e-3 + tag * 1e-7, "betas": (0.9, 0.95)}],
        },
        "trainer": {"tag": tag, "best_val_loss": 2.5},
        "rng": {"cpu.0": torch.randint(0, 256, (16,), generator=random, dtype=torch.uint8)},
        "config": {"training": {"always_save_checkpoint": True}},
        "tokenizer": TOKENIZER,
        "val_loss": val_loss,
    }


def save(out: Path, step: int, tag: int, val_loss: float | None = None, **more: Any) -> Path:
    return cp.save_checkpoint(out, **contents(step, tag, val_loss), **more)


def load(out: Path, which: str | int | None = "last", set_aside: bool = False) -> cp.Checkpoint:
    """What a start finds; its warning is not printed."""
    with quiet():
        return load_any(out, which, set_aside=set_aside)


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        yield said


def replaced(owner: Any, name: str, new: Any) -> Defect:
    """The defect that a function of ours is another."""
    return lambda: mock.patch.object(owner, name, new)


def tag_of(checkpoint: cp.Checkpoint) -> Any:
    return checkpoint.trainer.get("tag")


def same(got: cp.Checkpoint, given: dict[str, Any]) -> bool:
    """Whether a loaded checkpoint is, to the bit, the one that was given to save_checkpoint."""
    moments, wanted = got.optimizer, given["optimizer"]
    return (
        got.step == given["step"]
        and got.model_config == given["model_config"]
        and _equal(got.model, given["model"])
        and moments is not None
        and moments["param_groups"] == wanted["param_groups"]
        and moments["state"].keys() == wanted["state"].keys()
        and all(_equal(moments["state"][name], slots) for name, slots in wanted["state"].items())
        and _equal(got.rng, given["rng"])
        and (got.trainer, got.config) == (given["trainer"], given["config"])
        and got.tokenizer is not None
        and got.tokenizer.fingerprint() == given["tokenizer"].fingerprint()
        and got.manifest["val_loss"] == given["val_loss"]
    )


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in b)
