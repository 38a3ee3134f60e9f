"""Estimates the time, memory and finish time of a run, from a rehearsal of a few updates.

The rehearsal runs on the same data, with as many layers and sequences as fit in a few seconds. The cost of the blocks
grows with the layers, that of the rest does not; both grow with the sequences. It writes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import timeit
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import FinetuneConfig
from ..core.adapters import trained_model
from ..core.cache import Documents
from ..core.sizes import sizes
from ..errors import UserError
from ..machine import device as runtimes
from ..machine.device import Runtime
from ..machine.memory import free_memory, peak_memory, total_memory
from .evaluate import estimate_loss, even_size, windows_at_once
from .microbatch import retry_smaller
from .moments import share_of
from .plan import Plan
from .progress import SAVE_AWAITED, SAVE_BESIDE, Calendar, clock_time, in_words
from .run import Run
from .trainer import train_step
from .wrap import loss_is_chunked

BUDGET = 3.0  # seconds
LEAST, MOST, SETTLED = 2, 40, 0.5  # steps that are timed: at least, at most, and enough after this many seconds
KEPT = 0.5  # of gradients and activations: holes in the kept memory of a large model (at most; measured: 0.15 to 0.5)
HEAP = 1 << 25  # bytes: larger blocks return to the system when freed (glibc's M_MMAP_THRESHOLD_MAX)
FEWEST_TOKENS = 2048  # of a rehearsal with fewer sequences than the run; with fewer tokens, each takes longer


@dataclass(frozen=True)
class Forecast:
    """The estimated cost of a run."""

    step: float
    """Seconds of an update."""
    tokens_per_s: float
    seconds: dict[str, float]
    """Seconds of steps, evaluations (including the final one), checkpoints, start."""
    bytes: dict[str, int]
    """At the peak. activations: with temporary memory; copies: of weights and moments, from which a checkpoint is
    written; the program: the process without a model."""
    available: int | None
    """Bytes of the device."""
    calibration: float
    """Seconds that the measurement took."""
    measured: str
    busy: float = 1.0
    """Mean divided by median of the measured steps. More than 1 if other programs use the processor."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def memory(self) -> int:
        return sum(self.bytes.values())


class Split(NamedTuple):
    """An amount for the stack of blocks, and for the rest of the model."""

    stack: float
    rest: float

    @classmethod
    def of(cls, amounts: Iterable[tuple[bool, float]]) -> Split:
        """The sums of (whether it is the stack's, amount)."""
        known = list(amounts)
        return cls(sum(n for is_stack, n in known if is_stack), sum(n for is_stack, n in known if not is_stack))

    @property
    def whole(self) -> float:
        return self.stack + self.rest

    def deeper(self, factor: float) -> float:
        """The amount for a model with `factor` times the layers."""
        return self.stack * factor + self.rest


class _Scaler(torch.amp.GradScaler):
    """A run's gradient scaler. train_step calls unscale_() between the gradients and the update: a place to measure."""

    def __init__(self, scaler: torch.amp.GradScaler, device: torch.device, after_gradients: Callable[[], None]):
        super().__init__(device.type, enabled=scaler.is_enabled())
        self.after_gradients = after_gradients

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.after_gradients()
        super().unscale_(optimizer)


