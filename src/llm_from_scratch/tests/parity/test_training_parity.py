"""The arithmetic of training against independent implementations: twenty AdamW steps on the same batches of real text
from the same weights, in float32 on the CPU, give the same losses to 1e-6 relative."""

import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm_from_scratch.config import GPTConfig, OptimizerConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.tests.parity.reference import nanogpt, needs_nanogpt, quietly
from llm_from_scratch.training.optimizer import make_optimizer

STEPS, BATCH, LOUDER = 20, 8, 5.0
SIZES: dict[str, Any] = {"block_size": 32, "vocab_size": 0, "n_layer": 3, "n_head": 4, "n_embd": 64, "dropout": 0.0}


def text() -> str:
    folder = os.environ.get("LLM_TEST_DATA_DIR")
    if folder and (Path(folder) / "tinyshakespeare.txt").is_file():
        return (Path(folder) / "tinyshakespeare.txt").read_text(encoding="utf-8")[:200_000]
    return "".join(pydoc_data.topics.topics.values())[:200_000]


def batches() -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """Vocabulary size, and (inputs, targets) of shape (BATCH, block_size) for each step."""
    characters, ids = np.unique(np.array(list(text())), return_inverse=True)
    tokens = torch.from_numpy(ids.astype(np.int64))
    T, generator = SIZES["block_size"], torch.Generator().manual_seed(11)
    found = []
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - T, (BATCH,), generator=generator)
        windows = torch.stack([tokens[start : start + T + 1] for start in starts.tolist()])
        found.append((windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    return len(characters), found


@torch.no_grad()
def louder(model: torch.nn.Module) -> None:
    """Larger matrices than at initialisation, where GELU is nearly linear and its two forms cannot be told apart."""
    for p in model.parameters():
        if p.dim() >= 2:
            p.mul_(LOUDER)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[..., Tensor]) -> list[float]:
    losses = []
    louder(model)
    model.train()
    for x, y in batches()[1]:
        loss = loss_of(model, x, y)
        losses.append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


def our_run(fused: str = "off", **changes: Any) -> list[float]:
    config = GPTConfig(**{**SIZES, "vocab_size": batches()[0], **changes})
    torch.manual_seed(1337)
    model = GPT(config)
    settings = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, beta2=0.99, fused=fused)  # type: ignore[arg-type]
    optimizer = make_optimizer(model, settings, torch.device("cpu"))
    torch.manual_seed(1)  # dropout
    return train(model, optimizer, lambda m, x, y: m(x, y)[1])


def relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def hf_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())


@pytest.fixture(scope="module")
def transformers_losses() -> list[float]:
    """GPT2LMHeadModel with exact GELU and torch's own AdamW, from our initial weights."""
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(**{**SIZES, "vocab_size": batches()[0]})
    torch.manual_seed(1337)
    ours = GPT(config).state_dict()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            linear = p.dim() == 2 and ".h." in name  # stored as (in, out) there
            p.copy_(ours[name].t() if linear else ours[name])
    decay = [p for p in theirs.parameters() if p.dim() >= 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return train(theirs, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99)), hf_loss)


@pytest.mark.cases(1)
@pytest.mark.parametrize("fused", ["off", "auto"])
def test_losses_of_transformers(transformers_losses: list[float], fused: str) -> None:
    losses = our_run(fused)
    assert relative(losses, transformers_losses) <= 1e-6
    assert losses[-1] < 0.8 * losses[0]  # it learns: twenty equal losses of an untrained model would prove little


@needs_nanogpt
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"dropout": 0.2}], ids=["bias", "no bias", "dropout"])
def test_losses_of_nanogpt(changes: dict[str, Any]) -> None:
    module, sizes = nanogpt(), {**SIZES, "vocab_size": batches()[0], **changes}
    torch.manual_seed(1337)
    theirs = quietly(module.GPT, module.GPTConfig(**sizes))
    optimizer = quietly(theirs.configure_optimizers, 0.1, 1e-3, (0.9, 0.99), "cpu")
    torch.manual_seed(1)
    expected = train(theirs, optimizer, lambda m, x, y: m(x, y)[1])
    assert relative(our_run(**changes), expected) <= 1e-6
    assert relative(our_run("auto", **changes), expected) <= 1e-6


def test_the_comparison_can_fail(transformers_losses: list[float]) -> None:
    """A slight change of the arithmetic (tanh in place of erf) shows at this tolerance."""
    assert relative(our_run(activation="gelu_tanh"), transformers_losses) > 5e-6
