"""training/trainer.py: a resumed run equals an uninterrupted one; logging and samples change nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.checkpoint import store as checkpoints
from llm_from_scratch.checkpoint.store import Checkpoint, find_checkpoint, list_checkpoints, load_checkpoint
from llm_from_scratch.config import Config
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import ByteTokenizer, CharTokenizer
from llm_from_scratch.errors import TrainingError, UserError
from llm_from_scratch.training import run as runs
from llm_from_scratch.training import saver as savers
from llm_from_scratch.training import setup, trainer
from llm_from_scratch.training import wrap as parallel
from llm_from_scratch.training.plan import describe
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.signals import StopRequest
from llm_from_scratch.training.trainer import train

from ..forked import Forked
from ..tiny import LETTERS, TOKENIZER, arguments, babble, read_metrics, slow_except, tiny_config, write_data

Stop = Callable[[int], None]


@pytest.fixture(autouse=True)
def _here(here: Path) -> None:
    """Every run writes below an empty folder."""


@pytest.fixture
def short_data(tmp_path: Path) -> Path:
    """300 tokens: an epoch of 36 windows, so that runs of few steps cross its border."""
    ids = TOKENIZER.encode(babble(300))
    return write_data(tmp_path / "short", train=ids, val=ids[:60])


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Lets runs end as by a signal, after the update that makes the given step."""

    seen: list[Run] = []
    build = Run.__init__

    def remember(self: Run, *args: Any) -> None:
        build(self, *args)
        seen.append(self)

    def arrange(step: int) -> None:
        def agreed(self: StopRequest) -> bool:
            self.signum = signal.SIGTERM if seen[-1].state.step == step else None
            return self.signum is not None

        monkeypatch.setattr(Run, "__init__", remember)
        monkeypatch.setattr(StopRequest, "agreed", agreed)

    return arrange


@pytest.fixture
def val_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Scripts the validation losses of a run's evaluations."""

    def script(*values: float) -> None:
        rest = iter(values)
        monkeypatch.setattr(
            runs, "estimate_loss", lambda model, data, *_: next(rest) if data.name.endswith("(val)") else 1.0
        )

    return script


def saved(out_dir: str | Path, which: str | int = "last") -> Checkpoint:
    return load_checkpoint(find_checkpoint(out_dir, which))


def steps_kept(out_dir: str | Path) -> list[int]:
    return [step for step, _ in list_checkpoints(out_dir)]


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name."""
    found = {f"model.{name}": t for name, t in checkpoint.model.items()}
    assert checkpoint.optimizer is not None
    for name, slots in checkpoint.optimizer["state"].items():
        found |= {f"optimizer.{name}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    return found | {f"rng.{name}": t for name, t in checkpoint.rng.items()}


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert one.trainer | {"run_id": ""} == other.trainer | {"run_id": ""}
    assert one.manifest["val_loss"] == other.manifest["val_loss"] and one.step == other.step


def assert_same_weights(one: Checkpoint, other: Checkpoint) -> None:
    assert [name for name in one.model if not torch.equal(one.model[name], other.model[name])] == []


def losses(out_dir: str | Path, key: str = "loss") -> list[tuple[int, float]]:
    """(step, loss) of every line that has one, in the file's order."""
    return [(entry["step"], entry[key]) for entry in read_metrics(Path(out_dir)) if key in entry]


# --- resuming ---

