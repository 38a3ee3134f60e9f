"""Token ids from a model, many rows at once: prefill, then decode with a key/value cache.

A prompt is read once (prefill), however many rows begin with it; then all rows grow together by one token a step
(decode). The cache changes the time only: the logits are those of the naive way, which runs the whole context anew for
every token (GPT.generate, or use_cache=False here). A context of block_size tokens is full, and the next token moves
the window. What then:

    overflow="recompute"   the last block_size tokens are run anew for every token: exact, what nanoGPT does
    overflow="drop_half"   the older half is dropped, the newer half is run once, and the cache goes on: much faster,
                           but the model then sees block_size / 2 to block_size tokens, so the text is another one

Shapes in comments: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import UserError
from ..core.cache import KVCache
from ..core.model import GPT

Overflow = Literal["recompute", "drop_half"]


class Batch:
    """Rows that are decoded together: logits(), then append() of one token each, again and again.

    prompts: token ids of each row, at least one; only the last block_size are read. Equal prompts share their prefill.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        use_cache: bool = True,
        overflow: Overflow = "recompute",
    ):
        if overflow not in get_args(Overflow):
            raise UserError(f"overflow={overflow!r} is not one of {', '.join(get_args(Overflow))}")
        self.model, self.block = model, model.config.block_size
        self.window = self.block if overflow == "recompute" else (self.block + 1) // 2  # what a full row keeps
        self.device = model.lm_head.weight.device
        cropped = [tuple(prompt[-self.block :]) for prompt in prompts]
        self.lengths = [len(prompt) for prompt in cropped]  # on the host: no device sync to read them
        self.dropped = [0] * len(prompts)  # tokens at the start of a row that its window has left behind
        self.ends = torch.tensor(self.lengths, device=self.device)  # lengths, on the device
        self.tokens = _padded(cropped, self.device)  # (B, longest); grows on the right
        self.ready: Tensor | None = None  # logits that the prefill has computed already
        self.cache: KVCache | None = None
        self.cached: list[int] = []  # rows in the cache, in its order
        self.uncached = list(range(len(prompts)))
        if use_cache:
            distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(cropped))}
            room = min(self.block, max(self.lengths) + max_new_tokens)
            cache, logits = self._prefill(_padded(list(distinct), self.device), [len(p) for p in distinct], room)
            rows = torch.tensor([distinct[prompt] for prompt in cropped], device=self.device)
            self.cache = cache.select(rows) if len(distinct) < len(rows) else cache
            self.ready, self.cached, self.uncached = logits[rows], self.uncached, []

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
            return self._decode()
        groups: dict[int, list[int]] = {}  # by context length, so that no row needs padding
        for row in self.uncached:
            groups.setdefault(self.lengths[row] - self.dropped[row], []).append(row)
        parts = [self.model(self._last(rows, n))[0][:, -1] for n, rows in groups.items()]
        order = [row for rows in groups.values() for row in rows]
        if self.cached:
            parts, order = [*parts, self._decode()], order + self.cached
        return torch.cat(parts)[torch.tensor(order, device=self.device).argsort()]

    @torch.inference_mode()
    def append(self, ids: Tensor) -> None:
        """Adds one token to every row. ids: (B,) int64."""
        if max(self.lengths) == self.tokens.size(1):
            self.tokens = F.pad(self.tokens, (0, self.tokens.size(1) + self.block))
        self.tokens.scatter_(1, self.ends[:, None], ids[:, None])
        self.ends += 1
        self.lengths = [n + 1 for n in self.lengths]

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Leaves only the named rows, in that order."""
        index, place = torch.tensor(rows, device=self.device), {old: new for new, old in enumerate(rows)}
        self._keep_cached([row for row in self.cached if row in place])
        self.cached = [place[row] for row in self.cached]
        self.uncached = [place[row] for row in self.uncached if row in place]
        self.tokens, self.ends = self.tokens[index], self.ends[index]
        self.lengths, self.dropped = [self.lengths[r] for r in rows], [self.dropped[r] for r in rows]

    def _prefill(self, ids: Tensor, lengths: list[int], room: int) -> tuple[KVCache, Tensor]:
        """Runs prompts, (N, T) padded on the right, through the model: the filled cache and the logits, (N, V)."""
        weight = self.model.lm_head.weight
        cache = KVCache(self.model.config, len(ids), room, self.device, self.model.compute_dtype or weight.dtype)
        counts = torch.tensor(lengths, device=self.device)
        logits = self.model(ids, cache=cache, logits_at=counts - 1)[0][:, 0]
        cache.advance(counts)
        return cache, logits

    def _decode(self) -> Tensor:
        """Logits of the rows in the cache, in its order, from their newest tokens."""
        assert self.cache is not None
        logits = self.model(self._last(self.cached, 1), cache=self.cache)[0][:, -1]
        self.cache.advance(1)
        return logits

    def _last(self, rows: list[int], n: int) -> Tensor:
        """The last n tokens of the named rows, (len(rows), n)."""
        tokens, ends = self.tokens, self.ends
        if len(rows) < len(self.lengths):
            index = torch.tensor(rows, device=self.device)
            tokens, ends = tokens[index], ends[index]
        return tokens.gather(1, ends[:, None] + torch.arange(-n, 0, device=self.device))

    def _move_windows(self, full: list[int]) -> None:
        """Shortens the context of full rows. Learned and rotary positions begin anew, so their cache is void."""
        for row in full:
            self.dropped[row] = self.lengths[row] - self.window
        full = [row for row in self.cached if row in set(full)]
        if not full:
            return
        if self.window == self.block:  # recompute: a cache would be void again after the next token
            self._keep_cached([row for row in self.cached if row not in set(full)])
            self.uncached = sorted([*self.uncached, *full])
            return
        assert self.cache is not None
        places = torch.tensor([self.cached.index(row) for row in full], device=self.device)
        n = self.window - 1  # the newest token is left to the decode step
        if n:
            fresh, _ = self._prefill(self._last(full, self.window)[:, :-1], [n] * len(full), n)
            self.cache.k[:, places, :, :n], self.cache.v[:, places, :, :n] = fresh.k, fresh.v
            self.cache.tokens[places, :n] = fresh.tokens
        self.cache.lengths = self.cache.lengths.index_fill(0, places, n)
        self.cache.advance(torch.zeros_like(self.cache.lengths))

    def _keep_cached(self, rows: list[int]) -> None:
        if self.cache is not None and len(rows) < len(self.cached):
            index = torch.tensor([self.cached.index(row) for row in rows], device=self.device)
            self.cache = self.cache.select(index) if rows else None
        self.cached = rows


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of different length as one tensor (len(rows), longest), with zeros on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
