"""A cool-down from a step of a constant run ends as a run that was planned with it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.cli import train
from llm_from_scratch.config import Config
from llm_from_scratch.settings import flatten

from ..tiny import arguments

SETTINGS: dict[str, Any] = {"dropout": 0.1, "warmup_iters": 2, "save_interval": 3, "keep_last": 9, "eval_interval": 50}


def run(tiny_data: Path, **more: Any) -> int:
    return train.main(arguments(**{**SETTINGS, "dataset": tiny_data, **more}))


@pytest.mark.slow
def test_it_ends_as_a_run_that_was_planned_with_it(
    here: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_data, schedule="constant", max_iters=9, out_dir="long") == 0
    assert run(tiny_data, schedule="wsd", max_iters=9, cooldown_frac=1 / 3, min_lr=0.0, out_dir="planned") == 0
    words = ["--init_from=long/step-00000006", "--cooldown=0.5", f"--dataset={tiny_data}", "--out_dir=branch"]
    assert train.main([*words, "--min_lr=0.0"]) == 0
    branch, planned = (load(name, "last") for name in ("branch", "planned"))
    assert branch.step == planned.step == 9
    assert all(bool((tensor == planned.model[name]).all()) for name, tensor in branch.model.items())
    stored = flatten(Config()) | {k: v for section in branch.config.values() for k, v in section.items()}
    assert (stored["schedule"], stored["max_iters"], stored["init_from"]) == ("wsd", 9, "resume")
    capsys.readouterr()
    assert train.main(words) == 2 and "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cooldown=0.2"], "begins at a step of a run"),
        (["--cooldown=x", "--init_from=run"], "is not a number"),
        (["--cooldown=-1", "--init_from=run"], "is out of range"),
        (["--cooldown=0.2", "--init_from=run", "--max_iters=5"], "remove --max_iters"),
        (["--cooldown=0.2", "--init_from=run", "--dry_run"], "remove --dry_run"),
        (["--cooldown", "--init_from=run"], "--cooldown needs a value: --cooldown=0.2"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, here: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*words, f"--dataset={tiny_data}"]) == 2
    assert said in capsys.readouterr().err and not list(here.iterdir())


def test_a_rate_that_has_fallen_is_refused(here: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_data, schedule="cosine", max_iters=3, out_dir="run") == 0
    assert train.main(["--init_from=run", "--cooldown=0.2", f"--dataset={tiny_data}", "--out_dir=b"]) == 2
    assert "a cool-down begins at the peak rate, but step 3" in capsys.readouterr().err
    assert not Path("b").exists()
