"""interop/hf.py against transformers itself: the same logits in float32 to 1e-5, both ways, at tiny random sizes."""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.cli import export
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.adapters import merged
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import EOT, CharTokenizer, HFTokenizer, TiktokenTokenizer, Tokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.interop import hf, hf_tokenizer
from llm_from_scratch.interop.hf import export_hf, load_pretrained

from .. import forked
from ..lazy import transformers
from ..tiny import slow_except

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")

TEXT = "First Citizen:\nBefore we proceed, hear me speak .  \r\n\tAll: Speak, speak! — déjà vu 3.14, 12345678 😀\n"
NONE = {"bos_token_id": None, "eos_token_id": None}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def gpt2(**changes: Any) -> Any:
    sizes = {"vocab_size": 67, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return transformers.GPT2Config(**{**NONE, **sizes, **changes})


def llama(kind: Any = None, **changes: Any) -> Any:
    sizes = {"vocab_size": 67, "max_position_embeddings": 24, "hidden_size": 32, "intermediate_size": 44}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return (kind or transformers.LlamaConfig)(**{**NONE, **sizes, **changes})


def qwen2(**changes: Any) -> Any:
    return llama(transformers.Qwen2Config, **changes)


def qwen3(**changes: Any) -> Any:
    return llama(transformers.Qwen3Config, **changes)


def mistral(**changes: Any) -> Any:
    return llama(transformers.MistralConfig, **{"sliding_window": None, **changes})


def scaled(rope_type: str, kind: Callable[..., Any] = llama, **more: Any) -> Any:
    """Pretrained with 16 tokens, used with 64; a base of 100, so that the frequencies are of every kind."""
    rope = {"rope_type": rope_type, "rope_theta": 100.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 16} if rope_type != "linear" else {}
    return kind(max_position_embeddings=64, head_dim=16, rope_parameters=rope | more)


def theirs(config: Any, folder: Path, **save: Any) -> Any:
    """A random model of transformers', every tensor of it (biases and norms too), saved as it saves itself."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    model.save_pretrained(folder, **save)
    return model


@torch.no_grad()
def assert_same_logits(ours: GPT, other: Any, tolerance: float = 1e-5) -> None:
    size = (2, min(ours.config.block_size, 64))
    ids = torch.randint(int(ours.config.vocab_size or 0), size, generator=torch.Generator().manual_seed(1))
    a, b = ours.eval()(ids, targets=ids)[0], other(ids).logits
    assert a.std() > 0.1  # there is something to compare
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "gpt2 untied, exact gelu, narrow mlp": lambda: gpt2(
        tie_word_embeddings=False, activation_function="gelu", n_inner=40, layer_norm_epsilon=1e-3
    ),
    "gpt2 relu2": lambda: gpt2(activation_function="relu2"),
    "llama": llama,
    "llama tied, one kv head": lambda: llama(tie_word_embeddings=True, num_key_value_heads=1),
    "llama theta, epsilon": lambda: llama(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3
    ),
    "llama biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    "qwen3": qwen3,
    "qwen3 tied": lambda: qwen3(tie_word_embeddings=True),
    "wide heads": lambda: qwen3(head_dim=24),
    "narrow heads": lambda: llama(head_dim=4),
    "qwen2": qwen2,
    "qwen2 tied": lambda: qwen2(tie_word_embeddings=True),
    "mistral": mistral,
    "mistral, a window of the whole context": lambda: mistral(sliding_window=24, head_dim=16),
    "linear": lambda: scaled("linear"),
    "llama3": lambda: scaled("llama3", low_freq_factor=0.5, high_freq_factor=2.0),
    "yarn": lambda: scaled("yarn", qwen2),
    "yarn, all its settings": lambda: scaled("yarn", qwen3, beta_fast=3.0, beta_slow=0.5, attention_factor=1.3),
}


def assert_same_gradients(ours: GPT, other: Any) -> None:
    """Of the loss over a whole context, compared under their names."""
    ids = torch.randint(67, (2, ours.config.block_size), generator=torch.Generator().manual_seed(2))
    loss = ours(ids[:, :-1], targets=ids[:, 1:])[1]
    assert loss is not None
    loss.backward()
    other(ids, labels=ids).loss.backward()
    family = hf.family_of(ours.config)
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    found = hf.written_weights(found, family.names(ours.config), family, ours.config)
    expected = {name: p.grad for name, p in other.named_parameters()}
    for name in expected.keys() & found.keys():
        a, b = found[name], expected[name]
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8, name
    assert expected.keys() <= found.keys()


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "name", slow_except(CONFIGS, "gpt2", "llama biases", "qwen3 tied", "qwen2", "mistral", "llama3")
)
def test_logits_and_gradients_of_a_folder_that_transformers_saved(name: str, tmp_path: Path) -> None:
    other = theirs(CONFIGS[name](), tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert_same_logits(ours, other)
    assert_same_gradients(ours, other)
    assert ours.config.dropout == 0.0
    config, state, tokenizer = load_pretrained(tmp_path)
    assert config == ours.config and tokenizer is None and list(state) == list(ours.state_dict())


@pytest.mark.parametrize(
    ("width", "heads"),
    [(768, 12), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((1024, 16), (1280, 20), (1600, 25)))],
)
def test_logits_of_the_four_gpt2_shapes(width: int, heads: int, tmp_path: Path) -> None:
    other = theirs(gpt2(n_embd=width, n_head=heads, n_layer=1, vocab_size=101), tmp_path)
    assert_same_logits(GPT.from_pretrained(str(tmp_path)), other)


def test_rotary_angles_far_from_the_start(tmp_path: Path) -> None:
    other = theirs(llama(max_position_embeddings=2048), tmp_path)
    ours, ids = GPT.from_pretrained(str(tmp_path)).eval(), torch.randint(67, (1, 2048))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, targets=ids)[0], other(ids).logits, rtol=0, atol=2e-4)


def rename_weights(folder: Path, rename: Callable[[str], str], extra: dict[str, Tensor] | None = None) -> None:
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | (extra or {}), folder / "model.safetensors")


def test_files_of_every_form(tmp_path: Path) -> None:
    """Shards, pytorch_model.bin, its shards, names without prefix, buffers of old files: the same weights."""
    one = tmp_path / "one"
    other = theirs(gpt2(), one)
    expected = load_pretrained(one)[1]
    weights = load_file(one / "model.safetensors")

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        shutil.copy(one / "config.json", tmp_path / name)
        return tmp_path / name

    other.save_pretrained(folder("shards"), max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    torch.save(weights | {"lm_head.weight": weights["transformer.wte.weight"]}, folder("bin") / "pytorch_model.bin")
    half = folder("bin shards")
    first = sorted(weights)[:7]
    torch.save({key: weights[key] for key in first}, half / "pytorch_model-1.bin")
    torch.save({key: weights[key] for key in weights if key not in first}, half / "pytorch_model-2.bin")
    index = {key: f"pytorch_model-{1 if key in first else 2}.bin" for key in weights}
    (half / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    bare = folder("bare")
    shutil.copy(one / "model.safetensors", bare)
    buffers = {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    buffers |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    rename_weights(bare, lambda key: key.removeprefix("transformer."), buffers)
    for name in ("shards", "bin", "bin shards", "bare"):
        state = load_pretrained(tmp_path / name)[1]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected), name


def test_both_places_of_rope_theta(tmp_path: Path) -> None:
    theirs(llama(rope_parameters={"rope_type": "default", "rope_theta": 777.0}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    for old, theta in (
        ({"rope_theta": 777.0, "rope_scaling": None}, 777.0),
        ({"rope_theta": 777}, 777.0),
        ({}, 10000.0),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 777.0}, 5e5),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | old))
        assert load_pretrained(tmp_path)[0].rope_theta == theta
        if theta != 10000.0:
            other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
            assert_same_logits(GPT.from_pretrained(str(tmp_path)), other)


def test_the_old_places_of_a_scaling(tmp_path: Path) -> None:
    """rope_scaling with "type", as before transformers 5; the original context next to it, or the model's own."""
    theirs(scaled("yarn"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    for old, original in (
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 16),
        ({"rope_type": "yarn", "type": "yarn", "factor": 4.0}, 64),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 100.0, "rope_scaling": old}))
        found = load_pretrained(tmp_path)[0]
        assert (found.rope_scaling, found.rope_factor, found.rope_original) == ("yarn", 4.0, original)
        assert_same_logits(
            GPT.from_pretrained(str(tmp_path)), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        )


