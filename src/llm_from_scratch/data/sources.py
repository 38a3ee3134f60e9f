"""Where texts come from: files, folders, globs, standard input and known names, read as a stream of documents.

A source yields (text, ends) pieces of bounded size: a long document comes in several, cut where a cut changes no
tokens, and `ends` marks the last. Nothing here holds a whole file in memory.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import glob
import hashlib
import io
import json
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.tokenizer import cut_text, safe_cut
from ..core.vocab_files import answers, within
from ..errors import UserError
from ..machine.extras import missing
from ..machine.files import open_file

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
KNOWN_NAMES = ("shakespeare_char", "shakespeare", "openwebtext", "python_docs", "demo")
PIECE = 1 << 20  # characters of one piece at most
RAW = Path("data/raw")

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
OPENWEBTEXT = "Skylion007/openwebtext"


@dataclass(frozen=True)
class FileSource:
    """One file. .jsonl: a document per line; .parquet: one per row; anything else is one document of plain text.

    Plain text is read as Python reads it: UTF-8, every line break as "\\n". A byte order mark is dropped.
    """

    path: Path
    text_key: str = "text"
    label: str = ""  # how messages and the manifest name it; the path where empty
    keep_bom: bool = False
    documents: int | None = None  # unknown before it is read

    @property
    def name(self) -> str:
        return self.label or self.path.as_posix()

    @property
    def has_many(self) -> bool:
        """Whether it may hold more than one document."""
        return self.path.suffix.lower() in (".jsonl", ".parquet")

    def identity(self) -> dict[str, Any]:
        """What says whether the source has changed: its content, not its date."""
        with _reading(self.name), self.path.open("rb") as file:
            digest, size = hashlib.sha256(), 0
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
        return {"path": self.name, "bytes": size, "sha256": digest.hexdigest()}

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Raises UserError: unreadable, not UTF-8 (with the byte offset), a broken line, a missing field or extra."""
        kind = self.path.suffix.lower()
        with _reading(self.name):
            if kind == ".jsonl":
                texts = self._json_lines()
            elif kind == ".parquet":
                texts = self._parquet_rows()
            else:
                yield from self._plain_text()
                return
            for text in texts:
                yield from pieces_of(text)

    def _plain_text(self) -> Iterator[tuple[str, bool]]:
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
        text, total, started = "", 0, False
        with self.path.open("rb") as file:
            while True:
                block = file.read(PIECE)
                total += len(block)
                try:
                    fresh = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.name, total - len(error.object) + error.start, error) from None
                text += fresh if started or self.keep_bom else fresh.removeprefix("\ufeff")
                started = started or bool(fresh)
                while len(text) > PIECE:
                    cut = safe_cut(text, PIECE)
                    yield text[:cut], False
                    text = text[cut:]
                if not block:
                    if text:  # after a cut there is always some
                        yield text, True
                    return

    def _json_lines(self) -> Iterator[str]:
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.name}, line {number}"
                try:
                    row = json.loads(text) if (text := line.decode("utf-8").lstrip("\ufeff").strip()) else None
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.name, offset + error.start, error) from None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is not JSON ({error}): expected one object per line") from None
                offset += len(line)
                if text:
                    if not isinstance(row, dict) or not isinstance(row.get(self.text_key), str):
                        has = f"its fields are {', '.join(map(repr, row))}" if isinstance(row, dict) else "no object"
                        raise UserError(f"{where} has no text under {self.text_key!r} ({has}): name it with --text_key")
                    yield row[self.text_key]

    def _parquet_rows(self) -> Iterator[str]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            instead = "give the text as .txt, .md or .jsonl"
            raise missing("pyarrow", "data", f"{self.name}: reading .parquet", instead) from None
        try:
            with parquet.ParquetFile(self.path) as table:
                if self.text_key not in table.schema_arrow.names:
                    names = ", ".join(map(repr, table.schema_arrow.names))
                    raise UserError(f"{self.name} has no column {self.text_key!r} (it has {names}): see --text_key")
                kind = table.schema_arrow.field(self.text_key).type
                kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
                if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                    raise UserError(f"{self.name}: column {self.text_key!r} holds {kind}, not text: see --text_key")
                for batch in table.iter_batches(batch_size=256, columns=[self.text_key]):
                    yield from (text for text in batch.column(0).to_pylist() if text)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot read {self.name} as parquet: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class HubSource:
    """A text dataset of the Hugging Face hub, streamed by the library `datasets` (extra: data)."""

    name: str
    text_key: str
    documents: int | None
    rows: Any  # iterable of {column: value}
    has_many = True

    @classmethod
    def open(cls, name: str, text_key: str = "text") -> HubSource:
        """Raises UserError without the extra or the network."""
        try:
            import datasets
        except ImportError:
            raise missing("datasets", "data", f"reading {name}") from None
        try:
            offline = any(os.environ.get(f"HF_{part}_OFFLINE", "0") not in ("0", "") for part in ("HUB", "DATASETS"))
            if not offline and not Path(name).exists():  # the library would try for half a minute
                answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
            rows = datasets.load_dataset(name, split="train", streaming=True)
            info = (rows.info.splits or {}).get("train")
        except Exception as error:
            raise UserError(
                f"cannot load the dataset {name} ({' '.join(str(error).split())[:200]}): check the network, or give "
                "its files (.parquet, .jsonl) to llm-prepare"
            ) from None
        return cls(name, text_key, info.num_examples if info and info.num_examples else None, rows)

    def identity(self) -> dict[str, Any]:
        return {
            "dataset": self.name,
            "documents": self.documents,
            "version": str(getattr(self.rows, "info", ""))[:4096],
        }

    def pieces(self) -> Iterator[tuple[str, bool]]:
        try:
            for row in self.rows:
                yield from pieces_of(row[self.text_key])
        except Exception as error:
            raise UserError(
                f"reading {self.name} failed ({' '.join(str(error).split())[:200]}): run the same command again, what "
                "is encoded is kept"
            ) from None


