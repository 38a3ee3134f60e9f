"""A sweep is killed at random moments, again and again: no trial is lost, none is run twice, and each ends with the
weights of an uninterrupted run. Prints a table, and one line of JSON last.

    python benchmarks/sweep_kills.py --kills=20
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.data.prepare import prepare

OVER = "--over=learning_rate=log(1e-4,1e-1) dropout=0.0,0.1,0.2"
SIZES = (
    "--n_layer=1 --n_head=2 --n_embd=64 --block_size=32 --batch_size=8 --max_iters=300 --eval_interval=50 "
    "--save_interval=20 --eval_iters=2 --log_interval=50 --device=cpu --compile=False --tensorboard=False"
).split()


def command(trials: int, *more: str) -> list[str]:
    options = [OVER, f"--trials={trials}", "--pruner=none", "--sampler=random", "--name=killed"]
    return [sys.executable, "-m", "llm_from_scratch.cli.sweep", *SIZES, *options, *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--longest", type=float, default=8.0, help="seconds before a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text("".join(rng.choice("abcdefgh \n") for _ in range(20_000)))
        data = prepare([f"{folder}/text.txt"], tokenizer="char", out_dir=f"{folder}/data", report=lambda line: None)
        words, kills = [f"--dataset={data}"], 0
        while kills < options.kills:
            begin = subprocess.Popen(command(options.trials, *words), cwd=folder, stdout=subprocess.DEVNULL)
            wait = rng.uniform(0.2, options.longest)
            time.sleep(wait)
            ended = begin.poll() is not None
            begin.kill()
            begin.wait()
            kills += 1
            print(f"kill {kills} after {wait:.1f} s{': the sweep was complete' if ended else ''}", flush=True)
        code = subprocess.run(command(options.trials, *words), cwd=folder, stdout=subprocess.DEVNULL).returncode
        print(json.dumps(verdict(Path(folder), options.trials) | {"kills": kills, "exit code": code}))


def verdict(folder: Path, trials: int) -> dict[str, Any]:
    sweep = folder / "out-sweep" / "killed"
    rows = json.loads((sweep / "sweep.json").read_text())["trials"]
    different = 0
    for row in rows:
        settings = [f"--{name}={value}" for name, value in row["settings"].items()]
        preset, out_dir = str(sweep / "settings.yaml"), folder / f"whole-{row['trial']}"
        words = ["-m", "llm_from_scratch.cli.train", preset, *settings, f"--out_dir={out_dir}", "--progress=none"]
        subprocess.run([sys.executable, *words], cwd=folder, check=True)
        whole, cut = load(str(out_dir), "last").model, load(str(sweep / f"trial-{row['trial']}"), "last").model
        different += any(not (cut[name] == whole[name]).all() for name in whole)
    return {
        "trials": len(rows), "complete": sum(row["state"] == "complete" for row in rows),
        "lost": trials - len({row["trial"] for row in rows}),
        "settings run twice": len(rows) - len({json.dumps(row["settings"]) for row in rows}),
        "with other weights than an uninterrupted run": different,
    }  # fmt: skip


if __name__ == "__main__":
    main()
