"""llm-bench and bench.py: the time of a training step (GPT-2 124M by default) and its profile."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config, GPTConfig, OptimizerConfig, SystemConfig
from ..errors import UserError
from ..machine.terminal import note
from ..presets import Parsed, parse
from ..settings import at_least, flatten, validate
from .common import command, data_prepared_last
from .profiling import read

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.dataset import TokenData

PROFILED = 5  # steps
# Without CUDA, these replace settings that the user did not give.
CPU_SIZES = {"batch_size": 2, "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256, "compile": False}
COMMON = (
    "batch_size", "dataset", "real_data", "steps", "burnin_steps", "profile", "n_layer", "n_head", "n_embd",
    "block_size", "optimizer_type", "device", "dtype", "compile", "json",
)  # fmt: skip
HELP = """Times training steps: forward, backward and optimizer.

  llm-bench --n_layer=4 --n_embd=256
  llm-bench --profile  # time per kind of operation, and a trace in bench_log/"""


@dataclass
class BenchOptions:
    """The benchmark."""

    batch_size: int = 12
    """Sequences per step."""
    real_data: bool = True
    """Use batches from --dataset. False, or if the dataset is missing: random tokens."""
    dataset: str = "openwebtext"
    """Name or folder of prepared data."""
    profile: bool = False
    """Run torch's profiler instead of the plain timing."""
    burnin_steps: int = 10
    """Steps before the timing starts."""
    steps: int = 20
    """Timed steps."""
    json: bool = False
    """Also print one line of JSON at the end."""

    def validate(self) -> None:
        at_least(self, 1, "batch_size", "steps")
        at_least(self, 0, "burnin_steps")


@dataclass
class BenchCommand:
    options: BenchOptions = field(default_factory=BenchOptions)
    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, beta2=0.95, weight_decay=1e-2, grad_clip=0.0)
    )
    system: SystemConfig = field(default_factory=SystemConfig)


def _main(argv: list[str], prog: str, defaults: dict[str, Any] | None = None) -> int:
    prepared = data_prepared_last() if defaults is None else None
    defaults = defaults or prepared or {}
    gpu = flatten(BenchCommand()) | defaults
    texts = {name: f"{gpu[name]}, or {value} without a GPU" for name, value in CPU_SIZES.items()}
    texts |= {"dataset": "random tokens: no prepared data found"} if prepared == {} else {}
    parsed = parse(
        BenchCommand, argv, prog=prog, description=HELP, defaults=defaults, common=COMMON, shown=lambda *_: texts
    )
    validate(parsed.tree)
    if prepared is not None and "dataset" not in parsed.sources and parsed.tree.options.real_data:
        if prepared:
            note(f"using the most recently prepared data: {prepared['dataset']} (override with --dataset=NAME)")
        else:
            note("using random tokens: no prepared data found; to use real text, run llm-prepare FILE first")
            parsed.tree.options.real_data = False

    from ..machine import device as runtimes

    device = runtimes.resolve_device(parsed.tree.system.device)
    if device.type != "cuda":
        shrink(parsed)
    tree = parsed.tree
    tree.model.validate()
    runtime = runtimes.resolve(tree.system)
    runtimes.start(runtime, tree.system)
    step, model = _training_step(tree, runtime)
    shape = f"{model.get_num_params() / 1e6:.2f}M parameters, batch {tree.options.batch_size} x {tree.model.block_size}"
    print(f"device {device}, {runtime.reasons['dtype']}, compile {'on' if runtime.compile else 'off'}, {shape}")
    if tree.options.profile:
        seconds = _profile(step, device)
        print(f"{seconds * 1e3:.2f} ms per step (profiler on), {_speed(model, tree.options, seconds, runtime)}")
        return 0
    for _ in range(tree.options.burnin_steps):
        step()
    runtimes.wait(device)
    begin = time.perf_counter()
    losses = [step() for _ in range(tree.options.steps)]
    runtimes.wait(device)
    seconds = (time.perf_counter() - begin) / tree.options.steps
    for k, loss in enumerate(losses):  # after the timing: item() waits for the device
        print(f"{k}/{tree.options.steps} loss: {loss.item():.4f}")
    print(f"time per iteration: {seconds * 1000:.4f}ms, {_speed(model, tree.options, seconds, runtime)}")
    if tree.options.json:
        tokens = tree.options.batch_size * tree.model.block_size / seconds
        print(json.dumps({"ms_per_step": seconds * 1e3, "tokens_per_s": tokens, **flatten(tree)}, default=str))
    return 0


