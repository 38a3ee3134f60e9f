"""llm-plan's estimates compared with measurements: seconds per step, peak memory, the whole run, the ETA at step 20.

python benchmarks/planning.py [--shapes=tiny,quick,char,wide,deep,vocabulary,gpt2] [--rounds=1] [--threads=N]
       [--clock=wall|cpu] [SETTING ...]

Each shape is planned in one fresh process and trained for some steps in another, --rounds times; a figure is the
median. On a shared machine, --clock=cpu --threads=1 compares processor time. SETTINGs are those of
llm-train. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import arguments, environment, machine, peak_memory, write_tokens

# settings of each shape; a vocabulary of None is 65. Short runs with every part of a long one
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "max_iters": 150,
             "eval_interval": 50},
    "quick": {"max_iters": 150, "eval_interval": 50, "tensorboard": False},
    "char": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "dropout": 0.2,
             "max_iters": 4},
    "wide": {"n_layer": 2, "n_head": 8, "n_embd": 1024, "block_size": 128, "batch_size": 8, "max_iters": 30},
    "deep": {"n_layer": 24, "n_head": 4, "n_embd": 96, "block_size": 64, "batch_size": 8, "max_iters": 60},
    "vocabulary": {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "batch_size": 4,
                   "vocab_size": 50304, "max_iters": 30, "eval_interval": 10},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 256, "batch_size": 2, "vocab_size": 50304,
             "max_iters": 6},
}  # fmt: skip
COMMON = {"gradient_accumulation_steps": 1, "warmup_iters": 1, "eval_interval": 1000, "eval_iters": 4, "bias": False,
          "loss_plot": False, "progress": "lines", "log_interval": 1, "final_eval": False}  # fmt: skip
ETA_AT = 20


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options, settings = parser.parse_known_args()
    results = {}
    print(f"{'shape':<11} {'step, ms':>17} {'ratio':>6} {'peak, MiB':>13} {'ratio':>6} {'run, s':>13} {'ratio':>6} "
          f"{'ETA ratio':>9} {'calibration':>11}")  # fmt: skip
    for label in options.shapes.split(","):
        rounds = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_tokens(folder, SHAPES[label].get("vocab_size", 65), 1 << 17)
                job = {"shape": label, "folder": name, "settings": settings, "clock": options.clock}
                plan = child({**job, "what": "plan"}, options.threads)
                rounds.append({"plan": plan, "run": child({**job, "what": "run"}, options.threads)})
        middle = {
            what: {key: statistics.median(one[what][key] for one in rounds) for key in rounds[0][what]}
            for what in ("plan", "run")
        }
        ratio = {
            key: statistics.median(one["plan"][key] / one["run"][key] for one in rounds)
            for key in ("step", "peak", "total")
        }
        plan, run = middle["plan"], middle["run"]
        print(f"{label:<11} {plan['step'] * 1e3:>8,.1f} {run['step'] * 1e3:>8,.1f} {ratio['step']:>6.2f} "
              f"{plan['peak'] / 2**20:>6,.0f} {run['peak'] / 2**20:>6,.0f} {ratio['peak']:>6.2f} "
              f"{plan['total']:>6,.1f} {run['total']:>6,.1f} {ratio['total']:>6.2f} {run['eta']:>9.2f} "
              f"{plan['calibration']:>9.1f} s", flush=True)  # fmt: skip
        results[label] = {"ratio": ratio, **middle}
    print(json.dumps({**machine(), "threads": options.threads, "clock": options.clock, "rounds": options.rounds,
                      "settings": settings, "shapes": results}))  # fmt: skip


def child(job: dict[str, Any], threads: int) -> dict[str, float]:
    """The result of a new process."""
    words = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(words, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job['shape']} has failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(job: dict[str, Any]) -> None:
    """Plans or trains. Prints the result as the last line."""
    if job["clock"] == "cpu":
        time.perf_counter = time.process_time
    from llm_from_scratch.config import Config
    from llm_from_scratch.presets import nanogpt_defaults, parse

    folder, values = Path(job["folder"]), {**COMMON, **SHAPES[job["shape"]]}
    values |= {"dataset": folder / "ours", "out_dir": folder / "out"}
    words = ["quick"] if job["shape"] == "quick" else []
    words += [f"--{name}={value}" for name, value in values.items()] + job["settings"]
    config = parse(Config, words, prog="planning", defaults=nanogpt_defaults()).tree
    found = planned(config) if job["what"] == "plan" else trained(config)
    print(json.dumps(found))


def planned(config: Any) -> dict[str, float]:
    from llm_from_scratch.training.forecast import forecast
    from llm_from_scratch.training.setup import make_plan

    found = forecast(make_plan(config))
    return {"step": found.step, "peak": found.memory, "total": found.total, "calibration": found.calibration}


def trained(config: Any) -> dict[str, float]:
    from llm_from_scratch.training import trainer as trainers

    kept: dict[str, Any] = {"eta": float("nan")}
    step = trainers.train_step

    def marked(run: Any, x: Any, y: Any) -> Any:
        if run.state.step == ETA_AT:
            kept["estimated"], kept["at"] = run.log.remaining.seconds(ETA_AT), time.perf_counter()
        kept["timer"] = run.timer
        return step(run, x, y)

    trainers.train_step = marked
    with contextlib.redirect_stdout(io.StringIO()):
        trainers.train(config)
    if "at" in kept:
        kept["eta"] = kept["estimated"] / (time.perf_counter() - kept["at"])
    total = time.process_time() if time.perf_counter is time.process_time else seconds_of_life()
    return {
        "step": statistics.median(kept["timer"].recent),
        "peak": peak_memory(config.system.device),
        "total": total,
        "eta": kept["eta"],
    }


def seconds_of_life() -> float:
    """Seconds since this process started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    up = float(Path("/proc/uptime").read_text().split()[0])
    return up - int(fields[19]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        work(json.loads(sys.argv[2]))
    else:
        main()
