"""Two processes on one CPU, started as a user starts them: the same run as in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.checkpoint.store import find_checkpoint, list_checkpoints, load_checkpoint
from llm_from_scratch.training.trainer import train

from ..forked import Forked, rendezvous
from ..tiny import arguments, read_metrics, tiny_config

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
SETTINGS = {"batch_size": 2, "gradient_accumulation_steps": 4, "max_iters": 5, "eval_interval": 2, "final_eval": True}


def by_torchrun(program: Path, *argv: str) -> tuple[int, str, str]:
    """Exit code, output and errors of two processes, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program), *argv]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done.returncode, done.stdout, done.stderr


def by_forks(program: Path, *argv: str) -> tuple[int, str, str]:
    """The same, without starting Python three times."""
    with rendezvous(2) as shared, open("out.txt", "w+") as out, open("err.txt", "w+") as err:
        own = [{**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        ranks = [
            Forked(str(program), *argv, env=env, stdout=out, stderr=err, imports=("torch._dynamo",)) for env in own
        ]
        try:
            codes = [rank.wait(60) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        return max(codes, key=abs), Path("out.txt").read_text(), Path("err.txt").read_text()


@pytest.mark.parametrize("start", [by_forks, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_are_one(start: Callable[..., tuple[int, str, str]], here: Path, tiny_data: Path) -> None:
    program = Path("two.py")
    program.write_text("import sys\nfrom llm_from_scratch.cli.train import main_nanogpt\nsys.exit(main_nanogpt())\n")
    given = arguments(dataset=tiny_data, out_dir="two", backend="gloo", inclusive_max_iters=False, **SETTINGS)
    code, out, err = start(program, *given)
    assert code == 0, err
    assert "processes: 2 (gloo)" in out
    assert "tokens per iteration will be: 64 (8 sequences: 2 x 2 x 2)" in out
    assert out.count("iter 3:") == 1  # one process speaks
    config = tiny_config(tiny_data, out_dir="one", bias=False, lr_decay_iters=600000, **SETTINGS)
    train(config)
    one, two = read_metrics(Path("one")), read_metrics(Path("two"))
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    for a, b in zip(one, two, strict=True):
        for key in {"loss", "train_loss", "val_loss", "val_loss_full", "bits_per_byte", "grad_norm", "lr"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-5), key
    assert [step for step, _ in list_checkpoints("two")] == [step for step, _ in list_checkpoints("one")]
    alone, shared = (load_checkpoint(find_checkpoint(name, "last")) for name in ("one", "two"))
    for name in alone.model:
        torch.testing.assert_close(shared.model[name], alone.model[name], atol=1e-4, rtol=1e-3)
    assert set(shared.rng) == {"cpu.0", "cpu.1"} and not torch.equal(shared.rng["cpu.0"], shared.rng["cpu.1"])
    # one process resumes the run of two
    train(tiny_config(tiny_data, **{**SETTINGS, "out_dir": "two", "init_from": "resume", "max_iters": 7}))
    assert [entry["step"] for entry in read_metrics(Path("two")) if "loss" in entry] == list(range(7))


FAULTY = """
import math, os, signal, sys, time
from llm_from_scratch.checkpoint import store
from llm_from_scratch.training import trainer
from llm_from_scratch.cli.train import main

child = os.fork()
rank = int(child == 0)
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
update = trainer.train_step

def faulty(run, x, y):
    hook = None
    if rank == 1 and run.state.step == 2:
        hook = run.model.register_forward_hook(lambda m, a, out: (out[0], out[1] * math.nan))
    if rank == 1 and run.state.step == 4:
        os.kill(os.getpid(), signal.SIGUSR1)
    step = update(run, x, y)
    if hook is not None:
        hook.remove()
    return step

def slowly(*args, **settings):
    time.sleep(2)  # the other process has long left, if it does not wait
    return save(*args, **settings)

if "resume" not in " ".join(sys.argv):
    trainer.train_step = faulty
save, store.save_checkpoint = store.save_checkpoint, slowly
code = main()
print(f"process {rank} ends with {code}", flush=True)
if child:
    code = code or os.waitpid(child, 0)[1]
sys.exit(min(code, 1))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_all_processes_stop_if_one_fails_or_is_stopped(here: Path, tiny_data: Path) -> None:
    """Two processes are stopped, with a checkpoint that takes its time, and two resume. A script forks
    them; torchrun starts those above."""
    Path("faulty.py").write_text(FAULTY)

    def run(**more: Any) -> subprocess.CompletedProcess[str]:
        settings = {**SETTINGS, "dropout": 0.1, "save_interval": 100, "eval_interval": 100, "max_iters": 9, **more}
        settings["optimizer_type"] = "muon"  # the test above has AdamW
        given = arguments(dataset=tiny_data, out_dir="run", backend="gloo", **settings)
        command = [sys.executable, "faulty.py", *given]
        with rendezvous(2) as shared:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | shared
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    done = run()
    assert done.returncode == 1
    assert "warning: step 2: loss nan" in done.stdout and "stopped at step 5; resume with" in done.stdout
    assert all(f"process {rank} ends with {128 + signal.SIGUSR1}" in done.stdout for rank in (0, 1))
    assert [entry.get("skipped") for entry in read_metrics(Path("run")) if "loss" in entry] == [
        None,
        None,
        1,
        None,
        None,
    ]
    final = load_checkpoint(find_checkpoint("run", "last"))
    assert final.step == 5 and all(torch.isfinite(tensor).all() for tensor in final.model.values())
    assert final.optimizer is not None and int(final.optimizer["state"]["transformer.wte.weight"]["step"]) == 4
    assert "--out_dir=run --dataset=" in done.stdout and "(with torchrun, 2 processes)" in done.stdout
    done = run(init_from="resume")
    assert done.returncode == 0, done.stderr
    assert "not bit-exact" not in done.stdout and "resuming from run/step-00000005" in done.stdout
    assert [entry["step"] for entry in read_metrics(Path("run")) if "loss" in entry] == list(range(9))


def test_a_batch_that_cannot_be_shared_is_refused(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    from llm_from_scratch.cli.train import main

    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(arguments(dataset=tiny_data, batch_size=4)) == 2
    assert capsys.readouterr().err == (
        "error: the global batch of batch_size * gradient_accumulation_steps = 4 sequences is not divisible by 3 "
        "processes: start 1, 2, 4 processes (same batches), or make it a multiple of 3\n"
    )
    monkeypatch.setenv("RANK", "2")  # one process reports it
    assert main(arguments(dataset=tiny_data, batch_size=40)) == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert main(arguments(dataset=tiny_data, batch_size=40)) == 2
    assert "start 1, 2, 4, 5, 8, 10, 20, 40 processes" in capsys.readouterr().err
    monkeypatch.delenv("MASTER_ADDR")
    assert main(arguments(dataset=tiny_data)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the distributed environment is incomplete: MASTER_ADDR missing; start with torchrun")
    assert told.count("\n") == 1
    assert list(here.iterdir()) == []
