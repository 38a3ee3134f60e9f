"""Which activations are stored for the backward pass, and which are recomputed in it.

Three ways per block: store everything; recompute only the outputs of norms and activation functions (no matrix product
is computed twice); or recompute the whole block from its input (arXiv 1604.06174). All are subclasses of
core/model.py's own modules: an edited block, norm or activation recomputes its own forward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..config import Config
from ..core.model import ACTIVATIONS, GPT, NORMS, Block, ReLUSquared, SwiGLU
from ..errors import UserError
from ..machine.device import Runtime, forked_random
from .cpu import CPUAttention, CPUReLUSquared, CPUSwiGLU, LeanCPUAttention
from .swap import inputs, kept_buffers, kind_of, swap, unswap

GIB = 1 << 30
WORTH_IT = 1 << 20  # bytes of one activation of a micro-batch; below it, the bookkeeping costs more time than it saves


def recompute(model: GPT, config: Config, runtime: Runtime, micro_batch: int, say: Callable[[str], None]) -> None:
    """Makes the blocks recompute according to the settings. Raises UserError if the budget is too small."""
    training, blocks = config.training, list(model.transformer.h)
    budget = training.activation_budget
    if training.gradient_checkpointing:
        _recompute_blocks(model, blocks, say)
    elif budget == "auto":
        size = micro_batch * config.model.block_size * config.model.n_embd * runtime.dtype.itemsize
        if size >= WORTH_IT and not runtime.compile:  # a compiler does this by itself
            say("activations: norms and activation functions are recomputed (--activation_budget=None stores them)")
            recompute_cheap(model, say)
    elif budget is not None:
        _keep_within(model, config, runtime, micro_batch, budget, say)


def _keep_within(
    model: GPT, config: Config, runtime: Runtime, micro_batch: int, budget: float, say: Callable[[str], None]
) -> None:
    blocks, limit = list(model.transformer.h), budget * GIB
    everything, out = kept_by_a_block(model, runtime, micro_batch)
    whole = len(blocks) * everything
    if whole <= limit:
        say(f"activations: {whole / GIB:.2f} GiB per micro-batch, within the budget of {budget:g} GiB")
        return
    one = everything
    if not runtime.compile:
        recompute_cheap(model, say)
        one, _ = kept_by_a_block(model, runtime, micro_batch)
    # the last block's backward pass comes first: recomputing it would free nothing
    least = (len(blocks) - 1) * out + one
    if least > limit:
        raise UserError(
            f"activation_budget={budget:g} GiB is too small: even with all blocks recomputed, a micro-batch of "
            f"{micro_batch} sequences needs {math.ceil(least / GIB * 1000) / 1000:g} GiB. Raise the budget, or lower "
            "--micro_batch"
        )
    count = next(k for k in range(len(blocks)) if k * out + (len(blocks) - k) * one <= limit)
    # the first blocks, since they are recomputed when the others' activations are gone
    unswap(nn.ModuleList(blocks[:count]), LeanBlock)
    asked, count = count, _recompute_blocks(model, blocks[:count], say)
    if count < asked and one < everything:
        swap(model, {Block: LeanBlock}, say)
    kept = count * out + (len(blocks) - count) * one
    what = "norms and activation functions" if one < everything else ""
    if count:
        what = f"{count} of {len(blocks)} blocks{', and in the others ' * bool(what)}{what}"
    over = "" if kept <= limit else f", more than the budget of {budget:g} GiB"
    say(
        f"activations: recomputing {what or 'nothing'}: {kept / GIB:.2f} GiB stored per micro-batch instead of "
        f"{whole / GIB:.2f}{over}"
    )


def _recompute_blocks(model: GPT, blocks: Iterable[nn.Module], say: Callable[[str], None]) -> int:
    chosen = set(blocks)
    return swap(model, {Block: RecomputedBlock}, say, keep=[m for m in model.transformer.h if m not in chosen])


class RecomputedBlock(Block):
    """A block that stores only its input. Its forward runs again in the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        drawn = any(isinstance(m, nn.Dropout) and m.p for m in self.modules())
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=drawn, **kwargs)


def recompute_cheap(model: GPT, say: Callable[[str], None]) -> None:
    """Recomputes the outputs of norms and activation functions in the blocks instead of storing them. On a CPU,
    attention does not store its weights either. The arithmetic is the same."""
    on_cpu = model.lm_head.weight.device.type == "cpu"
    faster: dict[type, type] = {SwiGLU: CPUSwiGLU, ReLUSquared: CPUReLUSquared} if on_cpu else {}
    cheap = (*NORMS.values(), *(kind for kind in ACTIVATIONS.values() if isinstance(kind, type)))
    inside = {m for m in model.transformer.h.modules() if isinstance(m, (CPUAttention, *cheap))}
    lighter = {kind: lean(faster.get(kind, kind)) for kind in {type(m) for m in inside}}
    swap(model, {**lighter, CPUAttention: LeanCPUAttention}, say, keep=set(model.modules()) - inside)
    swap(model, {Block: LeanBlock}, say)


class LeanBlock(Block):
    """A block with Lean modules, which recompute their outputs in the backward pass instead of storing them."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        with _Outputs():
            return super().forward(*args, **kwargs)


@functools.cache
def lean(plain: Any) -> type:
    """A subclass of a norm or activation class that registers with its block how to recompute its output."""

    class Lean(plain):
        def forward(self, *args: Any) -> Tensor:
            out = super().forward(*args)
            if _Outputs.open:
                _Outputs.open[-1].note(out, functools.partial(plain.forward, self), args)
            return out

    Lean.__name__ = Lean.__qualname__ = f"Lean{plain.__name__}"
    return Lean


class Made:
    """How to recompute one output: make(*args), as long as the arguments are not changed in place."""

    def __init__(self, out: Tensor, make: Callable[..., Tensor], args: tuple[Any, ...]):
        self.out, self.version, self.make = out, out._version, make
        self.args = [(a.detach(), a._version) if isinstance(a, Tensor) else (a, None) for a in args]
        self.autocast = torch.is_autocast_enabled(out.device.type)
        self.uses = 0
        self.kept: Tensor | None = None  # for the layers that share it, as gate and input of an MLP

    def again(self) -> Tensor:
        kind, out = self.args[0][0].device.type, self.kept
        if out is None:
            args = [_unchanged(*a) for a in self.args]
            with torch.no_grad(), torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=self.autocast):
                out = self.make(*args)
        self.uses -= 1
        self.kept = out if self.uses > 0 else None
        return out


def _unchanged(value: Any, version: int | None) -> Any:
    if version is not None and value._version != version:
        raise RuntimeError("a tensor that the backward pass needs was changed in place")
    return value


class _Outputs:
    """While active, autograd stores the recipe of a registered output instead of the output."""

    open: list[_Outputs] = []

    def __init__(self) -> None:
        self.made: dict[tuple[int, int], Made] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def note(self, out: Tensor, make: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        if out.requires_grad and out.is_contiguous() and isinstance(args[0], Tensor):
            self.made[out.data_ptr(), out.numel()] = Made(out, make, args)

    def pack(self, tensor: Tensor) -> Any:
        made = self.made.get((tensor.data_ptr(), tensor.numel()))
        known = made is not None and made.out.dtype == tensor.dtype and made.out._version == made.version
        if made is None or not known or not tensor.is_contiguous():
            return tensor, tensor._version
        made.uses += 1
        return made, tensor.shape

    def unpack(self, packed: Any) -> Tensor:
        made, rest = packed
        return made.again().view(rest) if isinstance(made, Made) else _unchanged(made, rest)

    def __enter__(self) -> None:
        self.open.append(self)
        self.hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        for made in self.made.values():
            del made.out  # the backward pass needs its inputs only
        self.made.clear()
        self.open.pop()


def kept_by_a_block(model: GPT, runtime: Runtime, micro_batch: int) -> tuple[int, int]:
    """Bytes that a block stores for the backward pass of a micro-batch, including its output, and the bytes of its
    output.

    Measured on the first block with one sequence and with two. The difference separates what grows with the batch from
    what is stored once, such as weights in the products' precision.
    """
    with forked_random(runtime.device), kept_buffers(model):
        _kept(model, runtime, 1)  # allocates what all batches share, such as a mask
        one, out = _kept(model, runtime, 1)
        two = _kept(model, runtime, 2)[0] if micro_batch > 1 else one
    return one + (micro_batch - 1) * (two - one), micro_batch * out


def _kept(model: GPT, runtime: Runtime, sequences: int) -> tuple[int, int]:
    block, made = model.transformer.h[0], Allocated()
    tokens = torch.zeros((sequences, model.config.block_size), dtype=torch.long, device=runtime.device)
    with runtime.autocast():
        args, kwargs = inputs(model, [block], tokens)[kind_of(block)]
        theirs = [*block.parameters(), *tree_leaves((args, kwargs))]
        known = {t.untyped_storage()._cdata for t in theirs if isinstance(t, Tensor)}
        with made:
            out = block(*args, **kwargs)
    return made.alive(known), out.untyped_storage().nbytes()


class Allocated(TorchDispatchMode):
    """Tracks the memory that operations allocate, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self, known: set[int]) -> int:
        """Bytes still in use by storages outside `known`."""
        return sum(n for key, (ref, n) in self.storages.items() if key not in known and not ref.expired())