def test_a_sliding_window_crops_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the window, every layer sees everything; a longer text would get other logits."""
    other = theirs(mistral(sliding_window=7), tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.config.block_size == 7 and "shortened to 7 tokens (sliding_window)" in capsys.readouterr().err
    assert_same_logits(ours, other)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]  # 4096 by default
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 5000}))
    assert load_pretrained(tmp_path)[0].block_size == 4096


REFUSED = [
    (gpt2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    (gpt2, {"scale_attn_weights": False}, "scale_attn_weights=False"),
    (gpt2, {"add_cross_attention": True}, "add_cross_attention"),
    (gpt2, {"activation_function": "relu"}, "activation_function=relu"),
    (gpt2, {"activation_function": ["gelu"]}, "activation_function"),
    (gpt2, {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    (gpt2, {"model_type": "gpt_neox"}, "model_type=gpt_neox is not one of gpt2, llama, mistral, qwen2, qwen3"),
    (gpt2, {"model_type": None}, "model_type=None"),
    (gpt2, {"n_head": 5}, "not divisible"),
    (gpt2, {"n_head": 0}, "n_head=0"),
    (gpt2, {"n_embd": -32}, "n_embd=-32"),
    (gpt2, {"n_layer": 2.5}, "n_layer='2.5'"),
    (gpt2, {"n_layer": True}, "n_layer='True'"),
    (gpt2, {"n_layer": "2"}, "n_layer='2'"),
    (gpt2, {"n_layer": 10**9}, "n_layer=1000000000"),
    (gpt2, {"n_layer": 1}, "transformer.h.1."),
    (gpt2, {"n_layer": 3}, "lack transformer.h.2."),
    (gpt2, {"vocab_size": 10**30}, "vocab_size"),
    (gpt2, {"vocab_size": 66}, "transformer.wte.weight"),
    (gpt2, {"n_positions": 25}, "transformer.wpe.weight"),
    (gpt2, {"n_inner": 100}, "mlp.c_fc"),
    (gpt2, {"layer_norm_epsilon": float("nan")}, "norm_eps"),
    (gpt2, {"tie_word_embeddings": False}, "lack lm_head.weight"),
    (llama, {"hidden_act": "gelu"}, "hidden_act=gelu"),
    (llama, {"attention_bias": True}, "mlp_bias=False with attention_bias=True"),
    (llama, {"mlp_bias": True}, "mlp_bias=True with attention_bias=False"),
    (llama, {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters"),
    (llama, {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "long_factor": [1.0]}}, "rope_parameters"),
    (llama, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate"),
    (llama, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale"),
    (llama, {"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "rope_factor='4'"),
    (llama, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}}, "rope_high=0.5"),
    (llama, {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope_factor=0.5"),
    (llama, {"rope_parameters": {"rope_type": ["yarn"], "factor": 4.0}}, "rope_parameters"),
    (llama, {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_parameters"),  # no factor
    (llama, {"rope_scaling": {"rope_type": "default"}}, "rope_scaling"),  # next to rope_parameters
    (llama, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters"),
    (llama, {"rope_parameters": "yarn"}, "rope_parameters"),
    (llama, {"rope_parameters": {"rope_theta": "big"}}, "rope_theta"),
    (llama, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (llama, {"head_dim": 16}, "c_attn"),
    (llama, {"head_dim": 7}, "even head width"),
    (llama, {"head_dim": "8"}, "head_dim='8'"),
    (llama, {"hidden_size": None}, "does not set hidden_size"),
    (llama, {"num_key_value_heads": 3}, "n_kv_head=3"),
    (llama, {"num_key_value_heads": 4}, "c_attn"),
    (qwen3, {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
    (qwen3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (qwen3, {"layer_types": 5}, "layer_types=5"),
    (qwen3, {"attention_bias": True}, "attention_bias=True"),
    (qwen3, {"head_dim": None}, "c_attn"),  # 128 by default
    (qwen2, {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
    (mistral, {"sliding_window": "8"}, "sliding_window=8"),
    (qwen3, {"model_type": "qwen3_moe", "num_experts": 8}, "model_type=qwen3_moe"),
    (gpt2, {"is_causal": False}, "is_causal=False"),  # every token sees the whole text
    (llama, {"is_causal": False}, "is_causal=False"),
    (llama, {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0}}, "rope_parameters"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    folders = {make: tmp_path_factory.mktemp(make.__name__) for make in (gpt2, llama, qwen2, qwen3, mistral)}
    for make, folder in folders.items():
        theirs(make(), folder)
    return folders


@pytest.mark.parametrize(("make", "change", "reason"), REFUSED)
def test_models_unlike_ours_are_refused(
    make: Any, change: dict[str, Any], reason: str, saved: dict[Any, Path], tmp_path: Path
) -> None:
    shutil.copytree(saved[make], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as caught:
        load_pretrained(tmp_path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_that_is_only_sentencepieces_own_file(saved: dict[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(saved[llama], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"has a tokenizer\.model, but a tokenizer\.json is needed: .*save_pretrained"):
        load(tmp_path)
    assert load(tmp_path, need_tokenizer=False).tokenizer is None


def broken(folder: Path, how: str) -> None:
    weights, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    key = "transformer.h.0.mlp.c_fc.weight"
    if how == "missing":
        save_file({k: v for k, v in weights.items() if k != key}, path)
    elif how == "surplus":
        save_file(weights | {"transformer.h.0.attn.q_norm.weight": torch.ones(8)}, path)
    elif how == "shape":
        save_file(weights | {key: weights[key].t().contiguous()}, path)
    elif how == "rank":
        save_file(weights | {key: torch.zeros(())}, path)
    elif how == "nan":
        weights[key][3, 3] = float("nan")
        save_file(weights, path)
    elif how == "integers":
        save_file(weights | {key: weights[key].int()}, path)
    elif how == "head":
        save_file(weights | {"lm_head.weight": torch.zeros(67, 32)}, path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "garbage":
        path.write_bytes(b"\xff" * 100)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no weights":
        path.unlink()
    elif how == "config":
        (folder / "config.json").write_text("{")
    elif how == "config list":
        (folder / "config.json").write_text("[1]")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "pickle":
        path.unlink()
        torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    elif how == "list":
        path.unlink()
        torch.save([1, 2], folder / "pytorch_model.bin")
    elif how == "outside":
        path.rename(folder.parent / "elsewhere.safetensors")
        index = {"weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "tokenizer":
        (folder / "tokenizer.json").write_text('{"model": 5}')
    elif how == "large tokenizer":
        CharTokenizer("".join(map(chr, range(300, 400)))).save(folder)


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("created-by-a-pickle",))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "lack transformer.h.0.mlp.c_fc.weight"),
        ("surplus", "contain transformer.h.0.attn.q_norm.weight"),
        ("shape", "c_fc.weight"),
        ("rank", "c_fc.weight"),
        ("nan", "not finite"),
        ("integers", "c_fc.weight"),
        ("head", "differ"),
        ("truncated", "damaged"),
        ("garbage", "damaged"),
        ("empty", "damaged"),
        ("no weights", "does not contain weights"),
        ("config", "config.json"),
        ("config list", "expected a JSON object"),
        ("no config", "does not contain config.json"),
        ("pickle", "asks for 'posix mkdir'"),
        ("list", "contains a list, expected a dict"),
        ("outside", "not a file in the same folder"),
        ("tokenizer", "tokenizer"),
        ("large tokenizer", "100 ids, the model only 67"),
    ],
)
def test_damage_is_one_line(
    how: str, reason: str, saved: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[gpt2], tmp_path / "model")
    broken(tmp_path / "model", how)
    with pytest.raises(UserError) as caught:
        load_pretrained("model")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "created-by-a-pickle").exists()


# ------------------------------------------------------------------------------------------------------------ the hub


def test_names_that_are_none() -> None:
    for name in ("gpt3", "no/such/folder", "../x", "a/../b", "owner/", "https://huggingface.co/gpt2", "", "~nobody/x"):
        with pytest.raises(UserError):
            load_pretrained(name)


def test_without_the_hub_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[hf\]'"):
        load_pretrained("gpt2")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("the cable\nis cut"), "Hugging Face could not be reached."),
        (RuntimeError("no such\nrevision"), "the download failed (RuntimeError: no such)."),
    ],
)
def test_without_network_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        load_pretrained("gpt2")
    assert str(caught.value) == f"Cannot load 'gpt2': no such folder, and {message}"


def test_only_named_files_are_fetched_and_the_config_first(
    saved: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "owner/model-1.5"
        asked.append(allow_patterns)
        return str(saved[gpt2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert load_pretrained("owner/model-1.5")[0].n_layer == 2
    assert asked[0] == ["config.json"]
    listing = ["pytorch_model.bin", "modeling.py", "64.tflite", "onnx/model.onnx", "rust_model.ot", "README.md"]
    listing += ["model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "merges.txt"]
    listing += ["chat_template.jinja", "generation_config.json"]
    kept = list(huggingface_hub.utils.filter_repo_objects(listing, allow_patterns=asked[1]))
    assert kept == listing[6:]
    # a folder that only happens to be called so is not meant
    (tmp_path / "gpt2").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(saved[gpt2]))
    assert load_pretrained("gpt2")[0].n_layer == 2
    # a model that is not supported is refused before its weights are asked for
    asked.clear()
    unsupported = tmp_path / "cache"
    unsupported.mkdir()
    (unsupported / "config.json").write_text('{"model_type": "mixtral"}')

    def fetch_other(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(unsupported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch_other)
    with pytest.raises(UserError, match="mixtral"):
        load_pretrained("owner/model")
    assert asked == [["config.json"]]
    shutil.copy(saved[gpt2] / "config.json", unsupported)  # supported, but its weights are of another kind
    with pytest.raises(UserError, match="does not have safetensors"):
        load_pretrained("owner/model")


def test_a_tokenizer_of_the_hub_is_fetched_without_weights(
    saved: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_from_scratch.core.tokenizer import HFTokenizer, Tokenizer
    from llm_from_scratch.data.prepare import prepare

    cache = tmp_path / "cache"
    cache.mkdir()
    HFTokenizer.train(["one and two " * 50], 270).backend(special_is_text=False).save(str(cache / "tokenizer.json"))
    asked: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "owner/model"
        asked.append(allow_patterns)
        return str(cache)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    Path("t.txt").write_text("one and two\n" * 99)
    folder = prepare("t.txt", tokenizer="owner/model", report=lambda line: None)
    assert Tokenizer.load(folder).encode("one and two").size <= 3
    assert asked and not any("model" in pattern for pattern in asked[0])

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = "Cannot load 'owner/model': no such folder, and Hugging Face could not be reached."
    with pytest.raises(UserError, match=message):
        prepare("t.txt", tokenizer="owner/model", report=lambda line: None, name="other")
    (cache / "tokenizer.json").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(UserError, match="'owner/model' does not have a tokenizer.json"):
        prepare("t.txt", tokenizer="owner/model", report=lambda line: None, name="other")


def test_the_cache_serves_offline(saved: dict[Any, Path], tmp_path: Path) -> None:
    """A process with HF_HUB_OFFLINE=1 reads what the cache of Hugging Face holds, and only that."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--gpt2"
    shutil.copytree(saved[gpt2], repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    script = (
        "from llm_from_scratch.interop.hf import load_pretrained as f\n"
        "print(f('gpt2')[0].n_embd)\n"
        "try: f('gpt2-medium')\n"
        "except ValueError as e: print(e)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    (tmp_path / "offline.py").write_text(script)
    done = forked.run(str(tmp_path / "offline.py"), env=environment)
    assert done.returncode == 0, done.stderr
    width, error = done.stdout.splitlines()
    assert width == "32"
    assert error == "Cannot load 'gpt2-medium': no such folder, and Hugging Face could not be reached."


# ------------------------------------------------------------------------------------------------------------- export

MODERN: dict[str, Any] = {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
LONG = MODERN | {"block_size": 64, "head_dim": 16, "rope_theta": 100.0, "rope_factor": 4.0, "rope_original": 16}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2 tanh": ("gpt2", {"activation": "gelu_tanh"}),
    "gpt2 relu2": ("gpt2", {"activation": "relu2", "mlp_hidden": 24}),
    "gpt2 without biases": ("gpt2", {"bias": False}),
    "gpt2 untied": ("gpt2", {"tie_embeddings": False, "n_kv_head": 4, "norm_eps": 1e-3}),
    "llama": ("llama", {**MODERN, "rope_theta": 123.0}),
    "llama grouped, untied": ("llama", {**MODERN, "n_kv_head": 2, "tie_embeddings": False}),
    "llama biases": ("llama", {**MODERN, "bias": True, "mlp_hidden": 24}),
    "qwen3": ("qwen3", {**MODERN, "qk_norm": True, "n_kv_head": 1, "dropout": 0.1}),
    "qwen2": ("qwen2", {**MODERN, "qkv_bias": True, "n_kv_head": 2}),
    "wide heads": ("llama", {**MODERN, "head_dim": 12, "n_kv_head": 2}),
    "linear": ("llama", {**LONG, "rope_scaling": "linear"}),
    "llama3": ("qwen3", {**LONG, "rope_scaling": "llama3", "rope_low": 0.5, "qk_norm": True}),
    "yarn": ("qwen2", {**LONG, "rope_scaling": "yarn", "qkv_bias": True}),
    "yarn, all its settings": (
        "llama", {**LONG, "rope_scaling": "yarn", "rope_low": 0.5, "rope_high": 3.0, "rope_attention": 1.3}
    ),
}  # fmt: skip


def checkpoint(tokenizer: Tokenizer | None = None, padding: int = 0, **changes: Any) -> Any:
    vocab_size = (tokenizer.vocab_size if tokenizer else 67) + padding
    config = GPTConfig(vocab_size=vocab_size, **{"block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32, **changes})
    torch.manual_seed(5)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return SimpleNamespace(model_config=config, model=model.state_dict(), tokenizer=tokenizer)


def parts(ck: Any) -> tuple[GPTConfig, dict[str, torch.Tensor], Tokenizer | None]:
    return ck.model_config, ck.model, ck.tokenizer


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "name", slow_except(SHAPES, "gpt2", "gpt2 without biases", "qwen3", "llama biases", "yarn, all its settings")
)
def test_transformers_reads_our_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_type, changes = SHAPES[name]
    ck = checkpoint(**changes)
    export_hf(*parts(ck), tmp_path / "out")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert other.config.model_type == model_type and other.dtype == torch.float32
    assert other.config.eos_token_id is None and other.config.bos_token_id is None
    ours = GPT(ck.model_config)
    ours.load_state_dict(ck.model)
    assert_same_logits(ours, other)
    assert_same_logits(GPT.from_pretrained(str(tmp_path / "out")), other)
    assert f"transformers {transformers.__version__} gives the same logits" in capsys.readouterr().out
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # a server may be another user
    with open(tmp_path / "out" / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    ck = checkpoint()
    ck.model = {key: tensor.bfloat16() for key, tensor in ck.model.items()}
    ck.model["lm_head.weight"] = ck.model["transformer.wte.weight"]
    export_hf(*parts(ck), tmp_path / "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert load_pretrained(tmp_path / "out")[1]["lm_head.weight"].dtype == torch.bfloat16


def test_a_merged_adapter_of_a_bfloat16_model_is_not_rounded(tmp_path: Path) -> None:
    ck, name = checkpoint(**MODERN), "transformer.h.1.attn.c_proj"
    state = {key: tensor.bfloat16() for key, tensor in ck.model.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    a, b = torch.randn(2, 32), torch.randn(32, 2) * 1e-3
    whole = merged(ck.model_config, state, {f"{name}.lora_A": a, f"{name}.lora_B": b}, 2.0)
    export_hf(ck.model_config, whole, None, tmp_path / "out")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = state[f"{name}.weight"].double() + 2.0 * b.double() @ a.double()
    found = other.model.layers[1].self_attn.o_proj.weight
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-6
    untouched = other.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(untouched, state["transformer.h.0.attn.c_proj.weight"].float())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logit_softcap": 30.0}, "a logit softcap"),
        ({"norm": "rmsnorm"}, "learned positions with RMSNorm"),
        ({"activation": "swiglu"}, "learned positions with SwiGLU"),
        ({"n_kv_head": 2}, "learned positions with grouped-query attention"),
        ({"qk_norm": True}, "learned positions with QK-norm"),
        ({**MODERN, "norm": "layernorm"}, "RoPE with LayerNorm"),
        ({**MODERN, "activation": "relu2"}, "RoPE with the relu2 activation"),
        ({**MODERN, "qk_norm": True, "bias": True}, "QK-norm with biases"),
        ({**MODERN, "qk_norm": True, "qkv_bias": True}, "QK-norm with biases"),
        ({"head_dim": 16}, "learned positions with head_dim"),
    ],
)
def test_parts_without_a_name_in_the_format_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        export_hf(*parts(checkpoint(**changes)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    for taken in (tmp_path / "used", tmp_path / "used" / "mine.txt"):
        with pytest.raises(UserError, match="not an empty folder"):
            export_hf(*parts(checkpoint()), taken)
    assert (tmp_path / "used" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    export_hf(*parts(checkpoint()), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
    with pytest.raises(UserError, match="cannot write"):
        export_hf(*parts(checkpoint()), tmp_path / "used" / "mine.txt" / "below")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "file_of", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_hf(*parts(checkpoint()), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "used"]


def test_a_wrong_export_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison stands between a mistake in the table and the user."""
    wrong = dataclasses.replace(hf.FAMILIES["gpt2"], activations={"gelu_new": "gelu"})
    monkeypatch.setitem(hf.FAMILIES, "gpt2", wrong)
    with pytest.raises(UserError, match="logits differ"):
        export_hf(*parts(checkpoint()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_transformers_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "write_config", lambda family, config: {"model_type": "unheard of"})
    with pytest.raises(UserError, match="cannot read it") as caught:
        export_hf(*parts(checkpoint()), tmp_path / "out")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_their_settings(tmp_path: Path) -> None:
    for change in ({"n_layer": 3}, {"n_layer": 1}, {"vocab_size": 66}):
        ck = checkpoint()
        ck.model_config = dataclasses.replace(ck.model_config, **change)
        with pytest.raises(UserError, match="the checkpoint"):
            export_hf(*parts(ck), tmp_path / "out")
    with pytest.raises(UserError, match="come from different runs"):
        export_hf(*parts(checkpoint(CharTokenizer("abc"), padding=-1)), tmp_path / "out")


def test_without_transformers_this_program_reads_the_export_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        export_hf(*parts(checkpoint()), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "read back with the same logits" in printed and "unverified: install transformers" in printed
    assert_same_logits(
        GPT.from_pretrained(str(tmp_path / "out")),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    )


class Hub:
    """A stand-in for huggingface_hub.HfApi, which keeps what it was asked for."""

    asked: list[Any] = []
    error: Exception | None = None

    def create_repo(self, name: str, **options: Any) -> Any:
        self.asked.append((name, options))
        return SimpleNamespace(repo_id=f"me/{name}" if "/" not in name else name)

    def upload_folder(self, repo_id: str, folder_path: Path) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    def upload_file(self, repo_id: str, path_or_fileobj: Path, path_in_repo: str) -> None:
        self.asked.append((repo_id, path_in_repo, Path(path_or_fileobj).read_bytes()[:4]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The step folder of a run."""
    from llm_from_scratch.checkpoint.contents import write_checkpoint

    ck = checkpoint(Tokenizer.from_name("bpe:300", TEXT * 3), **MODERN)
    settings = {
        "data": {"dataset": "/home/somebody/data/plays", "batch_size": 4}, "model": {"n_layer": 2, "n_head": 4},
        "training": {"init_from": "scratch"}, "optimizer": {"learning_rate": 0.002, "beta1": 0.9},
        "generation": {"temperature": 0.7, "top_k": None, "top_p": 0.9, "start": "secret"},
    }  # fmt: skip
    return write_checkpoint(
        tmp_path / "run", run_id="a", val_loss=1.25, step=300, model_config=ck.model_config, model=ck.model,
        tokenizer=ck.tokenizer, config=settings,
    )  # fmt: skip


def test_a_model_card_and_an_upload(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    import yaml

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    argv = [f"--checkpoint={run}", "--author=A. Poet", "--license=mit", "--title=Plays"]
    assert export.main([*argv, f"--output={tmp_path / 'out'}", "--push=me/plays"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert Hub.asked == [("me/plays", {"private": True, "exist_ok": True}), ("me/plays", names)]
    assert capsys.readouterr().out.endswith("uploaded " + str(tmp_path / "out") + " to me/plays\n")
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit" and header["library_name"] == "transformers" and "\n# Plays\n" in card
    for line in (
        "data: plays",
        "training: 300 steps, validation loss 1.2500",
        "author: A. Poet",
        "learning_rate: 0.002",
    ):
        assert line in card
    assert "somebody" not in card and "secret" not in card and "beta1" not in card
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.do_sample, generation.temperature, generation.top_k, generation.top_p) == (True, 0.7, 0, 0.9)
    # the code in the card works
    code = card.split("```python\n")[1].split("```")[0].replace("PATH_OR_NAME", str(tmp_path / "out"))
    exec(code.replace("max_new_tokens=100", "max_new_tokens=2"), {})
    # a failed upload leaves the folder
    monkeypatch.setattr(Hub, "error", ConnectionError("the cable\nis cut"))
    assert export.main([*argv, f"--output={tmp_path / 'again'}", "--push=plays"]) == 2
    error = capsys.readouterr().err
    assert "again is complete, but was not uploaded to plays (ConnectionError: the cable)" in error
    assert "hf upload plays " in error and (tmp_path / "again" / "config.json").is_file()
    # refused before anything is written
    for wrong in ("--push=a/b/c", "--format=nanogpt"):
        assert export.main([*argv, f"--output={tmp_path / 'none'}", "--push=plays", wrong]) == 2
    assert not (tmp_path / "none").exists()


def test_a_gguf_file_is_uploaded_and_describes_itself(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    out = tmp_path / "plays.gguf"
    argv = [f"--checkpoint={run}", f"--output={out}", "--format=gguf", "--push=me/plays", "--license=mit"]
    assert export.main(argv) == 0
    assert Hub.asked[1:] == [("me/plays", "plays.gguf", b"GGUF")]
    found = {key: field.contents() for key, field in gguf.GGUFReader(out).fields.items()}
    assert found["general.name"] == "plays" and found["general.license"] == "mit"
    assert found["general.description"] == "data: plays; training: 300 steps, validation loss 1.2500"
    assert "learning_rate: 0.002" in found["gptsmith.settings"]
    assert found["general.sampling.temp"] == pytest.approx(0.7) and found["general.sampling.top_k"] == 0


# --------------------------------------------------------------------------------------------------------- tokenizers


def tiny_tiktoken(pattern: str | None = None, name: str = "gpt2") -> TiktokenTokenizer:
    """A vocabulary of tiktoken's kind, learned here: 256 bytes in GPT-2's order, merges, a gap, and end of text."""
    trained = json.loads(Tokenizer.from_name("bpe:700", TEXT * 3).json_text)["model"]["vocab"]  # type: ignore[attr-defined]
    to_byte = {char: byte for byte, char in enumerate(hf_tokenizer.byte_to_char())}
    tokens = [bytes(to_byte[char] for char in token) for token in trained if token != EOT]
    tokens.sort(key=lambda token: len(token) > 1)  # stable: single bytes first, merges in their order
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {token: i for i, token in enumerate(tokens)}
    return TiktokenTokenizer(name, ranks, pattern or r50k_pat_str, {EOT: len(ranks) + (name != "gpt2") * 3})


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: Tokenizer.from_name("char", TEXT),
    "byte": lambda: Tokenizer.from_name("byte"),
    "bpe": lambda: Tokenizer.from_name("bpe:400", TEXT * 3),
    "gpt2": tiny_tiktoken,
    "cl100k": lambda: tiny_tiktoken(CL100K, "cl100k_base"),
}


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_auto_tokenizer_reads_our_files(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    export_hf(*parts(checkpoint(tokenizer, padding=5)), tmp_path / "out")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = auto(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT).tolist()
    assert auto.decode(ids) == TEXT
    assert auto.eos_token_id == tokenizer.eot_id and auto.model_max_length == 24
    if tokenizer.eot_id is not None:
        assert auto(EOT)["input_ids"] == [tokenizer.eot_id] == tokenizer.encode(EOT, allow_special=True).tolist()
    else:
        assert auto.eos_token is None
    back = load_pretrained(tmp_path / "out")[2]
    assert back is not None and back.fingerprint() == tokenizer.fingerprint() and back.name == tokenizer.name
    # as transformers itself saves it again, our own files are gone, and the ids are still the same
    auto.save_pretrained(tmp_path / "again")
    again = hf_tokenizer.read_tokenizer(tmp_path / "again", gpt2=True)
    assert again is not None and np.array_equal(again.encode(TEXT), ids) and again.decode(ids) == TEXT
    assert again.eot_id == tokenizer.eot_id


def test_a_tokenizer_json_that_cuts_and_adds(tmp_path: Path) -> None:
    """Truncation and the beginning-of-text token that a file of others asks for stay its own affair."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(Tokenizer.from_name("bpe:400", TEXT * 3).json_text)  # type: ignore[attr-defined]
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(5)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 401)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_name(str(tmp_path / "tokenizer.json"))
    export_hf(*parts(checkpoint(tokenizer)), tmp_path / "out")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = auto(TEXT, add_special_tokens=False)["input_ids"]
    assert plain == tokenizer.encode(TEXT).tolist() and len(plain) > 5
    assert auto(TEXT)["input_ids"] == [401, *plain]
    assert auto.eos_token_id == tokenizer.eot_id


def test_unknown_character_is_an_error_there_too(tmp_path: Path) -> None:
    export_hf(*parts(checkpoint(CharTokenizer("abc \n"))), tmp_path / "out")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(Exception, match="UNK"):
        auto("abcd")


def test_padded_ids_are_never_generated(tmp_path: Path) -> None:
    """Rows of the embedding beyond the tokenizer, made the likeliest of all: transformers still leaves them out."""
    tokenizer = tiny_tiktoken(name="cl100k_base")  # with a gap of three ids before the end of text
    ck = checkpoint(tokenizer, padding=8)
    unused = [*range(tokenizer.vocab_size - 4, tokenizer.vocab_size - 1)]
    unused += [*range(tokenizer.vocab_size, tokenizer.vocab_size + 8)]
    ck.model["lm_head.weight"][unused] = 50.0 * torch.randn(len(unused), 32)
    export_hf(*parts(ck), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == tokenizer.vocab_size + 8
    assert model.generation_config.suppress_tokens == unused
    torch.manual_seed(0)
    prompt = torch.randint(tokenizer.vocab_size - 4, (4, 3))
    with torch.no_grad():
        likeliest = model(prompt).logits.argmax(-1)
    assert set(likeliest.flatten().tolist()) & set(unused)  # else nothing is proved
    for sample in (True, False):
        drawn = model.generate(prompt, max_new_tokens=15, do_sample=sample)[:, 3:]
        assert not set(drawn.flatten().tolist()) & set(unused)
    assert isinstance(transformers.AutoTokenizer.from_pretrained(tmp_path / "out").decode(unused), str)


def test_generation_does_not_stop_at_an_ordinary_token(tmp_path: Path) -> None:
    """Llama's default end of text, id 2, is a plain letter of a char model."""
    export_hf(*parts(checkpoint(CharTokenizer("abcdef"), **MODERN)), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.manual_seed(0)
    drawn = model.generate(torch.tensor([[0]]), max_new_tokens=20, do_sample=True, temperature=5.0)
    assert drawn.shape == (1, 21) and 2 in drawn[0, :-1]


def test_merges_equal_the_trained_merges() -> None:
    """The trainer's own list of merges is the reference."""
    trained = Tokenizer.from_name("bpe:600", TEXT * 3)
    assert isinstance(trained, HFTokenizer)
    definition = json.loads(trained.json_text)["model"]
    to_byte = {char: byte for byte, char in enumerate(hf_tokenizer.byte_to_char())}

    def as_bytes(token: str) -> bytes:
        return bytes(to_byte[char] for char in token)

    ranks = {as_bytes(token): i for token, i in definition["vocab"].items() if token != EOT}
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in definition["merges"]]
    assert hf_tokenizer.merges(ranks) == [(as_bytes(a), as_bytes(b)) for a, b in pairs]


def gpt2_files() -> Path | None:
    folder = os.environ.get("LLM_GPT2_DIR") or f"{os.environ.get('LLM_TEST_DATA_DIR', '')}/gpt2"
    return Path(folder) if (Path(folder) / "encoder.json").is_file() else None


@pytest.mark.skipif(gpt2_files() is None, reason="needs GPT-2's vocab.bpe and encoder.json: LLM_GPT2_DIR")
@pytest.mark.slow  # small ones of its kind: test_auto_tokenizer_reads_our_files
def test_gpt2s_own_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 50,000 merges are found again from the ids, and every form of its files is our gpt2 tokenizer."""
    source = gpt2_files()
    assert source is not None
    monkeypatch.setenv("LLM_GPT2_DIR", str(source))
    tokenizer = Tokenizer.from_name("gpt2")
    lines = (source / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    chars = hf_tokenizer.byte_to_char()
    found = hf_tokenizer.merges(tokenizer.ranks)  # type: ignore[attr-defined]
    assert [" ".join("".join(chars[b] for b in part) for part in pair) for pair in found] == lines
    export_hf(*parts(checkpoint(tokenizer, padding=47, n_layer=1, n_embd=8)), tmp_path / "out")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    reference = transformers.GPT2TokenizerFast(
        vocab=json.loads((source / "encoder.json").read_text()), merges=[tuple(line.split(" ")) for line in lines]
    )
    for text in (TEXT, hf_tokenizer.PROBE, " " * 50 + "\n\n  x", "don't 東京 'LL 12345678"):
        assert auto(text)["input_ids"] == reference(text)["input_ids"] == tokenizer.encode(text).tolist()
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["suppress_tokens"] == list(range(50257, 50304)) and config["eos_token_id"] == 50256
    monkeypatch.setenv("LLM_GPT2_DIR", str(tmp_path))  # nothing there: what follows must not need it
    folders = [tmp_path / "saved", tmp_path / "old"]
    auto.save_pretrained(folders[0])
    folders[1].mkdir()
    shutil.copy(source / "encoder.json", folders[1] / "vocab.json")
    shutil.copy(source / "vocab.bpe", folders[1] / "merges.txt")
    for folder in folders:
        back = hf_tokenizer.read_tokenizer(folder, gpt2=True)
        assert back is not None and back.name == "gpt2" and back.fingerprint() == tokenizer.fingerprint()


def test_other_vocabularies_are_not_taken_for_gpt2s(tmp_path: Path) -> None:
    trained = Tokenizer.from_name("bpe:400", TEXT * 3)
    definition = json.loads(trained.json_text)["model"]  # type: ignore[attr-defined]
    (tmp_path / "vocab.json").write_text(json.dumps(definition["vocab"]))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in definition["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    back = hf_tokenizer.read_tokenizer(tmp_path, gpt2=True)
    assert back is not None and back.name == "hf" and back.eot_id == trained.eot_id
    assert np.array_equal(back.encode(TEXT), trained.encode(TEXT)) and back.decode(back.encode(TEXT)) == TEXT
    assert hf_tokenizer.read_tokenizer(tmp_path, gpt2=False) is None  # how Llama cuts words is not said there


@pytest.mark.network
def test_gpt2_from_the_hub(tmp_path: Path) -> None:
    ours, other = GPT.from_pretrained("gpt2"), transformers.AutoModelForCausalLM.from_pretrained("gpt2")
    assert_same_logits(ours, other, tolerance=1e-4)
