"""The demo's loss curve, its reading of metrics.jsonl and of its own command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.cli import demo
from llm_from_scratch.training.loggers import read_entries

FALLING = [(step, 4.0 - 0.02 * step) for step in range(101)]  # 4.0 down to 2.0


def test_ascii_curve_by_hand() -> None:
    # 16 columns: 6 for the labels, 10 for the plot. A straight line over a square grid is its diagonal; each column
    # reaches up to the height of the one before it.
    text = demo.loss_curve([(step, 9.0 - step) for step in range(10)], [(9, 0.0)], width=16, height=10, unicode=False)
    assert text.splitlines() == [
        "9.00 +**",
        "     | **",
        "     |  **",
        "     |   **",
        "     |    **",
        "4.00 +     **",
        "     |      **",
        "     |       **",
        "     |        **",
        "0.00 +         o",
        "     +----------",
        "      step 0   9",
        "      ** train loss   o val loss",
    ]


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", [40, 80, 100])
def test_curve_keeps_to_its_size(width: int, unicode: bool) -> None:
    text = demo.loss_curve(FALLING, [(0, 4.1), (50, 3.2), (100, 2.2)], width=width, height=8, unicode=unicode)
    lines = text.splitlines()
    assert len(lines) == 8 + 3
    assert max(map(len, lines)) == width
    assert lines[0].startswith("4.10") and "2.00" in lines[7]
    assert lines[-2].split() == ["step", "0", "100"]
    assert text.isascii() is not unicode
    assert text.count("●" if unicode else "o val") == (4 if unicode else 1)  # three marks and the legend


def test_curve_joins_its_points() -> None:
    """No column between the first and the last point is empty, however few the points."""
    for unicode in (True, False):
        lines = demo.loss_curve([(0, 4.0), (1000, 1.0)], [], width=50, height=10, unicode=unicode).splitlines()[:10]
        rows = [line[6:].ljust(44) for line in lines]
        assert all(any(row[x] != " " for row in rows) for x in range(44))


def test_curve_of_odd_input() -> None:
    assert demo.loss_curve([], []) == ""
    assert demo.loss_curve([(0, math.nan), (1, math.inf)], []) == ""
    assert demo.loss_curve([(0, math.nan), (1, 2.0)], []) == demo.loss_curve([(1, 2.0)], [])
    assert "2.00" in demo.loss_curve([(7, 2.0)], [(7, 2.0)])
    shuffled = FALLING[::2] + FALLING[1::2]
    assert demo.loss_curve(shuffled, []) == demo.loss_curve(FALLING, [])


def test_metrics_are_read_by_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "loss": 3.5, "lr": 0.1}\n{"step": 0, "train_loss": 4.2, "val_loss": 4.25}\n'
        '{"step": 1, "loss": 4}\n{"step": 2, "loss": 3.25}\n'
        '{"step": 2, "val_loss_full": 3.5}\n{"note": "x"}\n[1]\n{"step": 3, "lo',
        encoding="utf-8",
    )
    entries = read_entries(path)
    assert demo.points(entries, "loss") == [(1, 4.0), (2, 3.25)]
    assert demo.points(entries, "val_loss") == [(0, 4.25)]
    assert demo.points(entries, "val_loss_full") == [(2, 3.5)]


def test_options_are_found_as_the_parser_takes_them() -> None:
    argv = ["config/x.py", "--out_dir=a", "--flag", "--training.out_dir", "b", "--data.dataset=c"]
    assert demo.option(argv, "out_dir") == "b"
    assert demo.option(argv, "dataset") == "c"
    assert demo.option(argv, "max_iters") is None
    assert demo.option([], "out_dir") is None and demo.option(["--out_dir"], "out_dir") is None


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Runs the demo with commands that only note how they were called, and a run folder that stands ready."""
    called: list[tuple[str, ...]] = []

    def call(*command: str) -> int:
        called.append(command)
        return 0

    monkeypatch.setattr(demo, "call", call)
    monkeypatch.chdir(tmp_path)
    for name in ("out-demo", "mine"):
        (tmp_path / name / "step-00000010").mkdir(parents=True)
        (tmp_path / name / "loss.png").touch()
        (tmp_path / name / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 4.0}\n{"step": 10, "loss": 2.0}\n'
            '{"step": 10, "val_loss": 2.25}\n{"step": 10, "val_loss_full": 2.125}\n'
        )
    return called


def test_demo_runs_the_commands_in_order(commands: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--max_iters=10"]) == 0
    assert [command[0] for command in commands] == ["prepare_data", "train", "generate"]
    assert commands[1] == ("train", "configs/quick.yaml", "--max_iters=10", "--dataset=demo", "--out_dir=out-demo")
    assert "--out_dir=out-demo" in commands[2]
    text = capsys.readouterr().out
    assert "final" not in text  # llm-train has printed it
    for piece in ("train loss", "out-demo/step-00000010", "out-demo/loss.png", "./just generate out-demo"):
        assert piece in text
    assert "TensorBoard log" not in text  # there is none in this run


def test_demo_passes_settings_through(commands: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--dataset=other", "--out_dir", "mine"]) == 0
    assert commands[0] == ("train", "configs/quick.yaml", "--dataset=other", "--out_dir", "mine")
    assert "mine/step-00000010" in capsys.readouterr().out


@pytest.mark.parametrize("failing", ["prepare_data", "train", "generate"])
def test_demo_stops_if_a_command_fails(commands: list, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    noted = demo.call
    monkeypatch.setattr(demo, "call", lambda command, *args: noted(command, *args) or 7 * (command == failing))
    assert demo.main([]) == 7
    order = ["prepare_data", "train", "generate"]
    assert [command[0] for command in commands] == order[: order.index(failing) + 1]


@pytest.mark.parametrize(("ended", "code"), [(0, 0), (2, 2), (-2, 130), (-9, 137)])
def test_a_command_that_a_signal_ended_has_a_shells_exit_code(
    ended: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Child:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait(self) -> int:
            return ended

    monkeypatch.setattr(demo.subprocess, "Popen", Child)
    assert demo.call("train") == code


def test_demo_help_is_that_of_training(commands: list) -> None:
    assert demo.main(["--help"]) == 0
    assert commands == [("train", "configs/quick.yaml", "--help", "--dataset=demo", "--out_dir=out-demo")]


def test_demo_draws_ascii_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        encoding = "utf-8"

    monkeypatch.setattr(demo.sys, "stdout", Stream())
    monkeypatch.setenv("TERM", "xterm")
    assert demo.draws_unicode()
    monkeypatch.setenv("TERM", "dumb")
    assert not demo.draws_unicode()
    monkeypatch.setenv("TERM", "xterm")
    Stream.encoding = "iso-8859-1"
    assert not demo.draws_unicode()
