"""Small trained models for tests of decoding.

A random model repeats one token, which proves nothing; these have memorised a text of 60 different characters in no
order, so greedy continuations are varied and far from ties.
"""

from __future__ import annotations

import functools
import random
import string
from typing import Any

import torch

from llm_from_scratch.config import GPTConfig, OptimizerConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import CharTokenizer
from llm_from_scratch.training.optimizer import make_optimizer, set_learning_rates

from .shared import weights_of

SIGNS = string.ascii_letters + ".,;:!?\n é€"  # the last two take two and three bytes
TEXT = "".join("".join(random.Random(seed).sample(SIGNS, len(SIGNS))) for seed in range(4))
TOKENIZER = CharTokenizer.from_text([TEXT])
BLOCK = 24
# every architecture option of the model, alone or with what it goes with
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "no_bias_tanh": {"bias": False, "activation": "gelu_tanh"},
    "rope": {"pos_embedding": "rope"},
    "gqa": {"n_kv_head": 1},
    "qk_norm": {"qk_norm": True},
    "swiglu": {"activation": "swiglu"},
    "rmsnorm_relu2": {"norm": "rmsnorm", "activation": "relu2"},
    "untied_softcap": {"tie_embeddings": False, "logit_softcap": 15.0},
    "modern": {
        "pos_embedding": "rope",
        "n_kv_head": 2,
        "qk_norm": True,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "tie_embeddings": False,
        "bias": False,
    },
}


@functools.cache
def memorised(option: str = "gpt2", padding: int = 3) -> GPT:
    """A model of two layers that was trained on TEXT for about a second; padding: rows beyond the vocabulary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"block_size": BLOCK, "n_layer": 2, "n_head": 4, "n_embd": 64}
        model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size + padding, **{**sizes, **OPTIONS[option]}))
        weights_of(model, f"{option}-{padding}", lambda: learn_by_heart(model))
    return model.eval()


def learn_by_heart(model: GPT) -> None:
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.0, beta2=0.999), torch.device("cpu"))
    steps, ring = 120, torch.from_numpy(TOKENIZER.encode(TEXT * 2).astype("int64"))
    for step in range(steps):
        starts = torch.randint(len(TEXT), (16,))
        windows = ring[starts[:, None] + torch.arange(BLOCK + 1)]
        _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        loss.backward()
        set_learning_rates(optimizer, 5e-3 * (1 - step / steps) + 1e-4)
        optimizer.step()
        optimizer.zero_grad()


def ragged_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Pieces of TEXT of different length, 1 to longest tokens, as token ids."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for _ in range(count):
        start = int(torch.randint(len(TEXT), (1,), generator=generator))
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        pieces.append(TOKENIZER.encode((TEXT * 2)[start : start + length]).tolist())
    return pieces
