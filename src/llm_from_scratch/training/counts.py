"""The difficulty of a text: the cross-entropy of held-out text under counted n-grams, as a function of the amount
counted.

Like a small model, counts learn first which characters follow which few, they gain from more text, and they lose where
held-out text differs from the training text. The probability of a character is interpolated over the lengths of its
context: a context with many different continuations, relative to its count, yields to the shorter one (Witten and Bell
1991). A model also copies from its context: a repeated n-gram predicts the character that followed it before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

LONGEST = 6  # characters of an n-gram, with the one that is predicted
APART = 4  # ratio of the two amounts that are counted
RATIO = 0.6  # the gain of the next four-fold amount / the last gain: 0.62 to 0.86 measured after 130,000 characters of
# four texts, 0.41 to 0.62 after 500,000 (with COPIED 0.1); a text's own ratio, from three amounts, predicts it worse
COPIED = 0.45  # how much repetitions count: fitted, as law.POWER, to the losses of four texts (docs/SCALING.md)
WINDOW = 256  # characters in which a repeated n-gram is looked for
REPEATED = (3, 4, 6, 8, 12, 16, 24)  # its lengths; the longest repetition counts
ROUNDS = 10  # to find how often each length is right
FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Curve(NamedTuple):
    """Bits per character after any amount of text: a power law plus a constant, through two measured points."""

    amount: float
    """Characters of the last point."""
    bits: float
    """There."""
    gain: float
    """Increase in bits if only a quarter (APART) of the text is counted."""

    def at(self, amount: float) -> float:
        further = math.log(amount / self.amount, APART)
        return max(0.0, self.bits - self.gain * RATIO * (1 - RATIO**further) / (1 - RATIO))


def counted(train: str, held: str) -> Curve | None:
    """The curve of a text. None if it is too short for a curve. train is counted in its order: mix its parts."""
    symbols, ids = np.unique(_codes(train + held), return_inverse=True)
    if len(train) < APART * LONGEST or len(held) < 2 * LONGEST:
        return None
    known, asked = ids[: len(train)], ids[len(train) :]
    bits = cross_entropy(known, asked, len(symbols))
    less = cross_entropy(known[: len(known) // APART], asked, len(symbols))
    return Curve(float(len(known)), bits, max(0.0, less - bits))


def cross_entropy(train: Any, held: Any, symbols: int) -> float:
    """Bits per symbol of held, after its first n-gram, without and with repetitions: a mean by COPIED. Both arrays: ids
    below symbols."""
    found = chances(train, held, symbols)
    kinds, is_right = (part[len(held) - len(found) :] for part in repetitions(held))
    trust = np.full(len(REPEATED) + 1, 0.5)  # the share of a repetition in the mixture, by its length: the most likely
    for _ in range(ROUNDS):
        copied = trust[kinds] * is_right
        copied /= copied + (1 - trust[kinds]) * found
        trust = np.bincount(kinds, copied, len(trust)) / np.maximum(1, np.bincount(kinds, minlength=len(trust)))
    mixed = trust[kinds] * is_right + (1 - trust[kinds]) * found
    return float((-np.log2(found)).mean() ** (1 - COPIED) * (-np.log2(mixed)).mean() ** COPIED)


def chances(train: Any, held: Any, symbols: int) -> Any:
    """The probability of each symbol of held from the first n-gram on, by the n-grams of train."""
    longest = min(LONGEST, int(62 / math.log2(max(2, symbols))))  # a code of an n-gram is an int64
    found = np.full(len(held) - longest + 1, 1 / symbols)
    for n in range(1, longest + 1):
        seen, counts = np.unique(_ngrams(train, n, symbols), return_counts=True)
        contexts, begins, kinds = np.unique(seen // symbols, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, begins)
        asked, places = np.unique(_ngrams(held, n, symbols)[longest - n :], return_inverse=True)
        count, total, kind = (
            _count_of(keys, values, wanted)[places]
            for keys, values, wanted in (
                (seen, counts, asked), (contexts, totals, asked // symbols), (contexts, kinds, asked // symbols)
            )
        )  # fmt: skip
        found = np.where(total > 0, (count + kind * found) / np.maximum(1, total + kind), found)
    return found


def repetitions(ids: Any) -> tuple[Any, Any]:
    """For each position: which of the n-grams before it, the longest, also ended less than WINDOW before (1 + its index
    in REPEATED; 0: none), and whether the symbol after it was the same."""
    found, is_right = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=bool)
    for index, n in enumerate(REPEATED, 1):
        if n >= len(ids):
            break
        codes = np.zeros(len(ids) - n, dtype=np.uint64)
        for place in range(n):
            codes = (codes ^ ids[place : len(ids) - n + place].astype(np.uint64)) * FACTOR
        order = np.argsort(codes, kind="stable")
        is_same = (codes[order[1:]] == codes[order[:-1]]) & (order[1:] - order[:-1] < WINDOW)
        before, here = order[:-1][is_same] + n, order[1:][is_same] + n
        found[here], is_right[here] = index, ids[here] == ids[before]
    return found, is_right


def _codes(text: str) -> Any:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def _ngrams(ids: Any, n: int, symbols: int) -> Any:
    """A number for the n ids that end at each position from the nth on; the last id counts least."""
    codes = np.zeros(len(ids) - n + 1, dtype=np.int64)
    for place in range(n):
        codes = codes * symbols + ids[place : len(ids) - n + 1 + place]
    return codes


def _count_of(keys: Any, values: Any, wanted: Any) -> Any:
    """The value of each wanted key; 0 if there is none. Both are sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
