"""Where a run's numbers go: the terminal, metrics.jsonl, TensorBoard, Weights & Biases, and loss.png."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..config import Config, flatten
from ..errors import UserError
from ..machine.extras import require
from .progress import Remaining, clock_time, in_words

if TYPE_CHECKING:  # it imports torch, and a missing package is to be told at once
    from .evaluate import Evaluation

METRICS = "metrics.jsonl"
TELL_AFTER, TELL_ABOVE, TELL_EVERY = 20, 120.0, 600.0  # updates; seconds left; seconds between two lines of it
UNKNOWN_MFU = -1.0  # what nanoGPT's lines show (as -100.00%) where there is no figure


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


class Sink(Protocol):
    """One destination of the numbers."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object a line, each with its step; NaN and infinities as null.

    evaluated: whether the checkpoint of resume_at knows the evaluation of its step, which is else made anew.
    """

    def __init__(self, path: Path, resume_at: int | None, evaluated: bool = True):
        self.path = path
        try:
            if resume_at is not None and path.exists():
                _forget_from(path, resume_at, evaluated)
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def forget_from(self, step: int, evaluated: bool) -> None:
        _forget_from(self.path, step, evaluated)
        before, self.file = self.file, self.path.open("a", encoding="utf-8")
        before.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        clean = {k: (v if math.isfinite(v) else None) for k, v in metrics.items()}
        self.file.write(json.dumps({"step": step, **clean}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _forget_from(path: Path, step: int, evaluated: bool) -> None:
    """Drops what a resumed run is about to do again: a killed run logs past its last checkpoint."""
    kept = []
    for entry in read_metrics(path):
        # an evaluation that the checkpoint knows was made before it, an update of that number after it
        if entry["step"] < step or (entry["step"] == step and evaluated and "val_loss" in entry):
            kept.append(json.dumps(entry))
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())  # a power cut must not leave the new name with nothing in it
    os.replace(beside, path)


class TensorBoard:
    """Event files in out_dir/tensorboard."""

    def __init__(self, folder: Path):
        from tensorboard.summary import Writer

        self.writer = Writer(str(folder))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(_TAGS.get(name, name), value, step)

    def close(self) -> None:
        self.writer.close()


_TAGS = {"loss": "train/loss", "train_loss": "train/loss_eval", "val_loss": "val/loss"}


class WandB:
    """Weights & Biases, with nanoGPT's keys. WANDB_MODE=offline works without network."""

    def __init__(self, config: Config):
        import wandb

        self.run = wandb.init(
            project=config.logging.wandb_project, name=config.logging.wandb_run_name, config=flatten(config)
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "val_loss" not in metrics:
            return  # nanoGPT logs at evaluations only
        keys = {"train_loss": "train/loss", "val_loss": "val/loss", "lr": "lr"}
        mfu = metrics.get("mfu", UNKNOWN_MFU) * 100  # per cent
        self.run.log({"iter": step, "mfu": mfu} | {new: metrics[old] for old, new in keys.items()})

    def close(self) -> None:
        self.run.finish()


def announce(line: str, write: Callable[[str], None] | None = None) -> bool:
    """Prints a line. Returns whether somebody may still read: a full disk costs lines, not the run."""
    write = write or (lambda text: print(text, flush=True))
    try:
        try:
            write(line)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            write(line.encode(encoding, "replace").decode(encoding))
    except OSError as error:
        return error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, None)
    return True


def teller(is_master: bool) -> Callable[[str], None]:
    """What says a line before there is a RunLog; other processes than the first say nothing."""

    def tell(line: str) -> None:
        if is_master:
            announce(line)

    return tell


