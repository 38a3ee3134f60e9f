from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import http.server
import inspect
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_from_scratch.checkpoint.store import save_checkpoint
from llm_from_scratch.config import Config, DataConfig, GPTConfig
from llm_from_scratch.core.dataset import TokenData, resolve_dataset
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import Tokenizer, tokenizer_of
from llm_from_scratch.data import encode, hub, nanogpt, readers, shards, sources
from llm_from_scratch.data import prepare as module
from llm_from_scratch.data.options import PrepareOptions
from llm_from_scratch.data.prepare import prepare, tokenizer_for
from llm_from_scratch.data.split import val_documents
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.budget import parse_budget
from llm_from_scratch.presets import parse
from llm_from_scratch.tests.texts import real_text, reference_gpt2, shakespeare
from llm_from_scratch.tests.tiny import slow_except
from llm_from_scratch.training.check import check

EOT = 50256


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and units so small that every text crosses many."""
    monkeypatch.setattr(readers, "PIECE", 5000)
    monkeypatch.setattr(encode, "UNIT", 7000)


def tokens(folder: Path | str, split: str) -> list[int]:
    data = TokenData.open(folder, split)
    return np.concatenate([shard[:] for shard in data.shards]).tolist()


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def write_jsonl(path: Path, texts: list[str]) -> list[str]:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return texts


def stories(count: int) -> list[str]:
    text = real_text()
    return [text[100 * i : 100 * i + 40 + 7 * (i % 5)] for i in range(count)]


def left_behind(root: Path) -> list[str]:
    """What a failed run may not leave: anything but the inputs and cached tokens."""
    return [p.as_posix() for p in root.rglob("*") if "building" in p.name or "previous" in p.name or p.suffix == ".bin"]


# a single text


@pytest.mark.parametrize("tokenizer", slow_except(["char", "gpt2", "byte"], "char", "byte"))
def test_a_single_text_is_split_by_position(here: Path, small: None, tokenizer: str) -> None:
    """nanoGPT's rule, recomputed: 90% of the characters, each part encoded as a whole."""
    text = real_text()[:100_001]
    (here / "my book.txt").write_text(text, encoding="utf-8")
    folder = prepare(["my book.txt"], tokenizer=tokenizer)
    assert folder == Path("data/processed/my book")
    parts = {"train": text[: int(len(text) * 0.9)], "val": text[int(len(text) * 0.9) :]}
    number = {char: i for i, char in enumerate(sorted(set(text)))}
    reference = reference_gpt2()
    encoders = {
        "char": lambda part: [number[char] for char in part],
        "byte": lambda part: list(part.encode("utf-8")),
        "gpt2": reference.encode_ordinary,
    }
    manifest = manifest_of(folder)
    for split, part in parts.items():
        ids = encoders[tokenizer](part)
        assert np.fromfile(folder / f"{split}.bin", "<u2").tolist() == ids
        entry = manifest["splits"][split]
        digest = hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
        assert entry["shards"] == [{"file": f"{split}.bin", "tokens": len(ids), "sha256": digest}]
        assert (entry["tokens"], entry["bytes"]) == (len(ids), len(part.encode("utf-8")))
    loaded = tokenizer_of(folder)
    assert loaded is not None and loaded.decode(tokens(folder, "val")) == parts["val"]
    assert manifest["vocab_size"] == loaded.vocab_size and manifest["dtype"] == "uint16"
    assert manifest["tokenizer"] == {"name": tokenizer, "fingerprint": loaded.fingerprint()}
    assert resolve_dataset("my book") == folder


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_a_text_is_decoded_once_after_it_is_hashed(here: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.txt").write_bytes("one\r\ntwo é".encode() * 1000)
    plain, opened = sources.FileSource.open, list[str]()

    def noted(self: sources.FileSource) -> Any:
        opened.append(self.name)
        return plain(self)

    monkeypatch.setattr(sources.FileSource, "open", noted)
    folder = prepare(["a.txt"], tokenizer=tokenizer)
    assert opened == ["a.txt"]
    assert [manifest_of(folder)["splits"][split]["tokens"] for split in ("train", "val")] == (
        [9000, 1000] if tokenizer == "byte" else [8100, 900]
    )


@pytest.mark.skipif(shakespeare() is None, reason="LLM_TEST_DATA_DIR has no tinyshakespeare.txt")
def test_tiny_shakespeare_has_nanogpts_counts(here: Path) -> None:
    (here / "data/raw").mkdir(parents=True)
    (here / "data/raw/tinyshakespeare.txt").write_text(shakespeare() or "", encoding="utf-8")
    folder = prepare(["shakespeare_char"])
    assert [len(tokens(folder, split)) for split in ("train", "val")] == [1_003_854, 111_540]
    folder = prepare(["shakespeare"])
    assert [len(tokens(folder, split)) for split in ("train", "val")] == [301_966, 36_059]


def test_bpe_learns_from_the_text(here: Path, small: None) -> None:
    text = real_text()[:60_000]
    (here / "a.md").write_text(text, encoding="utf-8")
    folder = prepare(["a.md"], tokenizer="bpe:600")
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.name, tokenizer.vocab_size) == ("bpe", 600)
    assert tokenizer.decode(tokens(folder, "train") + tokens(folder, "val")) == text


def test_the_tokenizer_of_other_data(here: Path) -> None:
    """What finetuning needs: new text in the ids of the old."""
    (here / "a.txt").write_text("hello world\n" * 9)
    (here / "b.txt").write_text("well\n" * 9)
    old = prepare(["a.txt"], tokenizer="char")
    new = prepare(["b.txt"], tokenizer="data/processed/a")
    assert tokens(new, "train")[:4] == Tokenizer.load(old).encode("well").tolist()
    assert manifest_of(new)["tokenizer"] == manifest_of(old)["tokenizer"]
    told = Told()
    prepare(["b.txt"], tokenizer="data/processed/a", report=told)
    assert "up to date" in told
    prepare(["b.txt"], name="a", tokenizer="char")
    told = Told()
    prepare(["b.txt"], tokenizer="data/processed/a", report=told)
    assert "up to date" not in told
    (here / "c.txt").write_text("well, hello\n" * 9)
    with pytest.raises(UserError, match="','.*U.002C"):
        prepare(["c.txt"], tokenizer="data/processed/b")


