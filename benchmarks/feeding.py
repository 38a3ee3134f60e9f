"""The data loader: its share of a step, its memory, and packed documents.

python benchmarks/feeding.py [--only=loader,memory,attention,packing,adder] [--threads=N]

loader: time of a batch relative to a training step of `quick`, from one dataset, a mixture and an object store. memory:
growth over 100,000 batches. attention: a step on packed documents relative to one on plain windows. packing: padding of
short documents. adder: minGPT's task, two minutes on two cores. Times are processor times. Prints a table, and a
line of JSON last.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import arguments

from llm_from_scratch import Generator, prepare, preset
from llm_from_scratch.core.dataset import BatchLoader
from llm_from_scratch.core.packing import PackedData
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train_step

WORDS = "a few words of text and more that follow in the same line of a short story about nothing at all".split()
STEPS, BATCHES = 30, 3000
HELD_OUT = 500


def story(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def datasets(folder: Path) -> None:
    """Two long texts, and one of short documents, with one tokenizer."""
    rng = random.Random(0)
    for name, lines in (("one", False), ("two", False), ("short", True)):
        count = 4000 if lines else 1
        text = "".join(story(rng, rng.randint(2, 20) if lines else 200_000) + "\n" for _ in range(count))
        (folder / f"{name}.txt").write_text(text)
        tokenizer = "char" if name == "one" else str(folder / "data" / "processed" / "one")
        prepare(f"{name}.txt", root=folder, tokenizer=tokenizer, lines=lines, name=name, report=lambda line: None)


def planned(dataset: str, **settings: Any) -> Any:
    return make_plan(preset("quick", dataset=dataset, max_iters=1000, device="cpu", compile=False, **settings))


@contextlib.contextmanager
def loader_of(plan: Any) -> Iterator[BatchLoader]:
    loader = BatchLoader(plan.train_data, plan.order, plan.global_batch, torch.device("cpu"))
    yield loader
    loader.close()


def seconds(work: Callable[[int], object], count: int) -> float:
    """Processor time of a call, of all threads."""
    begin = time.process_time()
    for number in range(count):
        work(number)
    return (time.process_time() - begin) / count


def of_steps(*plans: Any, rounds: int = 3) -> list[float]:
    """Processor time of a training step of each run, medians of interleaved rounds."""
    steps = []
    for plan in plans:
        run = Run(plan)
        batches = [run.loader.get(step) for step in range(STEPS)]
        run.loader.close()
        steps.append(lambda step, run=run, batches=batches: train_step(run, *batches[step]))
        seconds(steps[-1], 3)
    found = [[seconds(step, STEPS) for step in steps] for _ in range(rounds)]
    return [statistics.median(times) for times in zip(*found, strict=True)]


def loader() -> dict[str, float]:
    found = {"step_ms": 1e3 * of_steps(planned("one"))[0]}
    address = "file://" + str(Path("data/processed/one").resolve())
    for name, dataset in (("one dataset", "one"), ("mixture", "{one: 0.7, two: 0.3}"), ("store", address)):
        with loader_of(planned(dataset)) as one:
            seconds(one.get, 100)
            found[f"{name}, us"] = 1e6 * statistics.median(seconds(one.get, BATCHES) for _ in range(3))
        found[f"{name}, share"] = found[f"{name}, us"] / found["step_ms"] / 1e3
    return found


def memory() -> dict[str, float]:
    found = {}
    for name, dataset in (("one dataset", "one"), ("mixture", "{one: 0.7, two: 0.3}")):
        with loader_of(planned(dataset)) as one:
            seconds(one.get, 1000)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            seconds(one.get, 100_000)
            found[f"{name}, growth of the peak, MiB"] = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            ) / 1024
    return found


def attention() -> dict[str, float]:
    found = {}
    for block_size, dropout in ((128, 0.0), (512, 0.0), (256, 0.1)):
        how = {"block_size": block_size, "dropout": dropout}
        plans = (planned("short", documents=documents, **how) for documents in (False, True))
        plain, packed = of_steps(*plans, rounds=5)
        found |= {f"{block_size}, dropout {dropout:g}: plain, ms": 1e3 * plain, "packed / plain": packed / plain}
        print(f"context {block_size}, dropout {dropout:g}: plain {1e3 * plain:.1f} ms, packed {packed / plain:.3f} x")
    return found


def packing() -> dict[str, float]:
    found = {}
    for block_size in (128, 256, 512):
        data = planned("short", block_size=block_size).train_data
        assert isinstance(data, PackedData)
        found[f"{block_size}, padding"] = 1 - float((data.lengths - 1).sum()) / data.positions
    return found


def adder(steps: int = 0) -> dict[str, float]:
    """Trains on lines such as 12+34=640 (the sum reversed), and completes sums that are in no line."""
    sums = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(sums)
    lines = [f"{a:02}+{b:02}={str(f'{a + b:03}')[::-1]}\n" for a, b in sums]
    Path("sums.txt").write_text("".join(lines[HELD_OUT:]))
    prepare("sums.txt", tokenizer="char", lines=True, name="sums", report=lambda line: None)
    command = [sys.executable, "-m", "llm_from_scratch.cli.train", "quick", "--dataset=sums", "--out_dir=sums"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *([f"--max_iters={steps}"] if steps else [])], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    prompts = [line[:6] for line in lines[:HELD_OUT]]
    written = Generator.from_checkpoint("sums").generate(prompts, max_new_tokens=4, temperature=0.0)
    right = sum(
        line[:9] == (prompt + text.removeprefix(prompt))[:9]
        for line, prompt, text in zip(lines, prompts, written, strict=False)
    )
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"right": right / HELD_OUT, "processor seconds": used}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", default="loader,memory,attention,packing,adder")
    parser.add_argument("--steps", type=int, default=0, help="of adder; 0: the preset's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    results: dict[str, Any] = {}
    parts = {"loader": loader, "memory": memory, "attention": attention, "packing": packing,
             "adder": lambda: adder(options.steps)}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        datasets(Path(name))
        for part in options.only.split(","):
            results[part] = parts[part]()
            for label, value in results[part].items():
                print(f"{part:<10} {label:<40} {value:.5g}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
