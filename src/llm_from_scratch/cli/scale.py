"""llm-scale: trains models of several sizes and budgets, and fits a scaling law."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config
from ..errors import UserError
from ..machine.budget import parse_budget
from ..machine.extras import is_installed
from ..machine.files import to_json, write_errors, write_whole
from ..machine.terminal import announce
from ..settings import at_least
from ..sweep.space import Choices, Space
from ..sweep.study import Study
from .common import command
from .many_runs import FOLDER, check_run, read_command, run_settings, run_study

LAW, TABLE, PLOT = "law.json", "scale.md", "scale.png"
COMMON = (
    "sizes", "budgets", "seeds", "name", "workers", "dataset", "batch_size", "block_size", "optimizer_type", "seed",
)  # fmt: skip
HELP = """Trains models of several sizes for several budgets, and fits a scaling law, which
predicts the loss of larger models and longer runs. Also accepts the options of
llm-train.

  llm-scale quick --dataset=book --sizes=4 --budgets=1Mtokens,4Mtokens
  llm-scale quick --dataset=book --sizes=64,128,256 --budgets=1min,4min

To resume, run the same command again. To share the work, run the command in other
processes or on other machines. Writes a table, a plot, and law.json for the option
--law of llm-train."""


@dataclass
class ScaleOptions:
    """Sizes and lengths of the runs."""

    sizes: str = "4"
    """Number of sizes: the preset's and smaller ones, each with about half the parameters of the next larger. Or
    widths: 64,128,256."""
    budgets: str = "1Mtokens,4Mtokens"
    """Lengths of the runs: times (1min,4min), tokens or FLOPs."""
    seeds: int = 1
    """Runs per size and budget, with different seeds."""
    name: str = "scale"
    """Name of the results; their folder is out-sweep/NAME."""
    workers: int = 1
    """Number of runs at the same time."""

    metric, pruner, budget_each = "bits_per_byte", "none", None  # the options of a sweep that are fixed here

    def validate(self) -> None:
        at_least(self, 1, "seeds", "workers")

    def points(self) -> tuple[list[int], list[str]]:
        """The widths, or the number of them, and the budgets. Raises UserError."""
        sizes, budgets = ([part.strip() for part in text.split(",")] for text in (self.sizes, self.budgets))
        if not all(size.isdecimal() and len(size) < 7 for size in sizes):
            raise UserError(f"sizes={self.sizes!r} is not valid: expected a number of sizes, or widths such as 64,128")
        for budget in budgets:
            parse_budget(budget)
        if len(set(budgets)) < 2 or len(set(budgets)) < len(budgets):
            raise UserError(f"budgets={self.budgets!r} is not valid: expected two or more, such as 1Mtokens,4Mtokens")
        return [int(size) for size in sizes], budgets


@dataclass
class ScaleCommand(Config):
    options: ScaleOptions = field(default_factory=ScaleOptions)


def _main(argv: list[str]) -> int:
    parsed = read_command(ScaleCommand, argv, "llm-scale", HELP, COMMON)
    config, options = parsed.tree, parsed.tree.options
    sizes, budgets = options.points()
    check_run(parsed, set(), has_budget=True)
    from ..training.check import check

    check(config)
    from ..sweep.fit import FEWEST, fit, too_few
    from ..sweep.ladder import law_json, lines, measured, plot, shapes

    models = shapes(config.model, sizes)
    if (runs := len(models) * len(budgets) * options.seeds) < FEWEST:
        raise too_few(runs)
    space: Space = {"budget": Choices(tuple(budgets)), "n_embd": Choices(tuple(models))}
    folder = Path(FOLDER) / options.name
    about = {
        "over": {name: str(part) for name, part in space.items()}, "settings": run_settings(parsed, has_budget=True),
        "seeds": options.seeds, "metric": options.metric,
    }  # fmt: skip
    study = Study(
        folder, space, about, len(models) * len(budgets), "grid", seed=config.system.seed,
        settings_of=lambda point: models[point["n_embd"]],
    )  # fmt: skip
    if code := run_study(study, parsed, options, about, argv, "llm-scale"):
        return code
    points = [measured(run) for row in study.rows() if row.loss is not None for run in study.runs(row)]
    found = fit(points)
    table = lines(points, found)
    print("\n".join(table))
    with write_errors(folder):
        write_whole(folder / TABLE, ("\n".join(table) + "\n").encode())
        write_whole(folder / LAW, to_json(law_json(found)))
        if is_installed("matplotlib"):
            plot(folder / PLOT, points, found.law)
    announce(f"scaling law: {folder / LAW}")
    return 0


main = command(_main)

if __name__ == "__main__":
    sys.exit(main())
