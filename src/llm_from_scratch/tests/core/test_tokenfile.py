"""core/tokenfile.py: invalid token files, before and during a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.core import tokenfile
from llm_from_scratch.core.dataset import BatchLoader, SampleOrder, TokenData
from llm_from_scratch.core.tokenfile import CHECKED, TokenFile
from llm_from_scratch.errors import DataError, UserError

from ..tiny import write_data

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(0, 20, 5000)


@pytest.fixture(params=["pread", "seek"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's positioned read, and without it, as on Windows."""
    if request.param == "seek":
        monkeypatch.delattr(os, "pread")


# --- reading ---


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_slices_equal_the_array_that_was_written(tmp_path: Path, reading: None, dtype: str) -> None:
    ids = IDS.astype(dtype)
    ids.tofile(tmp_path / "a.bin")
    file = TokenFile(tmp_path / "a.bin", dtype)
    assert len(file) == 5000 and file.nbytes == ids.nbytes
    for part in (slice(0, 5000), slice(None), slice(4990, 9999), slice(17, 17), slice(30, 20), slice(-3, None)):
        assert file[part].tolist() == ids[part].tolist() and file[part].dtype == ids.dtype
    assert [file[0], file[4999]] == [ids[0], ids[4999]]
    assert file.rows([3, 0, 4990], 10).tolist() == [ids[a : a + 10].tolist() for a in (3, 0, 4990)]


def test_a_signal_that_cuts_a_read_short_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    IDS.astype("<u2").tofile(tmp_path / "a.bin")
    file, pread = TokenFile(tmp_path / "a.bin", "<u2"), os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, at: pread(handle, min(size, 7), at))
    assert file[100:200].tolist() == IDS[100:200].tolist()
    assert file.rows([100, 300], 50).tolist() == [IDS[100:150].tolist(), IDS[300:350].tolist()]


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    TokenData.open(folder, "train")
    before = os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else []
    for _ in range(20):
        TokenData.open(folder, "train")
    assert not before or len(os.listdir("/proc/self/fd")) == len(before)


# --- under a running job ---


def test_a_file_truncated_during_a_read_is_named(tmp_path: Path, reading: None) -> None:
    """A memory map would end the process here."""
    folder = write_data(tmp_path, train=IDS, tokenizer=None)
    data = TokenData.open(folder, "train")
    before = data.windows(np.array([0, 4000]), 9)
    os.truncate(folder / "train.bin", 4096)
    assert data.windows(np.array([0]), 9).tolist() == before[:1].tolist()
    with pytest.raises(DataError, match=r"train.bin was truncated during .* 10000 bytes, now 4096; .*init_from=resume"):
        data.windows(np.array([0, 4000]), 9)
    os.truncate(folder / "train.bin", 0)
    with pytest.raises(DataError, match="now 0"):
        data.windows(np.array([0]), 9)


def test_an_open_file_that_is_replaced_is_still_read(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "a", train=IDS, tokenizer=None)
    data = TokenData.open(folder, "train")
    other = write_data(tmp_path / "b", train=[1, 2, 3], tokenizer=None)
    os.replace(other / "train.bin", folder / "train.bin")
    assert data.windows(np.array([0]), 5000)[0].tolist() == IDS.tolist()


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TokenData.open(write_data(tmp_path, train=IDS, tokenizer=None), "train")

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match="cannot read .*train.bin: Input/output error; .*init_from=resume"):
        data.windows(np.array([0]), 9)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_loader_returns_no_bad_id(tmp_path: Path, shards: int) -> None:
    folder = write_data(tmp_path, train=[*np.array_split(IDS, shards)], tokenizer=None)
    data = TokenData.open(folder, "train")
    loader = BatchLoader(data, SampleOrder(5000, 8, "shuffled"), 100, CPU, vocab_size=20)
    loader.get(0)
    name = "train_000000.bin" if shards == 1 else "train_000002.bin"
    with (folder / name).open("r+b") as file:
        file.seek(-2 * 100, os.SEEK_END)
        file.write(np.array([20], "<u2").tobytes())
    where = 4900 if shards == 1 else 4900 - len(np.concatenate(np.array_split(IDS, 3)[:2]))
    with pytest.raises(DataError, match=rf"{name}: token {where} has id 20, outside the vocabulary of 20 ids") as error:
        for step in range(1, 60):
            x, y = loader.get(step)
            assert int(torch.maximum(x, y).max()) < 20
    assert "\n" not in str(error.value)
    loader.close()


# --- before the first step ---


