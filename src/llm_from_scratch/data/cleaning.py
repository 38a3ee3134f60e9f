"""Cleaning of documents in three steps: filters and hashes, part by part; decisions over all parts; the documents that
are left. Parts are files, so that memory is bounded, a killed run resumes, and other machines can share the work."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Removed, UserError
from ..machine.files import to_json, write_whole
from ..machine.processes import end_with_parent, shield_children
from .cleaning_report import (
    BOILERPLATE,
    DONE,
    DUPLICATES,
    EXAMPLES,
    as_text,
    summarise,
    without_examples,
    write_reports,
)
from .duplicates import Signatures, exact_duplicates, grouped, near_duplicates, signatures
from .encode import Workers, blocked_interrupts
from .filters import Cleaner, evaluation_runs
from .hashes import hash_document, hash_lines
from .options import CLEANING, PrepareOptions
from .readers import split_document
from .sources import Source

VERSION = 2  # of the parts and of the decisions
PART = 32 << 20  # bytes of sources per part
BATCH = 1 << 18  # characters whose signatures are computed at once
LONGEST = 1 << 26  # characters of a document
SHOWN = 300  # characters of an example
LINE = np.dtype([("a", "<u8")])
Report = Callable[[str], None]


@dataclass(frozen=True)
class CleanedSource:
    """The documents of parts that are left."""

    name: str
    folders: tuple[Path, ...]
    lines: bool
    has_many: bool
    documents = None  # unknown before reading

    @property
    def key(self) -> str:
        return str(self.folders)

    @property
    def size(self) -> int:
        return sum((folder / "texts").stat().st_size for folder in self.folders)

    def identity(self) -> dict[str, Any]:
        return {"cleaned": [folder.name for folder in self.folders]}

    def texts(self) -> Iterator[str]:
        for folder in self.folders:
            lines = folder.parent / "boilerplate"
            common = set(np.fromfile(lines, "<u8").tolist()) if lines.exists() else set()
            kept = np.fromfile(folder / "kept", np.uint8)
            for number, text in _stored(folder):
                if kept[number]:
                    yield "\n".join(_without(text, common)) if common else text

    def pieces(self) -> Iterator[tuple[str, bool]]:
        for text in self.texts():
            yield from split_document(text)


def extend_request(request: str, options: PrepareOptions, evaluation: Sequence[Source], is_chat: bool) -> str:
    """The hash of a request with everything that determines the cleaning. The same without cleaning."""
    if not (given := options.given(*CLEANING)):
        return request
    if is_chat:
        raise UserError(f"conversations are not cleaned: remove --{given[0]}")
    what = [VERSION, request, {name: getattr(options, name) for name in given}, [s.identity() for s in evaluation]]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def clean(
    groups: Sequence[Sequence[Source]], options: PrepareOptions, evaluation: Sequence[Source], folder: Path,
    reports: Path, workers: int, report: Report,
) -> tuple[list[list[Source]], dict[str, Any]]:  # fmt: skip
    """The sources after cleaning, and a summary for the manifest. evaluation: texts that must not be in the data.
    folder: for the documents that are left; reports: for the reports. Of duplicates in two groups, the one in the last
    group is left: validation must not be in training."""
    started = time.monotonic()
    jobs = jobs_of(groups, folder, PART)
    work = partial(clean_part, options=options, evaluation=evaluation_of(evaluation))
    for count, _ in enumerate(_map(work, jobs, workers), 1):
        if count % 10 == 0:
            report(f"  cleaned {count} of {len(jobs)} parts")
    folders = [where for _, where in jobs]
    decide(folders, options, folder)
    took = time.monotonic() - started
    summary = summarise(folders)
    for line in as_text(summary):
        report(line)
    report(f"cleaning took {took:.1f} s ({summary['bytes'] / took / 1e6:.1f} MB/s)")
    if not summary["kept"]:
        raise UserError(
            f"cleaning removed all {summary['documents']:,} documents ({next(iter(summary['removed']), '')})"
        )
    write_reports(summary, reports)
    return cleaned_sources(groups, folder), without_examples(summary)


def jobs_of(groups: Sequence[Sequence[Source]], folder: Path, least: int) -> list[tuple[list[Source], Path]]:
    """(sources, folder) of every part, of `least` bytes or more, in the order in which the first duplicate is left."""
    jobs: list[tuple[list[Source], Path]] = []
    for number in reversed(range(len(groups))):
        some: list[Source] = []
        size = 0
        for at, source in enumerate(groups[number]):
            some.append(source)
            size += source.size
            if size >= least or at == len(groups[number]) - 1:
                jobs.append((some, folder / f"{number}-{len(jobs):06d}"))
                some, size = [], 0
    return jobs


def group_of(folder: Path) -> int:
    """The number of a part's group."""
    return int(folder.name.partition("-")[0])


def cleaned_sources(groups: Sequence[Sequence[Source]], folder: Path) -> list[list[Source]]:
    parts = sorted(path.parent for path in folder.glob(f"[0-9]*/{DONE}"))
    own = [[part for part in parts if group_of(part) == number] for number in range(len(groups))]
    return [[cleaned_source(group, some)] for group, some in zip(groups, own, strict=True)]


