"""Learned embeddings of the last n tokens, in hash tables with a fixed number of rows.

A small model on little data spends its first minutes learning which characters follow which few characters. Here every
n-gram has its own vector from the start. It is zero until its row is trained, and is added to the token's embedding. An
update changes only the rows that a batch uses.

Similar to hash embeddings (arXiv 1709.03933) and the hashed n-grams of character models (CANINE, arXiv 2103.06874; BLT,
arXiv 2412.09871).
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from ..config import GPTConfig

FACTOR, MODULUS = 1_000_003, 4_294_967_291  # primes; a remainder times the factor stays below 2^63


class NGramEmbedding(nn.Module):
    """A table of ngram_rows rows for each n from 2 to max_ngram. N-grams with the same hash share a row."""

    sparse = True  # the weight's gradient; an optimizer updates only its rows

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.vocab_size is not None
        self.longest, self.rows, self.vocab_size = config.max_ngram, config.ngram_rows, config.vocab_size
        self.forget_from = self.rows  # --forget_ngrams resets the rows from here on (n > 2)
        self.weight = nn.Parameter(torch.zeros((self.longest - 1) * self.rows, config.n_embd))

    def forward(self, idx: Tensor, seen: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """idx: (B, T). Returns (B, T, C), the sum over n. The gradient of the table is sparse.

        With a cache: seen, (B, S), are all tokens so far, including idx, and positions, (B, T) or (T,), are the
        positions of idx in seen.
        """
        places = self.places(idx if seen is None else seen)  # (B, S, max_ngram - 1)
        if positions is not None:
            places = places[torch.arange(idx.size(0), device=idx.device)[:, None], positions]  # (B, T, max_ngram - 1)
        found = F.embedding_bag(places.flatten(0, 1), self.weight, mode="sum", sparse=True)
        return found.view(*idx.shape, -1)

    def places(self, idx: Tensor) -> Tensor:
        """The row in each n's table for the n tokens that end at each position: (B, S) to (B, S, max_ngram - 1).

        Positions before the first token count as one extra id. Tables that are small enough need no hashing.
        """
        ids, code, found = idx + 1, idx + 1, []
        for n in range(2, self.longest + 1):
            before = F.pad(ids, (n - 1, 0))[:, : ids.size(1)]
            exact = (self.vocab_size + 1) ** n <= self.rows
            code = code + before * (self.vocab_size + 1) ** (n - 1) if exact else (code * FACTOR + before) % MODULUS
            found.append(code % self.rows + (n - 2) * self.rows)
        return torch.stack(found, dim=-1)
