"""Estimates for many GPUs: what fits, what is sent, how long a step takes. llm-plan --gpus prints them.

Sizes are counted on GPT(config) on the meta device, with the slots that the optimizer declares. Times follow from the
assumptions in the constants below; nothing is measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..config import Config
from ..core.adapters import trained_model
from ..core.dataset import read_manifest, resolve_dataset
from ..core.sizes import Sizes, sizes
from ..core.tokenizer import tokenizer_of
from ..errors import UserError
from ..machine.device import DTYPES, PEAKS
from ..mixture import read_mixture
from ..settings import did_you_mean
from .moments import optimizer_bytes, share_of
from .muon import CHUNK, CHUNKS
from .optimizer import Optimizer, make_optimizer, sparse_tables
from .owners import matrices_of, rounds
from .plan import count_of
from .setup import GPT2_IDS, GPT2_PADDED
from .wrap import loss_is_chunked

MFU = 0.4  # of the peak, while a GPU computes
LINKS = 0.8  # of the bandwidth of a link
BACKWARD = 2 / 3  # of a pass's arithmetic
LATENCY = 20e-6  # seconds of a message, for each doubling of the processes
BUCKET = 25 << 20  # bytes of gradients that DDP sends at once
MOST = 1 << 16  # GPUs of a node, and nodes
USABLE = 0.9  # of the memory; the rest is torch's, NCCL's and lost in fragments
GB = 1e9
LARGEST = 1024  # GPUs of the table, unless the cluster has more
# For the names in PEAKS: memory in GB; GB/s that a GPU sends inside its node, and to other nodes
GPUS = {
    "H200": (141, 450, 50), "H100 PCIe": (80, 50, 25), "H100": (80, 450, 50), "A100": (80, 300, 25),
    "L40S": (48, 25, 6), "A10G": (24, 12, 3), "V100": (32, 150, 3), "T4": (16, 12, 1.5), "RTX 4090": (24, 25, 1.5),
    "RTX 3090": (24, 25, 1.5),
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: str
    gpus: int
    """GPUs of a node."""
    nodes: int

    @property
    def size(self) -> int:
        return self.gpus * self.nodes

    def of(self, size: int) -> Cluster:
        """A cluster of the same nodes with `size` GPUs."""
        gpus = min(size, self.gpus)
        return dataclasses.replace(self, gpus=gpus, nodes=-(-size // gpus))


@dataclass(frozen=True)
class Exchange:
    """Traffic of a process in an update, in a ring over `near` GPUs of each of `far` nodes."""

    name: str
    sent: float
    """Bytes."""
    messages: int
    near: int
    far: int
    overlapped: bool = True
    """Whether the processes compute meanwhile."""

    def seconds(self, gpu: str) -> float:
        """Each GPU sends its part to the other nodes over a link of its own."""
        processes, (_, inside, outside) = self.near * self.far, GPUS[gpu]
        if processes == 1:
            return 0.0
        whole = self.sent * processes / (processes - 1)
        slowest = whole * (self.near - 1) / self.near / inside + whole / self.near * (self.far - 1) / self.far / outside
        return slowest / (LINKS * GB) + self.messages * LATENCY * math.log2(processes)


@dataclass(frozen=True)
class Estimate:
    """A run with one way to share the model."""

    mode: str
    cluster: Cluster
    sequences: int
    """Sequences per GPU and update."""
    micro_batch: int
    memory: dict[str, float]
    """Bytes of a GPU."""
    exchanges: list[Exchange]
    seconds: float
    """Seconds of an update."""

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= USABLE * GPUS[self.cluster.gpu][0] * GB

    @property
    def sent(self) -> float:
        return sum(exchange.sent for exchange in self.exchanges)


def cluster_of(asked: dict[str, str]) -> Cluster:
    """From the options gpu, gpus and nodes. Raises UserError."""
    counts = {"gpus": 1, "nodes": 1}
    for name in counts:
        text = asked.get(name, "1")
        if not text.isdecimal() or not 0 < int(text) <= MOST:
            raise UserError(f"--{name}={text} is not a whole number from 1 to {MOST:,}")
        counts[name] = int(text)
    wanted, known = asked.get("gpu", "h100").lower(), {name.lower().replace(" ", "-"): name for name, _ in PEAKS}
    if wanted not in known:
        names = ", ".join(known)
        raise UserError(f"unknown --gpu={wanted}: {did_you_mean(wanted, known, 'not in the table')} (known: {names})")
    return Cluster(known[wanted], **counts)


def with_vocabulary(config: Config) -> list[str]:
    """Sets vocab_size to that of the data if it is open. Returns a note if GPT-2's is assumed."""
    if config.model.vocab_size is not None:
        return []
    parts = read_mixture(config.data.dataset)  # which have the same tokenizer
    try:
        folder = resolve_dataset(parts[0].name if parts else config.data.dataset)
        tokenizer, manifest = tokenizer_of(folder), read_manifest(folder)
        size = tokenizer.vocab_size if tokenizer else int(manifest["vocab_size"]) if manifest else GPT2_IDS
    except UserError:
        config.model.vocab_size = GPT2_PADDED
        return [f"dataset {config.data.dataset} is not prepared here: assuming GPT-2's vocabulary"]
    config.model.vocab_size = GPT2_PADDED if size == GPT2_IDS else size
    return []


