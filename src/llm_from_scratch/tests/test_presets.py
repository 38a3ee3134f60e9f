"""presets.py: defaults < preset files < command line, with the same meaning and the same refusals everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.cli.bench import BenchCommand
from llm_from_scratch.cli.evaluate import EvalCommand
from llm_from_scratch.config import Config, GPTConfig
from llm_from_scratch.errors import UserError
from llm_from_scratch.presets import (
    COMMAND_LINE,
    Parsed,
    build,
    find_preset,
    nanogpt_defaults,
    parse,
    preset,
)  # fmt: skip
from llm_from_scratch.serving.options import ServeOptions
from llm_from_scratch.settings import flatten, leaf_types


def read(*argv: str, **kwargs: Any) -> Parsed[Config]:
    return parse(Config, list(argv), prog="test", **kwargs)


def settings(*argv: str, **kwargs: Any) -> dict[str, Any]:
    return flatten(read(*argv, **kwargs).tree)


def refused(*argv: str, **kwargs: Any) -> str:
    """The message of a refused command line: one line."""
    with pytest.raises(UserError) as error:
        read(*argv, **kwargs)
    message = str(error.value)
    assert message and "\n" not in message and "│" not in message and "╭" not in message
    return message


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- the command line ---


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate=3e-4"],
        ["--learning_rate", "3e-4"],
        ["--learning-rate=3e-4"],
        ["--optimizer.learning_rate=3e-4"],
        ["--optimizer.learning_rate", "3e-4"],
        ["--learning_rate=1", "--learning_rate=0.0003"],
    ],
)
def test_one_setting_written_in_many_ways(argv: list[str]) -> None:
    parsed = read(*argv)
    assert parsed.tree.optimizer.learning_rate == 3e-4
    assert parsed.sources == {"learning_rate": COMMAND_LINE}
    assert parsed.on_command_line("learning_rate") and not parsed.on_command_line("batch_size")


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--eval_only"], "eval_only", True),
        (["--eval_only", "--batch_size=3"], "eval_only", True),
        (["--eval_only", "False"], "eval_only", False),
        (["--eval_only=true"], "eval_only", True),
        (["--compile"], "compile", True),
        (["--compile", "auto"], "compile", "auto"),
        (["--compile=False"], "compile", False),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--max_iters=5e3"], "max_iters", 5000),
        (["--max_iters=-1"], "max_iters", -1),
        (["--max_iters", "-1"], "max_iters", -1),
        (["--seed=9007199254740993"], "seed", 9007199254740993),  # 2**53 + 1: no detour through a float
        (["--top_k=None"], "top_k", None),
        (["--vocab_size=none"], "vocab_size", None),
        (["--out_dir=None"], "out_dir", "None"),  # a text that happens to be this word
        (["--wandb_run_name=True"], "wandb_run_name", "True"),
        (["--start="], "start", ""),
        (["--start=a=b --c"], "start", "a=b --c"),
        (["--start=-"], "start", "-"),
        (["--start", "-"], "start", "-"),
        (["--start=@file é\n"], "start", "@file é\n"),
        (["--dataset=2024"], "dataset", "2024"),
        (["--stop=END"], "stop", ("END",)),
        (['--stop=["a", "b\\n"]'], "stop", ("a", "b\n")),
        (["--stop=[not a list"], "stop", ("[not a list",)),
        (["--stop="], "stop", ()),
        (["--loss_plot=None"], "loss_plot", None),
        (["--loss_plot"], "loss_plot", True),
    ],
)
def test_values_of_the_command_line(argv: list[str], name: str, value: Any) -> None:
    found = settings(*argv)[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rte=1"], "unknown setting --learning_rte; did you mean learning_rate?"),
        (["--zzzzz=1"], "unknown setting --zzzzz; see --help"),
        (["--lr=1"], "unknown setting --lr; did you mean --learning_rate?"),
        (["--resume"], "unknown setting --resume; did you mean --init_from=resume --out_dir=RUN?"),
        (["--model=gpt2"], "unknown setting --model; did you mean --init_from?"),
        (["max_iters=5"], "no preset file 'max_iters=5'; did you mean --max_iters=5?"),
        (["--optimizer.lerning_rate=1"], "unknown setting --optimizer.lerning_rate; did you mean learning_rate?"),
        (["--nosuch.learning_rate=1"], "unknown setting --nosuch.learning_rate"),
        (["-n=3"], "unknown setting '-n=3'"),
        (["--batch_size"], "--batch_size needs a value"),
        (["--batch_size", "--eval_only"], "--batch_size needs a value"),
        (["--batch_size=many"], "batch_size='many' is not valid: expected a whole number"),
        (["--micro_batch=many"], "micro_batch='many' is not valid: expected a whole number or auto or None"),
        (["--batch_size=1.5"], "batch_size='1.5'"),
        (["--batch_size=1e400"], "batch_size='1e400'"),
        (["--batch_size="], "batch_size=''"),
        (["--batch_size=True"], "batch_size='True'"),
        (["--batch_size=None"], "batch_size='None'"),
        (["--learning_rate=fast"], "learning_rate='fast' is not valid: expected a number"),
        (["--eval_only=1"], "eval_only='1'"),
        (["--eval_only=maybe"], "eval_only='maybe'"),
        (["--dtype=float64"], "dtype='float64' is not valid: expected one of"),
        (["--norm=batchnorm"], "expected one of"),
        (["--compile=maybe"], "compile='maybe'"),
        (["--stop=[1, 2]"], "stop must be a string or a list of strings"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], words: str) -> None:
    assert words in refused(*argv)


def test_a_section_must_be_the_settings_own() -> None:
    assert refused("--model.learning_rate=1") == (
        "unknown setting --model.learning_rate: it belongs to section optimizer"
    )
    assert "did you mean n_layer?" in refused("--model.n_layers=1")
    assert parse(EvalCommand, ["--options.split=train"], prog="test").tree.options.split == "train"


def test_words_are_returned_if_a_command_accepts_no_presets() -> None:
    parsed = parse(EvalCommand, ["text.txt", "--split=train", "more.txt"], prog="test", presets=False)
    assert parsed.positionals == ["text.txt", "more.txt"] and parsed.tree.options.split == "train"


def test_everything_overrides_the_defaults_of_a_command(here: Path) -> None:
    defaults = {"bias": False, "batch_size": 7, "stop": ("a", "b"), "top_k": None}
    parsed = read(defaults=defaults)
    assert {name: flatten(parsed.tree)[name] for name in defaults} == defaults
    assert parsed.sources == {}
    mine = write(here / "a.yaml", "batch_size: 8")
    assert settings(mine, defaults=defaults)["batch_size"] == 8
    assert settings("--batch_size=9", defaults=defaults)["batch_size"] == 9


# --- YAML ---


def test_nested_and_flat_yaml_mean_the_same(here: Path) -> None:
    nested = write(
        here / "nested.yaml",
        "model:\n  n_layer: 3\n  bias: false\n  n_kv_head: null\noptimizer:\n  learning_rate: 1e-3\n  weight_decay: 1\n"
        "data:\ntraining: {out_dir: here, max_iters: 1_000}\ngeneration: {stop: [END, 'a b'], start: 2024-01-02}\n"
        "system: {compile: auto}\nlogging: {tensorboard: yes}\n",
    )
    flat = write(
        here / "flat.yml",
        "n_layer: 3\nbias: false\nn_kv_head:\nlearning_rate: 1.0e-3\nweight_decay: 1.0\nout_dir: here\n"
        "max_iters: 1e3\nstop: [END, a b]\nstart: '2024-01-02'\ncompile: auto\ntensorboard: true\n",
    )
    one, other = read(nested), read(flat)
    assert one.tree == other.tree
    assert one.tree.optimizer.learning_rate == 1e-3 and one.tree.generation.stop == ("END", "a b")
    assert one.tree.optimizer.weight_decay == 1.0 and one.tree.training.max_iters == 1000
    assert one.sources["n_layer"] == nested and "batch_size" not in one.sources


def test_later_wins_and_the_command_line_wins_over_all(here: Path) -> None:
    one = write(here / "one.yaml", "batch_size: 1\nn_layer: 1\nseed: 1\n")
    two = write(here / "two.py", "n_layer = 2\nseed = 2\n")
    parsed = read("--seed=3", one, two)
    assert (parsed.tree.data.batch_size, parsed.tree.model.n_layer, parsed.tree.system.seed) == (1, 2, 3)
    assert parsed.sources == {"batch_size": one, "n_layer": two, "seed": COMMAND_LINE}
    assert settings(two, one)["n_layer"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 3", "unknown setting batchsize in {path}; did you mean batch_size?"),
        ("model: {n_layers: 3}", "unknown setting model.n_layers in {path}; did you mean n_layer?"),
        ("model: {learning_rate: 3}", "unknown setting model.learning_rate in {path}: it belongs to section optimizer"),
        ("modle: {n_layer: 3}", "unknown setting modle in {path}"),
        ("model: 3", "unknown setting model in {path}"),
        ("n_layer: many", "n_layer='many' is not valid (set in {path})"),
        ("n_layer: 2.5", "n_layer='2.5' is not valid (set in {path})"),
        ("n_layer: true", "n_layer='True' is not valid (set in {path})"),
        ("n_layer: [1, 2]", "n_layer must be one value, got [1, 2] in {path}"),
        ("n_layer: {a: 1}", "n_layer must be one value"),
        ("stop: [1]", "stop must be a string or a list of strings, got [1]"),
        ("eval_only: 3", "eval_only='3' is not valid (set in {path})"),
        ("3: 4", "unknown setting 3 in {path}"),
        ("- n_layer", "{path} must contain settings as key: value, got list"),
        ("just words", "{path} must contain settings as key: value, got str"),
        ("a: b: c", "cannot read the preset {path}"),
        ("n_layer: [1, 2", "cannot read the preset {path}"),
        ("n_layer: 1\n\tn_head: 2", "cannot read the preset {path}"),
        ("? [a]\n: 1", "cannot read the preset {path}"),
        ("a: &a [*a]", "it uses an alias"),
        ("n_layer: \x00", "cannot read the preset {path}"),
        ("[" * 5000, "cannot read the preset {path}"),
    ],
)
def test_mistakes_in_yaml(here: Path, text: str, words: str) -> None:
    path = write(here / "bad.yaml", text)
    assert words.format(path=path) in refused(path)


def test_yaml_runs_no_code(here: Path) -> None:
    for tag in ("!!python/object/apply:os.system ['touch ran']", "!!python/object/new:os.system ['touch ran']",
                "!!python/name:os.system", "!!python/object:llm_from_scratch.config.Config {}"):  # fmt: skip
        path = write(here / "evil.yaml", f"out_dir: {tag}\n")
        assert "cannot read the preset" in refused(path)
    assert [p.name for p in here.iterdir()] == ["evil.yaml"]


def test_an_empty_yaml_changes_nothing(here: Path) -> None:
    assert settings(write(here / "empty.yaml", "# nothing\n")) == flatten(Config())


def test_yaml_must_be_utf8(here: Path) -> None:
    (here / "latin.yaml").write_bytes(b"out_dir: caf\xe9\n")
    assert "cannot read the preset latin.yaml" in refused("latin.yaml")


# --- Python presets, in nanoGPT's manner ---


def test_python_presets_compute_and_see_the_settings(here: Path) -> None:
    first = write(here / "first.py", "batch_size = 6\nn_layer = 3\n")
    second = write(
        here / "second.py",
        "import time\nfrom math import sqrt\ngradient_accumulation_steps = 5 * 8 // 4\n"
        "wandb_run_name = 'ft-' + str(time.time())\nbatch_size = batch_size * 2\nlearning_rate = sqrt(1e-4)\n"
        "for n_head in range(1, n_layer + 1):\n    pass\n_private = helper = 3\ndtype = 'bfloat16'\nmax_iters = 2e3\n",
    )
    parsed = read(first, second)
    found = flatten(parsed.tree)
    assert found["batch_size"] == 12 and found["gradient_accumulation_steps"] == 10 and found["n_head"] == 3
    assert found["learning_rate"] == 0.01 and found["dtype"] == "bfloat16" and found["max_iters"] == 2000
    prefix, stamp = found["wandb_run_name"].split("-")
    assert prefix == "ft" and float(stamp) > 1e9
    assert set(parsed.sources) == {
        "batch_size", "n_layer", "gradient_accumulation_steps", "wandb_run_name", "learning_rate", "n_head", "dtype",
        "max_iters",
    }  # fmt: skip


def test_python_presets_see_the_commands_defaults(here: Path) -> None:
    path = write(here / "p.py", "lr_decay_iters = lr_decay_iters // 2\nvocab_size = None\n")
    assert settings(path, defaults={"lr_decay_iters": 600000})["lr_decay_iters"] == 300000


def test_a_value_that_equals_the_default_counts_as_set(here: Path) -> None:
    parsed = read(write(here / "p.py", f"batch_size = {Config().data.batch_size}\n"))
    assert list(parsed.sources) == ["batch_size"]


def test_settings_that_another_command_has_are_passed_over(here: Path) -> None:
    """nanoGPT's sample.py takes the presets of its train.py; so do the other commands here."""
    path = write(here / "p.py", "max_iters = 7\ndevice = 'cpu'\nseed = 5\n")
    tree = parse(BenchCommand, [path], prog="test").tree
    assert tree.system.device == "cpu" and tree.system.seed == 5
    path = write(here / "p.yaml", "training: {max_iters: 7}\nsystem: {seed: 6}\n")
    assert parse(BenchCommand, [path], prog="test").tree.system.seed == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize = 3", "unknown setting batchsize in {path}; did you mean batch_size?"),
        ("batch_size = = 3", "the preset {path} failed: SyntaxError"),
        ("\nbatch_size = unheard_of", "the preset {path} failed: NameError: name 'unheard_of' is not defined"),
        ("batch_size = 1 / 0", "the preset {path} failed: ZeroDivisionError"),
        ("batch_size = 'many'", "batch_size='many' is not valid (set in {path})"),
        ("batch_size = [1]", "batch_size must be one value, got [1] in {path}"),
        ("eval_only = 1", "eval_only='1' is not valid (set in {path})"),
        ("import sys\nsys.exit(0)", "the preset {path} failed"),
    ],
)
def test_mistakes_in_python_presets(here: Path, text: str, words: str) -> None:
    path = write(here / "bad.py", text)
    assert words.format(path=path) in refused(path)


