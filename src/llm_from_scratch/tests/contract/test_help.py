"""`--help`: short enough for a screen, with the settings that people use, and with the defaults that are in force."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.cli import train
from llm_from_scratch.config import Config, flatten
from llm_from_scratch.presets import parse

ROOT = Path(__file__).resolve().parents[4]
COMMANDS = ("train", "plan", "prepare_data", "generate", "serve", "evaluate", "bench", "export", "sample")
PRESETS = sorted(path.stem for folder in ("configs", "config") for path in (ROOT / folder).glob("*.*"))


def help_of(capsys: pytest.CaptureFixture[str], command: str, *words: str) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"llm_from_scratch.cli.{command}").main([*words])
    assert not ended.value.code
    return capsys.readouterr().out.splitlines()


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_a_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = help_of(capsys, command, "--help")
    assert len(short) <= 60 and max(map(len, short)) <= 80
    assert not any("options options" in line for line in help_of(capsys, command, "--help-all"))


def defaults(lines: list[str]) -> dict[str, str]:
    """{setting: the default that the help shows}."""
    start = next(number for number, line in enumerate(lines) if line.endswith("options"))
    entries = " ".join(line.strip() for line in lines[start:]).split(" --")
    found = [re.match(r"(\w+)\b.*\(default: (.*)\)", entry) for entry in entries]
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize("preset", ["", *PRESETS])
def test_the_defaults_shown_are_those_in_force(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [preset] if preset else []
    in_force: dict[str, Any] = flatten(parse(Config, words, prog="test", base_preset="default").tree)
    for flag, number in (("--help", 15), ("--help-all", len(in_force))):
        shown = defaults(help_of(capsys, "train", *words, flag))
        checked = {k: v for k, v in shown.items() if isinstance(in_force[k], (bool, int, float)) or in_force[k] is None}
        assert len(shown) == number and checked
        assert checked == {name: str(in_force[name]) for name in checked}


def test_what_is_typed_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert defaults(help_of(capsys, "train", "quick", "--n_layer=7", "-h"))["n_layer"] == "7"


def test_a_script_is_named_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main_nanogpt(["--help"])
    assert "python train.py --help-all lists every setting." in capsys.readouterr().out


def test_train_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(capsys, "train", "--help")
    for path in (ROOT / "configs").glob("*.yaml"):
        assert any(re.match(rf"  {path.stem} +\w", line) for line in lines), path.stem
