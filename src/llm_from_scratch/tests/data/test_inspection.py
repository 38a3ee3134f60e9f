from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_from_scratch.cli import inspect_data
from llm_from_scratch.core import tokenfile
from llm_from_scratch.core.tokenizer import Tokenizer
from llm_from_scratch.data import inspection
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.tests.texts import real_text

pytestmark = pytest.mark.usefixtures("here")


def report_of(folder: Path, **settings: Any) -> inspection.Inspection:
    given = {"windows": 2, "length": 16, "seed": 0, "duplicates": True} | settings
    return inspection.inspect_dataset(folder, **given)


@pytest.mark.parametrize("block", [7, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_counts_equal_the_tokens(here: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the documents, decoded and counted the slow way."""
    monkeypatch.setattr(inspection, "BLOCK", block)
    text = real_text()
    texts = [text[80 * i : 80 * i + 20 + 11 * (i % 7)] for i in range(60)]
    texts += [texts[3], texts[5], texts[3]]
    Path("train.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    Path("val.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in [texts[0], "new text", texts[3]]))
    folder = prepare(["train.jsonl"], val_files=("val.jsonl",), tokenizer="gpt2", report=lambda line: None)
    found, tokenizer = report_of(folder), Tokenizer.load(folder)
    ids = np.fromfile(folder / "train.bin", "<u2")
    train, lengths = found.splits["train"], [len(tokenizer.encode(one)) + 1 for one in texts]
    assert (train.tokens, train.files, train.used) == (len(ids), 1, len(set(ids.tolist())))
    assert train.text_bytes == sum(len(one.encode()) for one in texts)
    assert (train.documents, train.longest, train.median) == (63, max(lengths), int(np.median(lengths)))
    assert (train.duplicates, found.shared) == (3, 2)
    sizes = {name: sum(low <= length <= high for length in lengths) for name, low, high in [
        (f"{1 << k} to {(2 << k) - 1}", 1 << k, (2 << k) - 1) for k in range(12)]}  # fmt: skip
    assert train.lengths == {name: count for name, count in sizes.items() if count}
    assert train.common[0] == (tokenizer.decode([np.bincount(ids).argmax()]), np.bincount(ids).max())
    assert len(train.windows) == 2 and all(window in tokenizer.decode(ids) for window in train.windows)
    assert found.problems == [] and found.facts["integrity"] == "hashes agree"
    assert len(train.bytes_per_token) == 10 and 1 < train.bytes_per_token[0] < 8


def test_conversations_are_documents(here: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    Path("c.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    found = report_of(prepare(["c.jsonl"], tokenizer="byte", report=lambda line: None))
    assert sum(report.documents for report in found.splits.values()) == 20


def test_damage_is_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("hello world, " * 200)
    folder = prepare(["a.txt"], tokenizer="char", report=lambda line: None)
    assert inspect_data.main(["a", "--html=a.html"]) == 0
    assert re.search(r"train: 2,340 tokens, 2,340 bytes of text, 1 files, 9 ids", capsys.readouterr().out)
    text = Path("a.html").read_text()
    assert text.count("<blockquote>") == 6 and "<script" not in text
    data = bytearray((folder / "train.bin").read_bytes())
    data[4:6] = b"\xff\x00"
    (folder / "train.bin").write_bytes(data)
    assert inspect_data.main(["a"]) == 1
    out = capsys.readouterr().out
    assert "train.bin does not match its hash" in out and "1 ids are outside the vocabulary of 9" in out
    (folder / "val.bin").unlink()
    assert inspect_data.main(["a"]) == 1 and "val.bin: No such file" in capsys.readouterr().out
    assert inspect_data.main([]) == 2 and inspect_data.main(["nosuch"]) == 2


def test_ids_far_outside_the_vocabulary_are_counted(here: Path) -> None:
    """A count for every id up to the largest would need 32 GB."""
    folder = Path("data/wide")
    folder.mkdir(parents=True)
    ids = np.arange(400, dtype="<u4") % 9
    ids[7::50] = 4_000_000_000
    splits = {split: {"shards": [{"file": f"{split}.bin", "tokens": len(ids)}]} for split in ("train", "val")}
    manifest = {"format": tokenfile.FORMAT, "version": 1, "dtype": "uint32", "vocab_size": 9, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for split in splits:
        ids.tofile(folder / f"{split}.bin")
    Tokenizer.from_name("char", "abcdefghi").save(folder)
    found = report_of(folder, windows=20)
    assert found.problems == [f"{split}: 8 ids are outside the vocabulary of 9" for split in splits]
    windows = found.splits["train"].windows
    assert 0 < len(windows) < 20 and all(window in "abcdefghi" * 9 for window in windows)
    assert inspect_data.main(["wide"]) == 1


def test_a_dataset_in_a_store_is_compared_with_its_hashes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    Path("a.txt").write_text("hello world, " * 200)
    folder = prepare(["a.txt"], tokenizer="char", report=lambda line: None)
    store.put(str(folder), "/inspected/a", recursive=True)
    assert inspect_data.main(["memory://inspected/a"]) == 0 and "hashes agree" in capsys.readouterr().out
    (kept,) = Path("data/cache/remote").glob("*/*-train.bin")
    kept.write_bytes(bytes(kept.stat().st_size))
    assert inspect_data.main(["memory://inspected/a"]) == 1
    assert "-train.bin does not match its hash" in capsys.readouterr().out
    store.rm("/inspected", recursive=True)


def test_data_of_nanogpt(here: Path) -> None:
    Path("data/n").mkdir(parents=True)
    for split in ("train", "val"):
        np.array([1, 2, 50256, 3] * 50, "<u2").tofile(f"data/n/{split}.bin")
    found = report_of(Path("data/n"))
    assert found.splits["train"].documents == 51 and "no manifest.json" in found.facts["integrity"]
    assert tokenfile.MANIFEST == "manifest.json"
