"""Everything applied around the model, in this order: adapters, kernels, recomputation, compilation, data parallelism
(DDP, or shards by FSDP2)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..config import Config
from ..core.adapters import adapter_of, freeze, unfreeze
from ..core.cache import Documents
from ..core.model import GPT, Attention, Head, Linear, NextTokenLoss
from ..errors import UserError, one_line
from ..kernels.compiled import find_kernel, is_built, lacking, wanted_kernel
from ..kernels.cpu import CPUTiedEmbedding, cpu_replacements, make_dense
from ..kernels.cross_entropy import ChunkedLoss
from ..kernels.flex import document_attention
from ..kernels.float8 import Float8Linear, float8_replacements
from ..kernels.layers import LONGEST, CompiledLoss, layer_replacements, layers_in_c
from ..kernels.lora import attach, with_adapters
from ..kernels.products import NAMES, CPUHead, CPULinear, fastest_libraries, set_libraries
from ..kernels.recompute import recompute
from ..kernels.swap import kept_buffers, swap, unswap, unswapped
from ..kernels.tape import RecordedGPT, report_to, why_not
from ..machine.device import Runtime, forked_random, is_out_of_memory
from ..machine.memory import ReusedMemory
from ..machine.processes import any_rank, device_mesh, shield_children
from .adagrad import keep_occurrences
from .optimizer import sparse_tables
from .preferences import use_preferences
from .sharding import averaged_numbers, placed_as, replace_parameters, rows_of

CPU_FLOPS = {torch.float32: 40e9, torch.bfloat16: 70e9, torch.float16: 10e9}  # FLOP/s of a training thread, about
REPAYS_COMPILING = 10  # minutes of a run (measured on one machine)
REPAYS_LIBRARY = 1  # minutes of a run, for the layers in C: they compile in seconds
NARROW = 256
FEW_THREADS = 4  # of a step in one call (measured with 1 and 2)
MANY_IDS, MANY_LOGITS = 2048, 1 << 22  # with fewer, the plain loss is as fast (measured on a CPU)
LAUNCH_BOUND = 50_000_000  # parameters up to which a GPU probably waits for kernel launches; not measured


@dataclass
class Wrapped:
    """One model in the forms that the training loop needs; all share their parameters."""

    compiled: nn.Module
    """For evaluation; compiled if the run compiles."""
    train: nn.Module
    """For training; averages gradients over the processes. If sharded, the same module as `compiled`."""
    is_compiled: bool
    is_recorded: bool = False
    """Whether a pass replays a CUDA graph. Its results, gradients included, are in memory that the next pass reuses."""
    adds_shards: bool = True
    """If sharded: whether gradients are exchanged after every micro-batch, so that none is kept whole."""

    memory: ReusedMemory = field(default_factory=ReusedMemory)

    @contextlib.contextmanager
    def gradient_exchange(self, is_last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch: processes exchange gradients in the last one only,
        unless that would need memory."""
        set_exchange = getattr(self.train, "set_requires_gradient_sync", None)  # FSDP2's
        if set_exchange is not None:
            set_exchange(is_last or self.adds_shards)
        with contextlib.ExitStack() as around:
            around.enter_context(self.memory)
            if set_exchange is not None and is_last:
                around.enter_context(averaged_numbers(self.train))
            elif isinstance(self.train, nn.parallel.DistributedDataParallel) and not is_last:
                around.enter_context(self.train.no_sync())
            yield


