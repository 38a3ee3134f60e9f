"""The ladder of sizes, and the law as another command reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llm_from_scratch.cli import scale
from llm_from_scratch.cli.scale import ScaleOptions
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.files import to_json
from llm_from_scratch.sweep.fit import Fit, Point
from llm_from_scratch.sweep.ladder import law_json, lines, measured, shapes
from llm_from_scratch.training.law import Law, read_law
from llm_from_scratch.training.trainer import train

from ..tiny import arguments, tiny_config

MODEL = GPTConfig(n_layer=4, n_head=4, n_embd=128)


def test_the_number_of_sizes_ends_at_the_preset() -> None:
    found = [tuple(map(int, shape.values())) for shape in shapes(MODEL, [4]).values()]
    # widths of 128 / sqrt(2)^k in heads of 32: 45 -> 32, 64, 91 -> 96
    assert found == [(1, 1, 32), (2, 2, 64), (3, 3, 96), (4, 4, 128)]


def test_widths_by_name() -> None:
    assert shapes(MODEL, [64, 256])["256"] == {"n_layer": "8", "n_head": "8", "n_embd": "256"}
    equal = "expected different widths, got "
    for sizes, said in [([64, 100], "100 is not a multiple of the head width 32"), ([64, 64], equal), ([9], equal)]:
        with pytest.raises(UserError, match=said):
            shapes(MODEL, sizes)


def test_options() -> None:
    assert ScaleOptions(sizes="64, 128", budgets="1min,4min").points() == ([64, 128], ["1min", "4min"])
    for options in (ScaleOptions(sizes="4x"), ScaleOptions(budgets="1min"), ScaleOptions(budgets="1min,1min")):
        with pytest.raises(UserError, match="is not valid"):
            options.points()
    with pytest.raises(UserError, match="budget='1mim'"):
        ScaleOptions(budgets="1mim,4min").points()


def test_a_ladder_that_is_too_small_does_not_train(
    here: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(dataset=tiny_data, final_eval=True, sizes="8,16", budgets="1ktokens,2ktokens")
    words = [word for word in words if not word.startswith("--max_iters")]
    assert scale.main(words) == 2
    said = "a law needs at least 6 runs, of two sizes and two budgets or more; there are 4: add sizes or budgets\n"
    assert capsys.readouterr().err.endswith(said) and not Path("out-sweep").exists()


def test_measured_values_of_a_run(tmp_path: Path, tiny_data: Path) -> None:
    config = tiny_config(tiny_data, out_dir=str(tmp_path), final_eval=True, max_iters=6, eval_iters=1)
    result = train(config, quiet=True)
    found = measured(tmp_path)
    assert result.final is not None and found.bits == pytest.approx(result.final.loss / math.log(2))  # a byte a token
    assert found.unique == pytest.approx(2000) and found.seen == pytest.approx(6 * 4 * 8)
    model = GPT(config.model.__class__(**{**vars(config.model), "vocab_size": 20}))
    assert found.params == sum(p.numel() for p in model.parameters()) - 8 * 16  # without the table of positions


def test_the_law_is_read_back(tmp_path: Path) -> None:
    law = Law(E=1.0, A=2.0, alpha=0.5, B=3.0, beta=0.25, spread=0.02)
    (tmp_path / "law.json").write_bytes(to_json(law_json(Fit(law, {"E": (0.9, 1.1)}))))
    assert read_law(tmp_path / "law.json") == law
    assert json.loads((tmp_path / "law.json").read_text())["intervals"] == {"E": [0.9, 1.1]}


def test_the_table() -> None:
    law = Law(E=1.0, A=2.0, alpha=0.5, B=3.0, beta=0.25)
    point = Point(params=1e4, seen=1e4, unique=1e4, bits=1.353)  # 1 + 2 / 100 + 3 / 10 = 1.32
    text = lines([point], Fit(law, {"E": (0.9, 1.1)}))
    assert text[2] == "| 10,000 | 10,000 | 1.00 | 1.3530 | 1.3200 | +2.5% |"
    assert "| E | 1 | 0.9 to 1.1 |" in text
