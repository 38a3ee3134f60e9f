"""`--help`: fits on a screen, has the common settings, and shows the effective defaults."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from llm_from_scratch.cli import bench, many_runs, train
from llm_from_scratch.config import Config, GPTConfig
from llm_from_scratch.help_text import help_text
from llm_from_scratch.presets import parse
from llm_from_scratch.settings import flatten

from ..tiny import slow_except, write_data

ROOT = Path(__file__).resolve().parents[4]
COMMANDS = (
    *("train", "plan", "prepare_data", "generate", "chat", "serve", "evaluate", "bench", "export", "sample"),
    *("sweep", "scale"),
)
SOME = ("train", "serve", "prepare_data", "sweep")
PRESETS = sorted(path.stem for folder in ("configs", "config") for path in (ROOT / folder).glob("*.*"))


def help_of(capsys: pytest.CaptureFixture[str], command: str, *words: str) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"llm_from_scratch.cli.{command}").main([*words])
    assert not ended.value.code
    return capsys.readouterr().out.splitlines()


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", slow_except((*COMMANDS, "inspect_data"), *SOME))
def test_help_fits_on_a_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = help_of(capsys, command, "--help")
    assert len(short) <= 60 and max(map(len, short)) <= 80
    assert not any("options options" in line for line in help_of(capsys, command, "--help-all"))


def defaults(lines: list[str]) -> dict[str, str]:
    """{setting: the default that the help shows}."""
    start = next(number for number, line in enumerate(lines) if line.endswith("options"))
    entries = re.split(r" --(?=\w+ )", " ".join(line.strip() for line in lines[start:]))
    found = [re.match(r"(\w+)\b.*\(default: ('.*?'|.*?)\)", entry) for entry in entries]
    return {match[1]: match[2] for match in found if match}


class Read(Exception):
    """Stops a command when it has read its settings."""


def in_force(command: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, str]:
    """{setting: its value as text} when the command starts to work on a machine without a GPU."""
    module = importlib.import_module(f"llm_from_scratch.cli.{command.replace('plan', 'train')}")
    values: list[dict[str, Any]] = []

    def read(*args: Any, **kwargs: Any) -> Any:
        parsed = parse(*args, **kwargs)
        if command == "bench":
            bench.shrink(parsed)
        values.append(flatten(parsed.tree))
        raise Read

    with monkeypatch.context() as patch, pytest.raises(Read):
        patch.setattr(many_runs if command in ("sweep", "scale") else module, "parse", read)
        importlib.import_module(f"llm_from_scratch.cli.{command}").main([*words])
    return {name: as_shown(value) for name, value in values[0].items()}


def as_shown(value: Any) -> str:
    if value in ((), {}):
        return "none"
    if isinstance(value, tuple):
        (value,) = value
    text = value.encode("unicode_escape").decode() if isinstance(value, str) else str(value)
    return shlex.quote(text)  # as a shell reads it


def compare(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("data/book").mkdir(parents=True)
    Path("data/book/train.bin").touch()
    monkeypatch.setattr(time, "time", lambda: 1.0)  # which a preset uses in a name
    values = in_force(command, monkeypatch, *words)
    if (weights := values.get("init_from", "scratch")) not in ("scratch", "resume", "auto") and "n_layer" in values:
        own = {item.name for item in dataclasses.fields(GPTConfig)} - {"block_size", "dropout"}
        values |= dict.fromkeys(own, f"from {weights}")  # not read for --help
    for flag in ("--help", "--help-all"):
        shown = defaults(help_of(capsys, command, *words, flag))
        cpu = {name: re.sub(r".*, or (.*) without a GPU", r"\1", text) for name, text in shown.items()}
        assert len(shown) >= 9 and cpu == {name: values[name] for name in cpu}
        assert set(shown) == set(values) or flag == "--help"


QUICK = ("finetune", "train_gpt2")  # nested and flat; one that starts from other weights


@pytest.mark.parametrize(
    ("command", "preset"),
    [
        *(pytest.param(name, "", marks=() if name in SOME else pytest.mark.slow) for name in COMMANDS),
        *(pytest.param("train", name, marks=() if name in QUICK else pytest.mark.slow) for name in PRESETS),
    ],
)
def test_the_defaults_shown_are_in_force(
    command: str, preset: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(command, [preset] if preset else [], capsys, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("command", ["plan", "generate", "chat", "serve", "bench", "sample"])
def test_a_preset_is_in_force_in_every_command(
    command: str, preset: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(command, [preset], capsys, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, "inspect_data"])
def test_help_waits_for_no_large_package(command: str) -> None:
    program = (
        f"import sys; from llm_from_scratch.cli import {command}\n"
        f"try: {command}.main(['--help'])\nexcept SystemExit: pass\n"
        "print(*{'torch', 'numpy', 'tyro', 'rich', 'tokenizers', 'fastapi', 'optuna'} & sys.modules.keys())"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.splitlines()[-1] == "" and shown.stderr == ""


def test_the_commands_own_options_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(command: Any) -> set[str]:
        with pytest.raises(SystemExit):
            command(["--help-all"])
        return set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)) - set(flatten(Config()))

    every = {"version", "completion", "print_config", "dry_run"}
    budget = {"exportable", "budget", "law", "cooldown"}
    assert listed(train.main_nanogpt) == every
    assert listed(train.main) == every | budget
    assert listed(train.main_plan) == every | budget | {*train.CLUSTER}


@dataclass
class Section:
    """A section."""

    length: int | Literal["auto"] | None = None
    """The length,
    on two lines."""
    table: dict[int, float] = field(default_factory=dict)
    r"""A table, such as '{3: 0.5}\n'."""
    a_setting_with_a_long_name: tuple[str, ...] = ("x y",)
    """Another."""
    without_help: bool = True


PAGE = r"""usage: x [FILE] [-h] [OPTIONS]

