"""Readers of file formats. A reader yields the documents of a file, or the pieces (text, ends) of its only document.
A new format is an entry in READERS; the file is source.open(), already decompressed."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import io
import json
import logging
import posixpath
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any
from xml.etree import ElementTree

from ..core.cuts import cut_text, without_surrogates
from ..core.tokenizer import safe_cut
from ..errors import UserError, one_line
from ..machine.extras import missing
from ..machine.files import parse_json
from .archives import COMPRESSIONS, SHORT, Bound, Zip, damage, tar_members, zip_members

PIECE = 1 << 20  # maximum characters per piece
CUT = 1 << 15  # bytes per piece if it may be cut anywhere: most are then ASCII, which is encoded faster
WHOLE = 64 << 20  # bytes of a file that must be in memory
ROWS = 8  # of a table that are decoded at once
DEPTH = 1024  # of the elements of a page; a browser's limit is 512
NOT_OF_PAGES = ("idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape", "utf-7")
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE)
REPEATED = r"(?:b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)[\s>]"  # elements that a new paragraph repeats
OPENED, CLOSED = (re.compile(begin + REPEATED, re.IGNORECASE) for begin in ("<", "</"))

FileSource = Any  # of sources.py, which imports this module
Pieces = Iterator[tuple[str, bool]]
Documents = Iterator[str | tuple[str, bool]]  # a text, or a piece of one


@dataclass(frozen=True)
class Reader:
    """read() yields documents, or pieces (text, ends) of them. many: there may be more than one in a file."""

    read: Callable[[FileSource], Documents | Iterator[str] | Pieces]
    many: bool = True
    is_text: bool = False  # --lines and --separator apply


def read_plain_text(source: FileSource) -> Pieces:
    """Pieces of one document. As in Python: every line break as "\\n". A byte order mark is dropped."""
    valid: Callable[[str], str] = str if source.encoding == "utf-8" else without_surrogates  # UTF-8 has none
    text = ""
    for block in map(valid, _decoded(source)):
        if source.cut_anywhere:
            complete, text = [text] if text else [], block
        else:
            *complete, text = cut_text(text + block, PIECE)
        for part in complete:
            yield part, False
    if text:
        yield text, True


def _decoded(source: FileSource) -> Iterator[str]:
    """The text of a file in blocks, none of them empty."""
    with source.open() as raw:
        blocks = iter(lambda: raw.read(PIECE), b"")
        yield from decode(parts(blocks) if source.cut_anywhere else blocks, source)


def decode(blocks: Iterable[bytes], source: FileSource) -> Iterator[str]:
    """A text in blocks, none of them empty. Raises UserError."""
    encoding = "utf-8-sig" if source.encoding == "utf-8" and not source.keep_bom else source.encoding
    decoder, at = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True), 0
    is_between = False  # whether the decoder holds no part of a character or line break
    try:
        for part in blocks:
            at += len(part)
            if is_between and part.isascii() and b"\r" not in part:
                text = part.decode("ascii")  # several times as fast
            else:
                text = decoder.decode(part)
                rest, flags = decoder.getstate()
                is_between = source.encoding == "utf-8" and not rest and not flags & 1  # 1: after "\r"
            if text:
                yield text
        if text := decoder.decode(b"", final=True):
            yield text
    except UnicodeDecodeError as error:
        raise _not_text(source, at - len(error.object) + error.start, error) from None
    except UnicodeError as error:  # UTF-16 without a byte order mark
        raise UserError(f"{source.name} is not {source.encoding} text: {error}") from None


def parts(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Short parts around characters that are not ASCII. All are so short that no new memory is needed for them."""
    for data in blocks:
        for begin in range(0, len(data), 4 * CUT):
            part = data[begin : begin + 4 * CUT]
            yield from (part,) if part.isascii() else (part[at : at + CUT] for at in range(0, len(part), CUT))


def read_lines(source: FileSource) -> Documents:
    """One document per line that is not empty, without its line break."""
    return read_separated(source, "\n")


