"""Preparation of a dataset: sources -> documents -> tokens -> shards and a manifest. Memory is bounded: texts are
streamed in units of about a megabyte, encoded (large inputs by worker processes) and appended to shards. The token
cache keeps encoded units, so an interrupted run can resume. The dataset is built in a temporary folder, which is
renamed when it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.tokenfile import CHECKED
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from ..machine.files import read_json
from . import sources as src
from .encode import ShardWriter, TokenCache, encode_units, units_of
from .options import PrepareOptions

POOL_FROM = 1 << 25  # bytes of input from which worker processes are faster
FORMAT, VERSION, MANIFEST = "llm-from-scratch-data", 1, "manifest.json"
TOKENIZER_FILES = ("tokenizer.meta.json", "ranks.tiktoken", "tokenizer.json")
Report = Callable[[str], None]


@dataclass
class DatasetSpec:
    """The dataset to prepare. val=None splits `train`: one document by position, several by document."""

    name: str
    train: list[src.Source]
    val: list[src.Source] | None
    tokenizer: str
    val_fraction: float
    seed: int

    def all(self) -> list[src.Source]:
        return self.train + (self.val or [])


@dataclass
class Counts:
    """Documents and characters of a list of sources, counted while texts() is read."""

    documents: int = 0
    characters: int = 0

    def texts(self, sources: list[src.Source], separator: str, report: Report) -> Iterator[str]:
        for source in sources:
            before = self.documents
            for _, text, ends in documents([source], separator):
                self.documents += ends
                self.characters += len(text)
                yield text
            if self.documents == before and len(sources) > 1:
                report(f"{source.name} is empty and ignored")


def prepare(sources: Sequence[str] = (), *, root: str | Path = ".", report: Report = print, **settings: Any) -> Path:
    """Prepares training data and returns its folder (default: data/processed/NAME). settings: fields of PrepareOptions,
    which `llm-prepare --help` explains. Paths are relative to root. If sources and settings have not changed, nothing
    is done. Raises UserError. After an error or Ctrl-C, only cached tokens remain."""
    options, root = PrepareOptions(**settings), Path(root)
    options.validate()
    with tempfile.TemporaryDirectory(prefix="llm-prepare-") as spool, disk_errors():
        spec = _make_spec(list(sources), options, root, Path(spool), report)
        if Path(spec.name).name != spec.name or spec.name in ("", ".", ".."):
            raise UserError(f"name={spec.name!r} is not a plain name: choose another with --name")
        target = root / (options.out_dir or Path("data/processed") / spec.name)
        request, identities = _hash_request(spec, options.shard_size)
        if _up_to_date(target, request):
            report(f"{_display_path(target, root)} is up to date: sources and settings have not changed")
            os.utime(target / MANIFEST)  # now the dataset prepared last
        else:
            _refuse_foreign(target)
            with temporary_folder(target) as folder:
                cache = root / options.cache_dir if options.cache_dir else None
                extra = {"request": request, "sources": identities}
                build(spec, folder, options.shard_size, options.workers, cache, extra, report)
                _move_into_place(folder, target)
        _print_summary(target, root, options.out_dir is None, report)
    return target


# documents and splits


def documents(sources: list[src.Source], separator: str = "") -> Iterator[tuple[int, str, bool]]:
    """(number, text, ends) pieces of all documents in order. Documents get the separator at their end if missing."""
    number = 0
    for source in sources:
        for text, ends in source.pieces():
            yield number, text + (separator if ends and not text.endswith(separator) else ""), ends
            number += ends


def val_documents(count: int, fraction: float, seed: int) -> np.ndarray:
    """The mask of the validation documents, (count,) bool: the first of a seeded permutation, as in nanoGPT
    (train_test_split of the library datasets)."""
    chosen = min(max(math.ceil(count * fraction), 1), count - 1)
    mask = np.zeros(count, dtype=bool)
    mask[np.random.default_rng(seed).permutation(count)[:chosen]] = True
    return mask


def _split(spec: DatasetSpec, counted: Counts, separators: list[str]) -> Iterator[tuple[str, str, bool]]:
    """(split, text, ends) of all pieces, each split in the order of the sources."""
    if spec.val is not None:
        for split, sources, separator in zip(("train", "val"), (spec.train, spec.val), separators, strict=True):
            yield from ((split, text, ends) for _, text, ends in documents(sources, separator))
    elif counted.documents == 1:
        border, seen = int(counted.characters * (1 - spec.val_fraction)), 0
        for _, text, _ in documents(spec.train, separators[0]):
            head = text[: max(0, border - seen)]
            yield "train", head, False
            yield "val", text[len(head) :], False
            seen += len(text)
    else:
        mask = val_documents(counted.documents, spec.val_fraction, spec.seed)
        for number, text, ends in documents(spec.train, separators[0]):
            # a dataset may have more documents than its stated length
            yield "val" if number < len(mask) and mask[number] else "train", text, ends


def _make_spec(sources: list[str], options: PrepareOptions, root: Path, spool: Path, report: Report) -> DatasetSpec:
    """The dataset of a command line, with the defaults of its sources."""
    if sources and options.train_files:
        raise UserError("SOURCE and --train_files both name training texts: use only one of them")
    given = list(options.train_files) or sources
    if not given:
        raise UserError("no source: llm-prepare FILE|FOLDER|GLOB|-|NAME ..., such as llm-prepare book.txt; see --help")
    name, key = options.name or _default_name(given[0], root), options.text_key
    known = [argument for argument in given if argument in src.KNOWN_TEXTS]
    if known:
        if len(given) > 1 or options.val_files:
            raise UserError(f"the known text {known[0]} cannot be combined with others; for a file, write ./{known[0]}")
        text = src.KNOWN_TEXTS[known[0]]
        source = text.open(root, key, report)
        if isinstance(source, src.FileSource):
            source = dataclasses.replace(source, label=_display_path(source.path, root))
        tokenizer, fraction = options.tokenizer or text.tokenizer, options.val_fraction or text.val_fraction
        return DatasetSpec(name, [source], None, tokenizer, fraction, options.seed)
    files = src.find_files(given, root, spool, report)
    val = src.find_files(options.val_files, root, spool, report) if options.val_files else None
    if twice := {os.path.realpath(f) for f in files} & {os.path.realpath(f) for f in val or []}:
        raise UserError(f"{sorted(twice)[0]} is both a training and a validation file")

    def open_all(paths: list[Path]) -> list[src.Source]:
        return [src.FileSource(path, key, _display_path(path, root, spool)) for path in paths]

    tokenizer, fraction = options.tokenizer or "gpt2", options.val_fraction or 0.1
    return DatasetSpec(name, open_all(files), None if val is None else open_all(val), tokenizer, fraction, options.seed)


def _default_name(first: str, root: Path) -> str:
    if first == "-":
        return "stdin"
    path = root / first
    while not path.exists() and any(sign in path.name for sign in "*?["):
        path = path.parent  # books/*.txt: the folder
    return (path.resolve().name if path.is_dir() else path.stem) or "text"


# building the dataset


def build(
    spec: DatasetSpec,
    folder: Path,
    shard_size: int,
    workers: int | None,
    cache_dir: Path | None,
    extra: dict[str, Any],
    report: Report,
) -> dict[str, Any]:
    """Writes shards, tokenizer and manifest to folder. Returns the manifest."""
    learns = spec.tokenizer == "char" or spec.tokenizer.startswith("bpe:")
    lists = [spec.train] if spec.val is None else [spec.train, spec.val]
    counts = [Counts() for _ in lists]
    if not learns:
        tokenizer = Tokenizer.from_name(spec.tokenizer)  # before reading, so that a wrong name fails early
    # Without an end-of-text id, documents end with a line break. A single text is not changed.
    no_id = spec.tokenizer == "char" if learns else tokenizer.eot_id is None
    separators = ["\n" if no_id and (len(some) > 1 or some[0].has_many) else "" for some in lists]
    texts = (
        text
        for counted, some, separator in zip(counts, lists, separators, strict=True)
        for text in counted.texts(some, separator, report)
    )
    if learns:
        tokenizer = Tokenizer.from_name(spec.tokenizer, texts)
    elif isinstance(spec.train[0], src.HubSource) and spec.train[0].documents:
        counts[0].documents = spec.train[0].documents  # from the hub, which saves a pass over the network
    else:
        deque(texts, maxlen=0)
    _check_counts(spec, counts)
    tokenizer.save(folder)
    stream = _split(spec, counts[0], separators)
    mark_ends = tokenizer.eot_id is not None and max(counted.documents for counted in counts) > 1
    if workers is None:
        workers = 0 if _input_size(spec) < POOL_FROM or tokenizer.name in ("char", "byte") else _cores()
    cache = TokenCache(cache_dir / "tokens" if cache_dir else None, tokenizer.dtype)
    shards = {split: ShardWriter(folder, split, shard_size, tokenizer.dtype) for split in ("train", "val")}
    reported = time.monotonic()
    for unit, size, ids in encode_units(units_of(stream, mark_ends), tokenizer, folder, cache, workers, report):
        shards[unit.split].append(ids)
        shards[unit.split].text_bytes += size
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            report(f"  {sum(s.tokens for s in shards.values()):,} tokens so far")
    splits = {split: s.close() for split, s in shards.items()}
    for split, entry in splits.items():
        if not entry["tokens"]:
            raise UserError(f"the {split} split of {spec.name} would be empty: use more text or change --val_fraction")
    if cache.hits:
        report(f"{cache.hits} of {cache.hits + cache.misses} parts were read from the cache {cache_dir}")
    cache.finish()
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": spec.name}
    manifest |= {"dtype": tokenizer.dtype.name, "vocab_size": tokenizer.vocab_size}
    manifest |= {"tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint()}, "splits": splits}
    manifest |= extra
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _check_counts(spec: DatasetSpec, counts: list[Counts]) -> None:
    for counted, what in zip(counts, (spec.train, spec.val or []), strict=False):
        if not counted.documents:
            names = ", ".join(source.name for source in what[:3])
            raise UserError(f"{names} {'is' if len(what) == 1 else 'are'} empty: expected text to prepare")
    if spec.val is None and counts[0].documents == 1 and int(counts[0].characters * (1 - spec.val_fraction)) == 0:
        raise UserError(f"{spec.train[0].name} is too short to split: {counts[0].characters} characters")


def _input_size(spec: DatasetSpec) -> int:
    if any(isinstance(source, src.HubSource) for source in spec.all()):
        return sys.maxsize
    return sum(source.path.stat().st_size for source in spec.all() if isinstance(source, src.FileSource))


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 else cores


# the dataset's folder


def _hash_request(spec: DatasetSpec, shard_size: int) -> tuple[str, list[dict[str, Any]]]:
    """A hash of everything that determines the result, and the identities of the sources."""
    identities = [[source.identity() for source in some] for some in (spec.train, spec.val or [])]
    given = Path(spec.tokenizer)
    own_files = [p for p in (given, *(given / file for file in (*TOKENIZER_FILES, "meta.pkl"))) if p.is_file()]
    what = {
        "version": VERSION,
        "sources": identities,
        "split": spec.val is not None,
        "name": spec.name,
        "tokenizer": [spec.tokenizer, *(src.FileSource(p).identity()["sha256"] for p in own_files)],
        "val_fraction": spec.val_fraction,
        "seed": spec.seed,
        "shard_size": shard_size,
        "keys": [getattr(source, "text_key", "") for source in spec.all()],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest(), identities[0] + identities[1]


def _manifest(target: Path) -> dict[str, Any] | None:
    try:
        manifest = read_json(target / MANIFEST)
    except UserError:
        return None
    return manifest if manifest.get("format") == FORMAT else None


def _shards_in(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]


def _up_to_date(target: Path, request: str) -> bool:
    """Whether target is complete and was made by the same request."""
    manifest = _manifest(target)
    if manifest is None or manifest.get("request") != request or not Tokenizer.exists(target):
        return False
    try:
        return all(
            src.FileSource(target / shard["file"]).identity()["sha256"] == shard["sha256"]
            for shard in _shards_in(manifest)
        )
    except UserError:
        return False


def _refuse_foreign(target: Path) -> None:
    """Raises UserError if replacing target would delete files of the user."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: choose another --out_dir")
    manifest = _manifest(target)
    ours = {MANIFEST, *TOKENIZER_FILES, *(shard["file"] for shard in _shards_in(manifest))} if manifest else set()
    names = sorted(path.name for path in target.glob("*"))
    foreign = [name for name in names if name not in ours and not name.startswith(CHECKED)]
    if foreign:
        raise UserError(
            f"{target} contains {foreign[0]}, which llm-prepare did not write: choose another --out_dir or --name"
        )


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder next to target, deleted at the end unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # After a killed run: restore the folder that it was replacing, delete the rest.
    for old in target.parent.glob(f".{glob.escape(target.name)}.*-*"):
        kind, _, pid = old.name[len(target.name) + 2 :].partition("-")
        if kind in ("building", "previous") and pid.isdecimal() and not _alive(int(pid)):
            if kind == "previous" and not target.exists():
                os.rename(old, target)
            else:
                shutil.rmtree(old, ignore_errors=True)
    folder = target.parent / f".{target.name}.building-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True  # on Windows, signal 0 would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _move_into_place(folder: Path, target: Path) -> None:
    old = target.parent / f".{target.name}.previous-{os.getpid()}"
    if target.exists():
        os.rename(target, old)
    os.rename(folder, target)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise UserError(f"cannot write{where}: {error.strerror or error}") from None


