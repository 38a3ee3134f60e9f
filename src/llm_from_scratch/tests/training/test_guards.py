"""training/guards.py and the trainer: bad steps change nothing, and persistent errors are rolled back."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.checkpoint.store import find_checkpoint, list_checkpoints, load_checkpoint
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import TrainingError, UserError
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.training import saver as savers
from llm_from_scratch.training import trainer as trainers
from llm_from_scratch.training import wrap as parallel
from llm_from_scratch.training.guards import SpikeDetector, StepGuard
from llm_from_scratch.training.optimizer import make_adamw, step_unless
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.signals import StopRequest
from llm_from_scratch.training.trainer import train

from ..tiny import read_metrics, slow_except, tiny_config

pytestmark = pytest.mark.usefixtures("here")
Spoil = Callable[[Run], Any]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Calls `how` before the update of chosen steps; returns the states before and after each update."""
    update = trainers.train_step

    def arrange(how: Spoil, *steps: int) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []

        def spoiled(run: Run, x: torch.Tensor, y: torch.Tensor) -> None:
            before = state(run)
            undo = how(run) if run.state.step + run.state.data_shift in steps else None
            update(run, x, y)
            if undo is not None:
                undo()
            seen.append({"step": run.state.step - 1, "before": before, "after": state(run)})

        monkeypatch.setattr(trainers, "train_step", spoiled)
        return seen

    return arrange


def state(run: Run) -> dict[str, torch.Tensor]:
    model = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for name, p in run.model.named_parameters():
        for slot, value in run.optimizer.state.get(p, {}).items():
            model[f"{name}/{slot}"] = value.clone()
    return model


def loss_of(value: float) -> Spoil:
    def how(run: Run) -> Any:
        def forward(model: Any, args: Any, output: Any) -> Any:
            return output[0], output[1] * value

        return run.model.register_forward_hook(forward).remove

    return how


def gradient_of(value: float) -> Spoil:
    def how(run: Run) -> Any:
        def spoiled(grad: torch.Tensor) -> torch.Tensor:
            grad = grad.clone()
            grad.view(-1)[3] = value
            return grad

        return run.model.transformer.wte.weight.register_hook(spoiled).remove

    return how


def weights_of(value: float) -> Spoil:
    def how(run: Run) -> None:
        with torch.no_grad():
            run.model.transformer.h[0].mlp.c_fc.weight[1, 1] = value

    return how


