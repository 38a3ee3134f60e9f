"""The sources of the package and their imports, from the syntax tree, for the tests of the layout."""

from __future__ import annotations

import ast
import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llm_from_scratch

PACKAGE = Path(llm_from_scratch.__file__).resolve().parent
NAME = PACKAGE.name


@dataclass(frozen=True)
class Import:
    module: str
    """The importing module, without the package's name: core.model."""
    target: str
    """What is imported, likewise; "" is the package itself."""
    function: str
    """The function or method around the import: GPT.from_pretrained; "" at module level."""
    typing_only: bool
    line: int

    def __str__(self) -> str:
        return (
            f"{self.module}:{self.line} imports {self.target or NAME}{' in ' + self.function if self.function else ''}"
        )


@functools.cache
def tree_of(source: str) -> ast.Module:
    gc.disable()  # it would look through the growing tree again and again: three times as slow
    try:
        return ast.parse(source)
    finally:
        gc.enable()


@functools.cache
def nodes_of(source: str) -> tuple[ast.AST, ...]:
    """Every node of the source."""
    return tuple(ast.walk(tree_of(source)))


def dotted(node: ast.expr) -> str:
    """A name as it is written: torch.load. Of f(x).load it is .load. Ten times as fast as ast.unparse()."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))


def for_types(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")


@functools.cache
def sources() -> dict[str, str]:
    """{module: source} of everything but the tests and __main__; a room's __init__ bears the room's name, the package's
    is ""."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("tests", "_presets", "__main__"):
            found[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
    return found


def is_package(module: str) -> bool:
    return (PACKAGE / module.replace(".", "/")).is_dir()


@functools.cache
def imports(module: str, source: str) -> tuple[Import, ...]:
    """Every import of ours in the source, wherever it stands."""

    def targets(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [NAME, *filter(None, module.split("."))]
                up = node.level - 1 if is_package(module) else node.level
                base = ".".join([*here[: len(here) - up], *filter(None, base.split("."))])
            # `from . import name`: the name may be a module or something that the package's __init__ defines
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                path = PACKAGE.parent / inner.replace(".", "/")
                yield inner if path.is_dir() or path.with_suffix(".py").is_file() else base
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and str(argument.value).startswith((".", NAME)):
                yield NAME + "." + str(argument.value).removeprefix(NAME).lstrip(".")

    found: list[Import] = []

    def visit(node: ast.AST, scope: tuple[str, ...], in_function: bool, typing_only: bool) -> None:
        for target in targets(node):
            if target == NAME or target.startswith(NAME + "."):
                function = ".".join(scope) if in_function else ""
                found.append(Import(module, target[len(NAME) + 1 :], function, typing_only, getattr(node, "lineno", 0)))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            scope, in_function = (*scope, node.name), in_function or not isinstance(node, ast.ClassDef)
        if isinstance(node, ast.If) and for_types(node):
            for statement in node.body:
                visit(statement, scope, in_function, True)
            for statement in node.orelse:
                visit(statement, scope, in_function, typing_only)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, scope, in_function, typing_only)

    visit(tree_of(source), (), False, False)
    return tuple(found)
