"""Files that are made to harm their reader."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.data import archives
from llm_from_scratch.data.sources import FileSource
from llm_from_scratch.errors import UserError

pytestmark = pytest.mark.usefixtures("here")

TABLE = (  # a column "text" with one "a"
    "UEFSMRUAFRYVFiwVAhUAFQYVBhw2ACgBYRgBYRERAAAAAgAAAAIBAQAAAGEVBBksNQAYBnNjaGVtYRUCABUMJQIYBHRleHQlAEwcAAAAFgIZHBkcJgAc"
    "FQwZJQYAGRgEdGV4dBUAFgIWUBZQJgg8NgAoAWEYAWEREQAZHBUAFQAVAgA8FgIZBhkmAAIAAAAWUBYCJggWUAAoIHBhcnF1ZXQtY3BwLWFycm93IHZl"
    "cnNpb24gMjYuMC4xGRwcAAAAlAAAAFBBUjE="
)


def documents(name: str, **settings: Any) -> list[str]:
    return "".join(text + "\0" * ends for text, ends in FileSource(Path(name), **settings).pieces()).split("\0")[:-1]


def test_a_page_cannot_choose_an_encoding_that_is_not_of_pages(here: Path) -> None:
    pytest.importorskip("resiliparse")
    for name in ("unicode_escape", "utf-7", "rot13", "punycode", "nosuch"):
        (here / "a.html").write_text(f"<meta charset='{name}'><p>some text \\ud800 and more text")
        with pytest.raises(UserError, match=f"a.html is not {name} text: "):
            documents("a.html")


@pytest.mark.cases(2)
@pytest.mark.parametrize("tag", ["<div>", "<span>", "<p><font size={}>", "<b><div>", "<div></span>"])
def test_a_page_that_is_nested_without_end_is_refused(here: Path, tag: str) -> None:
    pytest.importorskip("resiliparse")
    (here / "a.html").write_text("<body>" + "".join(tag.format(number) for number in range(20_000)) + "text")
    with pytest.raises(UserError, match="a.html nests more than 1,024 elements: convert it to text"):
        documents("a.html")
    (here / "a.html").write_text(f"<body>{tag * 100}a text")
    assert len(documents("a.html")) == 1
    (here / "a.html").write_text("<body>" + "<div><b>a text</b></div>" * 2000 + "<div>" * 400 + "a text")
    assert documents("a.html")[0].count("a text") == 2001


def test_a_table_that_grows_without_end_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(archives, "FREE", 1 << 16)
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4000, pyarrow.int32()), pyarrow.array(["x" * 5000]))
    long = pyarrow.array(["x" * 4_000_000])
    for column, settings in ((same, {}), (long, {"use_dictionary": False})):
        parquet.write_table(pyarrow.table({"text": column}), "a.parquet", compression="zstd", **settings)
        with pytest.raises(UserError, match="a.parquet expands to more than 200 times its size"):
            documents("a.parquet")
    parquet.write_table(pyarrow.table({"text": same.cast("string")[:12]}), "a.parquet")
    assert documents("a.parquet") == ["x" * 5000] * 12


def test_damaged_statistics_of_a_table_do_not_end_the_process(here: Path) -> None:
    """A bit is flipped in a number of levels: pyarrow's metadata of a column then aborts."""
    pytest.importorskip("pyarrow")
    content = bytearray(base64.b64decode(TABLE))
    content[135] ^= 1 << 5
    (here / "a.parquet").write_bytes(content)
    command = [sys.executable, "-m", "llm_from_scratch.cli.prepare_data", "a.parquet", "--tokenizer=byte"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "a.parquet" in done.stderr