RUNS: dict[str, dict[str, Any]] = {
    "float32_random": {"dropout": 0.2, "gradient_accumulation_steps": 2},
    "float32_shuffled": {"dropout": 0.2, "sample_order": "shuffled", "stride": 5, "fused": "off"},
    "bfloat16": {"dropout": 0.1, "dtype": "bfloat16", "sample_order": "shuffled", "gradient_checkpointing": True},
    "float16": {"dropout": 0.1, "dtype": "float16", "gradient_accumulation_steps": 2, "sample_order": "shuffled"},
    "float16_unclipped": {"dtype": "float16", "grad_clip": 0.0, "schedule": "wsd", "learning_rate": 3e-3},
    "modern": {
        "pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1, "qk_norm": True,
        "tie_embeddings": False, "dropout": 0.1,
    },
}  # fmt: skip


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", slow_except(RUNS, "float32_random", "bfloat16", "modern"))
def test_a_cut_run_is_bit_for_bit_the_whole_one(name: str, short_data: Path, stop_at: Stop) -> None:
    """Cut inside an epoch, and the rest cut again at a step that is evaluated."""
    settings = {**RUNS[name], "max_iters": 12, "eval_interval": 4, "keep_last": 9, "batch_size": 6}
    stop_at(-1)
    whole = train(tiny_config(short_data, out_dir="whole", **settings))
    assert (whole.step, whole.exit_code) == (12, 0)
    stop_at(3)
    assert train(tiny_config(short_data, out_dir="cut", **settings)).exit_code == 143
    for cut in (8, -1):
        stop_at(cut)
        result = train(tiny_config(short_data, out_dir="cut", init_from="resume", **settings))
    assert result.step == 12 and steps_kept("cut") == [3, 4, 8, 12]
    for step in (4, 8, 12):
        assert_same(saved("whole", step), saved("cut", step))
    assert losses("cut") == losses("whole") and [step for step, _ in losses("cut")] == list(range(12))
    for key in ("train_loss", "val_loss", "grad_norm", "lr"):
        assert losses("cut", key) == losses("whole", key)
    assert saved("cut").manifest["run_id"] == saved("cut", 3).manifest["run_id"]
    if name == "float16":
        assert saved("cut").trainer["scaler"]["scale"] > 0
    torch.manual_seed(0)
    assert len({value for _, value in losses("cut")}) == 12


def test_a_run_that_died_between_checkpoints_repeats_no_line(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"dropout": 0.2, "max_iters": 10, "eval_interval": 5, "save_interval": 4, "keep_last": 9}
    train(tiny_config(tiny_data, out_dir="whole", **settings))
    update = trainer.train_step

    def dies(run: Run, x: torch.Tensor, y: torch.Tensor) -> Any:
        if run.state.step == 7:
            with (run.out_dir / "metrics.jsonl").open("a") as file:
                file.write('{"step": 6, "lo')  # what a kill leaves
            raise RuntimeError("power cut")
        return update(run, x, y)

    monkeypatch.setattr(trainer, "train_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny_config(tiny_data, out_dir="died", **settings))
    assert steps_kept("died")[-1] in (4, 5)
    monkeypatch.setattr(trainer, "train_step", update)
    train(tiny_config(tiny_data, out_dir="died", init_from="resume", **settings))
    assert_same(saved("whole"), saved("died"))
    assert losses("died") == losses("whole")
    assert losses("died", "val_loss") == losses("whole", "val_loss")


def test_a_cut_at_an_evaluation_does_not_lose_the_best(
    tiny_data: Path, stop_at: Stop, val_losses: Callable[..., None]
) -> None:
    """The checkpoint of the cut was not evaluated; the one that the resumed run evaluates there is the best."""
    settings = {"max_iters": 12, "always_save_checkpoint": False, "keep_last": 1}
    script = (3.0, 1.5, 2.5, 2.0)  # at 0, 4, 8, 12
    stop_at(-1)
    val_losses(*script)
    train(tiny_config(tiny_data, out_dir="whole", **settings))
    val_losses(*script)
    stop_at(4)
    train(tiny_config(tiny_data, out_dir="cut", **settings))
    stop_at(-1)
    train(tiny_config(tiny_data, out_dir="cut", init_from="resume", **settings))
    assert steps_kept("whole") == [4, 12]
    assert steps_kept("cut") == [4, 12] and saved("cut", "best").step == 4
    assert saved("cut", 4).manifest["val_loss"] == 1.5
    assert_same(saved("whole", 4), saved("cut", 4))


def test_a_finished_run_continues_if_max_iters_is_raised(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"out_dir": "run", "schedule": "constant"}
    train(tiny_config(tiny_data, **settings))
    before = saved("run")
    result = train(tiny_config(tiny_data, init_from="resume", **settings))
    assert "already finished (step 8 of 8). To train longer, raise --max_iters." in capsys.readouterr().out
    assert result.step == 8
    assert_same(before, saved("run"))
    train(tiny_config(tiny_data, init_from="resume", max_iters=11, **settings))
    assert [step for step, _ in losses("run")] == list(range(11))
    train(tiny_config(tiny_data, out_dir="whole", schedule="constant", max_iters=11))
    assert_same_weights(saved("run"), saved("whole"))


def test_resuming_with_another_shape_is_refused_on_the_command_line_and_announced_elsewhere(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="run"))
    changed = tiny_config(tiny_data, out_dir="run", init_from="resume", n_layer=2, max_iters=9)
    with pytest.raises(UserError, match="--n_layer=2 contradicts the loaded weights, which have 1; remove it"):
        make_plan(changed, {"n_layer": "command line"})
    plan = make_plan(changed, {"n_layer": "some.yaml"})
    assert plan.config.model.n_layer == 1 and "set by the loaded weights: n_layer=1" in plan.notes
    assert changed.model.n_layer == 2  # the caller's settings are the caller's


