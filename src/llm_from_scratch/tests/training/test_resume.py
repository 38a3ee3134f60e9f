"""Resuming: what is kept, reported and refused; saving in a thread; one trainer per folder."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.checkpoint import store as checkpoints
from llm_from_scratch.checkpoint.store import Checkpoint, find_checkpoint, load_checkpoint
from llm_from_scratch.core.model import GPT, Linear
from llm_from_scratch.errors import TrainingError, UserError
from llm_from_scratch.kernels.products import name_of
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.machine import terminal
from llm_from_scratch.machine.files import FolderLock
from llm_from_scratch.training import evaluate, loggers, resume, trainer, wrap
from llm_from_scratch.training import plan as plans
from llm_from_scratch.training import run as runs
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.state import copied
from llm_from_scratch.training.trainer import train

from ..tiny import TOKENIZER, arguments, babble, read_metrics, tiny_config, write_data, write_ids

pytestmark = pytest.mark.usefixtures("here")


def test_each_difference_from_the_saved_settings_is_reported(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(tiny_data, out_dir="run"))
    capsys.readouterr()
    train(tiny_config(tiny_data, out_dir="run", init_from="resume"))
    assert "changed" not in capsys.readouterr().out and "not bit-exact" not in capsys.readouterr().out
    train(tiny_config(tiny_data, out_dir="run", init_from="resume", max_iters=9, learning_rate=0.02, eval_interval=3))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert told == [
        "changed since the checkpoint: max_iters 8 -> 9",
        "changed since the checkpoint: eval_interval 4 -> 3",
        "changed since the checkpoint: learning_rate 0.01 -> 0.02",
    ]


def test_the_layout_of_the_same_batch_may_change(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"out_dir": "run", "max_iters": 4, "batch_size": 8, "schedule": "constant"}
    train(tiny_config(tiny_data, **settings))
    capsys.readouterr()
    more = {**settings, "max_iters": 8, "init_from": "resume", "batch_size": 2, "gradient_accumulation_steps": 4}
    train(tiny_config(tiny_data, **more))
    assert "not bit-exact from here on: micro_batch 8 -> 2" in capsys.readouterr().out
    train(tiny_config(tiny_data, **{**settings, "init_from": "resume", "max_iters": 8}))  # and back
    assert "not bit-exact from here on: micro_batch 2 -> 8" in capsys.readouterr().out
    train(tiny_config(tiny_data, out_dir="whole", max_iters=8, batch_size=8, schedule="constant"))
    one, other = (load_checkpoint(find_checkpoint(name, "last")).model for name in ("run", "whole"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)


def test_choices_for_the_machine_are_used_again(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "cpu_has_native_bf16", lambda: False)
    settings = {"out_dir": "run", "dtype": "auto", "compile": "auto"}
    train(tiny_config(tiny_data, **settings))
    saved = load_checkpoint(find_checkpoint("run", "last"))
    machine = saved.trainer["machine"]
    assert machine == {
        "device": "cpu", "processor": torch.backends.cpu.get_cpu_capability(), "dtype": "float32", "compile": False,
        "fused": True, "micro_batch": 4, "threads": 1, "processes": 1, "torch": torch.__version__,
        "products": {}, "compiled_layers": [], "one_call": False,
    }  # fmt: skip

    def resolved(device: str = "cpu", **before: Any) -> tuple[runtimes.Runtime, list[str]]:
        other = dataclasses.replace(saved, trainer={"machine": {**machine, **before}})
        runtime = dataclasses.replace(runtimes.resolve(config.system), device=torch.device(device))
        return resume.same_machine(config, runtime, other), resume.not_bit_exact(machine, other)

    config = tiny_config(tiny_data, **settings)
    runtime, told = resolved(dtype="bfloat16", compile=True, threads=1)
    assert (runtime.dtype, runtime.compile, runtime.threads) == (torch.bfloat16, True, 1)
    assert runtime.reasons["dtype"] == "bfloat16 (as at the start of the run)"
    assert told == ["not bit-exact from here on: compile True -> False, dtype bfloat16 -> float32"]
    runtime, _ = resolved(device="mps", dtype="bfloat16")  # another device: chosen again
    assert runtime.dtype == torch.float32 and runtime.threads is None
    runtime, _ = resolved(threads=100_000)
    assert runtime.threads is None
    runtime, told = resolved(products={"16x64": "oto"})
    assert runtime.products == {"16x64": "oto"} and told == [
        "not bit-exact from here on: products {'16x64': 'oto'} -> {}"
    ]
    assert resolved(products={"16x64": "oto"}, processor="AVX1")[0].products is None
    runtime, told = resolved(one_call=True)
    assert runtime.one_call is True and told == ["not bit-exact from here on: one_call True -> False"]
    assert resolved()[0].one_call is False and resolved(one_call=True, processor="AVX1")[0].one_call is None
    before = {name: value for name, value in machine.items() if name != "one_call"}  # of an older version
    older = dataclasses.replace(saved, trainer={"machine": before})
    assert resume.same_machine(config, runtimes.resolve(config.system), older).one_call is False
    assert resume.not_bit_exact({**machine, "one_call": True}, older) == [
        "not bit-exact from here on: one_call False -> True"
    ]
    monkeypatch.setenv("LLM_KERNEL", "auto")
    assert resolved(compiled_layers=["Attention"])[0].compiled_layers
    for change in ({"dtype": "bfloat16"}, {"compile": True}):  # the layers in C are float32's, and not compiled
        assert not resolved(compiled_layers=["Attention"], **change)[0].compiled_layers
    monkeypatch.setenv("LLM_KERNEL", "torch")
    assert not resolved(compiled_layers=["Attention"])[0].compiled_layers
    config = tiny_config(tiny_data, **{**settings, "dtype": "float32", "compile": False, "threads": 2})
    runtime, _ = resolved(dtype="bfloat16", compile=True, threads=1)
    assert (runtime.dtype, runtime.compile, runtime.threads) == (torch.float32, False, 2)
    assert resolved(torch="1.0")[1] == [f"not bit-exact from here on: torch 1.0 -> {torch.__version__}"]
    (told_,) = resume.not_bit_exact(machine, Checkpoint(None, 0, saved.model_config, {}))
    assert told_ == "not bit-exact from here on: the checkpoint does not name the machine that made it"


def test_a_resumed_run_multiplies_by_the_same_libraries(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_onednn(model: GPT, rows: int, compiled: bool) -> dict[str, str]:
        return {name_of(m): "ooo" for m in model.modules() if isinstance(m, Linear)}

    monkeypatch.setattr(wrap, "fastest_libraries", all_onednn)
    settings = {"schedule": "constant", "dtype": "float32", "compile": False}
    train(tiny_config(tiny_data, **settings, out_dir="whole", max_iters=6))
    train(tiny_config(tiny_data, **settings, out_dir="run", max_iters=3))
    monkeypatch.setattr(wrap, "fastest_libraries", lambda *_: pytest.fail("measured again"))
    train(tiny_config(tiny_data, **settings, out_dir="run", max_iters=6, init_from="resume"))
    one, other = (load_checkpoint(find_checkpoint(name, "last")) for name in ("run", "whole"))
    assert one.trainer["machine"]["products"] == other.trainer["machine"]["products"] != {}
    assert all(torch.equal(one.model[name], other.model[name]) for name in other.model)


@pytest.mark.cases(2)
@pytest.mark.parametrize("where", ["first", "middle", "last", "val"])
def test_one_changed_token_is_noticed(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files of 800,000 bytes that are hashed whole, and at their ends if they are above the limit."""
    ids = np.tile(TOKENIZER.encode(babble(40_000)), 10)
    data = write_data(tmp_path / "data", train=ids, val=ids[:300_000])
    for limit in (1 << 30, 300_000):
        if limit < ids.nbytes and where not in ("first", "last"):
            continue
        monkeypatch.setattr(plans, "HASHED", limit)
        config = tiny_config(data, out_dir=f"run{limit}", max_iters=2)
        train(config)
        place = {"first": 0, "middle": 123_456, "last": len(ids) - 1, "val": 299_999}[where]
        path = data / ("val.bin" if where == "val" else "train.bin")
        tokens = np.fromfile(path, "<u2")
        tokens[place] ^= 1
        tokens.tofile(path)
        again = dataclasses.replace(config, training=dataclasses.replace(config.training, init_from="resume"))
        with pytest.raises(UserError, match="have changed since the run started"):
            train(again)
        tokens[place] ^= 1
        tokens.tofile(path)
        train(again)


