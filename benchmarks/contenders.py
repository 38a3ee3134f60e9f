"""Training runs of this project, nanoGPT, transformers and litgpt that run steps on request.

Each contender has its own process and the same number of threads. The parent asks one for k steps over a pipe, then
another, so only one contender runs at a time. Our steps are the trainer's. nanoGPT runs its unchanged train.py,
which is paused at its output lines. litgpt has an environment of its own. "floor" computes only the matrix products of
our step's linear layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import pickle
import platform
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("ours", "nanogpt", "transformers", "litgpt", "floor")


@dataclass(frozen=True)
class Case:
    """The model, the batch and the kind of machine that all contenders share."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    vocab_size: int
    dropout: float = 0.0
    device: str = "cpu"
    dtype: str | None = None
    """None: the default of each contender. On a CPU the others compute in float32."""
    compile: bool = False
    """Of the others. This project uses auto."""
    log_interval: int = 1
    """Steps between nanoGPT's log lines. At each line it waits for the device."""
    max_iters: int = 5000
    """The length of the run, by which this project decides whether to compile."""
    beta2: float = 0.99

    @property
    def tokens(self) -> int:
        return self.batch_size * self.block_size


CASES = {
    "cpu-readme": Case(4, 4, 128, 64, 12, 65, max_iters=2000),
    "char": Case(6, 6, 384, 256, 64, 65, dropout=0.2),
    "char-nodrop": Case(6, 6, 384, 256, 64, 65),
    "gpt2": Case(12, 12, 768, 256, 2, 50304, beta2=0.95),
    "gpt2-512": Case(12, 12, 768, 512, 4, 50304, beta2=0.95),
    "tiny": Case(1, 1, 16, 8, 2, 65, max_iters=50),
    "cuda-gpt2": Case(12, 12, 768, 1024, 64, 50304, 0.0, "cuda", "bfloat16", True, 1, 20000, 0.95),
    "cuda-char": Case(6, 6, 384, 256, 64, 65, 0.2, "cuda", "bfloat16", True, 10),
}


