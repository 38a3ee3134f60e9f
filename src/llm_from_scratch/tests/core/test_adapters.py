"""Adapters and frozen parameters: which names a pattern matches, their sizes, merging, what does not train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_from_scratch.config import Config, FinetuneConfig, GPTConfig
from llm_from_scratch.core.adapters import adapter_of, add_parameters, freeze, matching, merged, trained_model, unfreeze
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError

NAMES = [
    "transformer.wte.weight",
    "transformer.h.0.attn.c_attn",
    "transformer.h.1.mlp.c_fc",
    "transformer.h.10.mlp.c_fc",
]


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("c_fc", [2, 3]),
        ("h.1", [2]),
        ("h.*.c_fc", [2, 3]),
        ("transformer.h", [1, 2, 3]),
        ("wte", [0]),
        ("h.[0-1],wte", [0, 1, 2]),
        ("attn.c_attn", [1]),
    ],
)
def test_a_pattern_is_whole_parts_of_a_name(pattern: str, places: list[int]) -> None:
    assert matching(NAMES, [pattern], "lora_targets") == [NAMES[i] for i in places]


@pytest.mark.parametrize("pattern", ["c_f", "fc", "", "h.2", "c_fc,nothing"])
def test_a_pattern_without_a_match_is_refused_with_the_names(pattern: str) -> None:
    with pytest.raises(UserError, match=r"lora_targets.*matches nothing; names: .*transformer\.h\.\*\.mlp\.c_fc"):
        matching(NAMES, [pattern], "lora_targets")


def small(**changes: Any) -> GPTConfig:
    sizes: dict[str, Any] = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 4, "n_embd": 16, "n_kv_head": 2}
    return GPTConfig(**{**sizes, **changes})


def test_queries_keys_and_values_have_adapters_of_their_own() -> None:
    """Merged by hand: the rows of keys change by their own B A."""
    config = small()
    model = GPT(config)
    settings = FinetuneConfig(lora_rank=3, lora_alpha=6.0, lora_targets=("c_attn",))
    names = add_parameters(model, settings, seed=0)
    assert names == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    adapter = adapter_of(model)
    a, b = adapter[f"{names[0]}.lora_A"], adapter[f"{names[0]}.lora_B"]
    assert a.shape == (9, 16) and b.shape == (16 + 8 + 8, 3) and not b.any()
    assert 0.2 < float(a.detach().abs().max()) <= 0.25  # U(-1/4, 1/4)
    with torch.no_grad():
        b[16:24] = torch.randn(8, 3)  # of the keys
    weights = {name: t.detach() for name, t in GPT(config).state_dict().items()}
    result = merged(config, weights, adapter, 2.0)
    change = result[f"{names[0]}.weight"] - weights[f"{names[0]}.weight"]
    torch.testing.assert_close(change[16:24], 2.0 * b[16:24] @ a[3:6])
    assert not change[:16].any() and not change[24:].any()
    others = [name for name in weights if "c_attn.weight" not in name]
    assert all(result[name].data_ptr() == weights[name].data_ptr() for name in others)
    assert result["lm_head.weight"] is result["transformer.wte.weight"]


def test_an_adapter_draws_no_random_numbers_of_training_and_depends_on_seed_and_name() -> None:
    models = [GPT(small()) for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed, targets in zip(models, (1, 1, 2), ("transformer.h", "c_fc", "c_fc"), strict=True):
        add_parameters(model, FinetuneConfig(lora_rank=2, lora_targets=(targets,)), seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, second, other = (adapter_of(model)["transformer.h.1.mlp.c_fc.lora_A"] for model in models)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_frozen_parameters_do_not_train_and_can_be_unfrozen() -> None:
    model = GPT(small())
    freeze(model, FinetuneConfig(freeze=("lm_head", "h.0")))  # the head is tied to the token table
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n == "transformer.wte.weight" or ".h.0." in n}
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(model, FinetuneConfig(freeze=("*",)))


def test_the_counts_of_a_run_come_from_the_model() -> None:
    config = Config(model=small(), finetune=FinetuneConfig(lora_rank=2, lora_targets=("mlp",)))
    model = trained_model(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 2 * 2 * (16 + 64)  # layers x linear layers x rank x (inputs + outputs)
    assert sum(p.numel() for p in model.parameters()) == trained + GPT(small()).get_num_params(non_embedding=False)
