"""A training step on a GPU, as far as a CPU can test it: tokens on the device, and no synchronization."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.config import Config, GPTConfig, SystemConfig
from llm_from_scratch.core.model import GPT, NextTokenLoss
from llm_from_scratch.errors import UserError
from llm_from_scratch.kernels import cross_entropy as loss
from llm_from_scratch.kernels import float8 as fp8
from llm_from_scratch.kernels.swap import swap
from llm_from_scratch.machine.device import Runtime, resolve
from llm_from_scratch.training import optimizer as optimizers
from llm_from_scratch.training import setup, trainer
from llm_from_scratch.training import wrap as parallel
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import Step, train, train_step

from ..stepping import needs_float8
from ..tiny import read_metrics, tiny_config


def test_a_run_with_its_tokens_on_the_device_is_the_run_without(here: Path, tiny_data: Path) -> None:
    for name, on_device in (("files", False), ("device", True)):
        train(tiny_config(tiny_data, out_dir=name, data_on_device=on_device, gradient_accumulation_steps=2))
    files, device = (load_checkpoint(find_checkpoint(name, "last")).model for name in ("files", "device"))
    assert all(torch.equal(files[name], device[name]) for name in files)
    assert len(read_metrics(Path("device"))) == len(read_metrics(Path("files")))


# --- nothing waits for the device ---


class Waits(TorchDispatchMode):
    """Fails at whatever would make the host wait for a GPU: a number or a shape that depends on a tensor's content."""

    NUMBERS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name, given = func._schema.name.removeprefix("aten::"), tree_leaves((args, kwargs))
        masks = [t for t in given if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
        if name in self.NUMBERS or (name.startswith(("index", "_index")) and masks):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waits", [lambda t: t.sum().item(), lambda t: bool(t.isfinite().all()), lambda t: t[t > 0], lambda t: t.nonzero()]
)
def test_waiting_for_the_device_is_detected(waits: Any) -> None:
    with Waits(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.ones(3))


def as_on_a_gpu(skip: Tensor, optimizer: Any) -> None:
    """step_unless() as it is on CUDA, where fused kernels look at the flag: those of a CPU do so too."""
    vars(optimizer).update(grad_scale=None, found_inf=skip.float())
    optimizer.step()
    del vars(optimizer)["grad_scale"], vars(optimizer)["found_inf"]


MODERN = {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "logit_softcap": 15.0}