About the command.

  as it is,   indented

options
 ----------------------------------------------------------
  -h                   Help.
  --length INT|{auto}  The length, on two lines. (default:
                       None)
  --table {INT: FLOAT, ...}
                       A table, such as '{3: 0.5}\n'.
                       (default: that of x)
  --a_setting_with_a_long_name STR
                       Another. (default: 'x y')
  --without_help {True,False}
                       (default: True)"""


def test_a_page_written_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    values, notes = flatten(Section()), {"table": "that of x"}
    description = "About the\ncommand.\n\n  as it is,   indented"
    assert help_text(Section, values, notes, (), "x [FILE]", description, {"-h": "Help."}) == PAGE


def test_without_data_none_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert defaults(help_of(capsys, "train", "-h"))["dataset"] == "none found: run llm-prepare FILE"
    assert defaults(help_of(capsys, "bench", "-h"))["dataset"] == "random tokens: no prepared data found"
    assert defaults(help_of(capsys, "train", "--dataset=x", "-h"))["dataset"] == "x"
    assert defaults(help_of(capsys, "train", "train_gpt2", "-h"))["dataset"] == "openwebtext"  # nanoGPT's


@pytest.mark.slow
def test_a_resumed_runs_defaults_are_its_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(here / "data" / "book")
    small = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--max_iters=2", "--device=cpu"]
    assert train.main(["--out_dir=run", "--dataset=book", *small]) == 0
    capsys.readouterr()
    shown = defaults(help_of(capsys, "train", "--init_from=resume", "--out_dir=run", "-h"))
    assert (shown["max_iters"], shown["n_embd"], shown["dataset"]) == ("2", "8", "book")
    shown = defaults(help_of(capsys, "train", "--init_from=resume", "--out_dir=nowhere", "-h"))
    assert shown["max_iters"] == "1000"


def test_the_typed_setting_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert defaults(help_of(capsys, "train", "quick", "--n_layer=7", "-h"))["n_layer"] == "7"


def test_a_script_is_named_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main_nanogpt(["--help"])
    assert "python train.py --help-all lists every setting." in capsys.readouterr().out


def test_train_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(capsys, "train", "--help")
    for path in (ROOT / "configs").glob("*.yaml"):
        assert any(re.match(rf"  {path.stem} +\w", line) for line in lines), path.stem
