"""Encoding in worker processes, its progress, and the fast encoder."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_from_scratch.core.tokenizer import HFTokenizer, Tokenizer
from llm_from_scratch.core.vocab_files import byte_to_char
from llm_from_scratch.data import building, encode, fast_bpe, readers, shards
from llm_from_scratch.data import prepare as module
from llm_from_scratch.data.fast_bpe import FastTokenizer
from llm_from_scratch.data.meter import Meter
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.data.shards import ShardWriter
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.extras import is_installed
from llm_from_scratch.tests.data.test_prepare import Told, left_behind, manifest_of, stories, write_jsonl
from llm_from_scratch.tests.served import until
from llm_from_scratch.tests.texts import real_text, reference_gpt2

needs_gigatoken = pytest.mark.skipif(not is_installed("gigatoken"), reason="needs gigatoken")


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, units and records of the progress; the fast encoder for any text."""
    monkeypatch.setattr(readers, "PIECE", 5000)
    monkeypatch.setattr(encode, "UNIT", 7000)
    monkeypatch.setattr(encode, "SAVE_EVERY", 0)
    monkeypatch.setattr(building, "FAST_FROM", 0)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


# the shards


@pytest.mark.parametrize("size", [7, 10, 100])
def test_a_writer_continues_after_any_state(here: Path, size: int) -> None:
    ids = np.arange(45, dtype="<u2")
    for cut in (0, 3, 10, 20, 44):
        for kept in ("all", "later tokens"):
            folder = here / f"{cut} {kept}"
            folder.mkdir()
            writer = ShardWriter(folder, "train", size, ids.dtype)
            writer.append(ids[:cut])
            state = json.loads(json.dumps(writer.state()))
            if kept == "later tokens":  # written after the state was recorded
                writer.append(ids[cut:] + 1)
                writer.state()
            other = ShardWriter(folder, "train", size, ids.dtype)
            other.restore(state)
            other.append(ids[cut:])
            entry = other.close()
            files = [folder / shard["file"] for shard in entry["shards"]]
            assert np.concatenate([np.fromfile(file, "<u2") for file in files]).tolist() == ids.tolist()
            assert sorted(folder.iterdir()) == files and entry["tokens"] == 45


def test_a_changed_shard_is_found(here: Path) -> None:
    writer = ShardWriter(here, "val", 10, np.dtype("<u2"))
    writer.append(np.arange(25, dtype="<u2"))
    state = writer.state()
    for number, change in ((0, b"\7"), (2, b"")):
        path = here / f"val_{number:06d}.bin"
        before = path.read_bytes()
        path.write_bytes(change + before[1:] if change else before[:-2])
        with pytest.raises(ValueError, match=path.name):
            ShardWriter(here, "val", 10, np.dtype("<u2")).restore(state)
        path.write_bytes(before)


