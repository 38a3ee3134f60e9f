"""Two processes: faults of one of them, and what both decide."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.cli.train import main_nanogpt
from llm_from_scratch.core.dataset import BatchLoader, SampleOrder, TokenData
from llm_from_scratch.errors import TrainingError, listed
from llm_from_scratch.training import guards
from llm_from_scratch.training import trainer as trainers
from llm_from_scratch.training.guards import checksum
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.trainer import train

from ..forked import Forked, rendezvous
from ..ranks import in_ranks
from ..tiny import arguments, read_metrics, tiny_config

SETTINGS: dict[str, Any] = {
    "backend": "gloo", "batch_size": 4, "gradient_accumulation_steps": 2, "max_iters": 6, "eval_interval": 100,
    "save_interval": 2, "collective_timeout": 20.0,
}  # fmt: skip
Fault = Callable[[Run], Any]


@contextlib.contextmanager
def _in_clip(rank: int, steps: list[int], fault: Fault) -> Iterator[None]:
    """fault(run) of this rank in these steps: after the gradients have been exchanged, before the norm is known."""
    clip, update, runs = trainers.clip_gradients, trainers.train_step, list[Run]()

    def step(run: Run, *batch: torch.Tensor) -> Any:
        runs[:] = [run]
        return update(run, *batch)

    def clipping(*args: Any) -> torch.Tensor:
        state = runs[0].state
        if runs[0].runtime.rank == rank and state.step + state.data_shift in steps:
            fault(runs[0])
        return clip(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "clip_gradients", clipping)
        patch.setattr(trainers, "train_step", step)
        yield


def _spoil_gradient(run: Run) -> None:
    grad = run.model.transformer.wte.weight.grad
    assert grad is not None
    grad.view(-1)[3] = math.nan


def _flip_a_bit(run: Run) -> None:
    run.model.transformer.wte.weight.data.view(torch.int32)[1, 1] ^= 1


def _trained(data: Path, **settings: Any) -> dict[str, Any]:
    """What a run printed, its error, and its last weights."""
    found: dict[str, Any] = {"error": None}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            found["code"] = train(tiny_config(data, **{**SETTINGS, **settings})).exit_code
        except TrainingError as error:
            found["error"] = str(error)
    return found | {"printed": out.getvalue()}


def faulty_runs(folder: str, data: Path) -> dict[str, dict[str, Any]]:
    os.chdir(folder)
    found = {}
    with _in_clip(1, [3], _spoil_gradient):
        found["nan"] = _trained(data, out_dir="nan")
    with _in_clip(1, [3, 4, 5], _spoil_gradient):
        found["rollback"] = _trained(data, out_dir="rollback", save_interval=3, max_skipped_steps=3)
    guards.CHECK = 2
    with _in_clip(1, [2], _flip_a_bit):
        found["flip"] = _trained(data, out_dir="flip")
    guards.CHECK = 100
    found["roomy"] = _trained(data, out_dir="roomy", micro_batch=1)
    found["short"] = _short(data)
    with _signal_in_evaluation(rank=1):
        found["stop"] = _trained(data, out_dir="stop", eval_interval=4, eval_iters=64)
    return found


@contextlib.contextmanager
def _signal_in_evaluation(rank: int) -> Iterator[None]:
    """SIGTERM to one process in the first batch of the evaluation of step 4."""
    evaluate = Run.evaluate

    def signalled(run: Run) -> None:
        if run.state.step == 4 and run.runtime.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "evaluate", signalled)
        yield


def _short(data: Path) -> dict[str, Any]:
    """From step 3 on, rank 1 has memory for two sequences in the forward pass, and in the backward pass for one."""
    update, mine = trainers.train_step, os.environ["RANK"] == "1"

    def step(run: Run, *batch: torch.Tensor) -> Any:
        def spent(grad: torch.Tensor) -> torch.Tensor:
            if mine and run.state.step >= 3 and run.micro_batch > 1:
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
            return grad

        def forward(module: Any, args: Any) -> None:
            if mine and run.state.step >= 3 and len(args[0]) > 2:
                raise torch.OutOfMemoryError("Tried to allocate 3.00 GiB")

        hooks = [run.model.transformer.wte.weight.register_hook(spent), run.model.register_forward_pre_hook(forward)]
        try:
            return update(run, *batch)
        finally:
            for hook in hooks:
                hook.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "train_step", step)
        return _trained(data, out_dir="short")


@pytest.mark.slow
def test_both_processes_decide_the_same(here: Path, tiny_data: Path) -> None:
    """One start for several faults, because starting takes longer than they do."""
    first, second = in_ranks(2, faulty_runs, here, str(here), tiny_data)
    warning = r"warning: step 3: loss [0-9.]+, gradient norm nan on rank 1 only \(its device may be faulty\), skipped"
    assert re.search(warning, first["nan"]["printed"]) and first["nan"]["error"] is second["nan"]["error"] is None
    last = load_checkpoint(find_checkpoint("nan", "last"))
    assert last.step == 6 and last.optimizer is not None
    assert int(last.optimizer["state"]["transformer.wte.weight"]["step"]) == 5
    skipped = [entry["step"] for entry in read_metrics(Path("nan")) if "skipped" in entry]
    assert skipped == [3]
    assert "rolled back to rollback/step-00000003" in first["rollback"]["printed"]
    assert first["rollback"]["error"] is second["rollback"]["error"] is None
    differ = r"^ranks 0 to 1 have different parameters at step 4, without a majority"
    for found in (first, second):
        assert re.search(differ, found["flip"]["error"])
    assert find_checkpoint("flip", "last").name == "step-00000002"  # none of differing weights
    told = first["short"]["printed"]
    assert "on another process" in told or "out of memory" in told
    assert told.count("warning: out of memory") == 2 and "split into 4 micro-batches of 1" in told
    assert first["short"]["error"] is second["short"]["error"] is None
    one, other = (load_checkpoint(find_checkpoint(name, "last")) for name in ("roomy", "short"))
    for name in one.model:
        torch.testing.assert_close(other.model[name], one.model[name], atol=1e-6, rtol=1e-5)
    assert other.trainer["machine"]["micro_batch"] == 1
    assert (first["stop"]["code"], second["stop"]["code"]) == (143, 143)
    assert "stopped at step 4; resume with" in first["stop"]["printed"]
    assert not [entry for entry in read_metrics(Path("stop")) if entry["step"] == 4]


def hanging_run(folder: str, data: Path, how: str) -> None:
    os.chdir(folder)
    ready = Run.next_batch

    def batch(run: Run) -> Any:
        if run.runtime.rank == 1 and run.state.step == 2:
            Path("pid.new").write_text(str(os.getpid()))
            os.rename("pid.new", "pid")
            if how == "fail":
                raise TrainingError("the disk is gone")
            time.sleep(600)
        return ready(run)

    settings = {**SETTINGS, "collective_timeout": 5.0 if how == "stop" else 10.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "next_batch", batch)
        train(tiny_config(data, out_dir="run", **settings))


SHARED = 30  # seconds after the timeout, while other tests run; `just storm ranks` allows 3
HANGING = """
import sys
from pathlib import Path
from llm_from_scratch.machine.terminal import note
from llm_from_scratch.errors import TrainingError
from llm_from_scratch.tests.training.test_faults import hanging_run
try:
    hanging_run(*sys.argv[1:2], Path(sys.argv[2]), sys.argv[3])
