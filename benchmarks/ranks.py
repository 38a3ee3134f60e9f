"""Tokens per second of N single-thread processes, and of one process with N threads, interleaved; and their memory.

python benchmarks/ranks.py [--preset=quick] [--processes=2] [--kinds=ddp,fsdp] [--rounds=9] [--turn=1.0] [SETTING ...]

Every contender runs the trainer's steps on the same global batch. The plan is the preset's: a much larger --max_iters
compiles the blocks. The contenders take turns of --turn seconds, --rounds times. A figure is the median over the turns.
A ratio is the median over the rounds of the ratios to one process. The last columns are MiB of weights and of the
optimizer's moments in the first process. SETTINGs are those of llm-train. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import environment, machine, write_tokens

VOCABULARY = 65


class Team:
    """Processes that train together on request."""

    def __init__(self, kind: str, processes: int, threads: int, preset: str, settings: list[str], folder: Path):
        self.log, self.store = folder / f"{kind}.log", None
        variables = dict[str, str]()
        if kind != "one":
            from torch.distributed import TCPStore

            # as torchrun does: this process listens at a free port
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            variables = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port),
                         "TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": str(processes)}  # fmt: skip
            settings = [*settings, f"--parallel={kind}"]
        words = [preset, f"--dataset={folder / 'ours'}", f"--out_dir={folder / kind}", f"--threads={threads}"]
        self.members: list[Any] = []
        with self.log.open("w") as log:
            for rank in range(processes):
                own = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if variables else {})
                command = [sys.executable, __file__, "--member", *words, *settings]
                self.members.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                        env=environment(threads) | own,
                    )
                )  # fmt: skip

    def ask(self, steps: int) -> dict[str, float]:
        """Runs this many steps. Returns the first process's answer, with the seconds of the slowest."""
        try:
            for member in self.members:
                member.stdin.write(f"{steps}\n")
                member.stdin.flush()
            answers = [json.loads(member.stdout.readline()) for member in self.members]
        except (OSError, ValueError):
            raise SystemExit(f"a process has failed:\n{self.log.read_text()[-2000:]}") from None
        return answers[0] | {"seconds": max(answer["seconds"] for answer in answers)}

    def close(self) -> None:
        for member in self.members:
            member.kill()
            member.wait()
            for pipe in (member.stdin, member.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def member(words: list[str]) -> None:
    """One process: runs the requested steps until the parent ends."""
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import torch

    from llm_from_scratch.config import Config
    from llm_from_scratch.presets import parse
    from llm_from_scratch.training.opening import open_run
    from llm_from_scratch.training.sharding import local
    from llm_from_scratch.training.trainer import train_step

    quiet = ["--progress=none", "--final_eval=False", "--data_on_device=False"]
    parsed = parse(Config, [*words, *quiet], prog="ranks")
    with open_run(parsed.tree, parsed.sources, "llm-train", None) as run:
        for line in orders:
            begin = time.perf_counter()
            for _ in range(int(line)):
                train_step(run, *run.next_batch())
                run.report_steps()
            seconds, states = time.perf_counter() - begin, run.optimizer.state.values()
            moments = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
            answer = {"seconds": seconds, "tokens": run.plan.tokens_per_step}
            with torch.no_grad():
                for kind, group in (("weights", [*run.model.parameters()]), ("moments", moments)):
                    answer[kind] = sum(local(t).numel() * t.itemsize for t in group)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def measured(teams: dict[str, Team], rounds: int, turn: float) -> dict[str, dict[str, Any]]:
    steps, last = dict[str, int](), dict[str, dict[str, float]]()
    for kind, team in teams.items():
        team.ask(3)  # imports, buffers, moments
        steps[kind] = max(1, round(turn / (team.ask(5)["seconds"] / 5)))
    rates: dict[str, list[float]] = {kind: [] for kind in teams}
    for index in range(rounds):
        for kind in teams if index % 2 == 0 else reversed(teams):
            last[kind] = teams[kind].ask(steps[kind])
            rates[kind].append(steps[kind] * last[kind]["tokens"] / last[kind]["seconds"])
    return {
        kind: {
            "tokens_per_s": statistics.median(rates[kind]), "min": min(rates[kind]), "max": max(rates[kind]),
            "ratio": statistics.median(a / b for a, b in zip(rates[kind], rates["one"], strict=True)),
            "weights": last[kind]["weights"], "moments": last[kind]["moments"],
        }
        for kind in teams
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", default="ddp,fsdp", help="ddp, fsdp, hsdp (with --shard_group=N)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of training before the next one's turn")
    options, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as cleanup:
        folder, teams = Path(name), dict[str, Team]()
        write_tokens(folder, VOCABULARY)
        for kind in ("one", *options.kinds.split(",")):
            sizes = (1, options.processes) if kind == "one" else (options.processes, 1)
            teams[kind] = Team(kind, *sizes, options.preset, settings, folder)
            cleanup.callback(teams[kind].close)
        results = measured(teams, options.rounds, options.turn)
    print(f"{'':<5} {'tokens/s':>10} {'from':>10} {'to':>10} {'ratio':>6} {'weights':>8} {'moments':>8}")
    for kind, found in results.items():
        print(f"{kind:<5} {found['tokens_per_s']:>10,.0f} {found['min']:>10,.0f} {found['max']:>10,.0f} "
              f"{found['ratio']:>6.2f} {found['weights'] / 2**20:>8.2f} {found['moments'] / 2**20:>8.2f}")  # fmt: skip
    print(json.dumps({**machine(), **vars(options), "settings": settings, "results": results}))


if __name__ == "__main__":
    member(sys.argv[2:]) if sys.argv[1:2] == ["--member"] else main()
