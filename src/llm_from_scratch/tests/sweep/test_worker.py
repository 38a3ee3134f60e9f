"""Workers and their runs: pruned, failed, cut and continued. Quick tests fork the runs; slow ones kill whole sweeps."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.cli import sweep
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.extras import is_installed
from llm_from_scratch.sweep import worker
from llm_from_scratch.sweep.space import parse_space
from llm_from_scratch.sweep.study import Study
from llm_from_scratch.sweep.worker import Runs, Trial, run_trials

from ..forked import forks
from ..tiny import arguments

# not imported here: every worker of the tests would import it
pytestmark = pytest.mark.skipif(not is_installed("optuna"), reason="needs optuna")
RUN_COMMAND = Trial.run_command
SETTINGS = arguments(final_eval=True, max_iters=20, eval_interval=5, eval_iters=1, min_lr=0)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch, here: Path) -> list[list[str]]:
    """The commands of runs, which are forked: importing torch for each takes longer than the run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(worker, "subprocess", forks(commands))
    monkeypatch.setattr(worker, "PAUSE", 0.01)
    return commands


def results(name: str) -> list[dict[str, Any]]:
    return json.loads(Path("out-sweep", name, "sweep.json").read_text())["trials"]


def test_a_sweep_from_end_to_end(forked: list[list[str]], tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With two seeds; one run cannot start. The last line trains the best again."""
    words = [*SETTINGS, f"--dataset={tiny_data}", "--over=n_head=3,2", "--name=a", "--seeds=2"]
    assert sweep.main(words) == 0
    out = capsys.readouterr().out
    best, failed = results("a")
    assert (best["settings"], failed["settings"]) == ({"n_head": "2"}, {"n_head": "3"})
    assert best["loss"] == pytest.approx(sum(best["losses"].values()) / 2) and len(best["losses"]) == 2
    for seed in ("1337", "1338"):
        path = Path("out-sweep/a/trial-1", f"seed-{seed}", "metrics.jsonl")
        assert json.loads(path.read_text().splitlines()[-1])["val_loss_full"] == best["losses"][seed]
    assert failed["state"] == "failed"
    assert failed["message"] == "n_embd=16 is not divisible by n_head=3; try n_head=2"
    again = "llm-train out-sweep/a/settings.yaml --n_head=2 --seed=1337 --out_dir=out-best"
    assert out.splitlines()[-1] == f"repeat the best trial: {again}"
    assert all("--final_eval=always" in command for command in forked)  # however long: it is the result
    count = len(forked)
    assert sweep.main(words) == 0 and len(forked) == count  # all is done


@pytest.mark.slow
def test_a_budget_of_tokens_sets_the_steps(
    forked: list[list[str]], tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("b.yaml").write_text("over: ['batch_size=2,8']\nbudget_each: 1280tokens\nname: b\ndata: {batch_size: 4}\n")
    sizes = [word for word in SETTINGS if not word.startswith(("--max_iters", "--eval_interval", "--batch_size"))]
    assert sweep.main(["b.yaml", *sizes, f"--dataset={tiny_data}"]) == 0
    last = [json.loads(Path(f"out-sweep/b/trial-{n}/metrics.jsonl").read_text().splitlines()[-1]) for n in (0, 1)]
    assert [entry["step"] for entry in last] == [80, 20]  # 1280 tokens / (sequences of 8 tokens)
    assert "--eval_interval=8" in forked[0] and "--eval_interval=2" in forked[1]
    order = sorted((0, 1), key=lambda n: last[n]["val_loss_full"])
    assert [row["trial"] for row in results("b")] == order
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdecimal() and "  " in line]
    assert rows == [[str(n), f"{last[n]['val_loss_full']:.4f}", "28"[n]] for n in order]


def trial_in(folder: Path, command: Callable[[Trial], list[str]], monkeypatch: pytest.MonkeyPatch) -> tuple[Study, str]:
    """A study with one trial whose run is replaced by another command; and what was said."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.yaml").touch()
    study = Study(folder, parse_space(["n_layer=1,2"]), {}, 1, pruner="none")
    said: list[str] = []
    monkeypatch.setattr(Trial, "run_command", lambda self, words, *rest: RUN_COMMAND(self, command(self), *rest))
    monkeypatch.setattr(worker, "PAUSE", 0.01)
    run_trials(study, Runs(folder / "settings.yaml", [1], "val_loss"), 1, said.append)
    return study, "\n".join(said)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo step; echo 'error: the loss is nan' >&2; exit 1", "the loss is nan"),
        ("echo Traceback; echo ValueError: odd; exit 1", "ValueError: odd"),
        ("exit 3", "exit code 3"),
        ("exit 0", "does not have val_loss"),
    ],
)
def test_the_error_of_a_failed_run_is_reported(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, text = trial_in(tmp_path, lambda trial: ["sh", "-c", script], monkeypatch)
    (row,) = study.rows()
    assert row.state == "failed" and said in row.message and f"trial 0: failed: {row.message}" in text


@pytest.mark.parametrize("full", ["seed-2", worker.OUTPUT])
def test_a_full_disk_under_a_trials_files_is_one_line(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, parse_space(["n_layer=1,2"]), {}, 1, pruner="none")
    monkeypatch.setattr(worker, "PAUSE", 0.01)

    def no_space(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *given: Any, **named: Any) -> Any:
            if path.name == full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return method(path, *given, **named)

        return call

    monkeypatch.setattr(Path, "mkdir", no_space(Path.mkdir))
    monkeypatch.setattr(Path, "open", no_space(Path.open))
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/trial-0/.*{full}: No space left on device$"):
        run_trials(study, Runs(tmp_path / "settings.yaml", [2, 3], "val_loss"), 1, list[str]().append)


@pytest.mark.slow
def test_a_run_that_is_killed_is_continued_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = 'echo \'{"step": 4, "val_loss": 1.5}\' > metrics.jsonl'
    script = f"test -e killed && {metrics} || {{ touch killed; kill -9 $$; }}"
    study, _ = trial_in(tmp_path / "a", lambda trial: ["sh", "-c", f"cd {trial.folder(1)}; {script}"], monkeypatch)
    assert [(row.state, row.loss) for row in study.rows()] == [("complete", 1.5)]
    study, _ = trial_in(tmp_path / "b", lambda trial: ["sh", "-c", "kill -9 $$"], monkeypatch)
    assert study.rows()[0].message == "killed by SIGKILL, perhaps because memory ran out"


def sweep_process(data: Path, *more: str) -> subprocess.Popen[bytes]:
    over = ["--over=learning_rate=1e-2,1e-3 dropout=0.0,0.2", "--name=s", "--pruner=none"]
    sizes = arguments(final_eval=True, max_iters=60, eval_interval=10, save_interval=5, eval_iters=1, n_embd=64)
    command = [sys.executable, "-m", "llm_from_scratch.cli.sweep", *sizes, f"--dataset={data}", *over, *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def weights(folder: Path) -> dict[str, Any]:
    return load(folder, "last").model


def check_complete(trials: int) -> None:
    rows = results("s")
    assert sorted(row["trial"] for row in rows) == [*range(trials)]
    assert all(row["state"] == "complete" for row in rows), rows
    assert len({tuple(row["settings"].items()) for row in rows}) == trials  # none was run twice
    assert not list(Path("out-sweep/s").glob("trial-*/previous-*/step-*")), "a run with a checkpoint started again"


@pytest.mark.slow
def test_a_sweep_that_is_killed_loses_nothing(here: Path, tiny_data: Path) -> None:
    """Five kills at random moments, with one worker and with two. A resumed trial ends as an uninterrupted one."""
    rng = random.Random(5)
    for kill in range(5):
        process = sweep_process(tiny_data, f"--workers={1 + kill % 2}")
        time.sleep(rng.uniform(1.0, 5.0))
        process.kill()
        process.communicate()
    process = sweep_process(tiny_data)
    assert process.wait(300) == 0, process.communicate()
    check_complete(4)
    for trial in (0, 3):
        run = Path(f"out-sweep/s/trial-{trial}")
        settings = [f"--{k}={v}" for row in results("s") if row["trial"] == trial for k, v in row["settings"].items()]
        whole = ["-m", "llm_from_scratch.cli.train", "out-sweep/s/settings.yaml", *settings, "--out_dir=whole"]
        subprocess.run([sys.executable, *whole], check=True, stdout=subprocess.DEVNULL)
        expected = weights(Path("whole"))
        assert all(bool((tensor == expected[name]).all()) for name, tensor in weights(run).items())


@pytest.mark.slow
def test_two_processes_share_a_sweep(here: Path, tiny_data: Path) -> None:
    both = [sweep_process(tiny_data), sweep_process(tiny_data)]
    assert [process.wait(300) for process in both] == [0, 0], [process.communicate() for process in both]
    check_complete(4)


@pytest.mark.slow
def test_a_signal_saves_the_run_and_the_next_worker_resumes_it(here: Path, tiny_data: Path) -> None:
    process = sweep_process(tiny_data, "--max_iters=100000", "--trials=1")
    output = here / "out-sweep/s/trial-0/output.txt"
    while not output.is_file() or b"step 10/" not in output.read_bytes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert b"stopped at step" in output.read_bytes()
    children = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"trial-0" in path.read_bytes()]
    assert not children
