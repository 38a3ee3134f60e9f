"""The base of every group of settings: unknown names are refused, types and ranges are checked, a tree of groups is
turned into plain data."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from .errors import UserError, one_line


def did_you_mean(name: str, known: Iterable[str], otherwise: str, similarity: float = 0.6) -> str:
    """The hint for an unknown name: the nearest known one, or else `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=similarity)
    return f"did you mean {near[0]}?" if near else otherwise


class Settings:
    """The base of every group of settings: a name that is not a setting is refused."""

    def __setattr__(self, name: str, value: Any) -> None:
        known = getattr(type(self), "__dataclass_fields__", {})
        if name not in known:
            raise UserError(f"unknown setting {name!r}; {did_you_mean(name, known, 'see llm-train --help-all')}")
        object.__setattr__(self, name, value)


def validate(tree: Any) -> None:
    """Checks the types and calls validate() of every section of a dataclass tree."""
    for item in dataclasses.fields(tree):
        section = getattr(tree, item.name)
        if dataclasses.is_dataclass(section) and hasattr(section, "validate"):
            check_types(section)
            section.validate()


def check_types(section: Any) -> None:
    """Raises UserError if a value does not have the type of its setting."""
    hints = type_hints(section.__class__)
    for item in dataclasses.fields(section):
        if not fits(value := getattr(section, item.name), hints[item.name]):
            raise UserError(f"{item.name}={one_line(repr(value))} has the wrong type: expected {item.type}")


type_hints = functools.cache(typing.get_type_hints)


def leaf_types(tree_type: type) -> dict[str, Any]:
    """{leaf name: type} of a dataclass tree."""
    leaves: dict[str, Any] = {}
    for name, hint in type_hints(tree_type).items():
        leaves |= leaf_types(hint) if dataclasses.is_dataclass(hint) else {name: hint}  # type: ignore
    return leaves


def leaves_by_section(tree_type: type) -> dict[str, set[str]]:
    """{section: its leaf names} of a dataclass tree."""
    hints = type_hints(tree_type)
    return {name: set(leaf_types(hint)) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}  # type: ignore


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a setting."""
    kind = typing.get_origin(hint) or hint
    if kind is Literal:
        return value in typing.get_args(hint)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, some) for some in typing.get_args(hint))
    return isinstance(value, (list, tuple, str) if kind is tuple else kind)


def to_dict(tree: Any) -> dict[str, Any]:
    """The tree as {section: {leaf: value}}, ready for JSON and YAML."""
    return dataclasses.asdict(tree, dict_factory=lambda kv: {k: list(v) if isinstance(v, tuple) else v for k, v in kv})


def flatten(tree: Any) -> dict[str, Any]:
    """{leaf name: value} over all sections."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(tree):
        value = getattr(tree, item.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def at_least(settings: Any, low: float, *names: str) -> None:
    """Raises UserError if one of these settings is below `low` or infinite. None and words such as auto are allowed.
    settings: an object, or {name: value}, which is checked whole."""
    for name, value in _numbers(settings, names):
        if not low <= value < math.inf:
            raise UserError(f"{name}={value} is out of range: expected {low:g} or more")


def above(settings: Any, low: float, *names: str) -> None:
    for name, value in _numbers(settings, names):
        if not low < value < math.inf:
            raise UserError(f"{name}={value} is out of range: expected a finite number above {low:g}")


def between(
    settings: Any, low: float, high: float, *names: str, open_left: bool = False, open_right: bool = False
) -> None:
    for name, value in _numbers(settings, names):
        if not low <= value <= high or (open_left and value == low) or (open_right and value == high):
            left, right = "above" if open_left else "from", "below" if open_right else "to"
            raise UserError(f"{name}={value} is out of range: expected a value {left} {low:g} {right} {high:g}")


def matches(settings: Any, pattern: str, expected: str, *names: str) -> None:
    """Raises UserError if one of these texts is not what the pattern describes. None is allowed."""
    for name in names:
        if (value := getattr(settings, name)) is not None and not re.fullmatch(pattern, value):
            raise UserError(f"{name}={value!r} is not {expected}")


def _numbers(settings: Any, names: tuple[str, ...]) -> list[tuple[str, float]]:
    found = settings if isinstance(settings, dict) else {name: getattr(settings, name) for name in names}
    return [(name, value) for name, value in found.items() if not isinstance(value, (str, type(None)))]
