"""gptsmith and `python -m llm_from_scratch`: every command under one name; --version and --completion."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llm_from_scratch import __version__
from llm_from_scratch.cli.export import main as export
from llm_from_scratch.cli.gptsmith import COMMANDS, main

ROOT = Path(__file__).resolve().parents[4]


def test_it_has_every_command_of_the_project() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    scripts = dict(re.findall(r'^llm-(\w+) = "llm_from_scratch\.cli\.(\w+):main"$', declared, re.MULTILINE))
    assert scripts and {name: module for name, (module, _) in COMMANDS.items() if name != "demo"} == scripts
    assert 'gptsmith = "llm_from_scratch.cli.gptsmith:main"' in declared


def test_python_dash_m(tmp_path: Path) -> None:
    called = [sys.executable, "-m", "llm_from_scratch"]
    listed = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0 and all(f"  {name} " in listed.stdout for name in COMMANDS)
    shown = subprocess.run(
        [*called, "train", "--print_config", "--n_layer=3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.returncode == 0 and "n_layer: 3" in shown.stdout


def test_a_misspelt_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tran"]) == 2
    assert capsys.readouterr().err == "error: no command 'tran'; did you mean train?\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and export(["--version"]) == 0
    assert capsys.readouterr().out == f"gptsmith {__version__}\n" * 2


def test_completion_is_a_script_of_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--completion", "bash"])
    script = capsys.readouterr().out
    lines = ["llm-train --learn", "llm-train qui", "llm-train quick --n_la", "llm-train quick fine"]
    typed = [f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; _tyro_llm_train; echo ${{COMPREPLY[@]}}"
             for line in lines]  # fmt: skip
    done = subprocess.run(["bash", "-c", "\n".join([script, *typed])], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["--learning_rate", "quick", "--n_layer", "finetune"], done.stderr
    with pytest.raises(SystemExit):
        main(["train", "--completion=bash"])
    assert capsys.readouterr().out == script
    for shell in (["--completion", "tcsh"], ["--completion=fish"], ["--completion"]):
        assert main(["eval", *shell]) == 2
        assert "error: --completion needs a shell: bash or zsh" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["inspect", "eval", "prepare"])  # DATASET, [TEXT_FILE] and [SOURCE ...] in the usage
def test_completion_is_of_the_command_without_its_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--completion", "bash"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("complete ")]
    assert line.split()[-1] == f"llm-{name}"


@pytest.mark.slow
def test_subcommands_and_their_settings_are_completed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion=bash"]) == 0
    script = capsys.readouterr().out
    command = shlex.join([sys.executable, "-m", "llm_from_scratch"])
    typed = f"""gptsmith() {{ {command} "$@"; }}
        COMP_WORDS=(gptsmith e); COMP_CWORD=1; _gptsmith; echo ${{COMPREPLY[@]}}
        COMP_WORDS=(gptsmith train --learn); COMP_CWORD=2; _gptsmith; echo ${{COMPREPLY[@]}}
        COMP_WORDS=(gptsmith train --n_layer 3 --learn); COMP_CWORD=4; _gptsmith; echo ${{COMPREPLY[@]}}"""
    done = subprocess.run(["bash", "-c", script + "\n" + typed], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["eval export", "--learning_rate", "--learning_rate"], done.stderr
    assert main(["--completion", "zsh"]) == 0
    assert " ".join(COMMANDS) in capsys.readouterr().out
    assert main(["--completion", "tcsh"]) == 2
    assert "bash or zsh" in capsys.readouterr().err
