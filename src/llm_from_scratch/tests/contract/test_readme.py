"""The documentation: every command in its `sh` blocks runs, and every setting, path and link in it exists.

Commands run in order in a copy of the checkout, Python commands in this process: each document is one user who types
every command. Settings are appended to make the runs small. There is no network: texts are in place, and the hub's
weights are tiny and random. Commands that are not run are listed with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from llm_from_scratch.config import Config, GPTConfig
from llm_from_scratch.machine.extras import is_installed
from llm_from_scratch.presets import parse
from llm_from_scratch.settings import leaf_types

from ..forked import Forked, forks, rendezvous

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents lie in a checkout")

# Documents without commands of their own
READ_ONLY = (
    "CLAUDE.md",
    "GEMINI.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/README.md",
    "docs/LOG.md",
    "benchmarks/RESULTS.md",
)
DOCUMENTS = ("README.md", "AGENTS.md", "CONTRIBUTING.md") + tuple(
    sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if f"docs/{path.name}" not in READ_ONLY)
)
COPIED = ("assets", "config", "configs", "data", "launch", "scripts", "*.py", "*.toml", "*.txt", "*.md", "LICENSE",
          "just*")  # fmt: skip

QUICK = ("AGENTS.md", "CONTRIBUTING.md")  # documents of few commands

# What is not run by default: (pattern, mark, reason). What has a mark is run by the test below of that mark.
NOT_RUN = [
    (r"pip install", "network", "installs packages"),
    (r"-m venv ", "network", "the step before pip install"),
    (r"^python data/openwebtext/prepare\.py", "", "downloads and encodes 8 million documents"),
    (r"--nproc_per_node=8", "gpu", "one process per GPU"),
    (r"--device=cuda", "gpu", "needs a GPU"),
    (
        r"^\./just (test|test-all|test-cov|pre-commit|lint|format)\b",
        "",
        "this suite and its tools",
    ),
    (r"^\./just storm", "", "45 minutes; the suite runs a part of it"),
    (r"^\./just (setup|install-dev|docs)", "network", "installs packages"),
    (r"^(llm-serve|\./just serve) ", "", "runs until it is stopped: test_llm_serve.py starts it"),
    (r"assets/pictures\.py", "", "a demo of minutes in a terminal; its parts are tested below"),
    (r"assets/page\.py", "", "pictures of the page, which test_page.py tests"),
    (r"scripts/run_notebook\.py", "", "writes into the checkout; test_notebook.py runs the notebook"),
    (r"^\. \.venv/bin/activate", "", "changes the shell"),
    *([] if is_installed("datatrove") else [(r"^llm-prepare .* --executor=", "", "needs the extra cluster")]),
    *([] if is_installed("optuna") else [(r"^llm-(sweep|scale) ", "", "needs the extra sweep")]),
]


@dataclass(frozen=True)
class Command:
    document: str
    line: int
    text: str

    @property
    def reason(self) -> tuple[str, str] | None:
        """(mark, reason) if it is not run."""
        return next(((mark, why) for pattern, mark, why in NOT_RUN if re.search(pattern, self.text)), None)

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"


def blocks(document: str, language: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of the fenced blocks of one language."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n") + 1, match.group(1)


def commands(document: str) -> list[Command]:
    found = []
    for first, block in blocks(document, "sh"):  # a comment explains a line, and the shell ignores it
        for number, line in enumerate(block.splitlines()):
            if line.strip() and not line.startswith("#"):
                found.append(Command(document, first + number, line))
    return found


ALL = [command for document in DOCUMENTS if (ROOT / document).is_file() for command in commands(document)]

# --- the copy of the checkout


def text() -> str:
    """12,000 characters of tiny Shakespeare, or of what Python carries."""
    folder = os.environ.get("LLM_TEST_DATA_DIR")
    if folder and (path := Path(folder) / "tinyshakespeare.txt").is_file():
        return path.read_text(encoding="utf-8")[:12_000]
    from pydoc_data import topics

    prompts = "ROMEO: Once upon a time. The end.\n"  # every character of the documents' prompts
    return (prompts + "\n".join(topics.topics[key] for key in sorted(topics.topics)))[:12_000]


def copy_checkout(folder: Path) -> Path:
    """The checkout without runs, data and environments, in a folder whose name has a space."""
    copy = folder / "my checkout"
    copy.mkdir()
    made = ("__pycache__", "*.bin", "*.pkl", "input.txt", "processed", "cache", "raw", "manifest.json")
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns(*made))
            else:
                shutil.copy(path, copy)
    (copy / "src").symlink_to(ROOT / "src", target_is_directory=True)
    raw = copy / "data" / "raw" / "tinyshakespeare.txt"
    raw.parent.mkdir()
    for place in (
        raw,
        copy / "book.txt",
        *(copy / "data" / n / "input.txt" for n in ("shakespeare", "shakespeare_char")),
    ):
        place.write_text(text(), encoding="utf-8")
    (copy / "prompt.txt").write_text("the ", encoding="utf-8")
    talk = [{"prompt": f"{n}?", "completion": "You are brief."} for n in range(30)]
    (copy / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk), encoding="utf-8")
    sums = [f"{a:02}+{b:02}={str(f'{a + b:03}')[::-1]}\n" for a in range(20) for b in range(20)]
    (copy / "sums.txt").write_text("".join(sums), encoding="utf-8")
    ids = np.random.default_rng(0).integers(0, 50257, size=3000).astype("<u2")
    for split, count in (("train", 3000), ("val", 300)):
        ids[:count].tofile(copy / "data" / "openwebtext" / f"{split}.bin")
    return copy


def tiny_gpt2(name: str) -> tuple[GPTConfig, dict[str, Any], Any]:
    """In place of the hub's weights: GPT-2's vocabulary, a width of 8."""
    import torch

    from llm_from_scratch.core.model import GPT
    from llm_from_scratch.core.tokenizer import Tokenizer

    assert name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    config = GPTConfig(block_size=64, vocab_size=50257, n_layer=1, n_head=1, n_embd=8, activation="gelu_tanh")
    with torch.random.fork_rng(devices=[]):
        return config, GPT(config).state_dict(), Tokenizer.from_name("gpt2")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    connect = socket.socket.connect

    def no_network(self: socket.socket, *args: Any) -> None:
        if self.family != socket.AF_UNIX:
            raise OSError("the test has no network")
        connect(self, *args)

    copy = copy_checkout(tmp_path)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("llm_from_scratch.interop.hf.load_pretrained", tiny_gpt2)
    monkeypatch.setattr("llm_from_scratch.cli.demo.call", call_in_process)
    monkeypatch.setattr("llm_from_scratch.sweep.worker.subprocess", forks([]))
    yield copy


# --- running a command


def train_sizes(words: list[str]) -> list[str]:
    """Settings that end a training run in a moment, whatever it was going to be."""
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    init_from = start_of(words)
    sizes = ["--eval_interval=2", "--eval_iters=1", "--batch_size=2", "--gradient_accumulation_steps=2"]
    sizes += ["--loss_plot=False", "--wandb_log=False"]  # W&B is on the network
    # a resumed run must have steps left
    sizes += ["--epochs=0.01"] if "epochs" in given else [f"--max_iters={4 if init_from == 'resume' else 2}"]
    if init_from == "scratch":
        sizes += ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=64"]
    elif init_from != "resume":
        sizes += ["--block_size=64"]
    return sizes


def many_runs_sizes(words: list[str]) -> list[str]:
    """Settings for a sweep or a ladder of a few tiny runs."""
    short = train_sizes(words)
    if any(word.startswith("--budget") for word in words):
        short = [word for word in short if not word.startswith("--max_iters")]
    if any(word.startswith("--over") for word in words):
        return [*short, "--trials=2", *(["--budget_each=512tokens"] if "--budget_each" in " ".join(words) else [])]
    return [*short, "--sizes=16,32", "--budgets=512tokens,1024tokens,2048tokens"]


def start_of(words: list[str]) -> str:
    """init_from, of the command line or the presets."""
    found = "scratch"
    for word in words:
        if word.startswith("--init_from="):
            return word.partition("=")[2]
        for path in (Path(word), Path("configs") / f"{word}.yaml", Path("config") / f"{word}.py"):
            if path.suffix in (".yaml", ".py") and path.is_file():
                said = re.search(r"^ *init_from *[:=] *[\"']?([\w.-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
                found = said[1] if said else found
    return found


SAMPLE_SIZES = ["--num_samples=1", "--max_new_tokens=8"]
BENCH_SIZES = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--burnin_steps=1", "--steps=2"]
SIZES: dict[str, Callable[[list[str]], list[str]]] = {
    "train": train_sizes,
    "demo": train_sizes,
    "sample": lambda words: SAMPLE_SIZES,
    "generate": lambda words: SAMPLE_SIZES,
    "chat": lambda words: ["--max_new_tokens=8"],
    "bench": lambda words: BENCH_SIZES,
    "sweep": many_runs_sizes,
    "scale": many_runs_sizes,
}


def console_scripts() -> dict[str, str]:
    """Command -> the module in cli/ behind it."""
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # by hand: tomllib is younger than Python 3.10
    return dict(re.findall(r'^(llm-\w+) = "llm_from_scratch\.cli\.(\w+):main"$', declared, re.MULTILINE))


def call_in_process(module: str, *args: str) -> int:
    """A command of the package by the name of its module in cli/; its exit code."""
    sys.argv = [module, *args]
    return importlib.import_module(f"llm_from_scratch.cli.{module}").main() or 0


def run_words(words: list[str]) -> int:
    """Runs what a shell would run, smaller. Returns the exit code."""
    program, args = words[0], words[1:]
    if program == "./just":
        return run_words(recipe(args[0], args[1:]))
    if program in console_scripts():
        return call_shortened(console_scripts()[program], args)
    if program == "torchrun":
        return torchrun(args)
    if program == "git":
        return clone(args)
    assert program in ("python", ".venv/bin/python"), f"no rule to run {program}: add one here, or a reason to NOT_RUN"
    if args[0] == "-m":
        return call_shortened(args[1].removeprefix("llm_from_scratch.cli."), args[2:])
    name = Path(args[0]).stem
    sys.argv = [args[0], *args[1:], *(SIZES[name](args[1:]) if name in SIZES else [])]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(args[0], run_name="__main__")
    return int(ended.value.code or 0)


def clone(args: list[str]) -> int:
    """`git clone ADDRESS FOLDER && cd FOLDER` with this checkout's address. The reader stays in the copy."""
    command, address, folder, *then = args
    assert (command, address, then) == ("clone", "ADDRESS", ["&&", "cd", folder])
    code = subprocess.call(["git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", folder])
    assert code or (Path(folder) / "just").is_file()
    return code


