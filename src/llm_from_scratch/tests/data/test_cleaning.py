from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_from_scratch.core.tokenizer import Tokenizer
from llm_from_scratch.data import cleaning, duplicates
from llm_from_scratch.data import hashes as hashing
from llm_from_scratch.data.filters import Cleaner, c4, count_sentences, gopher, mask
from llm_from_scratch.data.hashes import hash_words, runs_of_words
from llm_from_scratch.data.options import PrepareOptions
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.data.sources import FileSource
from llm_from_scratch.errors import Removed, UserError
from llm_from_scratch.tests.texts import real_text

pytestmark = pytest.mark.usefixtures("here")


def write(name: str, texts: list[str]) -> str:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return name


def kept(name: str, **settings: Any) -> tuple[list[str], dict[str, Any]]:
    """The documents of a dataset in bytes, and its manifest."""
    folder = prepare([name], tokenizer="gpt2", report=lambda line: None, **settings)
    tokenizer, texts = Tokenizer.load(folder), []
    for split in ("train", "val"):
        text = tokenizer.decode(np.fromfile(folder / f"{split}.bin", "<u2"))
        texts += text.split("<|endoftext|>")[:-1]
    return texts, json.loads((folder / "manifest.json").read_text())["cleaning"]


def stories(count: int, words: int = 120) -> list[str]:
    all_words = real_text().split()
    return [" ".join(all_words[words * i : words * (i + 1)]) for i in range(count)]


def edited(text: str, share: float, rng: random.Random) -> str:
    words = text.split()
    for at in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[at] = "edited" + str(rng.randrange(10**6))
    return " ".join(words)


# duplicates


def test_exact_duplicates_keep_the_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = stories(40)
    given = [*texts, texts[3], texts[7] + " ", texts[3]]
    for memory in (1 << 28, 100):  # sorted in memory, and on disk
        monkeypatch.setattr(duplicates, "MEMORY", memory)
        found, summary = kept(write("d.jsonl", given), dedup="exact", out_dir=f"out{memory}")
        assert sorted(found) == sorted([*texts, texts[7] + " "])
        assert summary["removed"] == {"exact duplicate": {"documents": 2, "bytes": 2 * len(texts[3].encode())}}
        assert (summary["documents"], summary["kept"]) == (43, 41)


@pytest.mark.slow
def test_near_duplicates_keep_the_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rensa")
    rng, texts = random.Random(1), stories(200)
    copies = [edited(text, 0.01 + 0.15 * rng.random(), rng) for text in texts[:50]]
    order = [*texts, *copies, "too short", "too short to compare"]
    for memory in (1 << 28, 5000):
        monkeypatch.setattr(duplicates, "MEMORY", memory)
        found, summary = kept(write("d.jsonl", order), dedup="near", out_dir=f"out{memory}")
        assert sorted(found) == sorted([*texts, "too short", "too short to compare"])
        assert summary["removed"]["near-duplicate"]["documents"] == 50
    page = Path("out5000/cleaning.html").read_text()
    assert "near-duplicate" in page and "[like: " in page and "<script" not in page


@pytest.mark.slow
def test_signatures_estimate_the_share_of_common_runs() -> None:
    """Against the share itself."""
    pytest.importorskip("rensa")
    rng, texts = random.Random(2), stories(8, 400)
    for share in (0.02, 0.1, 0.2):
        for text in texts:
            other = edited(text, share, rng)
            a, b = (set(runs_of_words([one], duplicates.SHINGLE)[0].tolist()) for one in (text, other))
            rows = duplicates.signatures([text, other])
            assert abs((rows[0] == rows[1]).mean() - len(a & b) / len(a | b)) < 4 * 0.5 / duplicates.NUMBERS**0.5
    assert not duplicates.signatures(["a few words"]).any()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as on Linux")