def wrap(model: GPT, config: Config, runtime: Runtime, micro_batch: int, say: Callable[[str], None]) -> Wrapped:
    """Attaches adapters, swaps kernels in, then applies recomputation, compilation and data parallelism. The optimizer
    is built afterwards.

    Raises UserError if compile=True is set and compilation fails; with auto, training continues in eager mode.
    """
    if config.finetune.lora_rank is not None and not adapter_of(model):  # else from an attempt that ran out of memory
        attach(model, config.finetune, config.system.seed)
    use_preferences(model, config.finetune)
    averages = runtime.world_size > 1 and not runtime.is_sharded
    unused = unused_parameters(model, runtime.device) if averages else []
    exchange(model, config, runtime, micro_batch, say)
    compiled, is_recorded = None, False
    if runtime.compile:
        compiled, is_recorded = _compile(model, config, runtime, micro_batch, say)
        if compiled is None and not runtime.is_sharded:  # it failed: continue as if it had not been tried
            runtime = dataclasses.replace(runtime, compile=False)
            exchange(model, config, runtime, micro_batch, say)
    elif runtime.is_sharded:
        shard(model, config, runtime)
    train = model if compiled is None else compiled
    if averages:
        names = [name for name, p in unused if p.requires_grad]  # the exchange freezes what is not trained
        if has_unused := any_rank(bool(names), runtime.device, runtime.world_size):
            what = ", ".join(names) or "some parameters of another process"
            say(f"DDP searches for unused parameters in every step: the loss does not depend on {what}")
        train = data_parallel(train, runtime, has_unused)
    return Wrapped(
        model if compiled is None else compiled, train, compiled is not None, is_recorded,
        config.system.reshard_after_forward,
    )  # fmt: skip


def unused_parameters(model: GPT, device: torch.device) -> list[tuple[str, nn.Parameter]]:
    """The trained parameters of an edited model that do not affect its loss, here of two tokens. DDP waits for all
    gradients unless it knows that some are missing. All processes draw the same random numbers."""
    ids = torch.zeros(1, min(2, model.config.block_size), dtype=torch.long, device=device)
    try:
        with forked_random(device), kept_buffers(model), unswapped(model):
            torch.manual_seed(0)
            nodes: list[Any] = [model(ids, ids)[1].grad_fn]
    except Exception as error:  # a loss that needs more than tokens
        if is_out_of_memory(error):
            raise
        return []
    seen, used = set(nodes), set[Any]()
    while nodes:
        node = nodes.pop()
        used.add(getattr(node, "variable", None))
        before = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= before
        nodes += before
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and p not in used]


def data_parallel(model: nn.Module, runtime: Runtime, has_unused: bool) -> nn.Module:
    """The model for training: it averages gradients over the processes, with connections of its own. has_unused: see
    unused_parameters."""
    ids = [runtime.device.index] if runtime.device.type == "cuda" else None
    group = torch.distributed.new_group() if runtime.can_regroup else None
    tables = {p for module in sparse_tables(model) for p in module.parameters(recurse=False)}
    names = [name for name, p in model.named_parameters() if p in tables]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    for p in tables:  # their optimizer exchanges the gradients
        torch.distributed.broadcast(p.detach(), 0)
    # after the exchange, gradients are where they were exchanged: no second copy of them; torch's default first bucket
    # of 1 MiB would be a second exchange of a small model
    parallel = DistributedDataParallel(
        model, device_ids=ids, process_group=group, gradient_as_bucket_view=True, bucket_cap_mb=25,
        find_unused_parameters=has_unused,
    )  # fmt: skip
    if not has_unused:
        # DDP arranges gradients by their order in the first backward pass, which changes how three processes or more
        # round the sums. With this pass at every start, from the last parameter to the first, a resumed run rounds its
        # first step as an uninterrupted run does.
        parallel.reducer.prepare_for_backward([])
        trained = [p.sum() for p in model.parameters() if p.requires_grad and p not in tables]
        torch.stack(trained).sum().backward()
        parallel.zero_grad(set_to_none=True)
    return parallel