def call_shortened(module: str, args: list[str]) -> int:
    if "--interactive" in args or module == "chat":
        sys.stdin = io.TextIOWrapper(io.BytesIO(b"the \n"), encoding="utf-8")
    return call_in_process(module, *args, *(SIZES[module](args) if module in SIZES else []))


def recipe(name: str, args: list[str]) -> list[str]:
    """The command that a recipe of the justfile ends in, as words."""
    justfile = (ROOT / "justfile").read_text(encoding="utf-8")
    found = re.search(rf"^{name}( [A-Z*]+)*:.*\n((?:    .*\n)+)", justfile, re.MULTILINE)
    assert found, f"the justfile has no recipe {name}"
    line = found.group(2).strip().splitlines()[-1].strip().lstrip("@").rpartition("exec ")[2]
    line = line.replace("{{ bin }}/", "").replace("{{ python }}", "python")
    words = []
    for word in shlex.split(line):
        if word == "$@":
            words += args[1:] if "{{ first }}" in found.group(2) else args
        else:
            words.append(word.replace("$first", args[0] if args else ""))
    return [word for word in words if word]


def torchrun(args: list[str], forks: bool = True) -> int:
    """forks: the processes are forked, which is faster than torchrun; its own options are left out."""
    own = list(itertools.takewhile(lambda word: word.startswith("--"), args))
    script = args[len(own) :]
    script += train_sizes(script[2:] if script[0] == "-m" else script[1:])
    if forks:
        count = int(own[own.index("--standalone") + 1].removeprefix("--nproc_per_node="))
        return processes(count, script[1:] if script[0] == "-m" else script)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *own, *script]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    # torchrun's own report would hide what the script said
    print(*(line for line in ended.stderr.splitlines() if "rror" in line), sep="\n")
    return ended.returncode


