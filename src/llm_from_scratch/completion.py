"""Scripts with which a shell completes a command: its settings and presets."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

from .errors import UserError

SHELLS = ("bash", "zsh")
BEFORE = "\nimport sys\n"  # in tyro's script, below the words that it knows: presets are added there, as subcommands
PRESETS = """
names = {}
COMPLETION_SPEC["subcommands"] = {{name: COMPLETION_SPEC | {{"description": text}} for name, text in names.items()}}
for spec in COMPLETION_SPEC["subcommands"].values():  # others may follow
    spec["subcommands"] = COMPLETION_SPEC["subcommands"]
"""


def completion_shell(argv: list[str]) -> str:
    """The shell of `--completion SHELL`, the first of these arguments."""
    shell = (argv[0].partition("=")[2].split() + argv[1:] + [""])[0]
    if shell not in SHELLS:
        raise UserError(f"--completion needs a shell: bash or zsh, got {shell!r}")
    return shell


def completion_script(tyro: Callable[[list[str]], object], shell: str, presets: dict[str, str]) -> str:
    """The script of a command. tyro: parses arguments; presets: {name: description} that complete a word."""
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro(["--tyro-print-completion", shell])
    return script.getvalue().replace(BEFORE, PRESETS.format(presets) + BEFORE, 1)
