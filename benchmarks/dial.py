"""--budget compared with presets in the same time: final bits per byte.

python benchmarks/dial.py TEXT [TEXT ...] [--budget=60] [--results=dial.jsonl] [--threads=1] [--nanogpt=DIR]
       [--clock=wall|cpu] [--others=NAME,NAME]

Each TEXT is prepared once with characters as tokens; the last 300,000 or fewer are the validation split. One run has
--budget. The others have the settings in OTHERS, and also end on time: the number of steps follows their speed. nanoGPT
runs its command for a CPU; two short runs measure how many steps fit. On a busy machine, --clock=cpu counts processor
time. llm-eval computes the bits per byte of the whole validation split. Each result is a line in the file --results. A
run with a result is not repeated, so the same command resumes. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import asyncio  # noqa: F401  its waits keep the clock on the wall
import json
import math
import pickle
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from contenders import arguments, environment, machine, nanogpt_readme

SHARE, TRIAL = 0.97, 24  # nanoGPT: of the budget that its steps are planned to use; steps that measure its speed
HELD = 300_000  # characters
MODERN = ["--sample_order=shuffled", "--loss_plot=False", "--tensorboard=False", "--final_eval=False"]
MODERN += ["--eval_interval=1000000", "--eval_iters=1"]
# A person's choices: the presets, and these with another size, context or rate
OTHERS = {
    "three-minutes": ["three-minutes"],
    "speedrun": ["speedrun"],
    "speedrun-context-256": ["speedrun", "--block_size=256", "--batch_size=4", "--muon_learning_rate=0.03"],
    "three-minutes-2-layers": ["three-minutes", "--n_layer=2", "--block_size=128"],
    "quick": ["quick"],
    "quick-2-layers": ["quick", "--n_layer=2"],
    "quick-context-256": ["quick", "--block_size=256"],
    "laptop": ["laptop"],
}


def timed(clock: str, seconds: float, words: list[str]) -> None:
    """In a process of its own: trains, and ends after this time. Without a preset: what the dial chooses."""
    if clock == "cpu":
        time.monotonic = time.perf_counter = time.process_time
    from llm_from_scratch.machine import processes

    if clock == "cpu":
        processes.process_age = lambda otherwise: time.process_time()
    if words[0].startswith("--"):
        from llm_from_scratch.cli.train import main as train_command

        sys.exit(train_command([*words, f"--budget={seconds:g}s"]))
    began = time.monotonic() - processes.process_age(time.process_time())
    from llm_from_scratch.config import Config
    from llm_from_scratch.machine.budget import Deadline
    from llm_from_scratch.presets import parse
    from llm_from_scratch.training.trainer import train

    parsed = parse(Config, [*words, *MODERN], prog="llm-train", base_preset="default")
    train(parsed.tree, parsed.sources, deadline=Deadline(began + seconds))


def run(words: list[str], threads: int, clock: str, folder: Path | None = None) -> tuple[float, str]:
    """(seconds of the process, its output). The command must succeed."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, cwd=folder, env=environment(threads), capture_output=True, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} has failed:\n{(done.stdout + done.stderr)[-2000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used if clock == "cpu" else wall, done.stdout + done.stderr


def module(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"llm_from_scratch.cli.{name}", *words]


