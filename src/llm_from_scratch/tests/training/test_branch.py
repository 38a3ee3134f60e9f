"""A cool-down from a step of a constant run ends as a run that was planned with it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.checkpoint.store import load_checkpoint, save_checkpoint
from llm_from_scratch.cli import train
from llm_from_scratch.config import Config, GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.presets import build
from llm_from_scratch.settings import flatten
from llm_from_scratch.training.branch import begin_cooldown
from llm_from_scratch.training.scheduler import learning_rate_at

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
    assert "a cool-down begins at the peak learning rate, but step 3" in capsys.readouterr().err
    assert not Path("b").exists()


def step_of_a_run(folder: str, settings: dict[str, Any], run_id: str = "source") -> Path:
    """Step 6 of a run with these settings."""
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=4))
    return save_checkpoint(
        folder, step=6, run_id=run_id, model_config=model.config, model=model.state_dict(), config=settings,
        trainer={"run_id": run_id, "step": 6}, optimizer={"state": {}, "param_groups": []},
    )  # fmt: skip


@pytest.mark.parametrize(
    "scheduler",
    [
        {"schedule": "constant", "warmup_iters": 2},
        {"decay_lr": False, "warmup_iters": 10},  # which it does not have
        {"schedule": "linear", "warmup_iters": 6, "lr_ends": {"0": 20, "4": 12}},  # of --budget, as JSON holds it
    ],
)
def test_the_rate_falls_in_a_straight_line(scheduler: dict[str, Any], here: Path) -> None:
    stored = {"scheduler": {**scheduler, "min_lr": 0.0, "gone": 1}, "optimizer": {"learning_rate": 0.3}}
    begun = begin_cooldown(str(step_of_a_run("run", stored)), "out", 0.5)
    assert begun["max_iters"] == 9
    config = build(Config, {**scheduler, "min_lr": 0.0, **begun})
    config.validate()
    rates = [learning_rate_at(step, 0.3, config.scheduler, 9) for step in range(6, 10)]
    assert rates == pytest.approx([0.3, 0.2, 0.1, 0.0])


def test_missing_settings_are_defaults(here: Path) -> None:
    with pytest.raises(UserError, match="begins at the peak learning rate, but step 6"):  # of 100 of the warm-up
        begin_cooldown(str(step_of_a_run("run", {})), "out", 0.5)


def test_a_cooldown_is_its_own_run_and_never_overwrites_another(here: Path) -> None:
    constant = {"scheduler": {"schedule": "constant", "warmup_iters": 2}}
    source, other = step_of_a_run("a", constant), step_of_a_run("b", constant, "other")
    begin_cooldown(str(source), "out", 0.5)
    made = load_checkpoint(Path("out/step-00000006"))  # whole: every file has its hash
    ids = {"source", "other", made.manifest["run_id"]}
    assert len(ids) == 3 and made.trainer == {"run_id": made.manifest["run_id"], "step": 6}
    begin_cooldown(str(source), "out", 0.2)  # again, before it has saved
    assert load_checkpoint(Path("out/step-00000006")).manifest == made.manifest
    with pytest.raises(UserError, match="^out holds a step of another run: choose another --out_dir$"):
        begin_cooldown(str(other), "out", 0.5)
    assert load_checkpoint(source).manifest["run_id"] == "source"
