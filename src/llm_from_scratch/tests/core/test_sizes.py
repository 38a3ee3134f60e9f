"""core/sizes.py: the counts from a configuration equal the model's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llm_from_scratch.config import GPTConfig, OptimizerConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.sizes import count_params, meta_model, sizes
from llm_from_scratch.training.moments import optimizer_bytes, optimizer_state
from llm_from_scratch.training.optimizer import make_optimizer

from ..tiny import slow_except
from .test_model import BASE, OPTIONS


@pytest.mark.parametrize("option", OPTIONS)
def test_parameters_are_the_models(option: str) -> None:
    config = dataclasses.replace(BASE, **OPTIONS[option])
    model = GPT(config)
    assert count_params(config) == sum(p.numel() for p in model.parameters())
    assert sizes(config, 1).params == count_params(config)


def test_gpt2_has_124_million() -> None:
    config = GPTConfig(vocab_size=50257)
    assert count_params(config) == 124_439_808  # openai/gpt2 as published
    assert count_params(dataclasses.replace(config, n_layer=48, n_head=25, n_embd=1600)) == 1_557_611_200


@pytest.mark.parametrize("option", OPTIONS)
def test_arithmetic_is_that_of_estimate_mfu(option: str) -> None:
    config = dataclasses.replace(BASE, **OPTIONS[option])
    if not config.tie_embeddings:  # nanoGPT's count has no untied token table to leave out
        config = dataclasses.replace(config, tie_embeddings=True)
    flops = GPT(config).estimate_mfu(1, 1.0, peak_flops=1.0) / config.block_size
    assert sizes(config, 1).flops_per_token == pytest.approx(flops)


def test_memory_by_hand() -> None:
    config = GPTConfig(block_size=4, vocab_size=7, n_layer=1, n_head=1, n_embd=2, bias=False)
    found = sizes(config, batch_size=3, optimizer=optimizer_bytes(meta_model(config), OptimizerConfig()))
    # 7*2 tokens, 4*2 positions, norms 3*2, attention 2*6 + 2*2, MLP 2*8 + 8*2
    assert found.params == 14 + 8 + 6 + 16 + 32
    assert (found.weights, found.gradients, found.optimizer) == (304, 304, 608)
    assert found.memory == 304 + 304 + 608 + found.activations
    assert sizes(config, batch_size=6).activations == 2 * found.activations
    deep = dataclasses.replace(config, n_layer=8)
    assert sizes(deep, 3, gradient_checkpointing=True).activations < sizes(deep, 3).activations
    assert sizes(config, 3, element_size=2).activations < found.activations


@pytest.mark.parametrize("option", slow_except(OPTIONS, "gpt2", "mqa_rope", "untied"))
@pytest.mark.parametrize("kind", ["adamw", "muon", pytest.param("normuon", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizers_memory_is_that_of_its_state(option: str, kind: Any, dtype: Any) -> None:
    config = dataclasses.replace(BASE, **OPTIONS[option])
    settings = OptimizerConfig(optimizer_type=kind, optimizer_dtype=dtype)
    model = GPT(config)
    optimizer = make_optimizer(model, settings, torch.device("cpu"))
    idx = torch.zeros(1, 4, dtype=torch.long)
    model(idx, idx)[1].backward()
    optimizer.step()
    slots = [value for slots in optimizer_state(optimizer)["state"].values() for value in slots.values()]
    held = sum(value.nbytes for value in slots if isinstance(value, torch.Tensor) and value.dim())
    assert optimizer_bytes(meta_model(config), settings) == held
