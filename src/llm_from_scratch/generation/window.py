"""The part of a KV cache that a decode step reads: 64 keys, 128, 192, ... as the longest row grows; 512, 1,024, 2,048,
... for a compiled step, which skips masked keys.

A step recorded for one Window is valid until the longest row outgrows it, and for every other cache with the same
sizes. Positions beyond a row's length are masked. A StandIn replaces the cache while a step is recorded.

Shapes: B rows, Hkv key heads, D their width, S keys in the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.cache import KVCache
from ..errors import CannotRecord

BUCKET = 64  # keys by which a window grows
DOUBLING = 512  # keys of the smallest window of a compiled step


class Window:
    """Views of a cache's memory, and the inputs of a decode step."""

    def __init__(self, cache: KVCache, whole: bool = False, compiled: bool = False):
        L, _, room, heads, max_len, width = cache.kv.shape
        fitting = max(DOUBLING, 1 << cache.end.bit_length()) if compiled else BUCKET * (cache.end // BUCKET + 1)
        size = max_len if whole else min(max_len, fitting)
        self.kv, self.rows, self.size = cache.kv, cache.rows, size
        self.key = (cache.rows, self.size, cache.kv.shape, cache.kv.dtype)
        self.memory = [cache.kv[i].view(-1, width) for i in range(L)]  # (2 room Hkv max_len, D): to write
        used = cache.kv[:, :, : self.rows, :, : self.size]
        self.keys, self.values = list(used[:, 0]), list(used[:, 1])  # (B, Hkv, S, D) each: to read
        self.tokens = cache.tokens[: self.rows, : self.size]
        device = cache.kv.device
        which, row, head = (torch.arange(n, device=device) for n in (2, self.rows, heads))
        self.base = ((which[:, None, None] * room + row[:, None]) * heads + head) * max_len  # (2, B, Hkv)
        self.places = torch.arange(self.size, device=device)
        # parameters of a recorded step that do not change between tokens
        self.parts = (self.tokens, self.memory, self.keys, self.values)

    @staticmethod
    def of(cache: KVCache, whole: bool = False, compiled: bool = False) -> Window:
        """The window for the cache's next step, stored with the cache. whole: of all the memory."""
        window: Window | None = cache.window
        if window is None or window.kv is not cache.kv or window.rows != cache.rows or cache.end >= window.size:
            window = cache.window = Window(cache, whole, compiled)
        return window

    def inputs(self, ids: Tensor, cache: KVCache, needs: frozenset[str]) -> tuple[Tensor | None, ...]:
        """The other parameters: ids, lengths, visible, where. Parameters not in needs are None.

        They start at the beginning of their memory, which the views in a record require.
        """
        lengths, visible, where = cache.lengths, None, None
        if "tokens" in needs:
            cache.tokens[torch.arange(self.rows, device=ids.device), lengths] = ids
        if "visible" in needs:  # which keys the new token of each row attends to: bool, (B or 1, S)
            visible = self.places <= (lengths if cache.ragged else lengths[:1])[:, None]
        if "where" in needs:  # rows of memory for the new keys, then for the new values: (2 B Hkv,)
            where = (self.base + lengths[:, None]).view(-1)
        return ids if ids.is_contiguous() and not ids.storage_offset() else ids.clone(), lengths, visible, where


@dataclass
class StandIn:
    """The KVCache as a model sees it while a decode step is recorded."""

    window: Window
    positions: Tensor
    """As returned by KVCache.begin: (B, 1) if the rows differ in length, else (1,)."""
    mask: Tensor
    where: Tensor

    def begin(self, T: int) -> Tensor:
        return self.positions

    def seen(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        return self.window.tokens, self.positions

    def layer(self, index: int) -> StandInLayer:
        return StandInLayer(self, index)

    def __getattr__(self, name: str) -> Any:
        raise CannotRecord(f"the cache's {name} is read")


@dataclass
class StandInLayer:
    cache: StandIn
    index: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        window, i, (B, heads, T, D) = self.cache.window, self.index, k.shape
        if T != 1 or k.dtype != window.kv.dtype or v.dtype != window.kv.dtype:
            raise CannotRecord(f"keys of {T} tokens in {k.dtype} do not fit the cache")
        memory, where, apart = window.memory[i], self.cache.where, heads * k.stride(1)
        beside = k.stride() == v.stride() and v.storage_offset() - k.storage_offset() == apart
        if beside and k.untyped_storage()._cdata == v.untyped_storage()._cdata:  # as in the result of one product
            both = k.as_strided((2, B, heads, D), (apart, *k.stride()[:2], k.stride(3)))
            memory.index_copy_(0, where, both.reshape(-1, D))
        else:
            for t, part in zip((k, v), where.chunk(2), strict=True):
                memory.index_copy_(0, part, t.reshape(-1, D))
        return window.keys[i], window.values[i], self.cache.mask
