"""The dial against other choices with the same budget: final bits per byte.

python benchmarks/dial.py TEXT [TEXT ...] [--budget=60] [--results=dial.jsonl] [--threads=1] [--nanogpt=DIR]
       [--clock=wall|cpu]

Each TEXT is prepared once with characters as tokens. The dial trains with --budget. The others train with the settings
in OTHERS for the same time: two short runs measure the seconds of a step, and the number of steps follows. nanoGPT is
its command for a CPU, with as many steps as fit. --clock=cpu compares processor time, for a machine that is busy: what
the dial chose then trains with the steps that fit into the processor time. Bits per byte are those of the whole
validation split, by llm-eval. Every result is a line of the file --results. A run whose line is there is not repeated,
so the comparison continues if it was stopped. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from contenders import arguments, environment, machine, nanogpt_readme

SHARE = 0.97  # of the budget that the others are planned to use
TRIAL = 24  # steps of the run that measures the speed
MODERN = ["--sample_order=shuffled", "--loss_plot=False", "--tensorboard=False"]
# A person's choices: the presets, and these with another size, context or rate
OTHERS = {
    "three-minutes": ["three-minutes"],
    "speedrun": ["speedrun"],
    "quick": ["quick"],
    "laptop": ["laptop"],
    "default": ["default"],
    "quick-2-layers": ["quick", "--n_layer=2"],
    "quick-context-256": ["quick", "--block_size=256"],
    "three-minutes-2-layers": ["three-minutes", "--n_layer=2", "--block_size=128"],
}


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
        self.data = self.folder / "data"
        if not (self.data / "manifest.json").is_file():
            run(
                module("prepare_data", str(text), f"--out_dir={self.data}", "--tokenizer=char", "--cache_dir=None"),
                1,
                "cpu",
            )

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

    def train(self, *words: str) -> tuple[float, str]:
        out_dir = f"--out_dir={self.folder / 'out'}"
        return run(module("train", *words, f"--dataset={self.data}", out_dir), self.options.threads, self.options.clock)

    def bits(self) -> float:
        """Bits per byte of the last run on the whole validation split."""
        words = [f"--out_dir={self.folder / 'out'}", f"--dataset={self.data}"]
        _, text = run(module("evaluate", *words), self.options.threads, self.options.clock)
        return float(re.findall(r"bits per byte ([\d.]+)", text)[-1])

    def settled(self, *words: str) -> tuple[int, float]:
        """(steps that fit into the budget, seconds of the rest of the process), from two short runs."""
        plain = [*words, "--eval_interval=1000000", "--eval_iters=1", "--final_eval=False", *MODERN]
        one, _ = self.train(*plain, "--max_iters=4")
        two, _ = self.train(*plain, f"--max_iters={4 + TRIAL}")
        step = max(1e-4, (two - one) / TRIAL)
        return max(1, int((SHARE * self.options.budget - one) / step) + 4), one

    def dial(self) -> dict[str, Any]:
        budget = self.options.budget
        took, text = self.train(f"--budget={budget:g}s")
        expected = float(re.findall(r"expected: .* ([\d.]+) bits per byte", text)[-1])
        if self.options.clock == "cpu":  # the run had a share of the machine: again with what fits into processor time
            wall, text = run(
                module("train", f"--budget={budget:g}s", f"--dataset={self.data}", "--print_config"),
                self.options.threads, "cpu",
            )  # fmt: skip
            chosen = self.folder / "dial.yaml"
            settings = yaml.safe_load(text[text.index("model:\n") : text.index("\nbudget: ") + 1])
            chosen.write_text(yaml.safe_dump(settings))
            steps, _ = self.settled(str(chosen))
            took, _ = self.train(str(chosen), f"--max_iters={steps}", "--final_eval=False")
        settings = (self.folder / "out" / "README.md").read_text(encoding="utf-8")
        found = self.bits()
        return {
            "bits": found,
            "seconds": took,
            "expected": expected,
            "used": took / budget,
            "settings": settings[-1500:],
        }

    def other(self, words: list[str]) -> dict[str, Any]:
        steps, _ = self.settled(*words)
        took, _ = self.train(*words, f"--max_iters={steps}", f"--eval_interval={steps}", "--final_eval=False", *MODERN)
        return {"bits": self.bits(), "seconds": took, "steps": steps}

    def nanogpt(self, checkout: Path) -> dict[str, Any]:
        """nanoGPT's own estimate of its val loss, over 20 batches."""
        vocab_size = json.loads((self.data / "manifest.json").read_text())["vocab_size"]
        (self.data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))

        def trained(steps: int) -> tuple[float, str]:
            words = nanogpt_readme(self.data, self.folder / "nanogpt")
            words += [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={steps}"]
            return run(words, self.options.threads, self.options.clock, checkout)

        one, _ = trained(4)
        two, _ = trained(4 + TRIAL)
        steps = max(1, int((SHARE * self.options.budget - one) / max(1e-4, (two - one) / TRIAL)) + 4)
        took, said = trained(steps)
        text = self.text.read_text(encoding="utf-8")
        val = text[int(len(text) * 0.9) :]
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
        ours = comparison.once("dial", comparison.dial)
        names = [name for name in options.others.split(",") if name]
        found = {name: comparison.once(name, partial(comparison.other, OTHERS[name])) for name in names}
        if options.nanogpt is not None:
            checkout = options.nanogpt.resolve()
            found["nanogpt"] = comparison.once("nanogpt", partial(comparison.nanogpt, checkout))
        best = min((entry["bits"], name) for name, entry in found.items() if name != "nanogpt")
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
    main()
