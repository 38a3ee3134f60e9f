"""Datasets in an object store (fsspec's memory file system), and datatrove's shards."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from llm_from_scratch.core import packing, remote
from llm_from_scratch.core.dataset import TokenData, resolve_dataset
from llm_from_scratch.core.packing import PackedData, short_documents
from llm_from_scratch.core.tokenizer import tokenizer_of
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.errors import DataError, UserError
from llm_from_scratch.tests.texts import real_text
from llm_from_scratch.training.check import check
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train

from ..tiny import TOKENIZER, babble, read_metrics, tiny_config, write_data

URL, KIB = "memory://bucket/babble", 1024 / (1 << 30)


@pytest.fixture
def store(here: Path) -> Iterator[Path]:
    """A dataset of 20 shards of 200 bytes in memory; returns the same one on the disk."""
    ids = TOKENIZER.encode(babble(2000)).astype("<u2")
    shards = [ids[at : at + 100] for at in range(0, 2000, 100)]
    entries = [
        {"file": f"train_{i:06d}.bin", "tokens": len(part), "sha256": hashlib.sha256(part.tobytes()).hexdigest()}
        for i, part in enumerate(shards)
    ]
    val = TOKENIZER.encode(babble(205, seed=1)).astype("<u2")
    entry = {"file": "val.bin", "tokens": len(val), "sha256": hashlib.sha256(val.tobytes()).hexdigest()}
    splits = {"train": {"shards": entries}, "val": {"shards": [entry]}}
    folder = write_data(here / "data" / "babble", train=shards, val=val, splits=splits)
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/bucket/babble", recursive=True)
    yield folder
    files.rm("/bucket", recursive=True)


def opened(split: str = "train", cache: float = 1.0) -> TokenData:
    return TokenData.open(resolve_dataset(URL), split, cache)


def cached() -> list[Path]:
    return sorted(Path("data/cache/remote").glob("*/*.bin"))


def test_a_dataset_in_a_store_equals_the_dataset_on_disk(store: Path) -> None:
    local, far = TokenData.open(store, "train"), opened()
    starts = np.random.default_rng(0).integers(0, 1900, 50)
    assert (far.windows(starts, 90) == local.windows(starts, 90)).all() and far.group is None
    assert tokenizer_of(resolve_dataset(f"{URL}/manifest.json")).fingerprint() == TOKENIZER.fingerprint()  # type: ignore
    reached = len(cached())
    assert reached <= 20
    fsspec.filesystem("memory").rm("/bucket/babble/train_000003.bin")
    assert (far.windows(starts, 90) == local.windows(starts, 90)).all(), "from the cache"


def test_the_cache_is_bounded(store: Path) -> None:
    local, far = TokenData.open(store, "train"), opened(cache=1.2 * KIB)  # val.bin and four shards
    for start in (*range(0, 1900, 60), *range(1900, 0, -130)):
        assert far.windows(np.array([start]), 90).tolist() == local.windows(np.array([start]), 90).tolist()
        assert sum(path.stat().st_size for path in cached()) <= 1.2 * 1024
    with pytest.raises(UserError, match="--data_cache is too small for memory://bucket/babble: "):
        opened(cache=0.9 * KIB)


def test_an_epoch_of_data_larger_than_the_cache_goes_through_groups(store: Path) -> None:
    settings: dict[str, Any] = {"sample_order": "shuffled", "data_cache": 1.2 * KIB}
    plan = make_plan(tiny_config(URL, **settings))
    order, group = plan.order, int(1.2 * 1024) // 4 // 2
    starts = np.concatenate([order.starts(step, 4) for step in range(order.windows_per_epoch // 4)])
    assert len(set(starts.tolist())) == len(starts) and len({start % 8 for start in starts.tolist()}) == 1
    groups = starts // 8 // (group // 8)
    assert (np.diff(groups) != 0).sum() == len(set(groups.tolist())) - 1, "one group after the other"
    assert (np.diff(groups) < 0).any() and (np.diff(starts[groups == groups[4]]) < 0).any(), "in random order"
    with pytest.raises(UserError, match="--sample_order=random reads all shards of memory.*raise --data_cache"):
        check(tiny_config(URL, data_cache=1.2 * KIB))
    train(tiny_config(URL, out_dir="far", final_eval=True, **settings))
    assert read_metrics(Path("far"))[-1]["val_loss_full"] > 0


@pytest.mark.slow
def test_a_run_reads_the_same_from_a_store(store: Path) -> None:
    for name, dataset in (("near", str(store)), ("far", URL)):
        train(tiny_config(dataset, out_dir=name, sample_order="shuffled", final_eval=True))
    near, far = ([{k: v for k, v in e.items() if "time" not in k and "per_s" not in k} for e in read_metrics(Path(n))]
                 for n in ("near", "far"))  # fmt: skip
    assert near == far


def test_mistakes_in_a_store_are_named(store: Path) -> None:
    files = fsspec.filesystem("memory")
    with pytest.raises(UserError, match="memory://bucket/none does not have a manifest.json"):
        resolve_dataset("memory://bucket/none")
    with pytest.raises(UserError, match="cannot read nosuch://x/manifest.json: Protocol not known: nosuch"):
        resolve_dataset("nosuch://x")
    files.pipe("/bucket/babble/train_000001.bin", b"\1\0" * 100)
    with pytest.raises(DataError, match="train_000001.bin does not match its hash in manifest.json"):
        opened().windows(np.array([150]), 10)
    files.rm("/bucket/babble/train_000001.bin")
    with pytest.raises(DataError, match="train_000001.bin is missing"):
        opened().windows(np.array([150]), 10)
    assert not [path for path in cached() if "train_000001" in path.name]
    folder = resolve_dataset(URL)
    whole = (folder / "manifest.json").read_text()
    for bad in (whole.replace('"sha256": "', '"sha256": "../'), whole.replace("val.bin", "../val.bin")):
        (folder / "manifest.json").write_text(bad)
        with pytest.raises(UserError, match="does not have the hash of"):
            TokenData.open(folder, "val")


@pytest.mark.parametrize("missing", ["manifest.json", "tokenizer.meta.json", "tokenizer.json"])
def test_a_dataset_is_not_opened_without_its_tokenizer(
    here: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec reports a failed connection to a web server as a missing file."""
    files, open_it, failures = fsspec.filesystem("memory"), fsspec.open, [2]
    Path("a.txt").write_text("some words that are read " * 40)
    files.put(str(prepare(["a.txt"], tokenizer="bpe:300", report=lambda line: None)), "/bucket/a", recursive=True)

    def failing(url: str, *args: Any) -> Any:
        if url.endswith(f"/{missing}") and failures[0]:
            failures[0] -= 1
            raise FileNotFoundError(url)
        return open_it(url, *args)

    monkeypatch.setattr(fsspec, "open", failing)
    assert tokenizer_of(resolve_dataset("memory://bucket/a")) is not None
    failures[0] = 100
    with pytest.raises(UserError, match=f"{missing} cannot be read, but|does not have a {missing}"):
        resolve_dataset("memory://bucket/a")
    files.rm("/bucket", recursive=True)


