"""The model of a run with its first weights, from a seed or a checkpoint.

A model that will be sharded is built without its numbers: the operations of its constructor are recorded on tensors
without memory (fake tensors; on the meta device torch.nn.init skips some operations), and then repeated in their order.
So they draw the same random numbers as in one process, and a matrix can be cut into shards as soon as the last
operation on it is done. Memory peaks at one matrix over the shards.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..config import Config
from ..core.model import GPT
from ..errors import UserError, one_line
from ..machine.device import Runtime, forked_random
from ..machine.memory import keep_freed_memory
from .optimizer import sparse_tables
from .sharding import replace_parameters, rows_of

STD = 0.02  # of the numbers that stand in for a matrix
aten = torch.ops.aten
# In-place operations that do not read what they overwrite
OVERWRITING = {aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar}


def build(config: Config, runtime: Runtime, weights: dict[str, Tensor] | None, say: Callable[[str], None]) -> GPT:
    """The model of a run. If it is to be sharded, matrices are stand-ins that need no memory, and the attribute `rows`
    of each has the numbers that this process keeps. weights: of a checkpoint."""
    if not runtime.is_sharded:
        return _whole(config, weights)
    keep_freed_memory(False)  # else the matrices that are drawn leave holes between the shards
    # every process draws as rank 0 does, and rank 0 as one process would
    with forked_random(runtime.device) if runtime.rank else contextlib.nullcontext():
        if runtime.rank:
            torch.manual_seed(config.system.seed)
        before, recorder = torch.get_rng_state(), _Recorder()
        try:
            model = _in_rows(config, runtime, weights, recorder)
            recorder.forget()
            if any(made() is not None for made in recorder.made):
                raise ValueError("a tensor that is neither a parameter nor a buffer")
            return model
        except UserError:
            raise
        except Exception as error:
            why = one_line(error)
        say(f"every process builds the whole model first, because its construction cannot be recorded ({why})")
        torch.set_rng_state(before)
        return _whole(config, weights)


@torch.no_grad()
def _in_rows(config: Config, runtime: Runtime, weights: dict[str, Tensor] | None, recorder: _Recorder) -> GPT:
    """The model with stand-ins."""
    with importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode(), recorder:
        model = GPT(config.model)
    uncut = {id(p) for module in sparse_tables(model) for p in module.parameters(recurse=False)}
    own, kept = dict[int, Tensor](), dict[int, Tensor]()

    def keep(tensor: Tensor, numbers: Tensor) -> None:
        if not isinstance(tensor, nn.Parameter) or tensor.dim() <= 1 or id(tensor) in uncut:
            own[id(tensor)] = numbers.to(runtime.device, copy=True)
        else:
            own[id(tensor)] = _stand_in(numbers, runtime)
            rows = rows_of(len(numbers), runtime.shards, runtime.rank % runtime.shards)
            kept[id(tensor)] = numbers[rows].to(runtime.device, copy=True)

    for name, tensor in model.state_dict(keep_vars=True).items() if weights is not None else ():
        keep(tensor, (weights or {})[name])
    missing: dict[int, list[Tensor]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in own:
            missing.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    if not set(missing) <= {storage for call in recorder.calls for storage in call.changes}:
        raise ValueError("not all of it is made by torch")
    for storage, numbers in _repeated(recorder.calls, set(missing), draws=weights is None):
        for tensor in missing[storage]:
            keep(tensor, numbers.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()))
    new = {p: nn.Parameter(own[id(p)], p.requires_grad) for p in model.parameters()}
    for p, other in new.items():
        if id(p) in kept:
            other.rows = kept[id(p)]  # type: ignore[attr-defined]
    replace_parameters(model, new)
    for module in model.modules():
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, own[id(buffer)])
    return model


def _whole(config: Config, weights: dict[str, Tensor] | None) -> GPT:
    model = GPT(config.model)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def _stand_in(numbers: Tensor, runtime: Runtime) -> Tensor:
    """A matrix of this shape on the device, made of views of a few random numbers."""
    few = STD * torch.randn(sum(numbers.shape), generator=torch.Generator().manual_seed(0), dtype=numbers.dtype)
    return few.to(runtime.device).as_strided(numbers.shape, (1,) * numbers.dim())


# --- the operations of a constructor, recorded and repeated ---


@dataclass(frozen=True)
class _View:
    """A fake tensor as it was when an operation had it: its shape may be changed in place."""

    storage: int
    bytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, kept: dict[int, Tensor]) -> Tensor:
        """The same view of real numbers, by storage. They are added if they are missing."""
        if self.storage not in kept:
            kept[self.storage] = torch.empty(self.bytes // self.dtype.itemsize, dtype=self.dtype)
        return kept[self.storage].as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Call:
    """An operation; views stand for fake tensors. The sets hold storages."""

    func: Any
    args: Any
    kwargs: Any
    out: list[Any]
    reads: set[int]
    makes: set[int]
    changes: set[int]
    """Tensors that the operation changes, including the tensors it makes."""

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.func.tags

    @property
    def overwrites(self) -> bool:
        """Whether the numbers from before make no difference."""
        if self.func not in OVERWRITING:
            return False
        return math.prod(self.args[0].size) * self.args[0].dtype.itemsize == self.args[0].bytes


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.alive: list[Any] = []  # no later tensor gets the storage of a dead one
        self.made: list[weakref.ref] = []

    def forget(self) -> None:
        """Frees all fake tensors that the model does not hold."""
        self.calls.clear()
        self.alive.clear()
        gc.collect()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, options = tree_map(_view, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        returned, reads = [_view(leaf) for leaf in tree_leaves(out)], _storages((given, options))
        makes = _storages(returned) - reads
        if makes or reads:
            names = {a.name: a.alias_info for a in func._schema.arguments}
            named = dict(zip(names, given, strict=False)) | options
            written = [value for name, value in named.items() if names[name] is not None and names[name].is_write]
            self.calls.append(_Call(func, given, options, returned, reads, makes, makes | _storages(written)))
            self.alive.append((args, kwargs, out))
            self.made += [weakref.ref(leaf) for leaf in tree_leaves(out) if _view(leaf) is not leaf]
        return out


def _view(leaf: Any) -> Any:
    if not (isinstance(leaf, Tensor) and hasattr(leaf, "fake_mode")):
        return leaf
    storage = leaf.untyped_storage()
    offset = int(leaf.storage_offset())
    return _View(storage._cdata, storage.nbytes(), leaf.dtype, leaf.size(), leaf.stride(), offset)


def _storages(tree: Any) -> set[int]:
    return {leaf.storage for leaf in tree_leaves(tree) if isinstance(leaf, _View)}


def _repeated(calls: list[_Call], wanted: set[int], draws: bool) -> Iterator[tuple[int, Tensor]]:
    """Repeats the calls, as far as the wanted storages depend on them. Yields each of these, as a flat tensor, when it
    is complete. draws: random numbers that are not used are drawn too."""
    needed, last, live = [False] * len(calls), dict[int, int](), set(wanted)
    for i, call in reversed([*enumerate(calls)]):
        needed[i] = bool(call.changes & live) or (draws and call.is_random and not call.overwrites)
        if needed[i]:
            live -= call.changes if call.overwrites else call.makes
            live |= set() if call.overwrites else call.reads
            for storage in call.changes | call.reads:
                last.setdefault(storage, i)
    kept: dict[int, Tensor] = {}
    for i, call in enumerate(calls):
        if not needed[i] and not (draws and call.is_random):
            continue
        real = functools.partial(_real, kept if needed[i] else {})
        out = call.func(*tree_map(real, call.args), **tree_map(real, call.kwargs))
        if not needed[i]:
            continue
        for view, made in zip(call.out, tree_leaves(out), strict=True):
            if isinstance(view, _View) and view.storage in call.makes:
                kept[view.storage] = made.as_strided((made.untyped_storage().nbytes() // made.itemsize,), (1,), 0)
        for storage in [s for s in call.changes | call.reads if last[s] == i]:
            numbers = kept.pop(storage, None)
            if storage in wanted and numbers is not None:
                yield storage, numbers


def _real(kept: dict[int, Tensor], leaf: Any) -> Any:
    return leaf.of(kept) if isinstance(leaf, _View) else leaf
