"""Encoding of texts in units of about a megabyte: worker processes, the token cache, and the progress of a run, from
which it resumes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.tokenizer import Tokenizer, safe_cut
from ..errors import EncoderDiffersError, UserError
from ..machine.files import read_json, to_json, write_whole
from ..machine.processes import end_with_parent, shield_children
from .fast_bpe import FastTokenizer
from .meter import Meter
from .shards import close_writers, make_writers, narrow_dtype

UNIT = 1 << 20  # characters per unit
KEEP_CACHE = 1 << 30  # bytes; a larger cache is deleted after the run, because it would double the disk space
VERSION = 1  # of the cache format
PROGRESS = "progress.json"  # in the temporary folder
UNITS = 2  # version of the rules by which texts are divided into units
QUEUED = 4  # units that wait until they are written
SAVE_EVERY = 2.0  # seconds between two records of the progress
SAMPLE = 1 << 12  # characters of a unit that are encoded twice
PATIENCE = 30.0  # seconds in which worker processes end
MAX_FAILURES = 3  # of worker processes, without a finished unit between them
# spawn: forking a process with threads may hang, and not every system can fork
START_METHOD = "spawn"


@dataclass
class Unit:
    """About a megabyte of one split: pieces (text, whether a document ends here)."""

    split: str
    mark_ends: bool
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    characters: int = 0

    def size(self) -> int:
        """Bytes of the texts."""
        return sum(len(text) if text.isascii() else len(text.encode("utf-8", "replace")) for text, _ in self.pieces)

    def key(self, tokenizer: Tokenizer) -> str:
        """The cache key of the tokens."""
        digest = hashlib.sha256(f"{VERSION} {tokenizer.fingerprint()} {self.mark_ends}".encode())
        for text, ends in self.pieces:
            data = text.encode("utf-8", "replace")
            digest.update(b"%d %d " % (len(data), ends) + data)
        return digest.hexdigest()

    def encode(self, tokenizer: Tokenizer | FastTokenizer) -> np.ndarray:
        dtype = narrow_dtype(tokenizer)
        parts = [np.empty(0, dtype)]
        for text, ends in self.pieces:
            parts.append(tokenizer.encode_uncast(text))
            if ends and self.mark_ends:
                parts.append(np.array([tokenizer.eot_id], dtype))
        return np.concatenate(parts, dtype=dtype, casting="unsafe")


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


def write_shards(
    units: Callable[[], Iterable[Unit]], tokenizer: Tokenizer, folder: Path, shard_size: int, workers: int,
    cache: TokenCache, fast: bool, request: str, meter: Meter, report: Callable[[str], None],
    pool: Workers | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Encodes the units into shards. Returns the manifest's entries of the splits. units: reads them from the first.
    fast: with FastTokenizer, until it differs: the shard is then made again without it. pool: of start_pool. Resumes
    from the progress that an earlier run of the same request has left in the folder."""
    shards = make_writers(tokenizer, folder, shard_size, meter.total)
    done = 0

    def state() -> dict[str, Any]:
        splits = {split: s.state() for split, s in shards.items()}
        return {"request": request, "version": UNITS, "units": done, "splits": splits}

    def restore(earlier: dict[str, Any]) -> int:
        for split, writer in shards.items():
            writer.restore(earlier["splits"][split])
        return earlier["units"]

    start = state()
    if earlier := read_progress(folder, request):
        try:
            done = restore(earlier)
            report(f"resuming after {sum(s.tokens for s in shards.values()):,} tokens of an interrupted run")
        except (OSError, ValueError, KeyError, TypeError):
            done = restore(start)
            report("the shards of an interrupted run are damaged: starting again")
    whole, saved = state(), time.monotonic()  # when the last shard was completed; when saved

    def write(before: Future[None] | None, split: str, size: int, ids: np.ndarray) -> None:
        """In the writing thread. before: if an earlier unit failed, no later one is written."""
        nonlocal done, whole, saved
        if before is not None:
            before.result()
        writer = shards[split]
        shards_before = len(writer.done)
        writer.append(ids)
        writer.text_bytes += size
        done += 1
        if len(writer.done) > shards_before:
            whole = state()
        if len(writer.done) > shards_before or time.monotonic() - saved >= SAVE_EVERY:
            write_whole(folder / PROGRESS, to_json(state()))
            saved = time.monotonic()
        meter.update(sum(s.tokens for s in shards.values()), size)

    while True:
        rest = itertools.islice(units(), done, None)
        try:
            with ThreadPoolExecutor(1) as thread:
                written: deque[Future[None]] = deque()
                for unit, size, ids in encode_units(rest, tokenizer, folder, cache, workers, report, fast, pool):
                    before = written[-1] if written else None
                    written.append(thread.submit(write, before, unit.split, size, ids))
                    if len(written) > QUEUED:
                        written.popleft().result()
                for one in written:
                    one.result()
            break
        except EncoderDiffersError as error:
            report(f"continuing without gigatoken: {error}")
            fast, pool, done = False, None, restore(whole)
            write_whole(folder / PROGRESS, to_json(whole))
        except BaseException:
            if (folder / PROGRESS).exists():
                report("the tokens so far are kept: run the same command again to resume")
            raise
    splits = close_writers(tokenizer, shards)
    (folder / PROGRESS).unlink(missing_ok=True)
    return splits


def read_progress(folder: Path, request: str) -> dict[str, Any] | None:
    """The progress of an interrupted run of the same request, if there is one in the folder."""
    with contextlib.suppress(UserError):
        state = read_json(folder / PROGRESS) if (folder / PROGRESS).is_file() else {}
        if (state.get("request"), state.get("version")) == (request, UNITS):
            return state
    return None


