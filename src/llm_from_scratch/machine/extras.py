"""Optional packages: if one is missing, one line names what to install."""

from __future__ import annotations

import importlib.util
import sys

from ..errors import UserError

REQUIRED = {  # module: package
    name: name for name in ("torch", "numpy", "tiktoken", "tokenizers", "safetensors", "tyro", "rich", "filelock")
} | {"yaml": "pyyaml"}  # fmt: skip


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def stop_without_required() -> None:
    """Ends the program with one line if a required package is missing. This happens if a script runs from a checkout
    without installing the project."""
    if lacking := [package for module, package in REQUIRED.items() if not is_installed(module)]:
        print(f"error: packages are missing; install them with: pip install {' '.join(lacking)}", file=sys.stderr)
        sys.exit(2)


def missing(package: str, extra: str, purpose: str, instead: str = "") -> UserError:
    """The error for a missing package. instead: what else the user can do."""
    otherwise = f", or {instead}" if instead else ""
    return UserError(f"{purpose} needs the package {package}: pip install 'llm-from-scratch[{extra}]'{otherwise}")


def require(package: str, extra: str, purpose: str, instead: str = "") -> None:
    """Raises UserError if the package is not installed. Imports nothing."""
    if not is_installed(package):
        raise missing(package, extra, purpose, instead)