def test_the_tokenizer_of_a_run(here: Path) -> None:
    """To finetune on other text: the folder of the run is enough, and the next command starts from its weights."""
    (here / "b.txt").write_text("well\n" * 15)
    told, tokenizer = Told(), Tokenizer.from_name("char", "hello world\n")
    model = GPT(GPTConfig(block_size=8, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=4))
    state: Any = {"model_config": model.config, "model": model.state_dict(), "tokenizer": tokenizer}
    for step in (1, 2):
        save_checkpoint("my run", step=step, run_id="r", **state)
    new = prepare(["b.txt"], tokenizer="my run", report=told)
    assert tokens(new, "train")[:5] == ["\n dehlorw".index(char) for char in "well\n"]
    assert shlex.split(told.lines[-1]) == [
        "next:", "llm-train", "--dataset=b", "--init_from=my run", "--out_dir=out-b", "--block_size=7",
    ]  # fmt: skip
    (here / "b.txt").write_text("well\n" * 20)
    prepare(["b.txt"], tokenizer="my run", report=told)
    assert told.lines[-1].endswith("--out_dir=out-b")  # the run's own context of 8 fits
    (here / "c.txt").write_text("quiz\n" * 30)
    with pytest.raises(UserError, match="'q'.*U.0071"):
        prepare(["c.txt"], tokenizer="my run")
    prepare(["b.txt"], tokenizer="my run/step-00000001", report=told)
    assert "--init_from=my run/step-00000001" in shlex.split(told.lines[-1])


def test_a_large_vocabulary_needs_32_bits(here: Path) -> None:
    chars = "".join(map(chr, [*range(32, 0xD800), *range(0x10000, 0x10000 + 20_000)]))
    (here / "wide.txt").write_text(chars, encoding="utf-8", newline="")
    folder = prepare(["wide.txt"], tokenizer="char")
    assert manifest_of(folder)["dtype"] == "uint32"
    assert tokens(folder, "train") + tokens(folder, "val") == sorted(range(len(set(chars))))


@pytest.mark.cases(3)
@pytest.mark.parametrize("large", [20_000, 55_000, 90_000])  # below and above the ids of train: 54,000
@pytest.mark.parametrize("packed", [False, True])  # the size of a packed file says little about its tokens
@pytest.mark.parametrize(("tokenizer", "shard_size"), [("byte", 7000), ("char", 1 << 30)])
def test_a_large_dataset_of_small_ids_takes_a_byte_per_token(
    here: Path, small: None, monkeypatch: pytest.MonkeyPatch, large: int, packed: bool, tokenizer: str, shard_size: int
) -> None:
    monkeypatch.setattr(shards, "LARGE", large)
    text = "".join(f"{number}: \u00e9, " for number in range(10_000))[:60_000]
    content = text.encode("latin-1" if tokenizer == "byte" else "utf-8")
    path = here / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(content) if packed else content)
    settings: dict[str, Any] = {"encoding": "latin-1"} if tokenizer == "byte" else {}
    folder = prepare([path.name], tokenizer=tokenizer, shard_size=shard_size, out_dir="data", **settings)
    manifest, ids = manifest_of(folder), list[int]()
    is_large = manifest["splits"]["train"]["tokens"] > large
    assert is_large == (large == 20_000 or (large == 55_000 and tokenizer == "byte"))
    for split in ("train", "val"):
        entry = manifest["splits"][split]
        files = [folder / shard["file"] for shard in entry["shards"]]
        assert sum(file.stat().st_size for file in files) == entry["tokens"] * (1 if is_large else 2)
        assert [shard["sha256"] for shard in entry["shards"]] == [
            hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        ]
        ids += tokens(folder, split)
    assert Tokenizer.load(folder).decode(ids) == text and manifest["dtype"] == ("uint8" if is_large else "uint16")
    assert sorted(path.name for path in folder.glob("*.bin*")) == sorted(
        shard["file"] for entry in manifest["splits"].values() for shard in entry["shards"]
    )


