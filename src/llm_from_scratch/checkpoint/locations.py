"""What a word on the command line points at: a prompt, or weights of which kind."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import UserError
from ..machine.files import read_regular

MAX_PROMPT = 16 << 20  # bytes
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def read_start(start: str) -> str:
    """The prompt that --start means: FILE:path, - for standard input, or itself. Raises UserError."""
    name = "standard input" if start == "-" else start.removeprefix("FILE:")
    if start == "-":
        if sys.stdin.isatty():
            print("Type the prompt; end it with Ctrl-D on an empty line.", file=sys.stderr)
        data = sys.stdin.buffer.read(MAX_PROMPT + 1)
        if len(data) > MAX_PROMPT:
            raise UserError(f"the prompt on standard input is longer than {MAX_PROMPT:,} bytes; give a shorter one")
    elif start.startswith("FILE:"):
        try:
            data = read_regular(Path(name), MAX_PROMPT)
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


def resolved_init(init_from: str, out_dir: str) -> str:
    """auto is resume where out_dir holds a checkpoint, a damaged one too (never a silent fresh start), else scratch."""
    if init_from != "auto":
        return init_from
    folder = Path(out_dir)
    kept = ("step-*", "damaged-step-*", "ckpt.pt")
    return "resume" if any(next(folder.glob(pattern), None) is not None for pattern in kept) else "scratch"


def is_pretrained(location: str) -> bool:
    """Whether this is a GPT-2 name or a folder in Hugging Face's format, not a run or a checkpoint."""
    path = Path(location)
    is_folder = (path / "config.json").is_file() and not (path / "MANIFEST.json").is_file()
    return is_folder or (location in GPT2_NAMES and not path.exists())
