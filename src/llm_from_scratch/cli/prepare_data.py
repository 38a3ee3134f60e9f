"""llm-prepare: tokenizes texts for training."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from ..config import Config
from ..data.options import PrepareOptions
from ..errors import OutputError
from ..presets import parse
from .common import command, explain_activation

ENOUGH = 100_000_000  # tokens for llm-train's default model with any tokenizer
COMMON = (
    "tokenizer", "budget", "out_dir", "name", "val_files", "val_fraction", "text_key", "lines", "include", "dedup",
    "quality", "workers",
)  # fmt: skip
DESCRIPTION = """Tokenizes texts for training.

  llm-prepare book.txt
  llm-prepare 'notes/**/*.md' --name=notes --tokenizer=bpe:1024
  llm-prepare train.jsonl --val_files=val.jsonl --text_key=content
  llm-prepare chats.jsonl --tokenizer=FOLDER_OF_A_MODEL
  llm-prepare my-project --include='*.py' --dedup=near

A SOURCE is a file, a folder, a glob, - for standard input, a URL, hf:OWNER/NAME, or a built-in source:
shakespeare_char, shakespeare, python_docs, openwebtext, fineweb-edu, tinystories.
A text, Markdown, HTML, EPUB or PDF file or a notebook is one document. A .jsonl file has one document or conversation
per line, a .parquet file one document per row. Files may be compressed or in an archive.
Files are looked up here, then in data/raw. The validation split is the last tenth of a single text, about a tenth of
the documents, or the texts in --val_files. If nothing has changed, a second run does nothing."""


@command
def main(argv: list[str]) -> None:
    parsed = parse(
        PrepareOptions, argv, prog="llm-prepare [SOURCE ...]", description=DESCRIPTION, presets=False, common=COMMON
    )
    from ..data.prepare import prepare  # numpy and tokenizers, which --help does not need

    folder = prepare(parsed.positionals, **vars(parsed.tree), report=say)
    tokenizer = parsed.tree.tokenizer
    if (
        parsed.positionals != ["demo"] and not parsed.tree.budget and not (tokenizer and Path(tokenizer).exists())
    ):  # those train another model
        _note_on_size(folder)
    explain_activation()


def _note_on_size(folder: Path) -> None:
    """Notes if llm-train's default model has more parameters than the text has tokens."""
    from ..core.tokenfile import read_manifest

    manifest = read_manifest(folder)
    if manifest is None or (tokens := manifest["splits"]["train"]["tokens"]) > ENOUGH:
        return
    from ..core.sizes import count_params  # torch takes seconds

    params = count_params(replace(Config().model, vocab_size=manifest["vocab_size"]))
    if params > tokens:
        fewer = ", or a smaller vocabulary" if manifest["vocab_size"] > 1000 else ""
        say(
            f"note: {tokens:,} training tokens are few for {params:,} parameters of llm-train's default model: use a "
            f"smaller one (llm-train quick) or more text{fewer}"
        )


def say(line: str) -> None:
    """Prints and flushes a line. Characters that the terminal cannot show are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        raise OutputError from error  # it must not be mistaken for a failure of the data files


if __name__ == "__main__":
    sys.exit(main())
