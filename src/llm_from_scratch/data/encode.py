"""Encoding of texts in units of about a megabyte: worker processes, the token cache and the shard files."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.tokenizer import Tokenizer
from ..machine.files import write_whole
from ..machine.processes import shield_children

UNIT = 1 << 20  # characters per unit
KEEP_CACHE = 1 << 30  # bytes; a larger cache is deleted after the run, because it would double the disk space
VERSION = 1  # of the cache format


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

    def append(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._file is None:
                self._file = (self.folder / f"{self.split}_{len(self.done):06d}.bin").open("wb")
                self._hash = hashlib.sha256()
            part = np.ascontiguousarray(ids[: self.size - self.tokens % self.size], dtype=self.dtype)
            self._file.write(part.data)
            self._hash.update(part.data)
            self.tokens += len(part)
            ids = ids[len(part) :]
            if self.tokens % self.size == 0:
                self._end_shard()

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        tokens = self.tokens - self.size * len(self.done)
        self.done.append({"file": Path(self._file.name).name, "tokens": tokens, "sha256": self._hash.hexdigest()})
        self._file = None

    def close(self) -> dict[str, Any]:
        """Closes the files and returns the split's manifest entry. A single shard is named as in nanoGPT."""
        self._end_shard()
        if len(self.done) == 1:
            os.replace(self.folder / self.done[0]["file"], self.folder / f"{self.split}.bin")
            self.done[0]["file"] = f"{self.split}.bin"
        return {"tokens": self.tokens, "bytes": self.text_bytes, "shards": self.done}


@dataclass
class Unit:
    """About a megabyte of one split: pieces (text, whether a document ends here)."""

    split: str
    mark_ends: bool
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    characters: int = 0

    def key(self, tokenizer: Tokenizer) -> tuple[str, int]:
        """The cache key of the tokens, and the size of the texts in bytes."""
        digest = hashlib.sha256(f"{VERSION} {tokenizer.fingerprint()} {self.mark_ends}".encode())
        size = 0
        for text, ends in self.pieces:
            data = text.encode("utf-8", "replace")
            size += len(data)
            digest.update(b"%d %d " % (len(data), ends) + data)
        return digest.hexdigest(), size

    def encode(self, tokenizer: Tokenizer) -> np.ndarray:
        parts = [np.empty(0, tokenizer.dtype)]
        for text, ends in self.pieces:
            parts.append(tokenizer.encode(text))
            if ends and self.mark_ends:
                parts.append(np.array([tokenizer.eot_id], tokenizer.dtype))
        return np.concatenate(parts)


def units_of(stream: Iterable[tuple[str, str, bool]], mark_ends: bool) -> Iterator[Unit]:
    """Groups a stream of (split, text, ends) into units. The same stream always gives the same units."""
    filling = {split: Unit(split, mark_ends) for split in ("train", "val")}
    for split, text, ends in stream:
        if not text and not ends:
            continue
        unit = filling[split]
        unit.pieces.append((text, ends))
        unit.characters += len(text)
        if unit.characters >= UNIT:
            yield unit
            filling[split] = Unit(split, mark_ends)
    yield from (unit for unit in filling.values() if unit.pieces)


class TokenCache:
    """Encoded units by hash of tokenizer and text. A file is the sha256 of the ids followed by the ids."""

    def __init__(self, folder: Path | None, dtype: np.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.hits, self.misses = 0, 0
        self.used: dict[Path, int] = {}  # the size of each file

    def get(self, key: str) -> np.ndarray | None:
        if self.folder is None:
            return None
        path, data = self.folder / key[:2] / f"{key}.tokens", b""
        with contextlib.suppress(OSError):
            data = path.read_bytes()
        if len(data) < 32 or hashlib.sha256(data[32:]).digest() != data[:32]:
            self.misses += 1
            return None
        self.hits += 1
        self.used[path] = len(data)
        return np.frombuffer(data, self.dtype, offset=32)

    def put(self, key: str, ids: np.ndarray) -> None:
        if self.folder is not None:
            path, data = self.folder / key[:2] / f"{key}.tokens", ids.astype(self.dtype).tobytes()
            write_whole(path, hashlib.sha256(data).digest() + data)
            self.used[path] = 32 + len(data)

    def finish(self) -> None:
        """Deletes the files of a completed run if they are large."""
        if sum(self.used.values()) > KEEP_CACHE:
            for path in self.used:
                path.unlink(missing_ok=True)


def encode_units(
    units: Iterable[Unit], tokenizer: Tokenizer, saved: Path, cache: TokenCache, workers: int,
    report: Callable[[str], None],
) -> Iterator[tuple[Unit, int, np.ndarray]]:  # fmt: skip
    """Yields (unit, bytes of its text, ids) in order. saved: the folder from which the workers load the tokenizer.
    With 0 workers, this process encodes. About two units per worker are in memory."""
    pool = None
    if workers:
        shield_children()
        # spawn: forking a process with threads may hang, and not every system can fork
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (str(saved),))
    waiting: deque[tuple[Unit, int, str, Any]] = deque()

    def finish() -> tuple[Unit, int, np.ndarray]:
        nonlocal pool
        unit, size, key, ids = waiting.popleft()
        if isinstance(ids, np.ndarray):
            return unit, size, ids
        try:
            ids = ids.result() if ids else unit.encode(tokenizer)
        except BrokenProcessPool:
            if pool is not None:
                report("the worker processes failed; continuing without them")
                pool.shutdown(wait=False, cancel_futures=True)
                pool = None
            ids = unit.encode(tokenizer)
        cache.put(key, ids)
        return unit, size, ids

    try:
        for unit in units:
            key, size = unit.key(tokenizer)
            ids: Any = cache.get(key)
            if ids is None and pool is not None:
                # a broken pool is reported when a result is read
                with contextlib.suppress(BrokenProcessPool), blocked_interrupts():
                    ids = pool.submit(_encode_in_worker, unit)
            waiting.append((unit, size, key, ids))
            while len(waiting) > 2 * workers:
                yield finish()
        while waiting:
            yield finish()
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


_WORKER_TOKENIZER: list[Tokenizer] = []


@contextlib.contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Ctrl-C arrives afterwards. A process that is started meanwhile never receives it: the parent handles it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(saved: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER_TOKENIZER[:] = [Tokenizer.load(saved)]


def _encode_in_worker(unit: Unit) -> np.ndarray:
    return unit.encode(_WORKER_TOKENIZER[0])
