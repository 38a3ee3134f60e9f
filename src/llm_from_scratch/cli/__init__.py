"""The commands."""

from __future__ import annotations

import sys
from types import TracebackType

_report = sys.excepthook


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # before common.run: the modules of a command are still being imported
        print("interrupted", file=sys.stderr)
    else:
        _report(kind, error, trace)


sys.excepthook = _end
