"""The comparison of texts before and after finetuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_from_scratch.core.dataset import TokenData
from llm_from_scratch.training.before_after import FILE, Comparison, lines, prompts_from, read
from llm_from_scratch.training.trainer import train

from ..tiny import TOKENIZER, babble, read_metrics, tiny_config

pytestmark = pytest.mark.usefixtures("here")


def test_prompts_begin_with_lines_of_the_held_out_text() -> None:
    text = "\n".join(babble(90, seed=i).replace("\n", " ") for i in range(20))
    data = TokenData([np.asarray(TOKENIZER.encode(text))], "val")
    for prompt in prompts_from(data, TOKENIZER):
        assert any(line.lstrip().startswith(prompt) for line in text.split("\n")) and 20 < len(prompt) <= 60


def test_a_finetuned_run_compares_the_same_prompts_and_the_same_loss(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(tiny_data, out_dir="base", max_iters=2))
    assert not Path("base", FILE).exists()
    capsys.readouterr()
    settings = {"init_from": "base", "out_dir": "run", "before_after": True, "learning_rate": 0.01}
    train(tiny_config(tiny_data, **settings))
    told = capsys.readouterr().out
    found = json.loads(Path("run", FILE).read_text())
    losses = [entry["val_loss"] for entry in read_metrics(Path("run")) if "val_loss" in entry]
    assert found["val_loss"] == [losses[0], losses[-1]] and losses[-1] != losses[0]
    assert f"before and after finetuning: val loss {losses[0]:.4f} -> {losses[-1]:.4f}" in told
    for prompt, first, last in zip(found["prompts"], found["before"], found["after"], strict=True):
        assert first.startswith(prompt) and last.startswith(prompt) and first != last
        assert len(first) == len(prompt) + found["tokens"] == len(last)
    assert "    before and after finetuning: val loss" in Path("run", "README.md").read_text()
    # the texts of the first weights draw nothing from training
    train(tiny_config(tiny_data, **{**settings, "out_dir": "plain", "before_after": False}))
    assert not Path("plain", FILE).exists() and "before and after" not in capsys.readouterr().out
    assert read_metrics(Path("plain"))[-1]["loss" if "loss" in read_metrics(Path("plain"))[-1] else "val_loss"] in (
        entry.get("loss", entry.get("val_loss")) for entry in read_metrics(Path("run"))
    )


@pytest.mark.parametrize(
    ("settings", "compares"),
    [({}, True), ({"progress": "none"}, False), ({"init_from": "scratch"}, False), ({"eval_only": True}, False)],
)
def test_a_piped_finetune_compares(tiny_data: Path, settings: dict[str, Any], compares: bool) -> None:
    train(tiny_config(tiny_data, out_dir="base", max_iters=1))
    begin = {"init_from": "base", "out_dir": "run", "max_iters": 1, "before_after": "auto"}
    train(tiny_config(tiny_data, **begin | settings))
    assert Path("run", FILE).exists() == compares


def test_a_broken_file_is_ignored(here: Path) -> None:
    for content in ("", "[]", "{}", '{"run_id": "x", "prompts": [1], "tokens": 2, "before": []}'):
        (here / FILE).write_text(content)
        assert read(here / FILE, "x") is None
    assert lines(Comparison("x", ["a"], 4, ["ab"])) == []
