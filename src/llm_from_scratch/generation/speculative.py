"""Speculative decoding: a cheap method proposes the next tokens, and the model reads them all in one pass.

A pass over a few tokens takes little longer than over one, because both read all weights. It gives the logits of every
proposed position. The sampler draws from them one after the other, as usual. As long as it draws the proposed tokens,
the next logits are already available. So the text is the same as without proposals for every sampler and seed, up to
rounding as in another batch. (This equals speculative sampling, arXiv 2211.17192, with deterministic proposals.)

Proposals come from the text itself (prompt lookup: the tokens that followed the same few tokens earlier), which helps
if the text repeats itself, or from a smaller model with the same vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..core.cache import KVCache
from ..errors import UserError
from .batch import Batch, Decodes, Overflow

FEWEST, MOST = 2, 16  # proposals at a time: twice as many after all were right, half as many after one was wrong
LONGEST_REST = 64  # tokens without proposals after a wasted pass: twice as many each time


class Draft(Protocol):
    """Proposes the next tokens of a text."""

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        """At most n tokens; none without a proposal. tokens: all tokens so far, at least one."""
        ...

    def begin(self) -> None:
        """Starts a new text."""
        ...


class Lookup:
    """The tokens that followed the last few tokens earlier in the text: the longest match, the latest position."""

    def __init__(self, longest: int = 4, shortest: int = 2):
        self.lengths = range(longest, shortest - 1, -1)
        self.begin()

    def begin(self) -> None:
        self.places: dict[tuple[int, ...], int] = {}  # the last end position of each n-gram
        self.read = 0

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        for end in range(self.read + 1, len(tokens)):  # an n-gram at the end of the text has no continuation yet
            for length in self.lengths:
                if length <= end:
                    self.places[tuple(tokens[end - length : end])] = end
        self.read = len(tokens) - 1
        for length in self.lengths:
            place = self.places.get(tuple(tokens[len(tokens) - length :])) if length <= len(tokens) else None
            if place is not None:
                return list(tokens[place : place + n])
        return []


class DraftModel:
    """The greedy continuation of a smaller model. Raises UserError if its vocabulary differs from the model's."""

    def __init__(self, decoder: Decodes, fingerprint: str, expected: str):
        if fingerprint != expected:
            raise UserError("the draft model must have the same vocabulary as the model")
        if not decoder.cacheable:
            raise UserError("the draft model cannot use a cache, so it is slower than the model")
        self.decoder, self.block = decoder, decoder.model.eval().config.block_size
        self.cache: KVCache | None = None
        self.tokens: list[int] = []  # tokens in the cache

    @torch.inference_mode()
    def begin(self) -> None:
        if self.cache is not None:
            self.cache.advance(-len(self.tokens))
        self.tokens = []

    @torch.inference_mode()
    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        n = min(n, self.block - len(tokens))
        if n < 1:
            return []
        device = self.decoder.device
        if self.cache is None:
            self.cache = KVCache(self.decoder.model.config, 1, None, device, self.decoder.dtype)
        same = 0
        for ours, theirs in zip(self.tokens, tokens[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        self.cache.advance(same - len(self.tokens))
        self.tokens, proposed = list(tokens[:same]), list[int]()
        fresh = list(tokens[same:])
        while True:
            new = torch.tensor([fresh], device=device)
            one = len(fresh) == 1
            logits = self.decoder.step(new[0], self.cache)[0] if one else self.decoder.read(new, self.cache)[0, -1]
            self.cache.advance(len(fresh))
            self.tokens += fresh
            proposed.append(int(logits.argmax()))
            if len(proposed) == n:
                return proposed
            fresh = proposed[-1:]


class SpeculativeBatch(Batch):
    """A Batch of one row that reads ahead. known: ids from here on are padding and never proposed."""

    def __init__(
        self,
        decoder: Decodes,
        prompt: Sequence[int],
        max_new_tokens: int,
        draft: Draft,
        known: int,
        overflow: Overflow = "recompute",
    ):
        super().__init__(decoder, [prompt], max_new_tokens + MOST, True, overflow)
        self.draft, self.known, self.number = draft, known, 2 * FEWEST
        draft.begin()
        self.history = list(self.crop(prompt))
        self.ahead: deque[Tensor] = deque()  # logits of the positions read ahead, (1, V) each
        self.proposed: deque[int] = deque()
        self.rest, self.resting = 0, 0  # if proposals fail, pause them for a while
        self.hits = 0  # of the last proposals
        self.passes = self.right = self.wrong = 0

    @torch.inference_mode()
    def logits(self) -> Tensor:
        if self.ahead:
            return self.ahead.popleft()
        if self.resting:
            self.resting -= 1
        elif self.ready is None and self.cached and (room := self.block - self.lengths[0] + self.dropped[0]) > 0:
            number = min(self.number, room)
            proposed = [token for token in self.draft.propose(self.history, number) if 0 <= token < self.known]
            if proposed:
                return self._read(proposed)
        self.passes += 1
        return super().logits()

    def _read(self, proposed: list[int]) -> Tensor:
        assert self.cache is not None
        ids = torch.tensor([[self.history[-1], *proposed]], device=self.device)
        logits = self.decoder.read(ids, self.cache)[0]
        self.cache.advance(ids.size(1))
        self.passes += 1
        self.proposed, self.ahead, self.hits = deque(proposed), deque(logits.split(1)), 0
        return self.ahead.popleft()

    @torch.inference_mode()
    def append(self, ids: Tensor, first: int = 0) -> None:
        super().append(ids, first)
        token = int(ids)
        self.history.append(token)
        if not self.proposed:
            return
        if token == self.proposed.popleft():
            self.right, self.hits = self.right + 1, self.hits + 1
            if not self.proposed:
                self.number = min(MOST, 2 * self.number)
                self._judge(self.hits)
            return
        assert self.cache is not None  # drop what was read after a wrong token
        read = self.hits + 1 + len(self.proposed)
        self.cache.advance(-1 - len(self.proposed))
        self.proposed.clear()
        self.ahead.clear()
        self.wrong += 1
        self.number = max(FEWEST, self.number // 2)
        self._judge(read)

    def _judge(self, read: int) -> None:
        """Pauses proposals after a pass that cost more time than it saved. On a CPU, a pass of GPT-2 124M over 3, 5, 9,
        17 tokens takes about 2.2, 2.4, 3.1, 3.7 times as long as over a single token."""
        paid = self.hits >= 2 + read // 8
        self.rest = 0 if paid else min(LONGEST_REST, max(FEWEST, 2 * self.rest))
        self.resting = self.rest
