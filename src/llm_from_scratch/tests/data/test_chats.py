"""Conversations as data: what is read and refused, what is learned, and what is written."""

from __future__ import annotations

import io
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_from_scratch.core import chat
from llm_from_scratch.core.chat import END, ChatTemplate
from llm_from_scratch.core.conversations import encode_conversation
from llm_from_scratch.core.dataset import TokenData
from llm_from_scratch.core.packing import PackedData, marked
from llm_from_scratch.core.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from llm_from_scratch.data import chats
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.data.sources import FileSource
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.files import read_json
from llm_from_scratch.tests.data.test_prepare import in_hash_split

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "never answered"},
]
FIRST = ("here", TALK)
# as Qwen3 does it: the reasoning of earlier turns is dropped
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split('#')[-1] }}<|endoftext|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ask(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": question, "completion": answer}


def learned(tokenizer: Tokenizer, messages: list[dict[str, str]] = TALK) -> list[str]:
    sequences = encode_conversation(tokenizer, messages)
    return [marked(tokenizer, ids, learned) for ids, learned in sequences]


def test_the_assistants_turns_and_their_ends_are_learned(capsys) -> None:
    tokenizer = ByteTokenizer()
    chats.give_template(tokenizer, None, FIRST, print)
    assert "plain (the tokenizer does not have one)" in capsys.readouterr().out
    text = "System:\nBe brief.\3\nUser:\né?\3\nAssistant:\n>>Yes.\3<<\nUser:\nSure?\3\nAssistant:\n>>No.\3<<"
    assert learned(tokenizer) == [json.dumps(text, ensure_ascii=False)[1:-1]]
    assert tokenizer.end_ids == {ord(END)}
    with pytest.raises(UserError, match="the roles are system, user and assistant, not tool"):
        learned(tokenizer, [{"role": "tool", "content": "x"}, TALK[2]])


def test_a_template_that_rewrites_earlier_turns_gives_a_sequence_for_each(tmp_path: Path) -> None:
    tokenizer = HFTokenizer.train(["ab ba " * 50], 300)
    (tmp_path / "t").write_text(FORGETFUL)
    chats.give_template(tokenizer, str(tmp_path / "t"), FIRST, print)
    turns = (("user", "a"), ("assistant", "x#b"), ("user", "c"), ("assistant", "y#d"))
    messages = [{"role": role, "content": content} for role, content in turns]
    assert learned(tokenizer, messages) == [
        "<user>a<|endoftext|><assistant>>>x#b<|endoftext|><<",
        "<user>a<|endoftext|><assistant>b<|endoftext|><user>c<|endoftext|><assistant>>>y#d<|endoftext|><<",
    ]
    tokenizer.chat = ChatTemplate("{{ messages | length }}")
    with pytest.raises(UserError, match="begins the assistant.s turn differently"):
        learned(tokenizer)


def test_a_long_conversation_is_one_sequence(tmp_path: Path) -> None:
    """200 messages of 2 KB, whose prompts together have 40 MB."""
    texts = [f"{number:04}" * 512 for number in range(200)]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    write(tmp_path / "c.jsonl", {"messages": messages}, ask("a", "b"))
    folder = prepare("c.jsonl", root=tmp_path, report=print, tokenizer="byte", seed=1)
    tokenizer, found = Tokenizer.load(folder), {}
    for split in ("train", "val"):
        ids, marks = (
            np.fromfile(folder / f"{split}{kind}", dtype) for kind, dtype in ((".bin", "<u2"), ("_marks.bin", "u1"))
        )
        found[len(ids) > 99] = tokenizer.decode(ids), tokenizer.decode(ids[marks & 1 == 1]), int((marks & 2 == 2).sum())
    whole = "".join(f"{('User', 'Assistant')[n % 2]}:\n{text}{END}\n" for n, text in enumerate(texts))
    assert found[True] == (whole[:-1], "".join(text + END for text in texts[1::2]), 1)
    assert found[False] == (f"User:\na{END}\nAssistant:\nb{END}", f"b{END}", 1)


def test_texts_of_a_conversation_that_is_rewritten_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat = ChatTemplate(FORGETFUL)
    messages = [{"role": ("user", "assistant")[n % 2], "content": "#" * (n % 2) + "ab" * 50} for n in range(40)]
    tokenizer.ends = frozenset({ord(">")})
    assert len(encode_conversation(tokenizer, messages)) == 20
    monkeypatch.setattr(chat, "MAX_HELD", 9999)
    with pytest.raises(UserError, match="more than 9,999 characters in total"):
        encode_conversation(tokenizer, messages)
    assert len(encode_conversation(tokenizer, messages[:2])) == 1  # the process was started again


@pytest.mark.slow
def test_the_templates_time_is_limited_for_all_conversations_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow.jinja"
    slow.write_text("{% for i in range(60000) %}{% endfor %}" + FORGETFUL)  # below the limit of a text
    write(tmp_path / "c.jsonl", *(ask(f"{n}?", f"{n}") for n in range(500)))
    monkeypatch.setattr(chats, "RUN_SECONDS", 0.5)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"c.jsonl, line \d+: the chat template .* it took \d s for [\d,]+ messages"):
        prepare("c.jsonl", root=tmp_path, report=lambda line: None, tokenizer="byte", chat_template=str(slow))
    assert time.monotonic() - begin < 60
    monkeypatch.setattr(chats, "RUN_SECONDS", 60.0)
    prepare("c.jsonl", root=tmp_path, report=lambda line: None, tokenizer="byte")


