"""The scaling law: bits per character of held-out text, as a function of parameters, text and context.

    L(N, D, U, T) = E + A / N^alpha + B / D'^beta + C / T^gamma
    D' = U + U R (1 - exp(-(D / U - 1) / R))   if D > U, else D

N: parameters that are multiplied (without embeddings). D: text trained on. U: different text. T: context. Amounts of
text are in characters (a law of llm-scale: bytes), not in tokens, so that tokenizers compare. The form in N and D is
that of arXiv 2203.15556. D' is from arXiv 2305.16264: the text that would be worth as much if nothing were repeated.

The constants hold for the text they were fitted on. For another text, the loss is multiplied by a power of the ratio
of the two texts' cross-entropies under counted n-grams, after as much text as the run trains on (counts.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..machine.files import read_json
from .counts import Curve

POWER = 1.58  # a model gains more from an easier text than counts do (docs/SCALING.md)
EASIEST, HARDEST = 0.2, 3.0  # limits of the scale: a very short text says little
INTERVAL = 2.0  # standard deviations: about 95% of the runs


class Prediction(NamedTuple):
    """An expected loss in bits per character (or byte), and the interval that holds it in 95 of 100 runs."""

    bits: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """Constants of the law."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    C: float = 0.0
    gamma: float = 1.0
    R: float = 15.4
    """Repetitions after which text has lost most of its value."""
    spread: float = 0.05
    """Standard deviation of measured / predicted - 1."""
    text: Curve | None = None
    """Curve of the fitted text. None: the law is for one text and is not scaled. Not in files."""

    def __post_init__(self) -> None:
        for name in CONSTANTS:
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            positive = name in ("alpha", "beta", "gamma", "R")
            if not is_number or value < 0 or (positive and value == 0):
                raise UserError(
                    f"a law's {name} must be a number {'above' if positive else 'of at least'} 0: {value!r}"
                )

    def worth(self, seen: float, unique: float) -> float:
        """D': the text without repetitions that is worth as much as `seen` bytes of `unique` ones."""
        if seen <= unique:
            return seen
        return unique * (1 + self.R * -math.expm1((1 - seen / unique) / self.R))

    def bits(self, params: float, seen: float, unique: float = math.inf, context: float = math.inf) -> float:
        """The loss of a text as hard as the fitted one."""
        of_data = self.B / self.worth(seen, unique) ** self.beta
        return self.E + self.A / params**self.alpha + of_data + self.C / context**self.gamma

    def balanced(self, seen: float, unique: float = math.inf) -> float:
        """The parameters for which more of them and more text would help equally, for the same arithmetic (6 N D)."""
        of_data = self.B * self.beta / self.worth(seen, unique) ** self.beta
        return (self.A * self.alpha / of_data) ** (1 / self.alpha) if of_data else math.inf

    def predict(
        self,
        params: float,
        seen: float,
        unique: float = math.inf,
        context: float = math.inf,
        text: Curve | None = None,
    ) -> Prediction:
        """The expected loss of a text with this curve. None: as hard as the fitted one."""
        scale = 1.0
        if text is not None and self.text is not None:
            worth = self.worth(seen, unique)
            scale = min(HARDEST, max(EASIEST, (text.at(worth) / self.text.at(worth)) ** POWER))
        bits, factor = scale * self.bits(params, seen, unique, context), math.exp(INTERVAL * self.spread)
        return Prediction(bits, bits / factor, bits * factor)


CONSTANTS = tuple(item.name for item in dataclasses.fields(Law) if item.name != "text")


def read_law(path: str | Path) -> Law:
    """A law from a JSON file: {"E": ..., "A": ..., "alpha": ..., "B": ..., "beta": ..., ...}; other names are ignored.
    Raises UserError."""
    content: Any = read_json(Path(path))
    if not isinstance(content, dict) or not {"E", "A", "alpha", "B", "beta"} <= content.keys():
        raise UserError(
            f"{path} is not a law: expected a JSON object with E, A, alpha, B and beta, as llm-scale writes"
        )
    try:
        return Law(**{name: content[name] for name in CONSTANTS if name in content})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# docs/SCALING.md compares them with the runs they are fitted to
SHAKESPEARE = Curve(amount=1003520.0, bits=2.4075, gain=0.3221)
PLAIN = Law(E=1.52, A=20.4, alpha=0.34, B=50.0, beta=0.335, C=8.0, gamma=1.0, R=3.0, spread=0.06, text=SHAKESPEARE)
NGRAMS = Law(E=1.13, A=1.5, alpha=0.34, B=15.0, beta=0.2, C=2.0, gamma=1.0, R=0.5, spread=0.06, text=SHAKESPEARE)
