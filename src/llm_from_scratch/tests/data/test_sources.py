from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import resource
import stat
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_from_scratch.core.characters import TextScan
from llm_from_scratch.core.tokenizer import Tokenizer
from llm_from_scratch.data import archives, hashes, readers, sources, stores
from llm_from_scratch.data.options import PrepareOptions
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.data.selection import walk
from llm_from_scratch.errors import UserError
from llm_from_scratch.tests.data.samples import JSONL, PAGE, TEXTS, damaged, samples, tarred, zipped, zst
from llm_from_scratch.tests.texts import real_text

NEEDED = {".html": "resiliparse", ".epub": "resiliparse", ".pdf": "pypdf", ".parquet": "pyarrow", ".zst": "zstandard"}
NAMES = (
    *("a.txt", "a.md", "a.jsonl", "a.parquet", "a.html", "a.ipynb", "a.epub", "a.pdf"),
    *("a.txt.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.txt.zst", "a.zip", "a.tar", "a.tgz"),
)


pytestmark = pytest.mark.usefixtures("here")


def find(*arguments: str, **settings: Any) -> list[Any]:
    options = PrepareOptions(**settings)
    options.validate()
    return sources.find_sources(arguments, Path("."), Path("spool"), options)


def documents(*arguments: str, **settings: Any) -> list[str]:
    texts, text = [], ""
    for source in find(*arguments, **settings):
        for piece, ends in source.pieces():
            text += piece
            if ends:
                texts.append(text)
                text = ""
    assert text == ""  # every document ends
    return texts


