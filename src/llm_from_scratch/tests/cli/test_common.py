"""cli/common.py: the data that a command uses if none is named; Ctrl-C before a command has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_from_scratch.cli import train
from llm_from_scratch.cli.common import data_prepared_last

from ..tiny import write_data


def prepared(folder: str, age: int) -> None:
    path = Path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1e9 - age, 1e9 - age))


def test_the_data_prepared_last(here: Path) -> None:
    assert data_prepared_last() == {}
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        prepared(f"data/processed/{name}/manifest.json", age)
    assert data_prepared_last() == {"dataset": "new"}
    prepared("data/new/train.bin", 40)  # --dataset=new would be this one
    assert data_prepared_last() == {"dataset": "data/processed/new"}
    prepared("data/shakespeare/train.bin", 5)  # by nanoGPT's script
    assert data_prepared_last() == {"dataset": "shakespeare"}


def test_training_names_the_data_that_it_chose(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["quick", "--dry_run"]) == 2
    assert capsys.readouterr().err == (
        "error: no prepared data found: run llm-prepare FILE with a text, or give --dataset=NAME\n"
    )
    write_data(here / "data" / "book")
    small = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--max_iters=1", "--device=cpu"]
    small += ["--eval_iters=1", "--loss_plot=False", "--tensorboard=False"]
    assert train.main(["default", *small]) == 0
    assert "training on the most recently prepared data: book (override with --dataset=NAME)" in capsys.readouterr().err
    assert train.main(["--init_from=resume", "--max_iters=2"]) == 0
    assert "recently prepared" not in capsys.readouterr().err  # the run's own
    assert train.main(["default", *small, "--dataset=book"]) == 0
    assert "recently prepared" not in capsys.readouterr().err


def test_a_mistake_in_the_settings_is_printed_by_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, shown in ((0, True), (1, False)):
        monkeypatch.setenv("RANK", str(rank))
        assert train.main(["quick", "--dataset=nowhere", "--batch_size=0"]) == 2
        assert ("batch_size" in capsys.readouterr().err) is shown


@pytest.mark.slow
def test_ctrl_c_while_a_command_is_imported_is_one_line() -> None:
    def ended(error: str) -> tuple[int, str]:
        code = f"import llm_from_scratch.cli; raise {error}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    assert ended("KeyboardInterrupt") == (-signal.SIGINT, "interrupted\n")
    code, shown = ended("OSError('a bug')")
    assert code == 1 and shown.startswith("Traceback") and shown.endswith("OSError: a bug\n")


def test_a_command_ends_without_a_search_for_cycles() -> None:
    code = """
import llm_from_scratch.cli.common
class Cycle:
    def __init__(self): self.own = self
    def __del__(self): print("found")
Cycle()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
