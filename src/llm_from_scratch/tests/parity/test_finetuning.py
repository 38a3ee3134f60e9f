"""Finetuning against independent implementations: full against a plain loop over transformers' model, LoRA against
peft, on the same batches from the same weights, in float32 on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm_from_scratch.core.adapters import adapter_of
from llm_from_scratch.training.opening import open_run
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.trainer import train_step

from ..lazy import peft, transformers
from ..tiny import TOKENIZER, babble, tiny_config, write_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("here"),
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
]
RANK, ALPHA = 4, 12.0
PARTS = {  # ours: theirs, one for each stacked matrix
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_gate": ("mlp.gate_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


@pytest.fixture
def theirs(here: Path) -> Any:
    """A tiny Llama of transformers', saved in the folder `model`."""
    config = transformers.LlamaConfig(
        vocab_size=20, max_position_embeddings=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(here / "model")
    return model.train()


def settings(**changes: Any) -> Any:
    text = TOKENIZER.encode(babble(6000))
    data = write_data(Path("data-for-both"), train=text)
    plain = {"init_from": "model", "out_dir": "run", "block_size": 16, "batch_size": 8, "decay_lr": False,
             "learning_rate": 3e-3, "weight_decay": 0.1, "beta2": 0.99, "max_iters": 1000}  # fmt: skip
    return tiny_config(data, **{**plain, **changes})


def losses(config: Any, model: Any, steps: int, begin: Callable[[Run], None] = lambda run: None) -> list[list[float]]:
    """(our loss, theirs) of each step on the same batches."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.learning_rate, betas=(0.9, 0.99), eps=1e-8)
    found = []
    with open_run(config, None, "llm-train", None) as run:
        begin(run)
        for _ in range(steps):
            x, y = run.next_batch()
            loss = F.cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in named], config.optimizer.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            found.append([float(train_step(run, x, y).loss), loss.item()])
    return found


def test_20_steps_of_full_finetuning_equal_a_plain_loop(theirs: Any) -> None:
    pairs = losses(settings(learning_rate=1e-3), theirs, 20)
    assert pairs[0][0] - pairs[-1][0] > 0.2
    for ours, other in pairs:
        assert ours == pytest.approx(other, abs=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_50_steps_of_lora_equal_peft(theirs: Any) -> None:
    targets = [name.rpartition(".")[2] for names in PARTS.values() for name in names]
    other = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))

    def same_adapter(run: Run) -> None:
        own, total = adapter_of(run.model), 0
        for name, tensor in own.items():
            _, _, layer, rest = name.split(".", 3)
            part, _, kind = rest.rpartition(".")
            names = PARTS[part]
            heights = [other.get_submodule(f"base_model.model.model.layers.{layer}.{n}.base_layer").out_features
                       for n in names]  # fmt: skip
            pieces = tensor.split(RANK) if kind == "lora_A" else tensor.split(heights)
            for theirs_name, piece in zip(names, pieces, strict=True):
                module = other.get_submodule(f"base_model.model.model.layers.{layer}.{theirs_name}.{kind}.default")
                assert module.weight.shape == piece.shape
                with torch.no_grad():
                    module.weight.copy_(piece)
                total += piece.numel()
        assert total == sum(p.numel() for p in other.parameters() if p.requires_grad)

    config = settings(lora_rank=RANK, lora_alpha=ALPHA, learning_rate=3e-3)
    pairs = losses(config, other, 50, same_adapter)
    assert pairs[0][0] - pairs[-1][0] > 0.2
    for ours, expected in pairs:
        assert ours == pytest.approx(expected, abs=1e-4)