def test_signatures_of_any_number_of_parts_need_one_open_file(here: Path) -> None:
    numbers = np.random.default_rng(0).integers(1, 1 << 32, (90, duplicates.NUMBERS)).astype("<u4")
    files = [here / str(number) for number in range(60)]
    for number, file in enumerate(files):
        numbers[number * 3 // 2 : (number + 1) * 3 // 2].tofile(file)
    files[7:7] = [here / "empty"]
    (here / "empty").touch()
    before = len(list(Path("/proc/self/fd").iterdir()))
    signatures, opened = duplicates.Signatures(files), 0
    for at, band in enumerate(signatures.band(3)):
        opened = max(opened, len(list(Path("/proc/self/fd").iterdir())) - before)
        assert at or band["index"].tolist() == [0]
    indices = np.random.default_rng(1).permutation(90)
    assert (signatures.at(indices) == numbers[indices]).all() and len(signatures) == 90
    assert opened <= 2


@pytest.mark.slow
def test_a_copy_in_validation_leaves_training(here: Path) -> None:
    texts = stories(20)
    write("train.jsonl", texts)
    write("val.jsonl", [texts[4], "something else entirely"])
    folder = prepare(["train.jsonl"], val_files=("val.jsonl",), tokenizer="gpt2", dedup="exact")
    tokenizer = Tokenizer.load(folder)
    train, val = (tokenizer.decode(np.fromfile(folder / f"{split}.bin", "<u2")) for split in ("train", "val"))
    assert texts[4] in val and texts[4] not in train and texts[5] in train


@pytest.mark.slow
def test_many_parts_and_workers_give_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = stories(60)
    for number in range(6):
        write(f"{number}.jsonl", [*texts[10 * number : 10 * number + 10], texts[0], texts[59]])
    settings: dict[str, Any] = {"dedup": "exact", "boilerplate": 2, "tokenizer": "gpt2", "report": lambda line: None}
    one = prepare(["*.jsonl"], out_dir="one", **settings)
    monkeypatch.setattr(cleaning, "PART", 100)
    many = prepare(["*.jsonl"], out_dir="many", workers=0, **settings)
    for name in ("train.bin", "val.bin", "cleaning.html", "cleaning.txt"):
        assert (one / name).read_bytes() == (many / name).read_bytes()
    assert not list(Path("data/cache").glob("cleaning-*"))


@pytest.mark.slow
def test_worker_processes_clean_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        write(f"{number}.jsonl", stories(30)[number:])
    settings: dict[str, Any] = {"dedup": "exact", "tokenizer": "gpt2", "report": lambda line: None}
    monkeypatch.setattr(cleaning, "PART", 100)
    one, two = (prepare(["*.jsonl"], out_dir=f"out{n}", workers=n, **settings) for n in (0, 2))
    assert (one / "train.bin").read_bytes() == (two / "train.bin").read_bytes()


@pytest.mark.slow
def test_a_killed_run_keeps_its_parts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write(f"{number}.jsonl", stories(10, 50 + number))
    monkeypatch.setattr(cleaning, "PART", 100)
    settings: dict[str, Any] = {"dedup": "exact", "tokenizer": "gpt2", "report": lambda line: None}
    whole = prepare(["*.jsonl"], out_dir="whole", **settings)
    calls: list[bytes] = []
    hash_document = cleaning.hash_document

    def dying(data: bytes) -> bytes:
        calls.append(data)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return hash_document(data)

    monkeypatch.setattr(cleaning, "hash_document", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(["*.jsonl"], **settings)
    folder = prepare(["*.jsonl"], **settings)
    assert len(calls) == 25 + 10  # only the last part was cleaned again
    assert (folder / "train.bin").read_bytes() == (whole / "train.bin").read_bytes()


def test_two_writers_of_a_part_do_not_mix(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after kill -9, when a worker of the killed run may still write."""
    write("d.jsonl", texts := stories(10))
    job = ([FileSource(Path("d.jsonl"))], here / "parts" / "0-000000")
    options, calls, hash_document = PrepareOptions(dedup="exact"), list[bytes](), cleaning.hash_document

    def overtaken(data: bytes) -> bytes:
        calls.append(data)
        if len(calls) == 5:
            cleaning.clean_part(job, options, None)
        return hash_document(data)

    monkeypatch.setattr(cleaning, "hash_document", overtaken)
    cleaning.clean_part(job, options, None)
    assert len(calls) == 20 and (job[1] / "texts").read_text() == "".join(texts)
    assert [path.name for path in (here / "parts").iterdir()] == ["0-000000"]


WORKERS = """
import multiprocessing, threading, time
from llm_from_scratch.data.cleaning import _map

def report():
    while len(children := multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    print(*(child.pid for child in children), flush=True)

threading.Thread(target=report).start()
list(_map(time.sleep, [100, 100], 2))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes as on Linux")
def test_workers_end_with_a_killed_run(here: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WORKERS], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        workers = run.stdout.readline().split()
        run.kill()
    assert len(workers) == 2
    until = time.monotonic() + 60
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.1)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_abandoned_parts_are_removed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = here / "data" / "cache"
    with pytest.raises(UserError, match="cleaning removed all"):
        kept(write("d.jsonl", stories(3)), min_chars=10_000)
    assert len(list(cache.glob("cleaning-*"))) == 1
    kept("d.jsonl", min_chars=10, out_dir="other")
    assert len(list(cache.glob("cleaning-*"))) == 1  # of another dataset
    kept("d.jsonl", min_chars=10)
    assert not list(cache.glob("cleaning-*"))
    Path("d.jsonl").write_text('{"body": 1}\n')
    with pytest.raises(UserError, match="does not have the text field"):
        kept("d.jsonl", min_chars=10)
    assert not list(cache.glob("cleaning-*"))


@pytest.mark.slow
def test_boilerplate_lines(here: Path) -> None:
    texts = [f"Cookies: accept all\n{text}\n  Cookies: accept all\n---\n" for text in stories(6)]
    found, _ = kept(write("d.jsonl", [*texts[:5], stories(6)[5]]), boilerplate=5)
    assert sorted(found) == sorted([*(f"{text}\n---\n" for text in stories(6)[:5]), stories(6)[5]])
    found, _ = kept(write("d.jsonl", texts[:5]), boilerplate=6)
    assert sorted(found) == sorted(texts[:5])


@pytest.mark.slow
def test_documents_of_boilerplate_only_are_removed_and_reported(here: Path) -> None:
    texts = [f"Cookies: accept all\n{text}" for text in stories(4)]
    found, summary = kept(write("d.jsonl", [*texts, "Cookies: accept all\nCookies: accept all\n"]), boilerplate=5)
    assert sorted(found) == sorted(stories(4))
    assert (summary["documents"], summary["kept"], summary["lines"]) == (5, 4, 6)
    assert summary["removed"] == {"only boilerplate": {"bytes": 40, "documents": 1}}
    assert summary["changed"] == {"boilerplate": 4}
    text = Path("data/processed/d/cleaning.txt").read_text()
    assert "6 lines of boilerplate were removed" in text and "  Cookies: accept all Cookies: accept all\n" in text
    with pytest.raises(UserError, match="cleaning removed all 5 documents \\(only boilerplate"):
        kept(write("d.jsonl", ["Cookies: accept all"] * 5), boilerplate=5)


# filters


def reason(run: Any, text: str) -> str | None:
    try:
        run(text)
    except Removed as removed:
        return str(removed)
    return None


GOOD = " ".join(["The people of the town have gone to the river with all that they own."] * 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, None),
        ("too few words", "fewer than 50"),
        (" ".join(["a"] * 60), "mean word length"),
        (" ".join([GOOD] + ["#"] * 20), "too many #"),
        ("\n".join(f"- {line}" for line in GOOD.split(". ")), "bullet"),
        ("\n".join(f"{line}..." for line in [GOOD] * 3), "end with ..."),
        (" ".join([GOOD] + ["12345"] * 40), "with a letter"),
        (" ".join(["rivière"] * 60), "stop words"),
    ],
)
def test_gopher(text: str, expected: str | None) -> None:
    found = reason(gopher, text)
    assert found is None if expected is None else expected in str(found)


def test_c4() -> None:
    lines = [f"This is sentence number {n} of the page." for n in range(6)]
    page = ["Home", *lines[:3], "We use cookies to improve this page.", "Enable JavaScript to see this page.",
            "No full stop at the end", "Two words.", *lines[3:], "A claim with a source [12]."]  # fmt: skip
    assert c4("\n".join(page)) == "\n".join([*lines, "A claim with a source ."])
    assert reason(c4, "\n".join(lines[:4])) == "c4: fewer than 5 sentences"
    assert reason(c4, "\n".join([*lines, "Some lorem ipsum text here."])) == "c4: lorem ipsum"
    assert reason(c4, "\n".join([*lines, "function f() { return here."])) == "c4: a curly bracket"


@pytest.mark.slow
def test_the_quality_rules_are_datatroves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On real and on broken texts, with words divided by white space and sentences counted as here."""
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.filters import c4_filters, gopher_quality_filter

    monkeypatch.setattr(gopher_quality_filter, "split_into_words", lambda text, language: text.split())
    monkeypatch.setattr(c4_filters, "split_into_sentences", lambda text, language: [""] * count_sentences(text))
    rng = random.Random(3)
    pieces = ["#", "...", "…", "- ", "• ", "\n", "12 ", ".\n", "{", " lorem ipsum ", "javascript", "cookie policy", '"']
    counts = {True: 0, False: 0}
    words = real_text().split(" ")
    for _ in range(600):
        at, size = rng.randrange(len(words) - 400), rng.choice((20, 60, 200, 400))
        part = words[at : at + size]
        for _ in range(rng.choice((0, 0, 1, 30, 60))):
            part.insert(rng.randrange(len(part)), rng.choice(pieces))
        text = " ".join(part)
        for own, theirs in ((gopher, gopher_quality_filter.GopherQualityFilter()), (c4, c4_filters.C4QualityFilter())):
            document = Document(text=text, id="0")
            result = theirs.filter(document)
            passes = result is True or (isinstance(result, tuple) and result[0])
            assert (reason(own, text) is None) == passes, text
            counts[passes] += 1
            if passes:
                assert own(text).strip() == document.text.strip()
    assert min(counts.values()) > 50


def test_personal_data() -> None:
    text = (
        "Write to jane.doe+x@mail.example.co.uk or call +49 (0)30 1234567; server 8.8.8.8, not 10.0.0.1 or version "
        "1.2.3.4.5. Card 4111 1111 1111 1111, order 4111 1111 1111 1112, account DE89 3704 0044 0532 0130 00, at 12:30."
    )
    assert mask(text) == (
        "Write to <EMAIL> or call <PHONE>; server <IP_ADDRESS>, not 10.0.0.1 or version 1.2.3.4.5. "
        "Card <CARD>, order 4111 1111 1111 1112, account <ACCOUNT>, at 12:30."
    )
    assert mask("@" * 100_000) == "@" * 100_000 and mask("1" * 100_000) == "1" * 100_000


@pytest.mark.slow
def test_contamination(here: Path) -> None:
    texts = stories(20)
    words = texts[7].split()
    write("eval.jsonl", [" ".join(w.upper() for w in words[20:33]) + "!", "too short"])  # 13 words
    found, summary = kept(write("d.jsonl", texts), decontaminate=("eval.jsonl",))
    assert sorted(found) == sorted(texts[:7] + texts[8:])
    write("eval.jsonl", [" ".join(words[20:32])])
    with pytest.raises(UserError, match="no evaluation text has 13 words"):
        kept("d.jsonl", decontaminate=("eval.jsonl",))


@pytest.mark.slow
def test_languages(here: Path) -> None:
    pytest.importorskip("py3langid")
    german = "Der schnelle braune Fuchs springt über den faulen Hund, und die Katze schläft in der Sonne."
    texts = [*stories(5), german]
    found, summary = kept(write("d.jsonl", texts), language=("en",))
    assert sorted(found) == sorted(texts[:5]) and list(summary["removed"]) == ["language: de"]


@pytest.mark.slow
def test_length_and_unicode(here: Path) -> None:
    found, summary = kept(write("d.jsonl", ["cafe\u0301 ok", "x", "y" * 50, "fine text"]), unicode="NFC", min_chars=5,
                          max_chars=20)  # fmt: skip
    assert sorted(found) == ["café ok", "fine text"]
    assert summary["changed"] == {"Unicode NFC": 1}
    assert [entry["documents"] for entry in summary["removed"].values()] == [1, 1]


@pytest.mark.parametrize("block", [hashing.BLOCK, 5])
def test_hashes_of_words(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are those of a regular expression, of each text by itself; their hashes are those of a plain loop."""
    monkeypatch.setattr(hashing, "BLOCK", block)
    texts = [
        real_text()[:5000],
        "Hello, World",
        "hello world!",
        "",
        "naïve café_2 — x",
        "日本語のテキスト",
        "...",
        "a" * 999,
    ]
    hashes, counts = hash_words(texts)
    words = [
        re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower()) for text in texts
    ]
    assert counts.tolist() == list(map(len, words))
    flat = sum(words, [])
    assert len(set(flat)) == len(set(hashes.tolist())) == len(set(zip(flat, hashes.tolist(), strict=True)))
    for word, found in zip(flat[-9:], hashes[-9:].tolist(), strict=True):
        value = sum(ord(char) * pow(hashing.STEP, at, 1 << 64) for at, char in enumerate(word, 1)) % (1 << 64)
        value = ((value ^ (value >> 32)) * int(hashing.MIX)) % (1 << 64)
        assert value ^ (value >> 29) == found
    runs, counts = runs_of_words(texts, 3)
    sets = [{tuple(some[at : at + 3]) for at in range(len(some) - 2)} for some in words]
    assert counts.tolist() == [max(0, len(some) - 2) for some in words]
    assert len(set(runs.tolist())) == len(set().union(*sets))
    alone = np.concatenate([runs_of_words([text], 3)[0] for text in texts])
    assert (alone == runs).all()


def test_sources_that_cannot_be_cleaned(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    Path("c.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(UserError, match="conversations are not cleaned: remove --dedup"):
        prepare(["c.jsonl"], dedup="exact")
    with pytest.raises(UserError, match="cleaning removed all 2 documents .length: fewer than 5"):
        kept(write("d.jsonl", ["x", "y"]), min_chars=5)
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match="needs the package rensa.*clean"):
        kept(write("d.jsonl", stories(3)), dedup="near")


def test_a_cleaner_counts_its_changes() -> None:
    cleaner = Cleaner(PrepareOptions(personal_data="mask", unicode="NFKC"))
    assert cleaner("ﬁne") == "fine" and cleaner("a@b.org") == "<EMAIL>" and cleaner("same") == "same"
    assert cleaner.changed == {"Unicode NFKC": 1, "personal data": 1}
