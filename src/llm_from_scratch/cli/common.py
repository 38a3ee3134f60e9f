"""Exit codes and error messages of every command, and how a command finds its model.

A user's mistake is one line and exit code 2, never a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..checkpoint.locations import is_pretrained
from ..checkpoint.store import Checkpoint, find_checkpoint, load_any
from ..errors import UserError
from ..interop.nanogpt import tokenizer_for


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Calls main(argv) and returns its exit code: 0, 2 for a UserError, 130 for Ctrl-C."""
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            if not code:
                raise
            _leave_stdout()
        except OSError:  # the disk of the output is full, but the work is done
            _leave_stdout()
        return code
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # stdout was closed (`| head`): stop as SIGPIPE would, without a failing flush at exit
        _leave_stdout()
        return 141


def _leave_stdout() -> None:
    """Redirects stdout, so that the interpreter's last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_location(location: str, which: str | None) -> None:
    """Raises UserError if there is no such checkpoint. It does not import torch, so the answer is fast."""
    if not is_pretrained(location):
        find_checkpoint(location, which, verify=False)
    elif which is not None:
        raise UserError(f"which={which!r} selects a checkpoint of a run, but {location} is not a run: remove --which")


def load_source(location: str, which: str | None, dataset: str | None, need_tokenizer: bool = True) -> Checkpoint:
    """Loads weights and tokenizer from a run, a checkpoint, a Hugging Face folder or a GPT-2 name.

    dataset: the data whose tokenizer to use if the checkpoint has none. Raises UserError.
    """
    if not is_pretrained(location):
        return load_any(location, which, dataset, weights_only=True, need_tokenizer=need_tokenizer)
    from ..interop.hf import load_pretrained

    config, weights, tokenizer = load_pretrained(location)
    found = Checkpoint(Path(location), 0, config, weights)
    found.tokenizer = tokenizer or tokenizer_for(found, dataset, need_tokenizer)
    return found
