"""Which activations wait for the backward pass, and which are computed again there.

Three ways, per block: keep all; recompute what is cheap, the outputs of norms and activation functions, of which only
the inputs are kept (no product with weights is done twice); recompute the block from its input (arXiv 1604.06174).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..config import Config
from ..core.model import GPT, GatedMLP
from ..errors import UserError
from ..machine.device import Runtime, forked_random

GIB = 1 << 30
WORTH_IT = 1 << 20  # bytes of one activation of a micro-batch, below which the bookkeeping takes longer than it saves


def recompute(model: GPT, config: Config, runtime: Runtime, micro_batch: int, say: Callable[[str], None]) -> None:
    """Has the blocks recompute what the settings say. Raises UserError where their budget cannot be kept."""
    training, blocks = config.training, list(model.transformer.h)
    budget = training.activation_budget
    if any(_is_ours(module.forward) for module in model.modules()):
        return  # of a try before, with a larger micro-batch
    if training.gradient_checkpointing:
        for block in blocks:
            _recompute_block(block, config.model.dropout > 0)
    elif budget == "auto":
        size = micro_batch * config.model.block_size * config.model.n_embd * runtime.dtype.itemsize
        if size >= WORTH_IT and not runtime.compile:  # a compiler does this by itself
            say("activations: norms and activation functions are recomputed (--activation_budget=None keeps all)")
            for block in blocks:
                recompute_cheap(block)
    elif budget is not None:
        _keep_within(model, config, runtime, micro_batch, budget, say)


def _keep_within(
    model: GPT, config: Config, runtime: Runtime, micro_batch: int, budget: float, say: Callable[[str], None]
) -> None:
    blocks, limit = list(model.transformer.h), budget * GIB
    everything, out = kept_by_a_block(model, runtime, micro_batch)
    whole = len(blocks) * everything
    if whole <= limit:
        say(f"activations: {whole / GIB:.2f} GiB kept of a micro-batch, within the budget of {budget:g} GiB")
        return
    one = everything
    if not runtime.compile:
        for block in blocks:
            recompute_cheap(block)
        one, _ = kept_by_a_block(model, runtime, micro_batch)
    # the last block is walked backwards at once: to recompute it would free nothing
    least = (len(blocks) - 1) * out + one
    if least > limit:
        raise UserError(
            f"activation_budget={budget:g} GiB cannot be kept: with all blocks recomputed, a micro-batch of "
            f"{micro_batch} sequences still needs {math.ceil(least / GIB * 1000) / 1000:g} GiB; raise it to that, or "
            "lower --micro_batch"
        )
    count = next(k for k in range(len(blocks)) if k * out + (len(blocks) - k) * one <= limit)
    for block in blocks[:count]:  # the first, since they are recomputed when the others' activations are gone
        _recompute_block(block, config.model.dropout > 0)
    kept = count * out + (len(blocks) - count) * one
    what = "norms and activation functions" if one < everything else ""
    if count:
        what = f"{count} of {len(blocks)} blocks{', and in the others ' * bool(what)}{what}"
    say(f"activations: recomputing {what}: {kept / GIB:.2f} GiB kept of a micro-batch instead of {whole / GIB:.2f}")


def recompute_cheap(block: Any) -> None:
    """Each norm and activation function becomes part of the product that it feeds, which keeps only the input of both;
    attention on a CPU keeps no weights, which are large where the context is long.

    The arithmetic is the same; only a norm that feeds two products adds their gradients up in another order.
    """
    from . import cpu as kernels

    attn, mlp = block.attn, block.mlp
    if attn.attend is kernels.attention:
        attn.attend = kernels.lean_attention
    _join(block.ln_1, attn.c_attn)
    if isinstance(mlp, GatedMLP):
        _join(block.ln_2, mlp.c_fc, mlp.c_gate)
        # attributes shadow the methods: state-dict keys stay, and the model has no branch for it
        mlp.forward = functools.partial(_gated, mlp, mlp.act.forward, mlp.c_proj.forward)  # type: ignore[method-assign]
    else:
        _join(block.ln_2, mlp.c_fc)
        _join(mlp.act, mlp.c_proj)


def _is_ours(forward: Callable) -> bool:
    return isinstance(forward, functools.partial) and forward.func in (_again, _gated, _recomputed)


def _join(before: nn.Module, *products: nn.Module) -> None:
    for product in products:
        product.forward = functools.partial(_again, _chained, before.forward, product.forward)
    before.forward = _unchanged


def _unchanged(x: Tensor) -> Tensor:
    return x


def _chained(first: Callable, second: Callable, x: Tensor) -> Tensor:
    return second(first(x))


def _gated(mlp: GatedMLP, act: Callable, project: Callable, x: Tensor) -> Tensor:
    """GatedMLP.forward."""
    return mlp.dropout(_again(_gated_product, act, project, mlp.c_gate(x), mlp.c_fc(x)))


def _gated_product(act: Callable, project: Callable, gate: Tensor, x: Tensor) -> Tensor:
    return project(act(gate) * x)


def _again(forward: Callable, *args: Any) -> Any:
    """forward(*args), without dropout in it. torch stops a second time when all is there that the backward pass reads:
    before the product, whose result it does not."""
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


def _recompute_block(block: nn.Module, dropout: bool) -> None:
    block.forward = functools.partial(_recomputed, block.forward, dropout)


def _recomputed(forward: Callable, dropout: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=dropout, **kwargs)


def kept_by_a_block(model: GPT, runtime: Runtime, micro_batch: int) -> tuple[int, int]:
    """Bytes that a block keeps of a micro-batch for the backward pass, its output included, and those of its output.

    Measured on the first block with one sequence and with two: what is kept once, such as weights in the products'
    precision, is told from what grows with the batch.
    """
    with forked_random(runtime.device):
        _kept(model, runtime, 1)  # makes what then stays for all batches, such as a mask
        one, out = _kept(model, runtime, 1)
        two = _kept(model, runtime, 2)[0] if micro_batch > 1 else one
    return one + (micro_batch - 1) * (two - one), micro_batch * out


def _kept(model: GPT, runtime: Runtime, sequences: int) -> tuple[int, int]:
    block, made = model.transformer.h[0], _Made()
    tokens = torch.zeros((sequences, model.config.block_size), dtype=torch.long, device=runtime.device)
    with runtime.autocast():
        args, kwargs = _arguments(model, block, tokens)
        theirs = [*block.parameters(), *tree_leaves((args, kwargs))]
        known = {t.untyped_storage()._cdata for t in theirs if isinstance(t, Tensor)}
        with made:
            out = block(*args, **kwargs)
    return made.alive(known), out.untyped_storage().nbytes()


class _Reached(Exception):
    """The forward pass has come to the block."""


def _arguments(model: GPT, block: nn.Module, tokens: Tensor) -> tuple[tuple, dict]:
    """What the model calls the block with."""
    met: list[tuple[tuple, dict]] = []

    def stop(_block: nn.Module, args: tuple, kwargs: dict) -> None:
        met.append((args, kwargs))
        raise _Reached

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(tokens)
    except _Reached:
        pass
    finally:
        hook.remove()
    return met[0]


class _Made(TorchDispatchMode):
    """Remembers the memory that operations give out, without holding on to it."""

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
        """Bytes that are still held, but for those of the known."""
        return sum(n for key, (ref, n) in self.storages.items() if key not in known and not ref.expired())