def test_a_conversation_of_too_many_messages_is_refused(tmp_path: Path) -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": "x" * 900} for n in range(4096)]
    path = write(tmp_path / "c.jsonl", {"messages": messages[:1024]}, {"messages": messages})
    with pytest.raises(UserError, match="line 2: 4,096 messages are more than 1,024: divide the conversation"):
        list(chats.conversations(FileSource(path)))


@pytest.mark.slow
def test_the_longest_conversations_need_bounded_memory() -> None:
    resource = pytest.importorskip("resource")
    tokenizer = ByteTokenizer()
    chats.give_template(tokenizer, None, FIRST, print)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    messages = [{"role": ("user", "assistant")[n % 2], "content": "x" * 4000} for n in range(chats.MAX_MESSAGES)]
    ((ids, learned),) = encode_conversation(tokenizer, messages)
    assert learned.sum() == 4001 * len(messages) // 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # kilobytes


def test_a_token_never_spans_prompt_and_answer() -> None:
    """A BPE token that would begin in the prompt and end in the answer is never drawn when the model answers."""
    tokenizer = HFTokenizer.train(["abcd " * 100], 300)
    tokenizer.chat = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert len(tokenizer.encode("abcd")) == 1
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    ((ids, mask),) = encode_conversation(tokenizer, messages)
    assert ids[~mask].tolist() == tokenizer.encode("ab").tolist() and tokenizer.decode(ids[mask]) == "cd"


