"""Token ids from a model for many rows at once: prefill, then decode with a key/value cache.

A prompt is read once (prefill), even if many rows begin with it. Then all rows grow together by one token per step
(decode). Rows may join and leave at any step. The cache changes only the speed: the logits are the same as without it
(use_cache=False: the whole context again for every token).

A context of block_size tokens is full; the next token moves the window:

    overflow="recompute"  run the last block_size tokens again for every token: exact, as in nanoGPT
    overflow="drop_half"  drop the older half, run the newer half once, keep using the cache: much faster, but the
                          model then sees block_size / 2 to block_size tokens, so the text differs

Shapes in comments: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import GPTConfig
from ..core.cache import KVCache
from ..errors import UserError

CACHE_BYTES = 1 << 30  # rows whose caches need more than this are decoded in groups; the result is the same
Overflow = Literal["recompute", "drop_half"]
Prompts = Sequence[Sequence[int]]


class Decodes(Protocol):
    """The interface of a model for decoding: Decoder in generator.py."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    cacheable: bool

    def read(self, idx: Tensor, cache: KVCache | None = None, logits_at: Tensor | None = None) -> Tensor: ...

    def step(self, ids: Tensor, cache: KVCache) -> Tensor: ...

    def slide(self, idx: Tensor) -> Tensor: ...


class Prefill:
    """Prompts that are read in parts, so that other rows do not wait for a long one.

    prompts: token ids, 1 to block_size each. Equal prompts are read once. observe: called with the position of each
    part and its logits, (T, V); for a single prompt.
    """

    def __init__(
        self,
        decoder: Decodes,
        prompts: Prompts,
        room: int = 0,
        observe: Callable[[int, Tensor], None] | None = None,
    ):
        device = decoder.device
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.decoder, self.lengths = decoder, [len(prompt) for prompt in places]
        self.place = [places[tuple(prompt)] for prompt in prompts]
        self.ids = _padded(list(places), device)  # (N, T)
        longest = self.ids.size(1)
        self.cache = KVCache(decoder.model.config, len(places), max(room, longest), device, decoder.dtype)
        self.logits: Tensor | None = None  # (N, V), of each prompt's last token
        self.read, self.observe = 0, observe

    @torch.inference_mode()
    def step(self, tokens: int | None = None) -> bool:
        """Reads the next tokens of each prompt (None: all). Returns whether all prompts are complete."""
        if not self.decoder.cacheable:
            return self._read_whole()
        begin, end = self.read, min(self.ids.size(1), self.read + (tokens or self.ids.size(1)))
        counts = [min(end, n) - min(begin, n) for n in self.lengths]
        at = torch.tensor([max(0, count - 1) for count in counts], device=self.ids.device)
        if self.observe is None:
            logits = self.decoder.read(self.ids[:, begin:end], self.cache, at)[:, 0]
        else:
            every = self.decoder.read(self.ids[:, begin:end], self.cache)
            self.observe(begin, every[0])
            logits = every[:, -1]
        self.cache.advance(counts)
        fresh = torch.tensor([count > 0 for count in counts], device=self.ids.device)[:, None]
        self.logits = logits if self.logits is None else torch.where(fresh, logits, self.logits)
        self.read = end
        return end == self.ids.size(1)

    def _read_whole(self) -> bool:
        """For models that need whole sequences: one prompt at a time, without padding and without the cache."""
        config, last = self.decoder.model.config, []
        for ids, n in zip(self.ids, self.lengths, strict=True):
            fresh = KVCache(config, 1, n, ids.device, self.decoder.dtype)  # with one, all logits are returned
            every = self.decoder.read(ids[None, :n], fresh)[0]
            if self.observe is not None:
                self.observe(0, every)
            last.append(every[-1])
        self.logits, self.read = torch.stack(last), self.ids.size(1)
        return True


