"""Exit codes and error messages of every command, and how a command finds its model.

A user's mistake is one line and exit code 2, never a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..checkpoint.load import is_pretrained
from ..checkpoint.store import find_checkpoint
from ..errors import OutputError, UserError
from ..machine.terminal import DISK_FULL, READER_GONE, drop_lost_output, note, open_streams


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Calls main(argv) and returns its exit code.

    1 if the output cannot be written, 2 for a UserError or a closed standard output, 130 for Ctrl-C, 141 if nobody
    reads the output any more.
    """
    if not open_streams():
        note("error: standard output is closed: redirect it to a file or to /dev/null")
        return 2
    try:
        return _run(main, sys.argv[1:] if argv is None else argv)
    finally:
        drop_lost_output()


def _run(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        try:
            code = main(argv) or 0
        except SystemExit:  # --help has printed
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except UserError as error:
        note(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    except OutputError as failed:
        assert isinstance(failed.__cause__, OSError)
        return _lost(failed.__cause__)
    except OSError as error:
        if error.filename is not None or error.errno not in (*READER_GONE, *DISK_FULL):
            raise
        return _lost(error)


def _lost(error: OSError) -> int:
    """Reports that the output cannot be written. Returns the exit code."""
    if error.errno in READER_GONE:
        return 141
    note(f"error: cannot write the output: {error.strerror or error}")
    return 1


def check_location(location: str, which: str | None) -> None:
    """Raises UserError if there is no such checkpoint. It does not import torch, so the answer is fast."""
    if not is_pretrained(location):
        find_checkpoint(location, which, verify=False)
    elif which is not None:
        raise UserError(f"which={which!r} selects a checkpoint of a run, but {location} is not a run: remove --which")
