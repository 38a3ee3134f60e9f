"""The state of sampling: each row's settings, random stream, and what it has drawn. sampling.py has the functions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import GenerationConfig, UserError
from .sampling import GREEDY_BELOW, draw, keep_likely, presence_frequency_penalty, repetition_penalty

Prompts = Sequence[Sequence[int]]


def check_bias(params: GenerationConfig, vocab_size: int) -> None:
    """Raises UserError where logit_bias names what is no token."""
    if strange := [token for token in params.logit_bias if not 0 <= token < vocab_size]:
        raise UserError(f"logit_bias names token {strange[0]}, which is outside the vocabulary: 0 to {vocab_size - 1}")


@dataclasses.dataclass
class Settings:
    """GenerationConfig's samplers for many rows: each one number, or a column (B, 1) where rows differ."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    greedy: Any
    """bool, or (B,) where rows differ."""
    candidates: int | None
    """No row keeps more tokens than this; None where a row may keep all."""

    @classmethod
    def of(cls, rows: Sequence[GenerationConfig], device: torch.device) -> Settings:
        def column(name: str) -> Any:
            values = [getattr(row, name) for row in rows]
            if all(value == values[0] for value in values):
                return values[0]
            if name == "top_k":
                values = [value or 1 << 62 for value in values]
            return torch.tensor(values, device=device)[:, None]

        columns = {f.name: column(f.name) for f in dataclasses.fields(cls) if f.name not in ("greedy", "candidates")}
        greedy = [row.temperature < GREEDY_BELOW for row in rows]
        if isinstance(columns["temperature"], Tensor):
            columns["temperature"] = columns["temperature"].clamp(min=GREEDY_BELOW)
        kept = [row.top_k for row, first in zip(rows, greedy, strict=True) if not first]
        return cls(
            **columns,
            greedy=torch.tensor(greedy, device=device) if any(greedy) and not all(greedy) else any(greedy),
            candidates=max(filter(None, kept), default=1) if all(kept) else None,
        )


class Sampler:
    """Draws the next tokens of a batch; holds each row's random stream and, for the penalties, what it has seen.

    params: for all rows, or one a row. Raises UserError where logit_bias names what is no token.
    """

    keep_ties = False  # see top_k
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
        # float64 wherever the device has it: in float32 the rarest of 50,000 tokens would be lost to rounding
        real = torch.float32 if device.type == "mps" else torch.float64
        self.uniforms = torch.empty(rows, self.CHUNK, dtype=real, device=device)
        self.used = [self.CHUNK] * rows  # of each row's random numbers, on the host
        self._configure()
        self.counts = torch.zeros(rows, vocab_size if self.penalised else 0, device=device)  # of generated tokens
        self.seen = self.counts.bool()  # in the prompt or generated
        for row, prompt in enumerate(prompts if self.penalised else ()):
            self.seen[row, torch.as_tensor(prompt, dtype=torch.long, device=device)] = True

    def _configure(self) -> None:
        """What follows from the rows' settings."""
        self.settings = Settings.of(self.params, self.device) if self.params else None
        self.penalised = any(
            p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty for p in self.params
        )
        self.bias: Tensor | None = None
        if any(p.logit_bias for p in self.params):
            self.bias = torch.zeros(len(self.params), self.vocab_size, device=self.device)
            for row, p in enumerate(self.params):
                for token, value in p.logit_bias.items():
                    self.bias[row, token] = value

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of every row, (B,) int64, from the model's logits, (B, V)."""
        logits = self.penalise(logits)
        p = self.settings
        assert p is not None
        if p.greedy is True:
            ids = logits.argmax(dim=-1)
        else:
            ids = self.draw(logits, p)
            if p.greedy is not False:
                ids = torch.where(p.greedy, logits.argmax(dim=-1), ids)
        self.note(ids)
        return ids

    def penalise(self, logits: Tensor) -> Tensor:
        """Logit bias and penalties, float32."""
        p, logits = self.settings, logits.float()
        assert p is not None
        if self.bias is not None:
            logits = logits + self.bias
        if self.penalised:
            logits = repetition_penalty(logits, self.seen, p.repetition_penalty)
            logits = presence_frequency_penalty(logits, self.counts, p.presence_penalty, p.frequency_penalty)
        return logits

    def draw(self, logits: Tensor, p: Settings) -> Tensor:
        """One token a row from what the filters leave."""
        if p.candidates is None or self.keep_ties or p.candidates > logits.size(-1) // 4:
            return self.pick(keep_likely(logits, p, self.keep_ties).softmax(dim=-1))
        # the few that any filter can leave, in the order of their ids, so that the same is drawn
        among = logits.topk(p.candidates).indices.sort(dim=-1).values
        picked = self.pick(keep_likely(logits.gather(-1, among), p).softmax(dim=-1))
        return among.gather(-1, picked[:, None]).squeeze(-1)

    def note(self, ids: Tensor) -> None:
        """Counts what was drawn, (B,), for the penalties."""
        if self.penalised:
            self.counts.scatter_add_(1, ids[:, None], self.counts.new_ones(len(ids), 1))
            self.seen.scatter_(1, ids[:, None], True)

    def pick(self, probs: Tensor) -> Tensor:
        """One token a row, (B,), by the next number of the row's stream."""
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
        """A sampler of the named rows only, (N,), in that order."""
        new, index = copy.copy(self), rows.tolist()
        new.params, new.used = [self.params[row] for row in index], [self.used[row] for row in index]
        new.generators = [self.generators[row] for row in index]
        new.uniforms, new.counts, new.seen = self.uniforms[rows], self.counts[rows], self.seen[rows]
        was = self.penalised
        new._configure()
        new.penalised = was  # what has been counted goes on to be
        return new

    def join(self, other: Sampler) -> Sampler:
        """A sampler of these rows and then the other's."""
        new = copy.copy(self)
        new.params, new.used = self.params + other.params, self.used + other.used
        new.generators = self.generators + other.generators
        new.uniforms = torch.cat((self.uniforms, other.uniforms))
        width = max(self.counts.size(1), other.counts.size(1))
        new.counts = torch.cat([_widened(s.counts, width) for s in (self, other)])
        new.seen = torch.cat([_widened(s.seen, width) for s in (self, other)])
        new._configure()
        new.penalised = self.penalised or other.penalised
        return new


def _widened(t: Tensor, width: int) -> Tensor:
    """A tensor (B, 0) as zeros (B, width): rows without penalties have counted nothing."""
    return t if t.size(1) == width else t.new_zeros(t.size(0), width)
