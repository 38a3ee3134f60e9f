"""What every command does around its work: a user's mistake is one line and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..config import UserError


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Calls main(argv) and returns its exit code: 0, 2 for a UserError, 130 for Ctrl-C."""
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader went away (`| head`): nothing more to say, and the interpreter's last flush must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
