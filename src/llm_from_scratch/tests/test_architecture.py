"""The layout, checked on the syntax tree: import order, unused names, the length of the one-hour path.

Each check is a function over source text that returns its findings, so that tests can show that it detects violations.
"""

from __future__ import annotations

import ast
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_from_scratch.config import Config

from .source_code import NAME, PACKAGE, dotted, imports, nodes_of, sources, tree_of

# The rooms from the bottom up, and which others each may import. errors and config are open to all above them; the
# package's __init__ hands out names lazily and is free to import anything.
BELOW: dict[str, set[str]] = {
    "machine": set(),
    "core": {"machine"},
    "kernels": {"machine", "core"},
    "interop": {"machine", "core"},
    "checkpoint": {"machine", "core", "interop"},
    "generation": {"machine", "core", "kernels", "interop", "checkpoint"},
    "training": {"machine", "core", "kernels", "interop", "checkpoint", "generation"},
    "serving": {"machine", "core", "interop", "checkpoint", "generation"},
    "data": {"machine", "core", "checkpoint"},
    "sweep": {"machine", "core", "checkpoint", "training", "setting_text", "presets"},
}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "settings": {"errors"},
    "mixture": {"errors", "settings"},
    "conflicts": {"errors", "settings", "mixture"},
    "config": {"errors", "settings", "mixture", "conflicts"},
    "completion": {"errors"},
    "setting_text": {"errors"},
    "help_text": {"settings", "setting_text"},
    "presets": {"errors", "settings", "setting_text", "config", "completion", "help_text"},
    **{room: {"errors", "settings", "mixture", "config", *below} for room, below in BELOW.items()},
    "cli": {"errors", "settings", "mixture", "config", "completion", "presets", *BELOW},
}
# nanoGPT's API has these two methods on the model, so they reach upward, when they are called.
UPWARD = {
    ("core.model", "GPT.from_pretrained", "interop"),
    ("core.model", "GPT.configure_optimizers", "training"),
}
# Rooms that can be deleted and the rest still stands.
LEAVES = ("cli", "data", "serving", "sweep", "generation.engine")

ONE_HOUR_PATH = (
    "config.py",
    "core/model.py",
    "core/dataset.py",
    "training/optimizer.py",
    "training/scheduler.py",
    "training/trainer.py",
    "generation/sampling.py",
    "generation/generator.py",
)


def wrong_imports(module: str, source: str) -> list[str]:
    """Imports that the plan of the rooms forbids."""
    room = module.partition(".")[0]
    if not module:
        return []
    if room not in ROOMS:
        return [f"{module} lies in no room of the plan"]
    wrong = []
    for entry in imports(module, source):
        target = entry.target.partition(".")[0]
        allowed = target in ROOMS[room] | {room, ""} or (module, entry.function, target) in UPWARD
        if not allowed:
            wrong.append(str(entry))
    return wrong


def is_in(module: str, leaf: str) -> bool:
    return module == leaf or module.startswith(leaf + ".")


def holding_imports(module: str, source: str) -> list[str]:
    """Imports that would break this module if a leaf were deleted: those outside functions."""
    found = []
    for entry in imports(module, source):
        leaf = next((leaf for leaf in LEAVES if is_in(entry.target, leaf)), None)
        if leaf is None or entry.function or entry.typing_only:
            continue
        if not any(is_in(module, own) for own in LEAVES):
            found.append(str(entry))
    return found


def unsafe_calls(module: str, source: str) -> list[str]:
    """Calls that run code which came as data: eval, exec, unpickling, YAML with constructors."""
    found = []
    for node in nodes_of(source):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Unpickler") for base in node.bases):
            if "find_class" not in {item.name for item in node.body if isinstance(item, ast.FunctionDef)}:
                found.append(f"{module}:{node.lineno} {node.name} unpickles any class")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        last = name.rpartition(".")[2]
        flags = [word for word in node.keywords if word.arg in ("weights_only", "allow_pickle")]
        keywords = {word.arg: ast.unparse(word.value) for word in flags}
        unsafe = (
            name in ("eval", "exec", "builtins.eval", "builtins.exec", "Unpickler")
            or name.startswith(("pickle.load", "pickle.Unpickler", "marshal.load", "shelve.", "dill.", "joblib."))
            or (name.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "full_load", "Loader"))
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("allow_pickle", "False") != "False"
        )
        if unsafe:
            found.append(f"{module}:{node.lineno} {name}(...)")
        elif last == "load" and name.split(".")[0] in unsafe_names(source):
            found.append(f"{module}:{node.lineno} {name}(...)")
    return found