class Batch:
    """Rows that are decoded together: logits(), then append() of one token each, repeatedly.

    prompts: token ids of each row, at least one; only the last block_size are read. max_new_tokens: how many will be
    appended to each row, for the size of the cache.
    """

    def __init__(
        self,
        decoder: Decodes,
        prompts: Prompts,
        max_new_tokens: int,
        use_cache: bool = True,
        overflow: Overflow = "recompute",
    ):
        if overflow not in get_args(Overflow):
            raise UserError(f"overflow={overflow!r} is not one of {', '.join(get_args(Overflow))}")
        self.decoder, self.config = decoder, decoder.model.config
        self.block, self.use_cache = self.config.block_size, use_cache and decoder.cacheable
        self.window = self.block if overflow == "recompute" else (self.block + 1) // 2  # tokens that a full row keeps
        self.device = decoder.device
        self.lengths: list[int] = []  # on the host: no device sync to read them
        self.dropped: list[int] = []  # tokens at the start of a row that its window has left behind
        self.tokens = torch.zeros(0, 0, dtype=torch.long, device=self.device)  # (B, longest); grows on the right
        self.ends = self.tokens.new_zeros(0)  # lengths, on the device
        self.newest = self.tokens.new_zeros(0)  # the last token of each row
        self.ready: Tensor | None = None  # logits that the prefill has computed already
        self.cache: KVCache | None = None
        self.cached: list[int] = []  # rows in the cache, in its order
        self.uncached: list[int] = []
        self.order: Tensor | None = None  # cached on the device, if it is not 0, 1, ...
        if prompts:
            self.ready = self.join(prompts, max_new_tokens)

    def crop(self, prompt: Sequence[int]) -> Sequence[int]:
        """The part of a prompt that is read."""
        return prompt[-self.block :]

    @torch.inference_mode()
    def join(self, prompts: Prompts, max_new_tokens: int, prefill: Prefill | None = None) -> Tensor | None:
        """Appends rows. Returns their logits, (n, V); None without a cache: call logits() for all rows.

        prefill: these prompts after crop(), if they have been read already.
        """
        cropped = [self.crop(prompt) for prompt in prompts]
        first, n, longest = len(self.lengths), len(prompts), max(map(len, cropped))
        fresh = _padded(cropped, self.device)
        width = max(longest, self.tokens.size(1))
        self.tokens = torch.cat([F.pad(t, (0, width - t.size(1))) for t in (self.tokens, fresh)])
        lengths = [len(prompt) for prompt in cropped]
        self.lengths, self.dropped = self.lengths + lengths, self.dropped + [0] * n
        self.ends = torch.cat((self.ends, torch.tensor(lengths, device=self.device)))
        newest = torch.tensor([prompt[-1] for prompt in cropped], device=self.device, dtype=torch.long)
        self.newest = torch.cat((self.newest, newest))
        rows = list(range(first, first + n))
        if not self.use_cache:
            self.uncached += rows
            if prefill is None or prefill.logits is None:
                return None
            return prefill.logits[torch.tensor(prefill.place, device=self.device)]
        room = min(self.block, longest + max_new_tokens)
        if prefill is None:
            prefill = Prefill(self.decoder, cropped, room if self.cache is None else 0)
            prefill.step()
        assert prefill.logits is not None
        places = torch.tensor(prefill.place, device=self.device)
        if self.cache is None and prefill.cache.max_len >= room and len(set(prefill.place)) == n:
            self.cache = prefill.cache  # not needed elsewhere
        else:
            if self.cache is None:
                self.cache = KVCache(self.config, 0, 1, self.device, prefill.cache.kv.dtype)
            self.cache.join(prefill.cache, prefill.place, self._grown(first + n), room)
        self.cached += rows
        self._ordered()
        return prefill.logits[places]

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Next-token logits of every row, (B, V)."""
        if self.ready is not None:
            ready, self.ready = self.ready, None
            return ready
        full = [row for row, n in enumerate(self.lengths) if n - self.dropped[row] > self.block]
        if full:
            self._move_windows(full)
        if not self.uncached:
            logits = self._decode()
            return logits if self.order is None else logits[self.order.argsort()]
        groups: dict[int, list[int]] = {}  # by context length, so that no row needs padding
        for row in self.uncached:
            groups.setdefault(self.lengths[row] - self.dropped[row], []).append(row)
        read = self.decoder.slide if self.use_cache else self.decoder.read
        parts = [read(self._last(rows, n))[:, -1] for n, rows in groups.items()]
        order = [row for rows in groups.values() for row in rows]
        if self.cached:
            parts, order = [*parts, self._decode()], order + self.cached
        return torch.cat(parts)[torch.tensor(order, device=self.device).argsort()]

    @torch.inference_mode()
    def append(self, ids: Tensor, first: int = 0) -> None:
        """Adds one token to every row from the first on. ids: (B - first,) int64."""
        self.newest = torch.cat((self.newest[:first], ids)) if first else ids
        self.lengths = [n + (row >= first) for row, n in enumerate(self.lengths)]
        if max(self.lengths) > self.tokens.size(1):
            self.tokens = F.pad(self.tokens, (0, self.block))
        self.tokens[first:].scatter_(1, self.ends[first:, None], ids[:, None])
        self.ends[first:] += 1

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Keeps only the given rows, in that order."""
        index = torch.tensor(rows, device=self.device, dtype=torch.long)
        place = {old: new for new, old in enumerate(rows)}
        self._leave_cache([row for row in self.cached if row not in place])
        self.cached = [place[row] for row in self.cached]
        self.uncached = [place[row] for row in self.uncached if row in place]
        self.tokens, self.ends, self.newest = self.tokens[index], self.ends[index], self.newest[index]
        self.tokens = self.tokens if rows else self.tokens[:, :0]
        self.ready = None if self.ready is None else self.ready[index]
        self.lengths, self.dropped = [self.lengths[r] for r in rows], [self.dropped[r] for r in rows]
        self._ordered()

    def _decode(self) -> Tensor:
        """Logits of the rows in the cache, in cache order, from their newest tokens."""
        assert self.cache is not None
        newest = self.newest if self.order is None else self.newest[self.order]
        logits = self.decoder.step(newest, self.cache)
        self.cache.advance(1)
        return logits

    def _last(self, rows: list[int], n: int) -> Tensor:
        """The last n tokens of the given rows, (len(rows), n)."""
        tokens, ends = self.tokens, self.ends
        if rows != list(range(len(self.lengths))):
            index = torch.tensor(rows, device=self.device)
            tokens, ends = tokens[index], ends[index]
        return tokens.gather(1, ends[:, None] + torch.arange(-n, 0, device=self.device))

    def _move_windows(self, full: list[int]) -> None:
        """Shortens the context of full rows. Positions start again from 0, so their cache is discarded."""
        for row in full:
            self.dropped[row] = self.lengths[row] - self.window
        full = [row for row in self.cached if row in set(full)]
        if not full:
            return
        if self.window == self.block:  # recompute: a cache would be void again after the next token
            self._leave_cache(full)
            self.uncached = sorted([*self.uncached, *full])
            self._ordered()
            return
        assert self.cache is not None
        places = [self.cached.index(row) for row in full]
        n = self.window - 1  # the newest token is left to the decode step
        if n:
            fresh = KVCache(self.config, len(full), n, self.device, self.cache.kv.dtype)
            at = torch.full((len(full),), n - 1, device=self.device)  # no logits are needed: as few as possible
            self.decoder.read(self._last(full, self.window)[:, :-1], fresh, at)
            fresh.advance(n)
            self.cache.put(places, fresh, range(len(full)))
        else:
            self.cache.advance([-self.cache.counts[i] * (i in places) for i in range(self.cache.rows)])

    def _leave_cache(self, rows: list[int]) -> None:
        for row in rows:
            assert self.cache is not None
            place = self.cached.index(row)
            self.cache.drop(place)
            last = self.cached.pop()
            if place < len(self.cached):
                self.cached[place] = last

    def _ordered(self) -> None:
        straight = self.cached == list(range(len(self.lengths)))
        self.order = None if straight else torch.tensor(self.cached, device=self.device)

    def _grown(self, rows: int) -> int:
        """Rows to allocate: twice as many if more rows arrive than fit."""
        assert self.cache is not None
        return rows if not self.cache.room or rows <= self.cache.room else max(rows, 2 * self.cache.room)


def rows_at_once(config: GPTConfig, length: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows with this many tokens fit into CACHE_BYTES, or into a quarter of a GPU's free memory."""
    width = (config.n_kv_head or config.n_head) * config.head_width
    row = 2 * config.n_layer * width * min(length, config.block_size) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CACHE_BYTES
    return max(1, int(free / row))


def _padded(rows: Prompts, device: torch.device) -> Tensor:
    """Rows of different lengths as one tensor (len(rows), longest), padded with zeros on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device, dtype=torch.long)
