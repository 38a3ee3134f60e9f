"""The value of a setting, from a file or the command line, as text for the parser."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import reprlib
import types
import typing
from pathlib import Path
from typing import Any

from .errors import UserError


def union_members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def literal_values(kinds: tuple[Any, ...]) -> set[str]:
    return {v for kind in kinds if typing.get_origin(kind) is typing.Literal for v in typing.get_args(kind)}


def as_text(key: str, value: Any, leaves: dict[str, Any], source: Path | None = None) -> str:
    """A value from a file or the command line, as text for the parser."""
    kinds = union_members(leaves[key])
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        return repr(tuple(_as_list(key, value)))
    if any(typing.get_origin(kind) is dict for kind in kinds):
        names = any(typing.get_args(kind) == (str, str) for kind in kinds)
        return repr(_as_names(key, value) if names else _as_dict(key, value))
    if key == "dataset" and isinstance(value, dict):
        return json.dumps(value)  # a mixture, as on the command line
    if isinstance(value, (dict, list, tuple)):
        raise UserError(f"{key} must be one value, got {_short(value)}" + (f" in {source}" if source else ""))
    text = str(value)
    if text.lower() in ("true", "false") and bool in kinds:
        return text.capitalize()
    if text.lower() in ("none", "null") and type(None) in kinds:
        return "None"
    if int in kinds and float not in kinds and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text, re.IGNORECASE):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(text)
            if number == int(number) and not text.lstrip("+-").isdigit():
                return str(int(number))  # 5e3 counts as well as 5000
    return text


def _as_dict(key: str, value: Any) -> dict[int, float]:
    """{id: number}, from a file or from text such as {50256: -100}, with or without quotes around the id."""
    try:
        content = ast.literal_eval(value) if isinstance(value, str) else value
        return {int(token): float(number) for token, number in content.items()}
    except (ValueError, TypeError, AttributeError, SyntaxError, MemoryError, RecursionError, OverflowError):
        raise UserError(f"{key} must be written as '{{ID: NUMBER, ...}}', got {_short(value)}") from None


def _as_names(key: str, value: Any) -> dict[str, str]:
    """{name: text}, from a file or from text such as {poet: out-a, coder: out-b}."""
    import yaml  # 20 ms that --help does not need

    try:
        content = yaml.safe_load(value) if isinstance(value, str) else value
        if not all(isinstance(text, str) for text in content.values()):
            raise ValueError
        return {str(name): text for name, text in content.items()}
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{key} must be written as '{{NAME: FOLDER, ...}}', got {_short(value)}") from None


def _as_list(key: str, value: Any) -> list[str]:
    if isinstance(value, str) and value.startswith(("[", "(")):
        with contextlib.suppress(ValueError, RecursionError):  # a text that starts with a bracket
            value = json.loads("[" + value[1:-1].rstrip(",") + "]" if value[0] == "(" else value)
    if isinstance(value, str):
        return [value] if value else []
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{key} must be a string or a list of strings, got {_short(value)}")
    return list(value)


def _short(value: Any) -> str:
    return text if len(text := reprlib.repr(value)) < 200 else f"a {type(value).__name__}"