@pytest.mark.cases(3)
@pytest.mark.parametrize("how", [loss_of, gradient_of])
@pytest.mark.parametrize("value", slow_except([math.nan, math.inf, -math.inf], math.nan))
@pytest.mark.parametrize("settings", [{}, {"grad_clip": 0.0, "fused": "off"}, {"dtype": "bfloat16"}])
def test_a_step_that_is_not_finite_changes_nothing(
    tiny_data: Path, spoil: Any, how: Any, value: float, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = spoil(how(value), 3)
    result = train(tiny_config(tiny_data, out_dir="run", gradient_accumulation_steps=2, log_interval=5, **settings))
    assert result.step == 8 and [s["step"] for s in seen] == list(range(8))
    for entry in seen[1:]:  # at step 0 the moments are made
        same = all(torch.equal(entry["before"][name], entry["after"][name]) for name in entry["after"])
        assert same == (entry["step"] == 3)
    assert "warning: step 3: loss " in capsys.readouterr().out
    logged = {entry["step"]: entry for entry in read_metrics(Path("run")) if "loss" in entry}
    assert set(logged) == {0, 3, 5} and logged[3]["skipped"] == 1 and "skipped" not in logged[5]


def test_without_faults_nothing_is_left_out(tiny_data: Path) -> None:
    train(tiny_config(tiny_data, out_dir="run", max_iters=30))
    assert not [e for e in read_metrics(Path("run")) if "skipped" in e or "spike" in e]


def test_many_bad_steps_in_a_row_end_in_other_batches(
    tiny_data: Path, spoil: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batches 5, 6 and 7 are poison: the run rolls back to step 4 and continues with batch 8."""
    seen = spoil(loss_of(math.nan), 5, 6, 7)
    settings = {"max_iters": 16, "max_skipped_steps": 3, "keep_last": 9}
    result = train(tiny_config(tiny_data, out_dir="run", **settings))
    told = capsys.readouterr().out
    assert "rolled back to run/step-00000004, continuing with different batches (rollback 1/2)" in told
    assert "batch at token positions " in told and "learning rate" in told
    assert result.step == 16
    final = load_checkpoint(find_checkpoint("run", "last")).trainer
    assert (final["rollbacks"], final["data_shift"], final["skipped_in_a_row"]) == (1, 4, 0)
    steps = [entry["step"] for entry in read_metrics(Path("run")) if "loss" in entry]
    assert steps == list(range(16))  # what was undone is out of the log
    # from the very state of step 4
    assert [entry["step"] for entry in seen] == [*range(8), *range(4, 16)]
    assert all(torch.equal(seen[4]["before"][name], seen[8]["before"][name]) for name in seen[4]["before"])
    assert any(not torch.equal(seen[4]["after"][name], seen[8]["after"][name]) for name in seen[4]["after"])
    assert all(torch.isfinite(t).all() for _, p in list_checkpoints("run") for t in load_checkpoint(p).model.values())


def test_a_run_that_cannot_be_healed_stops_with_a_diagnosis(
    tiny_data: Path, spoil: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(loss_of(math.inf), *range(6, 100))
    config = tiny_config(tiny_data, out_dir="run", max_iters=40, max_skipped_steps=2, max_rollbacks=3, batch_size=2)
    with pytest.raises(TrainingError) as error:
        train(config)
    assert capsys.readouterr().out.count("continuing with different batches") == 3
    text = str(error.value)
    assert text.startswith("the loss is inf at step ") and "float32, weights finite" in text
    assert "stopped: max_rollbacks=3 reached; the last good checkpoint is kept" in text
    # step 4 each time: batches 4 and 5 and the bad 6 and 7; 8 and 9; 10 and 11; 12 and 13
    begins = make_plan(config).order.starts(13, 2)
    assert (
        f"batch at token positions {begins[0]}, {begins[1]})" in text and find_checkpoint("run").name == "step-00000004"
    )


def test_weights_that_are_not_finite_are_undone_at_once(
    tiny_data: Path, spoil: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(weights_of(math.nan), 6)
    assert train(tiny_config(tiny_data, out_dir="run", keep_last=9)).step == 8
    told = capsys.readouterr().out
    assert "weights not finite" in told and "rolled back to run/step-00000004" in told
    assert told.count("skipped;") == 1
    for _, path in list_checkpoints("run"):
        assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(path).model.values())


def test_weights_that_broke_before_a_save_are_not_saved(
    tiny_data: Path, spoil: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def after(run: Run) -> Any:
        return lambda: weights_of(math.inf)(run)

    spoil(after, 5)
    settings = {"out_dir": "run", "save_interval": 2, "eval_interval": 100, "keep_last": 9}
    assert train(tiny_config(tiny_data, **settings)).exit_code == 0
    told = capsys.readouterr().out
    assert "step 6 is not saved" in told and "rolled back to run/step-00000004" in told
    assert [step for step, _ in list_checkpoints("run")] == [2, 4, 6, 8]


def test_weights_that_broke_in_the_last_step_are_undone(tiny_data: Path, spoil: Any) -> None:
    def after(run: Run) -> Any:
        return lambda: weights_of(math.inf)(run)

    for inclusive in (False, True):
        spoil(after, 7)
        settings = {"max_iters": 8 - inclusive, "inclusive_max_iters": inclusive, "out_dir": f"run{inclusive}"}
        result = train(tiny_config(tiny_data, **settings))
        final = load_checkpoint(find_checkpoint(result.out_dir, "last"))
        assert (result.exit_code, result.step, final.step) == (0, 8, 8) and final.trainer["rollbacks"] == 1


def test_a_roll_back_outlives_a_signal(tiny_data: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes in the step that leads to the rollback: what is saved knows of it."""
    settings = {"max_skipped_steps": 3, "dropout": 0.1, "keep_last": 9}
    spoil(loss_of(math.nan), 5, 6, 7)
    train(tiny_config(tiny_data, out_dir="whole", **settings))
    spoil(loss_of(math.nan), 5, 6, 7)
    back = Run.roll_back

    def signalled(self: Run, error: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        back(self, error)

    monkeypatch.setattr(Run, "roll_back", signalled)
    result = train(tiny_config(tiny_data, out_dir="cut", **settings))
    assert (result.exit_code, result.step) == (143, 4)
    assert load_checkpoint(find_checkpoint("cut", 4)).trainer["data_shift"] == 4
    train(tiny_config(tiny_data, out_dir="cut", init_from="resume", **settings))
    one, other = (load_checkpoint(find_checkpoint(name, "last")).model for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_float16_looks_for_its_scale_without_alarm(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(tiny_data, out_dir="run", dtype="float16", grad_clip=0.0, max_iters=12))
    assert "warning" not in capsys.readouterr().out


# --- spikes ---

Noise = Callable[[random.Random], float]
NOISES: dict[str, Noise] = {
    "gaussian": lambda r: 1 + 0.02 * r.gauss(0, 1),
    "wide": lambda r: 1 + 0.2 * r.gauss(0, 1),
    "lognormal": lambda r: math.exp(0.5 * r.gauss(0, 1)),
    "gamma": lambda r: r.gammavariate(2, 0.5),
    "constant": lambda r: 1.0,
}


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", NOISES)
def test_tenfold_losses_are_spikes_and_normal_ones_are_not(name: str) -> None:
    """At most one false alarm in 100,000 steps, of a tenth of which the suite has time for."""
    r, detector, alarms = random.Random(7), SpikeDetector([]), 0
    for step in range(10_000):
        loss = (3 + 7 * math.exp(-step / 2000)) * NOISES[name](r)
        alarms += loss > detector.threshold(step)
        detector.add(step, loss)
    assert alarms == 0
    assert detector.threshold(10_000) < 3 * 20 and len(detector.recent) <= SpikeDetector.WINDOW + 1


def test_the_threshold_by_hand() -> None:
    detector = SpikeDetector([])
    for step in range(40):
        assert detector.threshold(step) == math.inf or step > 32
        detector.add(step, 2.0 if step % 2 else 4.0)
    # 39 known at step 40: the one before is left out. 20 fours, 19 twos: median 4, 95th percentile 4, floor 0.1 * 4
    assert detector.threshold(40) == pytest.approx(4.4)
    detector.add(40, math.nan)
    assert detector.threshold(41) == pytest.approx(3.0 + 8 * 1.0)  # median of 20 fours and 20 twos is 3


def test_spikes_are_reported_and_skipped_only_if_requested(
    tiny_data: Path, spoil: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for skip in (False, True):
        seen = spoil(loss_of(50.0), 50)
        train(tiny_config(tiny_data, out_dir=f"run{skip}", max_iters=60, eval_interval=100, skip_spikes=skip))
        told = [line for line in capsys.readouterr().out.splitlines() if "spike" in line]
        assert len(told) == 1 and told[0].startswith("warning: step 50: loss ") and ("skipped" in told[0]) == skip
        entry = seen[50]
        assert all(torch.equal(entry["before"][n], entry["after"][n]) for n in entry["after"]) == skip
        line = next(e for e in read_metrics(Path(f"run{skip}")) if e["step"] == 50 and "loss" in e)
        assert line["spike"] == 1 and line.get("skipped") == (1 if skip else None)


# --- the device's own judgement ---


def test_a_fused_step_that_the_flag_forbids_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs, whose kernels look at the flag themselves, against the way that asks first."""
    models = [torch.nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_adamw(model, 0.1, 1e-2, (0.9, 0.95), fused=True) for model in models]

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    for step in range(6):
        x = torch.randn(4, 5)
        for model in models:
            model.zero_grad()
            (model(x).square().sum() * (math.nan if step in (0, 3) else 1.0)).backward()
        skip = torch.tensor(step in (0, 3))
        step_unless(skip, optimizers[0])
        step_unless(skip.as_subclass(OnGpu), optimizers[1])
        assert not hasattr(optimizers[1], "found_inf")
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, other) and torch.isfinite(one).all()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        a, b = optimizers[0].state[one], optimizers[1].state[other]
        assert all(torch.equal(a[slot], b[slot]) for slot in a) and int(b["step"]) == 4


def test_the_guard_reports_a_signal_and_each_step_once() -> None:
    runtime = runtimes.resolve(tiny_config("none").system)
    guard, stop = StepGuard([], False, runtime), StopRequest()
    assert not guard.judge(0, 0.1, torch.tensor(2.0), torch.tensor(1.0), stop)
    stop.signum = signal.SIGTERM
    assert guard.judge(1, 0.2, torch.tensor(2.0), torch.tensor(math.nan), stop)
    found = list(guard.collect())
    assert [(f.step, f.learning_rate, f.skipped, f.signum) for f in found] == [
        (0, 0.1, False, None),
        (1, 0.2, True, signal.SIGTERM),
    ]
    assert list(guard.collect(wait=True)) == []


# --- memory ---


def test_the_micro_batch_halves_until_it_fits(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory for two sequences: 6 become 3, then 1; sample ids, batch and loss stay."""
    settings = {"batch_size": 6, "gradient_accumulation_steps": 2, "eval_iters": 1}
    train(tiny_config(tiny_data, out_dir="roomy", **settings))
    forward = GPT.forward

    def small(self: GPT, idx: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training and len(idx) > 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return forward(self, idx, *args, **kwargs)

    capsys.readouterr()
    monkeypatch.setattr(GPT, "forward", small)
    train(tiny_config(tiny_data, out_dir="tight", **settings))
    told = capsys.readouterr().out
    assert "out of memory: from now on the batch of 12 sequences is split into 4 micro-batches of 3" in told
    assert "split into 12 micro-batches of 1" in told
    one, other = read_metrics(Path("roomy")), read_metrics(Path("tight"))
    for a, b in zip(one, other, strict=True):
        for key in {"loss", "val_loss", "grad_norm"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-6, rel=1e-6), key
    # the run continues with the size that fitted
    capsys.readouterr()
    train(tiny_config(tiny_data, out_dir="tight", init_from="resume", **{**settings, "max_iters": 10}))
    told = capsys.readouterr().out
    assert "out of memory" not in told and "(12 sequences: 1 x 12 x 1)" in told


def test_memory_for_not_even_one_sequence_ends_the_run(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GPT.forward

    def never(self: GPT, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return forward(self, *args, **kwargs)
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(GPT, "forward", never)
    with pytest.raises(
        TrainingError, match=r"one sequence at a time: the run needs about .* GiB, cpu has .* GiB"
    ) as error:
        train(tiny_config(tiny_data, out_dir="run", eval_interval=100, max_iters=2, inclusive_max_iters=True))
    for setting in ("--block_size", "--n_layer", "--gradient_checkpointing=True"):
        assert setting in str(error.value)


def test_memory_that_runs_out_late_costs_no_step(tiny_data: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model with one sequence: the state is saved. In the optimizer: one line. In a copy for a save: later."""

    def never(run: Run) -> Any:
        def forward(*args: Any) -> Any:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

        return run.model.register_forward_pre_hook(forward).remove

    spoil(never, 6)
    with pytest.raises(TrainingError, match="out of memory with one sequence at a time"):
        train(tiny_config(tiny_data, out_dir="run", batch_size=2))
    assert find_checkpoint("run", "last").name == "step-00000006"
    spoil(never)

    def no_moments(*args: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    step_unless_ = trainers.step_unless
    monkeypatch.setattr(trainers, "step_unless", no_moments)
    with pytest.raises(TrainingError, match="out of memory for the optimizer's moments: the run needs about .* GiB"):
        train(tiny_config(tiny_data, out_dir="other"))
    monkeypatch.setattr(trainers, "step_unless", step_unless_)
    copied, calls = savers.copied, []

    def no_copy(value: Any) -> Any:
        if isinstance(value, dict) and "rng" in value:
            calls.append(value["step"])
            if len(calls) == 1:
                no_moments()
        return copied(value)

    monkeypatch.setattr(savers, "copied", no_copy)
    assert train(tiny_config(tiny_data, out_dir="third")).exit_code == 0
    assert calls == [4, 8] and find_checkpoint("third").name == "step-00000008"


def test_a_model_that_is_compiled_is_tried_with_less(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(block: Any, **how: Any) -> Any:
        def call(x: torch.Tensor, *rest: Any) -> Any:
            if len(x) > 2:
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
            return block(x, *rest)

        return call

    monkeypatch.setattr(parallel.torch, "compile", compile_)
    train(tiny_config(tiny_data, out_dir="run", compile=True))
    assert load_checkpoint(find_checkpoint("run", "last")).trainer["machine"]["micro_batch"] == 2
    assert load_checkpoint(find_checkpoint("run", "last")).trainer["machine"]["compile"] is True


def test_other_errors_are_not_taken_for_it() -> None:
    assert not runtimes.is_out_of_memory(RuntimeError("shapes differ")) and not runtimes.is_out_of_memory(
        UserError("x")
    )


def test_evaluation_also_uses_smaller_batches(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_config(tiny_data, out_dir="roomy", final_eval=True))
    forward = GPT.forward

    def small(self: GPT, idx: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(idx) > (3 if self.training else room):
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", small)
    room = 3
    train(tiny_config(tiny_data, out_dir="tight", final_eval=True))
    for key in ("val_loss", "val_loss_full"):
        one, other = ([e[key] for e in read_metrics(Path(name)) if key in e] for name in ("roomy", "tight"))
        assert other == pytest.approx(one, abs=1e-6) and one
    begin = Run.evaluate

    def without_memory(run: Run) -> None:
        nonlocal room
        room = 0
        begin(run)

    monkeypatch.setattr(Run, "evaluate", without_memory)
    with pytest.raises(UserError, match="out of memory evaluating one sequence of 8 tokens"):
        train(tiny_config(tiny_data, out_dir="none"))


def test_a_real_allocation_that_fails_is_known() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert runtimes.is_out_of_memory(error.value)
