"""nanoGPT's seven presets: each sets nanoGPT's values."""

import runpy
from pathlib import Path

import pytest

from llm_from_scratch.config import Config
from llm_from_scratch.settings import flatten

FOLDER = Path(__file__).resolve().parents[4] / "config"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="presets lie in a checkout, not in an installed package")


def evaluation(name: str) -> dict[str, object]:
    return {"batch_size": 8, "eval_iters": 500, "eval_only": True, "wandb_log": False, "init_from": name}


EXPECTED: dict[str, dict[str, object]] = {
    "eval_gpt2": evaluation("gpt2"),
    "eval_gpt2_medium": evaluation("gpt2-medium"),
    "eval_gpt2_large": evaluation("gpt2-large"),
    "eval_gpt2_xl": evaluation("gpt2-xl"),
    "finetune_shakespeare": {
        "out_dir": "out-shakespeare",
        "eval_interval": 5,
        "eval_iters": 40,
        "wandb_log": False,
        "wandb_project": "shakespeare",
        "dataset": "shakespeare",
        "init_from": "gpt2-xl",
        "always_save_checkpoint": False,
        "batch_size": 1,
        "gradient_accumulation_steps": 32,
        "max_iters": 20,
        "learning_rate": 3e-5,
        "decay_lr": False,
    },
    "train_gpt2": {
        "wandb_log": True,
        "wandb_project": "owt",
        "wandb_run_name": "gpt2-124M",
        "batch_size": 12,
        "block_size": 1024,
        "gradient_accumulation_steps": 40,
        "max_iters": 600_000,
        "lr_decay_iters": 600_000,
        "eval_interval": 1000,
        "eval_iters": 200,
        "log_interval": 10,
        "weight_decay": 0.1,
    },
    "train_shakespeare_char": {
        "out_dir": "out-shakespeare-char",
        "eval_interval": 250,
        "eval_iters": 200,
        "log_interval": 10,
        "always_save_checkpoint": False,
        "wandb_log": False,
        "wandb_project": "shakespeare-char",
        "wandb_run_name": "mini-gpt",
        "dataset": "shakespeare_char",
        "gradient_accumulation_steps": 1,
        "batch_size": 64,
        "block_size": 256,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "learning_rate": 1e-3,
        "max_iters": 5000,
        "lr_decay_iters": 5000,
        "min_lr": 1e-4,
        "beta2": 0.99,
        "warmup_iters": 100,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values(name: str) -> None:
    found = runpy.run_path(str(FOLDER / f"{name}.py"))
    values = {k: v for k, v in found.items() if not k.startswith("_") and k != "time"}
    if name == "finetune_shakespeare":  # the one computed value: a name that no other attempt has
        prefix, _, stamp = values.pop("wandb_run_name").partition("-")
        assert prefix == "ft" and float(stamp) > 1e9
    assert values == EXPECTED[name]
    assert {k: type(v) for k, v in values.items()} == {k: type(v) for k, v in EXPECTED[name].items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_name_is_a_setting(name: str) -> None:
    assert set(EXPECTED[name]) <= set(flatten(Config()))
