"""The folders with the intermediate results of a request, from which the same command resumes."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

KINDS = ("cleaning", "executor")


def work_folder(parent: Path, kind: str, target: Path, request: str) -> Path:
    """request: its hash. target: the folder of the dataset."""
    return parent / f"{kind}-{_hash(target)}-{request[:16]}"


def remove_work(parent: Path, target: Path, request: str = "") -> None:
    """Removes what requests, or one request, have left of the preparation of target."""
    for kind in KINDS:
        for folder in parent.glob(work_folder(Path(), kind, target, request).name + "*"):
            shutil.rmtree(folder, ignore_errors=True)


def _hash(target: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(target))).hexdigest()[:12]
