"""The text of `--help`: the description, and each setting with its type, its help and its default."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import shlex
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from .setting_text import union_members
from .settings import leaf_types, leaves_by_section, type_hints

WIDEST = 20  # of a setting with its help on the same line

Entries = list[tuple[str, str]]  # a setting with its type, its help


def help_text(
    tree_type: type, values: dict[str, Any], notes: dict[str, str], common: Sequence[str], usage: str, description: str,
    own: dict[str, str],
) -> str:  # fmt: skip
    """The settings in common, in that order, or all by section, and the command's own options. values: the defaults to
    show. notes: texts to show instead. An indented paragraph of the description is printed as it is."""
    hints = type_hints(tree_type)
    kinds = {name: hints[name] for name in leaves_by_section(tree_type)} or {"": tree_type}
    docs = {setting: text for kind in kinds.values() for setting, text in setting_docs(kind).items()}
    leaves = leaf_types(tree_type)

    def entries(names: Iterable[str]) -> Entries:
        shown = {name: notes.get(name) or _value_text(values.get(name)) for name in names}
        texts = {name: f"{docs.get(name, '')} (default: {default})".strip() for name, default in shown.items()}
        return [(f"--{name} {_type_text(leaves[name])}", text) for name, text in texts.items()]

    if common or "" in kinds:
        boxes = [("options", "", [*own.items(), *entries(common or leaves)])]
    else:
        boxes = [("options", "", [*own.items()])]
        for name, kind in kinds.items():
            title = "main" if name == "options" else name
            boxes.append((f"{title} options", inspect.getdoc(kind) or "", entries(leaf_types(kind))))
    return "\n".join(_lines([f"usage: {usage} [-h] [OPTIONS]", *description.split("\n\n")], boxes))


def _lines(paragraphs: list[str], boxes: list[tuple[str, str, Entries]]) -> Iterator[str]:
    columns = max(shutil.get_terminal_size().columns, 40)
    wrap = functools.partial(textwrap.wrap, width=columns, break_on_hyphens=False)
    for text in paragraphs:
        yield from [*([text] if text.startswith("  ") else wrap(text)), ""]
    widest = max(len(name) for *_, entries in boxes for name, _ in entries if len(name) <= WIDEST)
    indent = " " * (widest + 4)
    for number, (title, about, entries) in enumerate(boxes):
        yield from ["", title, " " + "-" * (columns - 2)] if number else [title, " " + "-" * (columns - 2)]
        yield from [*wrap(about, initial_indent="  ", subsequent_indent="  "), ""] if about else ()
        for name, text in entries:
            start = f"  {name}".ljust(len(indent)) if len(name) <= widest else indent
            yield from [f"  {name}"] if start == indent else ()
            yield from wrap(text, initial_indent=start, subsequent_indent=indent)


def _type_text(hint: Any) -> str:
    """INT, STR|{auto}, {True,False}. None is among the defaults, and explained by the help."""
    words, others = list[str](), list[str]()
    for kind in union_members(hint):
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if kind is bool:
            words += ["True", "False"]
        elif origin is Literal:
            words += map(str, args)
        elif origin is tuple:
            others.append(_type_text(args[0]))
        elif origin is dict:
            others.append(f"{{{_type_text(args[0])}: {_type_text(args[1])}, ...}}")
        elif kind is not types.NoneType:
            others.append(kind.__name__.upper())
    return "|".join([*others, f"{{{','.join(words)}}}"] if words else others)


def _value_text(value: Any) -> str:
    """A value as the command line expects it."""
    if value in ((), {}):
        return "none"
    if isinstance(value, (tuple, list)):
        value = value[0] if len(value) == 1 else json.dumps(value)
    return shlex.quote(value.encode("unicode_escape").decode() if isinstance(value, str) else str(value))


def setting_docs(section: type) -> dict[str, str]:
    """{setting: the text under it in the source, on one line} of a dataclass."""
    texts = {}
    for item, text in itertools.pairwise(_classes(section.__module__)[section.__name__].body):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(text, ast.Expr):
            texts[item.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module. inspect.getsource of a class would parse the whole file for each."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