def read_separated(source: FileSource, separator: str = "") -> Documents:
    """The documents between separators that are not empty. A long one comes in pieces."""
    separator, rest, has_begun = separator or source.separator, "", False
    for text, _ in read_plain_text(source):
        *complete, rest = (rest + text).split(separator)
        for part in complete:
            if has_begun:
                yield part, True
            elif part:
                yield part
            has_begun = False
        while len(rest) > PIECE + len(separator):  # the end may be half of a separator
            cut = safe_cut(rest, PIECE)
            yield rest[:cut], False
            rest, has_begun = rest[cut:], True
    if rest or has_begun:
        yield rest, True


def read_json_lines(source: FileSource) -> Iterator[str]:
    """One document per line."""
    offset, key = 0, source.text_key
    with source.open() as file:
        for number, line in enumerate(iter(lambda: file.readline(WHOLE + 1), b""), 1):
            where = f"{source.name}, line {number}"
            if len(line) > WHOLE:
                raise UserError(f"{where} is longer than {WHOLE >> 20} MiB: expected one document per line")
            try:
                yield from _text_in(line, where, key)
            except UnicodeDecodeError as error:
                source.refuse(_not_text(source, offset + error.start, error))
            except UserError as error:
                source.refuse(error)
            offset += len(line)


def _text_in(line: bytes, where: str, key: str) -> list[str]:
    """The text of a line; none if it is blank or null. Raises UserError, UnicodeDecodeError."""
    if not (text := line.decode("utf-8").lstrip("\ufeff").strip()):
        return []
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): expected one object per line") from None
    if isinstance(row, dict) and row.get(key, "") is None:
        return []
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        has = f"its fields are {', '.join(map(repr, row))[:300]}" if isinstance(row, dict) else "not an object"
        raise UserError(f"{where} does not have the text field {key!r} ({has}): see llm-prepare --text_key")
    return [row[key]]


def read_parquet(source: FileSource) -> Iterator[str]:
    """One document per row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        instead = "convert the text to .txt, .md or .jsonl"
        raise missing("pyarrow", "data", f"{source.name}: reading .parquet", instead) from None
    key = source.text_key
    try:
        with source.open() as raw, contextlib.ExitStack() as stack:
            file = raw if raw.seekable() else io.BytesIO(_limited(raw, source.name))
            size = file.seek(0, io.SEEK_END)
            table = stack.enter_context(parquet.ParquetFile(file))
            if key not in table.schema_arrow.names:
                names = ", ".join(map(repr, table.schema_arrow.names))
                has = f"does not have a column {key!r} (it has {names})"
                raise UserError(f"{source.name} {has}: see llm-prepare --text_key")
            kind = table.schema_arrow.field(key).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{source.name}: column {key!r} contains {kind}, not text: see llm-prepare --text_key")
            yield from _rows(table, key, source.name, size)
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read {source.name} as parquet: {one_line(error)}") from None


def _rows(table: Any, key: str, name: str, size: int) -> Iterator[str]:
    """The texts of a column. A dictionary or compression makes a small file large: few rows are decoded at once."""
    groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
    stated, decoded = Bound(name, lambda: size), Bound(name, lambda: size)
    total = sum(group.total_byte_size for group in groups)
    if stated.exceeds(total):  # perhaps of other columns; group.column() ends the process if it is damaged
        columns = (group.column(number) for group in groups for number in range(group.num_columns))
        total = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == key)
    stated.count(total)
    for batch in table.iter_batches(batch_size=ROWS, columns=[key]):
        for value in batch.column(0):
            text = value.as_py()
            decoded.count(len(text or ""))
            if text:
                yield text


def read_html(source: FileSource) -> Pieces:
    """The main text of a page, without navigation and scripts."""
    data = whole(source)
    page = _decode_page(data, source)
    return split_document(_page_text(page, source, main=True) or _page_text(page, source, main=False))


def _decode_page(data: bytes, source: FileSource) -> str:
    """By the byte order mark, --encoding, the page's own statement, else UTF-8."""
    encoding = source.encoding
    if data.startswith(WIDE):
        encoding = "utf-16"
    elif encoding == "utf-8" and (stated := CHARSET.search(data[:2048])):
        name = stated[1].decode("ascii", "replace")
        encoding = name if not name.lower().startswith("utf-16") else encoding  # it could not be read as ASCII
    try:
        if codecs.lookup(encoding).name in NOT_OF_PAGES:
            raise LookupError("not an encoding of web pages")
        return without_surrogates(data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding))
    except UnicodeDecodeError as error:
        raise _not_text(source, error.start, error, encoding) from None
    except (LookupError, ValueError) as error:
        raise UserError(f"{source.name} is not {encoding[:40]} text: {one_line(error)}") from None


