"""Standard output on a full disk, closed, or on a terminal that is gone: one line and a documented exit code."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_from_scratch.training.trainer import train

from .. import forked
from ..forked import Forked
from ..tiny import arguments, babble, slow_except, tiny_config, write_data

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full disk to offer")
SMALL = ["--steps=1", "--burnin_steps=0", "--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=8"]


def run(command: list[str], to: str) -> tuple[int, list[str]]:
    """The exit code, and the lines on standard error of a command whose output goes to a full disk, or nowhere."""
    script = [str(ROOT / command[0])] if command[0].endswith(".py") else ["-m", f"llm_from_scratch.cli.{command[0]}"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {to}', "sh", sys.executable, *script, *command[1:]],
        stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, prepared data and a trained run."""
    folder = tmp_path_factory.mktemp("output")
    (folder / "text.txt").write_text(babble(3000))
    train(tiny_config(write_data(folder / "data"), out_dir=str(folder / "run"), max_iters=2, eval_interval=2))
    return folder


COMMANDS = {
    "llm-train": ["train", *arguments(out_dir="{place}/new", max_iters=2)],
    "llm-train with a bar": ["train", *arguments(out_dir="{place}/new", max_iters=2), "--progress=bar"],
    "llm-train --help": ["train", "--help"],
    "llm-plan": ["plan", *arguments(out_dir="{place}/new")],
    "llm-prepare": ["prepare_data", "{place}/text.txt", "--tokenizer=byte", "--out_dir={place}/prepared"],
    "llm-generate": ["generate", "--out_dir={place}/run", "--max_new_tokens=3", "--start=a"],
    "llm-eval": ["evaluate", "--out_dir={place}/run", "--dataset={place}/data"],
    "llm-export": ["export", "--out_dir={place}/run", "--output={place}/exported", "--format=hf"],
    "llm-bench": ["bench", *SMALL, "--real_data=False"],
    "llm-serve": ["serve", "--out_dir={place}/run", "--port=0"],
    "train.py": ["train.py", *arguments(out_dir="{place}/new", max_iters=2)],
    "sample.py": ["sample.py", "--out_dir={place}/run", "--max_new_tokens=3", "--start=a"],
    "bench.py": ["bench.py", *SMALL],
}
QUICK = ("llm-train with a bar", "llm-generate")
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in COMMANDS]


def words(name: str, place: Path) -> list[str]:
    given = [word.replace("{place}", str(place)) for word in COMMANDS[name]]
    return given + ([f"--dataset={place / 'data'}"] if any("/new" in word for word in given) else [])


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_under_the_output(name: str, place: Path, here: Path) -> None:
    if name in QUICK:
        command, *given = words(name, place)
        with open("/dev/full", "w") as full:
            done = forked.run(f"llm_from_scratch.cli.{command}", *given, stdout=full)
        code, lines = done.returncode, done.stderr.splitlines()
    else:
        code, lines = run(words(name, place), "> /dev/full")
    if name.startswith(("llm-train", "train.py")) and "--help" not in name:  # lines are lost, the run is not
        last = "step-00000003" if name == "train.py" else "step-00000002"  # nanoGPT's max_iters is inclusive
        assert (code, lines) == (0, []) and (place / "new" / last).is_dir()
    else:
        lines = [line for line in lines if "parameters, on" not in line]
        assert (code, lines) == (1, ["error: cannot write the output: No space left on device"])


@pytest.mark.parametrize("name", slow_except(COMMANDS, "llm-generate"))
def test_a_closed_output(name: str, place: Path, here: Path) -> None:
    code, lines = run(words(name, place), ">&-")
    assert (code, lines) == (2, ["error: standard output is closed: redirect it to a file or to /dev/null"])
    assert run(words(name, place), ">&- 2>&-") == (2, [])


def test_a_run_in_a_closed_terminal_ends_with_129(place: Path, here: Path) -> None:
    main, terminal = pty.openpty()
    errors = here / "errors.txt"
    long = {"max_iters": 10**6, "eval_interval": 10**6, "progress": "bar"}
    given = arguments(dataset=place / "data", out_dir=here / "run", **long)
    with errors.open("w") as stderr:
        child = Forked(
            "llm_from_scratch.cli.train", *given, stdin=terminal, stdout=terminal, stderr=stderr,
            start_new_session=True, env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
    os.close(terminal)
    shown = b""
    while b"tok/s" not in shown:
        shown += os.read(main, 1 << 16)
    os.close(main)  # from here on, writing fails with EIO
    child.send_signal(signal.SIGHUP)
    begin = time.monotonic()
    assert child.wait(60) == 128 + signal.SIGHUP, errors.read_text()
    assert errors.read_text() == "" and time.monotonic() - begin < 60
    assert list((here / "run").glob("step-*"))