# --- finding presets ---


def test_bare_names_and_similar_names(here: Path) -> None:
    assert find_preset("quick").name == "quick.yaml"
    assert settings("quick")["n_embd"] == 128
    assert find_preset("train_shakespeare_char").name == "train_shakespeare_char.py"
    assert settings("config/train_shakespeare_char.py")["max_iters"] == 5000  # also from another folder
    assert settings("configs/quick.yaml")["n_embd"] == 128
    assert "no preset file 'quikc'; did you mean quick?" in refused("quikc")
    assert "available:" in refused("zzzzzzzz") and "quick" in refused("zzzzzzzz")
    assert "no preset file 'nowhere/mine.yaml'" in refused("nowhere/mine.yaml")
    (here / "data" / "processed" / "book").mkdir(parents=True)
    assert "no preset file 'book'; to use the data of that name: --dataset=book" in refused("quick", "book")
    assert "--dataset" not in refused(".")
    (here / "a run").mkdir()
    assert "; '--out_dir=a run' or '--dataset=a run' names a folder" in refused("a run")


@pytest.mark.parametrize("text", ["First Citizen:\nBefore we proceed", "", "one word", "x: [1"])
def test_a_text_in_place_of_a_preset(here: Path, text: str) -> None:
    path = write(here / "my book.txt", text)
    assert refused(path) == f"{path} is not a preset (a YAML or Python file); to train on a text: llm-prepare '{path}'"