def test_the_end_of_a_turn_is_found_in_the_template(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    backend = HFTokenizer.train(["ab ba " * 50], 300).backend(special_is_text=False)
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer = HFTokenizer(backend.to_str(), eot_id=0)
    (tmp_path / "t").write_text("{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}")
    chats.give_template(tokenizer, str(tmp_path / "t"), FIRST, print)
    assert tokenizer.end_ids == {0, tokenizer.vocab_size - 1} and learned(tokenizer, TALK[1:3]) == [
        "é?<|im_end|>\\n>>Yes.<|im_end|><<"
    ]
    said: list[str] = []
    (tmp_path / "t").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    chats.give_template(HFTokenizer(backend.to_str(), eot_id=0), str(tmp_path / "t"), FIRST, said.append)
    assert "no single token ends a turn" in said[-1]


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "\0b"}]
FORMS = [
    ({"messages": TALK[1:3]}, TALK[1:3]),
    (ask("q", "a"), [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
    ({"prompt": TALK[:2], "completion": [TALK[2]], "id": 3}, TALK[:3]),
    ({"messages": [{"role": "user", "content": PARTS}, TALK[2]]}, [{"role": "user", "content": "a\0b"}, TALK[2]]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), FORMS)
def test_forms_of_a_conversation(row: Any, messages: Any) -> None:
    assert chats.messages_of(row) == messages


WRONG: list[tuple[Any, str]] = [
    ("{", "line 2: Expecting"),
    ("[1]", "line 2: expected an object with messages"),
    ({"text": "x"}, "its fields are 'text'"),
    ({"prompt": "x"}, "its fields are 'prompt'"),
    ({"messages": "x"}, "not a list of 1 to"),
    ({"messages": []}, "not a list of 1 to"),
    ({"messages": [3]}, "message 1 is not an object with role and content"),
    ({"messages": [{"role": "user"}]}, "message 1 is not an object"),
    ({"messages": [{"role": 3, "content": "x"}]}, "message 1: role is not a string"),
    ({"messages": [TALK[1], {"role": "assistant", "content": None}]}, "message 2: content is not a string"),
    ({"messages": [TALK[1], {"role": "assistant", "content": [{"type": "image_url"}]}]}, "content is not a string"),
    ({"messages": [TALK[1], {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls a tool"),
    ({"messages": [TALK[1]]}, "no message has the role assistant"),
    ({"messages": TALK[2:]}, "the first message is the assistant's"),
    (ask("\ud800", "x"), "character 0 of content is half of a surrogate pair"),
    ("[" * 100_000, "line 2"),
    ({"messages": [TALK[1], TALK[2]], "x": [[]] * 700_000}, "too many values"),
    (ask("x" * (4 << 20), "y"), "line 2 is longer than 4 MiB"),
]


@pytest.mark.parametrize(("row", "says"), WRONG, ids=[says for _, says in WRONG])
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, says: str) -> None:
    source = FileSource(write(tmp_path / "c.jsonl", ask("a", "b"), row))
    assert chats.is_conversations(source)
    with pytest.raises(UserError) as refused:
        list(chats.conversations(source))
    assert says in str(refused.value) and "c.jsonl, line 2" in str(refused.value) and len(str(refused.value)) < 400


def test_a_dataset_of_conversations(tmp_path: Path) -> None:
    rows = [ask(f"What is {n} plus {n}?", f"{n} + {n} = {2 * n}") for n in range(40)]
    write(tmp_path / "sums.jsonl", *rows)
    said: list[str] = []
    folder = prepare("sums.jsonl", root=tmp_path, report=said.append, tokenizer="char")
    manifest, tokenizer = read_json(folder / "manifest.json"), Tokenizer.load(folder)
    assert manifest["units"] == "conversations" and tokenizer.chat is not None and len(tokenizer.end_ids) == 1
    assert any("example (in the loss: >>...<<): User:\\nWhat is" in line for line in said)
    texts: dict[str, list[str]] = {}
    sides = [("prompt", "user"), ("completion", "assistant")]
    is_val = [in_hash_split([{"role": role, "content": row[name]} for name, role in sides]) for row in rows]
    for split, count in (("train", is_val.count(False)), ("val", is_val.count(True))):
        data = PackedData.of(TokenData.open(folder, split), folder, split, 100, tokenizer)
        assert data.documents == count and data.cropped == 0
        (x, y), numbers, _ = data.batch(np.arange(len(data.learned)), 100, slice(None))
        texts[split] = tokenizer.decode(y[y >= 0]).split(END)[:-1]
        assert len(texts[split]) == count and f"{count} documents" in data.summary()
    for split, wanted in (("train", False), ("val", True)):
        chosen = [row["completion"] for row, val in zip(rows, is_val, strict=True) if val == wanted]
        assert sorted(texts[split]) == sorted(chosen)
    assert manifest["split"] == {"by": "hash", "val_fraction": 0.1, "seed": 2357}
    again: list[str] = []
    assert prepare("sums.jsonl", root=tmp_path, report=again.append, tokenizer="char") == folder
    assert "up to date" in again[0] or "up to date" in again[1]
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    other = prepare("sums.jsonl", root=tmp_path, report=said.append, tokenizer=str(folder), name="other",
                    chat_template=str(tmp_path / "plain.jinja"))  # fmt: skip
    assert Tokenizer.load(other).chat.source.startswith("{% for m in messages %}{{ m.role }}")  # type: ignore[union-attr]


def test_a_small_dataset_of_conversations_has_every_character(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    folder = prepare("c.jsonl", root=tmp_path, report=lambda line: None)
    assert Tokenizer.load(folder).encode("Ω?").size  # with char, this raises


def test_conversations_from_standard_input_and_mixed_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n" + "".join(json.dumps({"messages": TALK}) + "\n" for _ in range(3))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + text.encode())))
    folder = prepare("-", root=tmp_path, report=lambda line: None, tokenizer="byte")
    assert read_json(folder / "manifest.json")["splits"]["val"]["marks"]
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "a.jsonl", ask("a", "b"))
    write(tmp_path / "d" / "b.jsonl", {"text": "x"})
    quiet = {"root": tmp_path, "report": lambda line: None}
    for given, options, says in (
        ("d", {}, "a.jsonl holds conversations, d/b.jsonl does not"),
        ("d/a.jsonl", {"tokenizer": "byte"}, "1 conversations are too few to split"),
        ("d/a.jsonl", {"lines": True}, "remove --lines"),
        ("d/b.jsonl", {"chat_template": "x"}, "--chat_template needs conversations"),
        ("d/a.jsonl", {"text_key": "prompt", "val_files": ("d/b.jsonl",)}, "'prompt'"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(given, **quiet, **options)  # type: ignore[arg-type]


def test_a_damaged_file_is_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = {"root": tmp_path, "report": lambda line: None, "tokenizer": "byte"}
    for kind, row in (("talk", ask("a", "b")), ("text", {"text": "some text"})):
        (tmp_path / kind).mkdir()
        for name in ("a", "c"):
            write(tmp_path / kind / f"{name}.jsonl", *[row] * 9)
        (tmp_path / kind / "b.jsonl.gz").write_bytes(b"no gzip")
        with pytest.raises(UserError, match=f"^{kind}/b.jsonl.gz is damaged: Not a gzipped file"):
            prepare(kind, **quiet)  # type: ignore[arg-type]
    prepare("text", bad_files="skip", **quiet)  # type: ignore[arg-type]
    assert "skipped: text/b.jsonl.gz is damaged" in capsys.readouterr().err
    (tmp_path / "talk" / "b.jsonl.gz").unlink()
    (tmp_path / "talk" / "b.jsonl").write_text("{half a line\n")
    with pytest.raises(UserError, match="^talk/b.jsonl, line 1: "):
        prepare("talk", **quiet)  # type: ignore[arg-type]


def test_conversations_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", *[ask("a", "b")] * 9)

    def fail(*_: object, **__: object) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    for read in (chats.is_conversations, lambda source: list(chats.conversations(source))):
        with pytest.raises(UserError, match="cannot read .*a.jsonl: Input/output error"):
            read(FileSource(path))


def test_a_vocabulary_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abc" * 100)
    char = prepare("t.txt", root=tmp_path, report=lambda line: None, tokenizer="char")
    write(tmp_path / "c.jsonl", ask("a", "b"), ask("b", "c"))
    with pytest.raises(UserError, match="does not have a token that ends a turn"):
        prepare("c.jsonl", root=tmp_path, report=lambda line: None, tokenizer=str(char))


def test_lines_are_documents(tmp_path: Path) -> None:
    lines = [f"{a}+{a}={2 * a}" for a in range(50)]
    (tmp_path / "sums.txt").write_text("\n".join(lines) + "\n\n\n")
    for name in ("char", "bpe:270"):
        folder = prepare("sums.txt", root=tmp_path, report=lambda line: None, tokenizer=name, lines=True, name=name[:3])
        tokenizer, manifest = Tokenizer.load(folder), read_json(folder / "manifest.json")
        end = tokenizer.encode("\n")[-1] if name == "char" else tokenizer.eot_id
        assert manifest["units"] == "lines" and manifest["document_end"] == end and tokenizer.end_ids == {end}
        found: list[str] = []
        for split in ("train", "val"):
            ids = TokenData.open(folder, split).shards[0][:]
            assert ids[-1] == end
            found += [tokenizer.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]]
            data = PackedData.of(TokenData.open(folder, split), folder, split, 32, tokenizer)
            assert data.documents == sum(in_hash_split(line) == (split == "val") for line in lines)
        assert sorted(found) == sorted(lines)


@pytest.mark.parametrize("first", [1, 3])
def test_lines_end_with_the_id_that_is_written(tmp_path: Path, first: int) -> None:
    """As Qwen2.5-Instruct: the generation config lists an end with a smaller id than that of the end-of-text token."""
    backend = HFTokenizer.train(["ab ba " * 50], 270).backend(special_is_text=False)
    backend.add_special_tokens(["<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0]}')
    (tmp_path / "train.txt").write_text("ab ba\n" * first)
    (tmp_path / "val.txt").write_text("ba\n")
    given: dict[str, Any] = {"root": tmp_path, "report": lambda line: None, "tokenizer": str(tmp_path), "lines": True}
    folder = prepare(train_files=["train.txt"], val_files=["val.txt"], **given)
    end = Tokenizer.load(folder).eot_id
    assert Tokenizer.load(folder).end_ids == {0, end} and read_json(folder / "manifest.json")["document_end"] == end
    for split, count in (("train", first), ("val", 1)):
        data = TokenData.open(folder, split)
        assert data.shards[0][len(data) - 1] == end
        assert PackedData.of(data, folder, split, 32, None).documents == count


def test_lines_of_a_chat_tokenizer_without_an_end_of_text_end_with_a_line_break(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.ends = frozenset({3})
    tokenizer.save(tmp_path / "chat")
    (tmp_path / "t.txt").write_text("a\nb\nc\nd\n")
    folder = prepare("t.txt", root=tmp_path, report=print, tokenizer=str(tmp_path / "chat"), lines=True)
    assert read_json(folder / "manifest.json")["document_end"] == 10
    assert PackedData.of(TokenData.open(folder, "train"), folder, "train", 8, None).documents == 3


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_an_edited_chat_template_is_not_up_to_date(tmp_path: Path, name: str) -> None:
    own = tmp_path / "model"
    own.mkdir()
    HFTokenizer.train(["ab ba " * 50], 270).backend(special_is_text=False).save(str(own / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("ab ba " * 20)
    edits = [
        ("tokenizer_config.json", '{"chat_template": "zero"}'),
        ("tokenizer_config.json", '{"chat_template": "zero", "bos_token": "a"}'),
        ("chat_template.jinja", "one"),
        ("chat_template.jinja", "two"),
        ("config.json", '{"eos_token_id": 3}'),
        ("config.json", '{"eos_token_id": 4}'),
        ("generation_config.json", '{"eos_token_id": 5}'),
        ("generation_config.json", '{"eos_token_id": 7}'),
    ]
    found = []
    for file, content in edits:
        (own / file).write_text(content)
        for is_known in (False, True):
            said: list[str] = []
            folder = prepare("a.txt", root=tmp_path, report=said.append, tokenizer=str(own / name))
            assert any("up to date" in line for line in said) == is_known, (file, content)
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.chat is not None
        found.append((tokenizer.chat.source, tokenizer.chat.bos, sorted(tokenizer.ends)))
    start: list[Any] = [("zero", "<|endoftext|>", []), ("zero", "a", [])]
    ends = [("two", "a", [end]) for end in (3, 4, 5, 7)]
    assert found == [*start, ("one", "a", []), ("two", "a", []), *ends]


@pytest.mark.slow
def test_mutated_files_end_in_our_errors(tmp_path: Path) -> None:
    rng, path = random.Random(5), tmp_path / "c.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in (ask("a\\\u00e9", "b"), {"messages": TALK}, FORMS[3][0])).encode()
    tokenizer, refused = ByteTokenizer(), 0
    chats.give_template(tokenizer, None, FIRST, lambda line: None)
    pieces = [
        b'"',
        b"\\ud800",
        b"\0",
        b"null",
        b"[",
        b"{}",
        b"1e999",
        b"\xff",
        b"\n",
        b"role",
        b"assistant",
        b"]}",
        b"\\u0003",
    ]
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 30)]
            elif kind == 2:
                data[at:at] = rng.choice(pieces)
            else:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 60)]
        path.write_bytes(data)
        try:
            for _, messages in chats.conversations(FileSource(path)):
                if rng.random() < 0.02:
                    encode_conversation(tokenizer, messages)
        except UserError as error:
            refused += 1
            assert str(error).startswith((str(path), "the chat template rejects")) and "\n" not in str(error)
    assert 2000 < refused < 5000
