"""Exit codes and error messages of every command, and how a command finds its model.

A user's mistake is one line and exit code 2, never a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..checkpoint.load import is_pretrained
from ..checkpoint.store import find_checkpoint
from ..errors import UserError


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