def test_the_users_presets_override_the_installed_ones(here: Path) -> None:
    (here / "configs").mkdir()
    write(here / "configs" / "quick.yaml", "batch_size: 77\n")
    write(here / "configs" / "mine.yaml", "batch_size: 78\n")
    assert settings("quick")["batch_size"] == 77 and settings("mine")["batch_size"] == 78
    assert "did you mean mine?" in refused("mime")


def test_code_in_the_working_folder_runs_only_if_named(here: Path) -> None:
    """A bare name never picks up Python from where the user happens to stand."""
    (here / "config").mkdir()
    write(here / "config" / "surprise.py", "open('ran', 'w').close()\n")
    refused("surprise")
    assert not (here / "ran").exists()
    read("config/surprise.py")
    assert (here / "ran").exists()


def test_a_python_file_as_the_first_preset_changes_nanogpts_defaults(here: Path) -> None:
    """Such files were written for train.py; after a YAML preset they change that preset."""
    flat, nested = write(here / "mine.py", "n_layer = 3\n"), write(here / "mine.yaml", "n_head: 2\n")
    nanogpt = flatten(parse(Config, [], prog="train.py", defaults=nanogpt_defaults()).tree)
    assert nanogpt["max_iters"] == 600_000 and nanogpt["n_embd"] == 768 and nanogpt["inclusive_max_iters"] is True
    under = {"base_preset": "default", "defaults": {"dataset": "prepared-last"}}
    assert settings(flat, **under) == nanogpt | {"n_layer": 3, "dataset": "openwebtext"}
    assert settings(flat, nested, **under) == nanogpt | {"n_layer": 3, "n_head": 2, "dataset": "openwebtext"}
    ours = flatten(Config()) | {"dataset": "prepared-last"}
    assert settings(nested, flat, **under) == ours | {"n_layer": 3, "n_head": 2}
    assert read(flat, **under).sources == {"n_layer": flat}  # the rest counts as defaults
    saved = ours | {"n_layer": 5, "n_head": 5}  # resuming: the run's settings lie under the preset, and nothing else
    assert settings(flat, defaults=saved) == saved | {"n_layer": 3}


