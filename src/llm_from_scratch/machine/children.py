"""Python processes that this one starts, directly or through multiprocessing and torch.compile.

They are started with `python -c ...`, which searches the working directory first: a ctypes.py in a downloaded folder
would run there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..errors import UserError


def shield_children() -> None:
    """Keeps the working directory out of the module search of child processes. Call it before any is started.

    Python 3.10 has no switch for this, so there it raises UserError if the directory holds a module that would be
    imported in place of the real one.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # ours is already running: only the children read it
    if sys.version_info < (3, 11) and (names := shadowing(Path.cwd())):
        raise UserError(
            f"child processes of Python 3.10 would import {names[0]} of the working directory instead of the real "
            "module: rename it, start from another directory, or use Python 3.11"
        )


def shadowing(folder: Path) -> list[str]:
    """The names of files and packages in a folder that a child would import in place of modules it needs."""
    loaded = {name.partition(".")[0]: vars(module).get("__file__") for name, module in [*sys.modules.items()] if module}
    own = {name for name, file in loaded.items() if file and Path(file).is_relative_to(folder)}
    needed = sys.stdlib_module_names | loaded.keys() - own
    return sorted(path.name for path in folder.iterdir() if path.name.partition(".")[0] in needed and _is_module(path))


def _is_module(path: Path) -> bool:
    if path.is_dir():  # without an __init__ it is found only if nothing else is
        return any(path.glob("__init__.*"))
    return path.suffix in (".py", ".pyc", ".so", ".pyd")
