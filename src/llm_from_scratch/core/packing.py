"""Documents as the units of training: which there are, and how they are packed into rows.

Every row begins with a document. A document fills one position less than it has tokens, because its first token is not
predicted. Tokens of other documents are kept apart by the attention mask (Documents in cache.py), so what shares a row
does not matter: documents are packed once, best fit decreasing, and an epoch is a new order of the rows.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError, UserError
from .dataset import SampleOrder, TokenData
from .remote import RemoteFile
from .tokenfile import BLOCK, Shards, TokenFile, document_ends, read_manifest
from .tokenizer import Tokenizer

LEARNED, BEGINS = 1, 2  # bits of a token's mark: the model learns to write it; a document begins with it
GROUP = 1 << 16  # documents that are packed together, which bounds time and memory
IN_MEMORY = 1 << 28  # bytes of a split up to which its tokens are kept in memory
SHOWN = 400  # characters of an example
SEEN, FEWEST = 1 << 14, 100  # tokens in which samples of a line each are looked for, and how many there must be


class PackedData(TokenData):
    """A split of a dataset as rows of whole documents. Long documents are cut into pieces that overlap by one token, so
    that every token is predicted; of long conversations only the beginning is used."""

    is_packed, of_pairs = True, False

    def __init__(
        self, shards: Shards, name: str, block_size: int, end_id: int | None = None, marks: Shards = (),
        ends: np.ndarray | None = None,
    ):  # fmt: skip
        """end_id: the id that ends a document. ends: where documents end instead. marks: one for each token instead, as
        in conversations."""
        super().__init__(shards, name)
        self.marks, self.block_size = marks, block_size
        begins, ends = self.find_documents(end_id) if ends is None else (np.concatenate([[0], ends[:-1]]), ends)
        self.documents, self.cropped, self.cut = len(begins), 0, 0
        if marks:
            lengths = np.minimum(ends - begins, block_size + 1)
            self.cropped = int((ends - begins - lengths).sum())
            counts = self._count_learned(begins, lengths)
            used = counts > 0
            begins, lengths, counts = begins[used], lengths[used], counts[used]
        else:
            self.cut = int((ends - begins > block_size + 1).sum())
            begins, lengths = _pieces(begins, ends, block_size)
            counts = lengths - 1
        if not len(begins):
            what = f"a token of the assistant in its first {block_size + 1} tokens" if marks else "two tokens"
            raise UserError(f"{name}: no document has {what}; use a larger --block_size or other data")
        order, first = best_fit(lengths - 1, block_size)
        self.begins, self.lengths, self.first = begins[order], lengths[order], first
        self.learned = np.add.reduceat(counts[order], first[:-1])  # targets of each row
        self.keep_in_memory()

    def keep_in_memory(self) -> None:
        self.tokens: np.ndarray | None = None
        self.token_marks: np.ndarray | None = None
        if sum(shard.nbytes for shard in self.shards) <= IN_MEMORY:
            self.tokens = _all(self.shards)
            self.token_marks = _all(self.marks) if self.marks else None

    @classmethod
    def of(cls, data: TokenData, folder: Path, split: str, block_size: int, tokenizer: Tokenizer | None) -> PackedData:
        """The documents of a prepared split. Raises UserError if their ends are not known."""
        manifest = read_manifest(folder) or {}
        if cls.of_pairs != (manifest.get("units") == "preferences"):
            what = "no pairs of answers, which --loss=dpo needs"
            what = what if cls.of_pairs else "pairs of answers, which only llm-train --loss=dpo reads"
            raise UserError(f"{folder} holds {what}")
        if stated := manifest.get("splits", {}).get(split, {}).get("marks"):
            return cls(data.shards, data.name, block_size, marks=open_marks(folder, stated, data.shards))
        if (ends := document_ends(data.shards)) is not None:
            return cls(data.shards, data.name, block_size, ends=ends)
        end_id = manifest.get("document_end", None if tokenizer is None else tokenizer.eot_id)
        if type(end_id) is not int:
            ways = "prepare the text with --lines=True (a document per line), or with a tokenizer that has such a token"
            raise UserError(f"{folder}: the documents do not end with an end-of-text token: {ways}")
        return cls(data.shards, data.name, block_size, end_id)

    def __hash__(self) -> int:
        return id(self)

    def check(self, block_size: int, vocab_size: int | None, remember: bool = True) -> Any:
        return super().check(1, vocab_size, remember)

    def order(self, block_size: int, kind: Literal["random", "shuffled"], stride: int | None, seed: int) -> SampleOrder:
        """The order of the rows, which are numbered from 0."""
        return SampleOrder(len(self.learned) + 1, 1, kind, None, seed)

    @property
    def positions(self) -> int:
        return len(self.learned) * self.block_size

    def batch(
        self, starts: np.ndarray, block_size: int, share: slice, processes: int = 1, vocab_size: int | None = None
    ) -> list[np.ndarray]:
        """The rows with the numbers starts[share], as rows() returns them; and each row's share in the loss of the
        global batch."""
        return [*self.rows(starts[share]), shares_of(self.learned, starts, share, processes)]

    def rows(self, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows with these numbers: inputs and targets (2, B, T), -1 if not learned; and the number of the
        document at each position, (B, T)."""
        tokens = np.zeros((2, len(mine), self.block_size), np.int64)
        tokens[1] = -1
        numbers = np.zeros((len(mine), self.block_size), np.int64)
        first, last = self.first[mine], self.first[mine + 1]
        count = last - first
        pieces = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())  # of all rows, in order
        lengths = self.lengths[pieces]
        ids, marks = self._read(self.begins[pieces], lengths)
        row = np.repeat(np.repeat(np.arange(len(mine)), count), lengths - 1)
        number = np.repeat(np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count), lengths - 1)
        filled = np.bincount(row, minlength=len(mine))
        column = np.arange(len(row)) - np.repeat(np.cumsum(filled) - filled, filled)
        ends = np.cumsum(lengths)
        is_input, is_target = np.ones(len(ids), bool), np.ones(len(ids), bool)
        is_input[ends - 1] = is_target[ends - lengths] = False
        targets = ids[is_target]
        if marks is not None:
            targets = np.where(marks[is_target] & LEARNED, targets, -1)
        numbers += count[:, None]  # padding is apart from the documents
        tokens[0, row, column], tokens[1, row, column], numbers[row, column] = ids[is_input], targets, number
        return tokens, numbers

    def _read(self, begins: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The tokens of some documents, one after the other, int64, and their marks."""
        if self.tokens is not None:
            at = np.arange(lengths.sum()) + np.repeat(begins - np.cumsum(lengths) + lengths, lengths)
            return self.tokens[at].astype(np.int64), None if self.token_marks is None else self.token_marks[at]
        each = list(zip(begins.tolist(), lengths.tolist(), strict=True))
        none = np.zeros(0, np.int64)  # what no documents hold
        ids = np.concatenate([none, *(self.windows(np.array([begin]), length)[0] for begin, length in each)])
        if not self.marks:
            return ids, None
        marks = TokenData(self.marks, self.name)
        return ids, np.concatenate([none, *(marks.windows(np.array([begin]), length)[0] for begin, length in each)])

    def find_documents(self, end_id: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents begin and end."""
        found = [np.zeros(1, np.int64)]
        for at, part in _parts(self.marks or self.shards):
            found.append(at + np.flatnonzero(part & BEGINS if self.marks else part == end_id) + (not self.marks))
        edges = np.unique(np.concatenate([*found, [len(self)]]))
        return edges[:-1], edges[1:]

    def _count_learned(self, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The learned tokens of each document, without its first and any beyond its length."""
        counts = np.zeros(len(begins), np.int64)
        for at, part in _parts(self.marks):
            places = at + np.flatnonzero(part & LEARNED)
            which = np.searchsorted(begins, places, side="right") - 1
            inside = (places > begins[which]) & (places < begins[which] + lengths[which])
            np.add.at(counts, which[inside], 1)
        return counts

    def summary(self) -> str:
        """The result of packing, in one line."""
        targets, used = int(self.learned.sum()), int((self.lengths - 1).sum())
        parts = [f"{self.documents:,} documents in {len(self.learned):,} windows of {self.block_size}"]
        parts.append(f"{1 - used / self.positions:.1%} of positions are padding")
        if self.marks:
            parts.append(f"{targets / used:.0%} of the tokens count in the loss")
            parts.append(f"{self.cropped / (used + self.cropped):.1%} are cropped (--block_size)")
        if self.cut:
            parts.append(f"{self.cut:,} longer documents are split, and nothing is cropped")
        return ", ".join(parts)

    def prompt(self, place: float) -> np.ndarray:
        """The tokens of a conversation before the learned ones. place: which one, from 0 to 1."""
        at = slice(int(place * len(self.begins)), int(place * len(self.begins)) + 1)
        ids, marks = self._read(self.begins[at], self.lengths[at])
        return ids if marks is None else ids[: np.argmax(marks & LEARNED)]

    def example(self, tokenizer: Tokenizer) -> str:
        """The first document of the first row, as marked() shows it."""
        (_, targets), numbers, *_ = self.batch(np.zeros(1, np.int64), self.block_size, slice(0, 1), 1)
        begin, count = int(self.begins[0]), int((numbers[0] == 0).sum())
        ids, _ = self._read(np.array([begin]), np.array([count + 1]))
        return marked(tokenizer, ids, np.concatenate([[False], targets[0, :count] >= 0]))


def shares_of(learned: np.ndarray, starts: np.ndarray, share: slice, processes: int) -> np.ndarray:
    """The share of the rows starts[share] in the loss of the global batch, (B,), times the number of processes, as
    gradients are averaged. learned: the targets of each row."""
    total = max(1, int(learned[starts].sum()))  # 0 of no rows: an evaluation has fewer than processes
    return (learned[starts[share]] * (processes / total)).astype(np.float32)


def short_documents(data: TokenData, folder: Path, block_size: int, tokenizer: Tokenizer | None = None) -> str | None:
    """The advice for documents that are short compared with the windows, as far as it is known where they end. With a
    tokenizer, also for lines that look like samples of their own."""
    end_id = (read_manifest(folder) or {}).get("document_end")
    if (ends := document_ends(data.shards)) is not None:
        count, tokens = len(ends), len(data)
    elif type(end_id) is int:
        first = np.asarray(data.shards[0][:BLOCK])
        count, tokens = int((first == end_id).sum()), len(first)
    else:
        return _short_lines(data, folder, block_size, tokenizer) if tokenizer is not None else None
    if count * block_size < 2 * tokens:
        return None
    return (
        f"note: the documents of {folder} have about {tokens / count:,.0f} tokens, and windows of {block_size} mix "
        "them: to train on each document separately, add --documents=True"
    )


def _short_lines(data: TokenData, folder: Path, block_size: int, tokenizer: Tokenizer) -> str | None:
    """Lines of prose and of programs have blank lines or indented ones between them."""
    ids = np.asarray(data.shards[0][:SEEN])
    if ids.max(initial=0) >= tokenizer.vocab_size:
        return None
    lines = tokenizer.decode(ids).split("\n")[1:-1]  # the first and the last one may be cut
    size = len(ids) / max(1, len(lines))
    if len(lines) < FEWEST or 2 * size > block_size or any(line[:1].isspace() or not line for line in lines):
        return None
    return (
        f"note: the lines of {folder} have about {size:,.0f} tokens, and windows of {block_size} mix them: if each "
        "line is a separate sample, prepare the text with llm-prepare --lines=True"
    )


def in_units(
    data: TokenData, split: str, block_size: int, tokenizer: Tokenizer | None, documents: bool | None = None
) -> TokenData:
    """A split as packed documents, or unchanged. documents: whether to pack them; None: if it was prepared as documents
    (conversations, lines)."""
    first = data.shards[0]
    folder = first.path.parent if isinstance(first, TokenFile) else None
    if folder is None or documents is False:
        return data
    if documents is None and (read_manifest(folder) or {}).get("units") is None:
        return data
    return PackedData.of(data, folder, split, block_size, tokenizer)


def marked(tokenizer: Tokenizer, ids: np.ndarray, learned: np.ndarray) -> str:
    """The end of a text on one line, with what is learned in >> and <<."""
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    texts = [tokenizer.decode(ids[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    text = "".join(f">>{text}<<" if learned[a] else text for a, text in zip(edges, texts, strict=False))
    return json.dumps(text, ensure_ascii=False)[1:-1][-SHOWN:]


def open_marks(folder: Path, stated: list[dict[str, Any]], shards: Shards) -> Sequence[TokenFile]:
    """The files of a split's marks. Raises UserError if they do not belong to its tokens."""
    first, marks = shards[0], list[TokenFile]()
    if isinstance(first, RemoteFile):
        marks = [RemoteFile(first.cache, entry, "u1") for entry in stated]
    else:
        marks = [TokenFile(folder / Path(entry["file"]).name, "u1") for entry in stated]
    if sum(map(len, marks)) != sum(map(len, shards)):
        raise DataError(f"{folder}: the loss mask does not match the tokens; prepare the data again")
    return marks


def _all(shards: Shards) -> np.ndarray:
    return np.concatenate([np.asarray(shard[0 : len(shard)]) for shard in shards])


def _parts(shards: Shards) -> Any:
    """(number of the first token, tokens) of bounded parts."""
    start = 0
    for shard in shards:
        for begin in range(0, len(shard), BLOCK):
            yield start + begin, np.asarray(shard[begin : begin + BLOCK])
        start += len(shard)


def _pieces(begins: np.ndarray, ends: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Begins and lengths of pieces of at most block_size + 1 tokens that predict every token of the documents but the
    first."""
    predicted = ends - begins - 1
    count = -(-predicted // block_size)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    starts = np.repeat(begins, count) + number * block_size
    return starts, np.minimum(np.repeat(ends, count) - starts, block_size + 1)


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs items into rows of a capacity: the largest first, each into the fullest row that has room. Returns the
    items in the order of their rows, and where each row begins in it, with the end."""
    order, counts = [], [np.zeros(1, np.int64)]
    for start in range(0, len(sizes), GROUP):
        group = sizes[start : start + GROUP]
        made: list[list[int]] = []
        with_room: dict[int, list[int]] = {}  # room: the rows that have it
        rooms: list[int] = []  # the keys, sorted
        for item in np.argsort(-group, kind="stable").tolist():
            size = int(group[item])
            at = bisect.bisect_left(rooms, size)
            if at == len(rooms):
                row, room = len(made), capacity
                made.append([])
            else:
                room = rooms[at]
                row = with_room[room].pop()
                if not with_room[room]:
                    del with_room[room], rooms[at]
            made[row].append(start + item)
            if left := room - size:
                if left not in with_room:
                    bisect.insort(rooms, left)
                with_room.setdefault(left, []).append(row)
        order.append(np.fromiter((item for row in made for item in row), np.int64))
        counts.append(np.array([len(row) for row in made]))
    return np.concatenate(order), np.cumsum(np.concatenate(counts))
