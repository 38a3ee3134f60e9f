"""A model built without its numbers has the initial weights of GPT(config), row for row."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from llm_from_scratch.config import Config, GPTConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.model import GPT
from llm_from_scratch.machine.device import Runtime
from llm_from_scratch.training.construction import build

pytestmark = pytest.mark.slow  # fake tensors take a second to import
TINY: dict[str, Any] = {"vocab_size": 23, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 6}


def runtime(rank: int, world: int = 4, shards: int = 2) -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, False, True, rank, world, "gloo", None, {}, None, "hsdp", shards)


def rows(p: Any) -> torch.Tensor:
    """What a process keeps of a parameter."""
    return p.rows if hasattr(p, "rows") else p.detach()


def compare(config: Config, weights: Any = None) -> None:
    """The rows of both processes of a group are the whole, and the state of the generator is the same afterwards."""
    seed = config.system.seed
    torch.manual_seed(seed)
    whole = GPT(config.model)
    if weights is not None:
        whole.load_state_dict(weights)
    after = torch.get_rng_state()
    parts = []
    for rank in (2, 3):  # the second group of two
        torch.manual_seed(seed + rank)
        before = torch.get_rng_state()
        parts.append(build(config, runtime(rank), weights, pytest.fail))
        assert torch.equal(torch.get_rng_state(), before)  # dropout differs between processes
    torch.manual_seed(seed)
    build(config, runtime(0), None, pytest.fail)
    assert torch.equal(torch.get_rng_state(), after)
    named = [dict(part.named_parameters(remove_duplicate=False)) for part in parts]
    for name, p in whole.named_parameters(remove_duplicate=False):
        one, two = (n[name] for n in named)
        assert one.shape == p.shape and one.requires_grad == p.requires_grad
        if hasattr(one, "rows"):
            assert torch.equal(torch.cat([rows(one), rows(two)]), p), name
            assert one.untyped_storage().nbytes() <= 4 * sum(p.shape)
        else:
            assert (p.dim() < 2 or "ngrams" in name) and torch.equal(one, p) and torch.equal(two, p), name
    for (name, b), built in zip(whole.named_buffers(), parts[0].buffers(), strict=True):
        assert torch.equal(built, b), name
    assert (parts[0].lm_head.weight is parts[0].transformer.wte.weight) == config.model.tie_embeddings


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "zero_init": True, "norm": "rmsnorm", "activation": "swiglu", "pos_embedding": "rope",
         "head_dim": 4, "bias": False, "max_ngram": 2, "ngram_rows": 7, "qk_norm": True},
    ],
)  # fmt: skip
def test_a_model_built_in_shards_is_that_of_one_process(changes: dict[str, Any]) -> None:
    config = Config(model=GPTConfig(**{**TINY, **changes}))
    compare(config)


def test_weights_of_a_checkpoint_are_cut_too() -> None:
    config = Config(model=GPTConfig(**TINY))
    compare(config, {name: torch.randn_like(t) for name, t in GPT(config.model).state_dict().items()})


def test_an_edited_constructor_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that read numbers, buffers, views, draws that are thrown away."""

    class Edited(models.Block):
        def __init__(self, config: GPTConfig):
            super().__init__(config)
            self.gate = nn.Parameter(torch.randn(config.n_embd))
            torch.rand(3)
            self.mix = nn.Parameter(nn.init.orthogonal_(torch.empty(5, config.n_embd)) * self.gate.detach())
            self.cut = nn.Parameter(torch.empty(4, 3).normal_().clamp_(-1, 1))
            with torch.no_grad():
                self.mix[2] += 1
            self.register_buffer("mask", torch.ones(4, 4).tril(), persistent=False)
            self.fixed = nn.Parameter(torch.full((2, 2), 3.0), requires_grad=False)
            self.number = nn.Parameter(torch.randn(()))

    monkeypatch.setattr(models, "Block", Edited)
    compare(Config(model=GPTConfig(**TINY)))


@pytest.mark.parametrize("what", ["unseen", "repeated", "hidden"])
def test_an_unrecordable_model_is_built_whole(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Numbers that torch's modes do not see, draws that are repeated until they fit, a tensor of no module."""

    class Edited(models.Block):
        def __init__(self, config: GPTConfig):
            super().__init__(config)
            with _disable_current_modes() if what == "unseen" else contextlib.nullcontext():
                self.register_buffer("table", torch.full((6,), 2.0))
            if what == "repeated":
                self.cut = nn.Parameter(nn.init.trunc_normal_(torch.empty(4, 3), a=-1, b=1))
            if what == "hidden":
                self.scaled = functools.partial(torch.mul, torch.tensor([2.0]))

    monkeypatch.setattr(models, "Block", Edited)
    config, told = Config(model=GPTConfig(**TINY)), list[str]()
    torch.manual_seed(config.system.seed)
    whole = GPT(config.model)
    one = build(config, runtime(1), None, told.append)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), one.state_dict().values(), strict=True))
    assert len(told) == 1 and told[0].startswith("every process builds the whole model first, because")


def test_one_process_builds_the_model_as_it_is() -> None:
    config = Config(model=GPTConfig(**TINY))
    model = build(config, dataclasses.replace(runtime(0), parallel="ddp"), None, pytest.fail)
    assert not any(hasattr(p, "rows") for p in model.parameters())
