"""Hashes of words, runs of words, lines and documents. The same on every machine and in every run."""

from __future__ import annotations

import functools
import hashlib
import re

import numpy as np

WORD = re.compile(r"\w+", re.ASCII)
WITHOUT_SPACES = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"  # Thai, Lao, Kana, Han: each character counts as a word
WIDE_WORD = re.compile(rf"[{WITHOUT_SPACES}]|[^\W{WITHOUT_SPACES}]+")
REMEMBERED = 1 << 20  # words


class _Words(dict[str, int]):
    """Hashes of words; the most common ones are computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) >= REMEMBERED:
            self.clear()
        self[word] = value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return value


_words = _Words()


def hash_words(text: str) -> np.ndarray:
    """The hash of every word, in small letters: punctuation and white space do not count."""
    words = (WORD if text.isascii() else WIDE_WORD).findall(text.lower())
    return np.fromiter(map(_words.__getitem__, words), np.uint64, len(words))


@functools.lru_cache(maxsize=8)
def _multipliers(count: int) -> np.ndarray:
    return np.array([pow(0xD6E8FEB86659FD93, power, 1 << 64) for power in range(1, count + 1)], np.uint64)


def runs_of_words(text: str, length: int) -> np.ndarray:
    """The hash of every run of `length` words."""
    words = hash_words(text)
    count = len(words) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for at, multiplier in enumerate(_multipliers(length)):
        total += words[at : at + count] * multiplier
    total ^= total >> np.uint64(32)
    total *= np.uint64(0x9E3779B97F4A7C15)
    return total ^ (total >> np.uint64(29))


def hash_lines(text: str) -> dict[int, str]:
    """{hash: line} of the lines with a letter or digit, without white space around them."""
    lines = {line for line in map(str.strip, text.split("\n")) if any(map(str.isalnum, line))}
    return {int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little"): line for line in lines}


def hash_document(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