@pytest.mark.parametrize("size", [1 << 20, 3, 1])
def test_line_breaks_and_byte_order_mark(here: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(readers, "PIECE", size)
    (here / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthr\xc3\xa9e\n\r\n\xe6\x9d\xb1")
    assert "".join(text for text, _ in sources.FileSource(Path("a.txt")).pieces()) == "one\ntwo\nthrée\n\n東"
    assert [ends for _, ends in sources.FileSource(Path("a.txt")).pieces()].count(True) == 1


# several documents


def in_hash_split(document: Any, fraction: float = 0.1, seed: int = 2357) -> bool:
    """Whether a document is for validation, by the rule in docs/DATA.md. Conversations count as their JSON."""
    text = document if isinstance(document, str) else json.dumps(document)
    digest = hashlib.sha256(f"{seed} {text}".removesuffix("\n").encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def test_several_documents_are_split_by_a_hash(here: Path, small: None) -> None:
    few, long = stories(399), real_text()[:12_000]  # the long one comes in pieces
    texts = [*few[:5], long, *few[5:]]
    reference = reference_gpt2()
    for name, documents in (("first", texts), ("more", [*stories(500)[400:], *texts[::-1], "a new one"])):
        write_jsonl(here / f"{name}.jsonl", documents)
        folder = prepare([f"{name}.jsonl"], tokenizer="gpt2", val_fraction=0.03, seed=5)
        want: dict[str, list[int]] = {"train": [], "val": []}
        for text in documents:
            is_val = in_hash_split(text, 0.03, 5) if text is not long else in_hash_split(first_piece(long), 0.03, 5)
            want["val" if is_val else "train"] += [*reference.encode_ordinary(text), EOT]
        assert tokens(folder, "train") == want["train"] and tokens(folder, "val") == want["val"]
        assert manifest_of(folder)["split"] == {"by": "hash", "val_fraction": 0.03, "seed": 5}
        assert tokens(folder, "val").count(EOT) > 3


def first_piece(text: str) -> str:
    return next(sources.split_document(text))[0]


@pytest.mark.parametrize("fraction", [0.01, 0.99])
@pytest.mark.parametrize("texts", [["one", "two"], ["same"] * 3, ["one", "two", "three", "four"]])
def test_few_documents_leave_no_split_empty(here: Path, texts: list[str], fraction: float) -> None:
    write_jsonl(here / "d.jsonl", texts)
    folder = prepare(["d.jsonl"], tokenizer="byte", val_fraction=fraction)
    got = [bytes(tokens(folder, split)).decode().splitlines() for split in ("train", "val")]
    assert sorted(sum(got, [])) == sorted(texts) and min(map(len, got)) == 1


def test_without_an_end_of_text_id_a_line_break_ends_a_document(here: Path) -> None:
    (here / "f").mkdir()
    for name, text in (("1.txt", "one"), ("2.txt", "two\n"), ("3.txt", "three")):
        (here / "f" / name).write_text(text)
    folder = prepare(["f"], tokenizer="char", val_fraction=0.1)
    tokenizer = Tokenizer.load(folder)
    got = {tokenizer.decode(tokens(folder, split)) for split in ("train", "val")}
    assert sorted("".join(got).split("\n")) == ["", "one", "three", "two"]


def test_separate_files(here: Path) -> None:
    (here / "a.txt").write_text("hello world")
    (here / "b.txt").write_text("hello")
    for sources_, train_files in ((["a.txt"], ()), ([], ("a.txt",))):
        folder = prepare(sources_, train_files=train_files, val_files=("b.txt",), tokenizer="gpt2", out_dir="out")
        assert (tokens(folder, "train"), tokens(folder, "val")) == ([31373, 995], [31373])


def test_val_documents() -> None:
    assert val_documents(2, 0.1, 0).sum() == 1 and val_documents(2, 0.99, 0).sum() == 1
    assert val_documents(100, 0.1, 0).sum() == 10 and val_documents(101, 0.1, 0).sum() == 11
    assert (val_documents(100, 0.1, 0) != val_documents(100, 0.1, 1)).any()


def test_folders_globs_and_data_raw(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = here / "data/raw/books"
    (raw / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.md", "deep/c.TXT", "deep/.hidden.txt", "x.py", ".git.md"):
        (raw / name).write_text(name)
    (here / "[odd].txt").write_text("odd")

    def names(*arguments: str) -> list[str]:
        return [path.as_posix() for path in sources.find_files(arguments, Path("."), here)]

    inside = ["data/raw/books/a.md", "data/raw/books/b.txt", "data/raw/books/deep/c.TXT"]
    assert names("data/raw/books") == names("books") == inside
    assert names("books/*.txt", "books/b.txt", "data/raw/books/*.md") == [inside[1], inside[0]]
    assert names("**/*.TXT") == [inside[2]]
    assert names("[odd].txt") == ["[odd].txt"]
    assert names("books/x.py") == ["data/raw/books/x.py"]
    assert "reading data/raw/books/x.py as plain text" in capsys.readouterr().out
    for number in range(3):
        (raw / f"y{number}.py").touch()
    assert len(names("books/*.py")) == 4
    assert "reading data/raw/books/x.py and 3 more as plain text" in capsys.readouterr().out
    assert prepare(["books/*"], tokenizer="byte").name == "books"


def test_parquet(here: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = stories(30)
    column = pa.array([*texts[:10], None, "", *texts[10:]], pa.large_string())
    parquet.write_table(pa.table({"body": column, "n": list(range(32))}), here / "p.parquet")
    write_jsonl(here / "j.jsonl", texts)
    folder, other = prepare(["p.parquet"], text_key="body"), prepare(["j.jsonl"])
    assert tokens(folder, "train") == tokens(other, "train") and tokens(folder, "val") == tokens(other, "val")
    for key, message in (("text", "does not have a column 'text'.*'body', 'n'"), ("n", "contains int64, not text")):
        with pytest.raises(UserError, match=message):
            prepare(["p.parquet"], text_key=key)
    (here / "broken.parquet").write_bytes(b"PAR1xxxx")
    with pytest.raises(UserError, match="cannot read broken.parquet as parquet"):
        prepare(["broken.parquet"])


def test_other_columns_of_a_table_may_be_large(here: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"text {number}" for number in range(70)]
    table = pyarrow.table({"text": texts, "zeros": [bytes(1 << 20)] * 70})
    parquet.write_table(table, here / "wide.parquet", compression="zstd", use_dictionary=False)
    assert [text for text, _ in sources.FileSource(Path("wide.parquet")).pieces()] == texts


def test_parquet_without_the_extra(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (here / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install -e '.*\[data\]'"):
        prepare(["p.parquet"])


# shards, workers, memory


def test_shards(here: Path, small: None) -> None:
    write_jsonl(here / "d.jsonl", stories(300))
    one = prepare(["d.jsonl"], tokenizer="gpt2", out_dir="one")
    many = prepare(["d.jsonl"], tokenizer="gpt2", out_dir="many", shard_size=1000)
    for split in ("train", "val"):
        entry = manifest_of(many)["splits"][split]
        files = sorted(path.name for path in many.glob(f"{split}*.bin"))
        assert [shard["file"] for shard in entry["shards"]] == files
        assert files == ([f"{split}_{i:06d}.bin" for i in range(len(files))] if len(files) > 1 else [f"{split}.bin"])
        assert all(shard["tokens"] == 1000 for shard in entry["shards"][:-1])
        assert tokens(many, split) == tokens(one, split)
        for shard in entry["shards"]:
            assert hashlib.sha256((many / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert len(manifest_of(many)["splits"]["train"]["shards"]) > 3


def test_worker_processes_give_the_same(here: Path, small: None) -> None:
    write_jsonl(here / "d.jsonl", stories(300))
    alone = prepare(["d.jsonl"], out_dir="alone", workers=0, cache_dir=None)
    helped = prepare(["d.jsonl"], out_dir="helped", workers=2, cache_dir=None)
    for split in ("train", "val"):
        assert (alone / f"{split}.bin").read_bytes() == (helped / f"{split}.bin").read_bytes()


def test_workers_that_die_are_done_without(
    here: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(here / "d.jsonl", stories(200))
    alone = prepare(["d.jsonl"], out_dir="alone", cache_dir=None)
    monkeypatch.setattr(encode, "start_worker", os._exit)
    helped = prepare(["d.jsonl"], out_dir="helped", workers=2, cache_dir=None)
    assert (alone / "train.bin").read_bytes() == (helped / "train.bin").read_bytes()
    assert "without them" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read as Linux tells it")
@pytest.mark.parametrize("repeats", [(20, 100), (24, 150)])
def test_memory_does_not_grow_with_the_text(here: Path, repeats: tuple[int, int]) -> None:
    """From 8 MB to 40 MB, and from 10 MB to 60 MB."""
    code = (
        "import sys; from llm_from_scratch.data.prepare import prepare;"
        "prepare([sys.argv[1]], tokenizer='char', cache_dir=None, report=lambda line: None);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).resolve().parents[2])}
    peaks = []
    for name, times in zip(("small.txt", "large.txt"), repeats, strict=True):
        (here / name).write_text(real_text()[:400_000] * times, encoding="utf-8")
        done = subprocess.run([sys.executable, "-c", code, name], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) >> 10)
    assert peaks[1] - peaks[0] < 20, f"peaks of {peaks} MiB"


# doing no work twice


class Told:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def __contains__(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def test_a_second_run_does_no_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.txt").write_text("hello world " * 50)
    folder = prepare(["a.txt"])
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    os.utime("a.txt", (1, 1))  # the content counts, not the date
    old = time.time() - 1000
    os.utime(folder / "manifest.json", (old, old))
    with monkeypatch.context() as patch:
        patch.setattr(module, "build", lambda *_: pytest.fail("worked"))
        told = Told()
        assert prepare(["a.txt"], report=told) == folder
    assert "up to date" in told and "next: llm-train --dataset=a" in told
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()} == before
    assert (folder / "manifest.json").stat().st_mtime > old + 500  # it is the data prepared last

    changes: list[dict[str, Any]] = [
        {"tokenizer": "byte"},
        {"val_fraction": 0.2},
        {"shard_size": 7},
        {"tokenizer": None},
    ]
    for change in changes:
        told = Told()
        prepare(["a.txt"], **change, report=told)
        assert "up to date" not in told
    size = (here / "a.txt").stat().st_size
    (here / "a.txt").write_text(("hella world " * 50)[:size])  # of the same length
    told = Told()
    prepare(["a.txt"], report=told)
    assert "up to date" not in told
    (folder / "val.bin").write_bytes(b"\0" * (folder / "val.bin").stat().st_size)  # damaged, of the same length
    prepare(["a.txt"], report=told)
    assert "up to date" not in told and tokens(folder, "val") != [0] * len(tokens(folder, "val"))


def test_tokens_are_cached(here: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(here / "d.jsonl", stories(300))
    first = prepare(["d.jsonl"], tokenizer="gpt2", out_dir="one")
    cached = sorted(p for p in (here / "data/cache").rglob("*") if p.is_file())
    assert len(cached) > 2
    with monkeypatch.context() as patch:
        patch.setattr(encode.Unit, "encode", lambda *_: pytest.fail("encoded again"))
        told = Told()
        second = prepare(["d.jsonl"], tokenizer="gpt2", out_dir="two", shard_size=10**6, report=told)
    assert f"{len(cached)} of {len(cached)} parts" in told
    assert (first / "train.bin").read_bytes() == (second / "train.bin").read_bytes()
    cached[0].write_bytes(cached[0].read_bytes()[:-2])
    cached[1].write_bytes(cached[1].read_bytes()[:-2] + b"xy")
    told = Told()
    third = prepare(["d.jsonl"], tokenizer="gpt2", out_dir="three", report=told)
    assert f"{len(cached) - 2} of {len(cached)} parts" in told
    assert (first / "train.bin").read_bytes() == (third / "train.bin").read_bytes()
    other = prepare(["d.jsonl"], out_dir="four", tokenizer="bpe:300")  # another tokenizer takes none of it
    assert Tokenizer.load(other).decode(tokens(other, "val")) == Tokenizer.load(first).decode(tokens(first, "val"))


def test_a_large_cache_ends_with_the_run(here: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "KEEP_CACHE", 100)
    write_jsonl(here / "d.jsonl", stories(100))
    prepare(["d.jsonl"], tokenizer="gpt2")
    assert not [p for p in (here / "data/cache").rglob("*") if p.is_file()]


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_killed_run_resumes_at_its_step(here: Path) -> None:
    write_jsonl(here / "d.jsonl", stories(2000))
    whole = prepare(["d.jsonl"], out_dir="whole", cache_dir=None, tokenizer="gpt2")
    code = (
        "import os, signal; from llm_from_scratch.data import encode, prepare\n"
        "encode.UNIT, done, plain = 7000, [], encode.Unit.encode\n"
        "def dying(unit, tokenizer):\n"
        "    done.append(1)\n"
        "    len(done) > 8 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(unit, tokenizer)\n"
        "encode.Unit.encode = dying\n"
        "prepare.prepare(['d.jsonl'], tokenizer='gpt2')"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert left_behind(here / "data/processed") and not (here / "data/processed/d").exists()
    told, unit = Told(), encode.UNIT
    try:
        encode.UNIT = 7000
        folder = prepare(["d.jsonl"], report=told, tokenizer="gpt2")
    finally:
        encode.UNIT = unit
    assert "8 of " in told
    assert [p.name for p in (here / "data/processed").iterdir()] == ["d"]
    assert (folder / "train.bin").read_bytes() == (whole / "train.bin").read_bytes()


def test_a_folder_that_was_being_replaced_is_put_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.txt").write_text("hello world " * 50)
    folder = prepare(["a.txt"])
    folder.rename(folder.with_name(".a.previous-999999999"))  # killed between the two renames
    with pytest.raises(UserError):
        prepare(["a.txt"], tokenizer="char", shard_size=0)
    assert not folder.exists()  # nothing was begun
    (here / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError):
        prepare(["b.txt"], name="a")
    assert tokens(folder, "val")
    assert sorted(p.name for p in (here / "data/processed").iterdir()) == ["a"]


# what goes wrong


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("workers", "error"),
    [
        *((0, error) for error in (KeyboardInterrupt, FULL, RuntimeError)),
        (1, FULL),
        *(pytest.param(1, error, marks=pytest.mark.slow) for error in (KeyboardInterrupt, RuntimeError)),
    ],
)
def test_nothing_half_written_is_left(
    here: Path, small: None, monkeypatch: pytest.MonkeyPatch, error: Any, workers: int
) -> None:
    write_jsonl(here / "d.jsonl", stories(100))
    append, calls = shards.ShardWriter.append, []

    def failing(writer: shards.ShardWriter, ids: np.ndarray) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error
        append(writer, ids)

    monkeypatch.setattr(shards.ShardWriter, "append", failing)
    with pytest.raises(UserError if isinstance(error, OSError) else error):
        prepare(["d.jsonl"], workers=workers)
    assert left_behind(here) == [] and list((here / "data/processed").iterdir()) == []


def test_an_earlier_result_survives_a_failure(here: Path) -> None:
    (here / "a.txt").write_text("hello world " * 50)
    folder = prepare(["a.txt"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (here / "a.txt").write_bytes(b"hello \xff world")
    with pytest.raises(UserError, match="a.txt is not UTF-8 text: byte offset 6 "):
        prepare(["a.txt"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [p.name for p in (here / "data/processed").iterdir()] == ["a"]


@pytest.mark.parametrize("offset", [0, 1, 9_999, 10_000, 10_001, 15_000])
def test_the_byte_offset_is_right(here: Path, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    monkeypatch.setattr(readers, "PIECE", 5000)
    data = "é".encode() * 20_000
    for broken, at in ((data[:offset] + b"\xff" + data[offset:], offset), (data[: 2 * offset + 1], 2 * offset)):
        with pytest.raises(UnicodeDecodeError) as caught:  # noqa: PT012 - the reference says where
            broken.decode("utf-8")
        (here / "bad.txt").write_bytes(broken)
        with pytest.raises(UserError, match=f"bad.txt is not UTF-8 text: byte offset {caught.value.start} "):
            list(sources.FileSource(Path("bad.txt")).pieces())
        assert caught.value.start in (at, at - 1)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": ', "d.jsonl, line 2 is not JSON"),
        ('{"text": "a"}\n\n{"body": "a"}', "line 3 does not have the text field 'text'.*'body'.*--text_key"),
        ('["a"]', "line 1 does not have the text field 'text' .not an object"),
        ('{"text": 5}', "line 1 does not have the text"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("\n\n", "d.jsonl is empty"),
        ('{"text": ""}', "d.jsonl is empty"),
        ('{"text": null}', "d.jsonl is empty"),
    ],
)
def test_bad_json_lines(here: Path, content: str, message: str) -> None:
    (here / "d.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(["d.jsonl"], tokenizer="byte")
    assert left_behind(here) == []


def test_bad_json_line_names_the_byte(here: Path) -> None:
    (here / "d.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="byte offset 25 "):
        prepare(["d.jsonl"], tokenizer="byte")


@pytest.mark.parametrize(
    "arguments, settings, message",
    [
        ([], {}, "no source"),
        (["nothing.txt"], {}, "'nothing.txt' not found here or in data/raw"),
        (["shakespeer"], {}, "did you mean shakespeare"),
        (["empty"], {}, "contains no .txt"),
        (["*.md"], {}, "not found here or in data/raw"),
        (["none.txt"], {}, "none.txt is empty"),
        (["one.txt"], {}, "too short to split"),
        (["a.txt"], {"tokenizer": "gtp2"}, "did you mean gpt2"),
        (["a.txt"], {"val_fraction": 1.5}, "val_fraction=1.5"),
        (["a.txt"], {"val_fraction": float("nan")}, "val_fraction"),
        (["a.txt"], {"shard_size": 0}, "shard_size=0"),
        (["a.txt"], {"workers": -1}, "workers=-1"),
        (["a.txt"], {"name": "x/y"}, "is empty or a path"),
        (["a.txt"], {"name": ".."}, "is empty or a path"),
        (["a.txt"], {"out_dir": "."}, "did not write"),
        (["a.txt"], {"out_dir": "a.txt"}, "is a file"),
        (["a.txt"], {"out_dir": "a.txt/b"}, "cannot write"),
        (["a.txt"], {"cache_dir": "a.txt", "tokenizer": "gpt2"}, "cannot write"),
        (["a.txt"], {"train_files": ("a.txt",)}, "use only one of them"),
        (["a.txt"], {"val_files": ("./a.txt",)}, "both a training and a validation file"),
        (["a.txt"], {"val_files": ("none.txt",)}, "none.txt is empty"),
        (["shakespeare", "a.txt"], {}, "must be the only one"),
    ],
)  # fmt: skip
def test_user_errors(here: Path, arguments: list[str], settings: dict[str, Any], message: str) -> None:
    (here / "empty").mkdir()
    (here / "none.txt").touch()
    (here / "one.txt").write_text("x")
    (here / "a.txt").write_text("hello world " * 9)
    before = sorted(p.as_posix() for p in here.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        prepare(arguments, **settings)
    assert "\n" not in str(caught.value)
    after = sorted(p.as_posix() for p in here.rglob("*") if p.name not in ("data", "processed"))
    assert after == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
def test_a_pipe_does_not_hang(here: Path) -> None:
    os.mkfifo(here / "pipe.txt")
    with pytest.raises(UserError, match="llm-prepare - <"):
        prepare(["pipe.txt"])


def test_a_folder_with_something_of_the_users_is_not_replaced(here: Path) -> None:
    (here / "a.txt").write_text("hello world " * 50)
    folder = prepare(["a.txt"])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="contains notes.txt"):
        prepare(["a.txt"], tokenizer="byte")
    assert (folder / "notes.txt").read_text() == "mine" and tokens(folder, "val")


def test_an_empty_file_among_others_is_left_out(here: Path) -> None:
    for name, text in (("a.txt", "hello"), ("b.txt", ""), ("c.txt", "world")):
        (here / name).write_text(text)
    told = Told()
    folder = prepare(["a.txt", "b.txt", "c.txt"], tokenizer="gpt2", report=told)
    assert "b.txt is empty and ignored" in told and len(tokens(folder, "train") + tokens(folder, "val")) == 4
    for number in range(25):
        (here / f"empty-{number}.txt").touch()
    told = Told()
    prepare(["a.txt", "c.txt", "empty-*.txt"], tokenizer="byte", report=told)
    assert sum(line.endswith("txt is empty and ignored") for line in told.lines) == 10
    assert "15 more sources are empty and ignored" in told


def test_a_file_that_grows_while_it_is_read_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "log.txt").write_text("a line\n" * 1000)
    plain = encode.Unit.encode

    def growing(unit: encode.Unit, tokenizer: Any) -> np.ndarray:
        with (here / "log.txt").open("a") as file:
            file.write("another line\n")
        return plain(unit, tokenizer)

    monkeypatch.setattr(encode.Unit, "encode", growing)
    with pytest.raises(UserError, match="log.txt changed while it was read: run the same command again"):
        prepare(["log.txt"], tokenizer="byte")
    assert list((here / "data/processed").iterdir()) == []


@pytest.mark.parametrize(
    ("size", "name", "span"),
    [
        (1_999_999, "char", "below 2 MB"),
        (2_000_000, "bpe:4096", "below 100 MB"),
        (100_000_000, "gpt2", "of 100 MB or more"),
    ],
)
def test_the_size_of_the_text_chooses_the_tokenizer(size: int, name: str, span: str) -> None:
    told = Told()
    assert tokenizer_for(size, told) == name
    assert told.lines == [f"tokenizer: {name} (text {span}; override with --tokenizer=NAME)"]


@pytest.mark.parametrize(
    ("size", "budget", "name"),
    [
        (10_000_000, "1Mtokens", "char"),  # less is read than there is
        (10_000_000, "1Gtokens", "bpe:4096"),
        (1_000_000, "1Gtokens", "char"),
        # 2e13 / 6 is what N parameters and 5 N bytes cost: 4 MB
        (1_000_000_000, "2e13flops", "bpe:4096"),
        (1_000_000_000, "2e12flops", "char"),
        (1_000_000_000, "1e17flops", "gpt2"),
    ],
)
def test_a_budget_reads_a_part_of_the_text_which_chooses_the_tokenizer(size: int, budget: str, name: str) -> None:
    assert tokenizer_for(size, Told(), parse_budget(budget)) == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "soon"}, "budget='soon'"),
        ({"budget": "1min", "tokenizer": "char"}, "remove --tokenizer or --budget"),
    ],
)
def test_a_budget_that_cannot_choose_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    with pytest.raises(UserError, match=message):
        prepare("a.txt", root=tmp_path, **settings)


@pytest.mark.parametrize("source", ["a.txt", Path("a.txt"), [Path("a.txt")]])
def test_a_source_is_a_text_a_path_or_a_list(here: Path, source: Any) -> None:
    (here / "a.txt").write_text("hello world " * 50)
    assert prepare(source, report=Told()) == Path("data/processed/a")


def test_a_short_text_gets_a_small_vocabulary(here: Path) -> None:
    (here / "a.txt").write_text("hello world " * 50)
    (here / "b.txt").write_text("hello")
    told = Told()
    folder = prepare(["a.txt"], val_files=("b.txt",), report=told)  # the training text counts
    assert Tokenizer.load(folder).name == "char" and "tokenizer: char (text below 2 MB; override with" in told
    told = Told()
    assert Tokenizer.load(prepare(["a.txt"], tokenizer="byte", report=told)).name == "byte"
    assert "override" not in told


def test_the_next_command_names_the_folder_if_the_name_is_ambiguous(here: Path) -> None:
    (here / "a.txt").write_text("hello world " * 300)
    (here / "data/a").mkdir(parents=True)
    (here / "data/a/train.bin").write_bytes(b"\0\0")
    told = Told()
    prepare(["a.txt"], report=told)
    assert told.lines[-1] == "next: llm-train --dataset=data/processed/a"


@pytest.mark.parametrize(
    ("settings", "dataset"),
    [
        ({"name": """it's "q" $x"""}, """it's "q" $x"""),
        ({"out_dir": "my data/a b"}, "my data/a b"),
        ({"out_dir": "a"}, None),  # data/a would be found first
        ({"root": "sub"}, None),
    ],
)
def test_the_next_command_is_quoted_and_finds_the_data(here: Path, settings: Any, dataset: str | None) -> None:
    (here / "sub").mkdir()
    for folder in (here, here / "sub"):
        (folder / "text.txt").write_text("hello world " * 300)
    if settings.get("out_dir") == "a":
        (here / "data/a").mkdir(parents=True)
        (here / "data/a/train.bin").write_bytes(b"\0\0")
    told = Told()
    made = prepare(["text.txt"], report=told, **settings)
    prefix, option = shlex.split(told.lines[-1].removeprefix("next: "))
    named = option.removeprefix("--dataset=")
    assert prefix == "llm-train" and resolve_dataset(named).resolve() == made.resolve()
    assert named == (dataset or str(made.resolve()))


@pytest.mark.parametrize("text", ["To be, or not to be,\nthat is\nthe question.\n", "hello world, hello me\n"])
def test_a_text_of_a_few_lines_gets_a_command_that_works(here: Path, text: str) -> None:
    (here / "three.txt").write_text(text)
    told = Told()
    prepare(["three.txt"], report=told)
    val = len(text) - int(len(text) * 0.9)
    assert told.lines[-1] == f"next: llm-train --dataset=three --block_size={val - 1}"
    config = parse(Config, shlex.split(told.lines[-1])[2:], prog="test").tree
    assert len(check(config).val_data) == val
    with pytest.raises(UserError, match=f"use --block_size={val - 1}, or prepare more text"):
        check(Config(data=DataConfig(dataset="three")))  # one error, of the shorter split


def test_one_token_is_not_enough_data(here: Path) -> None:
    (here / "a.txt").write_text("hello")
    told = Told()
    prepare(["a.txt"], report=told)
    assert told.lines[-1].startswith("note: a split of one token") and "next:" not in told


def test_a_long_example_is_cut(here: Path) -> None:
    """BPE of a text without white space has tokens of thousands of characters."""
    (here / "long.txt").write_text("0123456789" * 600)
    told = Told()
    prepare(["long.txt"], tokenizer="bpe:300", report=told)
    assert max(map(len, told.lines)) < 400
    example = next(line for line in told.lines if line.startswith("example: "))
    assert "0123456789" * 5 in example and example.endswith(" characters")


def test_the_error_for_a_folder_of_other_files_names_the_command(here: Path) -> None:
    folder = here / "my code" / "deep"
    folder.mkdir(parents=True)
    for name in ("a.py", "b.py", "c.pyc", "d.pyc", "e.pyc", ".f.py", "g.toml"):
        (folder / name).write_bytes(b"\0" if name.endswith("c") else b"import this\n" * 9)
    with pytest.raises(UserError, match="contains no .txt") as error:
        prepare(["my code/"])
    command = str(error.value).partition("for its .py files: ")[2]
    assert shlex.split(command) == ["llm-prepare", "my code/**/*.py"]
    told = Told()
    made = prepare(shlex.split(command)[1:], report=told)  # it works
    read = [source["path"] for source in json.loads((made / "manifest.json").read_text())["sources"]]
    assert read == ["my code/deep/a.py", "my code/deep/b.py"] and "deep/a.py and 1 more as plain text" in told
    (here / "my code" / "readme.md").write_text("what it does\n" * 9)
    told = Told()
    prepare(["my code"], report=told)
    assert "my code: reading 1 of its files; for its .py files: llm-prepare 'my code/**/*.py'" in told


# known texts and the network


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Serves state["body"] in place of tiny Shakespeare."""
    state: dict[str, Any] = {"body": b"First Citizen:\n" * 99, "asked": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            state["asked"] += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(state["body"])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{running.server_port}/input.txt")
        monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(state["body"]).hexdigest())
        yield state
        running.shutdown()


def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_the_download_is_checked(here: Path, server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = here / "deep/input.txt"
    assert sources.fetch_tiny_shakespeare(path).read_bytes() == server["body"]
    server["body"] = b"<html>log in to the network</html>"
    assert sources.fetch_tiny_shakespeare(path) and server["asked"] == 1  # what lies there is used as it is
    path.unlink()
    with pytest.raises(UserError, match="sha256 differs"):
        sources.fetch_tiny_shakespeare(path)
    cut_off(monkeypatch)
    with pytest.raises(UserError, match="cannot download tiny Shakespeare.*put it at"):
        sources.fetch_tiny_shakespeare(path)
    assert list((here / "deep").iterdir()) == []


def test_the_hash_is_that_of_tiny_shakespeare() -> None:
    text = shakespeare()
    if text is None:
        pytest.skip("LLM_TEST_DATA_DIR has no tinyshakespeare.txt")
    assert hashlib.sha256(text.encode("utf-8")).hexdigest() == sources.SHAKESPEARE_SHA256


def test_demo_with_network(here: Path, server: dict[str, Any]) -> None:
    folder = prepare(["demo"])
    assert folder == Path("data/processed/demo")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.name == "char"
    assert tokenizer.decode(tokens(folder, "train") + tokens(folder, "val")) == server["body"].decode()


def test_demo_without_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topics = pytest.importorskip("pydoc_data.topics").topics
    cut_off(monkeypatch)
    told = Told()
    start = time.monotonic()
    folder = prepare(["demo"], report=told)
    assert time.monotonic() - start < 10
    assert len([line for line in told.lines if "pydoc_data.topics" in line]) == 1
    tokenizer = Tokenizer.load(folder)
    text = tokenizer.decode(tokens(folder, "train") + tokens(folder, "val"))
    assert tokenizer.name == "char" and folder.name == "demo"
    assert text == "\n\n".join(topics[key].strip() for key in sorted(topics)) + "\n"
    assert len(text) > 300_000
    assert prepare(["python_docs"], tokenizer="byte").name == "python_docs"


def test_demo_on_damaged_network(here: Path, server: dict[str, Any]) -> None:
    server["body"] = b"<html>"
    told = Told()
    assert prepare(["demo"], report=told).name == "demo" and "pydoc_data.topics" in told


# nanoGPT's folders


@pytest.mark.parametrize("kind", slow_except(["char", "gpt2"], "char"))
def test_nanogpts_shakespeare_folders(here: Path, kind: str) -> None:
    """Against the steps of nanoGPT's scripts, done the slow way."""
    text = shakespeare() or real_text()
    (here / "input.txt").write_bytes(text.encode("utf-8").replace(b"\n", b"\r\n"))  # Python reads both alike
    nanogpt.prepare_shakespeare(here, kind)
    chars = sorted(set(text))
    stoi = {char: i for i, char in enumerate(chars)}
    encode_ = (lambda part: [stoi[c] for c in part]) if kind == "char" else reference_gpt2().encode_ordinary
    border = int(len(text) * 0.9)
    counts = []
    for file, part in (("train.bin", text[:border]), ("val.bin", text[border:])):
        want = np.array(encode_(part), dtype=np.uint16)
        assert (here / file).read_bytes() == want.tobytes()
        counts.append(len(want))
    if shakespeare() is not None:
        assert counts == ([1_003_854, 111_540] if kind == "char" else [301_966, 36_059])
    made = {"input.txt", "train.bin", "val.bin"} | ({"meta.pkl"} if kind == "char" else set())
    assert {path.name for path in here.iterdir()} == made
    if kind == "char":
        meta = pickle.loads((here / "meta.pkl").read_bytes())  # as nanoGPT's sample.py reads it
        assert meta == {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
        assert list(meta) == ["vocab_size", "itos", "stoi"]
        assert tokenizer_of(here).decode([0, 1]) == "".join(chars[:2])  # type: ignore[union-attr]


def test_a_byte_order_mark_is_a_character_to_nanogpt(here: Path) -> None:
    (here / "input.txt").write_bytes(b"\xef\xbb\xbfabcdefghi")
    nanogpt.prepare_shakespeare(here, "char")
    assert np.fromfile("train.bin", np.uint16).tolist() == [9, 0, 1, 2, 3, 4, 5, 6, 7]


def fake_datasets(texts: list[str], count: int | None) -> types.ModuleType:
    """Of the library `datasets` what is used of it: a streamed split that states its length."""
    fake = types.ModuleType("datasets")

    class Rows:
        info = types.SimpleNamespace(splits={"train": types.SimpleNamespace(num_examples=count)} if count else None)

        def __iter__(self) -> Iterator[dict[str, str]]:
            return iter([{"text": text} for text in texts])

    def load_dataset(name: str, split: str, streaming: bool) -> Rows:
        assert (name, split, streaming) == ("Skylion007/openwebtext", "train", True)
        return Rows()

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    return fake


@pytest.mark.parametrize("stated", [2990, *(pytest.param(n, marks=pytest.mark.slow) for n in (3000, None))])
def test_openwebtext(here: Path, small: None, monkeypatch: pytest.MonkeyPatch, stated: int | None) -> None:
    texts = [f"document {i} " + "word " * (i % 9) for i in range(3000)]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(texts, stated))
    monkeypatch.setattr(hub, "check_reachable", lambda url: None)
    (here / "prepare.py").touch()
    nanogpt.prepare_openwebtext(here, workers=1 if stated == 3000 else 0)
    assert {path.name for path in here.iterdir()} == {"prepare.py", "train.bin", "val.bin"}
    reference = reference_gpt2()
    # nanoGPT: train_test_split(test_size=0.0005, seed=2357) takes the first two of this permutation
    chosen = set(np.random.default_rng(2357).permutation(stated or 3000)[:2].tolist())
    want: dict[str, list[int]] = {"train": [], "val": []}
    for number, text in enumerate(texts):
        want["val" if number in chosen else "train"] += [*reference.encode_ordinary(text), EOT]
    for split, ids in want.items():
        assert np.fromfile(f"{split}.bin", np.uint16).tolist() == ids


def test_the_hub_gives_tables(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library `datasets` gives them, in batches with only some columns of text. A few rows of one column are
    decoded at once; with unknown columns, of all. No stream imports torch."""
    pyarrow = pytest.importorskip("pyarrow")
    fake = types.ModuleType("datasets")
    config = fake.config = types.SimpleNamespace(TORCH_AVAILABLE=True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    texts = [f"document {number} é" for number in range(600)]
    table = pyarrow.table({"id": list(range(600)), "text": texts, "gap": [*texts[:-1], None]})

    decoded: list[tuple[int, list[str]]] = []

    class Rows:
        def __init__(self, table: Any, column_names: list[str] | None) -> None:
            self.table, self.column_names = table, column_names

        def select_columns(self, name: str) -> Rows:
            assert not config.TORCH_AVAILABLE
            return Rows(self.table.select([name]), [name])

        def with_format(self, kind: str) -> Rows:
            assert kind == "arrow" and not config.TORCH_AVAILABLE
            return self

        def iter(self, batch_size: int) -> Iterator[Any]:
            decoded.append((batch_size, self.table.column_names))
            return (self.table.slice(at, batch_size) for at in range(0, 600, batch_size))

    for known in (table.column_names, None):
        rows = Rows(table, known)
        assert [text for text, _ in hub.HubSource("rows", "text", None, rows).pieces()] == texts
        assert len(list(hub.HubSource("rows", "gap", None, rows).pieces())) == 599  # a null is no text
        for key in ("body", "id"):
            wrong = f"rows does not have a text column '{key}' .it has 'id', 'text', 'gap'.: see"
            with pytest.raises(UserError, match=wrong):
                list(hub.HubSource("rows", key, None, rows).pieces())
    assert config.TORCH_AVAILABLE and decoded[0] == (8, ["text"]) and decoded[4] == (8, ["id", "text", "gap"])


@pytest.mark.slow
def test_openwebtext_by_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(["some text"] * 4000, 4000))
    monkeypatch.setattr(hub, "check_reachable", lambda url: None)
    told = Told()
    folder = prepare(["openwebtext"], workers=0, report=told)
    assert tokens(folder, "val").count(EOT) == 2  # a share of 0.0005
    assert prepare(["openwebtext"], report=told) == folder and "up to date" in told


def test_a_stream_of_the_hub_does_not_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, seen = fake_datasets(["text"], 1), list[bool]()
    fake.config = types.SimpleNamespace(TORCH_AVAILABLE=True)  # type: ignore[attr-defined]
    plain = fake.load_dataset

    def load(*given: Any, **settings: Any) -> Any:
        seen.append(fake.config.TORCH_AVAILABLE)
        return plain(*given, **settings)

    fake.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(hub, "check_reachable", lambda url: None)
    assert hub.HubSource.open(sources.OPENWEBTEXT).documents == 1
    assert seen == [False] and fake.config.TORCH_AVAILABLE


def test_openwebtext_that_cannot_be_had(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    started: list[int] = []

    def start(workers: int, *_: Any) -> contextlib.nullcontext[None]:
        started.append(workers)
        return contextlib.nullcontext()

    monkeypatch.setattr(nanogpt, "start_pool", start)
    with pytest.raises(UserError, match=r"pip install -e '.*\[data\]'"):
        nanogpt.prepare_openwebtext(here, workers=2)
    assert started == [2]  # before the import

    class Breaking(list[str]):
        def __iter__(self) -> Iterator[str]:
            yield "one"
            raise ConnectionError("reset\nby peer")

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(Breaking(), 100))

    def unreachable(url: str) -> None:
        raise OSError("no route")

    monkeypatch.setattr(hub, "check_reachable", unreachable)
    with pytest.raises(UserError, match="no route"):
        nanogpt.prepare_openwebtext(here, workers=0)
    monkeypatch.setattr(hub, "check_reachable", lambda url: None)
    with pytest.raises(UserError, match="reading Skylion007/openwebtext failed .reset by peer"):
        nanogpt.prepare_openwebtext(here, workers=0)
    assert left_behind(here) == []


def test_the_function_has_the_commands_settings_and_no_others(here: Path) -> None:
    (here / "book.txt").write_text("To be, or not to be.\n" * 100, encoding="utf-8")
    said: list[str] = []
    prepare(["book.txt"], tokenizer="char", report=said.append)
    prepare(["book.txt"], **vars(PrepareOptions(tokenizer="char")), report=said.append)
    assert any("is up to date" in line for line in said)
    with pytest.raises(TypeError, match="tokeniser"):
        prepare(["book.txt"], tokeniser="char")
    assert {*inspect.signature(prepare).parameters} == {"sources", "root", "report", "settings"}


# a new source: one table entry and one function


def test_a_new_file_format_is_one_reader(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .csv reader: its documents are those of the same texts as JSON lines, also from a folder."""

    def read_csv(source: sources.FileSource) -> Iterator[str]:
        with source.path.open(encoding="utf-8", newline="") as file:
            yield from (row[source.text_key] for row in csv.DictReader(file))

    monkeypatch.setitem(sources.READERS, ".csv", sources.Reader(read_csv))
    texts = [f"story {k}\nof {k} words" for k in range(20)]
    with (here / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *enumerate(texts)])
    (here / "folder").mkdir()
    (here / "folder/TABLE.CSV").write_bytes((here / "table.csv").read_bytes())
    write_jsonl(here / "lines.jsonl", texts)
    expected = prepare(["lines.jsonl"], tokenizer="byte")
    for source in ("table.csv", "folder"):
        folder = prepare([source], tokenizer="byte")
        for split in ("train", "val"):
            assert tokens(folder, split) == tokens(expected, split)


def test_a_new_known_text_is_one_entry(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_counting(root: Path, text_key: str, report: Any) -> sources.Source:
        (root / "counting.txt").write_text(" ".join(map(str, range(500))))
        return sources.FileSource(root / "counting.txt", text_key)

    monkeypatch.setitem(sources.KNOWN_TEXTS, "counting", sources.KnownText(open_counting, "char", val_fraction=0.5))
    folder = prepare(["counting"])
    train, val = tokens(folder, "train"), tokens(folder, "val")
    assert Tokenizer.load(folder).decode(train + val) == " ".join(map(str, range(500)))
    assert folder.name == "counting" and abs(len(train) - len(val)) <= 1
    with pytest.raises(UserError, match="did you mean counting"):
        prepare(["countin"])
