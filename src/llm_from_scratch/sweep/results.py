"""The results of a sweep: a table, sweep.json, and sweep.png."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

from ..machine.extras import is_installed
from ..machine.files import to_json, write_errors, write_whole
from .space import Range, Space, words_of
from .study import SETTINGS, Row, Study

RESULTS, PLOT = "sweep.json", "sweep.png"


def table(rows: list[Row], metric: str) -> list[str]:
    """The trials as lines, the best first."""
    names = list(dict.fromkeys(name for row in rows for name in row.point | row.settings))
    shown = [row for row in rows if row.state != "waiting"]
    cells = [["trial", metric, *names, ""]]
    for row in shown:
        loss = "" if row.loss is None else f"{row.loss:.4f}"
        if row.spread is not None:
            loss += f" ± {row.spread:.4f}"
        cells.append([str(row.number), loss, *((row.point | row.settings).get(name, "") for name in names), _note(row)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _note(row: Row) -> str:
    if row.state == "complete":
        return ""
    if row.state == "pruned" and row.reached:
        return f"pruned after {row.reached[0]}0% with val_loss {row.reached[1]:.4f}"
    return f"{row.state}: {row.message}" if row.message else row.state


def train_command(study: Study, row: Row, seed: int) -> str:
    """The command that trains a trial's model again."""
    settings = row.settings | study.lengths(row.number)
    seeds = {} if "seed" in settings else {"seed": str(seed)}
    words = words_of({**settings, **seeds, "out_dir": "out-best"})
    return shlex.join(["llm-train", str(study.folder / SETTINGS), *words])


def write_results(folder: Path, rows: list[Row], about: dict[str, Any], space: Space) -> None:
    """Writes sweep.json, and sweep.png if matplotlib is installed. Several workers may do so at once."""
    trials = [
        {
            "trial": row.number, "state": row.state, "settings": row.settings, "loss": row.loss, "spread": row.spread,
            "losses": row.losses, "message": row.message,
        }
        for row in rows
    ]  # fmt: skip
    complete = [row for row in rows if row.loss is not None]
    with write_errors(folder):
        write_whole(folder / RESULTS, to_json({**about, "trials": trials}))
        if is_installed("matplotlib") and complete:
            _plot(folder / PLOT, complete, about["metric"], space)


def _plot(path: Path, rows: list[Row], metric: str, space: Space) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(
        1, len(space), figsize=(4 * len(space), 3.5), squeeze=False, sharey=True, constrained_layout=True
    )
    for axes, (name, values) in zip(all_axes[0], space.items(), strict=True):
        texts = [row.point[name] for row in rows]
        places: list[Any] = texts
        with contextlib.suppress(ValueError):  # words
            places = [float(text) for text in texts]
        if places is texts:
            order = values.ends()
            places = [order.index(text) for text in texts]
            axes.set_xticks(range(len(order)), order)
        losses, spreads = [row.loss for row in rows], [row.spread or 0.0 for row in rows]
        axes.errorbar(places, losses, spreads, fmt="o", markersize=4)
        if isinstance(values, Range) and values.log:
            axes.set_xscale("log")
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    all_axes[0][0].set(ylabel=metric)
    figure.savefig(path, dpi=120)
    plt.close(figure)