Source = FileSource | HubSource


def pieces_of(text: str) -> Iterator[tuple[str, bool]]:
    """One document in memory as pieces; none for an empty one."""
    parts = list(cut_text(text, PIECE)) if text else []
    yield from ((part, i == len(parts) - 1) for i, part in enumerate(parts))


def find_files(arguments: Sequence[str], root: Path, spool: Path, report: Any = print) -> list[Path]:
    """The files behind files, folders, globs and "-" (standard input, copied to the folder spool), each once.

    What is not found from root is looked for in data/raw. Folders give their .txt, .md, .jsonl and .parquet files,
    sorted. Raises UserError for what is not there.
    """
    files: dict[str, Path] = {}
    for argument in arguments:
        if not argument:
            raise UserError("a source is empty: expected a file, a folder, a glob, - or a known name")
        found = [_spooled(argument, spool)] if argument == "-" else _matches(root, argument)
        if not found and (found := _matches(root / RAW, argument)):
            report(f"reading {argument} from {RAW.as_posix()}")
        if not found:
            near = difflib.get_close_matches(argument, KNOWN_NAMES[:-1], n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else f"known names are {', '.join(KNOWN_NAMES[:-1])}"
            if (root / argument).is_dir():
                hint = f"the folder holds no {', '.join(SUFFIXES)} file"
            raise UserError(f"no text {argument!r}, neither here nor in {RAW.as_posix()}: {hint}")
        for path in found:
            if path.suffix.lower() not in SUFFIXES and argument != "-":
                report(f"reading {path.as_posix()} as plain text")
            files.setdefault(os.path.realpath(path), path)
    return list(files.values())


def _matches(base: Path, argument: str) -> list[Path]:
    path = base / argument
    with _reading(argument):
        if path.is_fifo():
            raise UserError(f"{argument} is a pipe: send it to standard input instead, llm-prepare - < {argument}")
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            shown = (p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))
            return sorted(shown, key=lambda p: p.relative_to(path).as_posix())
        if path.exists():
            os.close(open_file(path))  # a device would never end
            return [path]
        if glob.has_magic(argument):
            names = sorted(glob.glob(str(path), recursive=True))
            return [p for name in names for p in (_matches(base, name) if os.path.isdir(name) else [Path(name)])]
    return []


def _spooled(argument: str, spool: Path) -> Path:
    path = spool / "stdin.txt"
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from None


def _not_utf8(name: str, offset: int, error: UnicodeDecodeError) -> UserError:
    wide = offset == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    hint = "it looks like UTF-16" if wide else f"byte 0x{error.object[error.start]:02x}, {error.reason}"
    return UserError(f"{name} is not UTF-8 text: byte offset {offset} ({hint}); save it as UTF-8 and run again")


# known names


def known_file(name: str, root: Path, report: Any = print) -> Path:
    """The text behind a known name. demo: tiny Shakespeare, or where it cannot be had python_docs, told in a line."""
    if name == "python_docs":
        return python_docs_file(root)
    try:
        return shakespeare_file(root, name, report)
    except UserError as error:
        if name != "demo":
            raise
        reason = str(error).partition(";")[0]
        report(f"{reason}: using this Python's own documentation texts (pydoc_data.topics) instead")
        return python_docs_file(root)


def shakespeare_file(root: Path, name: str, report: Any = print) -> Path:
    """Tiny Shakespeare: data/NAME/input.txt or data/raw/tinyshakespeare.txt as it lies there, else a download."""
    for path in (root / "data" / name / "input.txt", root / RAW / SHAKESPEARE_FILE):
        if path.is_file():
            return path
    report(f"downloading tiny Shakespeare to {(RAW / SHAKESPEARE_FILE).as_posix()}")
    return fetch_tiny_shakespeare(root / RAW / SHAKESPEARE_FILE)


def fetch_tiny_shakespeare(path: str | Path) -> Path:
    """Downloads tiny Shakespeare (1,115,394 bytes) to path and checks its sha256; an existing file is left as it is.
    Raises UserError within about ten seconds where there is no network."""
    path = Path(path)
    if path.exists():
        return path
    try:
        with within(8, lambda: urllib.request.urlopen(SHAKESPEARE_URL, timeout=8)) as response:
            data, deadline = b"", time.monotonic() + 60
            while (block := response.read1(1 << 16)) and len(data) < 1 << 22:
                data += block
                if time.monotonic() > deadline:
                    raise TimeoutError("the download took more than a minute")
    except Exception as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise UserError(
            f"cannot download tiny Shakespeare ({reason}); put it at {path} from {SHAKESPEARE_URL}"
        ) from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{SHAKESPEARE_URL} sent another file than expected (its sha256 differs); nothing was written")
    write_atomic(path, data)
    return path


def python_docs_file(root: Path) -> Path:
    """The language reference that CPython carries for help(), topics sorted by name, as data/raw/python_docs.txt."""
    try:
        from pydoc_data import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data.topics; give a text file of your own to llm-prepare") from None
    text = "\n\n".join(topics.topics[key].strip() for key in sorted(topics.topics)) + "\n"
    path = root / RAW / "python_docs.txt"
    if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
        write_atomic(path, text.encode("utf-8"))
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Whole or not at all: written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
