"""The text of a mixture of datasets, as a setting: '{book: 0.7, code: 0.3}', or book:0.7,code:0.3."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import UserError, one_line
from .settings import did_you_mean

SHORT = re.compile(r"[^\s,:{}][^,{}]*:\d[\d.eE+-]*(,\s*[^\s,:{}][^,{}]*:\d[\d.eE+-]*)+")
EXAMPLE = "'{book: 0.7, code: 0.3}', or for a limit '{book: {weight: 0.7, max_epochs: 4}, code: 0.3}'"
MOST, MOST_BRACKETS = 1 << 16, 1 << 10


@dataclass(frozen=True)
class Part:
    """A dataset of a mixture."""

    name: str
    weight: float
    """Its share of the training windows."""
    max_epochs: float | None = None
    """Passes over it, after which the other parts get its share. None: no limit."""


def read_mixture(dataset: str) -> list[Part]:
    """The parts of a mixture, with weights of sum 1; empty if the setting is the name or folder of one dataset. Raises
    UserError."""
    if SHORT.fullmatch(dataset):
        words = [part.strip().rpartition(":") for part in dataset.split(",")]
        pairs = [(name, _number(weight)) for name, _, weight in words]
    elif dataset.lstrip().startswith("{"):
        pairs = _pairs(dataset)
    else:
        return []
    parts = [_part(str(name), value) for name, value in pairs]
    if not parts:
        raise UserError(f"a mixture needs at least one dataset, as in {EXAMPLE}")
    names = [part.name for part in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the mixture names {twice[0]} twice: give it one weight")
    total = sum(part.weight for part in parts)
    return [Part(part.name, part.weight / total, part.max_epochs) for part in parts]


def _pairs(text: str) -> list[tuple[Any, Any]]:
    import yaml  # 20 ms that --help does not need

    try:
        if len(text) > MOST or text.count("[") + text.count("{") > MOST_BRACKETS:
            raise ValueError("it is too long")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it uses an alias (*name); write the value instead")
        loader = yaml.SafeLoader(text)
        return loader.construct_pairs(loader.get_single_node(), deep=True)  # a mapping would hide a repeated name
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the mixture cannot be read ({one_line(error)}): write it as {EXAMPLE}") from None


def _part(name: str, value: Any) -> Part:
    given = value if isinstance(value, dict) else {"weight": value}
    if unknown := [key for key in given if key not in ("weight", "max_epochs")]:
        hint = did_you_mean(str(unknown[0]), ("weight", "max_epochs"), "expected weight and max_epochs")
        raise UserError(f"unknown setting {one_line(str(unknown[0]))} of {name} in the mixture; {hint}")
    for key in ("weight", *(("max_epochs",) if given.get("max_epochs") is not None else ())):
        number = given[key] = _number(given.get(key))
        if number is None or not 0 < number < 1e9:
            raise UserError(f"{key} of {name} in the mixture is not a positive number: write it as {EXAMPLE}")
    return Part(name, **given)


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
