"""Optional packages: a missing one is a single line that names what to install."""

from __future__ import annotations

import importlib.util

from ..errors import UserError


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing(package: str, extra: str, purpose: str, instead: str = "") -> UserError:
    """The error for a missing package. instead: what else the user can do."""
    otherwise = f", or {instead}" if instead else ""
    return UserError(f"{purpose} needs the package {package}: pip install 'llm-from-scratch[{extra}]'{otherwise}")


def require(package: str, extra: str, purpose: str, instead: str = "") -> None:
    """Raises UserError if the package is not installed. Imports nothing."""
    if not is_installed(package):
        raise missing(package, extra, purpose, instead)