def test_rotary_weights_continue_with_a_longer_context(tiny_data: Path) -> None:
    """As asked for on the command line, with a scaling. A learned table has no more rows."""
    train(tiny_config(tiny_data, out_dir="short", pos_embedding="rope"))
    longer = {"block_size": 24, "rope_scaling": "yarn", "rope_factor": 3.0, "rope_original": 8}
    asked = tiny_config(tiny_data, out_dir="long", init_from="short", pos_embedding="rope", **longer)
    sources = dict.fromkeys(longer, "command line")
    plan = make_plan(asked, sources)
    found = {name: getattr(plan.config.model, name) for name in longer}
    assert found == longer and "block_size: 24 instead of the 8 of the weights" in plan.notes
    train(asked, sources)
    assert {name: getattr(saved("long").model_config, name) for name in longer} == longer
    train(tiny_config(tiny_data, out_dir="table"))
    with pytest.raises(UserError, match="--block_size=24 contradicts the loaded weights, which have 8"):
        make_plan(tiny_config(tiny_data, out_dir="x", init_from="table", block_size=24), {"block_size": "command line"})


# --- what must not matter ---


def test_watching_changes_nothing(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="plain", dropout=0.2, max_iters=9))
    train(
        tiny_config(
            tiny_data, out_dir="some/where/else", dropout=0.2, max_iters=9, eval_interval=2, eval_iters=7,
            log_interval=4, save_interval=3, keep_last=1, keep_every=6, sample_interval=2, final_eval=True,
            early_stopping_patience=50, always_save_checkpoint=False, tensorboard=True, loss_plot=True,
            max_new_tokens=5, save_nanogpt_ckpt=True,
        )  # fmt: skip
    )
    assert_same_weights(saved("plain"), saved("some/where/else"))
    a, b = tensors(saved("plain")), tensors(saved("some/where/else"))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    out = Path("some/where/else")
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (out / "ckpt.pt").is_file()
    assert [step for step, _ in losses(out)] == [0, 4, 8]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 2, 4, 6, 8, 9]


def test_the_caller_sees_no_change_of_its_random_numbers_in_the_weights(tiny_data: Path) -> None:
    torch.manual_seed(1)
    train(tiny_config(tiny_data, out_dir="a", dropout=0.2))
    torch.manual_seed(2)
    train(tiny_config(tiny_data, out_dir="b", dropout=0.2))
    train(tiny_config(tiny_data, out_dir="c", dropout=0.2, seed=3))
    assert_same_weights(saved("a"), saved("b"))
    assert losses("a") != losses("c")