# messages


def _display_path(path: Path, root: Path, spool: Path | None = None) -> str:
    """A path for messages: relative to root if inside it."""
    if spool is not None and path.parent == spool:
        return "standard input"
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _print_summary(target: Path, root: Path, by_name: bool, report: Report) -> None:
    """Reports sizes, a decoded example and the next command."""
    manifest, tokenizer = _manifest(target), Tokenizer.load(target)
    assert manifest is not None
    kind = "" if tokenizer.name == manifest["name"] else f"tokenizer {tokenizer.name}, "
    report(f"{_display_path(target, root)}: {kind}vocabulary of {tokenizer.vocab_size:,}, {manifest['dtype']}")
    for split, entry in manifest["splits"].items():
        files = ", ".join(shard["file"] for shard in entry["shards"][:2])
        files += ", ..." if len(entry["shards"]) > 2 else ""
        report(f"  {split:5} {entry['tokens']:>14,} tokens {entry['bytes']:>14,} bytes of text  {files}")
    sizes = [manifest["splits"][split]["bytes"] for split in ("train", "val")]
    if sizes[1] > sizes[0]:
        report("note: the validation split is larger than the training split; use --val_files or another --seed")
    first = np.fromfile(target / manifest["splits"]["train"]["shards"][0]["file"], tokenizer.dtype, count=32)
    report(f"example: {' '.join(map(str, first[:8]))} ... is {tokenizer.decode(first)!r}")
    clash = (root / "data" / target.name / "train.bin").exists()
    dataset = target.name if by_name and not clash else _display_path(target, root)
    report(f"next: llm-train --dataset={shlex.quote(dataset)}")
