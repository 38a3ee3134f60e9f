"""Text sources: files, folders, globs, standard input and built-in sources, read as a stream of documents.

A source yields pieces (text, ends) of bounded size: a long document is cut where the tokens stay the same, and `ends`
marks its last piece. A new file format is a reader in readers.READERS, a new built-in source an entry in KNOWN_TEXTS.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import os
import shlex
import shutil
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

from ..core.characters import TextScan
from ..core.vocab_files import call_with_timeout
from ..errors import AccessError, UserError, one_line
from ..machine.files import open_file, write_whole
from ..machine.terminal import note
from ..settings import did_you_mean
from . import stores
from .archives import decompress
from .hashes import FileHash
from .hub import HubSource as HubSource
from .options import PrepareOptions
from .readers import ARCHIVE, LINES, READERS, SEPARATED, TEXT, Reader, check_lines, reader_of, split_document, suffixes
from .selection import Selection, fixed_part, is_hidden, walk

RAW = Path("data/raw")

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
OPENWEBTEXT = "Skylion007/openwebtext"
ALL = Selection()
NO_TEXT = "note: no text in "
NAMED = 10  # files that the note names
HUB = "hf:"  # hf:owner/name or hf:owner/name:configuration


@dataclass
class Damage:
    """Findings of the first read of a file, with --bad_files=skip."""

    is_known: bool = False
    is_own: bool = False  # of an archive: it ends early
    members: set[int] = field(default_factory=set)  # positions of an archive's damaged files


@dataclass(frozen=True)
class FileSource:
    """One file, read by the reader of its suffix, or as plain text."""

    path: Path  # of a remote file or an archive's member: its name
    text_key: str = "text"
    label: str = ""  # its name in messages and in the manifest (default: the path)
    keep_bom: bool = False
    documents: int | None = None  # unknown before reading
    lines: bool = False  # each line of a text is a document
    separator: str = ""  # between the documents of a text
    encoding: str = "utf-8"
    selection: Selection = ALL  # in an archive
    skip_bad: bool = False
    cut_anywhere: bool = False  # the tokens of a text do not depend on its pieces
    url: str = ""
    stream: Any = field(default=None, compare=False)  # of an archive's member
    said: set[str] = field(default_factory=set, compare=False)
    scans: list[TextScan] = field(default_factory=list, compare=False)  # at most one, of a whole text
    damage: Damage = field(default_factory=Damage, init=False, compare=False)

    @property
    def name(self) -> str:
        return self.label or self.path.as_posix()

    @property
    def suffix(self) -> str:
        """Suffix of the decompressed content."""
        return suffixes(self.path.name)[0]

    @property
    def reader(self) -> Reader:
        found = reader_of(self.path.name) or TEXT
        return found if not found.is_text else LINES if self.lines else SEPARATED if self.separator else found

    @property
    def has_many(self) -> bool:
        """Whether it may contain more than one document."""
        return self.reader.many

    @property
    def key(self) -> str:
        """The same for the same file."""
        return stores.hash_text(self.url) if self.url else os.path.realpath(self.path)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        with stores.reading(self.name):
            return stores.size(self.url) if self.url else self.path.stat().st_size

    def open(self) -> IO[bytes]:
        """The decompressed content."""
        raw = self.stream
        if raw is None:
            file = stores.open_url(self.url) if self.url else self.path.open("rb", buffering=0)
            raw = io.BufferedReader(stores.Raw(file, self.name, self.url), 1 << 17)
        packed = suffixes(self.path.name)[1]
        return decompress(packed, raw, self.name) if packed else raw

    def identity(self, scan: TextScan | None = None) -> dict[str, Any]:
        """Detects changes: the version that a server states, or the hash of the content. scan: of a local text, which
        saves a pass."""
        url = self.url
        query = {"query": stores.hash_text(url)} if stores.shown(url) != url else {}  # may be secret
        if url:
            if version := stores.version(url):
                return {"path": self.name, "bytes": self.size, "version": version, **query}
            self._say(
                f"note: {self.name} does not have a version (ETag, Last-Modified), so it is downloaded and compared"
            )
        with stores.reading(self.name, url), stores.open_url(url) if url else self.path.open("rb") as file:
            digest = FileHash()
            blocks = digest.blocks(file)
            if scan and self._is_plain():
                self.scans[:] = []
                with contextlib.suppress(UnicodeDecodeError):  # raised again when the text is read
                    for block in blocks:
                        scan.add(block)
                    scan.add(b"", last=True)
                    self.scans[:] = [scan]
            deque(blocks, maxlen=0)
            return {"path": self.name, "bytes": digest.size, "sha256": digest.hexdigest(), **query}

    def _is_plain(self) -> bool:
        """Whether its only document is its content, in UTF-8."""
        packed = suffixes(self.path.name)[1]
        return self.reader is TEXT and self.encoding == "utf-8" and not packed and not self.keep_bom

    def reading(self) -> dict[str, Any]:
        """The settings that determine its documents, if they are not the usual ones."""
        given = {name: getattr(self, name) for name in ("separator", "encoding", "skip_bad")}
        given |= {"include": self.selection.include, "exclude": self.selection.exclude}
        return {name: value for name, value in given.items() if value and value != "utf-8"}

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The documents in pieces. Raises UserError: unreadable, damaged, not text, a missing field or extra."""
        damage = self.damage
        if self.skip_bad and not damage.is_known:  # a part of a damaged file must not be kept
            damage.members.clear()
            damage.is_own = not self._is_whole()
            damage.is_known = True
        if damage.is_own and self.reader is not ARCHIVE:
            return
        try:
            yield from self._pieces()
        except UserError as error:  # the files before the damage of an archive are whole
            if not damage.is_own:
                raise
            self.refuse(error)

    def pieces_of(self, position: int, member: FileSource) -> Iterator[tuple[str, bool]]:
        """The documents of an archive's file, in pieces. position: its number, as two files may have the same name."""
        if self.skip_bad and not self.damage.is_known:
            if not member._is_whole():
                self.damage.members.add(position)
        elif position not in self.damage.members:
            yield from member._pieces()

    def _is_whole(self) -> bool:
        """Reads it to its end."""
        try:
            deque(self._pieces(), maxlen=0)
        except UserError as error:
            self.refuse(error)
            return False
        return True

    def _pieces(self) -> Iterator[tuple[str, bool]]:
        check_lines(self)
        is_empty = True
        with stores.reading(self.name, self.url):
            for item in self.reader.read(self):
                is_empty = is_empty and not item
                yield from split_document(item) if isinstance(item, str) else [item]
        if is_empty and self.reader is not ARCHIVE and (self.stream or self.size):  # such as a scanned PDF
            line = NO_TEXT + self.name
            is_long = line not in self.said and sum(one.startswith(NO_TEXT) for one in self.said) >= NAMED
            self._say(f"{NO_TEXT}more files" if is_long else line)

    def refuse(self, error: UserError) -> None:
        """Raises the error, or with --bad_files=skip, prints it once if the content is damaged."""
        if not self.skip_bad or isinstance(error, AccessError):
            raise error
        self._say(f"skipped: {error}")

    def _say(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            note(line)


class Source(Protocol):
    """Documents with a name."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes; 0 if unknown."""
        ...

    @property
    def documents(self) -> int | None: ...

    @property
    def has_many(self) -> bool: ...

    def identity(self) -> dict[str, Any]: ...

    def pieces(self) -> Iterator[tuple[str, bool]]: ...


def check_unchanged(sources: Sequence[Source], identities: Sequence[dict[str, Any]]) -> None:
    """Raises UserError if a local file does not have the size of its identity, which was taken before."""
    for source, identity in zip(sources, identities, strict=True):
        if isinstance(source, FileSource) and not source.url and source.size != identity["bytes"]:
            raise UserError(f"{source.name} changed while it was read: run the same command again")


def find_sources(
    arguments: Sequence[str], root: Path, spool: Path, options: PrepareOptions, report: Any = print
) -> list[Source]:
    """The sources that arguments name: URLs, datasets on the hub (hf:owner/name), and find_files. Each once. Raises
    UserError."""
    found: dict[str, Source] = {}
    common = FileSource(
        Path(), options.text_key, lines=options.lines, separator=options.text_separator(), encoding=options.encoding,
        selection=Selection(options.include, options.exclude), skip_bad=options.bad_files == "skip",
    )  # fmt: skip
    selective = [a for a in arguments if (root / a).is_dir() or (root / RAW / a).is_dir() or "://" in a]
    selective += [a for a in arguments if reader_of(a) is ARCHIVE or glob.has_magic(a)]
    if (useless := options.given("include", "exclude")) and not selective:
        raise UserError(f"--{useless[0]} selects files in folders and archives: name a folder, or remove it")
    for argument in arguments:
        some: list[Source] = []
        if argument.startswith(HUB):
            name, _, config = argument.removeprefix(HUB).partition(":")
            some = [HubSource.open(name, common.text_key, config)]
        elif "://" in argument:
            urls = stores.find(argument, common.selection, lambda name: reader_of(name) is not None)
            named = [(Path(stores.file_name(url)), stores.shown(url), url) for url in urls]
            some = [replace(common, path=path, label=label, url=url) for path, label, url in named]
        else:
            for path in find_files([argument], root, spool, report, common.selection):
                some.append(replace(common, path=path, label=display_path(path, root, spool)))
        found |= {source.key: source for source in some if source.key not in found}
    return list(found.values())


def display_path(path: Path, root: Path, spool: Path | None = None) -> str:
    """A path for messages: relative to root if inside it."""
    if spool is not None and path.parent == spool:
        return "standard input"
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def find_files(
    arguments: Sequence[str], root: Path, spool: Path, report: Any = print, selection: Selection = ALL
) -> list[Path]:
    """The files named by files, folders, globs and "-" (standard input, copied to the folder spool), each once.
    Searches root, then data/raw. A folder gives the selected files, sorted. Raises UserError if an argument matches
    nothing."""
    files: dict[str, Path] = {}
    for argument in arguments:
        if not argument:
            raise UserError("a source is empty: expected a file, a folder, a glob, - or a known name")
        if argument == "-":
            found = [spool / "stdin.txt"]
            with found[0].open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        else:
            found = _matches(root, argument, selection, report)
        others = "" if selection.include else _other_files(root / argument, argument.rstrip("/"), len(found))
        if found and others:
            report(f"{argument}: reading {len(found)} of its files{others}")
        if not found and (found := _matches(root / RAW, argument, selection, report)):
            report(f"reading {argument} from {RAW.as_posix()}")
        if not found:
            names = [name for name in KNOWN_TEXTS if name != "demo"]
            hint = did_you_mean(argument, names, f"built-in sources: {', '.join(names)}", similarity=0.75)
            if (root / argument).is_dir():
                wanted = "file that --include selects" if selection.include else f"{', '.join(READERS)} file"
                raise UserError(f"the folder {argument!r} contains no {wanted}{others}")
            if glob.has_magic(argument) and selection != ALL:
                hint = "no file matches the glob, --include and --exclude"
            raise UserError(f"{argument!r} not found here or in {RAW.as_posix()}; {hint}")
        plain = [path for path in found if reader_of(path.name) is None and argument != "-" and not selection.include]
        if plain:
            more = f" and {len(plain) - 1:,} more" if len(plain) > 1 else ""
            report(f"reading {plain[0].as_posix()}{more} as plain text")
        for path in found:
            files.setdefault(os.path.realpath(path), path)
    return list(files.values())


def _other_files(folder: Path, argument: str, found: int) -> str:
    """How to read the most common kind of other texts in a folder, if there are more of them than of those found."""
    if not folder.is_dir():
        return ""
    others = [path for path in walk(folder) if path.suffix and reader_of(path.name) is None]
    for suffix, count in Counter(path.suffix for path in others).most_common():
        example = next(path for path in others if path.suffix == suffix)
        with contextlib.suppress(OSError), example.open("rb") as file:
            if count > found and b"\0" not in file.read(1 << 12):
                return f"; for its {suffix} files: llm-prepare {shlex.quote(f'{argument}/**/*{suffix}')}"
    return ""


def _matches(base: Path, argument: str, selection: Selection, report: Any) -> list[Path]:
    path = base / argument
    with stores.reading(argument):
        if path.is_fifo():
            command = f"llm-prepare - < {shlex.quote(argument)}"
            raise UserError(f"{argument} is a pipe; read it from standard input instead: {command}")
        if path.is_dir():
            return selection.files(path, lambda file: reader_of(file.name) is not None, report)
        if path.exists():
            os.close(open_file(path))  # refuses devices, which never end
            return [path]
        if glob.has_magic(argument):
            top, found = Path(fixed_part(path.as_posix())), []
            for at in _glob(path):
                found += _matches(base, str(at), selection, report) if at.is_dir() else [at]
            return [path for path in found if selection.selects(path.relative_to(top).as_posix())]
    return []


def _glob(pattern: Path) -> list[Path]:
    """The paths that match, sorted. ** does not enter linked folders: two links that lead upwards would have no end."""
    parts = pattern.parts
    if "**" not in parts:
        return sorted(map(Path, glob.glob(str(pattern))), key=str)
    at = parts.index("**")
    found: set[Path] = set()
    for top in map(Path, glob.glob(str(Path(*parts[:at])))):
        found.update(path for path in top.glob(str(Path(*parts[at:]))) if not is_hidden(str(path.relative_to(top))))
    return sorted(found, key=str)


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
    "fineweb-edu": KnownText(
        lambda root, key, report: HubSource.open("HuggingFaceFW/fineweb-edu", key, "sample-10BT"), val_fraction=0.0005
    ),
    "tinystories": KnownText(
        lambda root, key, report: HubSource.open("roneneldan/TinyStories", key), "bpe:4096", val_fraction=0.01
    ),
    "python_docs": KnownText(lambda root, key, report: FileSource(python_docs_file(root), key)),
    "demo": KnownText(lambda root, key, report: FileSource(demo_file(root, report), key), "char"),
}
