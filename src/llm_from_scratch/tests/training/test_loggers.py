"""training/loggers.py: output that scripts read (lines, JSON, W&B keys, event files), and errors before the run."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.config import Config
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine import terminal
from llm_from_scratch.training import loggers
from llm_from_scratch.training.evaluate import Evaluation
from llm_from_scratch.training.loggers import (
    JsonLines,
    RunLog,
    TensorBoard,
    check_extras,
    plot_losses,
    read_entries,
)
from llm_from_scratch.training.trainer import train

from ..tiny import tiny_config

STEP = {"loss": 2.34567, "lr": 1e-3, "time_ms": 12.345, "tokens_per_s": 1e4, "grad_norm": 0.5}
EVALUATION = {"train_loss": 2.11119, "val_loss": 2.22225, "lr": 1e-3}


def config(**leaves: Any) -> Config:
    tree = Config()
    for name, value in {"out_dir": "run", "tensorboard": False, "log_interval": 1, **leaves}.items():
        section = tree.training if hasattr(tree.training, name) else tree.logging
        setattr(section, name, value)
    return tree


def opened(tree: Config, is_master: bool = True, first: int = 0, last: int = 10, resumed: bool = False) -> RunLog:
    Path("run").mkdir(exist_ok=True)
    return RunLog(tree, is_master, first, last, resumed)


pytestmark = pytest.mark.usefixtures("here")


def test_lines_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    log = opened(config(), last=500)
    log.evaluation(0, EVALUATION, best=2.22225)
    log.train_step(0, {**STEP, "lr": 0.0, "tokens_per_s": 950.4})
    log.remaining = Left(84.0)  # type: ignore[assignment]
    log.train_step(10, {**STEP, "loss": 2.69, "lr": 0.0172, "tokens_per_s": 2796.0, "mfu": 0.4})
    log.train_step(20, {**STEP, "lr": 6e-5, "tokens_per_s": 1.26e6})
    log.evaluation(500, EVALUATION, best=2.1)
    log.close()
    assert capsys.readouterr().out == (
        "step 0/500  train loss 2.1112  val loss 2.2222\n"
        "step 0/500  loss 2.346  lr 0.0e+00  950 tok/s\n"
        "step 10/500  loss 2.690  lr 1.7e-2  2.8k tok/s  1 min left\n"
        "step 20/500  loss 2.346  lr 6.0e-5  1.3M tok/s  1 min left\n"
        "step 500/500  train loss 2.1112  val loss 2.2222 (best 2.1000)\n"
    ).replace("2.2222", f"{2.22225:.4f}")


def test_lines_of_train_py_are_nanogpts(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    log = RunLog(config(), True, 100, 200, True, nanogpt_mfu=lambda seconds: 0.01 / seconds)
    log.evaluation(100, EVALUATION, best=2.22225)
    for step, milliseconds in ((100, 20), (104, 20), (105, 20), (106, 40), (108, 10)):
        log.train_step(step, {**STEP, "time_ms": milliseconds, "mfu": 0.9})
    log.close()
    # No mfu for five updates of this process. A step is 0.01 s of work at the peak, so the first mfu is a half; then
    # nine tenths of the printed one and a tenth of the new one, also if lines are left out between them.
    assert capsys.readouterr().out == (
        "step 100: train loss 2.1112, val loss 2.2222\n"
        "iter 100: loss 2.3457, time 20.00ms, mfu -100.00%\n"
        "iter 104: loss 2.3457, time 20.00ms, mfu -100.00%\n"
        "iter 105: loss 2.3457, time 20.00ms, mfu 50.00%\n"
        "iter 106: loss 2.3457, time 40.00ms, mfu 47.50%\n"
        "iter 108: loss 2.3457, time 10.00ms, mfu 52.75%\n"
    ).replace("2.2222", f"{2.22225:.4f}")


def test_metrics_are_one_object_a_line() -> None:
    log = opened(config())
    log.evaluation(0, EVALUATION, 2.22225)
    log.train_step(0, STEP)
    log.train_step(1, {**STEP, "grad_norm": math.inf, "loss": math.nan})
    lines = Path("run/metrics.jsonl").read_text().splitlines()  # before close(): each line is written at once
    log.final(2, Evaluation(loss=2.0, tokens=3, text_bytes=None, seconds=1.0))
    log.close()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, **EVALUATION}, {"step": 0, **STEP}, {"step": 1, **STEP, "grad_norm": None, "loss": None}
    ]  # fmt: skip
    assert read_entries(Path("run/metrics.jsonl"))[-1] == {"step": 2, "val_loss_full": 2.0, "perplexity": math.exp(2.0)}


def test_a_loss_of_pairs_does_not_have_a_perplexity(capsys: pytest.CaptureFixture[str]) -> None:
    log = opened(config())
    log.final(2, Evaluation(loss=0.5, tokens=3, text_bytes=None, seconds=1.0, of_pairs=True))
    log.close()
    assert read_entries(Path("run/metrics.jsonl")) == [{"step": 2, "val_loss_full": 0.5}]
    assert capsys.readouterr().out == "final: val loss 0.5000 (whole split)\n"


def test_a_resumed_log_drops_repeated_steps() -> None:
    path = Path("metrics.jsonl")
    entries = [{"step": 3, "loss": 1}, {"step": 4, "train_loss": 1, "val_loss": 1}, {"step": 4, "loss": 2},
               {"step": 4, "val_loss_full": 1}, {"step": 5, "loss": 3}]  # fmt: skip
    path.write_text("".join(json.dumps(e) + "\n" for e in entries) + '{"step": 6, "lo')
    log = JsonLines(path, resume_at=4)
    log.log(4, {"loss": 2.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*entries[:2], {"step": 4, "loss": 2.5}]
    assert [p.name for p in Path(".").iterdir()] == ["metrics.jsonl"]
    JsonLines(path, resume_at=4, evaluated=False).close()  # the checkpoint was made before the evaluation of its step
    assert [json.loads(line) for line in path.read_text().splitlines()] == entries[:1]
    JsonLines(Path("new.jsonl"), resume_at=4).close()  # the file may have been deleted


def test_a_sample_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log = opened(config())
    log.sample(5, "a\tb\n\x1b[2J\x07\r\x9b1mé\x7f")
    log.close()
    assert capsys.readouterr().out == "--- sample at step 5 ---\na\tb\n\ufffd[2J\ufffd\ufffd\ufffd1mé\ufffd\n---\n"
    assert json.loads(Path("run/samples.jsonl").read_text())["text"] == "a\tb\n\x1b[2J\x07\r\x9b1mé\x7f"


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    log = opened(config(progress="bar"), is_master=False)
    log.evaluation(0, EVALUATION, 2.22225)
    log.train_step(0, STEP)
    log.say("hello")
    log.close()
    assert capsys.readouterr().out == "" and list(Path("run").iterdir()) == []


def test_the_bar_shows_what_matters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    log = opened(config(progress="bar"), last=4)
    log.evaluation(0, EVALUATION, 2.22225)
    log.say("[not markup] " + "x" * 200)
    log.train_step(3, STEP)
    log.close()
    shown = capsys.readouterr().out
    assert "step 0/4  train loss 2.1112" in shown and "[not markup] " + "x" * 200 in shown
    assert "4/4" in shown and "loss 2.346" in shown and "10k tok/s" in shown
    assert "mfu" not in shown and "val 2.222  best 2.222" in shown
    assert "step 3" not in shown


def test_the_bar_shows_the_step_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    log = opened(config(progress="bar"), last=150)
    assert log.bar is not None
    task = log.bar.tasks[0]
    log.remaining = Left(13.0)  # type: ignore[assignment]
    log.train_step(40, STEP)
    assert (task.completed, task.fields["left"]) == (41, "13 s left")
    log.reached(44)  # between two lines
    assert task.completed == 44
    log.evaluation(50, EVALUATION, 2.1)
    assert task.completed == 50 and task.fields["left"] == "13 s left"
    assert task.fields["status"] == "loss 2.346  val 2.222  best 2.100  10k tok/s"
    log.train_step(60, {**STEP, "mfu": 0.42})
    assert task.fields["status"] == "loss 2.346  val 2.222  best 2.100  10k tok/s  mfu 42%"
    log.evaluation(150, {**EVALUATION, "val_loss": 2.0}, 2.0)  # the last line is not the last update's
    assert task.finished and "val 2.000  best 2.000" in task.fields["status"]
    assert task.fields["left"] == "evaluating"
    log.close(150)
    assert task.fields["left"] == "in 0 s"
    monkeypatch.setenv("COLUMNS", "80")
    log = opened(config(progress="bar"), last=10**6)
    assert log.bar is not None
    log.remaining = Left(15.0 * 3600)  # type: ignore[assignment]
    log.evaluation(10**5, EVALUATION, 2.1)
    log.train_step(10**5, {**STEP, "mfu": 0.42})
    (line,) = log.bar.console.render_lines(log.bar.get_renderable())
    text = "".join(segment.text for segment in line).rstrip()
    log.close()
    assert "100001/1000000" in text and text.endswith("10k tok/s 15 h 00 min left") and "…" not in text
    assert len(text) == 78  # ^C has room behind it


def test_a_pipe_gets_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(config(progress="auto"))
    assert log.bar is None
    log.close()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for term, live in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        log = opened(config(progress="auto"))
        assert (log.bar is not None) is live
        log.close()
        assert opened(config(progress="lines")).bar is None


class Left:
    """A run with this many seconds left."""

    def __init__(self, seconds: float | None, updates: int = 20):
        self.left, self.timer = seconds, types.SimpleNamespace(updates=updates)

    def seconds(self, step: int) -> float | None:
        return self.left


def test_the_bar_shows_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for left, shown in ((Left(5400.0), "1 h 30 min left"), (Left(None), ""), (None, "")):
        Path("run").mkdir(exist_ok=True)
        log = RunLog(config(progress="bar"), True, 0, 10, False, remaining=left)  # type: ignore[arg-type]
        log.train_step(3, STEP)
        assert log.bar is not None and log.bar.tasks[0].fields["left"] == shown
        log.close(4)
        assert "in 0 s" in capsys.readouterr().out


def test_nanogpts_lines_sometimes_report_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now)
    Path("run").mkdir()
    left = Left(3600.0, updates=19)
    log = RunLog(config(), True, 0, 10, False, remaining=left, nanogpt_mfu=lambda _: 0.1)  # type: ignore[arg-type]
    told = []
    # not before 20 updates, not more often than every 10 minutes, and not when the end is near
    for updates, later, seconds in (
        (19, 0, 3600.0),
        (20, 0, 3600.0),
        (21, 599, 3600.0),
        (22, 600, 200.0),
        (23, 1300, 90.0),
    ):
        left.timer.updates, now, left.left = updates, 1000.0 + later, seconds
        log.train_step(updates, STEP)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"iter {updates}: loss")
        told += [(updates, line.partition(", until")[0]) for line in lines[1:]]
    assert told == [(20, "about 1 h 00 min left"), (22, "about 3 min 20 s left")]


def test_wandb_gets_nanogpts_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = types.SimpleNamespace(log=lambda values: calls.append(values), finish=lambda: calls.append("finish"))

    def init(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = opened(config(wandb_log=True, wandb_project="p", wandb_run_name="r"))
    log.evaluation(0, EVALUATION, 2.22225)
    log.train_step(0, STEP)
    log.evaluation(5, {**EVALUATION, "mfu": 0.25}, 2.22225)
    log.close()
    started, first, step, second, end = calls
    assert (started["project"], started["name"], started["config"]["n_layer"]) == ("p", "r", 6)
    assert step == {"iter": 0, "loss": 2.34567, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1e4}
    shared = {"train/loss": 2.11119, "val/loss": 2.22225, "lr": 1e-3}
    assert first == {"iter": 0, "mfu": -100.0, **shared} and second == {"iter": 5, "mfu": 25.0, **shared}
    assert end == "finish"


def test_tensorboards_own_reader_reads_the_events() -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = opened(config(tensorboard=True))
    log.evaluation(0, EVALUATION, 2.22225)
    log.train_step(0, STEP)
    log.train_step(1, {**STEP, "loss": 2.0})
    log.final(2, Evaluation(loss=2.0, tokens=3, text_bytes=None, seconds=1.0))
    log.close()
    reader = event_accumulator.EventAccumulator("run/tensorboard")
    reader.Reload()

    def series(tag: str) -> list[tuple[int, Any]]:
        from tensorboard.util.tensor_util import make_ndarray

        return [(e.step, pytest.approx(float(make_ndarray(e.tensor_proto)))) for e in reader.Tensors(tag)]

    logged = read_entries(Path("run/metrics.jsonl"))
    names = {name for entry in logged for name in entry} - {"step", "val_loss_full", "perplexity"}  # one point each
    assert {tag for tag in reader.Tags()["tensors"] if not tag.startswith(("_", "settings", "final"))} == names
    for name in names:
        assert series(name) == [(entry["step"], entry[name]) for entry in logged if name in entry]
    assert (
        reader.Tensors("final")[0]
        .tensor_proto.string_val[0]
        .startswith(b"    final: val loss 2.0000 (whole split), perpl")
    )


def test_the_picture_shows_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    Path("my run").mkdir()
    Path("my run/metrics.jsonl").write_text(
        '{"step": 0, "val_loss": 3.0}\n{"step": 0, "loss": 3.5}\n{"step": 1, "loss": null}\n'
        '{"step": 20, "loss": 2.25}\n{"step": 21, "lo'
    )
    drawn: list[Any] = []
    save = figures.Figure.savefig

    def saving(self: Any, *given: Any, **named: Any) -> None:
        drawn.append(self)
        save(self, *given, **named)

    monkeypatch.setattr(figures.Figure, "savefig", saving)
    plot_losses(Path("my run/metrics.jsonl"), Path("loss.png"))
    assert Path("loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axes,) = drawn[0].axes
    assert (axes.get_title(), axes.get_xscale()) == ("my run", "log")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "train (batch), last 2.250", "validation, last 3.000"
    ]  # fmt: skip
    assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 20], [1]]  # 0 has no logarithm
    assert "10" in [label.get_text() for label in axes.get_xticklabels()]


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [
        ("tensorboard", "tensorboard", "tensorboard"),
        ("wandb_log", "wandb", "wandb"),
        ("loss_plot", "matplotlib", "plots"),
    ],
)
def test_missing_extras_are_refused_with_the_install_line(
    setting: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError) as error:
        check_extras(config(**{setting: True}))
    message = str(error.value)
    assert (
        f"[{extra}]'" in message and "pip install -e '" in message and f"turn it off with --{setting}=False" in message
    )
    check_extras(config())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_extras(config(**{setting: True}))


def test_evaluating_only_writes_no_file() -> None:
    log = opened(config(eval_only=True, tensorboard=True, progress="bar"))
    log.evaluation(0, EVALUATION, 2.22225)
    log.close()
    assert list(Path("run").iterdir()) == [] and log.bar is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full disk to offer")
def test_a_full_disk_costs_numbers_not_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    for name in ("metrics.jsonl", "samples.jsonl", "loss.png"):
        Path("run", name).symlink_to("/dev/full")
    log = opened(config())
    log.evaluation(0, EVALUATION, 2.22225)
    log.train_step(0, STEP)
    log.sample(0, "text")
    Path("run/metrics.jsonl").unlink()  # which would be read without end
    Path("run/metrics.jsonl").write_text('{"step": 0, "loss": 1}')
    log.plot()
    log.close()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert [line.split(" (")[0] for line in told] == [
        "warning: metrics.jsonl cannot be written", "warning: samples.jsonl cannot be written",
        "warning: loss.png cannot be written",
    ]  # fmt: skip
    assert "No space left on device" in told[0]


def test_output_that_is_lost_does_not_end_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, told = opened(config()), list[str]()

    def on_full_disk(line: str, **_: Any) -> None:
        if "a" in line:
            raise OSError(28, "No space left on device")
        told.append(line)

    monkeypatch.setattr(terminal, "print", on_full_disk, raising=False)
    for line in ("one", "bad", "two"):
        log.say(line)
    assert told == ["one", "two"] and not log.reader_is_gone
    monkeypatch.delattr(terminal, "print")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    log.say("Zoë")
    assert raw.getvalue() == b"Zo?\n"


def test_lines_that_a_full_disk_refused_are_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(config())
    assert log.metrics is not None
    file, flush = log.metrics.file, log.metrics.file.flush

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "flush", full, raising=False)
    log.train_step(0, STEP)
    monkeypatch.setattr(file, "flush", flush, raising=False)
    log.train_step(1, STEP)
    assert [entry["step"] for entry in read_entries(Path("run/metrics.jsonl"))] == [0, 1]


def test_wandb_continues_the_same_run_on_resume(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    logged: list[dict[str, float]] = []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: None)

    def init(**kwargs: Any) -> Any:
        started.append(kwargs)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or found(name))
    for begin, last in (("scratch", 4), ("resume", 8)):
        train(tiny_config(tiny_data, out_dir="run", wandb_log=True, log_interval=2, init_from=begin, max_iters=last))
    saved = json.loads(Path("run/step-00000008/MANIFEST.json").read_text())
    assert [(kwargs["id"], kwargs["resume"]) for kwargs in started] == [(saved["run_id"], "allow")] * 2
    steps = [values for values in logged if "loss" in values]
    assert [values["iter"] for values in steps] == [0, 2, 4, 6]
    expected = [entry for entry in read_entries(Path("run/metrics.jsonl")) if "loss" in entry]
    for name in ("loss", "lr", "grad_norm", "tokens_per_s"):
        assert [values[name] for values in steps] == [entry[name] for entry in expected]


def test_wandb_that_cannot_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("api_key not\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"\(api_key not configured\).*WANDB_MODE=offline"):
        opened(config(wandb_log=True))


def test_tensorboard_gets_the_settings_and_the_samples() -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    log = opened(config(tensorboard=True, sample_interval=5))
    log.sample(5, "First line\nSecond\ud800 line")
    log.close()
    reader = accumulator.EventAccumulator("run/tensorboard")
    reader.Reload()

    def text(tag: str) -> tuple[int, str]:
        event = reader.Tensors(tag)[0]
        return event.step, event.tensor_proto.string_val[0].decode()

    assert text("sample") == (5, "    First line\n    Second? line\n")
    assert text("settings")[0] == 0 and "    learning_rate: 0.001\n" in text("settings")[1]
    content = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = hparams.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (values["n_layer"].number_value, values["decay_lr"].bool_value) == (6, True)
    assert values["dataset"].string_value == "openwebtext"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full disk to offer")
def test_tensorboard_on_a_full_disk_is_one_warning(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    log = opened(config(tensorboard=True))
    sink = next(sink for sink in log.sinks if isinstance(sink, TensorBoard))
    good, sink.file = sink.file, open("/dev/full", "wb", buffering=0)
    for step in range(3):
        log.train_step(step, STEP)
    sink.file.close()
    sink.file = good  # there is room again
    log.train_step(3, STEP)
    log.close()
    out, err = capfd.readouterr()
    assert [line for line in out.splitlines() if "warning" in line] == [
        "warning: TensorBoard cannot be written (No space left on device); training continues"
    ]
    assert err == "" and len(out.splitlines()) == 5
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator("run/tensorboard")
    reader.Reload()
    assert [event.step for event in reader.Tensors("loss")] == [3]


def test_a_logger_that_fails_is_one_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no\nencoding")

    monkeypatch.setattr(TensorBoard, "__init__", broken)
    log = opened(config(tensorboard=True))
    log.train_step(0, STEP)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "warning: TensorBoard cannot be written (RuntimeError: no encoding); training continues"
    assert len(lines) == 2


def test_a_bar_on_a_closed_terminal_ends_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str = "") -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            self.write()

    log = opened(config(progress="bar"))
    log.terminal.stream = Gone()
    log.train_step(0, STEP)
    assert not log.reader_is_gone
    log.say("a line")
    assert log.reader_is_gone
    log.close(1)
