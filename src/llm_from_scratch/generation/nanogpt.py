"""nanoGPT's way of drawing samples, for sample.py: the same seed gives the same text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import GenerationConfig
from .sampling import Sampler


class NanoGPTSampler(Sampler):
    """One random stream for all samples, one sample after the other, and ties at the k-th logit kept.

    Each sample starts where the one before it leaves the stream, so they can be decoded together and still be the
    samples that nanoGPT draws in turn. Each must draw exactly params.max_new_tokens times. vocab_size: the
    tokenizer's; model_rows: the model's, padding included, over which nanoGPT draws.
    """

    keep_ties = True

    def __init__(self, params: GenerationConfig, seed: int, vocab_size: int, model_rows: int, device: torch.device):
        super().__init__(params, [()] * params.num_samples, [seed] * params.num_samples, vocab_size, device)
        self.model_rows, self.generators = model_rows, []
        stream, anything = torch.Generator(device).manual_seed(seed), torch.ones(1, model_rows, device=device)
        for left in range(params.num_samples, 0, -1):
            self.generators.append(torch.Generator(device).set_state(stream.get_state()))
            for _ in range(params.max_new_tokens if left > 1 else 0):
                torch.multinomial(anything, 1, generator=stream)  # what is drawn does not change the stream

    def pick(self, probs: Tensor) -> Tensor:
        probs = F.pad(probs, (0, self.model_rows - probs.size(-1)))
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probs.split(1), self.generators, strict=True)]
        return torch.cat(drawn).squeeze(-1)
