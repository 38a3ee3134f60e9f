"""Which text is for validation. One text is split by position, as in nanoGPT. Several documents are split by a hash of
each document, so that new documents move no other one. OpenWebText keeps nanoGPT's permutation."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..core.characters import TextScan
from ..errors import UserError
from .sources import Source

NAMED = 10  # empty sources


@dataclass
class Documents:
    """The documents of some sources, counted while they are read. separator: added at their ends if missing."""

    sources: list[Source]
    separator: str = ""
    count: int = 0
    characters: int = 0
    is_counted: bool = False  # the sources were read to the end
    position: int = 0  # bytes of the sources that were read, about

    def pieces(self, report: Callable[[str], None] | None = None) -> Iterator[tuple[int, str, bool]]:
        """(number of the document, text, ends) in order. report: receives the names of empty sources."""
        self.count = self.characters = self.position = begin = 0
        self.is_counted, ignored = False, 0
        for source in self.sources:
            before, characters, size = self.count, self.characters, source.size
            for text, ends in source.pieces():
                text += self.separator if ends and not text.endswith(self.separator) else ""
                yield self.count, text, ends
                self.count += ends
                self.characters += len(text)
                self.position = begin + min(size, self.characters - characters)
            self.position = begin = begin + size
            if self.count == before and not size:
                ignored += 1
                if report and len(self.sources) > 1 and ignored <= NAMED:
                    report(f"{source.name} is empty and ignored")
        if report and ignored > NAMED:
            report(f"{ignored - NAMED:,} more sources are empty and ignored")
        self.is_counted = True

    def scan(self) -> TextScan | None:
        """Of one text, if it was scanned when it was hashed."""
        scans: list[TextScan] = getattr(self.sources[0], "scans", [])
        return scans[0] if scans and scans[0].count and not self.may_be_many else None

    @property
    def may_be_many(self) -> bool:
        return len(self.sources) > 1 or self.sources[0].has_many


@dataclass
class Split:
    """How texts are divided between train and val."""

    by: Literal["files", "position", "hash", "permutation"]
    fraction: float
    seed: int
    several: bool = True  # documents, of which each ends with an end-of-text token
    border: int = 0  # position: the characters of train
    mask: np.ndarray | None = None  # permutation: the documents of val, (documents,) bool
    moved: int | None = None  # hash: the document that changes sides, because a split would be empty

    def apply(self, groups: list[Documents]) -> Iterator[tuple[str, str, bool]]:
        """(split, text, ends) of all pieces, each split in the order of the sources."""
        if self.by == "files":
            for split, group in zip(("train", "val"), groups, strict=True):
                yield from ((split, text, ends) for _, text, ends in group.pieces())
        elif self.by == "position":
            seen = 0
            for _, text, _ in groups[0].pieces():
                head = text[: max(0, self.border - seen)]
                yield "train", head, False
                yield "val", text[len(head) :], False
                seen += len(text)
        else:
            begins, is_val = True, False
            for number, text, ends in groups[0].pieces():
                if begins and self.mask is not None:
                    # a dataset may have more documents than its stated length
                    is_val = number < len(self.mask) and bool(self.mask[number])
                elif begins:
                    is_val = in_validation(hash_document(text, self.seed), self.fraction) != (number == self.moved)
                begins = ends
                yield "val" if is_val else "train", text, ends

    def describe(self) -> dict[str, Any]:
        """The entry of the manifest."""
        more = {} if self.by == "files" else {"val_fraction": self.fraction}
        return {"by": self.by} | more | ({"seed": self.seed} if self.by in ("hash", "permutation") else {})


def choose_split(
    groups: list[Documents], fraction: float, seed: int, permuted: bool, report: Callable[[str], None]
) -> Split:
    """The split of some sources: one group is divided, two are train and val. Reads no more than it needs. Raises
    UserError if the sources are empty, or too short to split."""
    if len(groups) == 2:
        several = [_has_several(group, report) for group in groups]  # of both: this also finds empty ones
        return Split("files", fraction, seed, any(several))
    documents = groups[0]
    if permuted:
        count = documents.sources[0].documents  # stated by the hub, which saves a pass over the network
        if not count:
            deque(documents.pieces(report), maxlen=0)
            count = documents.count
        if count > 1:
            return Split("permutation", fraction, seed, mask=val_documents(count, fraction, seed))
    hashes: list[int] = []
    if scan := documents.scan():
        documents.count, documents.characters, documents.is_counted = 1, scan.count, True
    if not (documents.is_counted and documents.count == 1):  # else the tokenizer's training has counted them
        begins, wanted = True, {False, True}
        for _, text, ends in documents.pieces(report):
            if begins and documents.may_be_many:
                hashes.append(hash_document(text, seed))
                wanted.discard(in_validation(hashes[-1], fraction))
            if len(hashes) > 1 and not wanted:
                return Split("hash", fraction, seed)
            begins = ends
    if not documents.count:
        raise empty(documents.sources)
    if documents.count == 1:
        border = int(documents.characters * (1 - fraction))
        if border == 0:
            deque(documents.pieces(), maxlen=0)  # raises UserError if it is not text
            name, size = documents.sources[0].name, documents.characters
            raise UserError(f"{name} is too short to split: {size} characters")
        return Split("position", fraction, seed, several=False, border=border)
    is_val = [in_validation(one, fraction) for one in hashes]
    moved = int(np.flatnonzero(choose_by_hash(hashes, fraction) != is_val)[0])
    return Split("hash", fraction, seed, moved=moved)


def _has_several(group: Documents, report: Callable[[str], None]) -> bool:
    """Whether there is more than one document. Raises UserError if there is none."""
    if not group.is_counted:
        for number, _, _ in group.pieces(report):
            if number or not group.may_be_many:
                return number > 0
    if not group.count:
        raise empty(group.sources)
    return group.count > 1


def hash_document(text: str, seed: int) -> int:
    """64 bits of a hash of the seed and a document's first piece: all of a document below readers.PIECE characters."""
    digest = hashlib.sha256(b"%d " % seed)
    digest.update(text.removesuffix("\n").encode("utf-8", "replace"))  # the same with and without a separator
    return int.from_bytes(digest.digest()[:8], "big")


def in_validation(document_hash: int, fraction: float) -> bool:
    return document_hash < fraction * 2**64


def choose_by_hash(hashes: Sequence[int], fraction: float) -> np.ndarray:
    """The mask of the validation documents, (documents,) bool: by their hashes, but at least one in each split."""
    mask = np.array([in_validation(one, fraction) for one in hashes], bool)
    if not mask.any() or mask.all():
        extreme = hashes.index(max(hashes) if mask.any() else min(hashes))
        mask[extreme] = not mask[extreme]
    return mask


def val_documents(count: int, fraction: float, seed: int) -> np.ndarray:
    """The mask of the validation documents, (count,) bool: the first of a seeded permutation, as in nanoGPT
    (train_test_split of the library datasets)."""
    chosen = min(max(math.ceil(count * fraction), 1), count - 1)
    mask = np.zeros(count, dtype=bool)
    mask[np.random.default_rng(seed).permutation(count)[:chosen]] = True
    return mask


def empty(sources: list[Source]) -> UserError:
    names = ", ".join(source.name for source in sources[:3])
    return UserError(f"{names} {'is' if len(sources) == 1 else 'are'} empty: expected text to prepare")
