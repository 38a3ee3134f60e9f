"""machine/files.py: only regular files are opened, and no file expands beyond its limit."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from llm_from_scratch.core.tokenizer import HFTokenizer, Tokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation.prompt import read_start
from llm_from_scratch.machine.files import open_file, parse_json, read_file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_inputs_that_are_not_files_are_named_immediately(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for name, kind in (("fifo", "a FIFO"), ("device", "a device"), ("", "a directory")):
        with pytest.raises(UserError, match=f"is {kind}, not a regular file"):
            open_file(tmp_path / name)
        if name:
            with pytest.raises(UserError, match=kind):
                read_start(f"FILE:{tmp_path / name}")
    with pytest.raises(UserError, match="null"):
        open_file(Path("a\0b"))
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "nothing")
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_a_limit_is_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="larger than 4 bytes"):
        read_file(tmp_path / "a", 4)


@pytest.mark.parametrize("part", ["[]", "{}", '{"":0}', "0", "1.5", '"ab"', "null", '["a","b"]', "[[[]]]"])
def test_json_needs_bounded_memory(part: str) -> None:
    """Whatever it is made of: refused, or within twice its size and 64 MB."""
    raw = ("[" + ",".join([part] * ((6 << 20) // (len(part) + 1))) + "]").encode()
    tracemalloc.start()
    try:
        parse_json(raw)
    except ValueError as error:
        assert "too many values" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 2 * len(raw) + (64 << 20)


def test_our_own_files_are_read() -> None:
    vocabulary = {f"token{i}": i for i in range(200_000)}
    assert parse_json(json.dumps(vocabulary).encode()) == vocabulary


def test_a_tokenizer_that_makes_texts_grow_is_refused(tmp_path: Path) -> None:
    body = json.loads(HFTokenizer.train(["abc abc"], 260).json_text)
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
    for count, good in ((3, True), (12, False)):
        body["normalizer"] = {"type": "Sequence", "normalizers": [step] * count}
        (tmp_path / "tokenizer.json").write_text(json.dumps(body))
        if good:
            assert len(Tokenizer.from_name(str(tmp_path)).encode("a")) == 4**count
        else:
            with pytest.raises(UserError, match="make texts too long"):
                Tokenizer.from_name(str(tmp_path))
