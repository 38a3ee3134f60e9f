"""The comparison of texts before and after finetuning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_from_scratch.core.dataset import TokenData
from llm_from_scratch.core.tokenizer import EOT, Tokenizer
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.training.before_after import FILE, Comparison, lines, prompts_from, read
from llm_from_scratch.training.run import Run
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


def test_conversations_are_asked_and_answered(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts are whole questions, with special tokens as tokens; answers end with the turn."""
    rows = [{"prompt": f"{n}?", "completion": f"{n * n}"} for n in range(60)]
    Path("c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare("c.jsonl", root=here, report=lambda line: None, tokenizer="bpe:270")
    settings: dict[str, Any] = {"block_size": 32, "max_iters": 2}
    train(tiny_config(data, out_dir="base", **settings))
    capsys.readouterr()
    asked: list[list[int]] = []
    tokenizer = Tokenizer.load(data)
    (end,) = tokenizer.encode(EOT, allow_special=True)

    def write(self: Run, prompt: list[int], tokens: int) -> str:
        asked.append(prompt)
        return tokenizer.decode([*prompt, *tokenizer.encode("yes"), end, *tokenizer.encode("no")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "continued", write)
        train(tiny_config(data, out_dir="run", init_from="base", before_after=True, **settings))
    found = json.loads(Path("run", FILE).read_text())
    assert len(found["prompts"]) == 2
    for prompt, first, last in zip(found["prompts"], found["before"], found["after"], strict=True):
        assert re.fullmatch(r"User:\n\d+\?<\|endoftext\|>\nAssistant:\n", prompt)
        assert first == last == prompt + "yes"
    assert {tuple(ids) for ids in asked} == {
        tuple(tokenizer.encode(prompt, allow_special=True).tolist()) for prompt in found["prompts"]
    }
    assert all(end in ids for ids in asked) and "continues with\nyes\n" in capsys.readouterr().out


@pytest.mark.cases(2)
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