@pytest.mark.parametrize("name", ["train_gpt2", "train_shakespeare_char", "eval_gpt2"])
def test_nanogpts_presets_mean_the_same_in_train_py_and_llm_train(name: str) -> None:
    assert settings(name, base_preset="default") == settings(name, defaults=nanogpt_defaults())
    assert preset(name) == read(name, defaults=nanogpt_defaults()).tree


def test_the_base_preset_gives_way_to_a_named_one(here: Path) -> None:
    mine = write(here / "mine.yaml", "batch_size: 3\n")
    assert settings(base_preset="default")["max_iters"] == 1000
    assert settings(mine, base_preset="default")["max_iters"] == Config().training.max_iters
    assert settings("--batch_size=3", base_preset="default")["max_iters"] == 1000


# --- values by hand ---


def test_build_reads_plain_data() -> None:
    config = build(Config, {"model": {"n_layer": 2}, "learning_rate": 0.1, "stop": ["x"]})
    assert (config.model.n_layer, config.optimizer.learning_rate, config.generation.stop) == (2, 0.1, ("x",))
    with pytest.raises(UserError, match="unknown setting n_layers in the settings; did you mean n_layer"):
        build(Config, {"n_layers": 2})
    with pytest.raises(UserError, match="unknown setting max_iters in the settings"):  # another group's
        build(GPTConfig, {"max_iters": 2})
    with pytest.raises(UserError, match="n_layer='x' is not valid"):
        build(Config, {"n_layer": "x"})


def test_leaf_types_are_the_fields() -> None:
    assert leaf_types(Config).keys() == flatten(Config()).keys()
    assert leaf_types(Config)["n_layer"] is int


@pytest.mark.parametrize("text", ["{poet: out-a, coder: out-b}", '{"poet": "out-a", "coder": "out-b"}'])
def test_names_and_folders_are_a_dictionary(text: str) -> None:
    tree = parse(ServeOptions, [f"--adapters={text}"], prog="test").tree
    assert tree.adapters == {"poet": "out-a", "coder": "out-b"}


@pytest.mark.parametrize(
    "text", ["poet", "{poet: 1}", "[a]", "{a: [b]}", "{a: *b}", pytest.param("{" * 2000, marks=pytest.mark.slow)]
)
def test_other_dictionaries_of_names_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="adapters must be written as"):
        parse(ServeOptions, [f"--adapters={text}"], prog="test")
