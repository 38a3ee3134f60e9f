"""The state of sampling: the settings, random stream and drawn tokens of each row. The functions are in sampling.py."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import GenerationConfig
from ..errors import UserError
from .sampling import FILTERS, GREEDY_BELOW, draw, keep_likely, presence_frequency_penalty, repetition_penalty

Prompts = Sequence[Sequence[int]]


def check_bias(params: GenerationConfig, vocab_size: int) -> None:
    """Raises UserError if logit_bias has an id that is not a token."""
    if strange := [token for token in params.logit_bias if not 0 <= token < vocab_size]:
        raise UserError(f"logit_bias names token {strange[0]}, which is outside the vocabulary: 0 to {vocab_size - 1}")


class Sampler:
    """Draws the next tokens of a batch. Holds each row's random stream, and its token counts for the penalties.

    Rows with the same filters are filtered together; a row does not depend on its neighbours. params: for all rows, or
    one per row. Raises UserError if logit_bias has an id that is not a token.
    """

    filters = FILTERS
    CHUNK = 256  # random numbers drawn at once per row; the streams do not depend on it

    def __init__(
        self,
        params: GenerationConfig | Sequence[GenerationConfig],
        prompts: Prompts,
        seeds: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ):
        rows = len(prompts)
        self.params = [params] * rows if isinstance(params, GenerationConfig) else list(params)
        self.vocab_size, self.device = vocab_size, device
        for p in self.params:
            check_bias(p, vocab_size)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # float64 if the device has it: in float32 the rarest of 50,000 tokens would be lost to rounding
        real = torch.float32 if device.type == "mps" else torch.float64
        self.uniforms = torch.empty(rows, self.CHUNK, dtype=real, device=device)
        self.used = [self.CHUNK] * rows  # of each row's random numbers, on the host
        self._configure()
        self.counts = torch.zeros(rows, vocab_size if self.penalised else 0, device=device)  # of generated tokens
        self.seen = self.counts.bool()  # in the prompt or generated
        for row, prompt in enumerate(prompts if self.penalised else ()):
            self.seen[row, torch.as_tensor(prompt, dtype=torch.long, device=device)] = True

    def _configure(self) -> None:
        """Tensors derived from the rows' settings."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row, p in enumerate(self.params):
            settings = tuple(getattr(p, name) for name in self.filters)
            groups.setdefault(() if p.temperature < GREEDY_BELOW else settings, []).append(row)
        self.groups = [
            (self.params[rows[0]], None if len(groups) == 1 else torch.tensor(rows, device=self.device))
            for rows in groups.values()
        ]
        penalties = [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in self.params]
        self.penalised = any(penalty != [1, 0, 0] for penalty in penalties)
        if self.penalised:
            self.penalties = torch.tensor(penalties, device=self.device).split(1, dim=1)  # (B, 1) each
        self.bias: Tensor | None = None
        if any(p.logit_bias for p in self.params):
            self.bias = torch.zeros(len(self.params), self.vocab_size, device=self.device)
            for row, p in enumerate(self.params):
                for token, value in p.logit_bias.items():
                    self.bias[row, token] = value

    def draw(self, logits: Tensor) -> Tensor:
        """The next token of every row, (B,) int64, from the model's logits, (B, V)."""
        logits = logits.float()
        if self.bias is not None:
            logits = logits + self.bias
        if self.penalised:
            repetition, presence, frequency = self.penalties
            logits = repetition_penalty(logits, self.seen, repetition)
            logits = presence_frequency_penalty(logits, self.counts, presence, frequency)
        if len(self.groups) == 1:
            ids = self.choose(logits, *self.groups[0])
        else:
            ids = torch.empty(len(logits), dtype=torch.long, device=self.device)
            numbers = self.next_uniforms()
            for params, rows in self.groups:
                assert rows is not None
                ids[rows] = self.choose(logits[rows], params, rows, numbers[rows])
        self.note(ids)
        return ids

    def choose(
        self, logits: Tensor, params: GenerationConfig, rows: Tensor | None, numbers: Tensor | None = None
    ) -> Tensor:
        """One token for each of some rows with the same filters. rows: which; None: all. numbers: from their random
        streams, if already drawn."""
        if params.temperature < GREEDY_BELOW:
            return logits.argmax(dim=-1)
        k, among = params.top_k, None
        usual = self.filters is FILTERS and list(FILTERS)[:2] == ["temperature", "top_k"]
        if usual and k and k <= logits.size(-1) // 4:
            # only the k tokens that can pass the filters, in the order of their ids, so that the same one is drawn
            among = logits.topk(k).indices.sort(dim=-1).values
            logits = logits.gather(-1, among)
        probs = keep_likely(logits, params, self.filters).softmax(dim=-1)
        ids = self.pick(probs) if numbers is None else draw(probs, numbers)
        return ids if among is None else among.gather(-1, ids[:, None]).squeeze(-1)

    def note(self, ids: Tensor) -> None:
        """Counts the drawn tokens, (B,), for the penalties."""
        if self.penalised:
            self.counts.scatter_add_(1, ids[:, None], self.counts.new_ones(len(ids), 1))
            self.seen.scatter_(1, ids[:, None], True)

    def pick(self, probs: Tensor) -> Tensor:
        """One token per row, (B,), using the next number of the row's stream."""
        return draw(probs, self.next_uniforms())

    def next_uniforms(self) -> Tensor:
        """The next number of each row's stream, (B,), from [0, 1)."""
        for row, used in enumerate(self.used):
            if used == self.CHUNK:
                fresh = torch.rand(self.CHUNK, generator=self.generators[row], dtype=torch.float64)
                self.uniforms[row], self.used[row] = fresh.to(self.uniforms), 0
        first = self.used[0]
        if all(used == first for used in self.used):
            numbers = self.uniforms[:, first]
        else:
            at = torch.tensor(self.used, device=self.device)
            numbers = self.uniforms.gather(1, at[:, None]).squeeze(-1)
        self.used = [used + 1 for used in self.used]
        return numbers

    def select(self, rows: Tensor) -> Sampler:
        """A sampler of the given rows only, (N,), in that order."""
        new, index = copy.copy(self), rows.tolist()
        new.params, new.used = [self.params[row] for row in index], [self.used[row] for row in index]
        new.generators = [self.generators[row] for row in index]
        new.uniforms, new.counts, new.seen = self.uniforms[rows], self.counts[rows], self.seen[rows]
        new._configure()
        return new

    def join(self, other: Sampler) -> Sampler:
        """A sampler of these rows followed by the other's."""
        new = copy.copy(self)
        new.params, new.used = self.params + other.params, self.used + other.used
        new.generators = self.generators + other.generators
        new.uniforms = torch.cat((self.uniforms, other.uniforms))
        width = max(sampler.counts.size(1) * sampler.penalised for sampler in (self, other))
        new.counts = torch.cat([_widened(s.counts, width) for s in (self, other)])
        new.seen = torch.cat([_widened(s.seen, width) for s in (self, other)])
        new._configure()
        return new


def _widened(t: Tensor, width: int) -> Tensor:
    """A tensor (B, 0) as zeros (B, width). Rows without penalties have no counts."""
    return t if t.size(1) == width else t.new_zeros(t.size(0), width)