def need(name: str) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("zstandard")
    pytest.importorskip(NEEDED.get(Path(name).suffix, "os"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_every_format_gives_its_documents(here: Path, name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    need(name)
    monkeypatch.setattr(readers, "PIECE", piece)
    content, expected = samples()[name]
    (here / name).write_bytes(content)
    assert documents(name) == expected
    (here / "folder").mkdir()
    (here / "folder" / name.upper()).write_bytes(content)
    assert documents("folder") == expected


def test_a_page_gives_its_main_text_and_no_script(here: Path) -> None:
    pytest.importorskip("resiliparse")
    (here / "a.html").write_bytes(PAGE.encode("cp1252").replace(b'"utf-8"', b'"windows-1252"'))
    (text,) = documents("a.html")
    assert "with an é" in text and not any(word in text for word in ("SCRIPT", "STYLE", "HOME", "<"))
    (here / "a.html").write_bytes(PAGE.encode("utf-16"))
    assert documents("a.html") == [text]
    (here / "a.html").write_bytes(PAGE.encode("latin-1"))  # it states UTF-8
    with pytest.raises(UserError, match="a.html is not UTF-8 text: byte offset"):
        documents("a.html")


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [
        ("<|endoftext|>", "one<|endoftext|>two\n<|endoftext|>", ["one", "two\n"]),
        (r"\n\n", "a\nb\r\n\r\nc\n\n\n\nd", ["a\nb", "c", "d"]),
        (r"\r\n\r\n", "a\nb\r\n\r\nc\n\n\n\nd", ["a\nb", "c", "d"]),
        ("é", "oneétwo", ["one", "two"]),
        ("ab", "aab" * 5 + "a" * 50 + "b" + "c" * 40, ["a"] * 5 + ["a" * 49, "c" * 40]),
    ],
)
@pytest.mark.parametrize("piece", [1 << 20, 13, 3])
def test_a_separator_divides_a_text(
    here: Path, separator: str, text: str, expected: list[str], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE", piece)
    (here / "a.txt").write_bytes(text.encode())
    if separator == "ab":
        expected = [part for part in text.split("ab") if part]
    assert documents("a.txt", separator=separator) == expected
    assert documents("a.txt", lines=True) == [line for line in text.replace("\r", "").split("\n") if line]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 15])
def test_a_text_cut_anywhere_is_the_same_text(here: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CUT", size)
    data = b"\xef\xbb\xbfone\r\ntwo\rthr\xc3\xa9e\n\r\n\xe6\x9d\xb1\0\xf0\x9f\x98\x80\r"
    (here / "a.txt").write_bytes(data)
    source = sources.FileSource(Path("a.txt"), cut_anywhere=True)
    pieces = list(source.pieces())
    assert "".join(text for text, _ in pieces) == "one\ntwo\nthrée\n\n東\0\U0001f600\n"
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True] and all(text for text, _ in pieces)
    for cut, at in ((len(data) - 2, len(data) - 5), (16, 15), (0, None)):  # within characters; empty
        (here / "a.txt").write_bytes(data[:cut])
        if at is None:
            assert list(source.pieces()) == []
        else:
            with pytest.raises(UserError, match=f"a.txt is not UTF-8 text: byte offset {at} "):
                list(source.pieces())


@pytest.mark.parametrize("alphabet", [False, True])
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_characters_are_counted_and_found_with_the_hash(
    here: Path, size: int, alphabet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "READ", size)
    monkeypatch.setattr(hashes, "IN_THREAD", 2)
    text, cases = b"\xef\xbb\xbfone\r\nthr\xc3\xa9e\r\n\n\xf0\x9f\x98\x80\r", {"a.txt": 13, "a.log": 13}
    cases |= {"a.txt.gz": 0, "a.jsonl": 0}
    for name, expected in cases.items():
        (here / name).write_bytes(text)
        source = sources.FileSource(Path(name))
        plain = {"path": name, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        assert source.identity(TextScan(alphabet)) == source.identity() == plain
        assert sum(scan.count for scan in source.scans) == expected
        if expected:
            read = "".join(t for t, _ in source.pieces())
            assert len(read) == expected
            assert source.scans[0].characters() == ("".join(sorted(set(read))) if alphabet else None)
    for changes in ({"encoding": "utf-16"}, {"lines": True}, {"separator": "x"}):
        (source := sources.FileSource(Path("a.txt"), **changes)).identity(TextScan(alphabet))
        assert source.scans == []


@pytest.mark.parametrize("broken", [b"\xff more", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xc3a\xa9"])
def test_invalid_text_has_no_scan_and_reading_reports_it(here: Path, broken: bytes) -> None:
    (here / "a.txt").write_bytes(b"one" + broken)
    source = sources.FileSource(Path("a.txt"))
    for alphabet in (True, False):
        assert source.identity(TextScan(alphabet))["bytes"] == 3 + len(broken) and source.scans == []
    for tokenizer in ("char", "byte"):
        with pytest.raises(UserError, match="a.txt is not UTF-8 text: byte offset 3 "):
            prepare(["a.txt"], tokenizer=tokenizer)


@pytest.mark.parametrize("text", ["\ufeffa\ufeff", "\ufeff", "\r", "\r\n", "a\r\r\nb", "é", "ab", "", "\ufeff\r\n"])
def test_a_scan_equals_what_python_reads(here: Path, text: str) -> None:
    data = text.encode()
    (here / "a.txt").write_bytes(data)
    expected = (here / "a.txt").read_text(encoding="utf-8-sig")
    for cuts in itertools.product(*[(False, True)] * min(len(data), 8)):
        scan, begin = TextScan(alphabet=True), 0
        for end in [at + 1 for at, cut in enumerate(cuts) if cut] + [len(data)]:
            scan.add(data[begin:end])
            begin = end
        scan.add(b"", last=True)
        assert (scan.count, scan.characters()) == (len(expected), "".join(sorted(set(expected))))


def test_encodings(here: Path) -> None:
    text = "naïve café\nЖ"
    for name in ("utf-16", "utf-8-sig", "utf-16-le", "koi8-r"):
        said = text if name != "koi8-r" else "Жы"
        (here / "a.txt").write_bytes(said.encode(name))
        assert documents("a.txt", encoding=name) == [said]
    (here / "a.txt").write_bytes("é\0\x1a\n".encode("cp1252"))
    assert documents("a.txt", encoding="cp1252") == ["é\0\x1a\n"]  # NUL and Ctrl-Z are characters
    with pytest.raises(UserError, match="a.txt is not UTF-8 text: byte offset 0 .*--encoding"):
        documents("a.txt")
    with pytest.raises(UserError, match="a.txt is not utf-16"):
        documents("a.txt", encoding="utf-16")
    (here / "a.txt").write_bytes(b"a \\ud800 \\ud83d\\ude00")
    assert documents("a.txt", encoding="unicode_escape") == ["a \ufffd \U0001f600"]
    for wrong in ("utf-99", "base64", "rot13", "undefined"):
        with pytest.raises(UserError, match="encoding="):
            PrepareOptions(encoding=wrong).validate()


def test_lone_surrogates_become_the_replacement_character(here: Path) -> None:
    (here / "a.jsonl").write_text('{"text": "a\\ud800b\\udc00\\ud83d\\ude00"}\n')
    assert documents("a.jsonl") == ["a\ufffdb\ufffd\U0001f600"]


def test_bad_files_are_skipped_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = "fine " * 30
    for name, data in {
        "a.txt": good.encode(),
        "b.txt": b"x" * 3_000_000 + b"\xff",  # its first pieces are read before the bad byte
        "c.jsonl": b'{"text": "one"}\n{"text": 1}\n{"text": "two"}\n',
        "d.txt.gz": gzip.compress(good.encode())[:-9],
        "e.tar": tarred({"f.txt": b"\xff", "g.txt": b"in"}),
    }.items():
        (here / name).write_bytes(data)
    files = ["a.txt", "b.txt", "c.jsonl", "d.txt.gz", "e.tar"]
    found = find(*files, bad_files="skip")
    for _ in range(2):
        texts = ["".join(piece for piece, _ in source.pieces()) for source in found]
        assert texts == [good, "", "onetwo", "", "in"]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1].rstrip(",") for line in said] == ["b.txt", "c.jsonl", "d.txt.gz", "e.tar:f.txt"]
    for name in files[1:]:
        with pytest.raises(UserError):
            documents(name)


@pytest.mark.slow
def test_a_damaged_file_with_many_documents_is_skipped_whole(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its beginning is not kept, and not joined to the next document. Of an archive, whole files are kept."""
    rng = random.Random(0)
    text = "".join(f"{rng.random()}\n" for _ in range(70_000))  # more than a piece
    rows = "".join(json.dumps({"text": line}) + "\n" for line in text.split("\n")[:20_000]).encode()
    members = {"one.txt": b"first\n", "two.jsonl": b'{"text": "second"}\n', "three.jsonl": rows, "four.txt": b"fourth"}
    for name, data in {
        "a.jsonl.gz": gzip.compress(rows)[:-60_000],
        "b.jsonl.gz": b"no gzip",
        "c.tar.gz": gzip.compress(tarred(members))[:-60_000],
        "d.zip": zipped({"five.jsonl": rows[:-3] + b"\xff", "six.txt": "sixth"}),
        "e.txt": b"last",
    }.items():
        (here / name).write_bytes(data)
    files = ["a.jsonl.gz", "b.jsonl.gz", "c.tar.gz", "d.zip", "e.txt"]
    for _ in range(2):
        expected = ["first\n", "second", *text.split("\n")[:19_999], "sixth", "last"]
        assert documents(*files, bad_files="skip") == expected
    (here / "f.txt").write_bytes(text.encode() + b"\xff\n")
    assert documents("f.txt", "e.txt", bad_files="skip", lines=True) == ["last"]
    assert documents("f.txt", "e.txt", bad_files="skip", separator="5\n") == ["last"]
    capsys.readouterr()
    prepare(["b.jsonl.gz", "e.txt"], bad_files="skip", tokenizer="char", val_files=("d.zip",), report=lambda line: None)
    said = capsys.readouterr().err.splitlines()
    assert ["skipped: b.jsonl.gz is damaged: Not a gzipped file (b'no')"] == [line for line in said if "b.json" in line]
    with pytest.raises(UserError, match="b.jsonl.gz is damaged"):
        prepare(["b.jsonl.gz"], tokenizer="char")


def test_files_of_the_same_name_in_an_archive_are_judged_one_by_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in (("x.txt", b"good"), ("x.txt", b"\xff"), ("y.txt", b"why"), ("w.txt", b"last")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (here / "a.tar").write_bytes(out.getvalue())
    with zipfile.ZipFile("b.zip", "w") as packed, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same name
        for content in (b"begins" * 500_000 + b"\xff", b"fine"):
            packed.writestr("x.txt", content)
    found = find("a.tar", "b.zip", bad_files="skip")
    for _ in range(2):
        texts = [[piece for piece, _ in source.pieces()] for source in found]
        assert texts == [["good", "why", "last"], ["fine"]]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1] for line in said] == ["a.tar:x.txt", "b.zip:x.txt"]
    assert [source.damage.members for source in found] == [{1}, {0}]


class Lost(io.BytesIO):
    """A connection that ends at a position."""

    error: Exception
    end = 0

    def readinto(self, buffer: Any) -> int:
        if self.tell() >= self.end and self.end <= len(self.getvalue()):
            raise self.error
        return super().readinto(memoryview(buffer)[: self.end - self.tell()])

    readinto1 = readinto


LOST = (TimeoutError(), ConnectionError("reset"), ValueError("HTTP 503"), EOFError(), OSError(5, "EIO"))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.xz", "a.zip", "a.tgz", "a.tar", "a.parquet", "a.pdf"])
def test_a_network_error_is_not_reported_as_damage(here: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (module for suffix, module in NEEDED.items() if name.endswith(suffix)):
        pytest.importorskip(module)
    data, texts = samples()[name]
    monkeypatch.setattr(stores, "open_store", lambda url: (SimpleNamespace(open=lambda *_: Lost(data)), url))
    (source,) = find(f"http://host/{name}", bad_files="skip")
    for Lost.error in LOST:
        for Lost.end in (0, 1, len(data) // 2):
            with pytest.raises(UserError, match="reading http://host/a.* failed .*: run the same command again"):
                list(source.pieces())
    Lost.end = len(data) + 1
    assert "".join(piece for piece, _ in source.pieces()) == "".join(texts)


def test_other_errors_are_not_skipped(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.zip").write_bytes(zipped({"a.txt": "text"}))
    (source,) = find("a.zip", bad_files="skip")
    failing = Lost((here / "a.zip").read_bytes())
    Lost.error, Lost.end = OSError(5, "Input/output error"), 0
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot read a.zip: Input/output error"):
        patch.setattr(Path, "open", lambda *_, **__: failing)
        list(source.pieces())
    assert list(source.pieces()) == [("text", True)]
    (here / "a.pdf").write_bytes(b"%PDF")
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(UserError, match="a.pdf: reading PDF needs the package pypdf"):
        documents("a.pdf", bad_files="skip")


# folders


def test_include_reads_a_source_tree_as_git_sees_it(here: Path) -> None:
    """Against git itself."""
    pytest.importorskip("pathspec")
    files = {
        ".gitignore": "*.log\nbuild/\n/top.py\n!keep.log\n", "a.py": "", "top.py": "", "x.log": "", "keep.log": "",
        "build/b.py": "", "src/build/c.py": "", "src/top.py": "", "src/.gitignore": "gen_*\n!*.log\n", "é.py": "",
        "src/deep/gen_b.py": "", "src/deep/d.py": "", "src/e.log": "", "src/f g.py": "", "src/.hidden.py": "",
        "src/gen_a.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (here / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "tree" / name).write_text(text or f"content of {name}", encoding="utf-8")
    git = ["git", "-c", "core.quotepath=off", "-C", "tree"]
    subprocess.run([*git, "init", "-q"], check=True)
    listed = subprocess.run([*git, "ls-files", "-z", "-o", "--exclude-standard"], capture_output=True, check=True)
    expected = sorted(name for name in listed.stdout.decode().split("\0") if name and "/." not in f"/{name}")
    assert [p.relative_to(here / "tree").as_posix() for p in walk(here / "tree", rules=True)] == expected
    got = [source.name for source in find("tree", include=("*.py",), exclude=("deep/",))]
    assert got == [f"tree/{name}" for name in expected if name.endswith(".py") and "deep" not in name]
    (here / "tree/raw.py").write_bytes(b"\0\1")
    assert len(find("tree", include=("*.py",))) == len([name for name in expected if name.endswith(".py")])


def test_include_and_exclude_select_among_the_files_of_a_glob(here: Path) -> None:
    pytest.importorskip("pathspec")
    names = ("src/a.py", "src/a.txt", "src/tests/b.py", "src/deep/tests/c.py", "src/.hidden/d.py")
    for name in names:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)

    def named(*arguments: str, **settings: Any) -> list[str]:
        return [source.name for source in find(*arguments, **settings)]

    assert named("src/**/*.py", exclude=("tests/",)) == ["src/a.py"]
    assert named("src/**/*.py", exclude=("/tests/",)) == ["src/a.py", "src/deep/tests/c.py"]
    assert named("src/**/*", include=("*.txt",)) == ["src/a.txt"]
    assert named(str(here / "src/*"), include=("*.py",), exclude=("/deep/", "b.py")) == [str(here / "src/a.py")]
    assert named("src/.hidden/*.py", exclude=("b.py",)) == ["src/.hidden/d.py"]
    with pytest.raises(UserError, match="no file matches the glob, --include and --exclude"):
        named("src/*.py", exclude=("*.py",))


def test_include_and_exclude_select_among_the_files_of_a_remote_glob(here: Path) -> None:
    pytest.importorskip("pathspec")
    store = pytest.importorskip("fsspec").filesystem("memory")
    store.store.clear()
    for name in ("g/a.txt", "g/tests/b.txt", "g/c.md"):
        store.pipe(f"/{name}", name.encode())
    assert documents("memory://g/**", exclude=("/tests/",)) == ["g/a.txt", "g/c.md"]
    assert documents("memory://g/**", include=("*.md",)) == ["g/c.md"]
    store.store.clear()


def test_a_folder_reads_nothing_outside_it(here: Path) -> None:
    (here / "secret.txt").write_text("secret")
    folder = here / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "in.txt").write_text("in")
    for name, target in {"loop": "..", "a/loop": "../..", "a/up": "../a", "out.txt": "../secret.txt",
                         "same.txt": "in.txt", "gone.txt": "nothing",
                         "one.txt": "two.txt", "two.txt": "one.txt"}.items():  # fmt: skip
        (folder / name).symlink_to(target)
    lines: list[str] = []
    found = sources.find_files(["folder"], Path("."), Path("."), lines.append)
    assert [path.as_posix() for path in found] == ["folder/in.txt"]
    assert lines == ["folder: ignored 1 links to files outside the folder; a glob reads them"]
    assert [path.as_posix() for path in sources.find_files(["folder/**/*[tn].txt"], Path("."), Path("."))] == [
        "folder/in.txt",
        "folder/out.txt",
    ]


def test_files_without_text_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, the first ten; an empty file has no text to lose."""
    blank = b'{"cells": []}'
    files = {"a.txt": b"text", "empty.txt": b"", "null.jsonl": b'{"text": null}\n', "b.ipynb": blank}
    for name, content in (files | {"c.zip": zipped({"csv/a.csv": b"1", "d.ipynb": blank})}).items():
        (here / name).write_bytes(content)
    found = find(".")
    for _ in range(2):
        assert [text for source in found for text, _ in source.pieces()] == ["text"]
    names = ("b.ipynb", "c.zip:d.ipynb", "null.jsonl")
    assert capsys.readouterr().err.splitlines() == [f"note: no text in {name}" for name in names]
    for number in range(12):
        (here / f"m{number:02}.ipynb").write_bytes(blank)
    many = find("m*.ipynb")
    for _ in range(2):
        assert not [piece for source in many for piece in source.pieces()]
    lines = capsys.readouterr().err.splitlines()
    assert lines[9:] == ["note: no text in m09.ipynb", "note: no text in more files"]


def test_options_without_effect_are_refused(here: Path) -> None:
    (here / "a.txt").write_text("some text " * 9)
    for settings, message in (
        ({"include": ("*.py",)}, "--include selects files in folders"),
        ({"lines": True, "separator": "x"}, "remove one of them"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(["a.txt"], **settings)
    (here / "b.jsonl").write_text(json.dumps({"text": "two\nlines"}) + "\n")
    (here / "b.zip").write_bytes(zipped({"c.txt": "one\ntwo", "b.jsonl": '{"text": "x"}'}))
    for files, name in ((["b.jsonl"], "b.jsonl"), (["a.txt", "b.jsonl"], "b.jsonl"), (["b.zip"], "b.zip:b.jsonl")):
        with pytest.raises(UserError, match=f"^{name} is not a text file, so --lines cannot divide it"):
            prepare(files, lines=True, tokenizer="byte", report=lambda line: None)
    with pytest.raises(UserError, match="rows is not a text file, so --lines cannot divide it"):
        readers.check_lines(sources.HubSource("rows", "text", None, []))
    assert documents("b.zip", lines=True, bad_files="skip") == ["one", "two"]
    (here / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(UserError, match="holds conversations: remove --separator"):
        prepare(["c.jsonl"], separator="x")
    with pytest.raises(UserError, match="does not support --separator"):
        prepare(["python_docs"], separator="x")


def test_a_changed_setting_prepares_again(here: Path) -> None:
    (here / "a.txt").write_text("one two, three four, five six, " * 20)
    said: list[str] = []
    prepare(["a.txt"], tokenizer="char", report=said.append)
    prepare(["a.txt"], tokenizer="char", separator=",", report=said.append)
    assert not any("up to date" in line for line in said)
    folder = prepare(["a.txt"], tokenizer="char", separator=",", report=said.append)
    assert any("up to date" in line for line in said)
    train = Tokenizer.load(folder).decode(memoryview((folder / "train.bin").read_bytes()).cast("H").tolist())
    assert set(train.splitlines()) <= {"one two", " three four", " five six", " one two", " "}


# hostile archives


@pytest.mark.parametrize("name", ["../a.txt", "/etc/a.txt", "x/../../a.txt", "C:\\a.txt", "..\\a.txt"])
def test_a_path_outside_the_archive_is_refused(here: Path, name: str) -> None:
    (here / "a.zip").write_bytes(zipped({name: "x"}))
    (here / "a.tar").write_bytes(tarred({name: b"x"}))
    for archive in ("a.zip", "a.tar"):
        with pytest.raises(UserError, match=f"{archive} contains .* a path outside the archive"):
            documents(archive)
    assert sorted(os.listdir(here)) == ["a.tar", "a.zip"]


def test_links_devices_and_archives_in_archives_are_ignored(here: Path) -> None:
    (here / "secret.txt").write_text("secret")
    with tarfile.open("a.tar", "w") as archive:
        for name, kind in (("b.txt", tarfile.SYMTYPE), ("c.txt", tarfile.LNKTYPE), ("d.txt", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "secret.txt"
            archive.addfile(info)
        for name, data in (("e.zip", zipped({"f.txt": "nested"})), ("g.txt", b"fine")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert documents("a.tar") == ["fine"]
    with zipfile.ZipFile("a.zip", "w") as archive_:
        link = zipfile.ZipInfo("b.txt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive_.writestr(link, "secret.txt")
        archive_.writestr("c.txt", "fine")
    assert documents("a.zip") == ["fine"]


def test_bombs_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE", 1 << 20)
    zeros = bytes(1 << 22)
    bombs = {"a.txt.gz": gzip.compress(zeros), "a.txt.xz": lzma.compress(zeros), "a.zip": zipped({"b.txt": zeros})}
    bombs["b.zip"] = zipped({f"{number}.txt": bytes(1 << 19) for number in range(8)})  # each is small
    for name, data in bombs.items():
        (here / name).write_bytes(data)
        with pytest.raises(UserError, match="like a decompression bomb"):
            documents(name)
    (here / "log.txt.gz").write_bytes(gzip.compress(b"GET /index.html 200 %07d\n" * 100_000))  # repetitive, not a bomb
    with pytest.raises(UserError):
        documents("log.txt.gz")
    lines = b"".join(b"GET /index.html 200 %07d\n" % number for number in range(100_000))
    (here / "log.txt.gz").write_bytes(gzip.compress(lines))
    assert "".join(documents("log.txt.gz")).encode() == lines


def test_damage_is_named(here: Path) -> None:
    for name in ("a.txt.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.zip", "a.tar"):
        content, _ = samples()[name]
        (here / name).write_bytes(content[: min(len(content) // 2, 1200)])
        with pytest.raises(UserError, match="is damaged|not JSON"):
            documents(name)
    content, _ = samples()["a.tar"]
    for damage in (content[:1100], content[:1024], content + b"more"):  # between two files
        (here / "a.tar").write_bytes(damage)
        with pytest.raises(UserError, match="a.tar is damaged: it ends too early, or has other data"):
            documents("a.tar")
    (here / "a.zip").write_bytes(b"PK\3\4 is not a zip")
    with pytest.raises(UserError, match="a.zip is damaged"):
        documents("a.zip")
    (here / "a.epub").write_bytes(zipped({"META-INF/container.xml": "<container/>"}))  # names no package
    with pytest.raises(UserError, match="a.epub is damaged: its container does not name a package"):
        documents("a.epub")
    (here / "a.ipynb").write_text('{"cells": 5}')
    with pytest.raises(UserError, match="a.ipynb is not a notebook"):
        documents("a.ipynb")


def test_a_cut_zstd_file_is_damaged(here: Path) -> None:
    """Several frames, with one to skip between them, as pzstd writes."""
    pytest.importorskip("zstandard")
    text, skipped = real_text()[:300_000].encode(), b"\x50\x2a\x4d\x18\5\0\0\0-----"
    content = b"".join(zst(text[at : at + 100_000]) + skipped for at in range(0, len(text), 100_000))
    (here / "a.txt.zst").write_bytes(content)
    assert "".join(documents("a.txt.zst")).encode() == text
    for size in (len(content) // 2, len(content) - len(skipped) - 1, len(content) - 1, 3):
        (here / "a.txt.zst").write_bytes(content[:size])
        with pytest.raises(UserError, match="a.txt.zst is damaged: it ends too early"):
            documents("a.txt.zst")
    (here / "a.txt.zst").write_bytes(content + b"more")
    with pytest.raises(UserError, match="a.txt.zst is damaged"):
        documents("a.txt.zst")


@pytest.mark.parametrize("package, name", [("resiliparse", "a.html"), ("pypdf", "a.pdf"), ("zstandard", "a.txt.zst")])
def test_a_missing_package_is_named(here: Path, package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (package, "resiliparse.extract.html2text"):
        monkeypatch.setitem(sys.modules, module, None)
    (here / name).write_bytes(b"<p>text</p>")
    with pytest.raises(UserError, match=rf"needs the package {package}.*documents"):
        documents(name)


# remote


def test_an_object_store(here: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.store.clear()
    for name, data in {"b/one.txt": b"one", "b/deep/two.jsonl.gz": gzip.compress(JSONL), "b/three.bin": b"\0",
                       "b/.four.txt": b"four"}.items():  # fmt: skip
        store.pipe(f"/{name}", data)
    (here / "a.txt").write_text("here")
    assert documents("memory://b", "a.txt") == [*TEXTS, "one", "here"]
    assert documents("memory://b/*.txt") == ["one"]
    assert documents("memory://b/one.txt") == ["one"]
    (source,) = find("memory://b/one.txt")
    before = source.identity()
    store.pipe("/b/one.txt", b"two")
    assert source.identity() != before and before["bytes"] == 3
    for url, message in (("memory://b/none.txt", "not found"), ("nostore://b", "cannot read nostore://b")):
        with pytest.raises(UserError, match=message):
            documents(url)
    store.store.clear()


def test_urls_that_differ_in_their_query_are_different_files(monkeypatch: pytest.MonkeyPatch) -> None:
    url, info = "http://host/get.txt?id=", {"size": 3, "ETag": "x"}
    monkeypatch.setattr(stores, "open_store", lambda url: (SimpleNamespace(info=lambda path: info), url))
    first, second = find(f"{url}1", f"{url}2", f"{url}1")
    assert first.identity() != second.identity() and first.identity() == first.identity()
    assert first.name == "http://host/get.txt" and "id=1" not in json.dumps(first.identity())


def test_a_file_without_a_version_is_compared_by_its_content(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info: dict[str, Any] = {"size": 3, "ETag": None}
    content, downloads = [b"one"], []

    def download(path: str, mode: str) -> io.BytesIO:
        downloads.append(path)
        return io.BytesIO(content[0])

    store = SimpleNamespace(info=lambda path: info, open=download)
    monkeypatch.setattr(stores, "open_store", lambda url: (store, url))
    (source,) = find("http://host/a.txt")
    before = source.identity()
    assert source.identity() == before and before["sha256"] == hashlib.sha256(b"one").hexdigest()
    content[0] = b"two"
    assert source.identity() != before
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "http://host/a.txt does not have a version" in said[0]
    info["Last-Modified"] = "Sun, 29 Nov 2026 18:00:00 GMT"
    count = len(downloads)
    assert source.identity() == source.identity() and len(downloads) == count
    info["Last-Modified"] = None
    monkeypatch.setattr(stores, "open_url", lambda url: Broken())
    with pytest.raises(UserError, match="reading http://host/a.txt failed .* run the same command again"):
        source.identity()


class Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise ValueError("the connection ended")


def test_a_web_server(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    (here / "web").mkdir()
    (here / "web/a.txt").write_text("from the web")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *rest: Any) -> None:
            super().__init__(*rest, directory=str(here / "web"))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://user:secret@127.0.0.1:{server.server_port}/a.txt?signature=secret"
        (source,) = find(url)
        assert "".join(piece for piece, _ in source.pieces()) == "from the web"
        assert "secret" not in source.name and "secret" not in json.dumps(source.identity())
        with pytest.raises(UserError, match="none.txt"):
            documents(f"http://127.0.0.1:{server.server_port}/none.txt")
        server.shutdown()


# damaged files


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """4 GiB more than now: a reader that asks for more gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as on Linux")
def test_a_damaged_file_is_text_or_a_named_error(here: Path, name: str, bounded_memory: None) -> None:
    need(name)
    content, _ = samples()[name]
    rng = random.Random(name)
    for _ in range(50):
        (here / name).write_bytes(damaged(content, rng))
        try:
            assert all(isinstance(text, str) for text in documents(name))
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
    assert os.listdir(here) == [name]