@pytest.mark.cases(1)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulated_batches_are_one_batch(tiny_data: Path, batch_size: int, accumulation: int) -> None:
    train(tiny_config(tiny_data, out_dir="one", batch_size=8))
    train(tiny_config(tiny_data, out_dir="parts", batch_size=batch_size, gradient_accumulation_steps=accumulation))
    for (_, one), (_, parts) in zip(losses("one"), losses("parts"), strict=True):
        assert parts == pytest.approx(one, abs=1e-5)


def test_gradient_checkpointing_is_the_same_arithmetic(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="plain", dropout=0.2, n_layer=2))
    train(tiny_config(tiny_data, out_dir="less", dropout=0.2, n_layer=2, gradient_checkpointing=True))
    assert_same_weights(saved("plain"), saved("less"))


def test_training_equals_its_parts_written_out(tiny_data: Path) -> None:
    """The loop against its own naive version: model, batches, clipping, AdamW, schedule."""
    config = tiny_config(tiny_data, out_dir="run", gradient_accumulation_steps=3, grad_clip=0.05, weight_decay=0.3)
    train(config)
    plan = make_plan(config)
    torch.manual_seed(config.system.seed)
    model = GPT(plan.config.model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.3},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1.0, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    found = []
    for step, lr in enumerate([1e-2 / 3, 2e-2 / 3, 1e-2, 0.00939711, 0.00775, 0.0055, 0.00325, 0.00160289]):
        window = torch.from_numpy(plan.train_data.windows(plan.order.starts(step, 12), 9))
        loss = model(window[:, :-1], window[:, 1:])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        found.append((step, pytest.approx(loss.item(), abs=1e-5)))
    assert losses("run") == found
    assert losses("run")[-1][1] < losses("run")[0][1]


# --- length ---


def test_max_iters_counts_updates_and_nanogpts_count_is_one_more(tiny_data: Path) -> None:
    assert train(tiny_config(tiny_data, out_dir="ours", max_iters=5)).checkpoint == Path("ours/step-00000005")
    assert train(tiny_config(tiny_data, out_dir="theirs", max_iters=5, inclusive_max_iters=True)).step == 6
    assert [step for step, _ in losses("theirs")] == [0, 1, 2, 3, 4, 5]
    assert losses("ours") == losses("theirs")[:5]
    assert train(tiny_config(tiny_data, out_dir="none", max_iters=0)).step == 0 and steps_kept("none") == []


def notes_of(data: Path, **settings: Any) -> list[str]:
    return [line for line in describe(make_plan(tiny_config(data, **settings))) if line.startswith("note: ")]


def test_too_little_text_is_reported(short_data: Path) -> None:
    """300 tokens. A block has 12 * n_embd^2 weights, the norms 3 * n_embd, the head one row a letter."""
    shape = {"n_layer": 1, "n_head": 1, "bias": False, "epochs": 1.0}
    size, ways = 12 * 8**2 + 3 * 8 + len(LETTERS) * 8, "use a smaller model or more text"
    assert notes_of(short_data, n_embd=4, **shape) == []
    assert notes_of(short_data, n_embd=8, **shape) == [
        f"note: {size} parameters (no embeddings) exceed 300 training tokens: {ways}"
    ]
    assert notes_of(short_data, n_embd=4, max_ngram=3, **shape) == []  # tables are only looked up
    assert notes_of(short_data, n_embd=4, **{**shape, "epochs": 10.5})[0].startswith("note: 11 epochs")


