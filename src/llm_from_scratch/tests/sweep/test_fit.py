"""The fit of the law: it recovers the constants of made-up runs."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest

from llm_from_scratch.errors import UserError
from llm_from_scratch.sweep.fit import Point, fit, worth_of
from llm_from_scratch.training.law import Law

TRUE = Law(E=0.9, A=25.0, alpha=0.35, B=60.0, beta=0.3, R=6.0)


def runs(unique: float = 1e9, noise: float = 0.0) -> list[Point]:
    rng = random.Random(1)
    grid = itertools.product((1e4, 5e4, 2e5, 1e6, 5e6), (3e5, 3e6, 3e7, 3e8))
    return [Point(N, D, unique, TRUE.bits(N, D, unique) * (1 + noise * rng.gauss(0, 1))) for N, D in grid]


def test_exact_runs_give_back_the_constants() -> None:
    law = fit(runs(), resamples=0).law
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(TRUE, name), rel=0.02), name
    assert law.spread == 0.005  # its lower limit


def test_repeated_text_gives_its_worth() -> None:
    points = runs(unique=1e7)  # up to 30 passes
    law = fit(points, resamples=0).law
    assert law.R == pytest.approx(TRUE.R, rel=0.1)
    assert all(law.bits(p.params, p.seen, p.unique) == pytest.approx(p.bits, rel=0.005) for p in points)


def test_the_intervals_are_about_the_constants_and_as_wide_as_the_noise() -> None:
    wide, narrow = (fit(runs(noise=noise), resamples=20) for noise in (0.01, 0.001))
    for name in ("E", "A", "alpha", "B", "beta"):
        (low, high), (inner_low, inner_high) = wide.intervals[name], narrow.intervals[name]
        assert low - (high - low) < getattr(TRUE, name) < high + (high - low), name
        assert 3 < (high - low) / (inner_high - inner_low) < 30, name
    assert wide.law.spread == pytest.approx(0.01, rel=0.5)
    assert fit(runs(noise=0.01), resamples=3) == fit(runs(noise=0.01), resamples=3)


def test_the_worth_of_arrays_is_that_of_the_law() -> None:
    seen, unique = np.array([1.0, 10.0, 25.0, 1000.0]), np.full(4, 10.0)
    expected = [TRUE.worth(float(D), 10.0) for D in seen]
    assert worth_of(seen, unique, TRUE.R) == pytest.approx(expected)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UserError, match="at least 6 runs"):
        fit(runs()[:5])
    with pytest.raises(UserError, match="two sizes and two budgets"):
        fit([dataclasses.replace(point, params=1e5) for point in runs()])
