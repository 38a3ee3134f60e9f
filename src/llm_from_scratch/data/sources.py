"""Text sources: files, folders, globs, standard input and built-in sources, read as a stream of documents.

A source yields pieces (text, ends) of bounded size: a long document is cut where the tokens stay the same, and `ends`
marks its last piece. A new file format is a reader in READERS, a new built-in source an entry in KNOWN_TEXTS.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.tokenizer import cut_text, safe_cut
from ..core.vocab_files import call_with_timeout, check_reachable
from ..errors import UserError, one_line
from ..machine.extras import missing
from ..machine.files import open_file, write_whole
from ..settings import did_you_mean

PIECE = 1 << 20  # maximum characters per piece
RAW = Path("data/raw")

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
OPENWEBTEXT = "Skylion007/openwebtext"


@dataclass(frozen=True)
class FileSource:
    """One file, read by the reader of its suffix, or as plain text."""

    path: Path
    text_key: str = "text"
    label: str = ""  # its name in messages and in the manifest (default: the path)
    keep_bom: bool = False
    documents: int | None = None  # unknown before reading
    lines: bool = False  # each line of a text is a document

    @property
    def name(self) -> str:
        return self.label or self.path.as_posix()

    @property
    def reader(self) -> Reader:
        found = READERS.get(self.path.suffix.lower(), READERS[".txt"])
        return LINES if self.lines and not found.many else found

    @property
    def has_many(self) -> bool:
        """Whether it may contain more than one document."""
        return self.reader.many

    def identity(self) -> dict[str, Any]:
        """The content's hash, by which a change is detected."""
        with _reading(self.name), self.path.open("rb") as file:
            digest, size = hashlib.sha256(), 0
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
        return {"path": self.name, "bytes": size, "sha256": digest.hexdigest()}

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The documents in pieces. Raises UserError: unreadable, not UTF-8, a broken line, a missing field or extra."""
        with _reading(self.name):
            for item in self.reader.read(self):
                yield from split_document(item) if isinstance(item, str) else [item]


@dataclass(frozen=True)
class HubSource:
    """A text dataset on the Hugging Face hub, streamed by the library `datasets` (extra: data)."""

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
            if not offline and not Path(name).exists():  # datasets would wait half a minute
                check_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
            rows = datasets.load_dataset(name, split="train", streaming=True)
            info = (rows.info.splits or {}).get("train")
        except Exception as error:
            advice = "check the network, or run llm-prepare on its files (.parquet, .jsonl)"
            raise UserError(f"cannot load the dataset {name} ({one_line(error)}): {advice}") from None
        return cls(name, text_key, info.num_examples if info and info.num_examples else None, rows)

    def identity(self) -> dict[str, Any]:
        version = str(getattr(self.rows, "info", ""))[:4096]
        return {"dataset": self.name, "documents": self.documents, "version": version}

    def pieces(self) -> Iterator[tuple[str, bool]]:
        try:
            for row in self.rows:
                yield from split_document(row[self.text_key])
        except Exception as error:
            advice = "run the same command again to resume from the cache"
            raise UserError(f"reading {self.name} failed ({one_line(error)}): {advice}") from None


Source = FileSource | HubSource


def split_document(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of one document; none if it is empty."""
    parts = list(cut_text(text, PIECE)) if text else []
    yield from ((part, i == len(parts) - 1) for i, part in enumerate(parts))


def read_plain_text(source: FileSource) -> Iterator[tuple[str, bool]]:
    """Pieces of one document. As in Python: UTF-8, every line break as "\\n". A byte order mark is dropped."""
    text = ""
    encoding = "utf-8" if source.keep_bom else "utf-8-sig"
    with source.path.open("rb") as raw, io.TextIOWrapper(raw, encoding) as file:
        try:
            while block := file.read(PIECE):
                text += block
                while len(text) > PIECE:
                    cut = safe_cut(text, PIECE)
                    yield text[:cut], False
                    text = text[cut:]
        except UnicodeDecodeError as error:
            raise _not_utf8(source.name, raw.tell() - len(error.object) + error.start, error) from None
    if text:
        yield text, True


