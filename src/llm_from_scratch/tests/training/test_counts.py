"""training/counts.py: against counting by hand in plain Python."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from llm_from_scratch.training import counts
from llm_from_scratch.training.counts import REPEATED, WINDOW, Curve, chances, counted, cross_entropy, repetitions

WORDS = ["to be ", "or not ", "that is ", "the question ", "слово ", "\n"]


def text_of(words: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(WORDS, [6, 5, 4, 3, 2, 1], k=words))


def by_hand(train: str, held: str, symbols: int) -> list[float]:
    """Witten and Bell's interpolation with dictionaries: P_n = (count + kinds * P_n-1) / (total + kinds)."""
    followers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for n in range(counts.LONGEST):
        for end in range(n, len(train)):
            followers[train[end - n : end]][train[end]] += 1
    found = []
    for end in range(counts.LONGEST - 1, len(held)):
        found.append(1 / symbols)
        for n in range(counts.LONGEST):
            seen = followers.get(held[end - n : end])
            if seen is not None:
                found[-1] = (seen[held[end]] + len(seen) * found[-1]) / (seen.total() + len(seen))
    return found


def ids_of(train: str, held: str) -> tuple[np.ndarray, np.ndarray, int]:
    names, ids = np.unique([*(train + held)], return_inverse=True)
    return ids[: len(train)], ids[len(train) :], len(names)


def test_the_chances_by_hand() -> None:
    train, held = text_of(300, 1), text_of(60, 2) + "new!"
    known, asked, symbols = ids_of(train, held)
    assert chances(known, asked, symbols) == pytest.approx(by_hand(train, held, symbols), rel=1e-12)


def test_the_chances_of_all_symbols_add_up_to_one() -> None:
    train = np.array([0, 1, 2, 0, 1, 0, 2, 2, 1, 0, 1, 2, 0, 0])
    context = [2, 0, 1, 0, 1]
    assert sum(chances(train, np.array([*context, last]), 4)[0] for last in range(4)) == pytest.approx(1.0)


def test_repetitions_by_hand() -> None:
    text = text_of(120, 3)
    found, is_right = repetitions(ids_of(text, "")[0])
    for end in range(len(text)):
        best, right = 0, False
        for index, n in enumerate(REPEATED, 1):
            context = text[end - n : end] if end >= n else None
            begins = [] if context is None else [
                at for at in range(max(0, end - n - WINDOW + 1), end - n) if text[at : at + n] == context
            ]  # fmt: skip
            if begins:
                best, right = index, text[begins[-1] + n] == text[end]
        assert (found[end], is_right[end]) == (best, right), end


def test_repetitions_lower_the_cross_entropy_to_that_of_the_best_mixture() -> None:
    """A held-out part that repeats itself, in words that the training text does not have."""
    train, held = text_of(300, 1), "xyzw" * 30 + "wzyx" * 30
    known, asked, symbols = ids_of(train, held)
    alone = -np.log2(chances(known, asked, symbols)).mean()
    both = cross_entropy(known, asked, symbols)  # alone^0.9 mixed^0.1
    mixed = (both / alone**0.9) ** 10
    assert mixed < 0.2 * alone
    one_kind = np.where(repetitions(asked)[0] > 0, 0.9, 0.0)[counts.LONGEST - 1 :]  # any other share is worse
    right = repetitions(asked)[1][counts.LONGEST - 1 :]
    assert mixed <= -np.log2(one_kind * right + (1 - one_kind) * chances(known, asked, symbols)).mean() + 1e-9


def test_a_large_alphabet_has_shorter_ngrams() -> None:
    """65,536 symbols: codes of four or more would not fit into an integer."""
    ids = np.random.default_rng(0).integers(0, 1 << 16, 500)
    assert 0 < cross_entropy(ids, ids[:100], 1 << 16) < 16


def test_the_curve_passes_through_the_measurements() -> None:
    train, held = text_of(1000, 1), text_of(100, 2)
    curve = counted(train, held)
    assert curve is not None and curve.amount == len(train)
    known, asked, symbols = ids_of(train, held)
    for part in (1, 4):
        expected = cross_entropy(known[: len(train) // part], asked, symbols)
        assert curve.at(len(train) / part) == pytest.approx(expected, rel=1e-9)
    assert curve.at(4 * len(train)) < curve.bits < curve.at(len(train) / 2)


def test_the_curve_by_hand() -> None:
    curve = Curve(amount=1000.0, bits=2.0, gain=0.3)
    # the amount before: 0.3 / 0.6; the next four-fold amounts gain 0.6 of the last gain: 0.18, 0.108, ...
    assert [curve.at(amount) for amount in (62.5, 250, 1000, 4000, 16000)] == pytest.approx(
        [2.8, 2.3, 2.0, 1.82, 1.712]
    )
    assert curve.at(1e30) == pytest.approx(2 - 0.18 / (1 - 0.6), abs=1e-6)
    assert Curve(amount=100.0, bits=0.1, gain=1.0).at(1e6) == 0.0  # a few characters say little


@pytest.mark.parametrize(("train", "held"), [("", "abc"), ("ab" * 11, "ab" * 20), ("ab" * 200, "abab"), ("", "")])
def test_a_short_text_does_not_have_a_curve(train: str, held: str) -> None:
    assert counted(train, held) is None


def test_the_curve_of_a_repetitive_text_is_flat() -> None:
    curve = counted("a" * 500, "a" * 100)
    assert curve is not None and curve.gain >= 0 and 0 <= curve.at(10_000) <= curve.at(100)