def unsafe_names(source: str) -> set[str]:
    """Names under which pickle, marshal or yaml's loaders were imported differently: from pickle import load."""
    names = set()
    for node in nodes_of(source):
        if isinstance(node, ast.ImportFrom) and node.module in (
            "pickle",
            "marshal",
            "yaml",
            "torch",
            "torch.serialization",
        ):
            names |= {alias.asname or alias.name for alias in node.names if alias.name in ("load", "unsafe_load")}
        if isinstance(node, ast.Import):
            names |= {a.asname for a in node.names if a.asname and a.name in ("pickle", "marshal", "yaml")}
    return names


def body_of(source: str, name: str) -> ast.FunctionDef:
    """The function `Class.method` of a module."""
    found: ast.AST = tree_of(source)
    for part in name.split("."):
        nodes = ast.iter_child_nodes(found)
        found = next(n for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part)
    assert isinstance(found, ast.FunctionDef)
    return found


def branches(function: ast.FunctionDef) -> int:
    kinds = (ast.If, ast.IfExp, ast.For, ast.While, ast.Match)
    return sum(isinstance(node, kinds) for node in ast.walk(function))


# --- the checks on the tree ---


def test_nothing_holds_on_to_a_leaf() -> None:
    assert [line for module, source in sources().items() for line in holding_imports(module, source)] == []


def test_the_rest_works_if_optional_modules_are_deleted(tmp_path: Path) -> None:
    """All leaves deleted, every other module imports."""
    copy = tmp_path / NAME
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("tests", "__pycache__", "_presets"))
    for leaf in LEAVES:
        path = copy / leaf.replace(".", "/")
        if path.is_dir():
            shutil.rmtree(path)
        path.with_suffix(".py").unlink(missing_ok=True)
    rest = [module for module in sources() if not any(is_in(module, leaf) for leaf in LEAVES)]
    program = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1])\n"
        f"for name in {rest!r}: module = importlib.import_module('{NAME}.' + name if name else '{NAME}')\n"
        "assert module.__file__.startswith(sys.argv[1]), module.__file__"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_settings_load_without_torch_and_the_model_with_torch_alone() -> None:
    """config and presets serve --help, which must answer at once; the model is read and copied by itself."""

    def outside(module: str) -> set[str]:
        nodes = nodes_of(sources()[module])
        absolute = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
        absolute += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        return {name.partition(".")[0] for name in absolute} - set(sys.stdlib_module_names)

    assert outside("config") == outside("settings") == set()
    assert "torch" not in outside("presets")
    assert outside("core.model") == {"torch"}


def test_no_data_is_run_as_code() -> None:
    found = {module: unsafe_calls(module, source) for module, source in sources().items()}
    running = found.pop("presets", [])
    # the decode step is compiled from source that the recorder itself writes: names of torch's operations and numbers
    written = found.pop("generation.recorder", [])
    assert [line.partition(" ")[2] for line in written] == ["exec(...)"]
    assert [line for lines in found.values() for line in lines] == []
    assert len(running) <= 1, f"a preset that the user names is run in one place: {running}"


def test_the_one_hour_path_keeps_its_budget() -> None:
    lengths = {name: len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in ONE_HOUR_PATH}
    assert sum(lengths.values()) <= 2000, lengths


def test_no_file_is_too_long_to_read() -> None:
    """Tests are left out: they are lists of cases."""
    lengths = {name: len(text.splitlines()) for name, text in sources().items()}
    assert [name for name, lines in lengths.items() if lines > 450] == []


# What a reader of the path must see called there, so that the budget cannot be kept by moving it elsewhere.
SEEN = {
    "training.trainer": {
        "train_step": (
            "run.models.train", "backward", "clip_gradients", "run.guard.judge", "learning_rate_at", "step_unless",
        ),
        "train": ("run.evaluate", "run.save", "run.write_sample", "train_step", "run.roll_back", "run.finish"),
    },
}  # fmt: skip


def not_called(source: str, function: str, wanted: tuple[str, ...]) -> list[str]:
    """The names that a function of a module does not call; a method's name stands for any object."""
    calls = [ast.unparse(node.func) for node in ast.walk(body_of(source, function)) if isinstance(node, ast.Call)]
    return [name for name in wanted if not any(call == name or call.endswith("." + name) for call in calls)]


def test_the_one_hour_path_shows_a_whole_step() -> None:
    for module, functions in SEEN.items():
        for function, wanted in functions.items():
            assert not_called(sources()[module], function, wanted) == [], f"{module}.{function}"
    assert not_called("def f(run):\n    run.step()\n    a.b.backward()", "f", ("backward", "save")) == ["save"]