def read_lines(source: FileSource) -> Iterator[str]:
    """One document per line that is not empty, without its line break."""
    rest = ""
    for text, _ in read_plain_text(source):
        *whole, rest = (rest + text).split("\n")
        yield from filter(None, whole)
    yield from filter(None, [rest])


def read_json_lines(source: FileSource) -> Iterator[str]:
    """One document per line."""
    offset, key = 0, source.text_key
    with source.path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{source.name}, line {number}"
            try:
                row = json.loads(text) if (text := line.decode("utf-8").lstrip("\ufeff").strip()) else None
            except UnicodeDecodeError as error:
                raise _not_utf8(source.name, offset + error.start, error) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error}): expected one object per line") from None
            offset += len(line)
            if text:
                if not isinstance(row, dict) or not isinstance(row.get(key), str):
                    has = f"its fields are {', '.join(map(repr, row))}" if isinstance(row, dict) else "not an object"
                    raise UserError(f"{where} does not have the text field {key!r} ({has}): see --text_key")
                yield row[key]


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
        with parquet.ParquetFile(source.path) as table:
            if key not in table.schema_arrow.names:
                names = ", ".join(map(repr, table.schema_arrow.names))
                raise UserError(f"{source.name} does not have a column {key!r} (it has {names}): see --text_key")
            kind = table.schema_arrow.field(key).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{source.name}: column {key!r} contains {kind}, not text: see --text_key")
            for batch in table.iter_batches(batch_size=256, columns=[key]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {source.name} as parquet: {one_line(error)}") from None


@dataclass(frozen=True)
class Reader:
    """many: read() yields documents. Otherwise it yields the pieces (text, ends) of one document."""

    read: Callable[[FileSource], Iterator[str] | Iterator[tuple[str, bool]]]
    many: bool = True


READERS = {
    ".txt": Reader(read_plain_text, many=False),
    ".md": Reader(read_plain_text, many=False),
    ".jsonl": Reader(read_json_lines),
    ".parquet": Reader(read_parquet),
}


LINES = Reader(read_lines)


def find_files(arguments: Sequence[str], root: Path, spool: Path, report: Any = print) -> list[Path]:
    """The files named by files, folders, globs and "-" (standard input, copied to the folder spool), each once.
    Searches root, then data/raw. A folder gives its files with a suffix in READERS, sorted. Raises UserError if an
    argument matches nothing."""
    files: dict[str, Path] = {}
    for argument in arguments:
        if not argument:
            raise UserError("a source is empty: expected a file, a folder, a glob, - or a known name")
        if argument == "-":
            found = [spool / "stdin.txt"]
            with found[0].open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        else:
            found = _matches(root, argument)
        others = _other_files(root / argument, argument.rstrip("/"), len(found))
        if found and others:
            report(f"{argument}: reading {len(found)} of its files{others}")
        if not found and (found := _matches(root / RAW, argument)):
            report(f"reading {argument} from {RAW.as_posix()}")
        if not found:
            names = [name for name in KNOWN_TEXTS if name != "demo"]
            hint = did_you_mean(argument, names, f"built-in sources: {', '.join(names)}", similarity=0.75)
            if (root / argument).is_dir():
                hint = f"the folder contains no {', '.join(READERS)} file{others}"
            raise UserError(f"{argument!r} not found here or in {RAW.as_posix()}: {hint}")
        for path in found:
            if path.suffix.lower() not in READERS and argument != "-":
                report(f"reading {path.as_posix()} as plain text")
            files.setdefault(os.path.realpath(path), path)
    return list(files.values())


def _other_files(folder: Path, argument: str, found: int) -> str:
    """How to read the most common kind of other texts in a folder, if there are more of them than of those found."""
    others = [path for path in _files_in(folder) if path.suffix and path.suffix.lower() not in READERS]
    for suffix, count in Counter(path.suffix for path in others).most_common():
        example = next(path for path in others if path.suffix == suffix)
        with contextlib.suppress(OSError), example.open("rb") as file:
            if count > found and b"\0" not in file.read(1 << 12):
                return f"; for its {suffix} files: llm-prepare {shlex.quote(f'{argument}/**/*{suffix}')}"
    return ""


def _files_in(folder: Path) -> list[Path]:
    """The files below a folder that are not hidden, sorted."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    shown = [name for name in files if not any(part.startswith(".") for part in name.parts)]
    return [files[name] for name in sorted(shown, key=Path.as_posix)]


def _matches(base: Path, argument: str) -> list[Path]:
    path = base / argument
    with _reading(argument):
        if path.is_fifo():
            command = f"llm-prepare - < {shlex.quote(argument)}"
            raise UserError(f"{argument} is a pipe; read it from standard input instead: {command}")
        if path.is_dir():
            return [p for p in _files_in(path) if p.suffix.lower() in READERS]
        if path.exists():
            os.close(open_file(path))  # refuses devices, which never end
            return [path]
        if glob.has_magic(argument):
            names = sorted(glob.glob(str(path), recursive=True))
            return [p for name in names for p in (_matches(base, name) if os.path.isdir(name) else [Path(name)])]
    return []


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


def demo_file(root: Path, report: Any = print) -> Path:
    """Tiny Shakespeare. Offline, Python's documentation instead."""
    try:
        return shakespeare_file(root, "demo", report)
    except UserError as error:
        reason = str(error).partition(";")[0]
        report(f"{reason}: using Python's built-in documentation (pydoc_data.topics) instead")
        return python_docs_file(root)


def shakespeare_file(root: Path, name: str, report: Any = print) -> Path:
    """Tiny Shakespeare: data/NAME/input.txt or data/raw/tinyshakespeare.txt if it exists, else a download."""
    for path in (root / "data" / name / "input.txt", root / RAW / SHAKESPEARE_FILE):
        if path.is_file():
            return path
    report(f"downloading tiny Shakespeare to {(RAW / SHAKESPEARE_FILE).as_posix()}")
    return fetch_tiny_shakespeare(root / RAW / SHAKESPEARE_FILE)


def fetch_tiny_shakespeare(path: str | Path) -> Path:
    """Downloads tiny Shakespeare (1,115,394 bytes) to path and checks its sha256. Keeps an existing file.
    Raises UserError, within about ten seconds if there is no network."""
    path = Path(path)
    if path.exists():
        return path
    try:
        with call_with_timeout(8, lambda: urllib.request.urlopen(SHAKESPEARE_URL, timeout=8)) as response:
            data, deadline = b"", time.monotonic() + 60
            while (block := response.read1(1 << 16)) and len(data) < 1 << 22:
                data += block
                if time.monotonic() > deadline:
                    raise TimeoutError("the download took more than a minute")
    except Exception as error:
        reason = one_line(getattr(error, "reason", error))
        advice = f"put it at {path} from {SHAKESPEARE_URL}"
        raise UserError(f"cannot download tiny Shakespeare ({reason}); {advice}") from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{SHAKESPEARE_URL} returned an unexpected file (its sha256 differs); nothing was written")
    write_whole(path, data)
    return path


def python_docs_file(root: Path) -> Path:
    """CPython's built-in documentation for help(), sorted by topic, written to data/raw/python_docs.txt."""
    try:
        from pydoc_data import topics
    except ImportError:
        raise UserError("this Python does not have pydoc_data.topics; run llm-prepare on your own text file") from None
    text = "\n\n".join(topics.topics[key].strip() for key in sorted(topics.topics)) + "\n"
    path = root / RAW / "python_docs.txt"
    if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
        write_whole(path, text.encode("utf-8"))
    return path


@dataclass(frozen=True)
class KnownText:
    """A text with a name, and the defaults of its dataset. open(root, text_key, report) finds or downloads it."""

    open: Callable[[Path, str, Any], Source]
    tokenizer: str = "gpt2"
    val_fraction: float = 0.1


KNOWN_TEXTS = {
    "shakespeare_char": KnownText(
        lambda root, key, report: FileSource(shakespeare_file(root, "shakespeare_char", report), key), "char"
    ),
    "shakespeare": KnownText(lambda root, key, report: FileSource(shakespeare_file(root, "shakespeare", report), key)),
    # 8 million documents, so a small fraction is enough for validation (nanoGPT's)
    "openwebtext": KnownText(lambda root, key, report: HubSource.open(OPENWEBTEXT, key), val_fraction=0.0005),
    "python_docs": KnownText(lambda root, key, report: FileSource(python_docs_file(root), key)),
    "demo": KnownText(lambda root, key, report: FileSource(demo_file(root, report), key), "char"),
}
