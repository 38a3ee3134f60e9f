"""What a model writes while it trains."""

from __future__ import annotations

import contextlib

import torch

from ..core.model import GPT
from ..machine.device import forked_random
from .setup import Plan


@torch.no_grad()
def write_sample(model: GPT, plan: Plan) -> str:
    """A little text, drawn from numbers of its own, so that watching changes nothing."""
    generation, runtime, tokenizer = plan.config.generation, plan.runtime, plan.tokenizer
    assert tokenizer is not None  # where samples are wanted, setup has seen to it
    idx = torch.tensor([plan.prompt], device=runtime.device)
    model.eval()
    # a compiled block would be compiled anew for every length
    eager = torch.compiler.set_stance("force_eager") if runtime.compile else contextlib.nullcontext()
    with forked_random(runtime.device), runtime.autocast(), eager:
        torch.manual_seed(plan.config.system.seed)
        out = model.generate(
            idx, generation.max_new_tokens, max(generation.temperature, 1e-5), generation.top_k or None
        )
    model.train()
    return tokenizer.decode([i for i in out[0].tolist() if i < tokenizer.vocab_size])
