"""llm-prepare: turns texts into training data."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

from ..errors import OutputError
from ..presets import parse
from .common import command

DESCRIPTION = """Turns texts into training data: llm-prepare SOURCE ... [--key=value ...]

A SOURCE is a file (.txt and .md: one document; .jsonl: one per line; .parquet: one per row), a folder, a glob, - for
standard input, or a known text: shakespeare_char, shakespeare, openwebtext, python_docs. Files are searched for here,
then in data/raw. The end of a single text becomes the validation split; of several documents, a random choice does.
Or give validation texts with --val_files. If nothing has changed, a second run does no work."""


@dataclass
class PrepareOptions:
    """Tokenizer, splits and output."""

    tokenizer: str | None = None
    """char, byte, gpt2, cl100k_base, o200k_base, bpe:N (BPE with N ids, trained on the text), a tokenizer.json, or a
    folder with a tokenizer (prepared data, a checkpoint). None: gpt2, or char for shakespeare_char."""
    out_dir: str | None = None
    """Output folder. None: data/processed/NAME."""
    name: str | None = None
    """Name of the dataset. None: from the first source."""
    train_files: tuple[str, ...] = ()
    """Training texts, instead of SOURCE. One, or a list such as '["a.txt", "b/*.md"]'."""
    val_files: tuple[str, ...] = ()
    """Validation texts. All sources are then used for training."""
    val_fraction: float | None = None
    """Fraction of the characters (one text) or documents (several) for validation. None: 0.1; openwebtext: 0.0005."""
    seed: int = 2357
    """Random seed for the choice of validation documents."""
    text_key: str = "text"
    """Field of a .jsonl line, or column of a .parquet file, with the text."""
    shard_size: int = 1 << 30
    """Maximum number of tokens per file. A single file is named train.bin or val.bin."""
    workers: int | None = None
    """Worker processes for encoding. None: all cores for large inputs. 0: no workers."""
    cache_dir: str | None = "data/cache"
    """Cache of encoded parts, used to resume an interrupted run. None: no cache."""


@command
def main(argv: list[str]) -> None:
    parsed = parse(PrepareOptions, argv, prog="llm-prepare", description=DESCRIPTION, presets=False)
    from ..data.prepare import prepare  # numpy and tokenizers, which --help does not need

    prepare(parsed.positionals, **dataclasses.asdict(parsed.tree), report=_say)


def _say(line: str) -> None:
    """Prints and flushes a line. Characters that the terminal cannot show are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        raise OutputError from error  # it must not be mistaken for a failure of the data files


if __name__ == "__main__":
    sys.exit(main())