def test_epochs_are_passes_over_the_tokens(short_data: Path) -> None:
    # 300 tokens in windows of 8, of which the last needs a target more and the first 7 may be skipped: 36 windows
    config = tiny_config(short_data, epochs=2.0, sample_order="shuffled", batch_size=5)
    plan = make_plan(config)
    assert plan.order.windows_per_epoch == 36 and plan.last_step == 15 == plan.config.training.max_iters  # 72 / 5
    assert plan.config.training.epochs is None and "length: 15 steps, 2.00 epochs" in describe(plan)
    assert make_plan(tiny_config(short_data, epochs=1.0, batch_size=5)).last_step == 8  # 300 / 40
    result = train(config)
    assert result.step == 15
    seen = [int(s) for step in range(15) for s in plan.order.starts(step, 5)]
    assert len(set(seen[:36])) == 36


def test_early_stopping_counts_evaluations_without_gain(
    tiny_data: Path, val_losses: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    val_losses(3.0, 2.0, 2.5, 2.0, 9.0)
    settings = {"max_iters": 100, "eval_interval": 2, "early_stopping_patience": 2, "out_dir": "run"}
    result = train(tiny_config(tiny_data, **settings))
    assert result.step == 6 and result.best_val_loss == 2.0  # best at 2; 4 and 6 brought nothing
    assert "stopping early: 2 evaluations without a better val loss than 2.0000" in capsys.readouterr().out
    val_losses()  # no further evaluation: a resumed run knows that it had stopped
    assert train(tiny_config(tiny_data, init_from="resume", **settings)).step == 6


# --- what is kept ---


def test_best_last_and_every_nth_are_kept(tiny_data: Path, val_losses: Callable[..., None]) -> None:
    val_losses(5.0, 3.0, 4.0, 4.1, 4.2, 4.3, 4.4)
    train(tiny_config(tiny_data, out_dir="run", max_iters=12, eval_interval=2, keep_last=2, keep_every=6))
    assert steps_kept("run") == [2, 6, 10, 12]
    assert find_checkpoint("run", "best").name == "step-00000002"
    assert find_checkpoint("run").name == "step-00000012"


def test_only_improvements_are_saved_if_requested(tiny_data: Path, val_losses: Callable[..., None]) -> None:
    val_losses(5.0, 6.0, 3.0, 4.0, 4.1)
    train(
        tiny_config(tiny_data, out_dir="run", max_iters=8, eval_interval=2, always_save_checkpoint=False, keep_last=9)
    )
    assert steps_kept("run") == [4, 8]  # the best, and the final one
    assert find_checkpoint("run").name == "step-00000004"
    assert find_checkpoint("run", "last").name == "step-00000008"


def test_save_interval_is_apart_from_eval_interval(tiny_data: Path, val_losses: Callable[..., None]) -> None:
    val_losses(5.0, 6.0, 7.0, 8.0)
    train(tiny_config(tiny_data, out_dir="run", max_iters=10, eval_interval=4, save_interval=3, keep_last=9))
    assert steps_kept("run") == [3, 6, 9, 10]
    with_loss = [step for step in steps_kept("run") if saved("run", step).manifest["val_loss"] is not None]
    assert with_loss == [10]


def test_a_checkpoint_is_complete(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="run", vocab_size=24))
    found = saved("run")
    assert found.tokenizer is not None and found.tokenizer.fingerprint() == TOKENIZER.fingerprint()
    assert found.config["optimizer"]["learning_rate"] == 1e-2 and found.config["data"]["dataset"] == str(tiny_data)
    assert found.model_config.vocab_size == 24 and found.trainer["step"] == found.step == 8
    assert found.manifest["dataset_sha256"] == make_plan(tiny_config(tiny_data)).hashes[1]
    model = GPT(found.model_config)
    model.load_state_dict(found.model)


