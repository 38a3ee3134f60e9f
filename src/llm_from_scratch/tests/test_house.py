"""Rules that keep the code changeable in one place, read from the syntax tree.

Each rule is a function over {module: source} that returns its findings as lines, so that a test can also show that it
notices a violation.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.config import GATED_ACTIVATIONS, GenerationConfig, GPTConfig, OptimizerConfig, SchedulerConfig
from llm_from_scratch.core.model import ACTIVATIONS, NORMS, POSITIONS
from llm_from_scratch.core.rope import SCALINGS
from llm_from_scratch.generation.sampling import FILTERS
from llm_from_scratch.training.optimizer import OPTIMIZERS
from llm_from_scratch.training.scheduler import SCHEDULES

from .source_code import NAME, PACKAGE, dotted, for_types, imports, nodes_of, sources, tree_of
from .test_architecture import wrong_imports

ROOT = PACKAGE.parents[1]
MOST_LINES = 15_000

# Imports inside functions: packages of the extras, whose absence is reported in one line when they are needed; slow
# ones, which commands that must answer at once do not wait for; and modules that not every system has.
OPTIONAL = {
    *("datasets", "fastapi", "filelock", "fsspec", "gguf", "huggingface_hub", "jinja2", "lm_eval", "matplotlib"),
    "prometheus_client",
    *("pyarrow", "tensorboard", "tiktoken", "tiktoken_ext", "tokenizers", "transformers", "uvicorn", "wandb", "yaml"),
    *("safetensors", "tyro", "rich"),
    *("fcntl", "msvcrt", "pydoc_data", "readline", "resource"),
    *("gigatoken", "optuna"),
    *("aiohttp", "datatrove", "pathspec", "py3langid", "pypdf", "rensa", "resiliparse", "zstandard"),
}
# torch and numpy take seconds; these modules of Python, which checkpoints need, a twentieth of the time of --help
SLOW = {"torch", "numpy", "hashlib", "pickletools"}
# Modules that commands read before they load torch; there, the slow ones and modules of ours that import them may wait.
BEFORE_TORCH = (
    *("", "cli.", "checkpoint.", "core.dataset", "core.resident", "core.tokenfile", "interop.", "machine.processes"),
    "machine.team",
    *("training.setup", "sweep."),
)
# Settings that name files and folders
PATHS = ("out_dir", "dataset", "init_from", "checkpoint", "output", "name", "draft", "watch")
# nanoGPT's API has these methods on the model, and they reach upward.
UPWARD = {("core.model", "interop.hf"), ("core.model", "training.optimizer")}


def line_of(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def names_bound(source: str, of: str) -> set[str]:
    """Names that a source imports from a package: {"torch", "nn", "F"} for torch."""
    names = set()
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] == of}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == of:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def attribute_targets(source: str) -> Iterator[tuple[int, ast.expr, str]]:
    """(line, object, attribute) of everything that sets an attribute: by assignment or by setattr."""
    for node in nodes_of(source):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets = [node.target]
        for target in targets:
            for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                if isinstance(part, ast.Attribute):
                    yield line_of(node), part.value, part.attr
        if isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "object.__setattr__"):
            name = node.args[1]
            yield line_of(node), node.args[0], str(name.value) if isinstance(name, ast.Constant) else ""


# --- the rules ---


def upward_imports(texts: dict[str, str]) -> list[str]:
    """Imports against the order of the rooms."""
    return [line for module, source in texts.items() for line in wrong_imports(module, source)]


def cycles(texts: dict[str, str]) -> list[str]:
    """Files that import each other in a circle. Imports in functions and for types count: each is something that one
    has to read to understand the other. Those of the package's __init__ and of nanoGPT's API do not."""
    edges: dict[str, set[str]] = {}
    for module, source in texts.items():
        targets = {entry.target for entry in imports(module, source)} if module else set()
        edges[module] = {t for t in targets if t in texts and t != module and (module, t) not in UPWARD}
    reached: dict[str, set[str]] = {}
    for module in edges:
        seen, todo = set(), list(edges[module])
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += edges[at]
        reached[module] = seen
    found: list[str] = []
    for module in sorted(edges):
        circle = sorted({module} | {other for other in reached[module] if module in reached[other]})
        if module in reached[module] and circle[0] == module:
            inner = [f"{a} -> {b}" for a in circle for b in sorted(edges[a]) if b in circle]
            found.append(f"{', '.join(circle)} import each other: {'; '.join(inner)}")
    return found


def loads_slow(module: str, texts: dict[str, str]) -> bool:
    """Whether importing a module of ours imports a slow one, by itself or through others."""
    seen, todo = set(), [module]
    while todo:
        at = todo.pop()
        if at in seen or at not in texts:
            continue
        seen.add(at)
        if outside_at_top(texts[at]) & SLOW:
            return True
        todo += [entry.target for entry in imports(at, texts[at]) if not entry.function and not entry.typing_only]
    return False


@functools.cache
def outside_at_top(source: str) -> set[str]:
    """Packages of others that a source imports at module level, not for types alone."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.If) and for_types(node):
            children: list[ast.stmt] = node.orelse
        else:
            children = list(ast.iter_child_nodes(node))  # type: ignore[arg-type]
        for child in children:
            walk(child)

    walk(tree_of(source))
    return found


