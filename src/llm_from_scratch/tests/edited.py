"""Copies of the package with edits, as a researcher makes them, and commands run in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import llm_from_scratch

PACKAGE = Path(llm_from_scratch.__file__).resolve().parent
ROOT = PACKAGE.parents[1]


@dataclass(frozen=True)
class Edit:
    """Text of one file that is replaced; new files have an empty `old`."""

    file: str
    old: str
    new: str


class EditedCopy:
    """A copy of the package in which commands run."""

    def __init__(self, folder: Path, edits: Iterable[Edit]):
        self.folder = folder
        ignore = shutil.ignore_patterns("tests", "__pycache__")
        shutil.copytree(PACKAGE, folder / "src" / PACKAGE.name, ignore=ignore)
        for name in ("config", "configs"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        for name in ("train.py", "sample.py", "model.py", "configurator.py"):
            shutil.copy(ROOT / name, folder / name)
        for edit in edits:
            path = folder / "src" / PACKAGE.name / edit.file
            text = path.read_text(encoding="utf-8") if edit.old else ""
            assert text.count(edit.old) == 1 or not edit.old, f"{edit.file} holds {text.count(edit.old)} x {edit.old!r}"
            path.write_text(text.replace(edit.old, edit.new) if edit.old else edit.new, encoding="utf-8")

    def run(self, *words: str, code: int = 0) -> str:
        """A command of the copy: a module such as cli.train, or a script such as train.py. Returns what it printed."""
        first = [words[0]] if words[0].endswith(".py") else ["-m", f"{PACKAGE.name}.{words[0]}"]
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *first, *words[1:]], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        )  # fmt: skip
        assert done.returncode == code, f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout
