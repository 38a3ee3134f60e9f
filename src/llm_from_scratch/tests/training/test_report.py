"""training/report.py: the README.md of a run has correct figures and working commands; an edited one is kept."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.cli import gptsmith
from llm_from_scratch.config import Config
from llm_from_scratch.errors import UserError
from llm_from_scratch.presets import parse
from llm_from_scratch.settings import flatten
from llm_from_scratch.training import report
from llm_from_scratch.training import run as runs
from llm_from_scratch.training.opening import open_run
from llm_from_scratch.training.report import write_readme
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.trainer import train

from ..tiny import tiny_config

OUT = "my o'ut"
pytestmark = pytest.mark.usefixtures("here")


def block(text: str, kind: str) -> list[str]:
    found = re.search(rf"```{kind}\n(.*?)\n```", text, re.DOTALL)
    assert found, text
    return found[1].splitlines()


def config(data: Path, **leaves: Any) -> Config:
    return tiny_config(data, **{"out_dir": OUT, "final_eval": True, "dropout": 0.1, **leaves})


def test_the_figures_equal_the_run(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses_to_find = iter([1.0, 1.0, 4.0, 2.25, 3.0, 2.5])  # train and val: the best state, of step 0, is not saved
    monkeypatch.setattr(runs, "estimate_loss", lambda *_: next(losses_to_find))
    result = train(config(tiny_data))
    text = Path(OUT, "README.md").read_text()
    assert text.startswith("# my o'ut\n")
    losses = {path.parent.name: json.loads(path.read_text())["val_loss"] for path in Path(OUT).glob("*/MANIFEST.json")}
    best = min(losses, key=losses.__getitem__)
    assert (best, max(losses)) == ("step-00000004", "step-00000008")
    assert "- best checkpoint: `step-00000004` (val loss 2.2500), last: `step-00000008`" in text
    assert result.final is not None and f"- whole validation split: loss {result.final.loss:.4f}, " in text
    assert "parameters, 1 layer, 2 heads, width 16, context 8, " in text
    assert "- step 8: train loss 3.0000, val loss 2.5000" in text
    assert "- length: step 8 of 8, 256 tokens, 0.13 epochs" in text  # 8 updates of 4 windows of 8, of 2,000 tokens
    assert f"- data: `{tiny_data.as_posix()}`, 2,000 training and 205 validation tokens, tokenizer char" in text
    assert "loss.png" not in text and block(text, "sh")[0].split("  #")[0].rstrip().endswith("--which=best")


def test_the_settings_are_a_preset_of_the_run(tiny_data: Path) -> None:
    given = config(tiny_data)
    train(given)
    Path("again.yaml").write_text("\n".join(block(Path(OUT, "README.md").read_text(), "yaml")))
    read = flatten(parse(Config, ["again.yaml"], prog="llm-train").tree)
    # the choice of auto is stored
    assert read | {"out_dir": OUT} == flatten(given) | {"documents": False} and read["n_layer"] == 1


@pytest.mark.parametrize("command", ["llm-train", pytest.param("all of them", marks=pytest.mark.slow)])
def test_the_commands_work(tiny_data: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tiny_data, num_samples=1))
    lines = [shlex.split(line, comments=True) for line in block(Path(OUT, "README.md").read_text(), "sh")]
    assert [words[0] for words in lines] == ["llm-generate", "llm-eval", "llm-train", "llm-export"]
    for name, *words in lines:
        if command in (name, "all of them"):
            assert gptsmith.main([name.removeprefix("llm-"), *words]) == 0, (name, words)
    text = Path(OUT, "README.md").read_text()
    assert "step 16 of 16" in text and "--max_iters=32  # train longer" in text  # twice as long, and described again
    assert "not rewritten" not in capsys.readouterr().out


def test_an_edited_one_is_kept() -> None:
    path = Path("README.md")
    assert write_readme(path, "first\n") and write_readme(path, "second\n")
    text = path.read_text()
    assert text.startswith("second\n<!--") and len(list(Path(".").iterdir())) == 1
    changes = [
        text + "More.\n",
        "Mine.\n" + text,
        text.replace("second", "third"),
        text[:-1],
        "second\n",
        "",
        "Mine.\n",
    ]
    for edited in changes:
        path.write_text(edited)
        assert not write_readme(path, "third\n") and path.read_text() == edited
    path.write_text(text)  # the edit is undone
    assert write_readme(path, "third\n") and path.read_text().startswith("third\n")


def test_a_run_keeps_an_edited_readme(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(OUT, "README.md")
    path.parent.mkdir()
    path.write_text("Mine.\n")
    train(config(tiny_data))
    assert path.read_text() == "Mine.\n"
    assert capsys.readouterr().out.count(f"{path} was edited, or was not written by a run: not overwritten") == 1


def test_a_folder_a_fifo_or_a_long_text_is_somebodys_own(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.mkdir()
    assert not write_readme(path, "first\n") and path.is_dir()
    path.rmdir()
    path.write_bytes(b"x" * (report.LIMIT + 1))
    assert not write_readme(path, "first\n") and path.stat().st_size == report.LIMIT + 1
    if hasattr(os, "mkfifo"):
        path.unlink()
        os.mkfifo(path)
        assert not write_readme(path, "first\n") and path.is_fifo()


@pytest.mark.slow
def test_a_readme_that_cannot_be_written_costs_a_warning(
    tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(runs, "write_readme", full)
    Path(OUT).mkdir()
    Path(OUT, ".tmp-README.md").write_text("of a run that was killed here")
    assert train(config(tiny_data)).exit_code == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: README.md cannot be written (no room)"]  # the training has ended
    assert sorted(path.name for path in Path(OUT).glob(".*")) == [".lock"]


@pytest.mark.slow
def test_a_stopped_run_names_the_command_that_continues(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Run.next_batch

    def stopping(self: Run) -> Any:
        self.stop.signum = 15 if self.state.step == 4 else None
        return forward(self)

    monkeypatch.setattr(Run, "next_batch", stopping)
    assert train(config(tiny_data), command="python train.py").exit_code == 143
    text = Path(OUT, "README.md").read_text()
    generate, _, resume, _ = (line.partition("  #")[0].rstrip() for line in block(text, "sh"))
    assert resume == f"python train.py --init_from=resume '--out_dir={OUT}'".replace("o'ut'", "o'\"'\"'ut'") + (
        f" --dataset={tiny_data}"
    )
    assert generate.startswith("python sample.py ")
    assert "step 5 of 8" in text


@pytest.mark.slow
def test_a_model_that_transformers_does_not_know_is_not_offered_for_export(tiny_data: Path) -> None:
    train(config(tiny_data, logit_softcap=15.0))
    assert "llm-export" not in Path(OUT, "README.md").read_text()


# --- the last sample ---


def samples(out: str) -> list[int]:
    path = Path(out, "samples.jsonl")
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("settings", "command", "steps"),
    [
        ({"sample_interval": 3}, "llm-train", [0, 3, 6, 8]),
        pytest.param({"sample_interval": 4}, "llm-train", [0, 4, 8], marks=pytest.mark.slow),
        pytest.param({"sample_interval": 3}, "python train.py", [0, 3, 6], marks=pytest.mark.slow),
        pytest.param({}, "llm-train", [], marks=pytest.mark.slow),
        pytest.param({"progress": "none"}, "llm-train", [], marks=pytest.mark.slow),
        pytest.param({}, "python train.py", [], marks=pytest.mark.slow),
    ],
)
def test_the_last_sample_is_of_the_finished_model(
    tiny_data: Path, settings: dict[str, Any], command: str, steps: list[int]
) -> None:
    for init_from in ("scratch", "resume"):  # a finished run that is started again makes no other
        train(config(tiny_data, max_new_tokens=3, init_from=init_from, **settings), command=command)
        assert samples(OUT) == steps


@pytest.mark.slow
def test_a_run_that_stops_early_at_a_sample_writes_no_second_one(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rising = iter([1.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(runs, "estimate_loss", lambda *_: next(rising))
    train(config(tiny_data, max_new_tokens=3, sample_interval=2, early_stopping_patience=1))
    assert samples(OUT) == [0, 2, 4]


@pytest.mark.parametrize(
    ("command", "progress", "steps"),
    [
        ("llm-train", "auto", [8]),
        pytest.param("llm-train", "bar", [], marks=pytest.mark.slow),
        pytest.param("llm-train", "lines", [], marks=pytest.mark.slow),
        pytest.param("llm-train", "none", [], marks=pytest.mark.slow),
        pytest.param("python train.py", "auto", [], marks=pytest.mark.slow),
    ],
)
def test_a_terminal_gets_one_by_default(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, command: str, progress: str, steps: list[int]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    train(config(tiny_data, progress=progress, start="#not in the data#"), command=command)
    assert samples(OUT) == steps


def test_a_quiet_run_prints_nothing(tiny_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = train(config(tiny_data, sample_interval=3, max_new_tokens=3, warmup_iters=99), quiet=True)
    assert result.step == 8 and Path(OUT, report.README).exists()
    assert capfd.readouterr() == ("", "")
    assert gptsmith.main(["train", "--init_from=resume", f"--out_dir={OUT}", f"--dataset={tiny_data}"]) == 0
    assert "already finished (step 8 of 8)" in capfd.readouterr().out  # the next call is not quiet


def test_nanogpts_mfu_is_that_of_its_model(tiny_data: Path) -> None:
    with open_run(config(tiny_data, gradient_accumulation_steps=2), None, "python train.py", None) as run:
        assert run.log.nanogpt_mfu is not None
        assert run.log.nanogpt_mfu(2.5) == run.model.estimate_mfu(4 * 2, 2.5)
