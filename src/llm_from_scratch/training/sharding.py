"""Sharded tensors: parameters, gradients and moments of which each process holds some rows (FSDP2's DTensors)."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # DTensor's module takes half a second to import


def local(tensor: Any) -> Tensor:
    """The rows that this process holds, as a view if gradients are off. A tensor that is not sharded is returned."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def rows_of(height: int, shards: int, index: int) -> slice:
    """The rows of shard `index`: as many as the others' or fewer, as torch.chunk cuts them."""
    each = -(-height // shards)
    return slice(min(height, each * index), min(height, each * (index + 1)))


def own_rows(tensor: Any) -> slice:
    """The rows of a sharded tensor that this process holds."""
    mesh = tensor.device_mesh  # its last dimension is that of the shards
    return rows_of(tensor.size(0), mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1))


def first_element(tensor: Tensor) -> int:
    """The place of the first local element in the whole tensor, counted row by row."""
    return own_rows(tensor).start * math.prod(tensor.shape[1:]) if is_sharded(tensor) else 0


def placed_as(like: Any, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A sharded tensor of this shape from the rows of this process. like: a tensor on the same processes."""
    dtensor = importlib.import_module("torch.distributed.tensor").DTensor
    stride = torch.empty(shape, device="meta").stride()
    return dtensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def shard_of(like: Any, whole: Tensor) -> Tensor:
    """A whole tensor on the device of `like`; if that is sharded, a copy of the rows of this process, sharded."""
    if not is_sharded(like):
        return whole.to(like.device)
    return placed_as(like, whole[own_rows(like)].to(like.device, copy=True).contiguous(), tuple(whole.shape))


def new_zeros(like: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the device of `like`, sharded if it is; then shape[0] is the number of its rows."""
    if not is_sharded(like):
        return torch.zeros(shape, dtype=dtype, device=like.device)
    rows = own_rows(like)
    held = torch.zeros((rows.stop - rows.start, *shape[1:]), dtype=dtype, device=like.device)
    return placed_as(like, held, shape)


def replace_parameters(model: nn.Module, new: dict[nn.Parameter, nn.Parameter]) -> None:
    """Replaces parameters by others. Tied ones stay tied."""
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if p in new:
                setattr(module, name, new[p])


@contextlib.contextmanager
def averaged_numbers(model: nn.Module) -> Iterator[None]:
    """Afterwards the gradients of parameters without a dimension, which FSDP2 cannot shard, are the means over the
    processes. All processes call this."""
    yield
    numbers = [p for p in model.parameters() if not p.dim() and p.requires_grad]
    if not numbers:
        return
    # a process that does not use one of them takes part
    means = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in numbers])
    torch.distributed.all_reduce(means)
    for p, mean in zip(numbers, means / torch.distributed.get_world_size(), strict=True):
        p.grad = mean


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together. If some are sharded, all processes call this, and all get the same bits. On
    a CPU these are the bits of one process: no row is divided, and the rows are summed in float64."""
    sharded: list[Any] = [g for g in gradients if is_sharded(g)]
    if not sharded and not all(g.device.type == "cpu" for g in gradients):
        return nn.utils.get_total_norm(gradients)
    squared = _squared_norm([g for g in gradients if not is_sharded(g)])
    if sharded:
        of_shards, mesh = _squared_norm([local(g) for g in sharded]), sharded[0].device_mesh
        torch.distributed.all_reduce(of_shards, group=mesh.get_group(mesh.ndim - 1))
        squared = squared.to(of_shards.device) + of_shards
    return squared.sqrt().float()


def _squared_norm(gradients: list[Tensor]) -> Tensor:
    if any(g.device.type != "cpu" for g in gradients):  # where one kernel for all is faster
        return nn.utils.get_total_norm(gradients).square()
    rows = [torch.linalg.vector_norm(g, dim=-1).flatten() if g.dim() > 1 else g.flatten() for g in gradients]
    return torch.cat(rows or [torch.zeros(0)]).double().square().sum()
