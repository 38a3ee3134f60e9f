"""Exact log-likelihoods of continuations after contexts, in float32, in as few passes over tokens as possible.

A context that several continuations share is read once, and so is a beginning that many contexts share, such as the
examples of a few-shot prompt. Batches are ordered by length.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.cache import KVCache
from ..errors import UserError
from ..machine.device import is_out_of_memory
from ..machine.processes import sum_over_ranks
from .batch import rows_at_once
from .generator import Generator, evaluating

PASS_TOKENS = 4096  # of a forward pass, with padding
PASS_LOGITS = 1 << 26  # of a forward pass: 256 MiB in float32
LEAST_SHARED, WORTH_A_PASS = 16, 256  # tokens of a common beginning; tokens saved by reading it once
Ids = tuple[int, ...]
T = TypeVar("T")
Score = tuple[float, bool]  # log-likelihood, whether every token is the most likely one


class Likelihoods:
    """Scores of a generator's model. rows: contexts per forward pass; None: automatic. before_batch: called before
    every batch, and may raise to end the work. share: (rank, processes) that each compute a part and get all."""

    def __init__(
        self, generator: Generator, rows: int | None = None, before_batch: Callable[[], None] = lambda: None,
        share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        self.generator, self.rows, self.before_batch, self.share = generator, rows, before_batch, share
        self.config, self.decoder = generator.model.config, generator.decoder
        self.found: dict[tuple[Ids, Ids], Score] = {}

    def scores(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Score]:
        """For (context, continuation), at least one token each. What exceeds the model's context is cut from the left.
        Raises UserError for a continuation that does not fit in it."""
        block, self.found, self.decoder = self.config.block_size, {}, self.generator.decoder
        fitting: list[tuple[Ids, Ids]] = []
        for context, after in pairs:
            if len(after) > block:
                raise UserError(f"a continuation has {len(after)} tokens, more than block_size={block}")
            fitting.append((context[max(0, len(context) + len(after) - block - 1) :], after))
        continuations: dict[Ids, list[Ids]] = defaultdict(list)
        every = list(dict.fromkeys(fitting))
        for context, after in part_of(every, *self.share):
            continuations[context].append(after)
        whole: list[tuple[Ids, Ids]] = []
        for context, group in list(continuations.items()):
            if not self.decoder.cacheable or (len(group) == 1 and len(group[0]) > len(context)):
                whole += [(context, after) for after in continuations.pop(context)]
        whole.sort(key=lambda pair: -len(pair[0]) - len(pair[1]))
        with evaluating(self.generator.model), torch.inference_mode():
            for batch in _batches(whole, lambda pair: (len(pair[0]) + len(pair[1]) - 1,), self._fits_whole):
                self._try(self._read_whole, batch)
            for shared, contexts in families(list(continuations)):
                self._read_family(shared, {context: continuations[context] for context in contexts})
        flat = [number for pair in every for number in self.found.get(pair, (0.0, False))]
        flat = sum_over_ranks(flat, self.decoder.device, self.share[1])
        self.found = {pair: (flat[2 * i], bool(flat[2 * i + 1])) for i, pair in enumerate(every)}
        return [self.found[pair] for pair in fitting]

    # whether a forward pass may have so many rows; lengths with padding

    def _fits_whole(self, rows: int, tokens: int) -> bool:
        most = (self.rows or rows) if self.decoder.cacheable else 1  # else the model needs sequences without padding
        vocab_size = self.config.vocab_size or 1
        return rows <= most and rows * tokens <= min(PASS_TOKENS, PASS_LOGITS // vocab_size)

    def _fits(self, rows: int, tokens: int, length: int, more: int) -> bool:
        """tokens: of the pass; length: with those in the cache; more: that follow in further passes."""
        most = self.rows or rows_at_once(self.config, length + more, self.decoder.dtype, self.decoder.device)
        return rows <= most and rows * tokens <= PASS_TOKENS and length + more <= self.config.block_size

    def _try(self, read: Callable[..., None], batch: list[Any], *more: Any) -> None:
        """Reads a batch, in halves if memory runs out."""
        self.before_batch()
        try:
            return read(batch, *more)
        except Exception as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._try(read, half, *more)

    def _read_whole(self, batch: list[tuple[Ids, Ids]]) -> None:
        """Each context with its continuation in one pass."""
        ids = self._padded([(context + after)[:-1] for context, after in batch])
        logits = self.decoder.read(ids, self._cache(*ids.shape))  # (B, T, V)
        for row, (context, after) in enumerate(batch):
            begin = len(context) - 1
            self.found[context, after] = _score(logits[row, begin : begin + len(after)], self._tensor(after))

    def _read_family(self, shared: int, continuations: dict[Ids, list[Ids]]) -> None:
        """Contexts with the same first `shared` tokens, which are read once."""
        beginning, after = None, {c: max(map(len, group)) - 1 for c, group in continuations.items()}
        contexts = sorted(continuations, key=lambda context: (-len(context), context))
        if shared:
            beginning = self._cache(1, max(map(len, contexts)) + max(after.values()))
            self.decoder.read(self._padded([contexts[0][:shared]]), beginning, self._tensor([shared - 1]))
            beginning.advance(shared)
        for batch in _batches(contexts, lambda c: (len(c) - shared, len(c), after[c]), self._fits):
            self._try(self._read_contexts, batch, beginning, shared, continuations)

    def _read_contexts(
        self, batch: list[Ids], beginning: KVCache | None, shared: int, continuations: dict[Ids, list[Ids]]
    ) -> None:
        """One pass over the contexts gives the first token of each continuation, further passes give the others."""
        rows = [(row, after) for row, context in enumerate(batch) for after in continuations[context]]
        rests = [context[shared:] for context in batch]
        counts = list(map(len, rests))
        if beginning is None:
            cache = self._cache(len(batch), max(counts) + max(len(after) for _, after in rows) - 1)
        else:
            cache = beginning.select(self._tensor([0] * len(batch)))
        last = self._tensor([count - 1 for count in counts])
        logits = self.decoder.read(self._padded(rests), cache, last)[:, 0].float()  # (B, V)
        cache.advance(counts)
        best = logits.argmax(dim=1).tolist()
        # log_softmax, as in the harness and in our server: logsumexp differs from it by 1e-5 for large vocabularies
        chosen = logits.log_softmax(dim=1)[[row for row, _ in rows], [after[0] for _, after in rows]].tolist()
        for (row, after), likelihood in zip(rows, chosen, strict=True):
            self.found[batch[row], after] = likelihood, best[row] == after[0]
        del logits
        rows = sorted((pair for pair in rows if len(pair[1]) > 1), key=lambda pair: -len(pair[1]))
        vocab_size, reached = self.config.vocab_size or 1, cache.end

        def fits(rows: int, tokens: int) -> bool:
            most = rows_at_once(self.config, reached + tokens, self.decoder.dtype, self.decoder.device)
            return rows <= most and rows * tokens <= min(PASS_TOKENS, PASS_LOGITS // vocab_size)

        for part in _batches(rows, lambda pair: (len(pair[1]) - 1,), fits):
            ids = self._padded([after[:-1] for _, after in part])
            logits = self.decoder.read(ids, cache.select(self._tensor([row for row, _ in part])))  # (N, T, V)
            for place, (row, after) in enumerate(part):
                first, was_best = self.found[batch[row], after]
                rest, is_best = _score(logits[place, : len(after) - 1], self._tensor(after[1:]))
                self.found[batch[row], after] = first + rest, was_best and is_best

    def _cache(self, rows: int, length: int) -> KVCache:
        return KVCache(self.config, rows, length, self.decoder.device, self.decoder.dtype)

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=self.decoder.device)

    def _padded(self, rows: Sequence[Ids]) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.decoder.device)


def part_of(pairs: list[tuple[Ids, Ids]], rank: int, processes: int) -> list[tuple[Ids, Ids]]:
    """The part of a process: about as many tokens as the others, with contexts that begin alike together."""
    if processes == 1:
        return pairs
    ordered, found, before = sorted(pairs), list[tuple[Ids, Ids]](), 0
    total = sum(len(context) + len(after) for context, after in pairs)
    for pair in ordered:
        if before * processes // total == rank:
            found.append(pair)
        before += len(pair[0]) + len(pair[1])
    return found


def _score(logits: Tensor, targets: Tensor) -> Score:
    """Scores of tokens, (T,), under logits, (T, V)."""
    logits = logits.float()
    likelihoods = logits.log_softmax(dim=1).gather(1, targets[:, None])
    return float(likelihoods.double().sum()), bool((logits.argmax(dim=1) == targets).all())


def _batches(
    items: Sequence[T], sizes_of: Callable[[T], tuple[int, ...]], fits: Callable[..., bool]
) -> Iterator[list[T]]:
    """Neighbours together, as many as fit in a pass: fits(number, *largest of each size)."""
    batch: list[T] = []
    largest: tuple[int, ...] = ()
    for item in items:
        sizes = sizes_of(item)
        grown = tuple(map(max, largest, sizes)) if batch else sizes
        if batch and not fits(len(batch) + 1, *grown):
            yield batch
            batch, grown = [], sizes
        batch.append(item)
        largest = grown
    if batch:
        yield batch


def families(contexts: Sequence[Ids]) -> list[tuple[int, list[Ids]]]:
    """Contexts by their beginning: (number of first tokens that are the same, contexts). At least one token of each
    is its own. Contexts that share too little come first."""
    found: list[tuple[int, list[Ids]]] = []
    for context in sorted(contexts):
        if found:
            shared, members = found[-1]
            common = min(len(os.path.commonprefix([members[-1], context])), shared, len(context) - 1)
            if common >= LEAST_SHARED and 2 * common >= shared:
                found[-1] = common, [*members, context]
                continue
        found.append((len(context) - 1, [context]))
    large = [(shared, members) for shared, members in found if shared * (len(members) - 1) >= WORTH_A_PASS]
    rest = [context for shared, members in found if (shared, members) not in large for context in members]
    return ([(0, rest)] if rest else []) + large