except TrainingError as error:
    note(f"error: {error}")
    sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told", "within"),
    [
        ("hang", r"rank 1 \(.*, process \d+\) hangs at step 2, in batch \(.*\), for \d+ s", 10 + SHARED),
        ("stop", r"rank 1 \(.*, process \d+\) is stopped at step 2, .*\bin .*, for \d+ s", 5 + SHARED),
        ("kill", r"rank 1 \(.*, process \d+\) died at step 2, .*\bin [a-z_]+ \(.*\)", 10 + SHARED),
        ("fail", r"rank 1 \(.*, process \d+\) ended at step 2: the disk is gone", 10 + SHARED),
    ],
)
def test_a_process_that_does_not_answer_ends_the_run(
    here: Path, tiny_data: Path, how: str, told: str, within: float
) -> None:
    Path("hanging.py").write_text(HANGING)
    with contextlib.ExitStack() as cleanup:
        shared, processes = cleanup.enter_context(rendezvous(2)), []
        for rank in range(2):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            log = cleanup.enter_context(open(f"{rank}.log", "w"))
            environment = {**os.environ, **shared, **own}
            processes.append(
                Forked("hanging.py", str(here), str(tiny_data), how, env=environment, stdout=log, stderr=log)
            )
            cleanup.callback(processes[-1].kill)
        end = time.monotonic() + 300
        while not Path("pid").exists():
            assert time.monotonic() < end, Path("0.log").read_text()
            time.sleep(0.01)
        begin = time.monotonic()
        if how in ("stop", "kill"):
            os.kill(int(Path("pid").read_text()), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
        assert processes[0].wait(90) == 1
        seconds, printed = time.monotonic() - begin, Path("0.log").read_text()
        assert seconds < within, printed
        assert re.search(f"^error: {told}", printed, re.MULTILINE), printed
        assert "resume with: llm-train --init_from=resume --out_dir=run" in printed


@pytest.mark.slow
def test_ids_of_any_number_of_processes_equal_one_process() -> None:
    """1,000,000 samples drawn by 1 to 4 processes, whose number changes at every step, through all pairs: each once."""
    order, batch = SampleOrder(8_000_009, 8, "shuffled", 8), 12_000
    pairs, drawn = [(one, other) for one in (1, 2, 3, 4) for other in (1, 2, 3, 4)], []
    for step in range(math.ceil(1_000_000 / batch)):
        world = pairs[step // 2 % len(pairs)][step % 2]
        data = TokenData((np.zeros(8_000_009, np.uint16),))
        loaders = [BatchLoader(data, order, batch, torch.device("cpu"), rank, world) for rank in range(world)]
        drawn += [order.starts(step, batch)[loader.rows] for loader in loaders]
    ids = np.concatenate(drawn)[:1_000_000]  # then the next epoch begins
    counts = np.bincount((ids - ids.min()) // 8)
    assert order.windows_per_epoch == len(counts) == 1_000_000 and (counts == 1).all()


def test_numbers_are_listed() -> None:
    assert listed([0, 1, 2, 3, 6, 8, 9]) == "0 to 3, 6, 8 to 9" and listed([5]) == "5"


def test_a_checksum_notices_every_flipped_bit() -> None:
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2).bfloat16()
    model = torch.nn.Sequential(first, second)

    def total() -> torch.Tensor:
        found = checksum(model)
        assert found is not None
        return found

    plain = total()
    assert torch.equal(plain, total())
    for p, kind, bits in ((first.weight, torch.int32, 32), (second.bias, torch.int16, 16)):
        for bit in range(bits):
            flip = torch.tensor(-(1 << (bits - 1)) if bit == bits - 1 else 1 << bit, dtype=kind)
            p.data.view(kind).view(-1)[1] ^= flip
            assert not torch.equal(plain, total()), (kind, bit)
            p.data.view(kind).view(-1)[1] ^= flip
    assert torch.equal(plain, total())


ATTEMPTS = """
import os, sys
from llm_from_scratch.cli.train import main_nanogpt
from llm_from_scratch.training import trainer

update = trainer.train_step

def dies_once(run, *batch):
    if os.environ["RANK"] == "1" and run.state.step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return update(run, *batch)

trainer.train_step = dies_once
sys.exit(main_nanogpt())
"""


STOPPED = """
import os, signal, sys
from llm_from_scratch.cli.train import main_nanogpt
from llm_from_scratch.training import muon

computed, steps = muon.orthogonalized, []

def stops(own):
    steps.append(0)
    if os.environ["RANK"] == "1" and len(steps) > 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    return computed(own)

muon.orthogonalized = stops
sys.exit(main_nanogpt())
"""
PLAIN = "import sys\nfrom llm_from_scratch.cli.train import main_nanogpt\nsys.exit(main_nanogpt())\n"


def _torchrun(*options: str, script: str = ATTEMPTS, **settings: Any) -> subprocess.Popen[str]:
    Path("script.py").write_text(script)
    given = arguments(**{**SETTINGS, **settings})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "script.py", *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_resumes_automatically(here: Path, tiny_data: Path) -> None:
    settings: dict[str, Any] = {"dataset": tiny_data, "dropout": 0.1, "max_iters": 8, "inclusive_max_iters": False}
    process = _torchrun("--max-restarts=1", out_dir="cut", **settings)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert re.search(r"^error: rank 1 \(.*, process \d+\) died at step 5, ", printed, re.MULTILINE), printed
    assert re.search(r"resuming from cut/step-0000000[24]", printed)  # the save of step 4 may have been cut short
    in_ranks(2, whole_run, here, str(here), arguments(**{**SETTINGS, **settings, "out_dir": "whole"}))
    one, other = (load_checkpoint(find_checkpoint(name, "last")) for name in ("whole", "cut"))
    assert one.step == other.step == 8 and all(torch.equal(one.model[name], other.model[name]) for name in one.model)


@pytest.mark.slow
def test_torchrun_does_not_wait_for_a_stopped_process(here: Path, tiny_data: Path) -> None:
    """It would for 30 seconds. Rank 0 waits for a matrix that rank 1 computes."""
    leaves = {"dataset": tiny_data, "out_dir": "run", "optimizer_type": "muon", "collective_timeout": 5.0}
    process = _torchrun(script=STOPPED, **leaves)
    begin, lines = 0.0, list[str]()
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("error: "):
            begin = time.monotonic()
    assert process.wait() == 1 and time.monotonic() - begin < 25, lines
    assert re.search(
        r"^error: rank 1 \(.*\) is stopped at step \d, .*, for \d+ s: resume", "".join(lines), re.MULTILINE
    )


SPENT = """
import os, sys, torch
from llm_from_scratch.cli.train import main_nanogpt
from llm_from_scratch.core.model import GPT

forward, seen = GPT.forward, []

def limited(model, idx, *others):
    if model.training and os.environ["RANK"] == "1":
        seen.append(idx)
        if len(seen) > 3 and len(idx) > 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
    return forward(model, idx, *others)

GPT.forward = limited
sys.exit(main_nanogpt())
"""


@pytest.mark.slow
def test_a_sharded_run_that_is_started_again_needs_less_memory(here: Path, tiny_data: Path) -> None:
    """From step 3 on, one process has memory for half a micro-batch."""
    settings: dict[str, Any] = {"dataset": tiny_data, "parallel": "fsdp", "inclusive_max_iters": False}
    process = _torchrun("--max-restarts=1", script=SPENT, out_dir="short", **settings)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "error: out of memory with 4 sequences at a time" in printed and "set --micro_batch=2" in printed
    assert "torchrun starts the run again, with 2 at a time" in printed
    assert "micro-batch: 2 of 4 sequences, because memory ran out" in printed and "resuming from short/" in printed
    in_ranks(2, whole_run, here, str(here), arguments(**{**SETTINGS, **settings, "out_dir": "roomy"}))
    one, other = (load_checkpoint(find_checkpoint(name, "last")) for name in ("roomy", "short"))
    assert one.step == other.step == 6 and other.trainer["machine"]["micro_batch"] == 2
    for name in one.model:
        torch.testing.assert_close(other.model[name], one.model[name], atol=1e-6, rtol=1e-5)
    assert not [path for path in Path("short").iterdir() if path.name.startswith(".micro")]


def whole_run(folder: str, argv: list[str]) -> int:
    os.chdir(folder)
    return main_nanogpt(argv)


@pytest.mark.slow
def test_processes_stop_when_their_launcher_is_gone(here: Path, tiny_data: Path) -> None:
    """After SIGKILL of torchrun they save and end. Its SIGTERM does the same, within its 30 seconds."""
    for signum, said in ((signal.SIGKILL, "is gone; stopping"), (signal.SIGTERM, "stopped at step")):
        leaves = {"dataset": tiny_data, "out_dir": f"run-{signum}", "max_iters": 10**6, "save_interval": 10**6}
        process = _torchrun(script=PLAIN, **leaves)
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            first = next(line for line in lines if line.startswith("iter 3:"))
            process.send_signal(signum)
            begin = time.monotonic()
            rest = first + "".join(lines)  # until the last process has closed it
            assert time.monotonic() - begin < 20 and said in rest and "stopped at step" in rest, rest
        finally:
            process.kill()
            process.wait()
        saved = find_checkpoint(f"run-{signum}", "last")
        assert f"stopped at step {load_checkpoint(saved).step};" in rest