def processes(count: int, script: list[str]) -> int:
    """Starts processes with torchrun's variables. Returns the first exit code that is not 0, else 0."""
    with rendezvous(count) as shared, contextlib.ExitStack() as running, open("errors.txt", "w+") as errors:
        ranks = [
            running.enter_context(
                Forked(*script, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                       stdout=subprocess.DEVNULL, stderr=errors, imports=("torch._dynamo",))  # which DDP imports
            )
            for rank in range(count)
        ]  # fmt: skip
        for rank in ranks:
            running.callback(rank.kill)  # if another one hangs
        codes = [rank.wait(240) for rank in ranks]
        errors.seek(0)
        print(errors.read())
    return next(filter(None, codes), 0)


def failure_of(command: Command) -> str | None:
    """Runs a command; what was wrong with it, or None."""
    words = shlex.split(command.text, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    before, output = (sys.argv, sys.stdin), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = run_words(words)
        return f"{command}\n  exit code {code}: {output.getvalue()[-600:]}" if code else None
    except (Exception, SystemExit) as error:
        return f"{command}\n  {type(error).__name__}: {error} {output.getvalue()[-600:]}"
    finally:
        sys.argv, sys.stdin = before


@pytest.mark.parametrize(
    "document",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in DOCUMENTS],
)
def test_commands_run(document: str, checkout: Path) -> None:
    if document not in (
        "README.md",
        "docs/START.md",
    ):  # the other documents' readers have prepared what the README begins with
        run_words(shlex.split("python data/shakespeare_char/prepare.py"))
    wrong = [failure for command in commands(document) if not command.reason and (failure := failure_of(command))]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