def test_a_disk_that_fails_once_does_not_end_the_run(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, calls = checkpoints.save_checkpoint, []

    def fails_first(*args: Any, **kwargs: Any) -> Path:
        calls.append(kwargs["step"])
        if len(calls) == 1:
            raise checkpoints.SaveError("no space left")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_checkpoint", fails_first)
    assert train(tiny_config(tiny_data, out_dir="run")).step == 8
    assert "warning: step 4 is not saved: no space left" in capsys.readouterr().out
    assert calls == [4, 8] and steps_kept("run") == [8]


def test_a_last_state_that_is_not_saved_shows_in_the_exit_code(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoints.save_checkpoint

    def fails_last(*args: Any, **kwargs: Any) -> Path:
        if kwargs["step"] == 8:
            raise checkpoints.SaveError("no space left")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_checkpoint", fails_last)
    assert train(tiny_config(tiny_data, out_dir="run")).exit_code == 1
    assert steps_kept("run") == [4]


def test_other_training_tokens_are_refused_unless_allowed(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_config(tiny_data, out_dir="run"))
    other = write_data(tmp_path / "other", train=[5, 6, 7] * 300, val=[5, 6, 7] * 30)
    more = {"out_dir": "run", "init_from": "resume", "max_iters": 9}
    with pytest.raises(UserError, match="have changed since the run started"):
        train(tiny_config(other, **more))
    assert steps_kept("run") == [4, 8]
    assert train(tiny_config(other, **more, allow_new_data=True)).step == 9


# --- concurrent runs ---


def test_a_new_run_moves_the_earlier_one_aside(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(tiny_data, out_dir="run", max_iters=6, tensorboard=True))
    first = saved("run")
    Path("run/notes.txt").write_text("mine")
    capsys.readouterr()
    train(tiny_config(tiny_data, out_dir="run", max_iters=5, seed=1))
    folder = Path("run") / f"previous-{first.manifest['run_id']}"
    assert f"run contained an earlier run, moved to {folder}" in capsys.readouterr().out
    assert_same(load_checkpoint(folder / "step-00000006"), first)
    assert steps_kept("run") == [4, 5] and [step for step, _ in losses("run")] == [0, 1, 2, 3, 4]
    assert [step for step, _ in losses(folder)] == [0, 1, 2, 3, 4, 5]
    assert Path("run/notes.txt").read_text() == "mine"
    assert saved("run").manifest["run_id"] != first.manifest["run_id"]


def test_nothing_is_moved_if_the_new_run_cannot_start(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="run"))
    before = snapshot(Path("run"))
    mistakes: list[dict[str, Any]] = [{"block_size": 5000}, {"n_head": 3}, {"dataset": "no"}, {"init_from": "no"}]
    for bad in mistakes:
        with pytest.raises(UserError):
            train(tiny_config(**{"dataset": tiny_data, "out_dir": "run", **bad}))
    assert snapshot(Path("run")) == before


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its time and content."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in sorted(folder.rglob("*"))}


def test_weights_of_another_run_start_a_new_one_at_step_0(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="first"))
    source = saved("first")
    for init_from in ("first", "first/step-00000008"):
        train(tiny_config(tiny_data, out_dir="second", init_from=init_from, max_iters=3, eval_interval=1, seed=9))
        entries = read_metrics(Path("second"))
        assert [step for step, _ in losses("second")] == [0, 1, 2]
        assert entries[0]["step"] == 0 and entries[0]["val_loss"] == source.manifest["val_loss"]
        assert saved("second").manifest["run_id"] != source.manifest["run_id"]
        assert all(int(slots["step"]) == 3 for slots in saved("second").optimizer["state"].values())  # type: ignore
    # into its own folder: the weights are read before the run that they come from is moved
    train(tiny_config(tiny_data, out_dir="first", init_from="first", max_iters=2, eval_interval=1))
    assert read_metrics(Path("first"))[0]["val_loss"] == source.manifest["val_loss"]
    assert Path(f"first/previous-{source.manifest['run_id']}/step-00000008").is_dir()
    plan = make_plan(tiny_config(tiny_data, init_from="first", block_size=4))
    assert plan.config.model.block_size == 4 and plan.weights is not None
    assert plan.weights["transformer.wpe.weight"].shape == (4, 16)
    GPT(plan.config.model).load_state_dict(plan.weights)