class Comparison:
    """One text and one budget. Results are kept in a file."""

    def __init__(self, text: Path, options: Any, known: dict[str, Any]):
        self.text, self.options, self.known = text, options, known
        self.folder = options.results.resolve().parent / f"{options.results.stem}-{text.stem}"
        self.data, self.out_dir = self.folder / "data", self.folder / "out"
        if not (self.data / "manifest.json").is_file():
            held = min(0.1, HELD / len(text.read_text(encoding="utf-8")))
            words = [str(text), f"--out_dir={self.data}", "--tokenizer=char", f"--val_fraction={held:.4g}"]
            run(module("prepare_data", *words, "--cache_dir=None"), 1, "cpu")

    def once(self, name: str, make: Any) -> dict[str, Any]:
        """The result of this name: read, or made and written."""
        options = self.options
        key = f"{self.text.stem} {options.budget:g} {options.clock} {options.threads} {name}"
        if key not in self.known:
            self.known[key] = make()
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **self.known[key]}) + "\n")
            print(f"{key}: {json.dumps(self.known[key])}", flush=True)
        return self.known[key]

    def trained(self, words: list[str]) -> dict[str, Any]:
        options = self.options
        place = [f"--dataset={self.data}", f"--out_dir={self.out_dir}"]
        shutil.rmtree(self.out_dir, ignore_errors=True)
        command = [sys.executable, __file__, "timed", options.clock, str(options.budget), *words, *place]
        took, said = run(command, options.threads, options.clock)
        _, text = run(module("evaluate", *place), options.threads, options.clock)
        bits = float(re.findall(r"bits per byte ([\d.]+)", text)[-1])
        found = {"bits": bits, "seconds": took, "used": took / options.budget, **self.size()}
        if expected := re.findall(r"expected: .* ([\d.]+) bits per byte", said):
            chosen = re.findall(r"^(?:model|training|expected): .*$", said, re.MULTILINE)
            found |= {"expected": float(expected[-1]), "chosen": chosen}
        return found

    def size(self) -> dict[str, Any]:
        """What the law (docs/SCALING.md) needs to know about the last run."""
        from llm_from_scratch.checkpoint.load import load
        from llm_from_scratch.core.sizes import sizes

        saved = load(self.out_dir, "last", weights_only=True, need_tokenizer=False)
        model, settings = saved.model_config, {}
        for section in saved.config.values():
            settings |= section
        counts, batch = sizes(model, 1), settings["batch_size"] * settings["gradient_accumulation_steps"]
        return {"params": counts.params - counts.embedding_params, "steps": saved.step, "batch": batch,
                "context": model.block_size, "max_ngram": model.max_ngram}  # fmt: skip

    def nanogpt(self, checkout: Path) -> dict[str, Any]:
        """nanoGPT's own estimate of its val loss, over 20 batches."""
        vocab_size = json.loads((self.data / "manifest.json").read_text())["vocab_size"]
        (self.data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))

        def took_and_said(steps: int) -> tuple[float, str]:
            words = nanogpt_readme(self.data, self.folder / "nanogpt")
            words += [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={steps}"]
            return run(words, self.options.threads, self.options.clock, checkout)

        one, _ = took_and_said(4)
        two, _ = took_and_said(4 + TRIAL)
        steps = max(1, int((SHARE * self.options.budget - one) / max(1e-4, (two - one) / TRIAL)) + 4)
        took, said = took_and_said(steps)
        text = self.text.read_text(encoding="utf-8")
        val = text[-round(min(0.1 * len(text), HELD)) :]
        loss = float(re.findall(r"val loss ([\d.]+)", said)[-1])
        return {"bits": loss / math.log(2) * len(val) / len(val.encode()), "seconds": took, "steps": steps}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--results", type=Path, default=Path("dial.jsonl"))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--others", default=",".join(OTHERS))
    options = parser.parse_args()
    known: dict[str, Any] = {}
    if options.results.is_file():
        for line in options.results.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            known[entry.pop("key")] = entry
    rows = []
    for text in options.texts:
        comparison = Comparison(text.resolve(), options, known)
        ours = comparison.once("dial", partial(comparison.trained, []))
        names = [name for name in options.others.split(",") if name]
        found = {name: comparison.once(name, partial(comparison.trained, OTHERS[name])) for name in names}
        if options.nanogpt is not None:
            checkout = options.nanogpt.resolve()
            found["nanogpt"] = comparison.once("nanogpt", partial(comparison.nanogpt, checkout))
        others = [(entry["bits"], name) for name, entry in found.items() if name != "nanogpt"]
        best = min(others, default=(math.nan, "none"))
        row = {"text": text.stem, "dial": ours["bits"], "best": best[0], "of": best[1], "ratio": ours["bits"] / best[0],
               "used": ours["used"], "expected": ours["expected"] / ours["bits"]}  # fmt: skip
        if "nanogpt" in found:
            row["nanogpt"] = ours["bits"] / found["nanogpt"]["bits"]
        rows.append(row)
    print("| text | dial | best other | ratio | share of the budget | expected / found |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['text']} | {row['dial']:.3f} | {row['best']:.3f} ({row['of']}) | {row['ratio']:.3f} | "
              f"{row['used']:.3f} | {row['expected']:.3f} |")  # fmt: skip
    ratio = statistics.median(row["ratio"] for row in rows)
    print(json.dumps({**machine(), "budget": options.budget, "clock": options.clock, "rows": rows, "median": ratio}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["timed"]:
        timed(sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    else:
        main()
