"""Stochastic rounding to bfloat16, so that moments keep small changes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PIECES = {"cuda": 1 << 24}  # elements of a float32 copy: a GPU is fast with few kernels,
PIECE = 1 << 17  # a CPU with copies that stay in its cache


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

    def key(self, name: str, count: int, index: int) -> int:
        """16 random bits for one rounding of part of a tensor, from element `index` on."""
        return _mixed(self.seed, zlib.crc32(name.encode()), count, index) & 0xFFFF

    def round(self, target: Tensor, values: Tensor, key: int, row: int = 0) -> None:
        """target (bfloat16) = values (float32, overwritten), (n,) with n up to piece_of(device). row: 0 or 1, for two
        independent noises."""
        if values.device not in self.tables:
            generator = torch.Generator().manual_seed(self.seed)
            shape = (2, piece_of(values.device))
            table = torch.randint(1 << 16, shape, generator=generator, dtype=torch.int32)
            self.tables[values.device] = table.to(values.device)
        raw = values.view(torch.int32)
        # the probability of a carry into the upper half is the lower half's fraction
        raw += self.tables[values.device][row, : values.numel()] ^ key
        raw >>= 16
        target.view(torch.int16).copy_(raw)

    def round_all(self, target: Tensor, values: Tensor, name: str, count: int, index: int) -> None:
        """As round(), for contiguous tensors of any shape; index: of the first element in the named tensor."""
        target, values, piece = target.view(-1), values.view(-1), piece_of(values.device)
        for begin in range(0, values.numel(), piece):
            part = slice(begin, begin + piece)
            self.round(target[part], values[part], self.key(name, count, index + begin))


def piece_of(device: torch.device) -> int:
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
    """Cuts tensors into flat pieces and groups small ones: lists of (name, tensor, part of it)."""
    batch: list[tuple[str, Any, slice]] = []
    size = 0
    for name, p in named:
        limit = piece_of(p.device)
        for begin in range(0, p.numel(), limit):
            part = slice(begin, min(begin + limit, p.numel()))
            if batch and size + part.stop - begin > limit:
                yield batch
                batch, size = [], 0
            batch.append((name, p, part))
            size += part.stop - begin
    if batch:
        yield batch
