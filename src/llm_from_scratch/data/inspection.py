"""The contents of a prepared dataset: counts, vocabulary, lengths, duplicates, integrity, and random windows."""

from __future__ import annotations

import hashlib
import html
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.dataset import TokenData
from ..core.packing import BEGINS, open_marks
from ..core.remote import RemoteFile, source_of
from ..core.tokenfile import BLOCK, MANIFEST, Shards, read_manifest
from ..core.tokenizer import Tokenizer, tokenizer_of
from ..errors import UserError
from .duplicates import exact_duplicates
from .page import bars, page, quotes, table

PARTS, SAMPLE = 10, 1 << 14  # parts of a split; tokens of each that are decoded
COMMON = 10  # tokens that are shown


@dataclass
class SplitReport:
    tokens: int
    text_bytes: int | None
    files: int
    used: int  # ids of the vocabulary that occur
    common: list[tuple[str, int]]
    bytes_per_token: list[float]  # of each part
    lengths: dict[str, int] = field(default_factory=dict)  # documents by length in tokens
    documents: int = 0
    longest: int = 0
    median: int = 0
    duplicates: int = 0
    windows: list[str] = field(default_factory=list)


@dataclass
class Inspection:
    name: str
    facts: dict[str, str]
    splits: dict[str, SplitReport]
    problems: list[str]
    shared: int | None  # validation documents that are also in training


def inspect_dataset(folder: Path, windows: int, length: int, seed: int, duplicates: bool) -> Inspection:
    """Reads every token. Raises UserError if the folder is not a dataset."""
    manifest, tokenizer = read_manifest(folder) or {}, tokenizer_of(folder)
    if tokenizer is None:
        tokenizer = Tokenizer.from_name("gpt2")  # nanoGPT's data without meta.pkl
    splits, hashes = dict[str, SplitReport](), dict[str, np.ndarray]()
    problems = [] if source_of(folder) else _damaged(folder, manifest)
    for split in ("train", "val"):
        entry = manifest.get("splits", {}).get(split, {})
        try:
            data = TokenData.open(folder, split)
            marks = open_marks(folder, entry["marks"], data.shards) if entry.get("marks") else ()
            problems += _damaged_downloads([*data.shards, *marks])
        except UserError as error:
            problems.append(str(error))
            continue
        end = manifest.get("document_end", tokenizer.eot_id)
        report, outside = _count(data, tokenizer, entry)
        if outside:
            problems.append(f"{split}: {outside:,} ids are outside the vocabulary of {tokenizer.vocab_size:,}")
        if marks or end is not None:
            hashes[split] = _documents(data.shards, marks, end, report, duplicates)
        rng = np.random.default_rng(seed)
        for _ in range(windows):
            at = int(rng.integers(0, max(1, len(data) - length + 1)))
            ids = data.windows(np.array([at]), min(length, len(data)))[0]
            if ids.max() < tokenizer.vocab_size:
                report.windows.append(tokenizer.decode(ids))
        splits[split] = report
    if not splits:
        raise UserError(problems[0])
    shared = None
    if duplicates and len(hashes) == 2:
        shared = int(np.isin(hashes["val"][:, 0], hashes["train"][:, 0]).sum())
    facts = {"tokenizer": tokenizer.name, "vocabulary": f"{tokenizer.vocab_size:,}"}
    facts |= {key: str(manifest[key]) for key in ("dtype", "units") if key in manifest}
    facts["integrity"] = "; ".join(problems) or ("hashes agree" if manifest else f"no {MANIFEST} to compare with")
    return Inspection(folder.as_posix(), facts, splits, problems, shared)