def hidden_imports(texts: dict[str, str]) -> list[str]:
    """Imports inside functions that are not for an optional package, nor for torch before it is needed."""
    found = []
    for module, source in texts.items():
        early = any(module == name or (name.endswith(".") and module.startswith(name)) for name in BEFORE_TORCH)
        for entry in imports(module, source):
            waits = early and loads_slow(entry.target, texts)
            if entry.function and not waits and (module, entry.target) not in UPWARD:
                found.append(str(entry))
        for function in nodes_of(source):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for node in ast.walk(function):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                for name in {name.split(".")[0] for name in names} - {NAME}:
                    if name not in OPTIONAL and not (name in SLOW and early):
                        found.append(f"{module}:{line_of(node)} imports {name} in {function.name}")
    return list(dict.fromkeys(found))


def forward_assignments(texts: dict[str, str]) -> list[str]:
    """Assignments to an attribute named forward: modules are exchanged by kernels.swap alone."""
    return [
        f"{module}:{line} sets {ast.unparse(owner)}.forward"
        for module, source in texts.items()
        for line, owner, name in attribute_targets(source)
        if name == "forward"
    ]


def changed_namespaces(texts: dict[str, str]) -> list[str]:
    """vars(x) or x.__dict__ that is changed, or asked whether it has a name; reading an object's fields is fine."""

    def is_namespace(node: ast.AST) -> bool:
        called = isinstance(node, ast.Call) and dotted(node.func) == "vars" and bool(node.args)
        return called or (isinstance(node, ast.Attribute) and node.attr == "__dict__")

    found = []
    for module, source in texts.items():
        for node in nodes_of(source):
            if isinstance(node, ast.Subscript) and is_namespace(node.value):
                bad = isinstance(node.ctx, (ast.Store, ast.Del))
            elif isinstance(node, ast.Attribute) and is_namespace(node.value):
                bad = node.attr in ("pop", "update", "setdefault", "clear", "popitem")
            elif isinstance(node, ast.Compare):
                bad = any(isinstance(op, (ast.In, ast.NotIn)) for op in node.ops) and is_namespace(node.comparators[0])
            else:
                bad = False
            if bad:
                found.append(f"{module}:{line_of(node)} {ast.unparse(node)}")
    return found


def patches_of_torch(texts: dict[str, str]) -> list[str]:
    """Attributes of torch that are set, or of something taken from it in a loop; its switches are free to set."""
    found = []
    for module, source in texts.items():
        names = names_bound(source, "torch")
        for node in nodes_of(source) if "getattr(" in source else ():  # x = torch.optim...: x is torch's as well
            if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Attribute, ast.Call)):
                text = ast.unparse(node.value)
                if text.startswith("getattr(torch.") or text.startswith("getattr(getattr(torch."):
                    names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for line, owner, name in attribute_targets(source):
            text = owner.id if isinstance(owner, ast.Name) else ast.unparse(owner)
            if re.split(r"\W", text)[0] in names and not re.search(r"\b(backends|config)\b", text):
                found.append(f"{module}:{line} sets {text}.{name or '...'}")
    return found


def private_names(source: str) -> set[str]:
    """Names with one underscore that a source defines: functions, classes, variables, attributes."""
    found = set()
    for node in nodes_of(source):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__") and name != "_"}


