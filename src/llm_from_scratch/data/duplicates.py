"""Duplicates among any number of documents: records with a hash are grouped on disk, so that memory is bounded."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..machine.extras import missing
from .hashes import runs_of_words

SHINGLE = 3  # words; of a document with a fifth of its words changed, half of the runs are left
FEWEST = 10  # runs; a shorter document has near-duplicates by chance
BANDS, ROWS = 42, 3  # two documents are compared if ROWS numbers of a band are equal
NUMBERS = BANDS * ROWS  # of a signature
SIMILAR = 0.25  # estimated share of common runs
NEIGHBORS = 4  # documents of a group, before each one, that it is compared with
SEED = 1
MEMORY = 256 << 20  # bytes of records that are sorted at once

EXACT = np.dtype([("a", "<u8"), ("b", "<u8"), ("index", "<u8")])
BAND = np.dtype([("a", "<u8"), ("index", "<u8")])


def signatures(texts: Sequence[str]) -> np.ndarray:
    """The MinHash signature of each text, (len(texts), NUMBERS) uint32; zeros if a text has too few words."""
    try:
        import rensa
    except ImportError:
        raise missing("rensa", "clean", "--dedup=near: signatures of documents", "use --dedup=exact") from None
    runs, counts = runs_of_words(texts, SHINGLE)
    ends = np.r_[0, np.cumsum(counts)].astype(np.uint64)
    rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(runs, ends, NUMBERS, SEED).to_rows()
    numbers = itertools.chain.from_iterable(rows)  # np.array(rows) takes twice as long
    found = np.fromiter(numbers, np.uint32, len(texts) * NUMBERS).reshape(len(texts), NUMBERS)
    found[counts < FEWEST] = 0
    return found


def grouped(records: Iterable[np.ndarray], dtype: np.dtype, total: int, folder: Path) -> Iterator[np.ndarray]:
    """`total` records, sorted, in arrays of about MEMORY bytes. Equal hashes are in the same array."""
    count = -(-total * dtype.itemsize // MEMORY)
    if count <= 1:
        parts = list(records)
        if parts:
            yield _sorted(np.concatenate(parts))
        return
    with tempfile.TemporaryDirectory(prefix="sorting-", dir=folder) as spool:
        files = [(Path(spool) / str(number)).open("wb") for number in range(count)]
        for part in records:
            bucket = part["a"] % np.uint64(count)
            order = np.argsort(bucket, kind="stable")
            borders = np.searchsorted(bucket[order], np.arange(count + 1))
            for number in np.flatnonzero(np.diff(borders)):
                part[order[borders[number] : borders[number + 1]]].tofile(files[number])
        for file in files:
            file.close()
            found = np.fromfile(file.name, dtype)
            Path(file.name).unlink()
            yield _sorted(found)


def _sorted(records: np.ndarray) -> np.ndarray:
    """By hash. Records with equal hashes keep the order of the documents."""
    names = [name for name in records.dtype.names or () if name != "index"]
    return records[np.lexsort([records[name] for name in reversed(names)])]


def exact_duplicates(hashes: Iterable[np.ndarray], total: int, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices of documents, index of the first equal one) of all but the first. hashes: (n, 2) uint64 arrays of
    consecutive documents."""

    def records() -> Iterator[np.ndarray]:
        at = 0
        for part in hashes:
            found = np.empty(len(part), EXACT)
            found["a"], found["b"], found["index"] = part[:, 0], part[:, 1], np.arange(at, at + len(part))
            at += len(part)
            yield found

    for group in grouped(records(), EXACT, total, folder):
        is_new = np.r_[True, (group["a"][1:] != group["a"][:-1]) | (group["b"][1:] != group["b"][:-1])]
        first = group["index"][np.maximum.accumulate(np.where(is_new, np.arange(len(group)), 0))]
        yield group["index"][~is_new], first[~is_new]


class Signatures:
    """The signatures of all documents, in files of consecutive documents. One file is open at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        sizes = [file.stat().st_size // (4 * NUMBERS) for file in files]
        self.files = files
        self.borders = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.borders[-1])

    def _part(self, number: int) -> np.ndarray:
        size = int(self.borders[number + 1] - self.borders[number])
        if not size:
            return np.empty((0, NUMBERS), "<u4")
        return np.memmap(self.files[number], "<u4", "r", shape=(size, NUMBERS))

    def at(self, indices: np.ndarray) -> np.ndarray:
        found = np.empty((len(indices), NUMBERS), np.uint32)
        parts = np.searchsorted(self.borders, indices, side="right") - 1
        for number in np.unique(parts).tolist():
            here = parts == number
            found[here] = self._part(number)[indices[here] - self.borders[number]]
        return found

    def band(self, number: int, size: int = 1 << 16) -> Iterator[np.ndarray]:
        """The records of a band: a hash of its numbers, and the document."""
        for file in range(len(self.files)):
            begin, part = int(self.borders[file]), self._part(file)
            for at in range(0, len(part), size):
                numbers = part[at : at + size, number * ROWS : (number + 1) * ROWS].astype(np.uint64)
                has_words = numbers.any(axis=1)
                value = np.zeros(len(numbers), np.uint64)
                for column in numbers.T:
                    value = (value ^ column) * np.uint64(0x9E3779B97F4A7C15)
                    value ^= value >> np.uint64(29)
                record = np.empty(len(numbers), BAND)
                record["a"], record["index"] = value, np.arange(begin + at, begin + at + len(numbers))
                yield record[has_words]


def near_duplicates(signatures: Signatures, folder: Path) -> np.ndarray:
    """For each document, the first one of its group of similar documents, (n,) int64; itself if it is the first."""
    first = np.arange(len(signatures))
    for number in range(BANDS):
        for group in grouped(signatures.band(number), BAND, len(signatures), folder):
            for shift in range(1, NEIGHBORS + 1):
                same = np.flatnonzero(group["a"][shift:] == group["a"][:-shift])
                pairs = group["index"][np.stack([same, same + shift])].astype(np.int64)
                pairs = pairs[:, first[pairs[0]] != first[pairs[1]]]
                for at in range(0, pairs.shape[1], 1 << 15):
                    _join(first, pairs[:, at : at + (1 << 15)], signatures)
    return first


def _join(first: np.ndarray, pairs: np.ndarray, signatures: Signatures) -> None:
    """Merges the groups of similar pairs."""
    equal = signatures.at(pairs[0]) == signatures.at(pairs[1])
    pairs = pairs[:, equal.mean(axis=1) >= SIMILAR]
    while pairs.shape[1]:
        roots = first[pairs]
        low, high = roots.min(axis=0), roots.max(axis=0)
        np.minimum.at(first, high, low)
        while (first[first] != first).any():
            first[:] = first[first]
        pairs = pairs[:, first[pairs[0]] != first[pairs[1]]]