def test_nothing_derives_from_the_trainer_or_patches_torch() -> None:
    for module, source in sources().items():
        if module.startswith(("training", "machine")):
            nodes = nodes_of(source)
            bases = [ast.unparse(b) for node in nodes if isinstance(node, ast.ClassDef) for b in node.bases]
            assert not {"Run", "Trainer"} & set(bases), module
            targets = [ast.unparse(t) for node in nodes if isinstance(node, ast.Assign) for t in node.targets]
            calls = [node for node in nodes if isinstance(node, ast.Call) and dotted(node.func) == "setattr"]
            assert not [t for t in targets if t.startswith("torch.") and not t.startswith("torch.backends.")], module
            assert not [call for call in calls if ast.unparse(call.args[0]).startswith("torch")], module


def test_forward_is_short() -> None:
    """Variants are chosen when the model is built: attention has at most 30 lines and 3 branches, the block none."""
    source = sources()["core.model"]
    attention = body_of(source, "CausalSelfAttention.forward")
    assert attention.end_lineno is not None
    assert attention.end_lineno - attention.lineno + 1 <= 30
    assert branches(attention) <= 3
    assert branches(body_of(source, "Block.forward")) == 0


def test_a_setting_has_one_name() -> None:
    sections = {f.name: getattr(Config(), f.name) for f in dataclasses.fields(Config)}
    assert all(dataclasses.is_dataclass(section) for section in sections.values())
    leaves = [f.name for section in sections.values() for f in dataclasses.fields(section)]
    assert sorted(leaves) == sorted(set(leaves))
    assert not set(leaves) & set(sections), "a leaf and a section share a name"


# --- the checks bite ---


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.model", "from ..training.optimizer import make_adamw"),
        ("core.model", "class GPT:\n    def forward(self):\n        from ..training import optimizer"),
        ("core.model", "class GPT:\n    def from_pretrained(self):\n        from ..training import optimizer"),
        ("core.dataset", "from .. import training"),
        ("training.trainer", "from ..serving.app import make_app"),
        ("training.trainer", "def f():\n    from llm_from_scratch.serving.app import make_app"),
        ("kernels.cpu", "from ..checkpoint.store import find_checkpoint"),
        ("interop.nanogpt", "from ..checkpoint.contents import not_finite"),
        ("machine.device", "if TYPE_CHECKING:\n    from ..core.model import GPT"),
        ("errors", "from . import config"),
        ("generation.generator", "import llm_from_scratch.training.trainer"),
        ("generation.generator", "from ..cli import common"),
        ("generation", "from ..training import scheduler"),
        ("interop.hf", "from ..training import optimizer"),
        ("presets", "from .core import model"),
        ("config", "from . import presets"),
        ("core.model", "import importlib\nimportlib.import_module('llm_from_scratch.interop.hf')"),
        ("utils.things", ""),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert len(wrong_imports(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.model", "class GPT:\n    def from_pretrained(self):\n        from ..interop.hf import load_pretrained"),
        ("checkpoint.store", "from .. import __version__\nfrom . import contents\nfrom ..errors import UserError"),
        ("cli.train", "from ..training import trainer\nfrom .common import run\nimport torch"),
        ("training", "from .trainer import train"),
    ],
)
def test_a_right_import_is_left_alone(module: str, source: str) -> None:
    assert wrong_imports(module, source) == []


def test_an_import_that_holds_a_leaf_is_seen() -> None:
    assert holding_imports("core.model", "from ..serving.app import make_app")
    assert holding_imports("core.model", "try:\n    from ..serving import app\nexcept ImportError:\n    pass")
    assert not holding_imports("core.model", "def f():\n    from ..serving import app")
    assert not holding_imports("core.model", "if TYPE_CHECKING:\n    from ..serving import app")
    assert not holding_imports("serving.app", "from . import answers")


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(code, names)",
        "pickle.load(file)",
        "pickle.loads(data)",
        "pickle.Unpickler(file)",
        "from pickle import load\nload(file)",
        "import pickle as p\np.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "class Reader(pickle.Unpickler):\n    pass",
    ],
)
def test_an_unsafe_call_is_seen(source: str) -> None:
    assert unsafe_calls("core.model", source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "yaml.safe_load(text)",
        "json.load(file)",
        "pickle.dumps(meta)",
        "class Reader(pickle.Unpickler):\n    def find_class(self, module, name):\n        raise ValueError",
    ],
)
def test_a_safe_call_is_left_alone(source: str) -> None:
    assert unsafe_calls("core.model", source) == []