def foreign_private_names(texts: dict[str, str]) -> list[str]:
    """Uses of a _name outside the file that defines it: attributes, imports, and setattr by a string."""
    defined = {module: private_names(source) for module, source in texts.items()}
    everywhere = set().union(*defined.values())
    found = []
    for module, source in texts.items():
        foreign = everywhere - defined[module]
        ours = names_of_ours(source)
        for node in nodes_of(source):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                # in module._name the module is another file, even where this one has the same name
                outside = isinstance(node.value, ast.Name) and node.value.id in ours
                names = [node.attr] if node.attr in (everywhere if outside else foreign) else []
            elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(NAME)):
                names = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name[:2] != "__"]
            elif isinstance(node, ast.Call) and dotted(node.func).endswith("setattr") and len(node.args) > 1:
                text = node.args[1] if isinstance(node.args[1], ast.Constant) else node.args[0]
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    names = [name for name in [text.value.rpartition(".")[2]] if name in foreign]
            found += [f"{module}:{line_of(node)} uses {name}" for name in names]
    return found


def names_of_ours(source: str) -> set[str]:
    """Names under which a source imports modules or names of ours."""
    found = set()
    for node in nodes_of(source):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == NAME):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def is_exception(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)


def stray_exceptions(texts: dict[str, str]) -> list[str]:
    """Exception classes outside errors.py."""
    return [
        f"{module}:{line_of(node)} class {node.name}"
        for module, source in texts.items()
        if module != "errors"
        for node in nodes_of(source)
        if isinstance(node, ast.ClassDef) and is_exception(node)
    ]


def missing_steps(trainer: str, generator: str) -> list[str]:
    """What a reader of the one-hour path must meet in trainer.py and generator.py, and does not."""
    wanted = {
        "trainer.py: train_step": (trainer, r"def train_step\("),
        "trainer.py: train": (trainer, r"def train\("),
        "trainer.py: the backward pass": (trainer, r".*\.backward\("),
        "trainer.py: clipping": (trainer, r"clip_gradients\("),
        "trainer.py: the guard's verdict": (trainer, r"run\.guard\.judge\("),
        "trainer.py: the optimizer's step": (trainer, r"step_unless\(.*\boptimizer\)"),
        "trainer.py: evaluation": (trainer, r"(\w+\.)*evaluate\w*\("),
        "trainer.py: saving": (trainer, r"(\w+\.)*save\w*\("),
        "generator.py: the model's call": (generator, r"(\w+\.)*model\(.*\bcache="),
        "generator.py: the draw of the next token": (generator, r"(\w+\.)*draw\("),
    }
    seen = {source: calls_and_functions(source) for source in (trainer, generator)}
    return [
        what for what, (source, pattern) in wanted.items() if not any(re.match(pattern, text) for text in seen[source])
    ]


def calls_and_functions(source: str) -> list[str]:
    """Every call and every public function of a module as text: "run.save(x)", "def train("."""
    tree = tree_of(source)
    names = [f"def {node.name}(" for node in tree.body if isinstance(node, ast.FunctionDef)]
    return names + [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def hidden_steps(texts: dict[str, str]) -> list[str]:
    return missing_steps(texts["training.trainer"], texts["generation.generator"])


def unquoted_paths(texts: dict[str, str]) -> list[str]:
    """Paths in the commands of messages: every word of a command goes through shlex, so that it can be pasted."""
    found = []
    for module, source in texts.items():
        for text in (node for node in nodes_of(source) if isinstance(node, ast.JoinedStr)):
            for before, value in itertools.pairwise(text.values):
                option = re.search(rf"\s--({'|'.join(PATHS)})=$", str(getattr(before, "value", "")))
                if option and isinstance(value, ast.FormattedValue):
                    found.append(f"{module}:{line_of(value)}: {option[0].strip()}")
    return found


def too_many_lines(texts: dict[str, str]) -> list[str]:
    """The Python lines of the package without its tests, if they are more than MOST_LINES."""
    lines = sum(len(source.splitlines()) for source in texts.values())
    return [f"{lines} lines, at most {MOST_LINES}"] if lines > MOST_LINES else []


RULES = {
    "upward_imports": upward_imports,
    "cycles": cycles,
    "hidden_imports": hidden_imports,
    "forward_assignments": forward_assignments,
    "changed_namespaces": changed_namespaces,
    "patches_of_torch": patches_of_torch,
    "foreign_private_names": foreign_private_names,
    "stray_exceptions": stray_exceptions,
    "hidden_steps": hidden_steps,
    "unquoted_paths": unquoted_paths,
    "too_many_lines": too_many_lines,
}


# The rules that the whole code keeps. `python -m llm_from_scratch.tests.test_house` lists what breaks the others.
HELD = tuple(rule for rule in RULES if rule != "too_many_lines")

# --- on this code ---


def all_texts() -> dict[str, str]:
    """The package with its tests, and the benchmarks and scripts of a checkout."""
    texts = dict(sources())
    for path in sorted((PACKAGE / "tests").rglob("*.py")):
        texts[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("benchmarks/*.py")), *sorted(ROOT.glob("scripts/*.py"))]:
        texts[f"{path.parent.name}/{path.stem}"] = path.read_text(encoding="utf-8")
    return texts


