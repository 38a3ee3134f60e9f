"""config.py: one set of names, each documented and in range; nanoGPT's 33 settings with nanoGPT's values."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from llm_from_scratch.cli.bench import BenchCommand
from llm_from_scratch.cli.evaluate import EvalCommand
from llm_from_scratch.config import Config, GPTConfig
from llm_from_scratch.errors import UserError
from llm_from_scratch.presets import build, nanogpt_defaults, parse
from llm_from_scratch.settings import flatten, to_dict

# name: value of nanoGPT's train.py. device, dtype, compile and backend are chosen for the machine instead.
NANOGPT: dict[str, Any] = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "backend": "auto",
    "device": "auto",
    "dtype": "auto",
    "compile": "auto",
}


def leaves(tree: Any) -> Iterator[tuple[str, str]]:
    """(section, leaf) of a dataclass tree."""
    for item in dataclasses.fields(tree):
        value = getattr(tree, item.name)
        yield from ((item.name, f.name) for f in dataclasses.fields(value))


def test_leaf_names_are_unique() -> None:
    names = [leaf for _, leaf in leaves(Config())]
    assert sorted(names) == sorted(set(names))
    assert not set(names) & {section for section, _ in leaves(Config())}  # --model.n_layer and --n_layer never clash
    assert set(names) == set(flatten(Config()))


def test_train_py_resolves_nanogpts_33_settings() -> None:
    assert len(NANOGPT) == 33
    tree = parse(Config, [], prog="train.py", defaults=nanogpt_defaults()).tree
    found = flatten(tree)
    assert {name: found[name] for name in NANOGPT} == NANOGPT
    assert {name: type(found[name]) for name in NANOGPT} == {name: type(value) for name, value in NANOGPT.items()}


def test_a_configuration_without_arguments_is_llm_trains_default() -> None:
    """configs/default.yaml lists the values, and so config.py and the file must agree."""
    assert parse(Config, [], prog="llm-train", base_preset="default").tree == Config()
    found = flatten(Config())
    by_hand = {
        "n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 256, "dropout": 0.1, "bias": False, "vocab_size": None,
        "batch_size": 8, "sample_order": "shuffled", "gradient_accumulation_steps": 1, "max_iters": 1000,
        "eval_interval": 100, "eval_iters": 20, "learning_rate": 1e-3, "beta2": 0.99, "warmup_iters": 100,
        "min_lr": 1e-4, "lr_decay_iters": None, "inclusive_max_iters": False, "log_interval": 10, "num_samples": 1,
    }  # fmt: skip
    assert {name: found[name] for name in by_hand} == by_hand
    assert GPTConfig() == GPTConfig(1024, 50304, 12, 12, 768, 0.0, True)  # nanoGPT's, as its users construct it


def documentation(section: type) -> dict[str, str]:
    """{field: the text under it}, from the syntax tree."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            has = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            texts[node.target.id] = str(following.value.value) if has else ""  # type: ignore[union-attr]
    return texts


