"""Prompts from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import GenerationConfig
from ..errors import UserError
from ..machine.files import read_file
from ..machine.terminal import note

if TYPE_CHECKING:
    from ..core.tokenizer import Tokenizer

MAX_PROMPT = 16 << 20  # bytes


def read_start(start: str) -> str:
    """The prompt given by --start: FILE:path, - for standard input, or the text itself. Raises UserError."""
    name = "standard input" if start == "-" else start.removeprefix("FILE:")
    if start == "-":
        if sys.stdin.isatty():
            print("Type the prompt; end it with Ctrl-D on an empty line.", file=sys.stderr)
        data = sys.stdin.buffer.read(MAX_PROMPT + 1)
        if len(data) > MAX_PROMPT:
            raise UserError(f"the prompt on standard input is longer than {MAX_PROMPT:,} bytes; give a shorter one")
    elif start.startswith("FILE:"):
        try:
            data = read_file(Path(name), MAX_PROMPT)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot read the prompt file {name!r}: {reason}; expected --start=FILE:path") from None
    elif start:
        return start
    else:
        raise UserError("the prompt is empty: a model continues a text, so give --start at least one character")
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt in {name} is not UTF-8 text (byte {error.start}); convert it first") from None
    if not text:
        raise UserError(f"the prompt in {name} is empty: a model continues a text, so give it at least one character")
    return text


def first_text(prompt: str, tokenizer: Tokenizer) -> str:
    """The prompt, or the tokenizer's first token if the prompt is the default and the tokenizer has no line break."""
    try:
        tokenizer.encode(prompt)
    except UserError:
        if prompt != GenerationConfig().start:
            raise
        note(f"this model never saw a line break: the samples start with {tokenizer.decode([0])!r}")
        return tokenizer.decode([0])
    return prompt
