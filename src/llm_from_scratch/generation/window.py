"""The part of a KV cache that a decode step reads: 64 keys, 128, ... as the longest row grows.

A step recorded for one Window is valid until the longest row outgrows it, and for every other cache with the same
sizes. Positions beyond a row's length are masked. A StandIn replaces the cache while a step is recorded.

Shapes: B rows, Hkv key heads, D their width, S keys in the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.cache import KVCache
from ..errors import CannotRecord

BUCKET = 64  # keys by which a window grows


class Window:
    """Views of a cache's memory, and the inputs of a decode step."""

    def __init__(self, cache: KVCache, whole: bool = False):
        L, _, room, heads, max_len, width = cache.kv.shape
        size = max_len if whole else min(max_len, BUCKET * (cache.end // BUCKET + 1))
        self.kv, self.rows, self.size = cache.kv, cache.rows, size
        self.key = (cache.rows, self.size, cache.kv.shape, cache.kv.dtype)
        self.memory = [cache.kv[i].view(-1, width) for i in range(L)]  # (2 room Hkv max_len, D): to write
        used = cache.kv[:, :, : self.rows, :, : self.size]
        self.keys, self.values = list(used[:, 0]), list(used[:, 1])  # (B, Hkv, S, D) each: to read
        flat = used.flatten(2, 3)  # (L, 2, B Hkv, S, D)
        self.turned = [flat[i, 0].transpose(1, 2) for i in range(L)]  # (B Hkv, D, S), as bmm wants them
        self.flat = [flat[i, 1] for i in range(L)]  # (B Hkv, S, D)
        self.tokens = cache.tokens[: self.rows, : self.size]
        device = cache.kv.device
        which, row, head = (torch.arange(n, device=device) for n in (2, self.rows, heads))
        self.base = ((which[:, None, None] * room + row[:, None]) * heads + head) * max_len  # (2, B, Hkv)
        self.heads, self.places = heads, torch.arange(self.size, device=device)
        # a slice of it is the mask of rows of a given length
        self.hidden = torch.zeros(1, 1, 2 * self.size, device=device, dtype=cache.kv.dtype)
        self.hidden[..., self.size :] = -math.inf

        # parameters of a recorded step that do not change between tokens
        self.parts = (self.tokens, self.memory, self.turned, self.flat, self.keys, self.values)

    @staticmethod
    def of(cache: KVCache, whole: bool = False) -> Window:
        """The window for the cache's next step, stored with the cache. whole: of all the memory."""
        window: Window | None = cache.window
        if window is None or window.kv is not cache.kv or window.rows != cache.rows or cache.end >= window.size:
            window = cache.window = Window(cache, whole)
        return window

    def inputs(self, ids: Tensor, cache: KVCache, needs: frozenset[str]) -> tuple[Tensor | None, ...]:
        """The other parameters: ids, lengths, visible, mask, where. Parameters not in needs are None.

        All except mask start at the beginning of their memory, which the views in a record require.
        """
        lengths, end, ragged = cache.lengths, cache.end, cache.ragged
        if "tokens" in needs:
            cache.tokens[torch.arange(self.rows, device=ids.device), lengths] = ids
        return (
            ids if ids.is_contiguous() and not ids.storage_offset() else ids.clone(),
            lengths,
            self.visible(lengths, ragged) if "visible" in needs else None,
            self.mask(lengths, end, ragged) if "mask" in needs else None,
            self.where(lengths) if "where" in needs else None,
        )

    def where(self, lengths: Tensor) -> Tensor:
        """Rows of memory for the new keys, then for the new values: (2 B Hkv,). lengths: (B,), before the step."""
        return (self.base + lengths[:, None]).view(-1)

    def visible(self, lengths: Tensor, ragged: bool) -> Tensor:
        """Which keys the new token of each row attends to: bool, (B or 1, S)."""
        return self.places <= (lengths if ragged else lengths[:1])[:, None]

    def mask(self, lengths: Tensor, end: int, ragged: bool) -> Tensor:
        """The same as a mask to add to the scores: 0 or -inf, (B Hkv or 1, 1, S)."""
        if ragged:
            shown = torch.where(self.places <= lengths[:, None], 0.0, -math.inf).to(self.hidden.dtype)
            return shown.repeat_interleave(self.heads, dim=0)[:, None]
        return self.hidden.narrow(2, self.size - 1 - end, self.size)


@dataclass
class StandIn:
    """What a model sees of a KVCache while a decode step is recorded. update: called with new keys and values."""

    window: Window
    positions: Tensor
    """As returned by KVCache.begin: (B, 1) if the rows differ in length, else (1,)."""
    mask: Tensor
    tokens: Tensor
    on_update: Callable[[int, Tensor, Tensor], None]

    def begin(self, T: int) -> Tensor:
        return self.positions

    def seen(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        return self.tokens, self.positions

    def layer(self, index: int) -> StandInLayer:
        return StandInLayer(self, index)

    def __getattr__(self, name: str) -> Any:
        raise CannotRecord(f"the cache's {name} is read")


@dataclass
class StandInLayer:
    cache: StandIn
    index: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        cache = self.cache
        cache.on_update(self.index, k, v)
        return cache.window.keys[self.index], cache.window.values[self.index], cache.mask
