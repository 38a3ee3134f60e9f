"""Training in several processes on this machine: bytes sent per step (compared with llm-plan's estimate), Muon's time
per process, and the cost of comparing the parameters.

    python benchmarks/exchanged.py [--processes=2,4] [--parallel=ddp] [--layers=4] [--width=256]

Bytes are those of TCP connections, as the kernel counts them (Linux). hsdp: groups of two processes. Times are
processor times with one thread. Muon's time is that of its step, without the tensors of AdamW. It is compared with the
time of a single process, and with that of as many processes that each train a whole model: processors that share caches
or cores slow each other down. The cost of a comparison is relative to the steps between two comparisons.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from llm_from_scratch.core.adapters import trained_model
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.machine.processes import wait_for_all
from llm_from_scratch.tests.forked import rendezvous
from llm_from_scratch.tests.ranks import bytes_sent
from llm_from_scratch.tests.tiny import tiny_config, write_data
from llm_from_scratch.training.cluster import Cluster, exchanges
from llm_from_scratch.training.guards import CHECK
from llm_from_scratch.training.optimizer import make_optimizer
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train_step

WARM, STEPS = 2, 6


def settings(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    heads = max(1, options.width // 64)
    return {
        "n_layer": options.layers, "n_embd": options.width, "n_head": heads, "block_size": 64, "batch_size": 1,
        "gradient_accumulation_steps": 12, "optimizer_type": kind, "backend": "gloo", "out_dir": "unused",
        "parallel": options.parallel, "shard_group": 2 if options.parallel == "hsdp" else None,
    }  # fmt: skip


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Of this process."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind in ("adamw", "muon"):
        plan = make_plan(tiny_config(options.data, **settings(options, kind)))
        runtimes.start(plan.runtime, plan.config.system)
        run = Run(plan)
        spent: list[float] = []
        step = run.optimizer.step

        def timed(step: Any = step, run: Run = run, spent: list[float] = spent) -> None:
            kept = run.optimizer.param_groups
            run.optimizer.param_groups = [group for group in kept if group["rule"] == "muon"] or kept
            begin = time.process_time()
            step()
            spent.append(time.process_time() - begin)
            run.optimizer.param_groups = kept

        run.optimizer.step = timed  # type: ignore[method-assign]
        before, begin = 0, 0.0
        for number in range(WARM + STEPS):
            if number == WARM:
                wait_for_all(plan.runtime.world_size)
                before, begin = bytes_sent(), time.process_time()
            train_step(run, *run.next_batch())
        steps = time.process_time() - begin
        wait_for_all(plan.runtime.world_size)
        found[kind] = {"bytes": (bytes_sent() - before) / STEPS, "seconds": statistics.median(spent[WARM:])}
        begin = time.process_time()
        for _ in range(STEPS):
            run.guard.compare(run.model, run.state.step, now=True)
        found[kind]["comparison"] = (time.process_time() - begin) / (CHECK * steps)
        found[kind]["passes"] = plan.micro_steps
        run.close()
        runtimes.stop()
        time.sleep(1)  # the next group listens on the same port
    return found


def expected(options: argparse.Namespace, kind: str, processes: int, passes: int) -> float:
    config = tiny_config(options.data, **settings(options, kind))
    config.model.vocab_size = 20
    model = trained_model(config)
    optimizer = make_optimizer(model, config.optimizer, torch.device("cpu"))
    cluster = Cluster("H100", *((2, processes // 2) if options.parallel == "hsdp" else (processes, 1)))
    return sum(
        e.sent for e in exchanges(model, optimizer, options.parallel, cluster, passes, 4, 4, True, backend="gloo")
    )


def of_processes(processes: int, argv: list[str], together: bool = True) -> list[dict[str, Any]]:
    """What each finds. together: they train one model; else each trains its own."""
    with rendezvous(processes) as shared:
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, *argv, "--worker"], stdout=subprocess.PIPE, text=True,
                env=os.environ
                | (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if together else {})
                | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(processes)
        ]  # fmt: skip
        return [json.loads(worker.communicate(timeout=600)[0].splitlines()[-1]) for worker in workers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--parallel", default="ddp")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measured(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.data = str(write_data(Path(folder) / "data"))
        argv = [f"--{name}={getattr(options, name)}" for name in ("parallel", "layers", "width", "data")]
        alone = measured(options)
        result: dict[str, Any] = {"muon_seconds": {1: alone["muon"]["seconds"]}}
        print(f"Muon's step in one process: {1e3 * alone['muon']['seconds']:.1f} ms of processor time")
        for processes in map(int, options.processes.split(",")):
            of_each = of_processes(processes, argv)
            seconds = statistics.fmean(one["muon"]["seconds"] for one in of_each)
            result["muon_seconds"][processes] = seconds
            apart = statistics.fmean(one["muon"]["seconds"] for one in of_processes(processes, argv, together=False))
            result[f"muon_seconds_{processes}_apart"] = apart
            shares = f"{seconds / alone['muon']['seconds']:.2f} of one, {seconds / apart:.2f} of one next to others"
            print(f"{processes} processes: Muon {1e3 * seconds:.1f} ms: {shares} ({1e3 * apart:.1f} ms)")
            for kind in ("adamw", "muon"):
                sent = statistics.fmean(one[kind]["bytes"] for one in of_each)
                plan = expected(options, kind, processes, of_each[0][kind]["passes"])
                result[f"{kind}_{processes}"] = sent / plan
                comparison = max(one[kind]["comparison"] for one in of_each)
                result[f"{kind}_{processes}_comparison"] = comparison
                print(f"  {kind}: {sent:,.0f} bytes sent by a process, {plan:,.0f} estimated ({sent / plan:.4f}); "
                      f"parameters compared in {comparison:.3%} of a step")  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
