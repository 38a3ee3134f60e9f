"""Tiny datasets and configurations for tests that train."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_from_scratch.config import Config
from llm_from_scratch.core.packing import BEGINS
from llm_from_scratch.core.tokenizer import CharTokenizer, Tokenizer
from llm_from_scratch.settings import flatten

LETTERS = "\n abcdefghijklmnopqr"  # 20 characters
TOKENIZER = CharTokenizer.from_text([LETTERS])


def babble(length: int, seed: int = 0) -> str:
    """Text with something to learn: words of few syllables in random order."""
    rng = random.Random(seed)
    syllables = [rng.choice("bcdfghjklmnpqr") + rng.choice("aeio") for _ in range(8)]
    words = ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 3))) for _ in range(12)]
    text = ""
    while len(text) < length:
        text += rng.choice(words) + rng.choice("    \n")
    return text[:length]


def write_ids(path: Path, ids: Any, dtype: str = "<u2") -> None:
    np.asarray(ids).astype(dtype).tofile(path)


def write_data(
    folder: Path, train: Any = None, val: Any = None, tokenizer: Tokenizer | None = TOKENIZER, **manifest: Any
) -> Path:
    """A data folder. train, val: token ids, or lists of shards of them; manifest: fields of a manifest.json."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"train": TOKENIZER.encode(babble(2000)), "val": TOKENIZER.encode(babble(205, seed=1))}
    given = {"train": train, "val": val}
    dtype = "<u4" if manifest.get("dtype") == "uint32" else "<u2"
    for split, default in texts.items():
        ids = default if given[split] is None else given[split]
        if isinstance(ids, list) and ids and isinstance(ids[0], (list, np.ndarray)):
            for index, shard in enumerate(ids):
                write_ids(folder / f"{split}_{index:06d}.bin", shard, dtype)
        else:
            write_ids(folder / f"{split}.bin", ids, dtype)
    if manifest:
        content = {
            "format": "llm-from-scratch-data",
            "version": 1,
            "dtype": "uint16",
            "vocab_size": 20,
            "splits": {},
            **manifest,
        }
        (folder / "manifest.json").write_text(json.dumps(content))
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder


QUICK: dict[str, Any] = {
    "block_size": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_iters": 8,
    "eval_interval": 4,
    "eval_iters": 2,
    "warmup_iters": 2,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "max_new_tokens": 3,
    "before_after": False,
    "final_eval": False,
    "loss_plot": False,
    "log_interval": 1,
    "tensorboard": False,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}


def slow_except(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test, of which only some are quick tests."""
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]


def tiny_config(dataset: Path | str, **leaves: Any) -> Config:
    """A configuration that trains in a blink, without dropout and with nanoGPT's order. leaves: further settings."""
    config = Config()
    plain = {"dropout": 0.0, "sample_order": "random", "beta2": 0.95}
    values = {**QUICK, **plain, "dataset": str(dataset), **leaves}
    unknown = set(values) - set(flatten(config))
    assert not unknown, unknown
    for item in dataclasses.fields(config):
        section = getattr(config, item.name)
        for name in values:
            if name in {f.name for f in dataclasses.fields(section)}:
                setattr(section, name, values[name])
    return config


def arguments(**leaves: Any) -> list[str]:
    """The same settings as a command line."""
    return [f"--{name}={value}" for name, value in {**QUICK, **leaves}.items()]


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def count_documents(folder: Path) -> tuple[int, int]:
    """The documents in train and in val of a prepared dataset: conversations that begin, or lines that end."""
    counts = []
    for split in ("train", "val"):
        if (marks := folder / f"{split}_marks.bin").is_file():
            counts.append(int(np.count_nonzero(np.fromfile(marks, np.uint8) & BEGINS)))
        else:
            end = json.loads((folder / "manifest.json").read_text())["document_end"]
            counts.append(int(np.count_nonzero(np.fromfile(folder / f"{split}.bin", "<u2") == end)))
    return counts[0], counts[1]
