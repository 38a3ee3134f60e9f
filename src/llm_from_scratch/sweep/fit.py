"""Fits the scaling law (training/law.py) to runs.

For given exponents the law is linear in E, A and B, so these are solved for exactly (least squares of the relative
errors, none below zero), and only alpha, beta and R are searched: on a grid that narrows around the best point.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..training.law import Law

EXPONENTS, WORTHS = (0.05, 1.5), (0.5, 100.0)  # the ranges of alpha and beta, and of R
POINTS, ROUNDS, NARROWER = 9, 7, 0.45  # of the grid
FEWEST = 6  # runs for the law's five constants
RESAMPLES, SHARE = 200, 0.9
LEAST_SPREAD = 0.005
SUBSETS = [list(part) for size in (1, 2, 3) for part in itertools.combinations(range(3), size)]


@dataclass(frozen=True)
class Point:
    """A run: what it cost and what came out."""

    params: float
    """Parameters that are multiplied."""
    seen: float
    """Bytes of text trained on."""
    unique: float
    """Bytes of the training text."""
    bits: float
    """Per byte, of held-out text."""


@dataclass(frozen=True)
class Fit:
    law: Law
    intervals: dict[str, tuple[float, float]]
    """Constant -> the interval that holds it in 9 of 10 resamples of the runs."""


def too_few(runs: int) -> UserError:
    kinds = "of two sizes and two budgets or more"
    return UserError(f"a law needs at least {FEWEST} runs, {kinds}; there are {runs}: add sizes or budgets")


def fit(points: list[Point], seed: int = 0, resamples: int = RESAMPLES) -> Fit:
    """Raises UserError if the runs are too few, or do not differ in both size and budget."""
    if len(points) < FEWEST or not _differ(points):
        raise too_few(len(points))
    law, draws = _best(points), np.random.default_rng(seed)
    names = ["E", "A", "alpha", "B", "beta", *(["R"] if any(p.seen > p.unique for p in points) else [])]
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(resamples):
        drawn = [points[i] for i in draws.integers(len(points), size=len(points))]
        if _differ(drawn):
            again = _best(drawn)
            for name, values in found.items():
                values.append(getattr(again, name))
    tails = (50 * (1 - SHARE), 50 * (1 + SHARE))
    intervals = {name: tuple(np.percentile(values, tails).tolist()) for name, values in found.items() if values}
    return Fit(law, intervals)


def _differ(points: list[Point]) -> bool:
    return len({point.params for point in points}) > 1 and len({point.seen for point in points}) > 1


def _best(points: list[Point]) -> Law:
    N, D, U, L = (np.array(column) for column in zip(*(dataclasses.astuple(p) for p in points), strict=True))
    R = [Law(0, 0, 1, 0, 1).R]  # has no effect if no text is repeated
    is_repeated = bool((D > U).any())
    middles = {"alpha": math.sqrt(math.prod(EXPONENTS)), "beta": math.sqrt(math.prod(EXPONENTS))}
    middles["R"] = math.sqrt(math.prod(WORTHS)) if is_repeated else R[0]
    half = {"alpha": 0.5 * math.log(EXPONENTS[1] / EXPONENTS[0]), "R": 0.5 * math.log(WORTHS[1] / WORTHS[0])}
    half["beta"], best = half["alpha"], (math.inf, Law(0, 0, 1, 0, 1))
    for _ in range(ROUNDS):
        axes = {name: middle * np.exp(np.linspace(-1, 1, POINTS) * half[name]) for name, middle in middles.items()}
        axes |= {name: np.clip(axes[name], *EXPONENTS) for name in ("alpha", "beta")}
        for worth in axes["R"] if is_repeated else R:
            best = min(best, _solved(N, worth_of(D, U, worth), L, axes["alpha"], axes["beta"], worth), key=_error)
        middles = {name: getattr(best[1], name) for name in middles}
        half = {name: NARROWER * width for name, width in half.items()}
    freedom = max(1, len(points) - 5)
    return dataclasses.replace(best[1], spread=max(LEAST_SPREAD, math.sqrt(best[0] / freedom)))


def _error(found: tuple[float, Law]) -> float:
    return found[0]


def worth_of(seen: Any, unique: Any, R: float) -> Any:
    """Law.worth for arrays."""
    repeated = np.maximum(seen / unique - 1, 0)
    return np.minimum(seen, unique) * np.where(seen > unique, 1 - R * np.expm1(-repeated / R), 1.0)


def _solved(N: Any, D: Any, L: Any, alphas: Any, betas: Any, R: float) -> tuple[float, Law]:
    """(sum of squared relative errors, law) of the best pair of exponents."""
    alpha, beta = (grid.reshape(-1, 1) for grid in np.meshgrid(alphas, betas))
    # near 1, so that the equations are well conditioned
    at_N, at_D = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())
    columns = np.stack([np.ones((len(alpha), len(N))), (N / at_N) ** -alpha, (D / at_D) ** -beta], axis=-1)
    design = columns / L[:, None]  # (pairs, runs, 3)
    normal, right = design.mT @ design, design.sum(axis=1)
    errors, solutions = np.full(len(alpha), np.inf), np.zeros((len(alpha), 3))
    for subset in SUBSETS:
        part = normal[:, subset][:, :, subset] + 1e-12 * np.eye(len(subset))
        values = np.zeros((len(alpha), 3))
        values[:, subset] = np.linalg.solve(part, right[:, subset, None])[..., 0]
        error = ((np.einsum("prk,pk->pr", design, values) - 1) ** 2).sum(axis=1)
        better = (values >= 0).all(axis=1) & (error < errors)
        errors[better], solutions[better] = error[better], values[better]
    i = int(errors.argmin())
    E, A, B = solutions[i].tolist()
    a, b = float(alpha[i, 0]), float(beta[i, 0])
    return float(errors[i]), Law(E=E, A=A * float(at_N) ** a, alpha=a, B=B * float(at_D) ** b, beta=b, R=float(R))