@pytest.mark.parametrize("rule", HELD)
def test_the_code_keeps_the_rule(rule: str) -> None:
    texts = all_texts() if rule == "foreign_private_names" else sources()
    assert RULES[rule](texts) == []


@pytest.mark.parametrize(
    ("settings", "name", "table"),
    [
        (GPTConfig, "activation", ACTIVATIONS),
        (GPTConfig, "pos_embedding", POSITIONS),
        (GPTConfig, "norm", NORMS),
        (GPTConfig, "rope_scaling", SCALINGS),
        (OptimizerConfig, "optimizer_type", OPTIMIZERS),
        (SchedulerConfig, "schedule", SCHEDULES),
    ],
)
def test_a_table_has_the_choices_of_its_setting(settings: type, name: str, table: dict[str, Any]) -> None:
    assert set(typing.get_args(typing.get_type_hints(settings)[name])) == set(table)


def test_a_gated_activation_is_an_activation() -> None:
    assert set(GATED_ACTIVATIONS) <= set(ACTIVATIONS)


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_reads_the_setting_that_it_is_named_after(name: str) -> None:
    read: set[str] = set()

    class Noted(GenerationConfig):
        def __getattribute__(self, attribute: str) -> Any:
            read.add(attribute)
            return super().__getattribute__(attribute)

    FILTERS[name](torch.zeros(1, 3), Noted())
    assert name in read and name in {field.name for field in dataclasses.fields(GenerationConfig)}


def missing_parts(guide: str, package: Path = PACKAGE, root: Path = ROOT) -> list[str]:
    """Tables, files and folders that the rows of CONTRIBUTING's table name and that do not exist."""
    rows = re.findall(r"^\| an? .*\|$", guide, re.MULTILINE)
    found = [] if rows else ["no rows"]
    for row in rows:
        where = row.split("|")[2]
        paths = [name for name in re.findall(r"`([^`]+)`", where) if not re.fullmatch(r"[A-Z_]+", name)]
        found += [path for path in paths if not (package / path).exists() and not (root / path).exists()]
        for table, path in re.findall(r"`([A-Z_]+)` in `([^`]+)`", where):
            text = (package / path).read_text(encoding="utf-8") if (package / path).is_file() else ""
            if not re.search(rf"^{table}\b.* = ", text, re.MULTILINE):
                found.append(f"{table} in {path}")
    return found


def test_the_guide_to_adding_a_part_names_existing_files(tmp_path: Path) -> None:
    guide = ROOT / "CONTRIBUTING.md"
    if not guide.is_file():
        pytest.skip("not a checkout")
    text = guide.read_text(encoding="utf-8")
    assert missing_parts(text) == []
    for name in ("ACTIVATIONS", "POSITIONS", "OPTIMIZERS", "SCHEDULES"):
        assert f"`{name}` in `" in text
    (tmp_path / "model.py").write_text("TABLE: dict = {}\n# OTHER is gone\n")
    row = "| a thing | `TABLE` in `model.py`, `OTHER` in `model.py`, `gone.py` |"
    assert missing_parts(row, tmp_path, tmp_path) == ["gone.py", "OTHER in model.py"]


# Tests that cover several modules of their room together.
ABOUT_SEVERAL = {
    "training": {"compile", "distributed", "documents", "faults", "gpu_step", "mixtures", "toys", "edited_models"},
    "serving": {"chat", "life"},
    "generation": {"edited_models"},
    "kernels": {"dropout", "edited_models"},
}


