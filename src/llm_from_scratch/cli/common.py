"""Exit codes and error messages of every command, and how a command finds its model. A user's mistake is one line and
exit code 2, never a traceback."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..checkpoint.contents import stored_option
from ..errors import OutputError, SharedError, UserError, one_line
from ..machine.processes import distributed_env
from ..machine.terminal import DISK_FULL, READER_GONE, drop_lost_output, note, open_streams

atexit.register(gc.freeze)  # else the end of a process searches all objects for cycles: half a second with torch


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Calls main(argv) and returns its exit code. 1 if the output cannot be written, 2 for a UserError or a closed
    standard output, 130 for Ctrl-C, 141 if the output pipe was closed."""
    if not open_streams():
        note("error: standard output is closed: redirect it to a file or to /dev/null")
        return 2
    try:
        words = sys.argv[1:] if argv is None else argv
        try:
            if words == ["--version"]:
                print(f"gptsmith {__version__}")
                return 0
            code = main(words) or 0
        except SystemExit:  # --help has printed
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except UserError as error:
        if not isinstance(error, SharedError) or distributed_env()[0] == 0:
            note(f"error: {one_line(error, None)}")
        return 2
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    except (OutputError, OSError) as error:
        lost = error.__cause__ if isinstance(error, OutputError) else error
        assert isinstance(lost, OSError)
        if lost is error and (lost.filename is not None or lost.errno not in (*READER_GONE, *DISK_FULL)):
            raise
        if lost.errno in READER_GONE:
            return 141
        note(f"error: cannot write the output: {lost.strerror or lost}")
        return 1
    finally:
        drop_lost_output()


def command(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """The decorator of a command's entry point: calls main through run(), with or without an argv."""
    return functools.partial(run, main)


def data_prepared_last() -> dict[str, str]:
    """{"dataset": NAME} of the most recently prepared data, as a default of settings; empty if there is none."""
    files = [*Path("data").glob("*/train*.bin"), *Path("data/processed").glob("*/manifest.json")]
    if not files:
        return {}
    folder = max(files, key=lambda path: path.stat().st_mtime).parent
    # a checkpoint stores a plain name, but not a path
    is_hidden = folder.parent.name == "processed" and any((Path("data") / folder.name).glob("*.bin"))
    return {"dataset": folder.as_posix() if is_hidden else folder.name}


def need_data(dataset: str) -> None:
    """Prints which data was chosen. Raises UserError if none is prepared."""
    if not data_prepared_last():
        raise UserError("no prepared data found: run llm-prepare FILE with a text, or give --dataset=NAME")
    note(f"training on the most recently prepared data: {dataset} (override with --dataset=NAME)")


def explain_activation() -> None:
    """Prints how to run the commands that were printed, for users of ./just, which does not activate .venv."""
    if (script := os.environ.get("LLM_ACTIVATE")) and shutil.which("llm-train") is None:
        note(f"to use the llm-* commands in this shell: . {shlex.quote(os.path.relpath(script, os.environ['HERE']))}")


def not_named(what: str, stored: dict[str, object], prog: str, argv: list[str]) -> UserError:
    """The error for a data folder and for tasks that a checkpoint names. stored: their values by setting. They are not
    used, because the checkpoint may be untrusted, but printed as part of the command to run."""
    command = shlex.join([*prog.split(), *argv, *(stored_option(name, value) for name, value in stored.items())])
    if "eval_tasks" not in stored:
        return UserError(f"{what} used a data folder. A path in a checkpoint is opened only if you name it: {command}")
    used = "a data folder and evaluation tasks" if "dataset" in stored else "evaluation tasks, which can run code"
    return UserError(f"{what} used {used}. They are loaded only if you name them: {command}")


def check_location(location: str, which: str | None) -> None:
    """Raises UserError if there is no such checkpoint. It does not import torch, so the answer is fast."""
    from ..checkpoint.load import is_pretrained
    from ..checkpoint.store import find_checkpoint

    if not is_pretrained(location, hub=which is None):
        find_checkpoint(location, which, verify=False)
    elif which is not None:
        raise UserError(f"which={which!r} selects a checkpoint of a run, but {location} is not a run: remove --which")
