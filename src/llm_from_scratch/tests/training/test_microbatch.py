"""training/microbatch.py and out-of-memory handling: the parts of a batch, the loss without full logits."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch import presets
from llm_from_scratch.checkpoint.store import load_checkpoint
from llm_from_scratch.config import Config, SystemConfig
from llm_from_scratch.core.model import Head
from llm_from_scratch.errors import MemoryShortError, PeerMemoryError, UserError
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.machine.memory import free_memory
from llm_from_scratch.training import microbatch as memory
from llm_from_scratch.training import saver as savers
from llm_from_scratch.training import trainer
from llm_from_scratch.training import wrap as parallel
from llm_from_scratch.training.microbatch import after_shortage, halved, largest_micro_batch, retry_smaller
from llm_from_scratch.training.plan import Plan
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train
from llm_from_scratch.training.wrap import loss_is_chunked

from ..tiny import read_metrics, tiny_config, write_data

RUNTIME = runtimes.resolve(SystemConfig(device="cpu", dtype="float32", compile=False))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the free memory, in bytes."""
    return lambda size: monkeypatch.setattr(memory, "free_memory", lambda device: size)


def test_memory_is_kept_if_twice_the_estimate_is_free(data: Path, free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = make_plan(tiny_config(data)).sizes.memory

    def kept(size: int | None, **leaves: Any) -> bool:
        free(size)
        return make_plan(tiny_config(data, **leaves)).keep_memory

    assert kept(2 * needed) and not kept(2 * needed - 1) and not kept(None)
    assert kept(0, keep_memory=True) and not kept(1 << 40, keep_memory=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert kept(4 * needed) and not kept(4 * needed - 1)


FAULTS = """
import resource, torch
from llm_from_scratch.machine.memory import keep_freed_memory
for keep in (False, True):
    keep_freed_memory(keep)
    for _ in range(16):  # the heap grows at first: small blocks lie between the large ones
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)  # 64 MiB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_kept_memory_is_not_fetched_from_the_system_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert kept < 100 < 1000 < returned


def gpt2(**leaves: Any) -> Config:
    return tiny_config(
        "none", **{"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, **leaves}
    )


def test_the_micro_batch_is_the_largest_part_that_fits(free: Any) -> None:
    on_gpu = dataclasses.replace(RUNTIME, device=torch.device("cuda"), dtype=torch.bfloat16)
    found = []
    for gib in (1, 6, 12, 24, 48, 96, 192):
        free(gib << 30)
        found.append(largest_micro_batch(gpt2(), on_gpu, 480))
    assert found[0] == 1 and found == sorted(found) and found[1] >= 2 and found[-1] == 60
    assert all(480 % size == 0 for size in found)
    free(24 << 30)
    assert largest_micro_batch(gpt2(chunked_loss=False), on_gpu, 480) < found[3]
    assert largest_micro_batch(gpt2(gradient_checkpointing=True), on_gpu, 480) > found[3]
    assert largest_micro_batch(gpt2(), on_gpu, 7) == 7
    free(None)
    assert largest_micro_batch(gpt2(), on_gpu, 480) == 60  # 61,440 tokens


def test_on_a_cpu_no_more_tokens_than_pay(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free(1 << 40)
    assert largest_micro_batch(gpt2(), RUNTIME, 480) == 4
    assert largest_micro_batch(gpt2(), RUNTIME, 9) == 3
    assert largest_micro_batch(gpt2(block_size=8192), RUNTIME, 480) == 1
    assert largest_micro_batch(gpt2(lora_rank=4, block_size=256), RUNTIME, 480) == 4
    free(8 << 30)
    alone = largest_micro_batch(gpt2(), RUNTIME, 480)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert largest_micro_batch(gpt2(), RUNTIME, 480) < alone


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="Linux only")
def test_free_memory_is_at_most_the_total() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None and 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_micro_batch_is_given_or_measured(data: Path, free: Any) -> None:
    def plan(**leaves: Any) -> Plan:
        return make_plan(tiny_config(data, batch_size=6, gradient_accumulation_steps=2, **leaves))

    assert (plan().micro_batch, plan().micro_steps) == (6, 2)
    assert (plan(micro_batch=4).micro_batch, plan(micro_batch=4).global_batch) == (4, 12)
    free(1 << 40)
    found = plan(micro_batch="auto")
    assert (found.micro_batch, found.micro_steps) == (12, 1)
    assert any("micro-batch: 12 of 12 sequences" in line for line in found.notes)
    free(1)
    assert plan(micro_batch="auto").micro_batch == 1
    with pytest.raises(UserError, match="micro_batch=5 does not divide the 12 sequences"):
        plan(micro_batch=5)


def test_a_resumed_run_keeps_its_measured_micro_batch(data: Path, free: Any) -> None:
    settings: dict[str, Any] = {"out_dir": "run", "batch_size": 6, "micro_batch": "auto"}
    free(1)
    train(tiny_config(data, **settings))
    free(1 << 40)
    resumed = {**settings, "init_from": "resume", "max_iters": 20}
    assert make_plan(tiny_config(data, **resumed)).micro_batch == 1
    assert make_plan(tiny_config(data, **{**resumed, "micro_batch": 3})).micro_batch == 3
    assert make_plan(tiny_config(data, **{**resumed, "batch_size": 4})).micro_batch == 4


def test_settings_are_read_from_a_command_line(data: Path) -> None:
    words = ["--micro_batch=auto", "--activation_budget=2", "--chunked_loss=True"]
    config = presets.parse(Config, words, prog="llm-train").tree
    assert (config.data.micro_batch, config.training.activation_budget, config.training.chunked_loss) == (
        "auto",
        2,
        True,
    )
    for wrong, told in (
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"activation_budget": 0.0}, "activation_budget=0"),
        ({"activation_budget": 1.0, "gradient_checkpointing": True}, "remove gradient_checkpointing"),
    ):
        with pytest.raises(UserError, match=told):
            make_plan(tiny_config(data, **wrong))


def test_the_loss_is_chunked_if_there_are_many_logits() -> None:
    assert loss_is_chunked(gpt2(), 1)
    assert not loss_is_chunked(gpt2(block_size=64), 1)
    assert loss_is_chunked(gpt2(block_size=64), 2)
    assert not loss_is_chunked(gpt2(vocab_size=65), 480)
    assert not loss_is_chunked(gpt2(chunked_loss=False), 480)
    assert loss_is_chunked(gpt2(vocab_size=65, chunked_loss=True), 1)


@pytest.mark.cases(1)
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "dropout": 0.2, "gradient_checkpointing": True}])
def test_a_run_without_logits_is_the_same_run(
    data: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(data, out_dir="plain", chunked_loss=False, **changes))
    forward, shapes = Head.forward, list[Any]()

    def counted(self: Head, x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape[:2])
        return forward(self, x)

    monkeypatch.setattr(Head, "forward", counted)
    train(tiny_config(data, out_dir="chunked", chunked_loss=True, **changes))
    assert (4, 8) not in shapes  # no logits of a batch: kernels.swap compares one sequence
    train(tiny_config(data, out_dir="whole", chunked_loss=False, **changes))
    assert (4, 8) in shapes
    for a, b in zip(read_metrics(Path("plain")), read_metrics(Path("chunked")), strict=True):
        for key in {"loss", "train_loss", "val_loss", "grad_norm"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5), key


def test_a_choice_is_announced(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_config(data, out_dir="small"))
    assert "loss: computed in chunks" not in capsys.readouterr().out
    monkeypatch.setattr(parallel, "MANY_IDS", 1)
    monkeypatch.setattr(parallel, "MANY_LOGITS", 1)
    train(tiny_config(data, out_dir="large"))
    assert "loss: computed in chunks (vocabulary 20; --chunked_loss)" in capsys.readouterr().out


def test_memory_that_runs_out_after_unscaling_costs_no_step(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16: the second try unscales again."""
    settings: dict[str, Any] = {"dtype": "float16", "device": "cpu"}
    train(tiny_config(data, out_dir="roomy", micro_batch=2, **settings))
    clip, calls = trainer.clip_gradients, []

    def fails_once(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return clip(*args)

    monkeypatch.setattr(trainer, "clip_gradients", fails_once)
    train(tiny_config(data, out_dir="tight", **settings))
    one, other = (load_checkpoint(Path(name) / "step-00000008") for name in ("roomy", "tight"))
    assert one.trainer["scaler"] == other.trainer["scaler"] and one.trainer["machine"] == other.trainer["machine"]
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)


@pytest.mark.parametrize(
    "error, reason", [(MemoryError(), "MemoryError"), (MemoryError("no room"), "no room"), (PeerMemoryError(), "")]
)
def test_only_another_processs_memory_error_lacks_a_reason(error: MemoryError, reason: str) -> None:
    """A process that ran short itself takes part in the exchange in which the others learn it."""
    attempts, reasons = [error], list[str]()

    def attempt() -> None:
        if attempts:
            raise attempts.pop()

    retry_smaller(attempt, reasons.append)
    assert reasons == [reason]


def test_a_save_does_not_copy_if_memory_is_short(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[str] = []
    copied = savers.copied
    monkeypatch.setattr(savers, "copied", lambda value: copies.append("one") or copied(value))  # type: ignore[func-returns-value]
    train(tiny_config(data, out_dir="roomy"))
    assert copies
    copies.clear()
    monkeypatch.setattr(savers, "free_memory", lambda device: 1000)
    train(tiny_config(data, out_dir="tight"))
    assert not copies
    for step in (4, 8):
        one, other = (load_checkpoint(Path(name) / f"step-{step:08d}") for name in ("roomy", "tight"))
        assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
        assert one.optimizer is not None and other.optimizer is not None
        for name, slots in one.optimizer["state"].items():
            assert all(torch.equal(slots[slot], other.optimizer["state"][name][slot]) for slot in slots)


def test_a_plan_counts_no_logits_if_the_loss_is_chunked(data: Path) -> None:
    """Its sizes are what the automatic micro-batch compares with the free memory, and what an error names."""
    whole, chunked = (make_plan(tiny_config(data, batch_size=64, chunked_loss=setting)) for setting in (False, True))
    model, tokens = whole.config.model, 64 * whole.config.model.block_size
    assert model.vocab_size is not None
    logits = tokens * model.vocab_size * (4 + 8)  # with their float32 log-softmax and gradient
    head = 8 * model.vocab_size * model.n_embd  # its gradient, and a scaled copy
    assert whole.sizes.activations - logits == chunked.sizes.activations - head


@pytest.fixture
def short(data: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run that torchrun has started again, because memory ran out with 4 sequences."""
    for name, value in {"RUN_ID": "one", "MAX_RESTARTS": "2", "RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    settings: dict[str, Any] = {"out_dir": "run", "batch_size": 8, "micro_batch": 4}
    plan = make_plan(tiny_config(data, **settings, gradient_accumulation_steps=2))
    Path("run").mkdir()
    with pytest.raises(MemoryShortError, match="torchrun starts the run again, with 2 at a time"):
        halved(dataclasses.replace(plan, runtime=dataclasses.replace(plan.runtime, world_size=2)), 4, "", False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    return settings


def test_restarts_need_less_memory_until_a_checkpoint_stores_the_micro_batch(
    data: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans, as of a rehearsal, and restarts for another reason do not forget it."""
    assert make_plan(tiny_config(data, **short)).micro_batch == 4

    def fails(*_: Any) -> None:
        raise RuntimeError("another reason")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="another reason"):
        patch.setattr(trainer, "train_step", fails)
        train(tiny_config(data, **short))
    assert Path("run", memory.SHORT).is_file()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    plan = after_shortage(make_plan(tiny_config(data, **short)))
    assert plan.micro_batch == 2 and "micro-batch: 2 of 8 sequences, because memory ran out" in plan.notes
    train(tiny_config(data, **short))
    assert load_checkpoint(Path("run/step-00000008")).trainer["machine"]["micro_batch"] == 2
    assert not Path("run", memory.SHORT).exists()


def test_a_save_before_the_shortage_does_not_forget_it(
    data: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may end after another process has run out of memory. A later start of torchrun begins as set."""
    memory.forget_shortage(Path("run"), 4)
    assert after_shortage(make_plan(tiny_config(data, **short))).micro_batch == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert after_shortage(make_plan(tiny_config(data, **short))).micro_batch == 4
    memory.forget_shortage(Path("run"), 4)
    assert not Path("run", memory.SHORT).exists()