def test_a_store_without_its_package_names_the_extra(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(url: str, *args: Any) -> Any:
        raise ImportError("HTTPFileSystem requires aiohttp")

    with pytest.raises(UserError, match="reading az://bucket/a.* needs another package: Install adlfs"):
        resolve_dataset("az://bucket/a")  # the extra does not have it
    monkeypatch.setattr(fsspec, "open", without)
    with pytest.raises(UserError, match=r"http://localhost:9/a.*requires aiohttp \(for s3, .*pip install .*\[remote\]"):
        resolve_dataset("http://localhost:9/a")


def test_a_failing_store_is_asked_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, open_it = [], fsspec.open

    def failing(url: str, *args: Any) -> Any:
        calls.append(url)
        if "train" in url and len(calls) % 3:
            raise ConnectionError("reset by peer")
        return open_it(url, *args)

    data = opened()
    monkeypatch.setattr(fsspec, "open", failing)
    assert len(data.windows(np.array([50]), 10)) == 1
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    calls.clear()
    with pytest.raises(DataError, match="reset by peer; when it can be read again, resume with"):
        data.windows(np.array([450]), 10)


# --- datatrove ---


def write_ds(folder: Path, shards: dict[str, list[list[int]]], width: str = "H") -> None:
    """Files as datatrove's TokenizedFile writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in shards.items():
        ids = [i for document in documents for i in document]
        (folder / name).write_bytes(struct.pack(f"<{len(ids)}{width}", *ids))
        ends = np.cumsum([len(document) for document in documents]).tolist()
        (folder / f"{name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
        (folder / f"{name}.metadata").write_text(f"gpt2|{2 if width == 'H' else 4}\n{len(ids)}\n{len(ids)} T")


@pytest.mark.parametrize("width", ["H", "I"])
def test_shards_of_datatrove_are_a_dataset(here: Path, width: str) -> None:
    shards = {"00000_x.ds": [[1, 2, 3], [4, 5]], "00001_x.ds": [], "00002_x.ds": [[6, 7]], "00003_x.ds": [[8, 9]]}
    write_ds(here / "data" / "trove", shards, width)
    folder = resolve_dataset("trove")
    data = TokenData.open(folder, "train")
    assert data.windows(np.array([0]), 7).tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert TokenData.open(folder, "val").windows(np.array([0]), 2).tolist() == [[8, 9]]
    assert tokenizer_of(folder) is None, "GPT-2's is assumed"
    packed = PackedData.of(data, folder, "train", 4, None)
    assert packed.documents == 3 and sorted(packed.lengths.tolist()) == [2, 2, 3]
    assert "about 2 tokens" in str(short_documents(data, folder, 64)) and not short_documents(data, folder, 4)


def test_shards_of_datatrove_that_do_not_fit(here: Path) -> None:
    write_ds(here / "one", {"a.ds": [[1, 2]]})
    with pytest.raises(UserError, match="but has 1: the last one is the validation split"):
        TokenData.open(here / "one", "train")
    write_ds(here / "two", {"a.ds": [[1, 2]], "val.ds": [[3]]})
    assert len(TokenData.open(here / "two", "val")) == 1
    (here / "two" / "a.ds.index").write_bytes(struct.pack("<Q", 3))
    with pytest.raises(DataError, match="does not match its index"):
        TokenData.open(here / "two", "train")
    (here / "two" / "a.ds.index").unlink()
    with pytest.raises(UserError, match="cannot read .*a.ds.index"):
        TokenData.open(here / "two", "train")
    (here / "one" / "a.ds.metadata").write_text("org/other|2\n2\n")
    with pytest.raises(UserError, match="were made with org/other: copy its tokenizer.json into the folder"):
        tokenizer_of(here / "one")


def test_short_documents_in_prepared_data_are_noted(here: Path) -> None:
    for number in range(40):
        (here / f"{number}.txt").write_text("a few words")
    folder = prepare("*.txt", root=here, report=lambda line: None, tokenizer="bpe:300", name="few")
    data = TokenData.open(folder, "train")
    assert "train on each document separately, add --documents=True" in str(short_documents(data, folder, 64))
    assert short_documents(data, folder, 7) is None


def test_lines_that_are_samples_are_noted(here: Path) -> None:
    """Lines of verse and programs are not: they have blank and indented lines between them."""
    sums = "".join(f"{a:02}+{b:02}={a + b:03}\n" for a in range(40) for b in range(40))
    names = "".join(f"{name}\n" for name in sorted(set(real_text()[:100_000].split())))
    program = Path(packing.__file__).read_text(encoding="utf-8")
    for text, noted in ((sums, True), (names, True), (real_text()[:100_000], False), (program, False)):
        (here / "t.txt").write_text(text, encoding="utf-8")
        folder = prepare("t.txt", root=here, report=lambda line: None, tokenizer="char")
        data, tokenizer = TokenData.open(folder, "train"), tokenizer_of(folder)
        line = short_documents(data, folder, 64, tokenizer)
        assert (line is not None) == noted and short_documents(data, folder, 12, tokenizer) is None
        assert not line or line.endswith("prepare the text with llm-prepare --lines=True")
        assert text != sums or "have about 10 tokens, and windows of 64 mix them" in str(line)
    (here / "t.txt").write_text(sums)
    folder = prepare("t.txt", root=here, report=lambda line: None, tokenizer="char", lines=True)
    assert "llm-prepare" not in str(short_documents(TokenData.open(folder, "train"), folder, 64, tokenizer_of(folder)))