class RunLog:
    """All of a run's reporting. Only the master process has sinks and speaks."""

    def __init__(
        self, config: Config, is_master: bool, first: int, last: int, resumed: bool, evaluated: bool = True,
        remaining: Remaining | None = None,
    ):  # fmt: skip
        self.remaining, self.begin = remaining, time.monotonic()
        self.told_at = -math.inf  # when the time that is left was said last
        self.sinks: list[Sink] = []
        self.bar: Progress | None = None
        self.silent, self.out_dir = not is_master, Path(config.training.out_dir)
        self.reader_is_gone = False
        self.failing: set[str] = set()
        if not is_master:
            return
        if not config.training.eval_only:  # which changes no file
            self.sinks.append(JsonLines(self.out_dir / METRICS, first if resumed else None, evaluated))
            if config.logging.tensorboard:
                try:
                    self.sinks.append(TensorBoard(self.out_dir / "tensorboard"))
                except OSError as error:
                    raise UserError(f"cannot write {self.out_dir / 'tensorboard'}: {error.strerror or error}") from None
        if config.logging.wandb_log:
            self.sinks.append(WandB(config))
        console = Console()
        wanted = config.logging.progress
        if not config.training.eval_only and (wanted == "bar" or (wanted == "auto" and _is_live(console))):
            self.bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                TextColumn("{task.fields[left]}"),
                console=console,
            )
            self.task = self.bar.add_task("train", total=last, completed=first, status="", left="")
            self.bar.start()

    def say(self, line: str) -> None:
        """One line on the terminal, above the bar."""
        if self.silent:
            return
        if not announce(line, self._print_above_bar if self.bar is not None else None):
            self.silent = self.reader_is_gone = True

    def _print_above_bar(self, line: str) -> None:
        assert self.bar is not None
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def train_step(self, step: int, metrics: dict[str, float]) -> None:
        """metrics: loss, lr, grad_norm, time_ms, tokens_per_s, and mfu where the device's peak is known."""
        self._log(step, metrics)
        mfu = metrics.get("mfu", UNKNOWN_MFU)
        if self.bar is not None:
            share = f"{mfu * 100:.0f}%" if mfu >= 0 else "n/a"
            status = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_s']:,.0f} tok/s  mfu {share}"
            self.bar.update(self.task, completed=step + 1, status=status, left=self._left(step + 1))
        else:
            took = metrics["time_ms"]
            self.say(f"iter {step}: loss {metrics['loss']:.4f}, time {took:.2f}ms, mfu {mfu * 100:.2f}%")
            self._tell_left(step + 1)

    def _left(self, done: int) -> str:
        """The time to the end of the run, with so many updates done; nothing where it is not known yet."""
        seconds = self.remaining.seconds(done) if self.remaining is not None else None
        return "" if seconds is None else f"{in_words(seconds)} left"

    def _tell_left(self, done: int) -> None:
        """A line of it, now and then, where there is no bar and the run is not about to end."""
        if self.remaining is None or self.remaining.timer.updates < TELL_AFTER:
            return
        now = time.monotonic()
        seconds = self.remaining.seconds(done)
        if seconds is None or seconds < TELL_ABOVE or now - self.told_at < TELL_EVERY:
            return
        self.told_at = now
        self.say(f"about {in_words(seconds)} left, until {clock_time(seconds)}")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """metrics: train_loss, val_loss, lr, and mfu where it is known."""
        self._log(step, metrics)
        self.say(f"step {step}: train loss {metrics['train_loss']:.4f}, val loss {metrics['val_loss']:.4f}")

    def final(self, step: int, found: Evaluation) -> None:
        """The whole validation split's loss at the end of the run."""
        metrics = {"val_loss_full": found.loss, "perplexity": found.perplexity}
        text = f"final: val loss {found.loss:.4f} over the whole split ({found.tokens:,} tokens), "
        text += f"perplexity {found.perplexity:.2f}"
        if (bits := found.bits_per_byte) is not None:
            metrics["bits_per_byte"] = bits
            text += f", {bits:.3f} bits per byte"
        self._log(step, metrics)
        self.say(text)

    def sample(self, step: int, text: str) -> None:
        """What the model wrote while it trained."""
        self.say(f"--- sample at step {step} ---\n{text}\n---")
        with self._writing("samples.jsonl"), (self.out_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "text": text}) + "\n")

    def plot(self) -> None:
        """Draws loss.png."""
        with self._writing("loss.png"):
            plot_losses(self.out_dir / METRICS, self.out_dir / "loss.png")

    def sync(self) -> None:
        """Makes metrics.jsonl durable: a checkpoint must not outlive the lines of its own steps."""
        for sink in self.sinks:
            if isinstance(sink, JsonLines):
                sink.sync()

    def forget_from(self, step: int, evaluated: bool) -> None:
        """The steps from here on are done anew; the destinations that can, let go of them."""
        for sink in self.sinks:
            if isinstance(sink, JsonLines):
                with self._writing("JsonLines"):
                    sink.forget_from(step, evaluated)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            with self._writing(type(sink).__name__):
                sink.log(step, metrics)

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """A disk that is full costs numbers, not the run; what a file could not take is tried again with the next."""
        try:
            yield
        except OSError as error:
            if what not in self.failing:
                self.say(f"warning: {what} cannot be written ({error.strerror or error}); the run goes on")
            self.failing.add(what)
        else:
            self.failing.discard(what)

    def close(self, step: int | None = None) -> None:
        """Ends the bar, at this step where it is given, and all destinations."""
        if self.bar is not None:
            took = in_words(time.monotonic() - self.begin)
            self.bar.update(self.task, completed=step, left=f"in {took}")
            self.bar.stop()
        for sink in self.sinks:
            with self._writing(type(sink).__name__):
                sink.close()


def _is_live(console: Console) -> bool:
    return sys.stdout.isatty() and not console.is_dumb_terminal


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; what is none, such as a line that a kill cut short, is left out."""
    entries = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                entries.append(entry)
    return entries


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draws the training and validation losses of a metrics.jsonl. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = read_metrics(metrics)
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for key, label, style in (("loss", "train (batch)", "-"), ("val_loss", "validation", "o-")):
        points = [(e["step"], e[key]) for e in entries if type(e.get(key)) is float]
        if points:
            width = 1 if style == "-" else 2
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=width, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