class Contender:
    """A process that trains on request. place: nanoGPT's checkout, or the Python that has litgpt."""

    def __init__(self, name: str, case: Case, folder: Path, threads: int, place: Path | None, settings: list[str]):
        self.name, self.folder = name, folder
        self.log = folder / f"{name}.log"
        job = {"name": name, "case": dataclasses.asdict(case), "folder": str(folder), "threads": threads,
               "nanogpt": str(place.resolve()) if place else None, "settings": settings}  # fmt: skip
        python = str(place) if name == "litgpt" else sys.executable
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-P", __file__, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, env=environment(threads),
            )  # fmt: skip

    def ask(self, steps: int) -> dict[str, float]:
        """Runs this many steps: {"seconds": in total, "peak": bytes so far}. 0 waits until the process is ready."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            raise SystemExit(f"{self.name} has failed:\n{self.log.read_text()[-2000:]}") from None

    def per_step(self, steps: int) -> float:
        return self.ask(steps)["seconds"] / steps

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def machine() -> dict[str, Any]:
    """The machine and versions of a result."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count(), "cpu": platform.processor()}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        found["cpu"] = models[0] if models else found["cpu"]
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_tokens(folder: Path, vocab_size: int, tokens: int = 1 << 19) -> None:
    """The same random tokens for all: folder/ours with a manifest, folder/nanogpt with a meta.pkl."""
    import numpy as np

    rng = np.random.default_rng(0)
    manifest = {"format": "llm-from-scratch-data", "version": 1, "dtype": "uint16", "vocab_size": vocab_size}
    for kind in ("ours", "nanogpt"):
        (folder / kind).mkdir(parents=True)
    for split, size in (("train", tokens), ("val", tokens // 8)):
        rng.integers(0, vocab_size, size=size).astype("<u2").tofile(folder / "ours" / f"{split}.bin")
        os.link(folder / "ours" / f"{split}.bin", folder / "nanogpt" / f"{split}.bin")
    (folder / "ours" / "manifest.json").write_text(json.dumps({**manifest, "splits": {}}))
    (folder / "nanogpt" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


def arguments(description: str) -> argparse.ArgumentParser:
    """The common options of the scripts that compare contenders."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; default: nanoGPT is skipped")
    parser.add_argument("--litgpt", type=Path, help="the Python of an environment with litgpt; default: it is skipped")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def environment(threads: int) -> dict[str, str]:
    """The environment of a process with this many threads. It finds this project's source and writes no files there."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    count = str(threads)
    return os.environ | {
        "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path
    }  # fmt: skip


def nanogpt_readme(data: Path, out_dir: Path) -> list[str]:
    """The command of nanoGPT's README for a CPU. It runs in nanoGPT's folder, with data in another one."""
    settings = {"device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 1, "block_size": 64,
                "batch_size": 12, "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000,
                "lr_decay_iters": 2000, "dropout": 0.0, "dataset": data, "out_dir": out_dir}  # fmt: skip
    words = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *words]


# The rest runs in a contender's own process.


def _serve(case: Case, step: Callable[[], None], orders: IO[str], answers: IO[str]) -> None:
    """Runs the requested steps until the parent ends."""
    for line in orders:
        begin = time.perf_counter()
        for _ in range(int(line)):
            step()
        _wait(case)
        _answer(answers, time.perf_counter() - begin, case)


def _answer(answers: IO[str], seconds: float, case: Case) -> None:
    answers.write(json.dumps({"seconds": seconds, "peak": peak_memory(case.device)}) + "\n")
    answers.flush()


def _wait(case: Case) -> None:
    if case.device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """Peak bytes: on a device as counted by torch, else the peak resident memory of the process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss starts with the parent's value at the fork
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _ours(case: Case, job: dict[str, Any], orders: IO[str], answers: IO[str]) -> None:
    """The trainer's own updates, with everything its loop does around them except evaluations and checkpoints."""
    from llm_from_scratch.machine import device as runtimes
    from llm_from_scratch.machine.files import FolderLock
    from llm_from_scratch.training.run import Run
    from llm_from_scratch.training.setup import make_plan
    from llm_from_scratch.training.trainer import train_step

    plan = make_plan(_config(case, job))
    runtimes.start(plan.runtime, plan.config.system)
    run = Run(plan, lock=FolderLock(Path(job["folder"]) / "out-ours"))

    def step() -> None:
        train_step(run, *run.next_batch())
        run.report_steps()

    _serve(case, step, orders, answers)
    run.close()


def _config(case: Case, job: dict[str, Any]) -> Any:
    """Our settings for a case."""
    from llm_from_scratch import Config
    from llm_from_scratch.presets import nanogpt_defaults, parse

    folder = Path(job["folder"])
    words = [f"--{name}={getattr(case, name)}" for name in
             ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "vocab_size", "dropout", "device", "max_iters",
              "log_interval", "beta2")]  # fmt: skip
    words += ["--bias=False", "--gradient_accumulation_steps=1", f"--dataset={folder / 'ours'}", "--progress=lines",
              f"--out_dir={folder / 'out-ours'}", "--learning_rate=1e-3", "--loss_plot=False"]  # fmt: skip
    words += [f"--dtype={case.dtype}"] if case.dtype else []
    return parse(Config, words + job["settings"], prog="benchmark", defaults=nanogpt_defaults()).tree


def _floor(case: Case, job: dict[str, Any], orders: IO[str], answers: IO[str]) -> None:
    """The outputs and both gradients of the linear layers, in our step's precision, each by the fastest
    library for its shape, into memory that is kept."""
    import torch

    from llm_from_scratch.machine.device import resolve

    runtime, wide = resolve(_config(case, job).system), case.n_embd
    layer = [(wide, 3 * wide), (wide, wide), (wide, 4 * wide), (4 * wide, wide)]
    best: dict[Any, Callable[..., Any]] = {}
    products: list[tuple[Callable[..., Any], Any]] = []
    for shape in layer * case.n_layer + [(wide, case.vocab_size)]:
        w, dw = torch.randn((2, shape[1], shape[0]), dtype=runtime.dtype, device=case.device)
        x, dx = torch.randn((2, case.tokens, shape[0]), dtype=w.dtype, device=case.device)
        y, dy = torch.randn((2, case.tokens, shape[1]), dtype=w.dtype, device=case.device)
        for kind, product in enumerate(((y, x, w.t()), (dx, dy, w), (dw, dy.t(), x))):
            if (shape, kind) not in best:
                best[shape, kind] = _fastest(*product)
            products.append((best[shape, kind], product))

    def step() -> None:
        for multiply, product in products:
            multiply(*product)

    _serve(case, step, orders, answers)


def _fastest(out: Any, a: Any, b: Any) -> Callable[..., Any]:
    """The way to compute out = a @ b that takes the least time on these matrices: torch's, or another library's."""
    from llm_from_scratch.kernels.products import NAMES, TORCH, is_here, multiply

    libraries = [TORCH, *(name for name in NAMES if a.device.type == "cpu" and is_here(name))]
    times: dict[str, list[float]] = {library: [] for library in libraries}
    for _ in range(5 if len(libraries) > 1 else 0):
        for library, measured in times.items():
            begin = time.perf_counter()
            multiply(a, b, library, out)
            measured.append(time.perf_counter() - begin)
    best = min(libraries, key=lambda library: min(times[library], default=0.0))
    return lambda out, a, b: multiply(a, b, best, out)


class _Gate(io.TextIOBase):
    """A standard output that pauses nanoGPT's loop after the requested steps."""

    def __init__(self, case: Case, orders: IO[str], answers: IO[str]):
        self.case, self.orders, self.answers = case, orders, answers
        self.left, self.begin = 0, math.nan

    def write(self, text: str) -> int:
        sys.stderr.write(text)
        if text.startswith("iter "):
            self.left -= self.case.log_interval
            if self.left <= 0:
                _wait(self.case)
                if not math.isnan(self.begin):
                    _answer(self.answers, time.perf_counter() - self.begin, self.case)
                self.left = self._order()
                self.begin = time.perf_counter()
        return len(text)

    def _order(self) -> int:
        while (line := self.orders.readline()) and int(line) == 0:  # ready: it has reached its first line
            _answer(self.answers, 0.0, self.case)
        if not line:
            raise SystemExit
        assert int(line) % self.case.log_interval == 0
        return int(line)


def _nanogpt(case: Case, job: dict[str, Any], orders: IO[str], answers: IO[str]) -> None:
    """nanoGPT's train.py, unmodified: its own loop, batches, model and optimizer."""
    checkout, folder = Path(job["nanogpt"]), Path(job["folder"])
    os.chdir(checkout)  # it reads configurator.py there
    sys.path.insert(0, str(checkout))
    settings = {
        "n_layer": case.n_layer, "n_head": case.n_head, "n_embd": case.n_embd, "block_size": case.block_size,
        "batch_size": case.batch_size, "dropout": float(case.dropout), "device": case.device,
        "compile": case.compile, "log_interval": case.log_interval, "gradient_accumulation_steps": 1,
        "dataset": str(folder / "nanogpt"), "out_dir": str(folder / "out-nanogpt"), "eval_interval": 1 << 40,
        "eval_iters": 1, "max_iters": 1 << 40, "beta2": case.beta2, "learning_rate": 1e-3,
    }  # fmt: skip
    settings |= {"dtype": case.dtype} if case.dtype else {}
    sys.argv = ["train.py", *(f"--{name}={value}" for name, value in settings.items())]
    sys.stdout = _Gate(case, orders, answers)
    runpy.run_path(str(checkout / "train.py"), run_name="__main__")


def _transformers(case: Case, job: dict[str, Any], orders: IO[str], answers: IO[str]) -> None:
    """GPT2LMHeadModel. Fused AdamW is the default of its own Trainer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = {name: case.dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    config = GPT2Config(
        vocab_size=case.vocab_size, n_positions=case.block_size, n_embd=case.n_embd, n_layer=case.n_layer,
        n_head=case.n_head, bos_token_id=0, eos_token_id=0, use_cache=False, **dropout,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config).to(case.device).train()
    network = torch.compile(model) if case.compile else model
    _train(case, job, model, lambda rows: network(input_ids=rows, labels=rows).loss, orders, answers)


def _litgpt(case: Case, job: dict[str, Any], orders: IO[str], answers: IO[str]) -> None:
    """litgpt's GPT, tied, with the loss of `litgpt pretrain`, at the same sizes. Its positions are rotary."""
    import torch
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=case.block_size, vocab_size=case.vocab_size, padded_vocab_size=case.vocab_size, bias=False,
        n_layer=case.n_layer, n_head=case.n_head, n_embd=case.n_embd, parallel_residual=False,
    )  # fmt: skip
    model: Any = GPT(config).to(case.device).train()
    model.transformer.wte.weight = model.lm_head.weight
    network = torch.compile(model) if case.compile else model
    _train(case, job, model, lambda rows: chunked_cross_entropy(network(rows)[:, :-1], rows[:, 1:]), orders, answers)


