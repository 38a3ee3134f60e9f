"""Adapters in peft's format against peft itself: its folders read here, ours read there, the same logits."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.cli import export
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.training.trainer import train

from ..lazy import peft, transformers
from ..tiny import tiny_config, write_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("transformers", "peft"))), reason="needs transformers and peft"
    ),
]
SMALL: dict[str, Any] = {"vocab_size": 20, "bos_token_id": None, "eos_token_id": None}
IDS = torch.arange(24).reshape(2, 12) % 20
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}),
    ("llama", {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),  # one of three stacked is missing
    ("llama", {"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"], "rank_pattern": {"q_proj": 2},
               "alpha_pattern": {"layers.1.mlp.down_proj": 5}}),
    ("gpt2", {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
]  # fmt: skip


def tiny(kind: str) -> Any:
    torch.manual_seed(1)
    if kind == "gpt2":
        sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "activation_function": "gelu"}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **SMALL))
    else:
        sizes = {"max_position_embeddings": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **SMALL))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained("base")
    return model.eval()


def adapted(kind: str, settings: dict[str, Any]) -> Any:
    """A model of peft's, with an adapter that is not zero, saved in the folder `adapter`."""
    base = tiny(kind)
    base.name_or_path = base.config._name_or_path = "base"
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2) if "lora_" in name else None
    model.save_pretrained("adapter")
    return model


def logits(folder: str) -> torch.Tensor:
    loaded = load(folder, need_tokenizer=False)
    model = GPT(loaded.model_config).eval()
    model.load_state_dict(loaded.model)
    with torch.no_grad():
        return model(IDS, IDS)[0]


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(("kind", "settings"), ADAPTERS)
def test_an_adapter_of_pefts_gives_its_logits(here: Path, kind: str, settings: dict[str, Any]) -> None:
    with torch.no_grad():
        expected = adapted(kind, settings)(IDS).logits
    assert apart(logits("adapter"), expected) < 1e-5 < 1e-2 < apart(logits("base"), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", [("transformer.h",), ("h.1.attn", "c_fc")])
def test_peft_gives_the_logits_of_our_adapter(
    here: Path, kind: str, targets: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny(kind)
    data = write_data(Path("data"))
    train(tiny_config(data, init_from="base", out_dir="run", block_size=16, lora_rank=3, lora_alpha=4.0,
                      lora_targets=targets, learning_rate=0.05, max_iters=20, progress="none"))  # fmt: skip
    expected = logits("run")
    export.main(["--out_dir=run", "--format=peft", "--output=adapter"])
    assert Path("adapter").is_dir() and (before := logits("base")) is not None
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, "adapter").eval()(IDS).logits
    assert apart(theirs, expected) < 1e-5 < 1e-2 < apart(before, expected)
    assert apart(logits("adapter"), expected) < 1e-5, "our own reader"
    train(tiny_config(data, init_from="adapter", out_dir="more", block_size=16, lora_rank=2, max_iters=1,
                      progress="none"))  # fmt: skip
    assert load("more", need_tokenizer=False).base is not None
    assert "peft needs" not in capsys.readouterr().out
    export.main(["--out_dir=more", "--format=peft", "--output=second"])  # of a base that is an adapter itself
    (again,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("peft needs ")]
    command = again.partition("format: ")[2].replace("FOLDER", "merged")
    assert not export.main(shlex.split(command)[1:]) and apart(logits("merged"), logits("adapter")) < 1e-5


def changed(**changes: Any) -> None:
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def renamed(old: str, new: str) -> None:
    tensors = load_file("adapter/adapter_model.safetensors")
    save_file({name.replace(old, new): t for name, t in tensors.items()}, "adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: changed(use_dora=True), "use_dora=True is not supported"),
        (lambda: changed(peft_type="IA3"), "peft_type=IA3 is not supported"),
        (lambda: changed(init_lora_weights="pissa"), "init_lora_weights=pissa is not supported"),
        (lambda: changed(modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda: changed(alpha_pattern={"(a+)+$": 3}), "alpha_pattern=.* is not supported: expected names"),
        (lambda: changed(lora_alpha="many"), "lora_alpha=many is not a number"),
        (lambda: changed(base_model_name_or_path="nobody/nothing"), "adapter of nobody/nothing, which is not on this"),
        (lambda: changed(base_model_name_or_path="adapter"), "adapters on top of each other"),
        (lambda: changed(base_model_name_or_path=None), "does not name its model"),
        (lambda: renamed("layers.1.self_attn.q_proj", "embed_tokens"), "embed_tokens.* is not supported"),
        (lambda: renamed("q_proj.lora_A", "q_proj.lora_C"), "lora_A and lora_B of .* do not fit the model"),
        (lambda: Path("adapter/adapter_model.safetensors").write_bytes(b"\0" * 99), "are damaged or cannot be read"),
        (lambda: Path("adapter/adapter_model.safetensors").unlink(), "are damaged or cannot be read"),
        (lambda: shutil.rmtree("base"), "adapter of base, which is not on this machine"),
    ],
)
def test_unreadable_files_are_refused_by_name(here: Path, damage: Any, message: str) -> None:
    adapted("llama", {"r": 2, "target_modules": ["q_proj", "v_proj"]})
    damage()
    with pytest.raises(UserError, match=message):
        load("adapter", need_tokenizer=False)


def test_parts_that_the_format_lacks_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama")
    assert export.main(["--checkpoint=base", "--format=peft", "--output=adapter"]) == 2
    assert "holds all weights, not an adapter" in capsys.readouterr().err
