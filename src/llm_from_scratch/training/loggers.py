"""Logging and progress output: the terminal, metrics.jsonl, TensorBoard, Weights & Biases, and loss.png."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress

from ..config import Config
from ..errors import UserError, one_line
from ..machine.extras import is_installed, require
from ..machine.files import json_steps, open_whole
from ..machine.terminal import Lenient, announce
from ..settings import flatten
from .progress import Remaining, clock_time, in_words, with_prefix

if TYPE_CHECKING:  # it imports torch, and a missing package must be reported at once
    from .evaluate import Evaluation

METRICS = "metrics.jsonl"
LAST = ("README.md", "loss.png")  # written when the training has ended
TELL_AFTER, TELL_ABOVE, TELL_EVERY = 20, 120.0, 600.0  # updates; seconds left; seconds between two lines of it
UNKNOWN_MFU = -1.0  # nanoGPT's lines show it as -100.00%
CONTROL = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}  # they would steer a terminal
WIDE = 100  # columns of a terminal whose bar shows the mfu
SETTLING = 5  # updates before nanoGPT's lines have an mfu
OPTIONAL = {  # setting: (package, extra)
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb_log": ("wandb", "wandb"),
    "loss_plot": ("matplotlib", "plots"),
}


def check_extras(config: Config) -> None:
    """Raises UserError if a setting needs an optional package that is not installed."""
    for setting, (package, extra) in OPTIONAL.items():
        if getattr(config.logging, setting):
            require(package, extra, f"--{setting}=True", f"turn it off with --{setting}=False")


def wanted(config: Config, setting: str) -> bool:
    """Whether a setting of OPTIONAL is on; None: if its package is installed."""
    value = getattr(config.logging, setting)
    return is_installed(OPTIONAL[setting][0]) if value is None else value


class JsonLines:
    """metrics.jsonl: one object per line with its step; NaN and infinities become null. evaluated: whether the
    checkpoint of resume_at includes the evaluation of its step; otherwise it is repeated."""

    def __init__(self, path: Path, resume_at: int | None, evaluated: bool = True):
        self.path = path
        try:
            self.file = path.open("a", encoding="utf-8")
            if resume_at is not None:
                self.forget_from(resume_at, evaluated)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None

    def forget_from(self, step: int, evaluated: bool) -> None:
        """Drops the lines that a resumed run will repeat: a killed run logs past its last checkpoint."""
        kept = []
        for entry in read_entries(self.path):
            # an evaluation that the checkpoint knows was made before it, an update of that number after it
            if entry["step"] < step or (entry["step"] == step and evaluated and "val_loss" in entry):
                kept.append(json.dumps(entry))
        with open_whole(self.path, self.path.name + ".tmp") as file:
            file.writelines((line + "\n").encode() for line in kept)
        before, self.file = self.file, self.path.open("a", encoding="utf-8")
        before.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        clean = {k: (v if math.isfinite(v) else None) for k, v in metrics.items()}
        self.file.write(json.dumps({"step": step, **clean}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """An event file in out_dir/tensorboard: the settings, the metrics under their names in metrics.jsonl, and the texts
    of the run. TensorBoard's own writer is not used: its thread prints tracebacks if the disk is full."""

    def __init__(self, folder: Path, config: Config, run_id: str | None):
        from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.make_event, self.make_record, self.make_scalar, self.make_text = Event, RecordWriter, scalar_pb, text_pb
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(2)}"
        self.file = (folder / name).open("xb", buffering=1 << 20)
        self._write(Event(file_version="brain.Event:2", source_metadata=SourceMetadata(writer="llm_from_scratch")))
        settings = flatten(config)
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        self._write(Event(summary=hparams_pb(plain, trial_id=run_id)))
        self.text(0, "settings", "\n".join(f"{name}: {value}" for name, value in settings.items()))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "val_loss_full" in metrics:  # once in a run: charts of a single point. They are in the text "final"
            return
        event = self.make_event(step=step)
        for name, value in metrics.items():
            event.summary.MergeFrom(self.make_scalar(name, value))
        self._write(event)

    def text(self, step: int, tag: str, text: str) -> None:
        block = "".join(f"    {line}\n" for line in text.splitlines())  # indented, Markdown leaves it as it is
        self._write(self.make_event(step=step, summary=self.make_text(tag, block.encode("utf-8", "replace").decode())))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self.make_record(self.file).write(event.SerializeToString())
        self.file.flush()  # if the disk is full, the rest stays in the buffer until the next flush

    def close(self) -> None:
        self.file.close()