def refused(folder: Path, vocab_size: int = 20) -> str:
    with pytest.raises(UserError) as error:
        TokenData.open(folder, "train").check(8, vocab_size)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def as_npy(path: Path) -> None:
    np.save(path.with_suffix(".npy"), IDS.astype("<u2"))
    os.replace(path.with_suffix(".npy"), path)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "npy": (as_npy, r"is a NumPy file with a header \(.npy\)"),
    "text": (lambda p: p.write_text("To be, or not to be, that is the question:\n" * 9), "is a text; prepare it"),
    "text in UTF-8": (lambda p: p.write_text("«Être ou ne pas être» — 是这样 " * 9, encoding="utf-8"), "is a text"),
    "uint32": (lambda p: IDS.astype("<u4").tofile(p), "every second id is 0, so these are probably uint32 or int64"),
    "int64": (lambda p: IDS.astype("<i8").tofile(p), "every second id is 0"),
    "big-endian": (lambda p: IDS.astype(">u2").tofile(p), r"outside the vocabulary .*uint16 in the other byte order"),
    "big-endian uint32": (lambda p: IDS.astype(">u4").tofile(p), "uint32 in the other byte order"),
    "float32": (lambda p: IDS.astype("<f4").tofile(p), "the ids near it are valid as float32"),
    "float64": (lambda p: IDS.astype("<f8").tofile(p), "the ids near it are valid as float64"),
    "one id in the last token": (lambda p: np.append(IDS, 20).astype("<u2").tofile(p), "token 5000 has id 20"),
    "one negative": (lambda p: np.append(IDS, -1).astype("<i2").tofile(p), "token 5000 has id 65535"),
    "odd": (lambda p: p.write_bytes(IDS.astype("<u2").tobytes()[:-1]), "9999 bytes, not a multiple of 2"),
    "empty": (lambda p: p.write_bytes(b""), "is empty: the train split"),
    "short": (lambda p: p.write_bytes(bytes(16)), r"has 8 tokens, but a window needs block_size \+ 1 = 9"),
    "FIFO": (os.mkfifo, "train.bin: it is a FIFO, not a regular file"),
    "directory": (Path.mkdir, "train.bin: it is a directory"),
    "device": (lambda p: p.symlink_to("/dev/zero"), "train.bin: it is a device"),
    "dangling link": (lambda p: p.symlink_to("nowhere"), "train.bin is missing"),
    "link to itself": (lambda p: p.symlink_to(p.name), "cannot read .*train.bin"),
    "numbered as well": (
        lambda p: [p.write_bytes(bytes(90)), p.with_name("train_0.bin").write_bytes(b"")],
        "contains both",
    ),
    "gap": (lambda p: [p.with_name(f"train_{n}.bin").write_bytes(b"") for n in (1, 2, 4)], "number 3 is missing"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    folder = write_data(tmp_path, tokenizer=None)
    (folder / "train.bin").unlink()
    BAD[kind][0](folder / "train.bin")
    with pytest.raises(UserError, match=BAD[kind][1]):
        TokenData.open(folder, "train").check(8, 20)
    refused(folder)


def test_ids_of_the_wrong_width_are_explained(tmp_path: Path) -> None:
    splits = {"train": {"shards": [{"file": "train.bin", "tokens": 2500}]}}
    folder = write_data(tmp_path, tokenizer=None, dtype="uint32", splits=splits)
    IDS.astype("<u2").tofile(folder / "train.bin")
    assert "the ids near it are valid as uint16; convert the file to little-endian uint32" in refused(folder)


def test_odd_but_valid_files_are_read(tmp_path: Path) -> None:
    """Ids below 256 in a text's order, newlines in every second place where a manifest says the dtype, all zeros."""
    folder = write_data(tmp_path / "a", train=np.frombuffer(b"plain ascii text " * 50, np.uint8), tokenizer=None)
    assert TokenData.open(folder, "train").check(8, 256) is None
    zeros = np.stack([IDS, 0 * IDS], axis=1).reshape(-1)
    splits = {"train": {"shards": [{"file": "train.bin", "tokens": 10000}]}}
    TokenData.open(write_data(tmp_path / "b", train=zeros, splits=splits), "train").check(8, 20)
    TokenData.open(write_data(tmp_path / "c", train=np.zeros(50), tokenizer=None), "train").check(8, 20)


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": v} for v in (0, -1, 1.5, True, 1 << 40)]
    + [{"splits": {"train": {"shards": [{"file": f, "tokens": t}]}}} for f, t in (("a\0", 1), ("a", -1), ("a", 1.0))],
    ids=str,
)
def test_a_manifest_out_of_range_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_data(tmp_path, **change)
    assert "manifest.json is damaged" in refused(folder)