def test_an_error_of_the_disk_in_the_thread_is_raised(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = os.fsync, list[int]()

    def failing(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        plain(handle)

    monkeypatch.setattr(shards, "SYNC_EVERY", 1)
    monkeypatch.setattr(os, "fsync", failing)
    writer = ShardWriter(here, "train", 100, np.dtype("<u2"))
    with pytest.raises(OSError, match="Input/output error"):
        for _ in range(3):
            writer.append(np.arange(5, dtype="<u2"))
        writer.close()


# interrupted runs


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops processes as POSIX does")
def test_workers_that_never_end_are_killed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the death of one that held the lock by which the others wait for work."""
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    before = set(multiprocessing.active_children())
    tokenizer = Tokenizer.from_name("byte")
    tokenizer.save(here)
    pool = encode.start_pool(1, here, fast=False)
    assert pool.submit(int).result() == 0
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid or 0, signal.SIGSTOP)
    monkeypatch.setattr(encode, "PATIENCE", 1.0)
    pool.end()
    # a thread of the pool may collect it, and knows a moment later that it has ended
    assert until(lambda: not worker.is_alive()) and other.is_alive()
    other.kill()


@pytest.mark.parametrize("shard_size", [5000, 1 << 30])
def test_an_interruption_while_ids_are_converted_loses_nothing(
    here: Path, small: None, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    monkeypatch.setattr(shards, "LARGE", 40_000)
    (here / "a.txt.gz").write_bytes(gzip.compress(real_text()[:60_000].encode()))  # its size promises fewer ids
    settings: dict[str, Any] = {"tokenizer": "byte", "shard_size": shard_size}
    whole = prepare(["a.txt.gz"], out_dir="whole", **settings)
    assert manifest_of(whole)["dtype"] == "uint8"
    plain, calls = shards.convert, list[Path]()

    def interrupted(path: Path, *types: Any) -> str:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(path, *types)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "convert", interrupted)
        prepare(["a.txt.gz"], **settings)
    told = Told()
    folder = prepare(["a.txt.gz"], **settings, report=told)
    assert "resuming after" in told and bytes_of(folder) == bytes_of(whole)


@pytest.mark.cases(1)
@pytest.mark.parametrize("shard_size", [5000, 1 << 30])
def test_an_interrupted_run_continues(
    here: Path, small: None, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    write_jsonl(here / "d.jsonl", stories(1500))
    whole = prepare(["d.jsonl"], tokenizer="byte", out_dir="whole", shard_size=shard_size, cache_dir=None)
    plain, done = encode.Unit.encode, [0]

    def failing(unit: encode.Unit, tokenizer: Any) -> np.ndarray:
        done[0] += 1
        if done[0] == 6:
            raise KeyboardInterrupt
        return plain(unit, tokenizer)

    monkeypatch.setattr(encode.Unit, "encode", failing)
    settings: dict[str, Any] = {"tokenizer": "byte", "shard_size": shard_size, "cache_dir": None}
    with pytest.raises(KeyboardInterrupt):
        prepare(["d.jsonl"], **settings)
    kept = [p for p in (here / "data/processed").iterdir() if "building" in p.name]
    assert len(kept) == 1
    told = Told()
    folder = prepare(["d.jsonl"], **settings, report=told)
    assert "resuming after" in told
    assert bytes_of(folder) == bytes_of(whole) and manifest_of(folder)["splits"] == manifest_of(whole)["splits"]
    assert [p.name for p in (here / "data/processed").iterdir()] == ["d"]
    # of another request, or damaged, it is not used
    for case in ("another", "damaged"):
        done[0] = 0
        settings["seed"] = 3 if case == "another" else 4
        with pytest.raises(KeyboardInterrupt):
            prepare(["d.jsonl"], **settings)
        if case == "another":
            settings["seed"] = 5
        else:
            shard = next((here / "data/processed").glob(".d.building-*/train_000000.bin"))
            shard.write_bytes(b"\1\0" + shard.read_bytes()[2:])
        done[0] = 100
        told = Told()
        folder = prepare(["d.jsonl"], **settings, report=told)
        assert "resuming" not in told and ("damaged" in told) == (case == "damaged")
        fresh = prepare(["d.jsonl"], **settings, out_dir="fresh")
        assert bytes_of(folder) == bytes_of(fresh)
        assert left_behind(here / "data/processed") == [str(p) for p in here.glob("data/processed/d/*.bin")]


def test_nothing_is_written_after_a_failed_unit(here: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although later units wait to be written. Progress of another version is not resumed."""
    (here / "a.txt").write_text(real_text()[:150_000])
    monkeypatch.setattr(readers, "CUT", 1000)
    plain, calls = ShardWriter.append, [0]

    def failing(writer: ShardWriter, ids: np.ndarray) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(28, "No space left on device", "a disk")
        plain(writer, ids)

    monkeypatch.setattr(ShardWriter, "append", failing)
    with pytest.raises(UserError, match="cannot write a disk: No space left"):
        prepare(["a.txt"], tokenizer="byte")
    assert calls[0] == 5
    (progress,) = here.glob("data/processed/.a.building-*/progress.json")
    state = json.loads(progress.read_text())
    assert state["units"] == 4
    told = Told()
    whole = bytes_of(prepare(["a.txt"], tokenizer="byte", report=told))
    assert "resuming after" in told
    text = (here / "a.txt").read_bytes()
    assert (
        b"".join(whole[name] for name in ("train.bin", "val.bin")) == np.frombuffer(text, "u1").astype("<u2").tobytes()
    )
    calls[0] = 2
    with pytest.raises(UserError):
        prepare(["a.txt"], tokenizer="byte", seed=1)
    (progress,) = here.glob("data/processed/.a.building-*/progress.json")
    progress.write_text(progress.read_text().replace('"version"', '"old"'))
    told = Told()
    assert bytes_of(prepare(["a.txt"], tokenizer="byte", seed=1, report=told)) == whole and "resuming" not in told


ROOT = Path(module.__file__).resolve().parents[2]
SMALL = (
    "import multiprocessing, sys; from llm_from_scratch.data import building, encode, prepare, readers\n"
    "readers.PIECE, encode.UNIT, encode.SAVE_EVERY, building.FAST_FROM = 5000, 7000, 0, 0\n"
)


def command(settings: dict[str, Any], start_method: str = "spawn") -> list[str]:
    """A process that prepares d.jsonl in small units."""
    code = f"{SMALL}encode.START_METHOD = {start_method!r}\nprepare.prepare(['d.jsonl'], **{settings!r})"
    return [sys.executable, "-c", f"if __name__ == '__main__':\n {code.replace(chr(10), chr(10) + ' ')}"]


def children_of(pid: int) -> list[int]:
    found = [p for p in Path("/proc").glob("[0-9]*/stat") if p.parent.name.isdecimal()]
    parents = {}
    for path in found:
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    return [child for child, parent in parents.items() if parent == pid]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds worker processes as Linux lists them")
def test_runs_and_workers_killed_at_random_moments(here: Path, small: None) -> None:
    """Any number of kills of the run, of a worker or of both, and the same bytes in the end."""
    write_jsonl(here / "d.jsonl", stories(3000))
    settings: dict[str, Any] = {"tokenizer": "byte", "shard_size": 20_000, "cache_dir": None, "workers": 2}
    whole = prepare(["d.jsonl"], **settings | {"out_dir": "whole", "workers": 0})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    chance, killed = random.Random(0), {"run": 0, "worker": 0}
    for _ in range(40):  # a fast machine may be done before most of the kills
        if sum(killed.values()) > 4:
            break
        process = subprocess.Popen(command(settings), env=environment, stdout=subprocess.PIPE, text=True)
        try:
            process.wait(0.2 + 1.2 * chance.random())
        except subprocess.TimeoutExpired:
            what = chance.choice(["run", "worker"])
            workers = children_of(process.pid)
            for pid in chance.sample(workers, min(1, len(workers))) if what == "worker" else [process.pid]:
                os.kill(pid, signal.SIGKILL)
                killed[what] += 1
        said = process.communicate(timeout=120)[0]
        if process.returncode == 0:
            folder = here / "data/processed/d"
            assert bytes_of(folder) == bytes_of(whole), said
            assert [p.name for p in (here / "data/processed").iterdir()] == ["d"]
            shutil.rmtree(folder)  # make it again
    assert sum(killed.values()) > 2
    assert subprocess.run(command(settings), env=environment, timeout=120).returncode == 0
    assert bytes_of(here / "data/processed/d") == bytes_of(whole)


@pytest.mark.slow
def test_any_workers_start_method_and_locale_give_the_same(here: Path, small: None) -> None:
    write_jsonl(here / "d.jsonl", [*stories(600), "naïve café 日本語 😀", "a\x00b\r\nc\x1b"])
    (here / "d.txt").write_text(real_text()[:50_000] + "naïve café 日本語 😀", encoding="utf-8")
    whole = prepare(["d.jsonl"], tokenizer="byte", out_dir="whole", workers=0, cache_dir=None)
    cases = [(1, "spawn", "C"), (2, "fork", "C"), (3, "spawn", "en_US.CP1252"), (5, "fork", "POSIX")]
    for workers, start_method, locale in cases:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": locale, "PYTHONUTF8": "0"}
        environment |= {"PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"}
        settings = {"tokenizer": "byte", "out_dir": f"o{workers}", "workers": workers, "cache_dir": None}
        done = subprocess.run(command(settings, start_method), env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert bytes_of(here / f"o{workers}") == bytes_of(whole)


# the fast encoder


class Differing(FastTokenizer):
    """Of which the ids are wrong after some texts."""

    encoded = 0

    def __init__(self, tokenizer: Tokenizer, saved: Path) -> None:
        self.tokenizer, self.eot_id, self.vocab_size = tokenizer, tokenizer.eot_id, tokenizer.vocab_size

    def encode(self, text: str) -> np.ndarray:
        Differing.encoded += 1
        return self.tokenizer.encode(text) + np.uint16(Differing.encoded > 250)

    encode_uncast = encode


@pytest.mark.parametrize("shard_size", [4000, 1 << 30])
def test_an_encoder_that_differs_is_not_used_again(
    here: Path, small: None, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    write_jsonl(here / "d.jsonl", stories(600))
    whole = prepare(["d.jsonl"], tokenizer="byte", out_dir="whole", shard_size=shard_size, cache_dir=None)
    monkeypatch.setattr(building, "can_encode", lambda tokenizer: True)
    monkeypatch.setattr(encode, "FastTokenizer", Differing)
    monkeypatch.setattr(Differing, "encoded", 0)
    told = Told()
    folder = prepare(["d.jsonl"], tokenizer="byte", shard_size=shard_size, workers=0, report=told)
    assert Differing.encoded > 250 and "gigatoken's ids differ from byte's for " in told
    assert bytes_of(folder) == bytes_of(whole) and manifest_of(folder)["splits"] == manifest_of(whole)["splits"]


def test_the_sample_is_a_part_of_a_text_and_differs_between_units() -> None:
    text = real_text()
    units = [[text[k * 20_000 : (k + 1) * 20_000], text[k : k + 50]] for k in range(20)]
    samples = [encode.sample(unit) for unit in units]
    assert all(any(one in part for part in unit) for one, unit in zip(samples, units, strict=True))
    assert len(set(samples)) == 20 and max(map(len, samples)) <= encode.SAMPLE
    assert encode.sample([]) == encode.sample(["", ""]) == ""
    assert len({text.find(one) % 20_000 for one in samples}) > 10


HARD = [
    *(
        " ",
        "\n",
        "\r\n",
        "\t",
        "a",
        "Ab",
        "ing",
        "'s",
        "'LL",
        "é",
        "e\u0301",
        "東京",
        "😀",
        "👩\u200d👧",
        "\x00",
        "\x1b",
    ),
    *("\u00a0", "\u2028", "1", "234", "²", "<|endoftext|>", "!", "//", "_", "-->", "\u200f", "\u0627", "हि", "\ufeff"),
    "xyz" * 30,
]


@pytest.mark.slow
@needs_gigatoken
def test_gigatoken_gives_the_ids_of_tiktoken_and_tokenizers(here: Path) -> None:
    """tiktoken and tokenizers are called directly, on a real text and on random strings of difficult parts."""
    text, chance = real_text(), random.Random(0)
    samples = ["".join(chance.choices(HARD, k=chance.randrange(1, 40))) for _ in range(2000)]
    samples += [f"a{chr(code)}1" for code in range(0x370, 0x32000, 7) if not 0xD800 <= code < 0xE000]
    samples += ["a\u088f=T", "x\u0c5c1 \U00016ea0b"]  # letters since Unicode 17
    samples += [text[k : k + 4000] for k in range(0, 200_000, 4000)]
    bpe = HFTokenizer.train([text[:300_000]], 600)
    reference, backend = reference_gpt2(), bpe.backend(special_is_text=True)
    references = {
        "gpt2": lambda sample: reference.encode_ordinary(sample),
        "bpe": lambda sample: backend.encode(sample, add_special_tokens=False).ids,
    }
    for tokenizer in (Tokenizer.from_name("gpt2"), bpe):
        tokenizer.save(here / tokenizer.name)
        fast = FastTokenizer(tokenizer, here / tokenizer.name)
        for sample in samples:
            assert fast.encode(sample).tolist() == references[tokenizer.name](sample), repr(sample)
        fast.encoded = fast_bpe.RENEW
        assert fast.encode(text[:5000]).tolist() == references[tokenizer.name](text[:5000])
        assert fast.encoded == 0  # the cache was dropped
        assert fast.encode("a\ud800b").tolist() == references[tokenizer.name]("a\ufffdb")


@needs_gigatoken
def test_gigatoken_normalizes_as_tokenizers_does(here: Path) -> None:
    """Every mark and every character with a decomposition, between other marks."""
    body = json.loads(HFTokenizer.train(["a few words"], 300).json_text) | {"normalizer": {"type": "NFC"}}
    (tokenizer := HFTokenizer(json.dumps(body), "hf")).save(here / "t")
    fast, backend = FastTokenizer(tokenizer, here / "t"), tokenizer.backend(special_is_text=True)
    chars = [
        char for char in map(chr, range(0x2FFFF)) if unicodedata.combining(char) or unicodedata.decomposition(char)
    ]
    assert len(chars) > 5000
    for char in chars:
        text = f"a\u0301{char}\u0334 b{unicodedata.normalize('NFD', char)}"
        assert fast.encode(text).tolist() == backend.encode(text, add_special_tokens=False).ids, f"U+{ord(char):04X}"


@pytest.mark.slow
@needs_gigatoken
def test_gigatoken_trains_the_tokenizer_that_tokenizers_trains(here: Path) -> None:
    text = real_text()
    texts, told = [text[:200_000], "naïve 東京 <|endoftext|>\r\n" * 50, text[200_000:300_000]], Told()
    for size in (300, 2000):
        trained = fast_bpe.train(f"bpe:{size}", texts, here, told)
        expected = HFTokenizer.train(texts, size)
        assert trained is not None and trained.json_text == expected.json_text
        assert trained.fingerprint() == expected.fingerprint() and not list(here.iterdir())
    assert fast_bpe.train("bpe:300", ["a\ud800"], here, told) is None and "surrogates not allowed" in told
    assert not list(here.iterdir())


def test_a_tokenizer_is_made_of_its_merges() -> None:
    trained = HFTokenizer.train([real_text()[:20_000]], 400)
    byte = {char: bytes([b]) for b, char in enumerate(byte_to_char())}
    merges = [tuple(b"".join(byte[char] for char in side) for side in pair)
              for pair in json.loads(trained.json_text)["model"]["merges"]]  # fmt: skip
    assert fast_bpe.with_merges(merges) == trained.json_text  # type: ignore[arg-type]


def test_the_meter_reports_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, read, told = [100.0], [0], Told()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    meter = Meter(1_000_000_000, lambda: read[0], told)
    for now[0], read[0] in ((101, 100_000_000), (106, 150_000_000), (112, 210_000_000)):
        meter.update(1_234_567, 50_000_000)
    meter.close()
    # 10 MB/s of the sources since the first call, at 101 s: 790 MB are left
    assert told.lines == ["  1,234,567 tokens, 13.6 MB/s, 21%, 0:01:19 left"]
