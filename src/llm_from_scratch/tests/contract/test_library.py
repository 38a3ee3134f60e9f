"""The package as a library: the names in dir(), presets as objects, and unknown settings."""

from __future__ import annotations

import copy
import math
import pickle
import re
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


def test_a_preset_equals_the_command_line() -> None:
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


def test_the_length_of_a_preset_is_set_once() -> None:
    with pytest.raises(UserError, match="epochs and max_iters both set the length of the run"):
        preset("quick", epochs=0.001, max_iters=3)
    longest = preset("quick", epochs=2.0)
    assert longest.training.epochs == 2.0 and longest.scheduler.lr_decay_iters is None
    for wrong in ("--help", "-h", 5):
        with pytest.raises(UserError, match=f"{wrong!r} is not a preset"):
            preset(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "name", "value", "expected"),
    [
        ("training", "max_iters", "5", "expected int"),
        ("training", "max_iters", 5.0, "expected int"),
        ("training", "eval_only", 1, "expected bool"),
        ("training", "activation_budget", "atuo", "expected float | Literal['auto'] | None"),
        ("optimizer", "learning_rate", True, "expected float"),
        ("optimizer", "optimizer_type", "sgd", "expected Literal['adamw', 'muon', 'normuon']"),
        ("generation", "stop", 5, "expected tuple[str, ...]"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(section: str, name: str, value: object, expected: str) -> None:
    config = Config()
    setattr(getattr(config, section), name, value)
    with pytest.raises(UserError, match=f"^{re.escape(f'{name}={value!r} has the wrong type: {expected}')}$"):
        train(config)


def test_the_metrics_of_a_run_that_is_not_there(here: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl does not exist: expected the out_dir of a run"):
        read_metrics("nothere")


def test_settings_without_a_dataset_list_the_prepared_datasets(here: Path) -> None:
    write_data(here / "data" / "book")
    with pytest.raises(UserError, match=r"dataset 'openwebtext' not found: .*\(prepared: book\)"):
        train(Config())


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
