"""What every command does around its work: a user's mistake is one line and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..checkpoint.store import Checkpoint


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
        except OSError:  # a full disk under the output: the work is done
            _leave_stdout()
        return code
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader went away (`| head`): nothing more to say, and the interpreter's last flush must not fail either
        _leave_stdout()
        return 141


def _leave_stdout() -> None:
    """The interpreter's last flush goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_location(location: str, which: str | None) -> None:
    """Says before torch is loaded that there is no such checkpoint. Raises UserError."""
    from ..checkpoint.locations import is_pretrained
    from ..checkpoint.store import find_checkpoint

    if not is_pretrained(location):
        find_checkpoint(location, which, verify=False)
    elif which is not None:
        raise UserError(f"which={which!r} chooses among a run's checkpoints, and {location} is not a run: leave it out")


def load_source(location: str, which: str | None, dataset: str | None, need_tokenizer: bool = True) -> Checkpoint:
    """Weights and tokenizer of a run's folder, a checkpoint, a Hugging Face folder or a GPT-2 name.

    dataset: the data whose tokenizer serves where the weights bring none. Raises UserError.
    """
    from ..checkpoint.locations import is_pretrained
    from ..checkpoint.store import Checkpoint, load_any

    if not is_pretrained(location):
        return load_any(location, which, dataset, weights_only=True, need_tokenizer=need_tokenizer)
    from ..interop.hf import load_pretrained
    from ..interop.nanogpt import tokenizer_for

    config, weights, tokenizer = load_pretrained(location)
    found = Checkpoint(Path(location), 0, config, weights)
    found.tokenizer = tokenizer or tokenizer_for(found, dataset, need_tokenizer)
    return found
