"""Keys and values of the tokens that a model has seen, so that the next one costs a pass over itself alone.

An argument of the model's forward, never an attribute: the training model cannot see it. Shapes as in model.py.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..config import GPTConfig


class KVCache:
    """Keys and values of the tokens seen so far, for a batch of rows of different length.

    Rows are filled from the left. A forward pass over (B, T) writes row b at positions lengths[b] ...
    lengths[b] + T - 1; the caller then says by advance() how many of them count. Prompts of different length are
    padded on the right: what lies beyond a row's length is masked, and overwritten by the row's next tokens.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        heads, width = config.n_kv_head or config.n_head, config.n_embd // config.n_head
        self.max_len = max_len or config.block_size
        shape = (config.n_layer, batch_size, heads, self.max_len, width)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.end = 0  # length of the longest row, on the host: no device sync to read it
        self.ragged = False  # whether rows differ in length
        self.positions: Tensor | None = None
        self.mask: Tensor | None = None
        self.tokens = torch.zeros(batch_size, self.max_len, dtype=torch.long, device=device)  # where n-grams need them

    def begin(self, T: int) -> Tensor:
        """Readies the cache for a pass over T new tokens a row. Returns their positions, (B, T) or (T,)."""
        if self.end + T > self.max_len:
            raise ValueError(f"{self.end} cached + {T} new tokens exceed the cache's max_len={self.max_len}")
        steps = torch.arange(T, device=self.lengths.device)
        self.positions = self.lengths[:, None] + steps if self.ragged else self.end + steps
        self.mask = None
        if self.end and (self.ragged or T > 1):
            keys = torch.arange(self.end + T, device=self.lengths.device)
            self.mask = (keys <= self.positions[..., None]).view(-1, 1, T, self.end + T)  # (B or 1, 1, T, S)
        return self.positions

    def seen(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """After begin: stores idx, (B, T). Returns all tokens so far, (B, S), and the positions of idx."""
        assert self.positions is not None
        rows = torch.arange(idx.size(0), device=idx.device)[:, None]
        self.tokens[rows, self.positions] = idx
        return self.tokens[:, : self.end + idx.size(1)], self.positions

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, index)

    def advance(self, n: int | Tensor) -> None:
        """Counts n more tokens as valid: one number for all rows, or one a row, (B,)."""
        self.lengths = self.lengths + n
        if isinstance(n, int):
            self.end += n
        else:
            shortest, self.end = (int(t) for t in torch.aminmax(self.lengths))
            self.ragged = shortest != self.end

    def select(self, rows: Tensor) -> KVCache:
        """A cache of the named rows, (N,), in that order; a row may be named more than once."""
        new = object.__new__(KVCache)
        new.__dict__.update(self.__dict__)
        new.k, new.v = self.k.index_select(1, rows), self.v.index_select(1, rows)
        new.lengths, new.tokens = self.lengths.index_select(0, rows), self.tokens.index_select(0, rows)
        new.advance(torch.zeros_like(new.lengths))
        return new


@dataclasses.dataclass
class LayerCache:
    """One layer's part of a KVCache."""

    cache: KVCache
    index: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores new keys and values, (B, Hkv, T, D). Returns all of them, (B, Hkv, S, D), and the mask."""
        cache, T = self.cache, k.size(2)
        keys, values = cache.k[self.index], cache.v[self.index]
        if cache.ragged:
            assert cache.positions is not None
            rows = torch.arange(k.size(0), device=k.device)[:, None]
            keys[rows, :, cache.positions] = k.transpose(1, 2).to(keys.dtype)
            values[rows, :, cache.positions] = v.transpose(1, 2).to(values.dtype)
        else:
            keys[:, :, cache.end : cache.end + T] = k
            values[:, :, cache.end : cache.end + T] = v
        if cache.end == 0:  # the first pass sees only itself: the plain causal kernel
            return k, v, None
        return keys[:, :, : cache.end + T], values[:, :, : cache.end + T], cache.mask
