"""The amount that --budget grants: time, arithmetic or tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from ..errors import UserError, one_line

SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600, "d": 86400}
PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21}
SHORTEST = 10.0  # seconds: starting a run takes about four
EXPECTED = "expected a time, FLOPs or tokens, such as 90s, 10min, 2h, 1e15flops or 50Mtokens"


class Budget(NamedTuple):
    amount: float
    unit: Literal["seconds", "flops", "tokens"]
    text: str
    """As the user wrote it."""


class Deadline(NamedTuple):
    """The time at which a run ends."""

    at: float
    """On time.monotonic()."""
    may_extend: bool = True
    """Whether the run gets more steps than planned if there is time for them; it gets fewer if there is not."""
    expected: Callable[[int], str] | None = None
    """The expected loss after this many steps, as a line."""


def parse_budget(text: str) -> Budget:
    """Raises UserError if the text is not a positive amount with a unit."""
    plain = text.strip().lower()
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*([a-z]+)", plain)
    shown = one_line(text)
    if match is None:
        raise UserError(f"budget={shown!r}: {EXPECTED}")
    number, name = float(match[1] + (match[2] or "")), match[3]
    if name in SECONDS:
        seconds = number * SECONDS[name]
        if not SHORTEST <= seconds < math.inf:
            raise UserError(f"budget={shown!r}: expected a finite time of {SHORTEST:g}s or more")
        return Budget(seconds, "seconds", plain)
    for unit in ("flops", "tokens"):
        prefix = name.removesuffix(unit)
        if name.endswith(unit) and prefix in PREFIXES:
            amount = number * PREFIXES[prefix]
            if not 1 <= amount < math.inf:
                raise UserError(f"budget={shown!r}: expected a finite number of {unit} above 0")
            return Budget(amount, unit, plain)
    raise UserError(f"budget={shown!r}: unknown unit {name!r}; {EXPECTED}")