class WandB:
    """Weights & Biases, with nanoGPT's keys; a resumed run continues as the same one."""

    EVALUATION = {"train_loss": "train/loss", "val_loss": "val/loss", "lr": "lr"}  # ours -> nanoGPT's
    STEP = ("loss", "lr", "grad_norm", "tokens_per_s")

    def __init__(self, config: Config, run_id: str | None):
        import wandb

        project, name = config.logging.wandb_project, config.logging.wandb_run_name
        try:
            self.run = wandb.init(project=project, name=name, config=flatten(config), id=run_id, resume="allow")
        except Exception as error:  # the client raises its own errors
            reason = one_line(error)
            raise UserError(
                f"Weights & Biases cannot start ({reason}): log in with `wandb login`, set WANDB_MODE=offline, or turn "
                "it off with --wandb_log=False"
            ) from None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        values: dict[str, float] = {"iter": step}
        if "val_loss" in metrics:
            values["mfu"] = metrics.get("mfu", UNKNOWN_MFU) * 100  # per cent
            values |= {theirs: metrics[ours] for ours, theirs in self.EVALUATION.items()}
            values |= {name: value for name, value in metrics.items() if "/" in name}
        else:
            values |= {name: metrics[name] for name in self.STEP if name in metrics}
        if len(values) > 1:
            self.run.log(values)

    def close(self) -> None:
        self.run.finish()


class Bar(Progress):
    """A progress bar with room behind it for ^C. Without that, the terminal would wrap it and keep a stale line."""

    def get_renderable(self) -> RenderableType:
        return Constrain(super().get_renderable(), shutil.get_terminal_size().columns - 2)