def _page_text(page: str, source: FileSource, main: bool) -> str:
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree
    except ImportError:
        raise missing("resiliparse", "documents", f"{source.name}: reading HTML", "convert it to text") from None
    if len(OPENED.findall(page)) - len(CLOSED.findall(page)) > DEPTH or _is_deep(tree := HTMLTree.parse(page)):
        raise UserError(f"{source.name} nests more than {DEPTH:,} elements: convert it to text")
    return extract_plain_text(tree, main_content=main, alt_texts=False, noscript=False).strip()


def _is_deep(tree: Any) -> bool:
    """Whether more than DEPTH elements are nested: the extraction needs the square of the depth."""
    node, depth = tree.document, 0
    while node is not None and depth <= DEPTH:
        if (child := node.first_child) is not None:
            node, depth = child, depth + 1
            continue
        while node is not None and node.next is None:
            node, depth = node.parent, depth - 1
        node = node.next if node is not None else None
    return depth > DEPTH


def read_notebook(source: FileSource) -> Pieces:
    """The cells of a Jupyter notebook, without outputs."""
    try:
        book = parse_json(whole(source))
        cells = book["cells"] if "cells" in book else [cell for sheet in book["worksheets"] for cell in sheet["cells"]]
        texts = [cell.get("source", cell.get("input", "")) for cell in cells]
        parts = [text if isinstance(text, str) else "".join(text) for text in texts]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{source.name} is not a notebook: {one_line(error)}") from None
    return split_document("\n\n".join(part.strip("\n") for part in parts if part.strip()))


def read_epub(source: FileSource) -> Pieces:
    """The chapters of a book as one document."""
    book = Zip(io.BytesIO(whole(source)), source.name)
    with damage(source.name):
        named = _xml(book, "META-INF/container.xml").find(".//{*}rootfile")
        if named is None:
            raise ValueError("its container does not name a package")
        root = _xml(book, package := named.attrib["full-path"])
        paths = {item.attrib["id"]: item.attrib["href"] for item in root.iterfind(".//{*}manifest/{*}item")}
        order = [paths[item.attrib["idref"]] for item in root.iterfind(".//{*}spine/{*}itemref")]
    files, chapters = {info.filename for info in book.files()}, []
    for path in order:
        name = posixpath.normpath(posixpath.join(posixpath.dirname(package), urllib.parse.unquote(path)))
        if name in files:
            page = _decode_page(_limited(book.open(name), f"{source.name}:{name}"), source)
            chapters.append(_page_text(page, source, main=False))
    yield from split_document("\n\n".join(filter(None, chapters)))


def _xml(book: Zip, name: str) -> ElementTree.Element:
    with damage(book.name):
        try:
            return ElementTree.fromstring(_limited(book.open(name), f"{book.name}:{name}"))
        except ElementTree.ParseError as error:
            raise ValueError(f"{name}: {error}") from None


def read_pdf(source: FileSource) -> Pieces:
    """The text of the pages as one document."""
    try:
        import pypdf
    except ImportError:
        raise missing("pypdf", "documents", f"{source.name}: reading PDF", "convert it to text") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it comments on every flaw of a file
    data = whole(source)
    try:
        pages = pypdf.PdfReader(io.BytesIO(data)).pages
        texts = [page.extract_text() for page in pages]
    except Exception as error:  # its parser raises whatever it meets in a damaged file
        raise UserError(f"cannot read {source.name} as PDF: {one_line(error) or type(error).__name__}") from None
    return split_document("\n\n".join(text.strip() for text in texts if text.strip()))