class Rehearsal:
    """A run on a plan of its own, which prints and writes nothing. Measures how long its blocks and the rest take."""

    def __init__(self, plan: Plan):
        self.run = run = Run(plan)
        self.device, self.plan = run.runtime.device, run.plan
        self.spans: dict[str, float] = {}
        self.only_stack = self.inside = False
        run.scaler = _Scaler(run.scaler, self.device, self._after_gradients)
        blocks = list(run.model.transformer.h)
        self.of_stack = {p for block in blocks for p in block.parameters()}
        if not run.models.is_compiled:
            blocks[0].register_forward_pre_hook(self._enter)
            blocks[-1].register_forward_hook(self._leave)
        self.close = run.close

    def _now(self) -> float:
        runtimes.wait(self.device)
        return time.perf_counter()

    def _mark(self, name: str) -> None:
        self.spans[name] = self._now()

    def _enter(self, module: Any, args: tuple) -> None:
        self.inside = True
        self._mark("forward begins")
        if args[0].requires_grad:
            args[0].register_hook(lambda grad: self._mark("backward ends"))

    def _leave(self, module: Any, args: tuple, output: Any) -> None:
        self.inside = False
        self._mark("forward ends")
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(lambda grad: self._mark("backward begins"))

    def _after_gradients(self) -> None:
        for p in set(self.run.model.parameters()) - self.of_stack if self.only_stack else ():
            p.grad = None
        self._mark("gradients end")

    def timed(self, sequences: int | None = None) -> dict[str, float]:
        """Seconds of one update and of its parts. sequences: of the batch; None: all."""
        self.spans.clear()
        begin = self._now()
        train_step(self.run, *(part[:sequences] for part in self.run.next_batch()))
        self.run.report_steps(wait=True)
        end, gradients = self._now(), self.spans["gradients end"] - begin
        if "backward begins" in self.spans:  # frozen embeddings need no gradient, so nothing marks the end
            self.spans.setdefault("backward ends", self.spans["gradients end"])
        stack = self._span("forward") + self._span("backward")
        return {"gradients": gradients, "stack": stack, "update": end - begin - gradients}

    def _span(self, name: str) -> float:
        return self.spans.get(f"{name} ends", 0.0) - self.spans.get(f"{name} begins", 0.0)

    def update_of_stack(self) -> float:
        """Seconds of a step after the gradients, if only the blocks have any."""
        self.only_stack = True
        seconds = self.timed(sequences=1)["update"]
        self.only_stack = False
        return seconds

    def one_sequence(self) -> None:
        """Forward and backward over one sequence, without an update: loads what torch loads at the first use."""
        x, y, *packed = self.run.loader.get(0)
        with self.run.runtime.autocast():
            _, loss = self.run.models.train(
                x[:1], y[:1], *Documents.of([part[:1] for part in packed[::2]], self.run.model)
            )
        loss.backward()
        self.run.model.zero_grad(set_to_none=True)

    def saved(self) -> Split:
        """Bytes that a forward pass stores for the backward pass."""
        own = {p.untyped_storage().data_ptr() for p in self.run.model.parameters()}
        found: dict[int, tuple[bool, int]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found.setdefault(storage.data_ptr(), (self.inside, storage.nbytes()))
            return tensor

        x, y, *packed = self.run.loader.get(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), self.run.runtime.autocast():
            self.run.model(x, y, *Documents.of(packed[::2], self.run.model))
        return Split.of(found.values())

    def trained(self) -> Split:
        """Bytes of the weights that train."""
        return Split.of((p in self.of_stack, p.nbytes) for p in self.run.model.parameters() if p.requires_grad)

    def held(self) -> tuple[Split, Split]:
        """Bytes of the weights, and of the optimizer's moments."""
        state = self.run.optimizer.state.items()
        moments = [(p in self.of_stack, t.nbytes) for p, kept in state for t in kept.values() if isinstance(t, Tensor)]
        weights = Split.of((p in self.of_stack, p.nbytes) for p in self.run.model.parameters())
        return weights, Split.of(moments)

    def evaluated(self, windows: int) -> Split:
        """Seconds to evaluate `windows` windows at once."""
        run, begin, block_size = self.run, self._now(), self.plan.config.model.block_size
        parts = self.plan.val_data.weighted
        for _, _, part in parts:
            estimate_loss(run.models.compiled, part, block_size, -(-windows // len(parts)), run.runtime, windows)
        return Split(self._span("forward"), self._now() - begin - self._span("forward"))


def forecast(plan: Plan, budget: float = BUDGET) -> Forecast:
    """Rehearses the run for about `budget` seconds; longer if one update takes longer, or compiles. Raises UserError if
    not even one layer and one sequence fit in memory."""
    begin, ran = time.perf_counter(), time.process_time()
    runtimes.start(alone(plan.runtime), plan.config.system)
    device = plan.runtime.device
    layers, rows = rehearsal_size(plan, budget)

    def rehearse() -> Forecast:
        base, free = peak_memory(device), free_memory(torch.device("cpu"))
        with contextlib.closing(Rehearsal(reduced_plan(plan, layers, rows))) as rehearsal:
            return extrapolate(plan, rehearsal, base, free, budget, begin, ran)

    def shrink(reason: str) -> None:
        nonlocal layers, rows
        if layers == rows == 1:
            raise UserError("out of memory with one layer and one sequence: the model does not fit")
        layers, rows = (layers // 2, rows) if layers > 1 else (1, rows // 2)

    return retry_smaller(rehearse, shrink)


def rehearsal_size(plan: Plan, budget: float) -> tuple[int, int]:
    """(layers, sequences) of a rehearsal with steps of about a quarter of the budget each."""
    model, rows = plan.config.model, plan.micro_batch
    settings, plain = plan.config.finetune, FinetuneConfig()
    by_name = settings.freeze or settings.lora_targets != plain.lora_targets  # perhaps of single layers
    if plan.runtime.device.type == "cuda" or plan.runtime.compile or by_name:
        return model.n_layer, rows  # a GPU is fast; and the run reuses what was compiled
    rate = products_per_second() / 2  # a step reaches about half of it

    def is_short(layers: int) -> bool:
        flops = sizes(dataclasses.replace(model, n_layer=layers), rows).flops_per_token
        return flops * rows * model.block_size / rate <= budget / 4

    while rows > 1 and rows * model.block_size > FEWEST_TOKENS and not is_short(1):
        rows = -(-rows // 2)
    return next((n for n in range(model.n_layer, 1, -1) if is_short(n)), 1), rows


def products_per_second(size: int = 512, device: torch.device | None = None) -> float:
    """FLOP/s of matrix products, measured on five. On a GPU they are larger and in bfloat16."""
    device = device or torch.device("cpu")
    on_gpu = device.type == "cuda"
    size = 8 * size if on_gpu else size
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)

    def product() -> None:
        a @ a
        runtimes.wait(device)

    product()
    took = timeit.repeat(product, number=1, repeat=5)
    return 2 * size**3 / statistics.median(took)


def alone(runtime: Runtime) -> Runtime:
    """The runtime of a single process, which holds the whole model."""
    return dataclasses.replace(runtime, world_size=1, rank=0, parallel="ddp", shards=1)


def reduced_plan(plan: Plan, layers: int, rows: int) -> Plan:
    """A plan for one process, `layers` layers, and one micro-batch of `rows` sequences per step."""
    model, training = plan.config.model, dataclasses.replace(plan.config.training)
    training.chunked_loss = loss_is_chunked(plan.config, plan.micro_batch)  # as in the whole run
    if isinstance(training.activation_budget, float):
        training.activation_budget *= layers / model.n_layer * rows / plan.micro_batch
    config = dataclasses.replace(plan.config, model=dataclasses.replace(model, n_layer=layers), training=training)
    return dataclasses.replace(
        plan, config=config, runtime=alone(plan.runtime), global_batch=rows, micro_batch=rows, start_step=0,
        weights=None, resumed=None, scans=[], notes=[],
    )  # fmt: skip


def seconds_of(timed: dict[str, float]) -> float:
    """Seconds of an update, from Rehearsal.timed()."""
    return timed["gradients"] + timed["update"]


def extrapolate(
    plan: Plan, rehearsal: Rehearsal, base: int, free: int | None, budget: float, begin: float, ran: float
) -> Forecast:
    """Extrapolates from some layers and sequences to all."""
    built, small, model = time.perf_counter() - begin, rehearsal.plan, plan.config.model
    deep, wide = model.n_layer / small.config.model.n_layer, plan.micro_batch / small.micro_batch
    at_first = 0
    if wide > 1:
        rehearsal.one_sequence()
        at_first = peak_memory(plan.runtime.device)
    rehearsal.timed()  # makes the moments, and warms up
    start, spent, passes = time.perf_counter(), 0.0, list[dict[str, float]]()
    while len(passes) < LEAST or (spent < budget / 2 and (len(passes) < MOST or spent < SETTLED)):
        passes.append(rehearsal.timed())
        spent = time.perf_counter() - start
    took = {name: statistics.median(one[name] for one in passes) for name in passes[0]}
    of_stack = statistics.median(rehearsal.update_of_stack() for _ in range(LEAST)) if deep > 1 else 0.0
    update = took["update"] + (deep - 1) * min(of_stack, took["update"])
    step = plan.micro_steps * wide * (took["gradients"] + (deep - 1) * took["stack"]) + update
    trained = peak_memory(plan.runtime.device)

    windows = plan.config.training.eval_iters * plan.config.data.batch_size
    whole_batch = even_size(windows, windows_at_once(rehearsal.run.model, model.block_size))
    at_once = rehearsal.run.eval_batch or whole_batch
    tried = min(at_once, max(1, int(budget / 8 / took["gradients"] * 3 * small.micro_batch)))
    rehearsal.evaluated(tried)
    per_window = rehearsal.evaluated(tried).deeper(deep) / tried
    evaluation = 2 * -(-windows // at_once) * at_once * per_window
    looked = peak_memory(plan.runtime.device)

    (weights, moments), learned = rehearsal.held(), rehearsal.trained()
    saved = rehearsal.saved()
    W, G, M = weights.deeper(deep), learned.deeper(deep), moments.deeper(deep)
    written = M + (W if plan.base is None else G)  # in a checkpoint
    before = base + weights.whole + moments.whole
    # temporary memory, and the part that does not grow with the sequences
    moment = max(0.0, trained - before - max(saved.whole, learned.whole))
    fixed = max(0.0, at_first - base - weights.whole - max(saved.whole / small.micro_batch, learned.whole))
    fixed = min(fixed, moment)
    moment = wide * (moment - fixed) + fixed
    activations = wide * saved.deeper(deep) + moment
    if plan.micro_steps == 1:  # gradients are made while activations are freed
        activations = max(activations - G, moment)
    if looked > trained:  # an evaluation needs more than a step
        activations = max(activations, (looked - before) * at_once / tried - G)
    saves = Calendar.of(plan).saves(plan.start_step)
    copies = 0.0
    if plan.runtime.device.type == "cpu":  # otherwise they are in another memory
        copies = written
        if free is not None and 2 * copies > free - W - M - max(G, activations):
            copies = 0.0  # if memory is short, a save makes no copy
        if not saves:  # the last one is made after the step's memory was freed, if the allocator returned it
            parameters = rehearsal.run.model.parameters()
            large: float = sum(p.nbytes for p in parameters if p.nbytes > HEAP and p.requires_grad)
            logits = 4 * plan.micro_batch * model.block_size * (model.vocab_size or 0)
            if logits > HEAP and not small.config.training.chunked_loss:
                large += wide * saved.rest + moment - fixed
            copies = max(0.0, copies - large)
    calendar = dataclasses.replace(Calendar.of(plan), save_bytes=int(written))
    steps, evaluations = max(0, plan.last_step - plan.start_step), calendar.evaluations(plan.start_step)
    final = calendar.final_seconds(model.block_size / per_window, steps * step)
    seconds = {
        "steps": steps * step, "evaluations": evaluations * evaluation + final,
        "checkpoints": (saves * SAVE_BESIDE + SAVE_AWAITED) * written, "start": ran + built * W / weights.whole,
    }  # fmt: skip
    shards, whole = plan.runtime.shards, {"weights": W, "gradients": G, "optimizer": M}
    memory = {
        **share_of(whole, trained_model(plan.config), plan.config.optimizer, shards), "activations": activations,
        "copies for a checkpoint": copies / shards,
        "kept for the next step": KEPT * (G + activations) if plan.keeps_more else 0,
        "the program": base,
    }  # fmt: skip
    measured = f"{len(passes)} steps with {small.config.model.n_layer} of {model.n_layer} layers and "
    measured += f"{small.micro_batch} of {plan.micro_batch} sequences"
    return Forecast(
        step, plan.tokens_per_step / step, seconds, {name: int(size) for name, size in memory.items()},
        total_memory(plan.runtime.device), time.perf_counter() - begin, measured,
        statistics.fmean(map(seconds_of, passes)) / statistics.median(map(seconds_of, passes)),
    )  # fmt: skip


def lines(plan: Plan, found: Forecast) -> list[str]:
    """The lines that --dry_run prints."""
    gib = 1 << 30
    parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in found.bytes.items() if size)
    times = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in found.seconds.items())
    there = f" of {found.available / gib:.1f} GiB" if found.available else ""
    text = [
        f"memory: about {found.memory / gib:.2f} GiB{there} at the peak ({parts}); compute: "
        f"{plan.sizes.flops_per_token / 1e6:,.1f} MFLOP per token",
        f"step: about {found.step * 1e3:,.1f} ms, {found.tokens_per_s:,.0f} tokens/s (from {found.measured}, in "
        f"{found.calibration:.1f} s)",
        f"time: about {in_words(found.total)}, until {clock_time(found.total)} if started now ({times})",
    ]
    if found.available is not None and found.memory > found.available:
        text.append(
            f"warning: the run does not fit into the {found.available / gib:.1f} GiB of {plan.runtime.device}. To save "
            "memory, lower --batch_size and raise --gradient_accumulation_steps, shorten --block_size, or set "
            "--gradient_checkpointing=True"
        )
    return text