class RunLog:
    """All reporting of a run. Only the master process logs and prints."""

    def __init__(
        self, config: Config, is_master: bool, first: int, last: int, resumed: bool, evaluated: bool = True,
        remaining: Remaining | None = None, run_id: str | None = None,
        nanogpt_mfu: Callable[[float], float] | None = None,
    ):  # fmt: skip
        """nanogpt_mfu: seconds of a step -> mfu, if nanoGPT's lines are printed. None: llm-train's lines."""
        self.remaining, self.begin = remaining, time.monotonic()
        self.first, self.last, self.nanogpt_mfu, self.running_mfu = first, last, nanogpt_mfu, UNKNOWN_MFU
        self.told_at = -math.inf  # when the remaining time was last printed
        self.sinks: list[JsonLines | TensorBoard | WandB] = []
        self.metrics: JsonLines | None = None
        self.tensorboard: TensorBoard | None = None
        self.bar: Progress | None = None
        self.silent = not is_master or config.logging.progress == "none"
        self.out_dir, self.loss_plot = Path(config.training.out_dir), wanted(config, "loss_plot")
        self.shown = dict.fromkeys(("loss", "val", "rate"), "")  # next to the bar
        self.reader_is_gone = self.is_watched = False
        self.failing: set[str] = set()
        if not is_master:
            return
        if not config.training.eval_only:
            self.metrics = JsonLines(self.out_dir / METRICS, first if resumed else None, evaluated)
            self.sinks.append(self.metrics)
            if wanted(config, "tensorboard"):
                with self.writing("TensorBoard"):
                    self.tensorboard = TensorBoard(self.out_dir / "tensorboard", config, run_id)
                    self.sinks.append(self.tensorboard)
        if config.logging.wandb_log:
            self.sinks.append(WandB(config, run_id))
        self.terminal = Lenient(sys.stdout)
        console, progress = Console(file=cast(TextIO, self.terminal)), config.logging.progress
        self.is_watched = progress == "auto" and sys.stdout.isatty() and not console.is_dumb_terminal
        if not config.training.eval_only and (progress == "bar" or self.is_watched):
            self.bar = Bar(
                "{task.completed:.0f}/{task.total:.0f}", BarColumn(bar_width=None), "{task.fields[status]}",
                "{task.fields[left]}", console=console,
            )  # fmt: skip
            self.task = self.bar.add_task("train", total=last, completed=first, status="", left="")
            self.bar.start()

    def say(self, line: str) -> None:
        """One line on the terminal, above the bar."""
        if not self.silent and not announce(line, self._print_above_bar if self.bar else None):
            self.silent = self.reader_is_gone = True

    def _print_above_bar(self, line: str) -> None:
        assert self.bar is not None
        self.terminal.error = None
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self.terminal.error is not None:
            raise self.terminal.error

    def reached(self, step: int, left: str | None = None, **shown: str) -> None:
        """Moves the bar, and changes the texts next to it."""
        self.shown |= shown
        if self.bar is not None:
            fields: dict[str, Any] = {} if left is None else {"left": left}
            status = "  ".join(text for text in self.shown.values() if text)
            self.bar.update(self.task, completed=step, status=status, **fields)

    def expect(self, last: int) -> None:
        """The run ends after `last` updates, other than planned."""
        self.last = last
        if self.remaining is not None:
            self.remaining.calendar = replace(self.remaining.calendar, last=last)
        if self.bar is not None:
            self.bar.update(self.task, total=last)

    def train_step(self, step: int, metrics: dict[str, float]) -> None:
        """metrics: loss, lr, grad_norm, time_ms, tokens_per_s, and mfu if the device's peak is known."""
        self._log(step, metrics)
        seconds = self.remaining.seconds(step + 1) if self.remaining is not None else None  # to the end of the run
        left = "" if seconds is None else f"{in_words(seconds, rounded=True)} left"
        loss, rate = f"loss {metrics['loss']:.3f}", f"{with_prefix(metrics['tokens_per_s'])} tok/s"
        if self.bar is not None:
            is_wide = self.bar.console.width >= WIDE
            rate += f"  mfu {metrics['mfu']:.0%}" if is_wide and "mfu" in metrics else ""
            self.reached(step + 1, left, loss=loss, rate=rate)
        elif self.nanogpt_mfu is not None:
            if step - self.first >= SETTLING:
                mfu = self.nanogpt_mfu(metrics["time_ms"] / 1e3)
                self.running_mfu = mfu if self.running_mfu == UNKNOWN_MFU else 0.9 * self.running_mfu + 0.1 * mfu
            time_and_mfu = f"time {metrics['time_ms']:.2f}ms, mfu {self.running_mfu * 100:.2f}%"
            self.say(f"iter {step}: loss {metrics['loss']:.4f}, {time_and_mfu}")
            self._announce_end(seconds)
        else:
            lr = f"{metrics['lr']:.1e}".replace("e-0", "e-")
            self.say(f"step {step}/{self.last}  {loss}  lr {lr}  {rate}  {left}".rstrip())

    def _announce_end(self, seconds: float | None) -> None:
        if self.remaining is None or seconds is None or self.remaining.timer.updates < TELL_AFTER:
            return
        if seconds >= TELL_ABOVE and time.monotonic() - self.told_at >= TELL_EVERY:
            self.told_at = time.monotonic()
            self.say(f"about {in_words(seconds)} left, until {clock_time(seconds)}")

    def evaluation(self, step: int, metrics: dict[str, float], best: float) -> None:
        """metrics: train_loss, val_loss, lr, mfu if known, and scores of tasks, "task/metric". best: the lowest val
        loss of the run so far."""
        self._log(step, metrics)
        left = "evaluating" if step == self.last else None  # the whole split
        self.reached(step, left, val=f"val {metrics['val_loss']:.3f}  best {best:.3f}")
        train, val = f"train loss {metrics['train_loss']:.4f}", f"val loss {metrics['val_loss']:.4f}"
        if self.nanogpt_mfu is not None:
            self.say(f"step {step}: {train}, {val}")
        else:
            shown = f" (best {best:.4f})" if metrics["val_loss"] > best else ""
            self.say(f"step {step}/{self.last}  {train}  {val}{shown}")
        if scores := {name: value for name, value in metrics.items() if "/" in name}:
            self.say(f"step {step}/{self.last}  {scores_line(scores)}")

    def final(self, step: int, found: Evaluation, parts: dict[str, float] | None = None) -> None:
        """The loss of the whole validation split at the end of the run. parts: of the parts of a mixture, by name."""
        of_parts = {f"val_loss_full/{name}": loss for name, loss in (parts or {}).items()}
        metrics, text = {"val_loss_full": found.loss}, f"final: val loss {found.loss:.4f} (whole split)"
        if not found.of_pairs:
            metrics["perplexity"] = found.perplexity
            text += f", perplexity {found.perplexity:.2f}"
        if (bits := found.bits_per_byte) is not None:
            metrics["bits_per_byte"] = bits
            text += f", {bits:.3f} bits per byte"
        self._log(step, metrics | of_parts)
        self._text(step, "final", text)
        self.say(text)
        if of_parts:
            self.say(f"final: {scores_line(of_parts)}")

    def sample(self, step: int, text: str) -> None:
        """A text sample written during training."""
        self.say(f"--- sample at step {step} ---\n{text.translate(CONTROL)}\n---")
        with self.writing("samples.jsonl"), (self.out_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "text": text}) + "\n")
        self._text(step, "sample", text)

    def plot(self) -> None:
        if self.metrics is None or not self.loss_plot:
            return
        with self.writing("loss.png"):
            plot_losses(self.out_dir / METRICS, self.out_dir / "loss.png")

    def sync(self) -> None:
        """Makes metrics.jsonl durable. The lines of a checkpoint's steps must be on disk before the checkpoint."""
        if self.metrics is not None:
            os.fsync(self.metrics.file.fileno())

    def forget_from(self, step: int, evaluated: bool) -> None:
        """Drops the steps from here on, which will be repeated, from metrics.jsonl."""
        if self.metrics is not None:
            with self.writing("JsonLines"):
                self.metrics.forget_from(step, evaluated)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            with self.writing(type(sink).__name__):
                sink.log(step, metrics)

    def _text(self, step: int, tag: str, text: str) -> None:
        if self.tensorboard is not None:
            with self.writing("TensorBoard"):
                self.tensorboard.text(step, tag, text)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """If a logger fails, for example on a full disk, the run loses metrics and prints one warning but continues."""
        try:
            yield
        except Exception as error:  # TensorBoard and W&B raise any class
            if what not in self.failing:
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                reason, then = getattr(error, "strerror", None) or one_line(text), "; training continues"
                shown = {"JsonLines": METRICS, "WandB": "Weights & Biases"}.get(what, what)
                self.say(f"warning: {shown} cannot be written ({reason}){'' if what in LAST else then}")
            self.failing.add(what)
        else:
            self.failing.discard(what)

    def close(self, step: int | None = None) -> None:
        """Closes the bar, at this step if given, and all destinations."""
        if self.bar is not None:
            took = in_words(time.monotonic() - self.begin)
            self.bar.update(self.task, completed=step, left=f"in {took}")
            self.bar.stop()
        for sink in self.sinks:
            with self.writing(type(sink).__name__):
                sink.close()