def strangers(folder: Path, package: Path = PACKAGE) -> list[str]:
    """Test files in a room's folder that name no module of the room."""
    found = []
    for path in sorted(folder.glob("*/test_*.py")):
        room, name = path.parent.name, path.stem.removeprefix("test_")
        is_room = (package / room).is_dir() and room != "tests"
        named = (package / room / f"{name}.py").is_file() or name in ABOUT_SEVERAL.get(room, ())
        if is_room and not named:
            found.append(f"{room}/{path.name}")
    return found


def test_tests_mirror_the_rooms(tmp_path: Path) -> None:
    assert strangers(PACKAGE / "tests") == []
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "test_nothing.py").touch()
    (tmp_path / "core" / "test_model.py").touch()
    assert strangers(tmp_path) == ["core/test_nothing.py"]


# --- the rules bite ---

VIOLATIONS = {
    "upward_imports": {"core.model": "from ..serving import app", "machine.device": "from ..core import model"},
    "cycles": {"core.model": "from . import cache", "core.cache": "def f():\n    from .model import x"},
    "hidden_imports": {
        "core.model": "def f():\n    from . import cache\n    import torch",
        "core.cache": "import torch",
    },
    "forward_assignments": {"core.model": "layer.forward = f\nsetattr(layer, 'forward', f)"},
    "changed_namespaces": {"core.model": "vars(m).pop('x')\nvars(m)['x'] = 1\ndel vars(m)['x']\n'x' in vars(m)"},
    "patches_of_torch": {"core.model": "import torch\nfrom torch import nn\ntorch.load = f\nnn.Linear.forward = f"},
    "foreign_private_names": {
        "core.cache": "_x = 1",
        "core.model": "from . import cache\ncache._x\nfrom .cache import _x\n_x = 2\ncache._x",
    },
    "stray_exceptions": {"core.model": "class Bad(ValueError): ..."},
    "hidden_steps": {
        "training.trainer": '"""step_unless(skip, optimizer)"""  # loss.backward()',
        "generation.generator": "def draw(logits): ...\nbatch.logits()",
    },
    "unquoted_paths": {"core.model": "f'resume with: llm-train --out_dir={folder} --dataset={name}'"},
    "too_many_lines": {"core.model": "x = 1\n" * (MOST_LINES + 1)},
}
FOUND = dict(zip(VIOLATIONS, (2, 1, 2, 2, 4, 2, 3, 1, 10, 2, 1), strict=True))
KEPT = {
    "upward_imports": {"core.model": "from ..machine import device"},
    "cycles": {"core.model": "from . import cache", "core.cache": "from . import sizes", "core.sizes": "x = 1"},
    "hidden_imports": {
        "cli.train": "def f():\n    import torch\n    from ..core import model\n    import wandb",
        "core.model": "import torch",
    },
    "forward_assignments": {"core.model": "class A:\n    def forward(self): ...\nx = a.forward"},
    "changed_namespaces": {"core.model": "vars(config)\nprint({**vars(config)}, vars(config)['x'])"},
    "patches_of_torch": {
        "core.model": "import torch\ntorch.backends.cudnn.benchmark = True\nx = torch.ones(1)\nx.y = 2"
    },
    "foreign_private_names": {
        "core.model": "class A:\n    def _f(self): self._g = 1\nA()._f()",
        "core.cache": "x._asdict()",
    },
    "stray_exceptions": {"errors": "class Bad(ValueError): ...", "core.model": "class Good(list): ..."},
    "hidden_steps": {
        "training.trainer": """
def train_step(run, x, y):
    loss.backward(); clip_gradients(model); skip = run.guard.judge(loss); step_unless(skip, run.optimizer)

def train(config):
    evaluate(run); save(run)
""",
        "generation.generator": "logits, _ = self.model(idx, cache=cache)\nids = sampler.draw(logits)",
    },
    "unquoted_paths": {"core.model": "f'try --top_k={k}: {shlex.join([f\"--out_dir={folder}\"])} --dataset=NAME'"},
    "too_many_lines": {"core.model": "x = 1\n" * MOST_LINES},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_violation_is_seen_and_the_rest_left_alone(rule: str) -> None:
    assert len(RULES[rule](VIOLATIONS[rule])) == FOUND[rule]
    assert RULES[rule](KEPT[rule]) == []


if __name__ == "__main__":  # prints the violations of today, a rule at a time
    for title, check in RULES.items():
        lines = check(all_texts() if title == "foreign_private_names" else sources())
        print(f"\n{title}: {len(lines)}", *lines, sep="\n  ")
