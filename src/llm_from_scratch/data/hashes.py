"""Hashes of words, runs of words, lines, documents and files. The same on every machine and in every run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import numpy as np

# Scripts without spaces, in which each character counts as a word: Thai, Lao, Kana, Han
ALONE = ((0x0E00, 0x0EFF), (0x3040, 0x30FF), (0x3400, 0x9FFF))
LETTER, WORD = 1, 2  # what a character is: a part of a word, or a word by itself
READ = 1 << 20  # bytes of a file at once
IN_THREAD = 1 << 15  # bytes from which another thread hashes them
BLOCK = 1 << 15  # characters whose numbers fit in a processor's cache
MIX, STEP = np.uint64(0x9E3779B97F4A7C15), 0xD6E8FEB86659FD93


@functools.cache
def _kinds() -> np.ndarray:
    """The kind of each of the first 65,536 characters."""
    kinds = np.array([chr(code).isalnum() or code == ord("_") for code in range(1 << 16)], np.uint8)
    for low, high in ALONE:
        kinds[low : high + 1] *= WORD
    return kinds


@functools.cache
def _small_letters() -> bytes:
    """For bytes.translate: the characters of words as small letters, null for other ASCII characters."""
    return bytes(ord(chr(code).lower()) if _kinds()[code] else 0 for code in range(128)) + bytes(128)


@functools.lru_cache(maxsize=8)
def _powers(count: int, step: int = STEP, first: int = STEP) -> np.ndarray:
    """first, first * step, first * step², ... modulo 2**64."""
    factors = np.full(count, step, np.uint64)
    factors[:1] = first
    return np.cumprod(factors)


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(32))) * MIX
    return values ^ (values >> np.uint64(29))


def hash_words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every word, in small letters: punctuation and white space do not count. And the number of words of
    each text."""
    joined = "\n".join(texts)
    if joined.isascii():
        codes = np.frombuffer(joined.encode().translate(_small_letters()), np.uint8)
        begins = codes > 0
        begins[1:] &= codes[:-1] == 0
    else:
        texts = [text.lower() for text in texts]
        codes = np.frombuffer("\n".join(texts).encode("utf-32-le"), np.uint32)
        kinds = _kinds()[np.minimum(codes, 0xFFFF)]
        codes = codes * (kinds > 0)
        begins = kinds > 0
        begins[1:] &= (kinds[1:] == WORD) | (kinds[:-1] != LETTER)
    starts = np.flatnonzero(begins)
    ends = np.cumsum([len(text) + 1 for text in texts])
    return _mixed(_polynomials(codes, starts)), np.diff(np.searchsorted(starts, np.r_[0, ends]))


def _polynomials(codes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """For each word, the sum of its codes times STEP, STEP², ... modulo 2**64. Other characters have the code 0. The
    powers count from the beginning of a block, so that one running sum serves all of its words; the inverse of the
    power at a word's beginning shifts its part of the sum."""
    found, first = np.empty(len(starts), np.uint64), 0
    while first < len(starts):
        begin = starts[first]
        last = int(np.searchsorted(starts, begin + BLOCK))
        edges = np.append(starts[first:last], starts[last] if last < len(starts) else len(codes)) - begin
        size = int(edges[-1])
        powers = _powers(BLOCK)[:size] if size <= BLOCK else _powers.__wrapped__(size)  # a very long word
        sums = np.zeros(size + 1, np.uint64)
        np.multiply(codes[begin : begin + size], powers, out=sums[1:])
        np.cumsum(sums[1:], out=sums[1:])
        found[first:last] = np.diff(sums[edges]) * _powers(BLOCK, pow(STEP, -1, 1 << 64), 1)[edges[:-1]]
        first = last
    return found


def runs_of_words(texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every run of `length` words, and the number of runs of each text."""
    words, counts = hash_words(texts)
    total = np.zeros(max(0, len(words) - length + 1), np.uint64)
    for at, power in enumerate(_powers(length)):
        total += words[at : at + len(total)] * power
    text_of = np.repeat(np.arange(len(counts)), counts)
    inside = text_of[: len(total)] == text_of[len(text_of) - len(total) :]
    return _mixed(total[inside]), np.maximum(counts - length + 1, 0)


def hash_lines(text: str) -> dict[int, str]:
    """{hash: line} of the lines with a letter or digit, without white space around them."""
    lines = {line for line in map(str.strip, text.split("\n")) if any(map(str.isalnum, line))}
    return {int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little"): line for line in lines}


def hash_document(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class FileHash:
    """SHA-256 of the content of a file, found by a thread while the caller reads or writes the file."""

    def __init__(self) -> None:
        self.size = 0  # bytes
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def update(self, data: bytes | memoryview) -> None:
        """data must not change afterwards."""
        self._wait()
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        self.size += size
        if size < IN_THREAD:
            self._digest.update(data)
        else:
            self._pending = self._thread.submit(self._digest.update, data)

    def blocks(self, file: IO[bytes]) -> Iterator[bytes]:
        """The rest of a file."""
        while block := file.read(READ):
            self.update(block)
            yield block

    def hexdigest(self) -> str:
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
