"""The cost of a checkpoint to the training loop: none, written by a thread, and written in the loop, interleaved.

python benchmarks/saving.py [--rounds=5] [SETTING ...]     settings are those of llm-train, such as --n_embd=768

Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from llm_from_scratch import Config, train
from llm_from_scratch.checkpoint.store import find_checkpoint
from llm_from_scratch.presets import nanogpt_defaults, parse
from llm_from_scratch.training import saver as savers
from llm_from_scratch.training.run import Run, TrainResult

STEPS, SAVES = 24, 3
SIZES = ["--n_layer=6", "--n_head=6", "--n_embd=384", "--block_size=128", "--batch_size=8", "--vocab_size=8192"]


def seconds(folder: Path, way: str, settings: list[str]) -> dict[str, float]:
    """Wall time of the loop and the final save, the time spent in copies, and the bytes of a checkpoint."""
    copies: list[float] = []
    copied, save = savers.copied, savers.Saver.save

    def timed(value: object) -> object:
        begin = time.perf_counter()
        result = copied(value)
        copies.append(time.perf_counter() - begin)
        return result

    def waited(self: savers.Saver, *args: Any) -> None:
        save(self, *args)
        self.report(wait=True)

    every = STEPS * 10 if way == "none" else STEPS // SAVES
    words = [
        *SIZES, "--gradient_accumulation_steps=1", f"--dataset={folder}", f"--out_dir={folder / 'out'}",
        f"--max_iters={STEPS}", f"--save_interval={every}", "--eval_interval=1000", "--eval_iters=1", "--compile=False",
        "--final_eval=False", "--loss_plot=False", "--keep_last=1", *settings,
    ]  # fmt: skip
    config = parse(Config, words, prog="saving", defaults=nanogpt_defaults()).tree
    with contextlib.ExitStack() as patches:
        patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
        patches.enter_context(mock.patch.object(savers, "copied", timed))
        if way == "in the loop":
            patches.enter_context(mock.patch.object(savers.Saver, "save", waited))
        ends: list[float] = []
        finish, begin = Run.finish, Run.__init__

        def marked(self: Run) -> TrainResult:
            ends.append(time.perf_counter())  # all three variants wait for the last checkpoint
            return finish(self)

        def begun(self: Run, *args: Any) -> None:
            begin(self, *args)
            ends.append(time.perf_counter())

        patches.enter_context(mock.patch.object(Run, "finish", marked))
        patches.enter_context(mock.patch.object(Run, "__init__", begun))
        result = train(config)
    size = sum(path.stat().st_size for path in find_checkpoint(result.out_dir, "last").iterdir())
    return {"loop": ends[1] - ends[0], "copy": statistics.median(copies), "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options, settings = parser.parse_known_args()
    ways = ("none", "in a thread", "in the loop")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = np.random.default_rng(0).integers(0, 8192, size=1 << 18).astype("<u2")
        for split in ("train", "val"):
            ids.tofile(folder / f"{split}.bin")
        manifest = {"format": "llm-from-scratch-data", "version": 1, "dtype": "uint16", "vocab_size": 8192}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "splits": {}}))
        for _ in range(options.rounds):
            for way in ways:
                found[way].append(seconds(folder, way, settings))
    saves = SAVES - 1  # no checkpoint at step 0; the last one is outside the loop
    base = [run["loop"] for run in found["none"]]
    size, copy = found["in the loop"][0]["bytes"], statistics.median(r["copy"] for r in found["in a thread"])
    stall = {
        way: statistics.median((run["loop"] - none) / saves for run, none in zip(found[way], base, strict=True))
        for way in ways[1:]
    }
    print(f"checkpoint of {size / 1e6:,.0f} MB; {STEPS} steps of {statistics.median(base) / STEPS * 1e3:,.0f} ms")
    print(f"copy of the state: {copy * 1e3:,.0f} ms")
    for way, value in stall.items():
        print(f"the loop is longer for a checkpoint {way}: {value * 1e3:,.0f} ms")
    print(json.dumps({"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
                      "rounds": options.rounds, "bytes": size, "copy_s": copy, "longer_s": stall}))  # fmt: skip


if __name__ == "__main__":
    main()