def cleaned_source(group: Sequence[Source], folders: Sequence[Path]) -> Source:
    """The cleaned documents of the parts of a group."""
    is_lines = all(getattr(source, "lines", False) for source in group)
    return CleanedSource(group[0].name, tuple(folders), is_lines, len(group) > 1 or group[0].has_many)


def evaluation_of(sources: Sequence[Source]) -> np.ndarray | None:
    """The runs of words in evaluation texts."""
    if not sources:
        return None
    return evaluation_runs(text for source in sources for text in whole_documents(source))


def _map(work: Callable[[Any], None], jobs: Sequence[Any], workers: int) -> Iterator[None]:
    if workers < 2 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    shield_children()
    context = multiprocessing.get_context("spawn")
    pool = Workers(min(workers, len(jobs)), context, end_with_parent)
    futures: list[concurrent.futures.Future[None]] = []
    try:
        with blocked_interrupts():
            futures = [pool.submit(work, job) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?): run the same command to resume") from None
    finally:
        for future in futures:
            future.cancel()
        concurrent.futures.wait(futures)  # parts that were begun are completed and kept
        pool.end()


# Step 1: a part


@dataclass
class _Removals:
    """Removed texts, with reasons and examples."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, text: str) -> None:
        self.documents[reason] += 1
        self.bytes[reason] += len(text.encode())
        if len(found := self.examples.setdefault(reason, [])) < EXAMPLES:
            found.append(shorten(text))

    def plain(self) -> dict[str, Any]:
        return {
            reason: {"documents": count, "bytes": self.bytes[reason], "examples": self.examples[reason]}
            for reason, count in sorted(self.documents.items())
        }


def shorten(text: str) -> str:
    return " ".join(text[:SHOWN].split())


def clean_part(job: tuple[Sequence[Source], Path], options: PrepareOptions, evaluation: np.ndarray | None) -> None:
    """Filters the documents of some sources, and writes the others and their hashes to a folder."""
    sources, target = job
    if (target / DONE).is_file():
        return
    # Renamed when it is complete: a task of a lost machine may still write the same part
    folder = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
    folder.mkdir(parents=True)
    try:
        _write_part(sources, folder, options, evaluation)
        os.rename(folder, target)
    except OSError:
        if not (target / DONE).is_file():
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_part(
    sources: Sequence[Source], folder: Path, options: PrepareOptions, evaluation: np.ndarray | None
) -> None:
    cleaner, removals, read, read_bytes = Cleaner(options, evaluation), _Removals(), 0, 0
    names = ["texts", "sizes", *(["hashes"] if options.dedup != "none" else [])]
    names += ["signatures"] if options.dedup == "near" else []
    names += ["lines", "line_counts"] if options.boilerplate else []
    waiting: list[str] = []
    pending = 0  # characters in waiting
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in names}
        for given in (text for source in sources for text in whole_documents(source)):
            text, data = given, given.encode()
            read, read_bytes = read + 1, read_bytes + len(data)
            try:
                text = cleaner(given)
                if not text or text.isspace():
                    raise Removed("empty")
            except Removed as reason:
                removals.add(str(reason), text)
                continue
            data = data if text is given else text.encode()
            files["texts"].write(data)
            files["sizes"].write(len(data).to_bytes(8, "little"))
            if "hashes" in files:
                files["hashes"].write(hash_document(data))
            if "lines" in files:
                found = np.fromiter(hash_lines(text), np.uint64)
                found.tofile(files["lines"])
                files["line_counts"].write(len(found).to_bytes(4, "little"))
            if "signatures" in files:
                waiting.append(text)
                if (pending := pending + len(text)) >= BATCH:
                    signatures(waiting).astype("<u4").tofile(files["signatures"])
                    waiting, pending = [], 0
        if waiting:
            signatures(waiting).astype("<u4").tofile(files["signatures"])
    counts = {"read": read, "read_bytes": read_bytes} if read else {}
    about = {"counts": counts, "removed": removals.plain(), "changed": cleaner.changed}
    write_whole(folder / DONE, to_json(about))


def whole_documents(source: Source) -> Iterator[str]:
    """Raises UserError if one is too long for memory."""
    parts: list[str] = []
    length = 0
    for text, ends in source.pieces():
        parts.append(text)
        if (length := length + len(text)) > LONGEST:
            advice = "divide it (--separator, --lines), or prepare it without cleaning"
            raise UserError(f"{source.name} has a document of more than {LONGEST >> 20} million characters: {advice}")
        if ends:
            yield "".join(parts)
            parts, length = [], 0


def _stored(folder: Path) -> Iterator[tuple[int, str]]:
    sizes = np.fromfile(folder / "sizes", "<u8")
    with (folder / "texts").open("rb") as file:
        for number, size in enumerate(sizes.tolist()):
            yield number, file.read(size).decode()


# Step 2: decisions over all parts


def decide(folders: Sequence[Path], options: PrepareOptions, spool: Path) -> None:
    """Writes which documents of each part are kept, and the lines that are boilerplate."""
    counts = [(folder / "sizes").stat().st_size // 8 for folder in folders]
    borders = np.cumsum([0, *counts])
    total = int(borders[-1])
    first = np.arange(total)
    reasons = np.zeros(total, np.uint8)
    if options.dedup != "none":
        hashes = (np.fromfile(folder / "hashes", "<u8").reshape(-1, 2) for folder in folders)
        for later, earlier in exact_duplicates(hashes, total, spool):
            first[later], reasons[later] = earlier, 1
    if options.dedup == "near":
        found = near_duplicates(Signatures([folder / "signatures" for folder in folders]), spool)
        near = (found != np.arange(total)) & (reasons == 0)
        first[near], reasons[near] = found[near], 2
    for begin, end, folder in zip(borders[:-1], borders[1:], folders, strict=True):
        write_whole(folder / "kept", (reasons[begin:end] == 0).astype(np.uint8).tobytes())
    _describe_duplicates(folders, borders, first, reasons)
    if options.boilerplate:
        hot = [group for group in _common_lines(folders, options.boilerplate, spool) if len(group)]
        common = np.concatenate([*hot, np.empty(0, "<u8")]).astype("<u8")
        write_whole(spool / "boilerplate", common.tobytes())
        for folder in folders:
            _remove_emptied(folder, common)


def _common_lines(folders: Sequence[Path], least: int, spool: Path) -> Iterator[np.ndarray]:
    def records() -> Iterator[np.ndarray]:
        for folder in folders:
            counts, kept = np.fromfile(folder / "line_counts", "<u4"), np.fromfile(folder / "kept", np.uint8)
            yield np.fromfile(folder / "lines", "<u8")[np.repeat(kept, counts).astype(bool)].view(LINE)

    total = sum((folder / "lines").stat().st_size // 8 for folder in folders)
    for group in grouped(records(), LINE, total, spool):
        values, counts = np.unique(group["a"], return_counts=True)
        yield values[counts >= least]


def _without(text: str, common: set[int]) -> list[str]:
    """The lines of a text, without the common ones."""
    hashes = hash_lines(text)
    remove = {line for value, line in hashes.items() if value in common}
    return [line for line in text.split("\n") if line.strip() not in remove]


def _remove_emptied(folder: Path, common: np.ndarray) -> None:
    """Removes the documents of a part that consist of common lines. Writes how many documents and lines are removed."""
    counts, kept = np.fromfile(folder / "line_counts", "<u4"), np.fromfile(folder / "kept", np.uint8)
    is_common = np.isin(np.fromfile(folder / "lines", "<u8"), common)
    has_common = np.zeros(len(kept), bool)
    has_common[np.repeat(np.arange(len(kept)), counts)[is_common]] = True
    removals, lines, changed, values = _Removals(), 0, 0, set(common.tolist())
    for number, text in _stored(folder) if has_common.any() else ():
        if not kept[number] or not has_common[number]:
            continue
        left = _without(text, values)
        lines += text.count("\n") + 1 - len(left)
        if "".join(left).strip():
            changed += 1
        else:
            kept[number] = 0
            removals.add("only boilerplate", text)
    write_whole(folder / "kept", kept.tobytes())
    about = {"removed": removals.plain(), "changed": {"boilerplate": changed} if changed else {}, "lines": lines}
    write_whole(folder / BOILERPLATE, to_json(about))


def _describe_duplicates(folders: Sequence[Path], borders: np.ndarray, first: np.ndarray, reasons: np.ndarray) -> None:
    """Writes what was removed from each part as a duplicate, with examples."""
    wanted: dict[int, str] = {}
    for reason in (1, 2):
        for index in np.flatnonzero(reasons == reason)[:EXAMPLES].tolist():
            wanted |= {index: "", int(first[index]): ""}
    for begin, end, folder in zip(borders[:-1], borders[1:], folders, strict=True):
        inside = [index for index in wanted if begin <= index < end]
        starts = np.cumsum(np.r_[0, np.fromfile(folder / "sizes", "<i8")])
        with (folder / "texts").open("rb") as file:
            for index in inside:
                file.seek(starts[index - begin])
                wanted[index] = file.read(int(starts[index - begin + 1] - starts[index - begin])).decode()
    for begin, end, folder in zip(borders[:-1], borders[1:], folders, strict=True):
        sizes, removals = np.fromfile(folder / "sizes", "<u8"), _Removals()
        for reason, name in ((1, "exact duplicate"), (2, "near-duplicate")):
            chosen = np.flatnonzero(reasons[begin:end] == reason)
            if not len(chosen):
                continue
            removals.documents[name] = len(chosen)
            removals.bytes[name] = int(sizes[chosen].sum())
            shown = [index for index in (chosen + begin).tolist() if index in wanted][:EXAMPLES]
            like = [(wanted[index], wanted[int(first[index])]) for index in shown]
            removals.examples[name] = [f"{shorten(text)} [like: {shorten(other)}]" for text, other in like]
        write_whole(folder / DUPLICATES, to_json(removals.plain()))