def test_a_manifest_that_is_not_a_file_does_not_block(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    os.mkfifo(folder / "manifest.json")
    assert "manifest.json is damaged" in refused(folder) and "is a FIFO" in refused(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")
    assert "is a device" in refused(folder)
    write_data(tmp_path / "twice", splits={"train": {"shards": [{"file": "train.bin", "tokens": 2000}] * 2}})
    assert "names a file twice" in refused(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "manifest.json").read_text())["vocab_size"] == 20


# --- the scan that is remembered ---


@pytest.fixture
def scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Checks the data in tmp_path and returns how many ids were read for it."""
    monkeypatch.setattr(tokenfile, "REMEMBER_FROM", 0)
    read, get = [0], TokenFile.__getitem__

    def counting(self: TokenFile, part: slice | int) -> np.ndarray:
        ids = get(self, part)
        read[0] += ids.size
        return ids

    def check() -> int:
        data = TokenData.open(tmp_path, "train")
        with monkeypatch.context() as patch:
            patch.setattr(TokenFile, "__getitem__", counting)
            read[0] = 0
            data.check(8, 20)
        return read[0]

    write_data(tmp_path, train=[IDS[:3000], IDS[3000:]], tokenizer=None)
    return check


def test_a_scan_is_remembered_until_a_file_changes(tmp_path: Path, scanned: Callable[[], int]) -> None:
    assert scanned() == 5000 and scanned() == 0
    info = (tmp_path / "train_000001.bin").stat()
    os.utime(tmp_path / "train_000001.bin", ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    assert scanned() == 2000 and scanned() == 0
    ids = IDS[:3000].astype("<u2")
    ids[-1] = 20
    ids.tofile(tmp_path / "train_000000.bin")  # the same size
    with pytest.raises(DataError, match="train_000000.bin: token 2999 has id 20"):
        scanned()
    with pytest.raises(DataError):
        scanned()


def test_the_largest_id_is_remembered(tmp_path: Path, scanned: Callable[[], int]) -> None:
    assert scanned() == 5000
    with pytest.raises(DataError, match="has id 19, outside the vocabulary of 19 ids"):
        TokenData.open(tmp_path, "train").check(8, 19)
    TokenData.open(tmp_path, "train").check(8, 50)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100000, '{"train_000000.bin": 3}', "\udcff", None])
def test_a_damaged_memory_means_another_scan(tmp_path: Path, scanned: Callable[[], int], content: str | None) -> None:
    if content is None:
        os.mkfifo(tmp_path / CHECKED)
    else:
        (tmp_path / CHECKED).write_text(content, errors="surrogateescape")
    assert scanned() == 5000 and scanned() == 0
    known = json.loads((tmp_path / CHECKED).read_text())
    for lie in (-1, 1.0, None, "19"):
        entry = known | {"train_000000.bin": known["train_000000.bin"] | {"largest": lie}}
        (tmp_path / CHECKED).write_text(json.dumps(entry))
        assert scanned() == 3000


def test_without_a_writable_folder_every_start_scans(tmp_path: Path, scanned: Callable[[], int]) -> None:
    (tmp_path / CHECKED).mkdir()
    assert scanned() == scanned() == 5000
    assert [path.name for path in tmp_path.glob(f"{CHECKED}*")] == [CHECKED]


def test_a_wrong_memory_of_checks_lets_no_bad_id_through(tmp_path: Path, scanned: Callable[[], int]) -> None:
    scanned()
    shutil.copy(tmp_path / CHECKED, tmp_path / "copy")
    ids = np.append(IDS[3000:-1], 500)
    ids.astype("<u2").tofile(tmp_path / "train_000001.bin")
    known = json.loads((tmp_path / "copy").read_text())
    file = TokenFile(tmp_path / "train_000001.bin", "<u2")
    known["train_000001.bin"] |= file.identity()
    (tmp_path / CHECKED).write_text(json.dumps(known))
    assert scanned() == 0
    data = TokenData.open(tmp_path, "train")
    data.check(8, 20)
    with pytest.raises(DataError, match="train_000001.bin: token 1999 has id 500"):
        data.windows(np.array([4990]), 10)


def test_small_data_leave_nothing_behind(tmp_path: Path) -> None:
    before = sorted(write_data(tmp_path).iterdir())
    TokenData.open(tmp_path, "train").check(8, 20)
    assert sorted(tmp_path.iterdir()) == before


# --- during the first steps ---


def test_a_scan_in_the_background_finds_the_last_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenfile, "SCAN_LIMIT", 100)
    monkeypatch.setattr(tokenfile, "BLOCK", 64)
    folder = write_data(tmp_path, train=np.append(IDS, 20), tokenizer=None)
    scan = TokenData.open(folder, "train").check(8, 20)
    assert scan is not None
    scan.thread.join()
    with pytest.raises(DataError, match="train.bin: token 5000 has id 20"):
        scan.raise_if_bad()
    scan.close()
    good = TokenData.open(folder, "train").check(8, 21)
    assert good is not None
    good.thread.join()
    good.raise_if_bad()
    good.close()


@pytest.mark.parametrize("how", ["close", "forget"])
def test_a_scan_ends_when_it_is_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    blocks = iter(range(10**9))

    class Endless(TokenFile):
        def __len__(self) -> int:
            return 1 << 60

        def __getitem__(self, part: slice | int) -> np.ndarray:
            next(blocks)
            return np.zeros(1, "<u2")

    IDS.astype("<u2").tofile(tmp_path / "a.bin")
    scan = tokenfile.BackgroundScan([Endless(tmp_path / "a.bin", "<u2")], "endless", 20)
    thread = scan.thread
    if how == "close":
        scan.close()
    else:
        del scan
    thread.join(20)
    assert not thread.is_alive()