# --- saving in a thread ---


def test_a_copy_is_out_of_reach_and_names_of_one_tensor_share_it() -> None:
    weight = torch.arange(4.0)
    state = {"head": weight, "embedding": weight, "part": weight[:2], "rest": [1, {"step": torch.tensor(3.0)}]}
    taken = copied(state)
    weight.zero_()
    state["rest"][1]["step"].add_(1)  # type: ignore[index]
    assert taken["head"].tolist() == [0, 1, 2, 3] and taken["head"] is taken["embedding"]
    assert taken["part"].tolist() == [0, 1] and taken["rest"][1]["step"].item() == 3
    assert taken["rest"][0] == 1


def test_training_continues_during_a_save(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save of step 4 waits until step 6 is done, and still holds the weights of step 4."""
    reached, save, update = threading.Event(), checkpoints.save_checkpoint, trainer.train_step

    def slow(*args: Any, **kwargs: Any) -> Path:
        assert kwargs["step"] != 4 or reached.wait(30)
        return save(*args, **kwargs)

    def updated(run: Run, x: torch.Tensor, y: torch.Tensor) -> None:
        update(run, x, y)
        if run.state.step == 6:
            reached.set()

    train(tiny_config(tiny_data, out_dir="plain", keep_last=9))
    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    monkeypatch.setattr(trainer, "train_step", updated)
    train(tiny_config(tiny_data, out_dir="slow", keep_last=9))
    for step in (4, 8):
        one, other = (load_checkpoint(find_checkpoint(name, step)) for name in ("plain", "slow"))
        assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
        assert one.trainer == {**other.trainer, "run_id": one.trainer["run_id"]}


def test_a_run_that_fails_waits_for_its_checkpoint(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, update, failed = checkpoints.save_checkpoint, trainer.train_step, threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Path:
        assert failed.wait(30)
        return save(*args, **kwargs)

    def fails(run: Run, x: torch.Tensor, y: torch.Tensor) -> None:
        if run.state.step == 5:
            failed.set()
            raise TrainingError("no more")
        update(run, x, y)

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    monkeypatch.setattr(trainer, "train_step", fails)
    with pytest.raises(TrainingError, match="no more"):
        train(tiny_config(tiny_data, out_dir="run"))
    assert find_checkpoint("run").name == "step-00000004"


def test_a_last_save_that_fails_is_tried_again(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = checkpoints.save_checkpoint, []

    def fails_once(*args: Any, **kwargs: Any) -> Path:
        calls.append(kwargs["step"])
        if len(calls) == 1:
            raise checkpoints.SaveError("no space left")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_checkpoint", fails_once)
    monkeypatch.setattr(runs, "estimate_loss", lambda *_: 1.0)
    config = tiny_config(tiny_data, out_dir="run", eval_interval=2, early_stopping_patience=1)
    assert train(config).exit_code == 0  # the run ends at the step whose save has failed
    assert calls == [2, 2] and find_checkpoint("run").name == "step-00000002"


def test_a_file_for_nanogpt_that_cannot_be_written_costs_no_checkpoint(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> Path:
        raise checkpoints.SaveError("no space left")

    monkeypatch.setattr(checkpoints, "write_nanogpt", full)
    assert train(tiny_config(tiny_data, out_dir="run", save_nanogpt_ckpt=True)).exit_code == 0
    told = capsys.readouterr().out
    assert told.count("warning: ckpt.pt is not written: no space left") == told.count("saved checkpoint run/step-") == 2
    assert find_checkpoint("run", "last").name == "step-00000008"


def test_a_save_without_enough_memory_prints_a_warning(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, calls = checkpoints.save_checkpoint, []

    def short(*args: Any, **kwargs: Any) -> Path:
        calls.append(kwargs["step"])
        if len(calls) == 1:
            raise MemoryError
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_checkpoint", short)
    assert train(tiny_config(tiny_data, out_dir="run")).exit_code == 0
    assert "warning: step 4 is not saved: out of memory" in capsys.readouterr().out and calls == [4, 8]


@pytest.mark.cases(1)
@pytest.mark.parametrize("at", [2, 5])
def test_data_that_fails_under_the_run_costs_no_step(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also before the first checkpoint."""
    data = write_data(tmp_path / "data")
    update = trainer.train_step

    def cuts(run: Run, x: torch.Tensor, y: torch.Tensor) -> None:
        update(run, x, y)
        if run.state.step == at:
            os.truncate(data / "train.bin", 100)
            run.loader.ahead = None

    whole = (data / "train.bin").read_bytes()
    train(tiny_config(data, out_dir="whole"))
    monkeypatch.setattr(trainer, "train_step", cuts)
    with pytest.raises(UserError, match=r"train.bin was truncated during the run"):
        train(tiny_config(data, out_dir="run"))
    monkeypatch.setattr(trainer, "train_step", update)
    assert find_checkpoint("run", "last").name == f"step-0000000{at}"
    (data / "train.bin").write_bytes(whole)
    train(tiny_config(data, out_dir="run", init_from="resume"))
    one, other = (load_checkpoint(find_checkpoint(name, "last")).model for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- a signal while the run evaluates ---


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends SIGTERM before the n-th batch that is evaluated from now on."""

    def arrange(batch: int) -> None:
        rest, windows = iter(range(1, 1000)), original

        def counted(*args: Any) -> Any:
            if next(rest) == batch:
                signal.raise_signal(signal.SIGTERM)
            return windows(*args)

        monkeypatch.setattr(evaluate, "loss_of", counted)

    original = evaluate.loss_of
    monkeypatch.setattr(evaluate, "windows_at_once", lambda *_: 2)
    return arrange


def test_an_evaluation_does_not_hold_up_a_signal(
    tiny_data: Path, signal_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight batches an evaluation: the fourth of step 4 is the last; step 4 is saved, and evaluated by the resume."""
    settings = {"dropout": 0.1, "keep_last": 9, "final_eval": True}
    train(tiny_config(tiny_data, out_dir="whole", **settings))
    assert train(tiny_config(tiny_data, out_dir="one", eval_only=True)).exit_code == 0
    signal_at(12)
    result = train(tiny_config(tiny_data, out_dir="cut", **settings))
    assert (result.exit_code, result.step) == (143, 4) and "stopped at step 4" in capsys.readouterr().out
    assert load_checkpoint(find_checkpoint("cut", 4)).manifest["val_loss"] is None
    signal_at(12)  # the evaluation of step 8
    more = tiny_config(tiny_data, out_dir="cut", init_from="resume", **settings)
    assert train(more).exit_code == 143 and find_checkpoint("cut", "last").name == "step-00000008"
    signal_at(9)  # the evaluation of the whole split: the run is complete
    assert train(more).exit_code == 143
    assert "the run is complete" in capsys.readouterr().out
    signal_at(1000)
    assert train(more).exit_code == 0
    for step in (4, 8):
        one, other = (load_checkpoint(find_checkpoint(name, step)) for name in ("whole", "cut"))
        assert one.manifest["val_loss"] == other.manifest["val_loss"]
        assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
    for key in ("loss", "val_loss", "val_loss_full"):
        one_, other_ = ([e[key] for e in read_metrics(Path(name)) if key in e] for name in ("whole", "cut"))
        assert one_ == other_, key
    signal_at(2)
    assert train(tiny_config(tiny_data, out_dir="one", eval_only=True)).exit_code == 143


def test_a_reader_that_leaves_does_not_lose_a_step(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def until_four(line: str, **_: Any) -> None:
        lines.append(line)
        if line.startswith("step 4/8  loss"):
            raise BrokenPipeError

    monkeypatch.setattr(terminal, "print", until_four, raising=False)
    result = train(tiny_config(tiny_data, out_dir="run"))
    assert (result.exit_code, result.step) == (141, 5) and lines[-1].startswith("step 4/8  loss")
    assert find_checkpoint("run", "last").name == "step-00000005"


# --- one trainer a folder ---

HOLD = """
import sys
from pathlib import Path
from llm_from_scratch.machine.files import FolderLock
lock = FolderLock(Path("run"))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_trainer_is_refused_and_a_dead_one_does_not_block(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="run", max_iters=4))
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for init_from in ("scratch", "resume"):
            with pytest.raises(UserError, match="another process is training in run: wait until it ends, stop it, or"):
                train(tiny_config(tiny_data, out_dir="run", init_from=init_from))
        train(tiny_config(tiny_data, out_dir="run", init_from="resume", eval_only=True))  # reads only
        train(tiny_config(tiny_data, out_dir="elsewhere"))
        assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} == before
        other.kill()
    assert train(tiny_config(tiny_data, out_dir="run", init_from="resume")).step == 8


def test_a_stored_network_service_must_be_requested_again(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_from_scratch.cli.train import main

    monkeypatch.setattr(loggers, "require", lambda *_: None)
    monkeypatch.setattr(loggers, "WandB", lambda *_: loggers.JsonLines(Path("wandb.jsonl"), None))
    train(tiny_config(tiny_data, out_dir="run", wandb_log=True))
    Path("wandb.jsonl").unlink()
    capsys.readouterr()
    assert main([f"--dataset={tiny_data}", "--out_dir=run", "--init_from=resume", "--max_iters=9"]) == 0
    assert "changed since the checkpoint: wandb_log True -> False" in capsys.readouterr().out
    assert not Path("wandb.jsonl").exists()


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "name, value",
    [("recent_losses", 5), ("recent_losses", [[1, "x"]]), ("data_shift", "a"), ("data_shift", 10**30),
     ("data_shift", -100), ("best_val_loss", "low"), ("rollbacks", []), ("evaluated_at", 0.5)],
)  # fmt: skip
def test_a_state_that_does_not_belong_to_a_run_is_refused(tiny_data: Path, name: str, value: Any) -> None:
    train(tiny_config(tiny_data, out_dir="run"))
    found = load_checkpoint(find_checkpoint("run", "last"))
    checkpoints.save_checkpoint(
        "bad", step=found.step, model_config=found.model_config, model=found.model, run_id="x", rng=found.rng,
        optimizer=found.optimizer, trainer={**found.trainer, name: value}, config=found.config,
        tokenizer=found.tokenizer, dataset_hash=found.manifest["dataset_sha256"],
    )  # fmt: skip
    with pytest.raises(UserError, match="does not hold the state of a run"):
        train(tiny_config(tiny_data, out_dir="bad", init_from="resume", max_iters=9))


def test_the_lock_is_released_at_the_end_and_after_a_failure(tiny_data: Path) -> None:
    with pytest.raises(UserError):
        train(tiny_config(tiny_data, out_dir="run", block_size=5000))
    assert not Path("run").exists()
    train(tiny_config(tiny_data, out_dir="run"))
    lock = FolderLock(Path("run"))
    lock.acquire()
    lock.acquire()  # its own
    lock.release()


def test_auto_resumes_and_never_starts_over_a_damaged_checkpoint(tiny_data: Path) -> None:
    from llm_from_scratch.cli.train import main

    words = [*arguments(dataset=tiny_data, out_dir="run", init_from="auto"), "--max_iters=4"]
    assert main(words) == 0 and find_checkpoint("run", "last").name == "step-00000004"
    assert main([*words, "--max_iters=6"]) == 0
    assert [e["step"] for e in read_metrics(Path("run")) if "loss" in e] == list(range(6))
    assert not list(Path("run").glob("previous-*"))
    assert train(tiny_config(tiny_data, out_dir="run", init_from="auto")).step == 8
    for folder in Path("run").glob("step-*"):
        (folder / "model.safetensors").write_bytes(b"")
    assert main(words) == 2 and not list(Path("run").glob("previous-*"))


def test_a_damaged_checkpoint_is_named_once_and_set_aside(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llm_from_scratch.cli.train import main

    train(tiny_config(tiny_data, out_dir="run"))
    weights = Path("run/step-00000008/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert main([f"--dataset={tiny_data}", "--out_dir=run", "--init_from=resume"]) == 0
    told = capsys.readouterr()
    assert told.err.count("warning: damaged checkpoint: run/damaged-step-00000008 (") == told.err.count("warning") == 1
    assert "resuming from run/step-00000004 at step 4" in told.out
    assert Path("run/damaged-step-00000008").is_dir() and find_checkpoint("run").name == "step-00000008"


def test_an_impossible_resume_creates_no_folder(tiny_data: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        make_plan(tiny_config(tiny_data, out_dir="none", init_from="resume"))
    with pytest.raises(UserError, match="no checkpoint"):
        train(tiny_config(tiny_data, out_dir="none", init_from="resume"))
    assert not Path("none").exists()
    for run in ("a", "b"):
        Path(run, "step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint none: there is no such folder or file; existing runs: a, b$"):
        find_checkpoint("none")


@pytest.mark.parametrize(("split", "named"), [("val", "the validation tokens"), ("train", "the training tokens")])
def test_the_split_that_changed_is_named(here: Path, split: str, named: str) -> None:
    data = write_data(here / "data")
    settings: dict[str, Any] = {"out_dir": "run", "max_iters": 4}
    train(tiny_config(data, **settings))
    path = data / f"{split}.bin"
    path.write_bytes(path.read_bytes()[2:] + b"\1\0")
    with pytest.raises(UserError, match=named):
        make_plan(tiny_config(data, **settings, init_from="resume"))
    allowed = make_plan(tiny_config(data, **settings, init_from="resume", allow_new_data=True))
    assert any(f"{named} have changed since the run started (--allow_new_data)" in note for note in allowed.notes)


@pytest.mark.slow
def test_ids_that_gpt2_does_not_have_are_named(here: Path) -> None:
    ids = [1, 2, 50256] * 20
    for split, largest in (("train", 50300), ("val", 50257)):
        data = write_data(here / split, tokenizer=None, train=ids, val=ids)
        assert not any("not a GPT-2 token" in note for note in make_plan(tiny_config(data)).notes)
        write_ids(data / f"{split}.bin", [*ids, largest])
        told = [note for note in make_plan(tiny_config(data)).notes if "not a GPT-2 token" in note]
        assert len(told) == 1 and f"({split}): id {largest} is not a GPT-2 token (0 to 50256)" in told[0]
    described = write_data(here / "described", tokenizer=None, train=[*ids, 50300], val=ids, vocab_size=50304)
    assert not any("not a GPT-2 token" in note for note in make_plan(tiny_config(described)).notes)


def test_samples_need_a_tokenizer(here: Path) -> None:
    data = write_data(here / "ids", tokenizer=None, train=[0, 1] * 30, val=[0, 1] * 30, vocab_size=2)
    with pytest.raises(UserError, match="the data's tokenizer is unknown: remove --sample_interval"):
        make_plan(tiny_config(data, sample_interval=1))
