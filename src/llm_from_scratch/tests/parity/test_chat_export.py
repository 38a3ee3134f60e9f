"""What ends a turn of a chat model, in both export formats: read back, and by transformers and llama.cpp."""

from __future__ import annotations

import pytest
import torch

from llm_from_scratch.core.conversations import add_plain_template
from llm_from_scratch.core.tokenizer import Tokenizer
from llm_from_scratch.interop.gguf import export_gguf, load_gguf
from llm_from_scratch.interop.gguf_tokenizer import describe_tokenizer, read_tokenizer
from llm_from_scratch.interop.hf import export_hf, load_pretrained

from .test_gguf import LLAMA, TEXT, chat_tokenizer, llama_cpp, random_model

TALK = [{"role": "user", "content": "to be"}, {"role": "assistant", "content": "or not"}]


@pytest.mark.cases(1)
@pytest.mark.parametrize("spec", ["char", "byte"])
def test_the_end_of_a_turn_without_an_end_of_text(spec, tmp_path):
    """A char or byte chat model ends its turns in both formats, and in transformers."""
    tokenizer = Tokenizer.from_name(spec, TEXT + "\x03:\nUserAssistant")
    add_plain_template(tokenizer)
    (end,) = tokenizer.encode("\x03").tolist()
    model = random_model(**LLAMA, rows=tokenizer.vocab_size)
    export_gguf(model.config, model.state_dict(), tokenizer, tmp_path / "m.gguf", "f32")
    export_hf(model.config, model.state_dict(), tokenizer, tmp_path / "hf")
    expected = "User:\nto be\x03\nAssistant:\nor not\x03\n"
    for same in (load_gguf(tmp_path / "m.gguf")[2], load_pretrained(tmp_path / "hf")[2]):
        assert same is not None and same.chat is not None and same.end_ids == {end} and same.eot_id is None
        assert (same.chat.source, same.chat.eos) == (tokenizer.chat.source, "\x03")
        assert same.chat.render_parts(TALK, [(2, False)]) == [(0, expected)]
    (tmp_path / "hf" / "tokenizer.meta.json").unlink()  # what other programs read
    other = load_pretrained(tmp_path / "hf")[2]
    assert other is not None and other.chat is not None and other.end_ids == {end}
    assert other.chat.render_parts(TALK, [(2, False)]) == [(0, expected)]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.apply_chat_template(TALK, tokenize=False) == expected
    assert theirs.apply_chat_template(TALK, return_dict=False) == tokenizer.encode(expected).tolist()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == end
    torch.nn.init.zeros_(loaded.lm_head.weight)
    loaded.lm_head.bias = torch.nn.Parameter(torch.eye(tokenizer.vocab_size)[end])  # it only writes the end
    ids = torch.tensor([tokenizer.encode("to be").tolist()])
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist() == [*ids[0].tolist(), end]


def test_a_file_has_three_ids_that_end_a_turn(capsys):
    tokenizer = chat_tokenizer()
    for ends, noted in (({0, 7}, ""), ({0, 7, 9}, "omitted: 9\n")):
        tokenizer.ends = frozenset(ends)
        entries = describe_tokenizer(tokenizer)
        assert read_tokenizer(entries, "x").end_ids == {0, 7, tokenizer.eot_id}
        assert [entries[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")] == [
            tokenizer.eot_id,
            0,
            7,
        ]
        assert capsys.readouterr().err.endswith(noted)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["char", "byte"])
def test_llama_cpp_ends_the_turn(spec, tmp_path):
    tokenizer = Tokenizer.from_name(spec, TEXT + "\x03:\nUserAssistant")
    add_plain_template(tokenizer)
    (end,) = tokenizer.encode("\x03").tolist()
    model = random_model(**LLAMA | {"tie_embeddings": False}, rows=tokenizer.vocab_size)
    with torch.no_grad():  # it only writes the end: the last norm gives a constant
        model.transformer.wte.weight[:, 0] = 50.0
        model.transformer.ln_f.weight.copy_(torch.eye(32)[0])
        model.lm_head.weight.zero_()
        model.lm_head.weight[end, 0] = 9.0
    export_gguf(model.config, model.state_dict(), tokenizer, tmp_path / "m.gguf", "f32")
    answer = llama_cpp(tmp_path / "m.gguf").handle_completions({"prompt": "to be", "n_predict": 6, "temperature": 0.0})
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 1