def read_archive(source: FileSource) -> Iterator[tuple[str, bool]]:
    """The files of a .zip or .tar archive: with a known suffix, or as --include selects. Ignores archives."""

    def accepts(name: str) -> bool:
        reader = reader_of(name)
        return reader is not ARCHIVE and source.selection.accepts(name, reader is not None)

    with source.open() as file:
        if source.suffix != ".zip":
            members = tar_members(file, source.name, accepts)
        else:
            file = file if file.seekable() else io.BytesIO(_limited(file, source.name))
            members = zip_members(file, source.name, accepts)
        for position, (name, stream) in enumerate(members):
            path, label = source.path.with_name(PurePosixPath(name).name), f"{source.name}:{name}"
            member = dataclasses.replace(source, path=path, label=label, url="", stream=stream)
            yield from source.pieces_of(position, member)


def check_lines(source: Any) -> None:
    """Raises UserError if --lines cannot divide a source: in other documents, the end of a line is not an end."""
    if getattr(source, "lines", True) and getattr(source, "reader", None) not in (LINES, ARCHIVE):
        raise UserError(f"{source.name} is not a text file, so --lines cannot divide it: remove --lines")


ARCHIVE = Reader(read_archive)
TEXT = Reader(read_plain_text, many=False, is_text=True)
LINES, SEPARATED = Reader(read_lines), Reader(read_separated)
HTML = Reader(read_html, many=False)
READERS = {
    ".txt": TEXT,
    ".md": TEXT,
    ".jsonl": Reader(read_json_lines),
    ".parquet": Reader(read_parquet),
    ".html": HTML,
    ".htm": HTML,
    ".ipynb": Reader(read_notebook, many=False),
    ".epub": Reader(read_epub, many=False),
    ".pdf": Reader(read_pdf, many=False),
    ".zip": ARCHIVE,
    ".tar": ARCHIVE,
}


def suffixes(name: str) -> tuple[str, str]:
    """(suffix of the content, suffix of the compression or "") of a file name, in small letters."""
    path = PurePosixPath(name.lower())
    path = path.with_suffix(SHORT[path.suffix]) if path.suffix in SHORT else path
    packed = path.suffix if path.suffix in COMPRESSIONS else ""
    return PurePosixPath(path.stem).suffix if packed else path.suffix, packed


def reader_of(name: str) -> Reader | None:
    """The reader of a file name; None if its suffix is unknown."""
    return READERS.get(suffixes(name)[0])


def whole(source: FileSource) -> bytes:
    """The content of a file. Raises UserError if it is too large for memory."""
    with source.open() as file:
        return _limited(file, source.name)


def _limited(file: IO[bytes], name: str) -> bytes:
    data = file.read(WHOLE + 1)
    if len(data) > WHOLE:
        raise UserError(f"{name} is larger than {WHOLE >> 20} MiB, the limit for this format: convert it to text")
    return data


def split_document(text: str) -> Pieces:
    """The pieces of one document; none if it is empty."""
    text, start = without_surrogates(text), 0
    while len(text) - start > PIECE:
        end = start + safe_cut(text[start : start + PIECE], PIECE)
        yield text[start:end], False
        start = end
    if text:
        yield text[start:], True


def _not_text(source: FileSource, offset: int, error: UnicodeDecodeError, encoding: str = "") -> UserError:
    encoding = encoding or source.encoding
    shown = "UTF-8" if encoding.lower() in ("utf-8", "utf-8-sig", "utf8") else encoding
    is_wide = offset == 0 and error.object[:2] in WIDE
    hint = "it looks like UTF-16" if is_wide else f"byte 0x{error.object[error.start]:02x}, {error.reason}"
    advice = "save it as UTF-8 and run again, or give its --encoding"
    return UserError(f"{source.name} is not {shown} text: byte offset {offset} ({hint}); {advice}")
