"""Every preset in the repository: it loads, its settings are valid, and its model has the documented size."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.config import Config, GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.presets import Parsed, find_preset, parse
from llm_from_scratch.settings import flatten

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.skipif(not (ROOT / "configs").is_dir(), reason="presets lie in a checkout")

# Millions of parameters, from and to, with a tied head counted once and the position table counted. GPT-2's four sizes:
# Radford et al. 2019 state 117M, 345M, 762M, 1542M, which leaves out the tables; OpenAI's files hold these.
MILLIONS: dict[str, tuple[float, float]] = {
    "config/eval_gpt2.py": (124.3, 124.5),
    "config/eval_gpt2_medium.py": (354.7, 354.9),
    "config/eval_gpt2_large.py": (773.9, 774.1),
    "config/eval_gpt2_xl.py": (1557.5, 1557.7),
    "config/finetune_shakespeare.py": (1557.5, 1557.7),
    "config/train_nanogpt.py": (124.0, 125.0),
    "config/train_gpt2.py": (124.0, 125.0),
    "config/train_shakespeare_char.py": (10.6, 10.8),
    "configs/default.yaml": (17.0, 18.5),
    "configs/quick.yaml": (0.5, 3.0),
    "configs/laptop.yaml": (4.5, 5.0),
    "configs/speedrun.yaml": (10.0, 11.0),  # of which 0.2 are not n-grams
    "configs/three-minutes.yaml": (168.0, 169.0),
    "configs/gpt2-124m.yaml": (124.0, 125.0),
    "configs/modern-124m.yaml": (123.0, 125.0),
    "configs/finetune.yaml": (124.3, 124.5),
    "configs/lora.yaml": (124.3, 124.5),
}
# What the data of a preset gives the model; GPT-2's tokens otherwise.
RACES = ("configs/speedrun.yaml", "configs/three-minutes.yaml")  # every second counts
OF_CHARACTERS = ("config/train_shakespeare_char.py", "configs/quick.yaml", "configs/laptop.yaml")
VOCABULARY = dict.fromkeys(OF_CHARACTERS + RACES, 65)
# The shapes behind the names that init_from takes (openai/gpt-2, hparams.json of each size).
GPT2_SHAPES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def shipped() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix() for pattern in ("config/*.py", "configs/*") for path in ROOT.glob(pattern)
    }


def load(name: str) -> Parsed[Config]:
    parsed = parse(Config, [str(ROOT / name)], prog="test", base_preset="default")
    parsed.tree.validate()
    return parsed


def model_of(name: str, config: Config) -> GPTConfig:
    """The model that a run with this preset trains."""
    if config.training.init_from in GPT2_SHAPES:
        layers, heads, width = GPT2_SHAPES[config.training.init_from]
        return GPTConfig(vocab_size=50257, n_layer=layers, n_head=heads, n_embd=width)
    model = config.model
    model.vocab_size = VOCABULARY.get(name, 50304)
    return model


def settings_of(name: str) -> list[str]:
    """The names that a preset sets, as often as it sets them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        return [n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    import yaml

    def leaves(node: Any) -> list[str]:
        # the nodes, not the loaded dict, in which the last of two equal keys wins silently
        found: list[str] = []
        for key, value in node.value:
            found += leaves(value) if isinstance(value, yaml.MappingNode) else [key.value]
        return found

    return leaves(yaml.compose(text))


def test_every_preset_is_in_the_table() -> None:
    assert shipped() == set(MILLIONS)


@pytest.fixture
def no_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device hold nothing, yet torch imports its compiler to fill them: seconds for no number."""
    for name in ("normal_", "uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.mark.parametrize("name", MILLIONS)
@pytest.mark.usefixtures("no_random_weights")
def test_size(name: str) -> None:
    config = model_of(name, load(name).tree)
    config.validate()
    with torch.device("meta"):
        model = GPT(config)
    low, high = MILLIONS[name]
    assert low <= sum(p.numel() for p in model.parameters()) / 1e6 <= high


@pytest.mark.parametrize("name", MILLIONS)
def test_sets_nothing_twice(name: str) -> None:
    names = settings_of(name)
    assert names, "a preset that sets nothing is none"
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)
    assert set(names) <= set(flatten(Config()))


@pytest.mark.parametrize("name", MILLIONS)
def test_does_not_contradict_itself(name: str) -> None:
    parsed = load(name)
    config, given = parsed.tree, set(parsed.sources)
    training, scheduler = config.training, config.scheduler
    length = 600 if training.eval_only else training.max_iters
    assert training.eval_interval <= length or training.eval_only
    if scheduler.decay_lr:
        assert scheduler.min_lr < config.optimizer.learning_rate
        assert scheduler.warmup_iters < (scheduler.lr_decay_iters or length) or training.eval_only
        assert scheduler.lr_decay_iters in (None, training.max_iters), "the decay ends with the run"
    else:
        assert not given & {"warmup_iters", "min_lr", "lr_decay_iters", "schedule"}, "a constant rate has no schedule"
    if training.epochs is not None:
        assert "max_iters" not in given
    if training.init_from != "scratch":
        assert not given & {"n_layer", "n_head", "n_embd", "bias", "vocab_size"}, "the loaded weights have their shape"
    for leaf, follows in {
        "stride": "sample_order",
        "wandb_project": "wandb_log",
        "rope_theta": "pos_embedding",
    }.items():
        assert leaf not in given or follows in given, f"{leaf} means nothing without {follows}"
    accumulated = training.gradient_accumulation_steps
    assert accumulated == 1 or {"batch_size", "gradient_accumulation_steps"} <= given or training.eval_only


@pytest.mark.parametrize("name", [n for n in MILLIONS if n.startswith("configs/")])
def test_yaml_presets_share_their_habits(name: str) -> None:
    config = load(name).tree
    assert config.data.sample_order == "shuffled"
    assert config.logging.tensorboard is (False if name in RACES else None)


@pytest.mark.parametrize("name", MILLIONS)
def test_is_found_by_its_bare_name(name: str) -> None:
    assert find_preset(Path(name).stem).resolve() == ROOT / name


def test_gpt2_124m_has_the_numbers_of_train_gpt2() -> None:
    ours, theirs = flatten(load("configs/gpt2-124m.yaml").tree), flatten(load("config/train_gpt2.py").tree)
    theirs["lr_decay_iters"] = None  # the same step, as it is max_iters
    names = {name for name in ours if ours[name] != theirs[name]}
    assert names == {
        "sample_order", "micro_batch", "out_dir", "tensorboard", "wandb_log", "wandb_run_name", "inclusive_max_iters",
    }  # fmt: skip


def test_modern_124m_differs_from_gpt2_124m_in_the_model_alone() -> None:
    ours, theirs = load("configs/modern-124m.yaml").tree, load("configs/gpt2-124m.yaml").tree
    theirs.model, theirs.training.out_dir = ours.model, ours.training.out_dir
    assert ours == theirs


def test_a_misspelt_setting_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("model:\n  n_layers: 4\n", encoding="utf-8")
    with pytest.raises(UserError, match="did you mean n_layer"):
        parse(Config, [str(tmp_path / "p.yaml")], prog="test")
