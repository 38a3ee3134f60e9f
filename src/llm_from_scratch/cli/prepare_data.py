"""llm-prepare: texts to training data."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

from ..presets import parse
from .common import run

DESCRIPTION = """Turns texts into training data: llm-prepare SOURCE ... [--key=value ...]

A SOURCE is a file (.txt and .md: one document; .jsonl: one per line; .parquet: one per row), a folder, a glob, - for
standard input, or a known text: shakespeare_char, shakespeare, openwebtext, python_docs. What is not found here is
looked for in data/raw. A single text is split by position, its end validates; several documents are split by document;
or give the validation texts with --val_files. A second run on unchanged sources does no work."""


@dataclass
class PrepareOptions:
    """What is prepared, and how."""

    tokenizer: str | None = None
    """char, byte, gpt2, cl100k_base, o200k_base, bpe:N (N ids, learnt from the text), the path of a tokenizer.json, or
    a folder whose tokenizer to use: other prepared data, a checkpoint. None is gpt2, for shakespeare_char char."""
    out_dir: str | None = None
    """Folder for the result. None is data/processed/NAME."""
    name: str | None = None
    """Name of the dataset. None takes it from the first source."""
    train_files: tuple[str, ...] = ()
    """Training texts, instead of SOURCE. One, or a list such as '["a.txt", "b/*.md"]'."""
    val_files: tuple[str, ...] = ()
    """Validation texts; the sources are then for training alone."""
    val_fraction: float | None = None
    """Share of the characters (single text) or documents (several) that validate. None is 0.1, openwebtext 0.0005."""
    seed: int = 2357
    """Decides which documents validate."""
    text_key: str = "text"
    """Field of a .jsonl line, or column of a .parquet file, that holds the text."""
    shard_size: int = 1 << 30
    """Tokens in one file at most; what fits in one is named train.bin and val.bin."""
    workers: int | None = None
    """Processes that encode. None takes all cores for large inputs, 0 is this process alone."""
    cache_dir: str | None = "data/cache"
    """Folder for encoded parts, from which an interrupted run goes on. None keeps none."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return run(_main, argv)


def _main(argv: list[str]) -> None:
    parsed = parse(PrepareOptions, argv, prog="llm-prepare", description=DESCRIPTION, presets=False)
    from ..data.prepare import prepare  # after --help, which needs no numpy

    prepare(parsed.positionals, **dataclasses.asdict(parsed.tree), report=_say)


def _say(line: str) -> None:
    """Prints whatever the terminal can show of a line, at once."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


if __name__ == "__main__":
    sys.exit(main())