def test_another_tokenizer_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_config(tiny_data, out_dir="run"))
    other = write_data(tmp_path / "other", tokenizer=CharTokenizer.from_text([LETTERS[:-1] + "z"]))
    bytes_ = write_data(tmp_path / "bytes", tokenizer=ByteTokenizer())
    for folder, name in ((other, "char"), (bytes_, "byte")):
        for changes in ({"init_from": "run", "out_dir": "new"}, {"init_from": "resume", "out_dir": "run"}):
            with pytest.raises(UserError, match=f"was made with the tokenizer {name}"):
                train(tiny_config(folder, **changes))
    assert not Path("new").exists()


def test_evaluating_only_changes_no_file(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(tiny_data, out_dir="run", tensorboard=True))
    before = snapshot(Path.cwd())
    capsys.readouterr()
    result = train(tiny_config(tiny_data, out_dir="run", init_from="resume", eval_only=True, tensorboard=True))
    assert result.exit_code == 0 and result.step == 8
    expected = (
        f"step 8/8  train loss {losses('run', 'train_loss')[-1][1]:.4f}"
        f"  val loss {losses('run', 'val_loss')[-1][1]:.4f}"
    )
    assert expected in capsys.readouterr().out.splitlines()
    train(tiny_config(tiny_data, out_dir="fresh", eval_only=True))
    assert "step 0/8  train loss" in capsys.readouterr().out
    assert snapshot(Path.cwd()) == before


# --- what goes wrong ---


def test_a_nan_loss_stops_the_run(tiny_data: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+ .*Try --learning_rate=3e\+18"):
        train(tiny_config(tiny_data, out_dir="run", learning_rate=1e19, max_iters=50, eval_interval=1, keep_last=9))
    assert all(torch.isfinite(t).all() for step in steps_kept("run") for t in saved("run", step).model.values())
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])  # whole lines


