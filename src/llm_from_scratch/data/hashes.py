"""Hashes of words, runs of words, lines and documents. The same on every machine and in every run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

# Scripts without spaces, in which each character counts as a word: Thai, Lao, Kana, Han
ALONE = ((0x0E00, 0x0EFF), (0x3040, 0x30FF), (0x3400, 0x9FFF))
LONGEST = 256  # characters of a word, after which positions repeat
LETTER, WORD = 1, 2  # what a character is: a part of a word, or a word by itself
MIX, STEP = np.uint64(0x9E3779B97F4A7C15), 0xD6E8FEB86659FD93


@functools.cache
def _kinds() -> np.ndarray:
    """What each of the first 65,536 characters is."""
    kinds = np.array([chr(code).isalnum() or code == ord("_") for code in range(1 << 16)], np.uint8)
    for low, high in ALONE:
        kinds[low : high + 1] *= WORD
    return kinds


@functools.cache
def _powers(count: int) -> np.ndarray:
    return np.array([pow(STEP, power, 1 << 64) for power in range(1, count + 1)], np.uint64)


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(32))) * MIX
    return values ^ (values >> np.uint64(29))


def hash_words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every word, in small letters: punctuation and white space do not count. And the number of words of
    each text."""
    small = [text.lower() for text in texts]
    joined = "\n".join(small)
    if joined.isascii():
        codes = np.frombuffer(joined.encode(), np.uint8)
        kinds = _kinds()[codes]
    else:
        codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        kinds = _kinds()[np.minimum(codes, 0xFFFF)]
    begins = kinds > 0
    begins[1:] &= (kinds[1:] == WORD) | (kinds[:-1] != LETTER)
    starts = np.flatnonzero(begins)
    ends = np.cumsum([len(text) + 1 for text in small])
    counts = np.diff(np.searchsorted(starts, np.r_[0, ends]))
    if not len(starts):
        return np.empty(0, np.uint64), counts
    edges = np.r_[0, starts, len(codes)]
    position = np.arange(len(codes)) - np.repeat(edges[:-1], np.diff(edges))
    values = _powers(LONGEST)[position % LONGEST] * codes
    values[kinds == 0] = 0
    return _mixed(np.add.reduceat(values, starts)), counts


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


def hash_document(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
