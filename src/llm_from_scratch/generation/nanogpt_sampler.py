"""nanoGPT's sampling for sample.py: the same seed gives the same text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import GenerationConfig, GPTConfig
from ..core.model import GPT
from .row_sampler import Sampler
from .sampling import FILTERS, top_k, top_p


def random_stream(seed: int, device: torch.device, built: GPTConfig | None) -> torch.Generator:
    """The random stream of nanoGPT's sample.py.

    nanoGPT sets the seed and then builds the model. Drawing the initial weights, which the checkpoint replaces,
    advances the CPU's stream. built: the model that is built this way, if any.
    """
    if device.type != "cpu" or built is None:
        return torch.Generator(device).manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        GPT(built)
        return torch.Generator().set_state(torch.get_rng_state())


class NanoGPTSampler(Sampler):
    """One random stream for all samples in sequence; all ties at the k-th logit are kept.

    Each sample starts at the position of the stream where the previous one ended, so they can be decoded together and
    still equal nanoGPT's, which are drawn in turn. Each sample must draw exactly params.max_new_tokens times.
    vocab_size: of the tokenizer; model_rows: of the model, including padding, as nanoGPT samples from all rows.
    """

    filters = {
        **FILTERS,
        "top_k": lambda logits, p: top_k(logits, p.top_k, keep_ties=True),
        "top_p": lambda logits, p: top_p(logits, p.top_p),
    }

    def __init__(self, params: GenerationConfig, stream: torch.Generator, vocab_size: int, model_rows: int):
        super().__init__(params, [()] * params.num_samples, [0] * params.num_samples, vocab_size, stream.device)
        self.model_rows, self.generators = model_rows, []
        anything = torch.ones(1, model_rows, device=stream.device)
        for left in range(params.num_samples, 0, -1):
            self.generators.append(torch.Generator(stream.device).set_state(stream.get_state()))
            for _ in range(params.max_new_tokens if left > 1 else 0):
                torch.multinomial(anything, 1, generator=stream)  # the drawn tokens do not change the stream

    def pick(self, probs: Tensor) -> Tensor:
        probs = F.pad(probs, (0, self.model_rows - probs.size(-1)))
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probs.split(1), self.generators, strict=True)]
        return torch.cat(drawn).squeeze(-1)
