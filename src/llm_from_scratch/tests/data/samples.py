"""A small file of every format with its documents, written by hand or by Python's own libraries; and damaged copies."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

TEXTS = ["The first text, with an é.", "A second one:\ntwo lines."]
JSONL = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
ONE = TEXTS[1]
PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>T</title><script>var evil = "SCRIPT";</script>
<style>p { color: STYLE }</style></head><body><nav><a href="/">HOME</a> <a href="/a">ABOUT</a></nav>
<main><article><h1>A heading</h1><p>A first paragraph, long enough to be the main text of this page, with an é.</p>
<p>A second paragraph that is also long enough to be part of the main text of this page.</p></article></main>
<script>document.write("SCRIPT")</script></body></html>"""
NOTEBOOK: dict[str, Any] = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {},
    "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "Some words."]},
        {
            "cell_type": "code",
            "metadata": {},
            "execution_count": 1,
            "source": "print(1)",
            "outputs": [{"output_type": "stream", "name": "stdout", "text": ["OUTPUT"]}],
        },
    ],
}
CONTAINER = """<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
PACKAGE = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0"><manifest>
<item id="b" href="two.xhtml" media-type="application/xhtml+xml"/>
<item id="a" href="one%20.xhtml" media-type="application/xhtml+xml"/></manifest>
<spine><itemref idref="a"/><itemref idref="b"/></spine></package>"""


def chapter(text: str) -> str:
    head = (
        '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title>t</title></head>'
    )
    return f"{head}<body><p>{text}</p></body></html>"


def zipped(files: Mapping[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pdf(lines: list[str]) -> bytes:
    """A page with lines of Helvetica, with a table of offsets."""
    shown = " ".join(f"({line}) Tj 0 -20 Td" for line in lines)
    stream = f"BT /F1 12 Tf 72 720 Td {shown} ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    return data + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)


def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": TEXTS}), out)
    return out.getvalue()


def zst(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def epub() -> bytes:
    files = {"META-INF/container.xml": CONTAINER, "OEBPS/book.opf": PACKAGE}
    return zipped(files | {"OEBPS/two.xhtml": chapter("Second chapter."), "OEBPS/one .xhtml": chapter("First é.")})


def samples() -> dict[str, tuple[bytes, list[str]]]:
    """{file name: (content, documents)}"""
    one, members = ONE.encode(), {"a.txt": TEXTS[0].encode(), "b/c.jsonl": JSONL, "d.bin": b"\0\1", ".e.txt": b"hidden"}
    main = [
        "A heading\n\nA first paragraph, long enough to be the main text of this page, with an é.\n\n"
        "A second paragraph that is also long enough to be part of the main text of this page."
    ]
    return {
        "a.txt": (one, [ONE]),
        "a.md": (one.replace(b"\n", b"\r\n"), [ONE]),
        "a.jsonl": (JSONL, TEXTS),
        "a.parquet": (parquet(), TEXTS),
        "a.html": (PAGE.encode(), main),
        "a.ipynb": (json.dumps(NOTEBOOK).encode(), ["# Title\nSome words.\n\nprint(1)"]),
        "a.epub": (epub(), ["First é.\n\nSecond chapter."]),
        "a.pdf": (pdf(["One line.", "Another line."]), ["One line.\nAnother line."]),
        "a.txt.gz": (gzip.compress(one, mtime=0), [ONE]),
        "a.jsonl.bz2": (bz2.compress(JSONL), TEXTS),
        "a.jsonl.xz": (lzma.compress(JSONL), TEXTS),
        "a.txt.zst": (zst(one), [ONE]),
        "a.zip": (zipped(members), [TEXTS[0], *TEXTS]),
        "a.tar": (tarred(members), [TEXTS[0], *TEXTS]),
        "a.tgz": (gzip.compress(tarred(members), mtime=0), [TEXTS[0], *TEXTS]),
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A copy with a few bytes changed, or cut, or with a part repeated, moved or replaced by noise."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, size = rng.randrange(len(result) + 1), rng.choice((1, 2, 4, 16, 64))
        noise = rng.choice((rng.randbytes(size), b"\0" * size, b"\xff" * size, bytes(data[:size])))
        kind = rng.randrange(5)
        if kind == 0:
            result[at : at + size] = noise
        elif kind == 1:
            result[at:at] = noise
        elif kind == 2:
            del result[at : at + size]
        elif kind == 3:
            del result[at:]
        elif at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        if not result:
            break
    return bytes(result)
