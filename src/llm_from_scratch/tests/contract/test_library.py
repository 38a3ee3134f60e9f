"""The package as a library: the names in dir(), presets as objects, and settings that do not exist."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest

import llm_from_scratch as library
from llm_from_scratch import Config, GPTConfig, UserError, preset, read_metrics, train
from llm_from_scratch.config import DataConfig
from llm_from_scratch.presets import parse

from ..tiny import TOKENIZER, babble, tiny_config, write_data
from ..tiny import read_metrics as lines_of


def test_the_public_names_are_in_dir_and_can_be_imported() -> None:
    assert set(dir(library)) >= {*library.__all__, "__version__"}
    for name in library.__all__:
        assert getattr(library, name).__doc__, name


def test_it_is_typed() -> None:
    assert (Path(library.__file__).parent / "py.typed").is_file()


def test_a_preset_is_what_the_command_line_gives() -> None:
    typed = parse(Config, ["quick", "--dataset=book", "--max_iters=200", '--stop=["END"]'], prog="test").tree
    assert preset("quick", dataset="book", max_iters=200, stop=("END",)) == typed
    assert preset() == parse(Config, ["default"], prog="test").tree


def test_settings_that_do_not_exist_are_refused() -> None:
    config = preset("quick")
    with pytest.raises(UserError, match="unknown setting 'max_itters'; did you mean max_iters?"):
        config.training.max_itters = 5
    with pytest.raises(UserError, match="unknown setting max_itters"):
        preset("quick", max_itters=5)
    with pytest.raises(UserError, match="no preset file 'quik'; did you mean quick?"):
        preset("quik")
    with pytest.raises(TypeError):
        GPTConfig(n_layers=4)  # type: ignore[call-arg]


def test_settings_are_copied_and_pickled() -> None:
    config = preset("quick", n_layer=7)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_a_quiet_run_prints_nothing_and_returns_its_metrics(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_data(here / "data" / "book")
    result = train(tiny_config(here / "data" / "book", max_iters=4, eval_interval=2, out_dir="run"), quiet=True)
    assert capfd.readouterr() == ("", "")
    lines = lines_of(Path("run"))
    assert result.metrics == read_metrics("run") and set(result.metrics) == {name for line in lines for name in line}
    for name, column in result.metrics.items():
        assert column == [line.get(name) for line in lines]
    assert sum(value is not None for value in result.metrics["val_loss"]) == 3  # steps 0, 2 and 4


@pytest.mark.slow
def test_a_configuration_without_presets_trains(here: Path) -> None:
    text = babble(4000)
    write_data(here / "data" / "book", train=TOKENIZER.encode(text), val=TOKENIZER.encode(text[:600]))
    config = Config(data=DataConfig(dataset="book"))
    config.training.max_iters, config.training.eval_iters, config.system.device = 3, 1, "cpu"
    result = train(config, quiet=True)
    assert result.step == 3 and result.final is not None and result.final.tokens == 599
    assert 0.5 < result.final.loss / math.log(20) < 1.1  # of 20 characters