def encode_units(
    units: Iterable[Unit], tokenizer: Tokenizer, saved: Path, cache: TokenCache, workers: int,
    report: Callable[[str], None], fast: bool = False, pool: Workers | None = None,
) -> Iterator[tuple[Unit, int, np.ndarray]]:  # fmt: skip
    """Yields (unit, bytes of its text, ids) in order. saved: the folder from which the workers load the tokenizer.
    With 0 workers, this process encodes. About two units per worker are in memory. pool: of start_pool; it is shut
    down at the end. Raises EncoderDiffersError."""
    encode = UnitEncoder(tokenizer, saved, fast and not workers)
    failures = 0
    waiting: deque[_Waiting] = deque()

    def submit(one: _Waiting) -> None:
        assert pool is not None
        try:
            with blocked_interrupts():
                one.future = pool.submit(_encode_in_worker, one.unit)
        except BrokenProcessPool as error:  # handled when the result is read
            one.future = Future()
            one.future.set_exception(error)

    def finish() -> tuple[Unit, int, np.ndarray]:
        first = waiting.popleft()
        ids = first.ids if first.ids is not None else encoded(first)
        # every id is a byte, or the texts are encoded once more to count their bytes
        return first.unit, len(ids) if tokenizer.name == "byte" else first.unit.size(), ids

    def encoded(first: _Waiting) -> np.ndarray:
        nonlocal pool, failures
        while first.ids is None:
            if pool is None or first.future is None:
                first.ids = encode(first.unit)
                break
            try:
                first.ids, failures = first.future.result(), 0
            except BrokenProcessPool:
                pool.shutdown(wait=False, cancel_futures=True)
                failures += 1
                pool = start_pool(workers, saved, fast) if failures < MAX_FAILURES else None
                report("a worker process was killed: starting new workers" if pool else
                       "the worker processes failed; continuing without them")  # fmt: skip
                for one in (first, *waiting):
                    if pool is not None and one.ids is None:
                        submit(one)
        cache.put(first.key, first.ids)
        return first.ids

    try:
        pool = pool or (start_pool(workers, saved, fast) if workers else None)
        for unit in units:
            key = unit.key(tokenizer) if cache.folder is not None else ""
            waiting.append(one := _Waiting(unit, key, cache.get(key)))
            if one.ids is None and pool is not None:
                submit(one)
            while len(waiting) > 2 * workers:
                yield finish()
        while waiting:
            yield finish()
    finally:
        if pool is not None:
            pool.end()


class Workers(ProcessPoolExecutor):
    """Worker processes. One that is killed while it waits for work holds the lock by which the others wait."""

    def __init__(self, *given: Any) -> None:
        self.others = set(multiprocessing.active_children())
        super().__init__(*given)

    def end(self) -> None:
        """Waits until all have ended. Workers that do not end are killed."""
        ending = threading.Thread(target=self.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        ending.start()
        ending.join(PATIENCE)
        if ending.is_alive():
            for child in set(multiprocessing.active_children()) - self.others:
                child.kill()
            ending.join()


def start_pool(workers: int, saved: Path, fast: bool) -> Workers:
    """Worker processes, which load the tokenizer at once. saved: its folder."""
    shield_children()
    pool = Workers(workers, multiprocessing.get_context(START_METHOD), start_worker, (str(saved), fast))
    try:
        with blocked_interrupts(), contextlib.suppress(BrokenProcessPool):  # handled when a unit is submitted
            for _ in range(workers):
                pool.submit(int)  # a task starts a process
    except BaseException:  # Ctrl-C meanwhile: the folder that they load is kept until they have ended
        pool.end()
        raise
    return pool


@dataclass
class _Waiting:
    """A unit with ids that are not yet written."""

    unit: Unit
    key: str
    ids: np.ndarray | None
    future: Future[np.ndarray] | None = None


class UnitEncoder:
    """Encodes units in this process. fast: by gigatoken, compared with the tokenizer on a part of every unit."""

    def __init__(self, tokenizer: Tokenizer, saved: Path, fast: bool) -> None:
        self.tokenizer, self.saved, self.use_fast = tokenizer, saved, fast

    @functools.cached_property
    def fast(self) -> FastTokenizer:
        return FastTokenizer(self.tokenizer, self.saved)

    def __call__(self, unit: Unit) -> np.ndarray:
        if not self.use_fast:
            return unit.encode(self.tokenizer)
        ids = unit.encode(self.fast)
        self.fast.compare(sample([text for text, _ in unit.pieces]))
        return ids


def sample(texts: list[str]) -> str:
    """A part of one of the texts, the same in every run: about SAMPLE characters, cut between words."""
    texts = [text for text in texts if text] or [""]
    random = zlib.crc32(texts[0][:SAMPLE].encode("utf-8", "replace"))
    text = texts[random % len(texts)]
    begin = safe_cut(text, random % max(1, len(text) - SAMPLE)) if len(text) > SAMPLE else 0
    return text[begin : begin + safe_cut(text[begin:], SAMPLE)] if len(text) - begin > SAMPLE else text[begin:]


_WORKER: list[UnitEncoder] = []


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


def start_worker(saved: str, fast: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER[:] = [UnitEncoder(Tokenizer.load(saved), Path(saved), fast)]


def _encode_in_worker(unit: Unit) -> np.ndarray:
    return _WORKER[0](unit)