def exchange(model: GPT, config: Config, runtime: Runtime, micro_batch: int, say: Callable[[str], None]) -> None:
    """Swaps in all kernels and applies recomputation."""
    again = any(isinstance(m, Float8Linear) for m in model.modules())
    unswap(model)  # of an attempt with another micro-batch or a compiler
    unfreeze(model)  # swap compares the gradients of frozen weights too
    replacements: dict[type, type] = {}
    keep: list[nn.Module] = []
    packed = config.data.documents is True
    if runtime.device.type == "cpu":
        replacements, keep = cpu_replacements(model, runtime.dtype == torch.bfloat16, runtime.compile, packed)
    elif packed and config.training.flex_attention and config.model.dropout:
        say("documents: with dropout, attention reads a dense mask and does not skip other documents")
    elif packed and config.training.flex_attention:
        replacements[Attention] = document_attention()
    if runtime.is_sharded:
        replacements.pop(nn.Embedding, None)  # its gradient is sparse, which FSDP2 does not add up
    layers, loss = layer_replacements(model, packed) if runtime.compiled_layers else {}, ChunkedLoss
    if layers and find_kernel(say, without="training with torch"):
        replacements, loss = replacements | layers, CompiledLoss
    libraries = fitting_libraries(model, config, runtime, micro_batch)
    if faster := [f"{one}: {name}" for one, name in NAMES.items() if one in "".join(libraries.values())]:
        replacements |= {Linear: CPULinear, Head: CPUHead}
        if runtime.products is None:
            found = ", ".join(f"{shape} {three}" for shape, three in libraries.items())
            three = "output, input gradient, weight gradient"
            each = f"{found} ({three}; {', '.join(faster)}, faster here; t: torch)"
            only = set("".join(libraries.values()))
            say(f"matrix products: {each if len(only) > 1 else NAMES[only.pop()] + ', faster here than torch'}")
    if config.system.fp8:
        float8, others = float8_replacements(model)
        replacements, keep = replacements | float8, keep + others
    if loss_is_chunked(config, micro_batch):
        replacements[NextTokenLoss] = loss
        if config.training.chunked_loss == "auto":
            say(f"loss: computed in chunks (vocabulary {config.model.vocab_size:,}; --chunked_loss)")
    eager_cpu = runtime.device.type == "cpu" and not runtime.compile
    set_libraries(model, libraries)
    swap(model, with_adapters(replacements, eager_cpu), say, keep)
    if found_layers := layers_in_c(model):
        say(f"layers: {', '.join(found_layers)} in C, faster on a CPU (off: LLM_KERNEL=torch)")
    for module in model.modules():
        if isinstance(module, CPUTiedEmbedding):
            module.weight.register_post_accumulate_grad_hook(make_dense)
    for module in sparse_tables(model):
        for p in (p for p in module.parameters(recurse=False) if p.requires_grad):
            keep_occurrences(p)
    if config.system.fp8 and not again:
        count = sum(isinstance(m, Float8Linear) for m in model.modules())
        say(f"fp8: {count} linear layers of the blocks train in float8 (--fp8)")
    recompute(model, config, runtime, micro_batch, say)
    freeze(model, config.finetune)
    if loss is CompiledLoss and runtime.one_call is not False and fits_one_call(model, config, runtime, micro_batch):
        record_step(model, micro_batch, say)


def record_step(model: GPT, micro_batch: int, say: Callable[[str], None]) -> None:
    """Swaps in a training step of one call (kernels/tape.py), if it can be recorded. No times are measured here: they
    differ from run to run, and two runs from one seed must be equal."""
    if reason := why_not(model, micro_batch):
        say(f"training with torch: the step cannot be recorded ({reason})")
    elif swap(model, {GPT: RecordedGPT}, say):
        say("step: recorded from the model and run in C (off: LLM_KERNEL=torch)")
        report_to(model, say)


def fits_one_call(model: GPT, config: Config, runtime: Runtime, micro_batch: int) -> bool:
    """Whether a training step of this kind is faster in one call (kernels/tape.py), if it can be recorded: a narrow
    model shaped like GPT-2, with few threads, of which each has gradients of its own. Wider products are as fast in
    torch."""
    shape, finetune, training = config.model, config.finetune, config.training
    small = shape.n_embd <= NARROW and len(model.lm_head.weight) < MANY_IDS and shape.block_size <= LONGEST
    threads = runtime.threads or torch.get_num_threads()
    even = micro_batch % threads == 0 or micro_batch >= 4 * threads  # threads share whole sequences
    plain = not (shape.dropout or shape.max_ngram or shape.pos_embedding != "learned" or config.data.documents is True)
    plain = plain and not (finetune.lora_rank is not None or runtime.is_sharded or loss_is_chunked(config, micro_batch))
    stores = not training.gradient_checkpointing and training.activation_budget in ("auto", None)
    return small and even and threads <= FEW_THREADS and plain and stores


