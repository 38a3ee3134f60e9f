"""llm-inspect: the contents of a prepared dataset."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..machine.files import write_whole
from ..presets import parse
from ..settings import at_least
from .common import command
from .prepare_data import say

HELP = """Shows the contents of a prepared dataset: counts, use of the vocabulary, bytes
per token, lengths of documents, duplicates, integrity, random windows of text.

  llm-inspect shakespeare_char
  llm-inspect data/processed/book --html=book.html

DATASET is a name in data/ or data/processed/, or a folder. The exit code is 1 if
the files are damaged."""


@dataclass
class InspectOptions:
    """The report."""

    html: str | None = None
    """Also write the report as a page to this file."""
    windows: int = 3
    """Random windows of each split."""
    window: int = 64
    """Tokens per window."""
    seed: int = 0
    """Random seed of the windows."""
    duplicates: bool = True
    """Count duplicate documents."""


@command
def main(argv: list[str]) -> int:
    parsed = parse(InspectOptions, argv, prog="llm-inspect DATASET", description=HELP, presets=False)
    options = parsed.tree
    if len(parsed.positionals) != 1:
        raise UserError("expected one dataset: llm-inspect NAME_OR_FOLDER; see --help")
    at_least(options, 0, "windows", "seed")
    at_least(options, 1, "window")
    from ..core.dataset import resolve_dataset  # numpy and tokenizers, which --help does not need
    from ..data.inspection import as_page, as_text, inspect_dataset

    folder = resolve_dataset(parsed.positionals[0])
    found = inspect_dataset(folder, options.windows, options.window, options.seed, options.duplicates)
    for line in as_text(found):
        say(line)
    if options.html:
        try:
            write_whole(Path(options.html), as_page(found).encode())
        except OSError as error:
            raise UserError(f"cannot write {options.html}: {error.strerror or error}") from None
        say(f"\nwritten to {options.html}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
