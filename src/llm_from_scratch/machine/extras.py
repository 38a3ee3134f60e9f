"""Optional packages: if one is missing, one line names what to install."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

from ..errors import AccessError, UserError, one_line

DISTRIBUTION = "gptsmith"  # the project's name on the package index
REQUIRED = {  # module: package
    name: name for name in ("torch", "numpy", "tiktoken", "tokenizers", "safetensors", "tyro", "rich", "filelock")
} | {"yaml": "pyyaml"}  # fmt: skip
OLDEST_TORCH = (2, 6)


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def stop_without_required() -> None:
    """Ends the program with one line if a required package is missing or torch is too old. This happens if a script
    runs from a checkout without installing the project."""
    if lacking := [package for module, package in REQUIRED.items() if not is_installed(module)]:
        print(f"error: packages are missing; install them with: pip install {' '.join(lacking)}", file=sys.stderr)
        sys.exit(2)
    spec = importlib.util.find_spec("torch")  # importing it takes seconds
    path = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else Path()
    found = re.search(r"__version__ = '((\d+)\.(\d+).*)'", path.read_text() if path.is_file() else "")
    if found and (int(found[2]), int(found[3])) < OLDEST_TORCH:
        oldest = "{}.{}".format(*OLDEST_TORCH)
        hint = f"install a newer one with: pip install 'torch>={oldest}'"
        print(f"error: torch {found[1]} is older than {oldest}; {hint}", file=sys.stderr)
        sys.exit(2)


def install_command(extra: str) -> str:
    """The command that installs an extra of the running checkout, or of the installed distribution."""
    root = Path(__file__).resolve().parents[3]
    if (root / "pyproject.toml").is_file():
        folder = "." if root == Path.cwd() else str(root)
        return f"pip install -e {shlex.quote(f'{folder}[{extra}]')}"
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def missing(package: str, extra: str, purpose: str, instead: str = "") -> UserError:
    """The error for a missing package. instead: what else the user can do."""
    otherwise = f", or {instead}" if instead else ""
    return AccessError(f"{purpose} needs the package {package}: {install_command(extra)}{otherwise}")


def missing_store(error: ImportError, purpose: str) -> UserError:
    """The error for a kind of store that fsspec cannot open. It names the package; the extra `remote` has three."""
    return AccessError(
        f"{purpose} needs another package: {one_line(error)} (for s3, gs and http: {install_command('remote')})"
    )


def require(package: str, extra: str, purpose: str, instead: str = "") -> None:
    """Raises UserError if the package is not installed. Imports nothing."""
    if not is_installed(package):
        raise missing(package, extra, purpose, instead)
