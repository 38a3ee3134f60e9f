"""Helpers of the justfile's recipes loc, clean, clean-all, train and tensorboard.

    python scripts/housekeeping.py loc | clean | clean-all [--yes] | logs

Standard library only, so that it runs before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ONE_HOUR_BUDGET = 2000
ONE_HOUR_PATH = (
    "config.py",
    "core/model.py",
    "core/dataset.py",
    "training/optimizer.py",
    "training/scheduler.py",
    "training/trainer.py",
    "generation/sampling.py",
    "generation/generator.py",
)

CACHES = (".pytest_cache", ".mypy_cache", ".ruff_cache", ".coverage", "htmlcov", "build", "dist")
CACHES_ANYWHERE = ("__pycache__", ".ipynb_checkpoints")
# One of these in a folder shows that a training run wrote it.
RUN_MARKS = ("metrics.jsonl", "ckpt.pt", "step-*", "damaged-step-*", ".tmp-step-*", "previous-*")
# Files that a data script writes next to its .bin files, without the text itself (input.txt).
BESIDE_BINS = (".checked.json", "manifest.json", "tokenizer.meta.json", "tokenizer.json", "ranks.tiktoken", "meta.pkl")


class Refusal(Exception):
    """One line for the user; exit code 2."""


# --- loc ---


def loc(root: Path) -> int:
    """Prints the lines of the one-hour path. Returns 1 if they exceed the budget or a file is missing."""
    total, missing = 0, False
    for name in ONE_HOUR_PATH:
        path = root / "src" / "llm_from_scratch" / name
        if path.is_file():
            lines = len(path.read_text(encoding="utf-8").splitlines())
            total += lines
            print(f"{lines:6d}  {name}")
        else:
            missing = True
            print(f"     -  {name} (missing)")
    over = total > ONE_HOUR_BUDGET
    print(f"{total:6d}  of {ONE_HOUR_BUDGET}{': over the budget, remove something from the path' if over else ''}")
    return int(over or missing)


# --- clean, clean-all ---


def tracked_files(root: Path) -> set[Path]:
    """Absolute paths that git tracks; empty outside a git checkout, where only ignored names are ever listed."""
    try:
        listing = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True)
    except OSError:
        return set()
    if listing.returncode:
        return set()
    return {root / os.fsdecode(name) for name in listing.stdout.split(b"\0") if name}


def caches(root: Path) -> Iterator[Path]:
    """Caches and build products."""
    yield from (root / name for name in CACHES if (root / name).exists())
    yield from root.glob("src/*.egg-info")
    for folder, subfolders, _ in os.walk(root):
        yield from (Path(folder) / name for name in subfolders if name in CACHES_ANYWHERE)
        at_root = Path(folder) == root
        skip = {".venv", ".git", *CACHES, *CACHES_ANYWHERE} if at_root else set(CACHES_ANYWHERE)
        subfolders[:] = [name for name in subfolders if name not in skip]


def is_run(folder: Path) -> bool:
    return folder.is_dir() and any(next(folder.glob(mark), None) is not None for mark in RUN_MARKS)


def runs(root: Path) -> Iterator[Path]:
    """Folders that training runs wrote: out*, one level below those, and runs/*."""
    for folder in sorted(root.glob("out*")):
        if is_run(folder):
            yield folder
        elif folder.is_dir() and not folder.is_symlink():
            yield from filter(is_run, sorted(folder.iterdir()))
    yield from filter(is_run, sorted(root.glob("runs/*")))


def products(root: Path) -> Iterator[Path]:
    """Runs and prepared data: everything that the commands can recreate from the raw text."""
    yield from runs(root)
    yield from (root / "data" / name for name in ("processed", "cache") if os.path.lexists(root / "data" / name))
    for folder in sorted(root.glob("data/*")):
        if folder.name not in ("raw", "processed", "cache") and folder.is_dir() and not folder.is_symlink():
            bins = sorted(folder.glob("*.bin"))
            yield from bins
            if bins:
                yield from (folder / name for name in BESIDE_BINS if (folder / name).is_file())


def deletable(root: Path, targets: Iterator[Path]) -> list[Path]:
    """The targets without tracked files, data/raw, and anything outside the checkout behind a link.

    A folder that holds a tracked file is replaced by its untracked files.
    """
    tracked, raw, home = tracked_files(root), (root / "data" / "raw").resolve(), root.resolve()
    kept: list[Path] = []
    for target in targets:
        place = target.parent.resolve() / target.name
        if not place.is_relative_to(home) or place.is_relative_to(raw) or raw.is_relative_to(place):
            continue
        if target in tracked:
            continue
        if target.is_dir() and not target.is_symlink() and any(path.is_relative_to(target) for path in tracked):
            inside = (Path(folder) / name for folder, _, names in os.walk(target) for name in names)
            kept += [path for path in inside if path not in tracked]
        else:
            kept.append(target)
    return kept


def size(path: Path) -> int:
    """Bytes of a file or of all files in a folder; links do not count."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names)


def delete(paths: list[Path]) -> int:
    """Returns 1 if something could not be deleted. Of a link, only the link is deleted."""
    failed = 0
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif os.path.lexists(path):
                path.unlink()
        except OSError as error:
            print(f"could not delete {path}: {error.strerror}", file=sys.stderr)
            failed = 1
    return failed


def clean(root: Path) -> int:
    paths = deletable(root, caches(root))
    print(f"clean: deleting {len(paths)} cache and build entries")
    return delete(paths)


def clean_all(root: Path, yes: bool) -> int:
    """Lists runs and prepared data, asks, deletes. Keeps raw texts and tracked files."""
    paths = deletable(root, products(root))
    if paths:
        print("clean-all deletes:")
        for path in paths:
            what = "link only" if path.is_symlink() else f"{size(path) / 1e6:.1f} MB"
            print(f"  {path.relative_to(root)}  ({what})")
        if not yes:
            try:
                answer = input(f"Delete these {len(paths)}? [y/N] ")
            except EOFError:
                print()
                raise Refusal("nothing was deleted: no terminal to confirm on; pass --yes to delete") from None
            if answer.strip().lower() not in ("y", "yes"):
                print("nothing was deleted")
                return 1
    else:
        print("clean-all: no runs and no prepared data")
    return delete(paths) or clean(root)


# --- train, tensorboard ---


def logs(root: Path) -> str:
    """TensorBoard's --logdir_spec over all runs: name:folder,name:folder."""
    found = [run for run in runs(root) if (run / "tensorboard").is_dir()]
    if not found:
        raise Refusal("no run has a TensorBoard log yet: `./just demo` makes one")
    return ",".join(f"{run.relative_to(root).as_posix()}:{run / 'tensorboard'}" for run in found)


def main(argv: list[str], root: Path = ROOT) -> int:
    command, args = (argv[0] if argv else ""), argv[1:]
    try:
        if command == "loc" and not args:
            return loc(root)
        if command == "clean" and not args:
            return clean(root)
        if command == "clean-all" and args in ([], ["--yes"]):
            return clean_all(root, yes=bool(args))
        if command == "logs" and not args:
            print(logs(root))
            return 0
        raise Refusal(f"{' '.join(argv) or 'nothing'}: expected loc, clean, clean-all [--yes] or logs")
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