class OnGPU(Tensor):
    """A tensor that says that it is not on the CPU: it is not compared with a number of the host."""

    device = torch.device("meta")


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.1, "chunked_loss": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"data_on_device": True, "skip_spikes": True, "optimizer_dtype": "bfloat16", "grad_clip": 0.0},
        pytest.param({"optimizer_type": "muon", "fp8": True, **MODERN}, marks=needs_float8),
        {"optimizer_type": "muon", "optimizer_dtype": "bfloat16", "max_ngram": 2, "ngram_rows": 500},
    ],
    ids=["chunked, checkpointing", "tokens on the device, bfloat16 moments", "muon, fp8", "muon in bfloat16, n-grams"],
)
def test_no_update_needs_a_number_from_the_device(
    settings: Any, tiny_data: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CPULogitPasses", loss.LogitPasses)
    monkeypatch.setattr(trainer, "step_unless", as_on_a_gpu)
    total_norm = torch.nn.utils.get_total_norm  # as on a GPU
    monkeypatch.setattr(optimizers, "total_norm", lambda grads: total_norm(grads).as_subclass(OnGPU))
    monkeypatch.setattr(setup, "refuse_unfit", lambda *_: None)
    monkeypatch.setattr(Runtime, "place", lambda runtime, model, keep: setattr(model, "compute_dtype", torch.bfloat16))
    monkeypatch.setattr(parallel, "cpu_replacements", lambda *_: ({}, []))
    plan = make_plan(tiny_config(tiny_data, **settings))
    run = Run(plan)
    run.state.recent_losses += [(step, 3.0) for step in range(-64, 0)]  # enough to find a spike
    for _ in range(3):
        with Waits() as waits:
            train_step(run, *run.next_batch())
        assert waits.calls > 100
    assert [found.is_finite for found in run.guard.collect(wait=True)] == [True] * 3
    run.close()


@pytest.mark.gpu
def test_no_update_waits_for_a_real_gpu(tiny_data: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = list[int]()

    def watched(run: Run, x: Tensor, y: Tensor) -> Step:
        torch.cuda.set_sync_debug_mode("error" if len(count) >= 3 else "default")  # the first make moments and buffers
        try:
            return train_step(run, x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            count.append(run.state.step)

    monkeypatch.setattr(trainer, "train_step", watched)
    for optimizer in ("adamw", "muon"):
        train(tiny_config(tiny_data, device="cuda", dtype="auto", optimizer_type=optimizer, out_dir=optimizer))
    assert len(count) == 16


# --- CUDA graphs ---


def settings(sequences: int = 2, accumulation: int = 1, n_embd: int = 16, **system: Any) -> Config:
    config = Config(model=GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=n_embd))
    config.system = SystemConfig(**system)
    config.data.batch_size, config.training.gradient_accumulation_steps = sequences, accumulation
    config.training.chunked_loss, config.training.activation_budget = False, None
    return config


def machine(device: str = "meta", **changes: Any) -> Runtime:
    """On a device that is not a CPU; its tensors have no content."""
    found = resolve(SystemConfig(device="cpu", dtype="float32", compile=True))
    return dataclasses.replace(found, device=torch.device(device), **changes)


@pytest.mark.parametrize(
    ("config", "runtime", "records"),
    [
        (settings(), machine("cuda"), True),
        (settings(), machine("cpu"), False),
        (settings(), machine("cuda", world_size=2), False),
        (settings(4), machine("cuda"), False),
        (settings(1, 2), machine("cuda"), True),
        (settings(2, 2), machine("cuda"), False),
        (settings(n_embd=32), machine("cuda"), False),
        (settings(2, 2, cuda_graphs=True), machine("cuda"), True),
        (settings(cuda_graphs=False), machine("cuda"), False),
    ],
)
def test_when_kernels_are_recorded(
    config: Config, runtime: Runtime, records: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "LAUNCH_BOUND", 10_000)
    assert parallel.records_kernels(GPT(config.model), config, runtime, 2) is records


def test_an_unrecordable_model_is_reported() -> None:
    with pytest.raises(UserError, match="--cuda_graphs=True needs one process that compiles .* the device is cpu"):
        resolve(SystemConfig(device="cpu", compile=True, cuda_graphs=True))
    config = settings(cuda_graphs=True)
    config.model.max_ngram = 2
    with pytest.raises(UserError, match="does not support max_ngram"):
        parallel.records_kernels(GPT(config.model), config, machine("cuda"), 2)


class Compiled(torch.nn.Module):
    """Stands for what torch.compile gives."""

    def __init__(self, model: GPT, events: list[str], mode: str | None):
        super().__init__()
        self.model, self.events, self.mode = model, events, mode

    def forward(self, x: Tensor, y: Tensor) -> Any:
        assert all(p.grad is None for p in self.model.parameters())  # which a replay would write over
        self.events.append("train" if torch.is_grad_enabled() and self.training else "eval")
        return self.model(x, y)


@pytest.mark.parametrize(
    ("broken", "events", "told"),
    [
        ((), ["compile reduce-overhead", *["mark", "train", "mark", "eval"] * 3], "CUDA graphs: the model's kernels"),
        (
            ("reduce-overhead",),
            ["compile reduce-overhead", "compile None", "train", "eval"],
            "CUDA graphs failed (no such mode); compiling without them",
        ),
        (
            ("reduce-overhead", None),
            ["compile reduce-overhead", "compile None"],
            "torch.compile failed (no such mode); training without it",
        ),
    ],
)
def test_recording_is_tried_and_given_up(
    broken: Any, events: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, lines = list[str](), list[str]()

    def compiling(model: GPT, mode: str | None = None, dynamic: bool | None = None) -> Compiled:
        seen.append(f"compile {mode}")
        if mode in broken:
            raise RuntimeError("no such\nmode")
        return Compiled(model, seen, mode)

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append("mark"))
    monkeypatch.setattr(parallel, "records_kernels", lambda *_: True)
    with torch.device("meta"):
        model = GPT(settings().model)
    models = parallel.wrap(model, settings(), machine(compile_may_fail=True), 2, lines.append)
    assert seen == events and any(line.startswith(told) for line in lines)
    assert models.is_recorded is (not broken) and models.is_compiled is (None not in broken)
    assert model.training and all(p.grad is None for p in model.parameters())
    if broken:
        with pytest.raises(UserError, match="CUDA graphs failed .*remove --cuda_graphs"):
            parallel.wrap(model, settings(cuda_graphs=True), machine(compile_may_fail=True), 2, lines.append)


@pytest.mark.slow
@pytest.mark.parametrize("modern", [False, pytest.param(True, marks=needs_float8)])
def test_the_whole_pass_is_one_graph(modern: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss in pieces and float8 included: where the compiler breaks off, kernels are not fused, and not recorded."""
    monkeypatch.setattr(loss, "CPULogitPasses", loss.LogitPasses)
    x, found = torch.randint(64, (4, 16)), []
    for compile_it in (False, True):
        torch.manual_seed(0)
        extra: dict[str, Any] = MODERN if modern else {}
        model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=32, **extra))
        assert swap(model, {NextTokenLoss: loss.ChunkedLoss}, print) == 1
        assert not modern or swap(model, fp8.float8_replacements(model)[0], print)
        model.compute_dtype = torch.bfloat16
        run: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if compile_it else model
        run(x, x)[1].backward()
        found.append([p.grad for p in model.parameters()])
    if torch.__version__ >= "2.10":
        torch.testing.assert_close(found[1], found[0])
    for compiled, eager in zip(*found[::-1], strict=True):  # older compilers round bfloat16 in other places
        assert (compiled - eager).norm() <= 0.05 * eager.norm()


class InOnePlace(torch.autograd.Function):
    """sum(w * mean of x), whose gradient for w always lies in the same memory: as where a graph is replayed."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.place = place
        return (w * x.float().mean()).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.place.copy_(grads[0] * x.float().mean())
        return ctx.place.detach(), None, None


@pytest.mark.parametrize("is_recorded", [True, False])
def test_gradients_add_up_though_a_graph_writes_them_to_one_place(is_recorded: bool, tiny_data: Path) -> None:
    run: Any = Run(make_plan(tiny_config(tiny_data, grad_clip=0.0, micro_batch=1, decay_lr=False, learning_rate=1.0)))
    raw, place = torch.nn.Linear(3, 1, bias=False), torch.empty(1, 3)
    torch.nn.init.zeros_(raw.weight)
    run.model, run.optimizer = raw, torch.optim.SGD(raw.parameters(), lr=1.0)
    run.models = types.SimpleNamespace(
        train=lambda x, y: (None, InOnePlace.apply(raw.weight, x, place)),
        is_recorded=is_recorded,
        gradient_exchange=lambda is_last: contextlib.nullcontext(),
    )
    x = torch.tensor(np.array([[1], [2], [6]]))
    train_step(run, x, x)
    right = torch.allclose(raw.weight, torch.full((1, 3), -3.0))  # the mean of 1, 2, 6
    assert right is is_recorded  # without care the stand-in shows the fault
    run.close()