def _train(
    case: Case, job: dict[str, Any], model: Any, loss_of: Callable[[Any], Any], orders: IO[str], answers: IO[str]
) -> None:
    """Steps of a plain training loop with fused AdamW."""
    import numpy as np
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, case.beta2), weight_decay=0.1, fused=True)
    data = np.memmap(Path(job["folder"]) / "ours" / "train.bin", dtype="<u2", mode="r")
    dtype = getattr(torch, case.dtype or "float32")

    def step() -> None:
        starts = np.random.randint(0, len(data) - case.block_size, size=case.batch_size)
        rows = torch.from_numpy(np.stack([data[i : i + case.block_size] for i in starts]).astype(np.int64))
        rows = rows.to(case.device)
        with torch.autocast(case.device, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    _serve(case, step, orders, answers)


def _main(job: dict[str, Any]) -> None:
    case = Case(**job["case"])
    if hasattr(os, "sched_setaffinity"):  # our --threads must not give us more cores than the others
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    answers, orders = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0), "r")
    sys.stdout = sys.stderr  # the contenders' output must not mix with the answers
    contenders = {
        "ours": _ours, "nanogpt": _nanogpt, "transformers": _transformers, "litgpt": _litgpt, "floor": _floor
    }  # fmt: skip
    contenders[job["name"]](case, job, orders, answers)


def present(options: argparse.Namespace) -> dict[str, Path | None]:
    """The contenders of --contenders that are there, with their place."""
    places = {"nanogpt": options.nanogpt, "litgpt": options.litgpt}
    return {name: places.get(name) for name in options.contenders.split(",") if places.get(name, True)}


def lined_up(
    names: dict[str, Path | None], case: Case, threads: int, settings: list[str], folder: Path
) -> Iterator[Contender]:
    """Starts contenders, one after the other. litgpt has no dropout."""
    write_tokens(folder, case.vocab_size)
    for name, place in names.items():
        if name != "litgpt" or not case.dropout:
            yield Contender(name, case, folder, threads, place, settings)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