def _damaged(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Files with other content than the manifest states."""
    found = []
    for entry in manifest.get("splits", {}).values():
        for shard in [*entry["shards"], *entry.get("marks", [])]:
            path, digest = folder / Path(shard["file"]).name, hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                found.append(f"{path.name}: {error.strerror}")
                continue
            if digest.hexdigest() != shard.get("sha256", digest.hexdigest()):
                found.append(f"{path.name} does not match its hash: prepare the data again")
    return found


def _damaged_downloads(shards: Shards) -> list[str]:
    """The same for the shards of a dataset in an object store, which are downloaded."""
    found = []
    for shard in shards:
        if isinstance(shard, RemoteFile):
            digest = hashlib.sha256()
            for begin in range(0, len(shard), BLOCK):
                digest.update(shard[begin : begin + BLOCK].tobytes())
            if digest.hexdigest() != shard.sha256:
                found.append(f"{shard.path} does not match its hash: delete it to download it again")
    return found


def _blocks(shards: Shards) -> Iterator[np.ndarray]:
    for shard in shards:
        for begin in range(0, len(shard), BLOCK):
            yield shard[begin : begin + BLOCK]


def _count(data: TokenData, tokenizer: Tokenizer, entry: dict[str, Any]) -> tuple[SplitReport, int]:
    """The counts of a split, and how many ids are outside the vocabulary."""
    counts, outside = np.zeros(tokenizer.vocab_size, np.int64), 0
    for block in _blocks(data.shards):
        inside = block[block < len(counts)]
        outside += len(block) - len(inside)
        counts += np.bincount(inside, minlength=len(counts))
    order = np.argsort(-counts, kind="stable")[:COMMON]
    common = [(tokenizer.decode([int(i)]), int(counts[i])) for i in order if counts[i]]
    starts = np.linspace(0, len(data), PARTS + 1).astype(int)
    rates = []
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        size = min(SAMPLE, int(end - begin))
        if size and not outside:
            ids = data.windows(np.array([int(begin)]), size)[0]
            rates.append(len(tokenizer.decode_bytes(ids)) / size)
    used = int((counts > 0).sum())
    return SplitReport(len(data), entry.get("bytes"), len(data.shards), used, common, rates), outside


def _documents(shards: Shards, marks: Shards, end: int | None, report: SplitReport, duplicates: bool) -> np.ndarray:
    """Adds what is known of the documents to the report. Returns their hashes, (n, 2) uint64, without the end token;
    none unless duplicates are wanted."""
    lengths, hashes, digest, length = array("q"), bytearray(), hashlib.blake2b(digest_size=16), 0
    for ids, edges in _with_edges(shards, marks, end):
        last = 0
        for edge in [*edges.tolist(), None]:
            part = ids[last:edge]
            length += len(part)
            if duplicates:
                digest.update(part.tobytes())
            if edge is not None and length:
                lengths.append(length)
                hashes += digest.digest()
                digest, length, last = hashlib.blake2b(digest_size=16), 0, edge
    if length:
        lengths.append(length)
        hashes += digest.digest()
    sizes = np.array(lengths, np.int64)
    report.documents, report.longest, report.median = len(sizes), int(sizes.max()), int(np.median(sizes))
    powers = np.bincount(np.floor(np.log2(sizes)).astype(int))
    first = int(np.flatnonzero(powers)[0])
    report.lengths = {f"{1 << k:,} to {(2 << k) - 1:,}": int(powers[k]) for k in range(first, len(powers))}
    found = np.frombuffer(bytes(hashes), "<u8").reshape(-1, 2) if duplicates else np.empty((0, 2), "<u8")
    with tempfile.TemporaryDirectory(prefix="llm-inspect-") as spool:
        later = exact_duplicates([found], len(found), Path(spool)) if len(found) else []
        report.duplicates = sum(len(indices) for indices, _ in later)
    return found


def _with_edges(shards: Shards, marks: Shards, end: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of ids, and the positions in them where a document ends or begins."""
    if not marks:
        for ids in _blocks(shards):
            yield ids, np.flatnonzero(ids == end) + 1
        return
    for ids, mark in zip(_blocks(shards), _blocks(marks), strict=True):
        yield ids, np.flatnonzero(mark & BEGINS)


def as_text(found: Inspection) -> list[str]:
    lines = [f"{found.name}: " + ", ".join(f"{key} {value}" for key, value in found.facts.items())]
    for split, report in found.splits.items():
        lines += ["", f"{split}: {_sizes(report)}"]
        rates = " ".join(f"{rate:.2f}" for rate in report.bytes_per_token)
        lines.append(f"  bytes per token in each tenth of the split: {rates}")
        lines.append("  most common: " + " ".join(f"{token!r}" for token, _ in report.common))
        most = max(report.lengths.values(), default=1)
        if report.documents:
            lines.append(f"  documents: {_documents_of(report)}; by length in tokens:")
            for name, count in report.lengths.items():
                lines.append(f"  {name:>24} {'#' * -(-40 * count // most):<40} {count:,}")
        lines += [f"  window: {window!r}" for window in report.windows]
    if found.shared is not None:
        lines += ["", f"validation documents that are also in training: {found.shared:,}"]
    return lines


def _sizes(report: SplitReport) -> str:
    size = f", {report.text_bytes:,} bytes of text" if report.text_bytes is not None else ""
    return f"{report.tokens:,} tokens{size}, {report.files} files, {report.used:,} ids of the vocabulary used"


def _documents_of(report: SplitReport) -> str:
    return (
        f"{report.documents:,}, median {report.median:,} tokens, longest {report.longest:,}, "
        f"{report.duplicates:,} exact duplicates"
    )


def as_page(found: Inspection) -> str:
    body = table(("", ""), found.facts.items())
    if found.shared is not None:
        body += f"<p>Validation documents that are also in training: {found.shared:,}</p>"
    for split, report in found.splits.items():
        body += f"<h2>{html.escape(split)}</h2><p>{_sizes(report)}</p>"
        body += "<h3>Bytes per token in each tenth of the split</h3>"
        body += table(
            [str(k + 1) for k in range(len(report.bytes_per_token))],
            [[f"{rate:.2f}" for rate in report.bytes_per_token]],
        )
        if report.documents:
            body += f"<h3>Documents by length in tokens</h3><p>{_documents_of(report)}</p>{bars(report.lengths)}"
        body += f"<h3>Most common tokens</h3>{bars({repr(token): count for token, count in report.common})}"
        body += f"<h3>Random windows</h3>{quotes(report.windows)}"
    return page(f"Dataset {found.name}", body)