@pytest.mark.parametrize("tree_type", [Config, EvalCommand, BenchCommand])
def test_help_shows_the_documentation_of_every_field(
    tree_type: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        parse(tree_type, ["--help-all"], prog="command")
    assert stop.value.code == 0
    shown = "".join(capsys.readouterr().out.replace("│", " ").split())
    tree = tree_type()
    for item in dataclasses.fields(tree):
        for name, text in documentation(type(getattr(tree, item.name))).items():
            assert len(text.split()) >= 2, f"{item.name}.{name} is not documented"
            assert f"--{name}" in shown and "".join(text.split()) in shown, f"--help-all does not explain {name}"


def test_sections_survive_a_round_trip_through_plain_data() -> None:
    config = Config()
    config.generation.stop = ("END", "\n\n")
    config.model.n_kv_head = 4
    config.optimizer.learning_rate = 1 / 3
    assert build(Config, to_dict(config)) == config


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("batch_size", [0, -1], [1]),
        ("stride", [0], [None]),
        ("max_iters", [-1], [0]),
        ("epochs", [0.0, -1.0, math.nan, math.inf], [0.5]),
        ("gradient_accumulation_steps", [0], [1]),
        ("eval_interval", [0], [1]),
        ("eval_iters", [0], [1]),
        ("keep_last", [0], [1]),
        ("save_interval", [0], [1, None]),
        ("keep_every", [0], [1]),
        ("early_stopping_patience", [0], [1]),
        ("sample_interval", [0], [1]),
        ("out_dir", [""], ["x"]),
        ("learning_rate", [0.0, -1e-3, math.nan, math.inf], [1.0]),
        ("weight_decay", [-0.1, math.nan], [0.0]),
        ("beta1", [-0.1, 1.0, math.nan], [0.0, 0.999]),
        ("beta2", [-0.1, 1.0], [0.0]),
        ("grad_clip", [-1.0, math.nan], [0.0]),
        ("warmup_iters", [-1], [0]),
        ("lr_decay_iters", [-1], [0]),
        ("min_lr", [-1e-9, math.nan], [0.0]),
        ("cooldown_frac", [-0.1, 1.1], [0.0, 1.0]),
        ("num_samples", [0], [1]),
        ("max_new_tokens", [0], [1]),
        ("temperature", [-0.1, math.nan], [0.0]),
        ("top_k", [-1], [None, 0]),
        ("top_p", [0.0, 7.0, -0.5, math.nan], [1.0, 0.1]),
        ("min_p", [-0.1, 1.1], [0.0, 1.0]),
        ("repetition_penalty", [0.0, math.inf], [1.2]),
        ("presence_penalty", [-1e3, math.nan], [-2.0]),
        ("frequency_penalty", [1e3], [2.0]),
        ("stop", [("",), ("a", "")], [("a",)]),
        ("log_interval", [0], [1]),
        ("seed", [-1, 2**63], [0]),
        ("threads", [0], [1, None]),
        (
            "device",
            ["gpu", "cpu:0", "cuda:x", "cuda:", "cuda:-1", "cuda:300", "cuda:١", ""],
            ["cuda", "cuda:1", "mps", "cpu"],
        ),
        ("backend", ["mpi", ""], ["nccl", "gloo"]),
        ("block_size", [0], [1]),
        ("n_layer", [0], [1]),
        ("n_head", [0, 5], [1]),
        ("n_embd", [0, 102], [24]),
        ("vocab_size", [0], [1, None]),
        ("n_kv_head", [0, 3], [None, 2, 4]),
        ("mlp_hidden", [0], [1]),
        ("dropout", [-0.1, 1.0, math.nan], [0.0, 0.9]),
        ("rope_theta", [0.0, math.inf], [1e6]),
        ("norm_eps", [0.0, -1.0], [1e-8]),
        ("logit_softcap", [-1.0, math.nan], [30.0]),
    ],
)
def test_ranges(name: str, bad: list[Any], good: list[Any]) -> None:
    section = next(section for section, leaf in leaves(Config()) if leaf == name)

    def validate(value: Any) -> None:
        config = Config()
        setattr(getattr(config, section), name, value)
        config.validate()

    for value in good:
        validate(value)
    for value in bad:
        with pytest.raises(UserError) as error:
            validate(value)
        message = str(error.value)
        assert name in message and "\n" not in message


def test_mismatched_inputs_are_refused() -> None:
    with pytest.raises(UserError, match="n_embd=770 is not divisible by n_head=12; try n_head=11"):
        GPTConfig(n_embd=770).validate()
    with pytest.raises(UserError, match="n_embd=18 is not divisible by n_head=5; try n_head=3"):  # 6 heads are 3 wide
        GPTConfig(n_embd=18, n_head=5, pos_embedding="rope").validate()
    with pytest.raises(UserError, match="n_kv_head=5 does not divide n_head=12"):
        GPTConfig(n_kv_head=5).validate()
    with pytest.raises(UserError, match="rope needs an even head width, got n_embd/n_head = 3"):
        GPTConfig(n_embd=12, n_head=4, pos_embedding="rope").validate()
    config = Config()
    config.data.stride, config.data.sample_order = 4, "random"
    with pytest.raises(UserError, match="stride needs --sample_order=shuffled"):
        config.validate()


def test_mlp_width_by_hand() -> None:
    assert GPTConfig().mlp_width == 3072
    assert GPTConfig(activation="swiglu").mlp_width == 2048  # 8/3 * 768
    assert GPTConfig(n_embd=100, n_head=10, activation="swiglu").mlp_width == 320  # 266.7, up to a multiple of 64
    assert GPTConfig(activation="swiglu", mlp_hidden=5).mlp_width == 5
