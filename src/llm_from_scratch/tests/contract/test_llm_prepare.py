"""llm-prepare and data/*/prepare.py as users call them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm_from_scratch
from llm_from_scratch.cli import prepare_data
from llm_from_scratch.config import Config
from llm_from_scratch.core.model import GPT
from llm_from_scratch.tests import forked
from llm_from_scratch.tests.texts import gpt2_folder, real_text, reference_gpt2, shakespeare

SRC = Path(llm_from_scratch.__file__).resolve().parents[1]
SCRIPTS = SRC.parent / "data"
COMMAND = [sys.executable, "-m", "llm_from_scratch.cli.prepare_data"]
# a proxy that nobody runs: no network, whatever the machine has
CUT_OFF = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
in_checkout = pytest.mark.skipif(not (SCRIPTS / "shakespeare").is_dir(), reason="data/ lies in a checkout only")


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SRC), "PYTHONUTF8": "1"} | CUT_OFF | env
    command = [*COMMAND, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def run_forked(*arguments: str, stdin: Any = subprocess.DEVNULL, **env: str) -> subprocess.CompletedProcess[str]:
    """In the working directory, without starting Python."""
    environment = os.environ | CUT_OFF | env
    imports = ("llm_from_scratch.data.prepare",)
    return forked.run("llm_from_scratch.cli.prepare_data", *arguments, stdin=stdin, env=environment, imports=imports)


def test_file_to_data(here: Path) -> None:
    text = real_text()[:50_000]
    (here / "book.txt").write_text(text, encoding="utf-8")
    done = run_forked("book.txt", "--tokenizer", "char")
    assert (done.returncode, done.stderr) == (0, "")
    *_, train, val, example, following, note = done.stdout.splitlines()
    assert note.startswith("note: 45,000 training tokens are few for ")
    assert train.split()[:2] == ["train", "45,000"] and val.split()[:2] == ["val", "5,000"]
    assert repr(text[:32]) in example
    assert following == "next: llm-train --dataset=book"
    made = {path.name for path in (here / "data/processed/book").iterdir()}
    assert made == {"train.bin", "val.bin", "manifest.json", "tokenizer.meta.json"}
    again = run_forked("book.txt", "--tokenizer=char")
    assert (
        again.returncode == 0
        and "is up to date: sources and settings have not changed" in again.stdout
        and following in again.stdout
    )


def test_a_model_with_more_parameters_than_tokens_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The note counts the parameters of the model that llm-train builds."""
    monkeypatch.chdir(tmp_path)
    counted = sum(p.numel() for p in GPT(dataclasses.replace(Config().model, vocab_size=4)).parameters())
    Path("small.txt").write_text("well\n" * 100)
    Path("big.txt").write_text("well\n" * 1_100_000)
    assert prepare_data.main(["small.txt"]) == 0
    assert f"note: 450 training tokens are few for {counted:,} parameters" in capsys.readouterr().out
    assert prepare_data.main(["big.txt", "--tokenizer=byte"]) == 0
    assert "note: " not in capsys.readouterr().out