@torch.no_grad()
def shard(model: GPT, config: Config, runtime: Runtime) -> None:
    """Shards the blocks, then the rest of the model, with FSDP2. Each process keeps its rows of every parameter: its
    attribute `rows`, if it has one. Tables with sparse gradients and single numbers stay whole."""
    fsdp = importlib.import_module("torch.distributed.fsdp")  # takes a second to import
    whole = {p for module in sparse_tables(model) for p in module.parameters(recurse=False)}
    whole |= {p for p in model.parameters() if not p.dim()}
    rows, empty = dict[str, Tensor](), dict[nn.Parameter, nn.Parameter]()
    for name, p in model.named_parameters():
        if p not in whole:
            own = rows_of(len(p), runtime.shards, runtime.rank % runtime.shards)
            rows[name] = p.rows if hasattr(p, "rows") else p[own].clone()
            empty[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
    replace_parameters(model, empty)
    half = (torch.bfloat16, torch.float32) if runtime.dtype == torch.bfloat16 else ()  # weights, sums of gradients
    settings: dict[str, Any] = {"mp_policy": fsdp.MixedPrecisionPolicy(*half)}
    settings["mesh"] = device_mesh(runtime.device, runtime.world_size, runtime.shards)
    settings |= {"ignored_params": whole} if whole else {}
    for block in model.transformer.h:
        fsdp.fully_shard(block, reshard_after_forward=config.system.reshard_after_forward, **settings)
    fsdp.fully_shard(model, **settings)
    named = [(name, p) for name, p in model.named_parameters() if name in rows]
    made = {p: nn.Parameter(placed_as(p, rows.pop(name), p.shape), p.requires_grad) for name, p in named}
    replace_parameters(model, made)


def fitting_libraries(model: GPT, config: Config, runtime: Runtime, micro_batch: int) -> dict[str, str]:
    """The libraries of the linear layers' products: as at the start of the run, or the fastest."""
    if runtime.device.type != "cpu" or runtime.dtype != torch.float32 or runtime.compile:
        return {}
    if runtime.products is not None or runtime.world_size > 1:  # processes would measure different times
        return runtime.products or {}
    return fastest_libraries(model, micro_batch * config.model.block_size, runtime.compiled_layers)


def loss_is_chunked(config: Config, micro_batch: int) -> bool:
    """Whether head and loss are computed in chunks."""
    if isinstance(config.training.chunked_loss, bool):
        return config.training.chunked_loss
    vocab_size = config.model.vocab_size or 0
    return vocab_size >= MANY_IDS and micro_batch * config.model.block_size * vocab_size >= MANY_LOGITS


def compiled_where_it_pays(config: Config, runtime: Runtime, flops: float) -> Runtime:
    """compile=auto on a CPU, for a run of `flops` operations: compiling takes a minute and saves a tenth of the time or
    more of a narrow model, because its operations are small. Not with dropout: its masks are faster without."""
    is_open = config.system.compile == "auto" and runtime.device.type == "cpu" and not runtime.compile
    if not is_open or config.model.n_embd > NARROW or config.model.dropout > 0:
        return runtime
    threads = runtime.threads or torch.get_num_threads()
    minutes = flops / (threads * CPU_FLOPS[runtime.dtype]) / 60
    if minutes < REPAYS_COMPILING:
        return runtime
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    reason = f"saves time in a run of about {minutes:,.0f} min" if compiler else "no C++ compiler found; set CXX"
    reasons = runtime.reasons | {"compile": f"{'on' if compiler else 'off'} ({reason})"}
    return dataclasses.replace(runtime, compile=compiler is not None, reasons=reasons)


def may_have_layers(runtime: Runtime) -> bool:
    """Whether this run can have the layers in C."""
    plain = runtime.device.type == "cpu" and runtime.dtype == torch.float32 and not runtime.compile
    return plain and wanted_kernel() != "torch"


def with_layers(config: Config, runtime: Runtime, flops: float) -> Runtime:
    """compiled_layers for a run of `flops` operations in float32 on a CPU, if the library is there or repays its
    compilation."""
    if not may_have_layers(runtime):
        return runtime
    wanted = wanted_kernel()
    threads = runtime.threads or torch.get_num_threads()
    repaid = flops / (threads * CPU_FLOPS[runtime.dtype]) >= 60 * REPAYS_LIBRARY
    if wanted == "auto" and (lacking() or not (repaid or is_built())):
        return runtime
    return dataclasses.replace(runtime, compiled_layers=True)


def records_kernels(model: GPT, config: Config, runtime: Runtime, micro_batch: int) -> bool:
    """Whether the compiled model's kernels are recorded and launched together (CUDA graphs). auto: if a GPU would wait
    for launches, and a pass is a whole update. Raises UserError if requested but not supported."""
    wanted, sequences = config.system.cuda_graphs, config.data.batch_size * config.training.gradient_accumulation_steps
    unfit = "max_ngram (sparse gradients)" if config.model.max_ngram else "documents" * (config.data.documents is True)
    if unfit and wanted is True:
        raise UserError(f"--cuda_graphs=True does not support {unfit}; leave it at auto")
    if wanted != "auto":
        return wanted
    small = sum(p.numel() for p in model.parameters()) <= LAUNCH_BOUND and not unfit
    return small and runtime.device.type == "cuda" and runtime.world_size == 1 and micro_batch == sequences


def _compile(
    model: GPT, config: Config, runtime: Runtime, micro_batch: int, say: Callable[[str], None]
) -> tuple[nn.Module | None, bool]:
    """The compiled model, or None if compilation fails; and whether its kernels are recorded."""
    say("compiling the model (about a minute)")
    for recorded in (True, False) if records_kernels(model, config, runtime, micro_batch) else (False,):
        try:
            compiled = _tried(model, config, runtime, micro_batch, recorded)
            if recorded:
                say("CUDA graphs: the model's kernels are recorded once and launched together (--cuda_graphs)")
            return compiled, recorded
        except Exception as error:
            reason = one_line(error)
            is_required = config.system.cuda_graphs is True if recorded else not runtime.compile_may_fail
            if is_out_of_memory(error) and (is_required or not recorded):
                raise  # a smaller batch may fit
            if is_required and recorded:
                raise UserError(f"CUDA graphs failed ({reason}); remove --cuda_graphs") from None
            if is_required:
                raise UserError(f"torch.compile failed ({reason}); run with --compile=False") from None
        failed = "CUDA graphs failed" if recorded else "torch.compile failed"
        say(f"{failed} ({reason}); {'compiling without them' if recorded else 'training without it'}")
        torch._dynamo.reset()  # which also frees their memory
    for block in model.transformer.h:
        block._compiled_call_impl = None
    return None, False


def _tried(model: GPT, config: Config, runtime: Runtime, micro_batch: int, recorded: bool) -> nn.Module:
    """The compiled model, tested on a batch of the run's shape, so that it fails before step 0 if at all."""
    shape = (micro_batch, config.model.block_size)
    x, y = torch.zeros((2, *shape), dtype=torch.long, device=runtime.device)
    documents = Documents.of([x] if config.data.documents is True else [], model)
    in_parts = runtime.device.type == "cpu" or config.model.max_ngram > 0 or runtime.is_sharded
    compiled: nn.Module = model
    shield_children()
    try:
        if in_parts:  # compile one block and reuse it: faster to compile, and sparse gradients stay outside
            for block in model.transformer.h:
                block.compile(dynamic=False)
        elif recorded:
            compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)  # type: ignore[assignment]
            compiled.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
        else:
            compiled = torch.compile(model)  # type: ignore[assignment]
        if runtime.is_sharded:
            shard(model, config, runtime)
        with forked_random(runtime.device), kept_buffers(model):  # the trial must not change the run
            for _ in range(3 if recorded else 1):  # which warms up, records, and replays
                with runtime.autocast():
                    _, loss = compiled.train()(x, y, *documents)
                loss.backward()
                model.zero_grad(set_to_none=True)
                compiled.eval()
                with runtime.autocast(), torch.no_grad():
                    compiled(x, y, *documents)
    finally:
        model.train().zero_grad(set_to_none=True)
        if runtime.is_sharded:
            sharded: Any = model  # FSDP2 has changed its class
            sharded.reshard()  # without a backward pass, the parameters outside the blocks are whole
    return compiled