def test_python_blocks_run(checkout: Path, tmp_path: Path) -> None:
    assert not failure_of(Command("", 0, "llm-prepare book.txt --tokenizer=char --name=book-bpe"))
    found = [(document, *block) for document in DOCUMENTS for block in blocks(document, "python")]
    assert found
    for document, line, source in found:
        script = tmp_path / f"{Path(document).stem}-{line}.py"
        smaller = source.replace("max_iters=200", ", ".join(word[2:] for word in train_sizes([])))
        sizes = "max_iters, config.training.eval_iters, config.model.n_embd = 1, 2, 1, 32"
        smaller = smaller.replace("max_iters = 2, 20", sizes)
        assert smaller != source or "train(" not in source, "an example that trains for long: shorten it here"
        script.write_text(smaller, encoding="utf-8")
        runpy.run_path(str(script))


@pytest.mark.slow
def test_torchrun_commands_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchrun itself."""
    monkeypatch.setattr(sys.modules[__name__], "torchrun", functools.partial(torchrun, forks=False))
    run_words(shlex.split("python data/shakespeare_char/prepare.py"))
    found = [command for command in ALL if command.text.startswith("torchrun") and not command.reason]
    assert found and not [failure for command in found if (failure := failure_of(command))]


@pytest.mark.gpu
@pytest.mark.parametrize("command", [c for c in ALL if c.reason and c.reason[0] == "gpu"], ids=str)
def test_gpu_commands_run(command: Command, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one GPU, and one machine of as many."""
    monkeypatch.setattr(sys.modules[__name__], "torchrun", functools.partial(torchrun, forks=False))
    here = re.sub(r"--nnodes=\d+ --node_rank=\d+", "--nnodes=1 --node_rank=0", command.text)
    here = here.replace("--nproc_per_node=8", "--nproc_per_node=1").replace("10.0.0.1", "127.0.0.1")
    failure = failure_of(Command(command.document, command.line, here))
    assert failure is None, failure


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_network_commands_run(document: str, tmp_path: Path) -> None:
    """What installs packages, in a shell and an environment of its own."""
    copy = copy_checkout(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", ".venv"], cwd=copy, check=True)
    for command in commands(document):
        if command.reason and command.reason[0] == "network":
            ended = subprocess.run(command.text, shell=True, cwd=copy, capture_output=True, text=True)
            assert ended.returncode == 0, f"{command}\n{ended.stderr[-2000:]}"


# --- what is said about commands that are not run, and about settings, paths and links


def test_every_reason_is_needed() -> None:
    for pattern, _, why in NOT_RUN:
        assert any(re.search(pattern, command.text) for command in ALL), f"nothing is left out for: {why}"


@pytest.mark.parametrize("command", [c for c in ALL if c.reason], ids=str)
def test_commands_that_are_not_run_are_well_formed(command: Command) -> None:
    words = shlex.split(command.text, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    for word in words:
        if word.endswith((".py", ".txt")):
            assert (ROOT / word).is_file(), word
    if words[0] == "torchrun":
        script = [i for i, word in enumerate(words) if word in ("train.py", "llm_from_scratch.cli.train")][0]
        parse(Config, words[script + 1 :], prog="test").tree.validate()
    if words[0] == "llm-serve":
        from llm_from_scratch.cli.serve import ServeCommand

        parse(ServeCommand, words[1:], prog="test")


def known_settings() -> set[str]:
    from llm_from_scratch.cli.bench import BenchCommand
    from llm_from_scratch.cli.chat import ALIASES, ChatOptions
    from llm_from_scratch.cli.evaluate import EvalCommand
    from llm_from_scratch.cli.export import Export
    from llm_from_scratch.cli.generate import GenerateCommand
    from llm_from_scratch.cli.inspect_data import InspectOptions
    from llm_from_scratch.cli.prepare_data import PrepareOptions
    from llm_from_scratch.cli.scale import ScaleOptions
    from llm_from_scratch.cli.serve import ServeCommand
    from llm_from_scratch.cli.sweep import SweepOptions
    from llm_from_scratch.cli.train import OWN_FLAGS, OWN_VALUES

    trees = (
        Config, BenchCommand, EvalCommand, Export, GenerateCommand, PrepareOptions, ScaleOptions, ServeCommand,
        SweepOptions, ChatOptions, InspectOptions,
    )  # fmt: skip
    return {leaf for tree in trees for leaf in leaf_types(tree)} | {*OWN_FLAGS, *OWN_VALUES, *ALIASES}


# Options that are not ours: torchrun's (of `--max-restarts`, the first word), Slurm's (of `--ntasks-per-node`) and
# `launch/submit.py`'s; those of `./just clean-all`, of `./just storm`, of every command and of the benchmarks; vLLM's
# `--served-model-name`; the harness's
OTHER_OPTIONS = {
    "standalone", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "rdzv_id", "rdzv_backend",
    "rdzv_endpoint", "nodes", "ntasks", "gpus", "time", "signal", "requeue", "open", "yes", "prove", "share", "help",
    "served", "version", "completion", "cases", "model", "model_args", "include_path", "array", "max", "hours",
}  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_exist(document: str) -> None:
    known = known_settings() | OTHER_OPTIONS
    named = re.findall(r"(?<![\w-])--([a-z]\w*)", (ROOT / document).read_text(encoding="utf-8"))
    assert not [name for name in named if name not in known]


@pytest.mark.parametrize("document", [*DOCUMENTS, *READ_ONLY])
def test_paths_and_links_exist(document: str) -> None:
    content = (ROOT / document).read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", content):
        target = (ROOT / document).parent / link if link else ROOT / document
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor
    bases = (ROOT, ROOT / "src" / "llm_from_scratch")
    for path in re.findall(r"`([\w./-]+\.(?:py|yaml|toml|ipynb)|[\w./-]+/)`", content):
        assert any((base / path).exists() for base in bases) or path in MADE_BY_RUNS, path


# Files and folders that the commands make
MADE_BY_RUNS = {
    "data/processed/",
    "data/processed/NAME/",
    "data/raw/",
    "data/cache/",
    "out_dir/step-N/",
    "trial-N/",
    "seed-S/",
    "settings.yaml",
    "out_dir/step-00000250/",
    "out_dir/previous-ID/",
    "tensorboard/",
}


def file_map(text: str) -> set[str]:
    """The files named by the README's map of `src/llm_from_scratch/`."""
    block = text.partition("## File map\n")[2].partition("```text\n")[2].partition("```")[0]
    files, room = set(), ""
    for line in block.splitlines():
        name, _, holds = line.strip().partition(" ")
        assert holds.strip(), f"the map does not say what {name} holds"
        if name.endswith("/"):
            room = name
        else:
            files.add((room if line.startswith(" ") else "") + name.rstrip("*"))
    return files


def test_the_map_names_every_file_and_no_other() -> None:
    package = ROOT / "src" / "llm_from_scratch"
    paths = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
    outside = ("tests", "__pycache__", "_presets")
    files = {p.as_posix() for p in paths if not set(p.parts) & set(outside) and p.name != "__init__.py"}
    mapped = file_map((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(files - mapped) == [], "files that README.md does not map"
    assert sorted(mapped - files) == [], "files of README.md's map that do not exist"


def test_assistants_are_sent_to_the_guidelines() -> None:
    assert len((ROOT / "AGENTS.md").read_text(encoding="utf-8").splitlines()) < 80
    for name in ("CLAUDE.md", "GEMINI.md"):
        assert (ROOT / name).read_text(encoding="utf-8") == "Read [AGENTS.md](AGENTS.md).\n"


def test_the_index_names_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#]+)\)", index)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(named)
    assert "../benchmarks/RESULTS.md" in named


@pytest.mark.slow
def test_the_site_is_built_without_a_broken_link(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", f"--site-dir={site}"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert ended.returncode == 0, ended.stderr
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    documents = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} - {"README.html"}
    assert documents | {"index.html", "project/index.html", "project/CONTRIBUTING.html"} <= pages
    assert "../TRAIN.html" in (site / "project" / "index.html").read_text(encoding="utf-8")
    api = (site / "API.html").read_text(encoding="utf-8")
    assert 'id="llm_from_scratch.presets.preset"' in api and ":::" not in api  # the docstrings


def test_presets_are_named_by_task() -> None:
    for path in set((ROOT / "config").glob("*.py")) - {ROOT / "config" / "nanogpt.py"}:  # the defaults of the others
        assert path.stem.startswith(("train_", "finetune_", "eval_")), path.name


def test_recipes_exist() -> None:
    for document in DOCUMENTS:
        for name in re.findall(r"\./just ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8")):
            assert re.search(
                rf"^{name}( [A-Z*]+)*:", (ROOT / "justfile").read_text(encoding="utf-8"), re.MULTILINE
            ), name


@pytest.mark.skipif(os.name == "nt", reason="pty is not there")
def test_parts_of_the_pictures(tmp_path: Path) -> None:
    pictures = runpy.run_path(str(ROOT / "assets" / "pictures.py"))
    # a line, a bar that is drawn, erased for a line above it, and drawn again one row lower; \x1b[1A goes up
    recorded = b"one\r\n0/2 --\r\x1b[2Ktwo\r\n0/2 --\r\x1b[2K\x1b[1A\x1b[2Ktoo\r\n\x1b[31m2/2\x1b[0m <=\r\n"
    plain, red = pictures["FOREGROUND"], pictures["COLOURS"]["red"]
    rows = [((0, "one", plain),), ((0, "too", plain),), ((0, "2/2", red), (4, "<=", plain)), ()]
    assert pictures["screen"](recorded)[:4] == rows
    chunks = [(9.0, recorded[:10]), (0.1, recorded[10:20]), (70.9, recorded[20:-1]), (80.0, recorded[-1:])]
    starts, shown = pictures["frames"](chunks)
    typing = len(pictures["COMMAND"]) + 2
    assert np.diff(starts[typing - 1 :]) == pytest.approx([1.0, 1.0125, 1.0]), "160 s in 20, and no pause above 1"
    assert shown[typing - 1][0] == ((0, "$ ./just demo", plain),) and list(shown[-1][1:5]) == rows
    drawn = ElementTree.fromstring(pictures["animation"](starts, shown))
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"$ ./just demo", "one", "too", "2/2", "<="} <= set(texts) and len(texts) == len(set(texts)), "each row once"
    pictures["draw"]([((0, "⠒●", plain), (3, "red", red))], tmp_path / "p.png")
    from PIL import Image

    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).reshape(-1, 3).astype(int)
    assert len(np.unique(pixels, axis=0)) > 4 and (pixels[:, 0] - pixels[:, 1]).max() > 100, "something is red"


def test_pictures_are_small() -> None:
    found = [path for path in (ROOT / "assets").iterdir() if path.suffix in (".png", ".svg")]
    drawn = {"loss.png", "terminal.png", "playground.png", "playground-watch.png", "demo.svg"}
    assert {path.name for path in found} == drawn
    assert not re.search(r"/(?:tmp|home|root|work|Users)/", (ROOT / "assets" / "demo.svg").read_text(encoding="utf-8"))
    assert all(path.stat().st_size < 200_000 for path in found)