def test_an_error_closes_the_log_and_the_worker(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    for kind in (runs.RunLog, runs.BatchLoader):
        monkeypatch.setattr(kind, "close", lambda self, *step, kind=kind: closed.append(kind.__name__))
    with pytest.raises(TrainingError):
        train(tiny_config(tiny_data, learning_rate=1e30, max_iters=50))
    assert set(closed) == {"RunLog", "BatchLoader"}


def test_a_sample_prompt_that_cannot_be_encoded_is_refused_before_the_run(tmp_path: Path) -> None:
    ids = [1, 2] * 50
    data = write_data(tmp_path / "data", train=ids, val=ids, tokenizer=CharTokenizer.from_text(["abc"]))
    with pytest.raises(UserError, match="--start"):
        train(tiny_config(data, sample_interval=1, start="d"))
    assert not Path("out").exists()
    train(tiny_config(data, sample_interval=4, start="ab", max_new_tokens=3))
    train(tiny_config(data, out_dir="default", sample_interval=8, max_new_tokens=3))  # of a model without line breaks
    lines = Path("default/samples.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["text"][0] == "a" for line in lines)
    assert train(tiny_config(data, out_dir="other")).step == 8  # without samples the prompt does not matter


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(model: Any, **how: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("no C++\ncompiler")

        return call

    monkeypatch.setattr(parallel.torch, "compile", compile_)


def test_a_failing_compiler_falls_back_under_auto(
    tiny_data: Path, broken_compiler: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(tiny_data, out_dir="eager", dropout=0.2))
    resolve = setup.runtimes.resolve
    monkeypatch.setattr(setup.runtimes, "resolve", lambda system: dataclasses.replace(resolve(system), compile=True))
    train(tiny_config(tiny_data, out_dir="auto", dropout=0.2, compile="auto"))
    assert "torch.compile failed (no C++ compiler); training without it" in capsys.readouterr().out.splitlines()
    assert_same_weights(saved("eager"), saved("auto"))


def test_a_requested_compilation_that_fails_is_an_error(tiny_data: Path, broken_compiler: None) -> None:
    with pytest.raises(UserError, match=r"torch.compile failed \(no C\+\+ compiler\); run with --compile=False"):
        train(tiny_config(tiny_data, out_dir="run", compile=True))
    assert not Path("run").exists()


@pytest.mark.slow
def test_compiled_training_equals_eager(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="eager"))
    train(tiny_config(tiny_data, out_dir="compiled", compile=True))
    for (_, one), (_, other) in zip(losses("eager"), losses("compiled"), strict=True):
        assert other == pytest.approx(one, abs=1e-4)


# --- signals ---


def test_handlers_are_restored_and_the_second_signal_ends_immediately() -> None:
    former = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGINT", "SIGTERM")}
    with StopRequest() as stop:
        assert stop.exit_code == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM and stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {name: signal.getsignal(getattr(signal, name)) for name in former} == former


@pytest.fixture
def running(tiny_data: Path) -> Iterator[Forked]:
    """llm-train in a process of its own, at work."""
    settings = arguments(dataset=tiny_data, out_dir="run", max_iters=20000, eval_interval=1000000)
    with Forked("llm_from_scratch.cli.train", *settings, stderr=subprocess.STDOUT) as process:
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be asked to end there")
def test_sigterm_saves_that_very_step(running: Forked, tiny_data: Path) -> None:
    for line in running.stdout:
        if line.startswith("step 3/20000  loss"):
            break
    running.send_signal(signal.SIGTERM)
    rest = running.stdout.read().splitlines()
    assert running.wait(timeout=60) == 143
    step = saved("run").step
    command = f"llm-train --init_from=resume --out_dir=run --dataset={tiny_data}"
    assert f"stopped at step {step}; resume with: {command}" in rest
    assert losses("run")[-1][0] == step - 1 >= 3
    from llm_from_scratch.cli.train import main

    assert main([*command.split()[1:], f"--max_iters={step + 2}"]) == 0  # what was printed works as it stands
    assert [s for s, _ in losses("run")] == list(range(step + 2))


def test_config_is_not_changed_by_a_run(tiny_data: Path) -> None:
    config = tiny_config(tiny_data, epochs=0.1)
    before: Config = dataclasses.replace(config)
    copied = json.dumps(dataclasses.asdict(config))
    train(config)
    assert json.dumps(dataclasses.asdict(config)) == copied and before.model is config.model


EAGER = """
import sys
from llm_from_scratch.tests.tiny import tiny_config
from llm_from_scratch.training.trainer import train

for more in ({"max_iters": 1}, {"max_iters": 2, "init_from": "resume"}):
    train(tiny_config(sys.argv[1], optimizer_type="muon", dropout=0.1, **more))
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.slow
def test_a_run_that_does_not_compile_does_not_import_the_compiler(tiny_data: Path) -> None:
    """Which takes more than a second, and which torch's own optimizers import at their first step."""
    Path("eager.py").write_text(EAGER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "eager.py", str(tiny_data)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_finished_save_leaves_no_thread(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread still frees the copy when the result is there; a process that exits then would be aborted."""

    class Slow:
        def __del__(self) -> None:
            threading.Event().wait(0.2)

    returned, copies = threading.Event(), savers.copied

    def write(*_: Any, **contents: Any) -> Path:
        returned.wait()
        return tiny_data

    monkeypatch.setattr(savers, "copied", lambda contents: copies(contents) | {"tokenizer": Slow()})
    monkeypatch.setattr(checkpoints, "save_checkpoint", write)
    run = Run(make_plan(tiny_config(tiny_data)))
    run.save()
    returned.set()  # from here on, the thread alone holds the copy
    run.saver.report(wait=True)
    assert run.saver.saved_to == tiny_data
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