def precision(config: Config, gpu: str) -> torch.dtype:
    """The dtype of a run on this GPU. Raises UserError for one that it does not have."""
    peaks = dict(PEAKS)[gpu]
    asked = config.system.dtype
    dtype = DTYPES[asked] if asked != "auto" else next(d for d in (torch.bfloat16, torch.float16) if d in peaks)
    if dtype not in peaks:
        raise UserError(f"--dtype={asked}: the {gpu} does not support it; remove --dtype")
    return dtype


def exchanges(
    model: Any, optimizer: Optimizer, mode: str, cluster: Cluster, passes: int, itemsize: int, muon_itemsize: int,
    reshard: bool = True, tokens: int = 0, backend: str = "nccl",
) -> Iterator[Exchange]:  # fmt: skip
    """The exchanges of every process in an update. model: on the meta device; passes: micro-batches; itemsize: bytes of
    a gathered weight; muon_itemsize: of an element of Muon's iteration; tokens: of a process and update; backend: nccl
    on GPUs, gloo on CPUs, which sums everything everywhere where nccl scatters the sums."""
    tables = {p for module in sparse_tables(model) for p in module.parameters(recurse=False)}
    near, far = cluster.gpus, cluster.nodes
    processes = near * far
    if processes == 1:
        return
    for p in tables:  # at most: every n-gram of the batch has a row of its own
        rows = min(tokens * max(1, model.config.max_ngram - 1), p.size(0))
        yield Exchange("n-gram rows", (processes - 1) * rows * (4 * p.size(1) + 12), 3, near, far, False)
    dense = [p for p in model.parameters() if p not in tables and p.dim()]  # a number is 4 bytes
    if mode == "ddp":
        size = 4 * sum(p.numel() for p in dense if p.requires_grad)
        ring = (processes - 1) / processes
        yield Exchange("gradients", 2 * ring * size, max(1, size // BUCKET), near, far)
    else:
        group = (near, 1) if mode == "hsdp" else (near, far)
        shards, replicas = math.prod(group), processes // math.prod(group)
        blocks = {p for block in model.transformer.h for p in block.parameters()}
        of_blocks, rest = (
            sum(padded_rows(p, shards) for p in dense if (p in blocks) == is_block) for is_block in (True, False)
        )
        trained = sum(padded_rows(p, shards) for p in dense if p.requires_grad)
        units = len(model.transformer.h) + 1
        gathered = passes * (of_blocks * (2 if reshard else 1) + rest)
        yield Exchange("weights", (shards - 1) * gathered * itemsize, passes * (2 if reshard else 1) * units, *group)
        times = passes if reshard else 1  # gradients that are not exchanged are whole
        scattered = (shards - 1) * trained * (4 if backend == "nccl" else 8)
        yield Exchange("gradients", times * scattered, times * units, *group)
        if replicas > 1:
            ring = 2 * (replicas - 1) / replicas
            yield Exchange("gradients of replicas", times * ring * trained * 4, times * units, 1, far)
    yield from _muon(optimizer, mode, cluster, muon_itemsize, CHUNKS["cuda"] if backend == "nccl" else CHUNK)


def padded_rows(p: Any, shards: int) -> int:
    """Elements of a process's part of a sharded parameter."""
    return -(-p.size(0) // shards) * (p.numel() // p.size(0))


def _muon(optimizer: Optimizer, mode: str, cluster: Cluster, itemsize: int, limit: int) -> Iterator[Exchange]:
    """Under DDP, every process sends its results to all; else rows to the owners of their matrices, and back."""
    group = (cluster.gpus, 1) if mode == "hsdp" else (cluster.gpus, cluster.nodes)
    processes = math.prod(group)
    for parameters in optimizer.param_groups:
        if "rows" not in parameters or processes == 1:
            continue
        plan = list(rounds(list(matrices_of(parameters)), processes, limit // processes))
        sizes = [[sum(math.prod(m.shape) for m in batch) for batch in batches] for batches in plan]
        sent: float = sum(max(of_round) for of_round in sizes) * (processes - 1)
        if mode != "ddp":
            sent = 2 * sum(map(sum, sizes)) * (processes - 1) / processes**2
        yield Exchange("Muon", sent * itemsize, len(plan) * (1 if mode == "ddp" else 2), *group, False)


def muon_flops(optimizer: Optimizer, processes: int) -> float:
    """FLOPs of the busiest process in an update: four polynomials, each of three products."""
    work = [0.0] * processes
    for parameters in optimizer.param_groups:
        if "rows" in parameters:
            for batches in rounds(list(matrices_of(parameters)), processes, CHUNKS["cuda"] // processes):
                for rank, batch in enumerate(batches):
                    work[rank] += sum(4 * (4 * r * r * c + 2 * r**3) for r, c in (m.shape for m in batch))
    return max(work)


def estimate(config: Config, cluster: Cluster, mode: str) -> Estimate:
    """A step of the run on this cluster. The sequences are rounded up to a multiple of the number of GPUs."""
    dtype = precision(config, cluster.gpu)
    model = trained_model(config)
    optimizer = make_optimizer(model, config.optimizer, torch.device("cuda"))
    global_batch = config.data.batch_size * config.training.gradient_accumulation_steps
    sequences = -(-global_batch // cluster.size)
    asked = config.data.micro_batch
    most = sequences if asked == "auto" else math.gcd(sequences, asked or config.data.batch_size)
    for micro_batch in (n for n in range(most, 0, -1) if sequences % n == 0):
        found = _estimate(config, cluster, mode, model, optimizer, dtype, sequences, micro_batch)
        if found.fits or asked != "auto":
            break
    return found


def _estimate(
    config: Config, cluster: Cluster, mode: str, model: Any, optimizer: Optimizer, dtype: torch.dtype, sequences: int,
    micro_batch: int,
) -> Estimate:  # fmt: skip
    counted = sizes(
        config.model, micro_batch, dtype.itemsize, config.training.gradient_checkpointing,
        optimizer_bytes(model, config.optimizer), loss_is_chunked(config, micro_batch), model,
    )  # fmt: skip
    passes, tokens = sequences // micro_batch, sequences * config.model.block_size
    reshard = config.system.reshard_after_forward
    gathered = 2 if dtype == torch.bfloat16 else 4  # autocast rounds to float16 after weights are gathered
    shared = list(exchanges(model, optimizer, mode, cluster, passes, gathered, 2, reshard, tokens))
    peak = dict(PEAKS)[cluster.gpu][dtype]
    shards = {"ddp": 1, "hsdp": cluster.gpus}.get(mode, cluster.size)
    arithmetic = counted.flops_per_token * tokens / (MFU * peak)
    # weights arrive during the arithmetic; gradients are sent during the backward passes, by DDP during the last
    hidden = {"weights": arithmetic, "gradients": BACKWARD * arithmetic / (passes if mode == "ddp" else 1)}
    exposed = 0.0
    for exchange in shared:
        room = hidden.get(exchange.name.split()[0], 0.0) if exchange.overlapped else 0.0
        seconds = exchange.seconds(cluster.gpu)
        exposed += max(seconds / exchange.messages, seconds - room)  # the last message waits for the last gradient
    muon = muon_flops(optimizer, cluster.size if mode == "ddp" else shards) / (MFU * peak)
    return Estimate(
        mode, cluster, sequences, micro_batch,
        memory(config, model, counted, shards, cluster.size > 1 and passes > 1, gathered), shared,
        arithmetic + muon + exposed,
    )  # fmt: skip


def memory(
    config: Config, model: Any, counted: Sizes, shards: int, accumulates: bool, itemsize: int
) -> dict[str, float]:  # fmt: skip
    """Bytes of a GPU. buffers: with DDP and several micro-batches, what is exchanged is a copy of the gradients; of a
    sharded model, the whole weights and gradients of two blocks and of what is not in a block and not a table."""
    if shards == 1:
        buffers: float = counted.gradients if accumulates else 0
    else:
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.transformer.h]
        tables = sum(p.numel() for module in sparse_tables(model) for p in module.parameters(recurse=False))
        buffers = (2 * max(blocks, default=0) + counted.params - sum(blocks) - tables) * (itemsize + 4)
    share = share_of(counted.states, model, config.optimizer, shards)
    return {
        "parameters": share["weights"], "gradients": share["gradients"], "optimizer": share["optimizer"],
        "activations": counted.activations, "buffers": buffers,
    }  # fmt: skip


def _allowed(cluster: Cluster) -> list[str]:
    """The ways to share the model that the cluster allows."""
    if cluster.size == 1:
        return ["ddp"]
    return ["ddp", "fsdp", "hsdp"] if cluster.nodes > 1 and cluster.gpus > 1 else ["ddp", "fsdp"]


def modes(config: Config, cluster: Cluster) -> list[str]:
    """The ways to share the model: that of --parallel, or all that are allowed."""
    found = _allowed(cluster)
    return [config.system.parallel] if config.system.parallel in found else found


def table_sizes(cluster: Cluster) -> list[int]:
    """The numbers of GPUs in the table, doubling: within a node, and of whole nodes."""
    doubled = [1 << n for n in range(LARGEST.bit_length())]
    found = {*(n for n in doubled if n < cluster.gpus), *(n * cluster.gpus for n in doubled), cluster.size}
    return sorted(n for n in found if n <= max(LARGEST, cluster.size))


def lines(config: Config, cluster: Cluster) -> list[str]:
    """The output of llm-plan. Sets the vocabulary of the config."""
    asked, allowed = config.system.parallel, _allowed(cluster)
    if asked not in ("auto", *allowed):
        raise UserError(
            f"--parallel={asked} cannot train on {cluster.nodes} x {cluster.gpus} {cluster.gpu}: choose "
            f"{' or '.join(allowed)}"
        )
    if config.system.shard_group is not None:
        raise UserError("llm-plan --gpus uses each machine as a group of hsdp: remove --shard_group")
    text, dtype = with_vocabulary(config), precision(config, cluster.gpu)
    amount, inside, outside = GPUS[cluster.gpu]
    peak, name = dict(PEAKS)[cluster.gpu][dtype] / 1e12, str(dtype).removeprefix("torch.")
    counted, model = sizes(config.model, 1, model=trained_model(config)), config.model
    text += [
        f"model: {count_of(counted)}, vocabulary {model.vocab_size:,}, context {model.block_size:,}, optimizer "
        f"{config.optimizer.optimizer_type}",
        f"cluster: {cluster.nodes} x {cluster.gpus} {cluster.gpu}; each has {amount} GB and {peak:,.0f} TFLOP/s in "
        f"{name}, and sends {inside} GB/s inside its machine, {outside} GB/s to other machines",
        f"assumed: {MFU:.0%} of the peak FLOP/s, {LINKS:.0%} of the link speeds, {1e6 * LATENCY:.0f} us per message "
        f"for each doubling of the GPUs, {USABLE:.0%} of the memory usable",
        "",
        "GB per GPU  parameters  gradients  optimizer  activations  buffers   total           sent per step      step",
    ]
    for one in (estimate(config, cluster, mode) for mode in modes(config, cluster)):
        columns = zip(one.memory.values(), (12, 11, 11, 13, 9), strict=True)
        total, fits = sum(one.memory.values()) / GB, "" if one.fits else "  too big"
        text.append(
            f"{one.mode:<10}{''.join(f'{size / GB:>{width}.2f}' for size, width in columns)}{total:>8.2f}{fits:<9}"
            f"{one.sent / GB:>13,.2f} GB{1e3 * one.seconds:>7,.0f} ms"
        )
    text += [
        "",
        "  GPUs  parallel  global batch  micro-batch  sent per GPU        step      tokens/s     hours  scaling",
    ]
    single, steps = estimate(config, cluster.of(1), "ddp"), config.training.max_iters
    rate, tokens, of = single.sequences / single.seconds, 10**9, ""
    if config.training.epochs is None:
        tokens = single.sequences * model.block_size * steps
        of = f" ({steps:,} steps of {single.sequences:,} sequences: --max_iters)"
    for size in table_sizes(cluster):
        found = [estimate(config, cluster.of(size), mode) for mode in modes(config, cluster.of(size))]
        best = min(found, key=lambda one: (not one.fits, one.seconds))
        batch, way = best.sequences * size, best.mode if size > 1 else "-"
        speed = batch * model.block_size / best.seconds
        text.append(
            f"{size:>6,}  {way:<8}{batch:>14,}{best.micro_batch:>13,}{best.sent / GB:>11,.2f} GB"
            f"{1e3 * best.seconds:>9,.0f} ms{speed:>14,.0f}{tokens / speed / 3600:>10,.1f}"
            f"{batch / best.seconds / rate / size:>9.0%}{'' if best.fits else '  too big'}"
        )
    return [*text, "", f"hours: for {tokens:,} tokens{of}; scaling: tokens/s per GPU, relative to one GPU alone"]