def test_just_prints_how_to_activate_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("abc " * 100)
    monkeypatch.setenv("PATH", "")
    assert prepare_data.main(["book.txt", "--tokenizer=byte"]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setenv("HERE", str(tmp_path))  # where the user is
    monkeypatch.setenv("LLM_ACTIVATE", str(tmp_path / ".venv" / "bin" / "activate"))
    assert prepare_data.main(["book.txt", "--tokenizer=byte"]) == 0
    assert capsys.readouterr().err == "to use the llm-* commands in this shell: . .venv/bin/activate\n"


def test_standard_input(here: Path) -> None:
    Path("given.txt").write_text("héllo wörld\n" * 9, encoding="utf-8")
    with open("given.txt") as given:
        done = run_forked("-", "--tokenizer=byte", "--name=piped", stdin=given)
    assert done.returncode == 0, done.stderr
    folder = Path("data/processed/piped")
    got = (folder / "train.bin").read_bytes() + (folder / "val.bin").read_bytes()
    assert np.frombuffer(got, "<u2").astype(np.uint8).tobytes().decode() == "héllo wörld\n" * 9
    assert "standard input" in (folder / "manifest.json").read_text()


def test_lists_of_files(here: Path) -> None:
    for name in ("a", "b", "v"):
        Path(f"{name}.md").write_text(name * 10)
    files = json.dumps(["a.md", "b.md"])
    done = run_forked(f"--train_files={files}", "--val_files=v.md", "--tokenizer=byte", "--out_dir=o/x")
    assert done.returncode == 0, done.stderr
    assert np.fromfile("o/x/val.bin", "<u2").tolist() == [ord("v")] * 10
    assert "next: llm-train --dataset=o/x" in done.stdout


@pytest.mark.parametrize("start", ["forked", pytest.param("python", marks=pytest.mark.slow)])
def test_a_terminal_that_cannot_show_the_text(here: Path, start: str) -> None:
    Path("a.txt").write_text("東京 é\n" * 50, encoding="utf-8")
    words, ascii_only = ("a.txt", "--tokenizer=byte"), {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run_forked(*words, **ascii_only) if start == "forked" else run(here, *words, **ascii_only)
    assert done.returncode == 0 and "\\u6771" in done.stdout


MISTAKES = [
    ([], "no source"),
    (["nope.txt"], "'nope.txt' not found here or in data/raw"),
    (["--tokenizr=gpt2"], "did you mean tokenizer"),
    (["a.txt", "--val_fraction=lots"], "val_fraction='lots' is not valid"),
    (["a.txt", "--workers=-3"], "workers=-3"),
    (["a.txt", "--tokenizer=gtp2"], "did you mean gpt2"),
    (["a.txt", "--tokenizer=o200k_base"], "cannot get the o200k_base vocabulary"),
    (["bad.txt"], "bad.txt is not UTF-8 text: byte offset 3"),
    (["empty.txt"], "empty.txt is empty"),
    (["shakespeare"], "cannot download tiny Shakespeare"),
]
# python -O leaves out asserts: the slow cases show that no check is one


@pytest.mark.parametrize(
    "flags, arguments, message",
    [
        *(([], *mistake) for mistake in MISTAKES),
        *(pytest.param(["-O"], *mistake, marks=pytest.mark.slow) for mistake in MISTAKES),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, flags: list[str], arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("hello world " * 9)
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "empty.txt").touch()
    monkeypatch.setattr(urllib.request, "_opener", None)  # keeps the proxies of its first use
    for name, value in ({"PYTHONPATH": str(SRC), "TIKTOKEN_CACHE_DIR": str(tmp_path / "none")} | CUT_OFF).items():
        monkeypatch.setenv(name, value)
    if flags:
        command = [sys.executable, *flags, *COMMAND[1:], *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        code, errors = done.returncode, done.stderr
    else:
        code, errors = prepare_data.main(arguments), capsys.readouterr().err
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob(".*"))


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as POSIX sends it")
@pytest.mark.parametrize(
    ("workers", "moment"),
    [("0", "encoding"), *(pytest.param("2", moment, marks=pytest.mark.slow) for moment in ("starting", "encoding"))],
)
def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path, workers: str, moment: str) -> None:
    gpt2_folder()
    (tmp_path / "long.txt").write_text(real_text()[:400_000] * 50, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    arguments = [*COMMAND, "long.txt", "--tokenizer=gpt2", f"--workers={workers}"]
    child = subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")

    def has_come() -> bool:
        if moment == "starting" and children.is_file():
            with contextlib.suppress(OSError):
                maps = [Path(f"/proc/{pid}/maps").read_text() for pid in children.read_text().split()]
                return any("numpy" in libraries for libraries in maps)  # a worker is importing
        begun = tmp_path.glob("data/processed/.long.building-*/*.bin")
        return any(path.stat().st_size for path in begun)  # the first part is encoded

    while not has_come():
        assert child.poll() is None, child.communicate()
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 130, errors
    assert errors.decode() == "interrupted\n"
    for left in (tmp_path / "data/processed").iterdir():
        assert left.name.startswith(".long.building-") and (left / "progress.json").is_file()
    subprocess.run(arguments, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=300)
    assert [path.name for path in (tmp_path / "data/processed").iterdir()] == ["long"]


def test_help_is_quick(tmp_path: Path) -> None:
    spent = []
    for _ in range(3):
        before = os.times()
        done = run(tmp_path, "--help")
        after = os.times()  # processor time: other tests may run at the same time
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert done.returncode == 0 and "--val_fraction" in done.stdout and "python_docs" in done.stdout
    assert min(spent) < 1.0  # 0.3 s on an idle machine; torch alone would take twice the limit
    code = "import sys, llm_from_scratch.cli.prepare_data; sys.exit(len({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SRC)}).returncode == 0


# data/*/prepare.py


def uninstalled(tmp_path: Path, name: str) -> Path:
    """A checkout of src/ and data/NAME, without what the script makes."""
    folder = tmp_path / "checkout" / "data" / name
    folder.mkdir(parents=True)
    for file in ("prepare.py", "readme.md"):
        shutil.copy(SCRIPTS / name / file, folder)
    shutil.copytree(SRC, tmp_path / "checkout/src", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    return folder


def script(folder: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without site: the package is not installed there, its dependencies are."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(packages)} | CUT_OFF
    command = [sys.executable, "-S", str(folder / "prepare.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@in_checkout
@pytest.mark.parametrize("name", ["shakespeare_char", pytest.param("shakespeare", marks=pytest.mark.slow)])
def test_nanogpts_scripts_from_anywhere_and_uninstalled(tmp_path: Path, name: str) -> None:
    folder = uninstalled(tmp_path, name)
    text = shakespeare() or real_text()
    (folder / "input.txt").write_text(text, encoding="utf-8")
    done = script(folder, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    border = int(len(text) * 0.9)
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    counts = []
    for file, part in (("train.bin", text[:border]), ("val.bin", text[border:])):
        ids = [stoi[c] for c in part] if name == "shakespeare_char" else reference_gpt2().encode_ordinary(part)
        assert (folder / file).read_bytes() == np.array(ids, np.uint16).tobytes()
        counts.append(f"{len(ids):,}")
    made = {path.name for path in folder.iterdir()} - {"prepare.py", "readme.md", "input.txt"}
    assert made == {"train.bin", "val.bin"} | ({"meta.pkl"} if name == "shakespeare_char" else set())
    if shakespeare() is not None:
        assert all(count in (folder / "readme.md").read_text() for count in counts)
    assert all(count in done.stdout for count in counts)
    assert not [path for path in (tmp_path / "checkout/src").glob("*") if path.name != "llm_from_scratch"]


@pytest.mark.slow
@in_checkout
@pytest.mark.parametrize(
    "name, message",
    [
        ("shakespeare_char", "cannot download tiny Shakespeare"),
        ("shakespeare", "cannot download tiny Shakespeare"),
        ("openwebtext", "[data]'"),
    ],
)
def test_nanogpts_scripts_without_network(tmp_path: Path, name: str, message: str) -> None:
    if name == "openwebtext" and any((Path(path) / "datasets").is_dir() for path in sys.path):
        pytest.skip("the library datasets is installed")
    folder = uninstalled(tmp_path, name)
    done = script(folder, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert {path.name for path in folder.iterdir()} == {"prepare.py", "readme.md"}


@pytest.mark.slow
@in_checkout
def test_openwebtext_refuses_other_options(tmp_path: Path) -> None:
    done = script(uninstalled(tmp_path, "openwebtext"), tmp_path, "--workers=many")
    assert done.returncode == 2 and "expected nothing, or --workers=N" in done.stderr