def scores_line(found: dict[str, float]) -> str:
    """Scores of tasks with their standard errors: "arc/acc 0.512 ± 0.014, ..."."""
    parts = []
    for name, value in found.items():
        metric, comma, kind = name.partition(",")
        if not metric.endswith("_stderr"):
            error = found.get(f"{metric}_stderr{comma}{kind}")
            parts.append(f"{name} {value:.4g}" + ("" if error is None else f" ± {error:.2g}"))
    return ", ".join(parts)


def read_metrics(out_dir: str | Path) -> dict[str, list[Any]]:
    """The metrics of a run as columns of equal length: step, loss, val_loss and more; None: not at this step."""
    path = Path(out_dir) / METRICS
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected the out_dir of a run")
    entries = read_entries(path)
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {name: [entry.get(name) for entry in entries] for name in names}


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl."""
    return json_steps(path.read_bytes())


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draws the training and validation losses of a metrics.jsonl. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = read_entries(metrics)
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for key, label, style, width in (("loss", "train (batch)", "-", 1), ("val_loss", "validation", "o-", 2)):
        steps = [max(entry["step"], 1) for entry in entries if type(entry.get(key)) is float]  # 0 has no logarithm
        losses = [entry[key] for entry in entries if type(entry.get(key)) is float]
        if losses:
            axes.plot(steps, losses, style, label=f"{label}, last {losses[-1]:.3f}", linewidth=width, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", xscale="log", title=metrics.resolve().parent.name)
    axes.xaxis.set_major_formatter("{x:,.0f}")  # 100, not a power of ten
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
