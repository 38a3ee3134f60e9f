"""The plan of the house, enforced from the syntax tree: who imports whom, what can be deleted, how long the path is.

Each check is a function over source text that returns its findings, so that a test can also show that it bites.
"""

from __future__ import annotations

import ast
import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import llm_from_scratch
from llm_from_scratch.config import Config

PACKAGE = Path(llm_from_scratch.__file__).resolve().parent
NAME = PACKAGE.name

# Which rooms a room may import from, beside itself. The package's __init__ hands out names lazily and is free to.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "presets": {"errors", "config"},
    "machine": {"errors", "config"},
    "core": {"errors", "config", "machine"},
    "kernels": {"errors", "config", "machine", "core"},
    "interop": {"errors", "config", "machine", "core", "checkpoint", "generation"},
    "checkpoint": {"errors", "config", "machine", "core", "interop"},
    "generation": {"errors", "config", "machine", "core", "kernels", "interop", "checkpoint"},
    "training": {"errors", "config", "machine", "core", "kernels", "interop", "checkpoint", "generation"},
    "data": {"errors", "config", "machine", "core", "checkpoint"},
    "serving": {"errors", "config", "machine", "core", "checkpoint", "generation"},
    "cli": {
        *("errors", "config", "presets", "machine", "core", "kernels", "interop", "checkpoint", "data", "training"),
        *("generation", "serving"),
    },
}
# nanoGPT's API has these two methods on the model, so they reach upward, when they are called.
UPWARD = {
    ("core.model", "GPT.from_pretrained", "interop"),
    ("core.model", "GPT.configure_optimizers", "training"),
    ("machine.device", "Runtime.place", "kernels"),
    ("machine.device", "resolve", "kernels"),
}
# What can be deleted while the rest still imports: whole rooms and single files.
LEAVES = ("cli", "data", "serving", "generation.engine")

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


@dataclass(frozen=True)
class Import:
    module: str
    """The importing module, without the package's name: core.model."""
    target: str
    """What is imported, likewise; "" is the package itself."""
    function: str
    """The function or method around the import: GPT.from_pretrained; "" at module level."""
    typing_only: bool
    line: int

    def __str__(self) -> str:
        return (
            f"{self.module}:{self.line} imports {self.target or NAME}{' in ' + self.function if self.function else ''}"
        )


def sources() -> dict[str, str]:
    """{module: source} of everything but the tests; a room's __init__ bears the room's name, the package's is ""."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("tests", "_presets"):
            found[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
    return found


def is_package(module: str) -> bool:
    return (PACKAGE / module.replace(".", "/")).is_dir()


def imports(module: str, source: str) -> Iterator[Import]:
    """Every import of ours in the source, wherever it stands."""

    def targets(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [NAME, *filter(None, module.split("."))]
                up = node.level - 1 if is_package(module) else node.level
                base = ".".join([*here[: len(here) - up], *filter(None, base.split("."))])
            # `from . import name`: the name may be a module or something that the package's __init__ defines
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                path = PACKAGE.parent / inner.replace(".", "/")
                yield inner if path.is_dir() or path.with_suffix(".py").is_file() else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and str(argument.value).startswith((".", NAME)):
                yield NAME + "." + str(argument.value).removeprefix(NAME).lstrip(".")

    def walk(node: ast.AST, scope: tuple[str, ...], in_function: bool, typing_only: bool) -> Iterator[Import]:
        for target in targets(node):
            if target == NAME or target.startswith(NAME + "."):
                function = ".".join(scope) if in_function else ""
                yield Import(module, target[len(NAME) + 1 :], function, typing_only, getattr(node, "lineno", 0))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            scope, in_function = (*scope, node.name), in_function or not isinstance(node, ast.ClassDef)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                yield from walk(statement, scope, in_function, True)
            for statement in node.orelse:
                yield from walk(statement, scope, in_function, typing_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, scope, in_function, typing_only)

    yield from walk(ast.parse(source), (), False, False)


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
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Unpickler") for base in node.bases):
            if "find_class" not in {item.name for item in node.body if isinstance(item, ast.FunctionDef)}:
                found.append(f"{module}:{node.lineno} {node.name} unpickles any class")
        if not isinstance(node, ast.Call):
            continue
        name, last = ast.unparse(node.func), ast.unparse(node.func).rpartition(".")[2]
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
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
    for node in ast.walk(ast.parse(source)):
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
    found: ast.AST = ast.parse(source)
    for part in name.split("."):
        nodes = ast.iter_child_nodes(found)
        found = next(n for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part)
    assert isinstance(found, ast.FunctionDef)
    return found


def branches(function: ast.FunctionDef) -> int:
    kinds = (ast.If, ast.IfExp, ast.For, ast.While, ast.Match)
    return sum(isinstance(node, kinds) for node in ast.walk(function))


# --- the checks on the tree ---


def test_rooms_import_only_what_the_plan_allows() -> None:
    assert [line for module, source in sources().items() for line in wrong_imports(module, source)] == []


def test_nothing_holds_on_to_a_leaf() -> None:
    assert [line for module, source in sources().items() for line in holding_imports(module, source)] == []


def test_the_rest_stands_when_the_leaves_are_deleted(tmp_path: Path) -> None:
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
        nodes = ast.walk(ast.parse(sources()[module]))
        absolute = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
        nodes = ast.walk(ast.parse(sources()[module]))
        absolute += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        return {name.partition(".")[0] for name in absolute} - set(sys.stdlib_module_names)

    assert outside("config") == set()
    assert "torch" not in outside("presets")
    assert outside("core.model") == {"torch"}


def test_no_data_is_run_as_code() -> None:
    found = {module: unsafe_calls(module, source) for module, source in sources().items()}
    running = found.pop("presets", [])
    assert [line for lines in found.values() for line in lines] == []
    assert len(running) <= 1, f"a preset that the user names is run in one place: {running}"


def test_the_one_hour_path_keeps_its_budget() -> None:
    lengths = {name: len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in ONE_HOUR_PATH}
    assert sum(lengths.values()) <= 2000, lengths


def test_forward_stays_the_equation() -> None:
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
        ("training.trainer", "from ..serving import app"),
        ("training.trainer", "def f():\n    from llm_from_scratch.serving.app import run"),
        ("generation.generator", "import llm_from_scratch.training.trainer"),
        ("generation.generator", "from ..cli import common"),
        ("training", "from ..serving import app"),
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
        ("core.checkpoint", "from .. import __version__\nfrom . import tokenizer\nfrom ..config import UserError"),
        ("cli.train", "from ..training import trainer\nfrom .common import run\nimport torch"),
        ("training", "from .trainer import train"),
    ],
)
def test_a_right_import_is_left_alone(module: str, source: str) -> None:
    assert wrong_imports(module, source) == []


def test_an_import_that_holds_a_leaf_is_seen() -> None:
    assert holding_imports("core.model", "from ..data.sources import read")
    assert holding_imports("core.model", "try:\n    from ..data import sources\nexcept ImportError:\n    pass")
    assert not holding_imports("core.model", "def f():\n    from ..interop import hf")
    assert not holding_imports("core.model", "if TYPE_CHECKING:\n    from ..interop import hf")
    assert not holding_imports("interop.hf", "from . import hf_files")


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
