"""Which files of a folder or an archive are read: by known suffixes, or by patterns."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError, one_line
from ..machine.extras import missing

HEAD = 1 << 13  # bytes in which a null character marks a binary file


@functools.lru_cache(maxsize=64)
def compiled(patterns: tuple[str, ...]) -> Any:
    """Patterns as in .gitignore."""
    try:
        import pathspec
    except ImportError:
        instead = "use a glob such as 'src/**/*.py'"
        raise missing("pathspec", "documents", "--include and --exclude: matching patterns", instead) from None
    try:
        return pathspec.GitIgnoreSpec.from_lines(patterns)
    except ValueError as error:
        raise UserError(f"not a valid .gitignore pattern: {one_line(error)}") from None


@dataclass(frozen=True)
class Selection:
    """include: patterns of files, also of other suffixes; then files that a .gitignore excludes are left out."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def accepts(self, name: str, is_known: bool) -> bool:
        """name: relative to the folder or archive. is_known: whether its suffix is."""
        return not is_hidden(name) and self.selects(name, is_known)

    def selects(self, name: str, is_known: bool = True) -> bool:
        """The same for the name of any file, hidden or not, such as one that a glob names."""
        if self.exclude and compiled(self.exclude).match_file(name):
            return False
        return compiled(self.include).match_file(name) if self.include else is_known

    def files(self, folder: Path, is_known: Callable[[Path], bool], report: Callable[[str], None]) -> list[Path]:
        """The selected files below a folder, sorted. Linked folders are not entered, and linked files are read only if
        they are inside the folder."""
        real, found, outside, binary = Path(os.path.realpath(folder)), [], 0, 0
        for path in walk(folder, bool(self.include)):
            known = is_known(path)
            if not self.accepts(path.relative_to(folder).as_posix(), known):
                continue
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real):
                outside += 1
            elif not known and _is_binary(path):
                binary += 1
            else:
                found.append(path)
        if outside:
            report(f"{folder.as_posix()}: ignored {outside} links to files outside the folder; a glob reads them")
        if binary:
            report(f"{folder.as_posix()}: ignored {binary} binary files")
        return found


def fixed_part(pattern: str) -> str:
    """The folder before the first part of a path that is a pattern."""
    parts = pattern.split("/")
    return "/".join(parts[: next(at for at, part in enumerate(parts) if any(sign in part for sign in "*?["))])


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(name).parts)


def walk(folder: Path, rules: bool = False) -> list[Path]:
    """The files below a folder that are not hidden, sorted. rules: without files that a .gitignore excludes."""
    Rules = list[tuple[str, Any]]
    found: list[str] = []
    waiting: list[tuple[str, Rules]] = [("", [])]
    while waiting:
        below, above = waiting.pop()
        here = folder / below
        if rules and (here / ".gitignore").is_file():
            lines = (here / ".gitignore").read_text(encoding="utf-8", errors="replace").splitlines()
            above = [*above, (below, compiled(tuple(lines)))]
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if not _ignored(f"{name}/", above):
                        waiting.append((f"{name}/", above))
                elif os.path.isfile(entry) and not _ignored(name, above):  # False for links in a circle
                    found.append(name)
    return [folder / name for name in sorted(found)]


def _ignored(name: str, rules: Sequence[tuple[str, Any]]) -> bool:
    """The innermost .gitignore with a matching pattern decides."""
    for below, spec in reversed(rules):
        verdict = spec.check_file(name[len(below) :]).include
        if verdict is not None:
            return verdict
    return False


def _is_binary(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return b"\0" in file.read(HEAD)
    return False
