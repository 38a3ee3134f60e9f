"""The base of all optimizers: the state of a parameter, the step of a group, and stochastic rounding of moments."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..config import OptimizerConfig
from .sharding import local, new_zeros

PIECES = {"cuda": 1 << 24}  # elements of a float32 copy: a GPU is fast with few kernels,
PIECE = 1 << 17  # a CPU with copies that stay in its cache
Slots = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Rule:
    """How an optimizer changes parameters. One subclass per optimizer; it declares the tensors that it keeps. dtype: of
    the moments, float32 or bfloat16; dither: rounds to bfloat16; processes: train together and call step() together."""

    skips_on_device = False
    """Whether step() changes nothing if found_inf is 1, so that the host does not wait for the check."""

    def __init__(self, dtype: torch.dtype, dither: Dither, processes: int = 1):
        self.dtype, self.dither, self.processes = dtype, dither, processes

    @classmethod
    def groups(cls, model: nn.Module, config: OptimizerConfig, default: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parameter groups; default: with and without weight decay. "rule" names another optimizer."""
        return default

    def slots(self, p: Tensor) -> Slots:
        """Name, shape and dtype of each tensor that is kept for a parameter, apart from counters."""
        raise NotImplementedError

    def new_state(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step."""
        return {slot: new_zeros(p, shape, dtype) for slot, (shape, dtype) in self.slots(p).items()}

    def step(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], found_inf: Tensor | None) -> None:
        """Steps the parameters of a group that have gradients. found_inf: 0-dim, 1 to skip the step; None: do not."""
        raise NotImplementedError

    def begin_epoch(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
        """Called before the first step of each further epoch."""


def with_gradients(group: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, parameter) of a group's parameters that have gradients."""
    return [(name, p) for name, p in zip(group["names"], group["params"], strict=True) if p.grad is not None]


class Dither:
    """Rounds float32 to bfloat16, up or down with the probability that keeps the mean (stochastic rounding,
    arXiv 2010.06192). With rounding to nearest, a moment stops changing once its change is below 1/512 of it. The
    second moment at beta2 = 0.999 does.

    The noise, a table of random numbers xor-ed with a new number each time, is a function of (seed, tensor's name,
    number of the rounding, element); it draws from none of torch's generators.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.tables: dict[torch.device, Tensor] = {}

    def round(self, pairs: list[tuple[Tensor, Tensor]], name: str, count: int, index: int, skipped: int = 0) -> None:
        """target (bfloat16) = values (float32, overwritten) for one or two pairs of flat tensors, with independent
        noises. They are elements of the named tensor, from `index` on without the first `skipped`, at its rounding
        number `count`. An element gets the same noise however many are skipped."""
        device, length = pairs[0][1].device, pairs[0][1].numel()
        size = piece_of(device)
        if device not in self.tables:
            generator = torch.Generator().manual_seed(self.seed)
            self.tables[device] = torch.randint(1 << 16, (2, size), generator=generator, dtype=torch.int32).to(device)
        for begin in range(skipped // size * size, skipped + length, size):
            key = _mixed(self.seed, zlib.crc32(name.encode()), count, index + begin) & 0xFFFF
            first, last = max(begin, skipped), min(begin + size, skipped + length)
            for row, (target, values) in enumerate(pairs):
                if last - first < length:
                    part = slice(first - skipped, last - skipped)
                    target, values = target[part], values[part]
                raw = values.view(torch.int32)
                # the probability of a carry into the upper half is the lower half's fraction
                raw += self.tables[device][row, first - begin : last - begin] ^ key
                raw >>= 16
                target.view(torch.int16).copy_(raw)


def piece_of(device: torch.device) -> int:
    """Elements that are rounded at once."""
    return PIECES.get(device.type, PIECE)


def _mixed(*words: int) -> int:
    """32 bits that look random, from whole numbers (the finalizer of SplitMix64, after each word)."""
    mask, h = (1 << 64) - 1, 0
    for word in words:
        h = (h + word + 0x9E3779B97F4A7C15) & mask
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        h ^= h >> 31
    return h >> 32


def pieces(named: list[tuple[str, Any]]) -> Iterator[list[tuple[str, Any, slice]]]:
    """Cuts the local rows of tensors into flat pieces and groups small ones: lists of (name, tensor, part of it)."""
    batch: list[tuple[str, Any, slice]] = []
    size = 0
    for name, p in named:
        limit, length = piece_of(p.device), local(p).numel()
        for begin in range(0, length, limit):
            part = slice(begin, min(begin + limit, length))
            if batch and size + part.stop - begin > limit:
                yield batch
                batch, size = [], 0
            batch.append((name, p, part))
            size += part.stop - begin
    if batch:
        yield batch
