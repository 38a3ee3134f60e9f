"""The files of ids of a dataset: numbered shards, written so that an interrupted run can continue."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.tokenizer import Tokenizer
from .fast_bpe import FastTokenizer
from .hashes import FileHash

BLOCK = 1 << 24  # ids that are converted at once
LARGE = 1 << 28  # tokens of a split
SYNC_EVERY = 1 << 26  # bytes


@dataclass
class ShardWriter:
    """Appends the ids of one split to numbered files of at most `size` tokens."""

    folder: Path
    split: str
    size: int
    dtype: np.dtype
    tokens: int = 0
    text_bytes: int = 0
    done: list[dict[str, Any]] = field(default_factory=list)
    _file: Any = None
    _unsynced: int = 0
    _synced: Future[None] | None = None
    _syncing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def append(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._file is None:
                self._file, self._hash = self._path(len(self.done)).open("wb"), FileHash()
            part = np.ascontiguousarray(ids[: self.size - self.tokens % self.size], dtype=self.dtype)
            self._hash.update(part.data)
            self._file.write(part.data)
            self._begin_sync(len(part) * part.itemsize)
            self.tokens += len(part)
            ids = ids[len(part) :]
            if self.tokens % self.size == 0:
                self._end_shard()

    def _begin_sync(self, size: int) -> None:
        """A thread writes what is new to the disk, so that the last fsync has little left to wait for."""
        self._unsynced += size
        if self._unsynced >= SYNC_EVERY and (self._synced is None or self._synced.done()):
            self._end_sync()
            self._synced, self._unsynced = self._syncing.submit(os.fsync, self._file.fileno()), 0

    def _end_sync(self) -> None:
        before, self._synced = self._synced, None
        if before is not None:
            before.result()

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}_{number:06d}.bin"

    def _entry(self) -> dict[str, Any]:
        tokens = self.tokens - self.size * len(self.done)
        return {"file": Path(self._file.name).name, "tokens": tokens, "sha256": self._hash.hexdigest()}

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        self._end_sync()
        os.fsync(self._file.fileno())
        self._file.close()
        self.done.append(self._entry())
        self._file = None

    def state(self) -> dict[str, Any]:
        """The argument of restore(): the files with their hashes. The last one may be incomplete."""
        if self._file is not None:
            self._file.flush()
        shards = [*self.done, *([self._entry()] if self._file is not None else [])]
        return {"tokens": self.tokens, "bytes": self.text_bytes, "shards": shards}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the tokens of an earlier state. Raises ValueError if its files have changed."""
        if self._file is not None:
            self._end_sync()
            self._file.close()
        self.tokens, self.text_bytes, self.done, self._file = state["tokens"], state["bytes"], [], None
        for number, shard in enumerate(state["shards"]):
            self._file, self._hash = self._path(number).open("r+b"), FileHash()
            left = shard["tokens"] * self.dtype.itemsize
            while left and (block := self._file.read(min(left, 1 << 20))):
                self._hash.update(block)
                left -= len(block)
            if left or self._hash.hexdigest() != shard["sha256"]:
                raise ValueError(f"{shard['file']} has changed")
            self._file.truncate()
            if shard["tokens"] == self.size:
                self._file.close()
                self._file = None
                self.done.append(shard)

    def finish(self) -> None:
        """Closes the files."""
        self._end_shard()
        number = len(self.done)
        while self._path(number).exists():  # of a run that got further, then went back
            self._path(number).unlink()
            number += 1

    def close(self) -> dict[str, Any]:
        """Closes the files and returns the split's manifest entry. A single shard is named as in nanoGPT."""
        self.finish()
        if len(self.done) == 1:
            os.replace(self.folder / self.done[0]["file"], self.folder / f"{self.split}.bin")
            self.done[0]["file"] = f"{self.split}.bin"
        return {"tokens": self.tokens, "bytes": self.text_bytes, "shards": self.done}


def narrow_dtype(tokenizer: Tokenizer | FastTokenizer) -> np.dtype:
    """The smallest type of ids in a dataset: one byte for a small vocabulary."""
    return np.dtype("u1") if tokenizer.vocab_size <= 1 << 8 else tokenizer.dtype


def stored_dtype(tokenizer: Tokenizer, tokens: int) -> np.dtype:
    """The type of the ids of a dataset. tokens: of the larger split. nanoGPT reads uint16; in large datasets, space
    and time matter more."""
    return narrow_dtype(tokenizer) if tokens > LARGE else tokenizer.dtype


def make_writers(tokenizer: Tokenizer, folder: Path, size: int, tokens: int) -> dict[str, ShardWriter]:
    """The writers of both splits. tokens: of the larger split, at most; 0 if unknown. If this gives another type than
    the true number, close_writers() converts the files."""
    dtype = stored_dtype(tokenizer, tokens)
    return {split: ShardWriter(folder, split, size, dtype) for split in ("train", "val")}


def close_writers(tokenizer: Tokenizer, writers: dict[str, ShardWriter]) -> dict[str, dict[str, Any]]:
    """Closes the files, which get stored_dtype(). Returns the manifest entries of the splits."""
    dtype, made = stored_dtype(tokenizer, max(writer.tokens for writer in writers.values())), list[Path]()
    for writer in writers.values():
        writer.finish()
        for shard in writer.done if writer.dtype != dtype else ():
            made.append(other := writer.folder / f"{shard['file']}.converted")
            shard["sha256"] = convert(writer.folder / shard["file"], writer.dtype, other, dtype)
    for other in made:  # when all are complete: an interrupted run continues from the files as they were
        os.replace(other, other.with_suffix(""))
    return {split: writer.close() for split, writer in writers.items()}


def convert(path: Path, before: np.dtype, other: Path, after: np.dtype) -> str:
    """Copies ids to another file in another type. Returns its hash."""
    digest = FileHash()
    with path.open("rb") as source, other.open("wb") as file:
        while len(ids := np.fromfile(source, before, BLOCK)):
            data = ids.astype(after).data
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