def _speed(model: Any, options: BenchOptions, seconds: float, runtime: Any) -> str:
    """MFU (if the device's peak is known) and tokens/s. seconds: the time of one step."""
    peak, tokens = runtime.peak_flops, options.batch_size * model.config.block_size / seconds
    mfu = f"{model.estimate_mfu(options.batch_size, seconds, peak) * 100:.2f}%" if peak else "n/a"
    return f"MFU: {mfu}, {tokens:,.0f} tokens/s"


def shrink(parsed: Parsed[BenchCommand]) -> None:
    """Replaces settings that the user did not give by sizes that run in seconds on a CPU."""
    changed = []
    for name, value in CPU_SIZES.items():
        for section in (parsed.tree.options, parsed.tree.model, parsed.tree.system):
            if hasattr(section, name) and name not in parsed.sources:
                setattr(section, name, value)
                changed.append(f"{name}={value}")
    if changed:
        print(f"no CUDA device, using smaller sizes: {', '.join(changed)}")


def _training_step(tree: BenchCommand, runtime: Any) -> tuple[Callable[[], Tensor], Any]:
    """The training step of llm-train, and the model."""
    from torch.profiler import record_function

    from ..core.dataset import SampleOrder
    from ..training.microbatch import keeps_memory
    from ..training.plan import Plan
    from ..training.run import Run
    from ..training.trainer import train_step

    size, block_size = tree.options.batch_size, tree.model.block_size
    config = Config(model=tree.model, optimizer=tree.optimizer, system=tree.system)
    config.data.batch_size, config.training.gradient_accumulation_steps = size, 1
    config.scheduler.decay_lr = False
    data, is_real = _data(tree)
    order = SampleOrder(len(data), block_size, seed=tree.system.seed)
    plan = Plan(config, runtime, Path(), None, data, data, order, size, size, tree.options.steps)
    run = Run(replace(plan, keep_memory=keeps_memory(plan)), say=print)

    def step() -> Tensor:
        with record_function("data"):  # profiling.py reads these names
            x, y = run.loader.get(run.state.step if is_real else 0)
        return train_step(run, x, y).loss

    return step, run.model


def _data(tree: BenchCommand) -> tuple[TokenData, bool]:
    """The prepared data, or random tokens for one batch, and whether they are real."""
    import numpy as np

    from ..core.dataset import TokenData, resolve_dataset

    options, block_size, vocab_size = tree.options, tree.model.block_size, tree.model.vocab_size or 50304
    if options.real_data:
        try:
            data = TokenData.open(resolve_dataset(options.dataset), "train")
            data.check(block_size, vocab_size)
            return data, True
        except UserError as error:
            print(f"using random tokens: {error}")
    random = np.random.default_rng(tree.system.seed)
    return TokenData([random.integers(vocab_size, size=options.batch_size * block_size + 1, dtype=np.uint32)]), False


def _profile(step: Callable[[], Tensor], device: Any) -> float:
    """Profiles five steps after ten warm-up steps. Returns the seconds per step."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    from ..machine.device import wait

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    folder = Path("bench_log")
    folder.mkdir(exist_ok=True)
    trace = folder / "trace.json"
    trace.unlink(missing_ok=True)  # an earlier one: torch does not raise if it cannot write
    plan = schedule(wait=5, warmup=5, active=PROFILED, repeat=1)
    with profile(
        activities=activities, schedule=plan, on_trace_ready=lambda p: p.export_chrome_trace(str(trace))
    ) as profiler:
        for k in range(10 + PROFILED):
            step()
            if k == 9 + PROFILED:
                wait(device)  # otherwise the last kernels are missing
            profiler.step()
    found = read(profiler.events() or (), PROFILED)
    print("\n".join(found.lines()))
    hint = "open it in https://ui.perfetto.dev or chrome://tracing"
    print(f"trace: {trace} ({hint if trace.is_file() else 'not written: disk full?'}); torch {torch.__version__}")
    return found.microseconds / PROFILED / 1e6


main = command(partial(_main, prog="llm-bench"))
main_nanogpt = command(partial(_main, prog="python bench.py", defaults={"compile": True}))

if __name__ == "__main__":
    sys.exit(main())
