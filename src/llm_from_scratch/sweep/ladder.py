"""Model sizes for a scaling law, and the law's table and plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..checkpoint.store import find_checkpoint, read_settings
from ..config import Config, GPTConfig
from ..core.dataset import TokenData, resolve_dataset
from ..core.sizes import count_params, embedding_params
from ..errors import UserError
from ..presets import build
from ..training.law import CONSTANTS, Law
from ..training.loggers import METRICS, read_entries
from .fit import Fit, Point

STEP = math.sqrt(2)  # between the widths of two neighbours: about twice the parameters


def shapes(model: GPTConfig, sizes: list[int]) -> dict[str, dict[str, str]]:
    """Width -> settings of a model shaped like `model`: heads as wide, layers in proportion. sizes: the widths, or the
    number of them; then the largest is `model`."""
    head = model.n_embd // model.n_head
    if len(sizes) == 1:
        sizes = [max(1, round(model.n_embd / head * STEP**-k)) * head for k in reversed(range(sizes[0]))]
    if len(set(sizes)) < len(sizes) or len(sizes) < 2:
        raise UserError(
            f"expected different widths, got {', '.join(map(str, sizes))} (multiples of the head width {head}): start "
            "from a wider model, or give two or more widths: --sizes=64,128,256"
        )
    found = {}
    for width in sizes:
        if width < 1 or width % head:
            raise UserError(f"sizes: the width {width} is not a multiple of the head width {head}")
        layers = max(1, round(model.n_layer * width / model.n_embd))
        settings = {"n_layer": layers, "n_head": width // head, "n_embd": width}
        found[str(width)] = {name: str(value) for name, value in settings.items()}
    return found


def measured(run: Path) -> Point:
    """The measurement of a complete run, for the law."""
    settings = read_settings(find_checkpoint(run, "last", verify=False))
    config = build(Config, {name: section for name, section in settings.items()})
    entries = [entry for entry in read_entries(run / METRICS) if type(entry.get("bits_per_byte")) is float]
    bits, loss = entries[-1]["bits_per_byte"], entries[-1]["val_loss_full"]
    bytes_per_token = loss / (math.log(2) * bits)
    data = TokenData.open(resolve_dataset(config.data.dataset), "train")
    per_update = config.data.batch_size * config.training.gradient_accumulation_steps * config.model.block_size
    params = count_params(config.model) - embedding_params(config.model)
    seen = entries[-1]["step"] * per_update * bytes_per_token
    return Point(params, seen, len(data) * bytes_per_token, bits)


def lines(points: list[Point], found: Fit) -> list[str]:
    """A Markdown table of the runs, and the law's constants."""
    law = found.law
    text = ["| parameters | bytes seen | epochs | bits per byte | predicted | error |", "|---|---|---|---|---|---|"]
    for point in sorted(points, key=lambda p: (p.params, p.seen)):
        bits = law.bits(point.params, point.seen, point.unique)
        text.append(
            f"| {point.params:,.0f} | {point.seen:,.0f} | {point.seen / point.unique:.2f} | {point.bits:.4f} | "
            f"{bits:.4f} | {point.bits / bits - 1:+.1%} |"
        )
    text += ["", "| constant | value | 90% interval |", "|---|---|---|"]
    for name, (low, high) in found.intervals.items():
        text.append(f"| {name} | {getattr(law, name):.4g} | {low:.4g} to {high:.4g} |")
    return [*text, f"| error SD | {law.spread:.1%} | |"]


def law_json(found: Fit) -> dict[str, Any]:
    """The law as `llm-train --law=FILE` reads it, with its intervals."""
    constants = {name: getattr(found.law, name) for name in CONSTANTS}
    return {**constants, "intervals": {name: list(ends) for name, ends in found.intervals.items()}}


def plot(path: Path, points: list[Point], law: Law) -> None:
    """Loss over the bytes seen, a curve for each size. Needs matplotlib."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    ends = min(p.seen for p in points) / 2, max(p.seen for p in points) * 4
    curve = np.geomspace(*ends, 100)
    for params in sorted({p.params for p in points}):
        own = [p for p in points if p.params == params]
        (line,) = axes.plot(curve, [law.bits(params, seen, own[0].unique) for seen in curve], linewidth=1)
        axes.plot([p.seen for p in own], [p.bits for p in own], "o", color=line.get_color(), label=f"{params:,.0f}")
    axes.set(xscale="log", xlabel="bytes trained on", ylabel="bits per byte, validation split")
    axes.legend(title="parameters")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
