"""llm-prepare: turns texts into training data."""

from __future__ import annotations

import sys

from ..data.options import PrepareOptions
from ..errors import OutputError
from ..presets import parse
from .common import command

DESCRIPTION = """Turns texts into training data.

  llm-prepare book.txt
  llm-prepare 'notes/**/*.md' --name=notes --tokenizer=bpe:1024
  llm-prepare train.jsonl --val_files=val.jsonl --text_key=content

A SOURCE is a file (.txt and .md: one document; .jsonl: one per line; .parquet: one per row), a folder, a glob, - for
standard input, or a known text: shakespeare_char, shakespeare, openwebtext, python_docs. Files are searched for here,
then in data/raw. The end of a single text becomes the validation split; of several documents, a random choice does.
Or give validation texts with --val_files. If nothing has changed, a second run does no work."""


@command
def main(argv: list[str]) -> None:
    parsed = parse(PrepareOptions, argv, prog="llm-prepare [SOURCE ...]", description=DESCRIPTION, presets=False)
    from ..data.prepare import prepare  # numpy and tokenizers, which --help does not need

    prepare(parsed.positionals, **vars(parsed.tree), report=_say)


def _say(line: str) -> None:
    """Prints and flushes a line. Characters that the terminal cannot show are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        raise OutputError from error  # it must not be mistaken for a failure of the data files


if __name__ == "__main__":
    sys.exit(main())
