"""Printed commands, pasted into a shell: folder names contain spaces and quotes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_from_scratch.checkpoint import store
from llm_from_scratch.checkpoint.contents import stored_option
from llm_from_scratch.cli import evaluate, generate, prepare_data, train
from llm_from_scratch.config import Config
from llm_from_scratch.core.dataset import resolve_dataset
from llm_from_scratch.errors import UserError
from llm_from_scratch.training.resume import eval_command, resume_command

from ..tiny import arguments, write_data

BIN = Path(sys.prefix) / "bin"
FOLDER = """my  o'ut "q" $HOME;"""
MAINS = {"llm-train": train.main, "llm-eval": evaluate.main, "llm-generate": generate.main}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs bash")


def in_bash(command: str) -> list[str]:
    """The words of a command, as bash passes them to a program of that name."""
    stub = """for name in llm-train llm-eval llm-generate llm-prepare python torchrun; do
    eval "$name() { printf '%s\\\\0' $name \\"\\$@\\"; }"; done; """
    done = subprocess.run(["bash", "-c", stub + command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\0")[:-1]


def after(text: str, words: str) -> str:
    """The rest of the line after these words."""
    return re.search(rf"{re.escape(words)} ?(.+)", text)[1]  # type: ignore[index]


@pytest.fixture
def place(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (here / FOLDER).mkdir()
    write_data(here / FOLDER / "data")
    return here


def test_a_run_on_a_data_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = f"{FOLDER}/run", f"{FOLDER}/data"
    assert train.main(arguments(dataset=data, out_dir=out, max_iters=2)) == 0
    printed = {"sample": after(capsys.readouterr().out, "sample from it:")}

    # a stored path is not opened, but printed in the command that was typed
    typed: dict[str, tuple[Callable[..., int], list[str]]] = {
        "eval": (evaluate.main, [f"--out_dir={out}", "--json=True", "--device=cpu"]),
        "resume": (train.main, ["--init_from=resume", f"--out_dir={out}", "--max_iters=4"]),
    }
    for name, (main, argv) in typed.items():
        assert main(argv) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and message.startswith("error: the run ")
        printed[name] = after(message, "only if you name it:")
        assert in_bash(printed[name])[1:] == [*argv, f"--dataset={data}"]

    for command in printed.values():
        program, *words = in_bash(command)
        assert MAINS[program](words) == 0, command
    assert json.dumps(f"{data} (val)") in capsys.readouterr().out


def test_a_stored_path_that_hides_a_command_is_not_printed() -> None:
    assert stored_option("dataset", "/data/book 'of' mine") == "--dataset=/data/book 'of' mine"
    for path in ("a\nb", "\x1b[2K", "/a\u202eb", "\ud800", "x" * 5000, "", 5, None):
        assert stored_option("dataset", path) == "--dataset=NAME_OR_FOLDER"
        assert stored_option("eval_tasks", path) == "--eval_tasks=TASKS"


def test_stored_tasks_are_not_loaded(
    tiny_data: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They can run code: a file by !function, some of the harness's own by grading an answer."""
    for folder in ("data/processed/tiny", "tasks"):
        shutil.copytree(tiny_data, folder)
    assert train.main(arguments(dataset="tiny", out_dir=FOLDER, max_iters=2)) == 0
    capsys.readouterr()
    resume = ["--init_from=resume", f"--out_dir={FOLDER}", "--max_iters=4"]
    read = store.read_settings
    for stored in ("arc_easy", "tasks", "a.yaml", f"{FOLDER}/x", 5, "a" * 5000):
        with monkeypatch.context() as patch:
            patch.setattr(store, "read_settings", lambda path, v=stored: {**read(path), "training": {"eval_tasks": v}})
            assert train.main(resume) == 2
        message = capsys.readouterr().err
        assert (
            message.count("\n") == 1 and "used evaluation tasks, which can run code. They are loaded only if" in message
        )
        shown = f"--eval_tasks={stored}" if stored != 5 and len(str(stored)) < 100 else "--eval_tasks=TASKS"
        assert in_bash(after(message, "only if you name them:"))[1:] == [*resume, shown]
    config = Config()
    config.data.dataset, config.training.eval_tasks = "book", "tasks"
    assert in_bash(resume_command(config, "llm-train"))[-1] == "--eval_tasks=tasks"


def test_the_commands_of_a_run() -> None:
    config = Config()
    config.training.out_dir, config.data.dataset = FOLDER, "book"
    assert in_bash(resume_command(config, "llm-train")) == ["llm-train", "--init_from=resume", f"--out_dir={FOLDER}"]
    assert in_bash(eval_command(config)) == ["llm-eval", f"--out_dir={FOLDER}", "--dataset=book"]
    for folder in (f"{FOLDER}/data", ".", "..", "data/"):  # not read from a checkpoint
        config.data.dataset = folder
        assert in_bash(resume_command(config, "python train.py"))[-1] == f"--dataset={folder}"
    config.logging.wandb_log, config.generation.start = True, "FILE:a b.txt"
    assert in_bash(resume_command(config, "python train.py")) == [
        "python", "train.py", "--init_from=resume", f"--out_dir={FOLDER}", "--dataset=data/", "--start=FILE:a b.txt",
        "--wandb_log=True",
    ]  # fmt: skip


def test_the_commands_of_a_preparation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("book.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    name = """my o'ut "q";"""
    for target, expected in ((f"--name={name}", name), (f"--out_dir={FOLDER}/new", f"{FOLDER}/new")):
        assert prepare_data.main(["book.txt", "--tokenizer=byte", target]) == 0
        words = in_bash(after(capsys.readouterr().out, "next:"))
        assert words == ["llm-train", f"--dataset={expected}"] and resolve_dataset(expected)
    with pytest.raises(UserError) as caught:
        resolve_dataset(f"{FOLDER}")
    command = after(str(caught.value), "make it with:").partition(" (prepared")[0]
    assert in_bash(command) == ["llm-prepare", "FILE", f"--out_dir=data/processed/{FOLDER}"]
    os.mkfifo("a 'pipe'")
    assert prepare_data.main(["a 'pipe'"]) == 2
    assert after(capsys.readouterr().err, "instead:") == "llm-prepare - < " + shlex.quote("a 'pipe'")


@pytest.mark.slow
def test_printed_commands_run_in_a_shell(place: Path) -> None:
    out, data = f"{FOLDER}/run", f"{FOLDER}/data"
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, capture_output=True, text=True, env=environment)

    done = run("llm-train", *arguments(dataset=data, out_dir=out, max_iters=2))
    assert done.returncode == 0
    commands = [after(done.stdout, "sample from it:")]
    for argv in (("llm-eval", f"--out_dir={out}"), ("llm-train", "--init_from=resume", f"--out_dir={out}")):
        done = run(*argv)
        assert done.returncode == 2
        commands.append(after(done.stderr, "only if you name it:"))
    for command in commands:
        done = run("bash", "-c", command)
        assert done.returncode == 0, done.stderr
