"""`./just demo`: prepare a text, train a small model, plot its loss curve and print samples, in a few minutes. Each
stage runs one of the commands. Arguments are passed to llm-train."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ..training.loggers import METRICS, read_entries
from .common import command

OUT_DIR = "out-demo"
Points = Sequence[tuple[int, float]]

# Bits of the dots of a braille character, by row and column in its cell of 4 x 2 (Unicode chart U+2800).
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def loss_curve(train: Points, val: Points, width: int = 80, height: int = 12, unicode: bool = True) -> str:
    """A text plot of the losses: at most `width` columns and height + 3 lines. train, val: (step, loss) in any order;
    non-finite losses are ignored. The train loss is averaged within a column and drawn as a line, each val loss as one
    mark. unicode=False draws in ASCII. Without losses, returns ""."""
    train = sorted(point for point in train if math.isfinite(point[1]))
    val = sorted(point for point in val if math.isfinite(point[1]))
    if not train and not val:
        return ""
    first, last = (pick(step for step, _ in [*train, *val]) for pick in (min, max))
    low, high = (pick(loss for _, loss in [*train, *val]) for pick in (min, max))
    gutter = max(len(f"{loss:.2f}") for loss in (low, high)) + 2
    columns, (across, down) = max(width - gutter, 10), (2, 4) if unicode else (1, 1)

    def x_of(step: int, cells: int) -> int:
        return round((step - first) / max(last - first, 1) * (cells - 1))

    def y_of(loss: float, cells: int) -> int:
        return round((high - loss) / ((high - low) or 1.0) * (cells - 1))

    # The line: the mean loss of each dot column, with vertical strokes between neighbours.
    losses: dict[int, list[float]] = {}
    for step, loss in train:
        losses.setdefault(x_of(step, columns * across), []).append(loss)
    cells = [[" "] * columns for _ in range(height)]
    if train:
        xs = np.arange(min(losses), max(losses) + 1)
        line = np.interp(xs, list(losses), [sum(of_column) / len(of_column) for of_column in losses.values()])
        ys = [y_of(loss, height * down) for loss in line]
        for x, y, previous in zip(xs, ys, [ys[0], *ys], strict=False):
            for dot in range(min(previous, y), max(previous, y) + 1):
                row, column = dot // down, x // across
                old = ord(cells[row][column]) if cells[row][column] != " " else 0x2800
                cells[row][column] = chr(old | BRAILLE[dot % down][x % across]) if unicode else "*"
    for step, loss in val:
        cells[y_of(loss, height)][x_of(step, columns)] = "●" if unicode else "o"

    labels = {0: high, height // 2: high - (high - low) * (height // 2) / max(height - 1, 1), height - 1: low}
    tick, wall, corner, floor = ("┤", "│", "└", "─") if unicode else ("+", "|", "+", "-")
    lines = []
    for row, content in enumerate(cells):
        label = f"{labels[row]:.2f} {tick}" if row in labels else wall
        lines.append((label.rjust(gutter) + "".join(content)).rstrip())
    of_train, of_val = ("⠒⠒", "●") if unicode else ("**", "o")
    legend = "   ".join([f"{of_train} train loss"] * bool(train) + [f"{of_val} val loss"] * bool(val))
    start = f"step {first}"
    lines.append(corner.rjust(gutter) + floor * columns)
    lines += [" " * gutter + text for text in (start + f"{last}".rjust(columns - len(start)), legend)]
    return "\n".join(lines)


def points(entries: list[dict[str, Any]], figure: str) -> Points:
    """(step, value) of one figure of a run's metrics, by step. The last entry of a step counts."""
    found = {entry["step"]: entry[figure] for entry in entries if isinstance(entry.get(figure), (int, float))}
    return sorted((step, float(value)) for step, value in found.items())


def draws_unicode() -> bool:
    if os.environ.get("TERM") == "dumb":
        return False
    try:
        "⣿●┤└─".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def option(argv: list[str], name: str) -> str | None:
    """The value of a setting on a command line: --name=value, --name value or --section.name=value."""
    value = None
    for arg, following in zip_longest(argv, argv[1:]):
        key, equals, text = arg.partition("=")
        if key.startswith("--") and key[2:].rpartition(".")[2] == name:
            value = text if equals else following
    return value


def call(name: str, *args: str) -> int:
    """Runs a command in a child process. Ctrl-C reaches the child too, so this waits until it ends."""
    sys.stdout.flush()
    env = {name: value for name, value in os.environ.items() if name != "LLM_ACTIVATE"}  # it prints its own hints
    child = subprocess.Popen([sys.executable, "-m", f"llm_from_scratch.cli.{name}", *args], env=env)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            code = child.wait()
            return code if code >= 0 else 128 - code  # ended by a signal: as a shell reports it


@command
def main(argv: list[str]) -> int:
    dataset, out_dir = option(argv, "dataset"), option(argv, "out_dir")
    settings = ["configs/quick.yaml", *argv]
    settings += [] if dataset else ["--dataset=demo"]
    settings += [] if out_dir else [f"--out_dir={OUT_DIR}"]
    if sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and not option(argv, "progress"):
        settings.append("--progress=bar")  # without a sample at the end: the demo prints its own
    folder = Path(out_dir or OUT_DIR)
    if any(arg.partition("=")[0] in ("--help", "-h", "--print_config", "--dry_run") for arg in argv):
        return call("train", *settings)

    if code := (not dataset and call("prepare_data", "demo")) or call("train", *settings):
        return code

    entries = read_entries(folder / METRICS)
    train, val = points(entries, "loss"), points(entries, "val_loss")
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    print("\n" + loss_curve(train, val, width=width, unicode=draws_unicode()))
    print("\nTwo samples:\n")
    if code := call("generate", f"--out_dir={folder}", "--num_samples=2", "--max_new_tokens=300"):
        return code

    checkpoint = max(folder.glob("step-*"), default=folder)
    places = [
        ("summary", folder / "README.md"), ("checkpoint", checkpoint), ("loss curve", folder / "loss.png"),
        ("TensorBoard log", folder / "tensorboard"),
    ]  # fmt: skip
    hints = [
        ("generate text", shlex.join(["./just", "generate", str(folder)])),
        ("plot the losses", "./just tensorboard"),
        ("train longer", "./just demo --max_iters=5000"),
        ("use your text", "./just prepare-data FILE, then ./just train"),
    ]
    print("\nFiles:")
    print("\n".join(f"  {name:<16} {place}" for name, place in places if place.exists()))
    print("\nNext steps:")
    print("\n".join(f"  {name:<16} {how}" for name, how in hints))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
