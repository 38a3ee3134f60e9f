"""llm-sweep: searches settings with many runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..config import Config
from ..machine.budget import parse_budget
from ..settings import at_least
from ..sweep.space import check_space, combinations, parse_space
from ..sweep.study import Study
from .common import command
from .many_runs import FOLDER, check_run, read_command, run_settings, run_study

TRIALS = 20
COMMON = (
    "over", "trials", "seeds", "budget_each", "sampler", "pruner", "metric", "name", "workers", "dataset", "max_iters",
    "seed",
)  # fmt: skip
HELP = """Trains with many combinations of settings and ranks the results. Also accepts the options of llm-train.

  llm-sweep quick --dataset=book --over='learning_rate=log(1e-3,1e-1)'
  llm-sweep quick --over='n_layer=2,4,6 dropout=0..0.3' --trials=30 --seeds=3
  llm-sweep quick --over='n_embd=64,128' --budget_each=1min --workers=2

--over gives each setting a list (2,4,6), a range (0..0.3; 64..512/64 in steps of
64) or a logarithmic range (log(1e-4,1e-1)). In a YAML preset, over is a list of
NAME=VALUES strings. To resume a stopped or killed sweep, run the same command again.
To share the work, run the command in other processes or on other machines."""


@dataclass
class SweepOptions:
    """The sweep."""

    over: tuple[str, ...] = ()
    """Settings and their ranges: 'NAME=LOW..HIGH NAME=log(LOW,HIGH) NAME=A,B,C'."""
    trials: int | None = None
    """Number of trials. None: every combination if only lists are given, else 20."""
    seeds: int = 1
    """Runs per trial, with different seeds. The table shows mean and standard deviation."""
    budget_each: str | None = None
    """Length of each run: 90s, 10min, 2h, 50Mtokens or 1e15flops. None: max_iters or epochs."""
    sampler: Literal["auto", "grid", "random", "tpe"] = "auto"
    """grid: every combination of lists. tpe: sample near good trials (arXiv 1105.5463). auto: grid for lists,
    else tpe."""
    pruner: Literal["none", "median", "halving"] = "median"
    """median: stop a trial that is worse than the median of the complete trials (at least five). halving: stop a trial
    that is not in the best third (arXiv 1810.05934). none: never."""
    metric: Literal["val_loss_full", "val_loss", "bits_per_byte"] = "val_loss_full"
    """Result of a run: loss of the whole validation split, the best estimated loss, or bits per byte."""
    name: str | None = None
    """Name of the sweep; its folder is out-sweep/NAME. None: from the swept settings."""
    workers: int = 1
    """Number of runs at the same time."""

    def validate(self) -> None:
        at_least(self, 1, "trials", "seeds", "workers")
        if self.budget_each is not None:
            parse_budget(self.budget_each)


@dataclass
class SweepCommand(Config):
    options: SweepOptions = field(default_factory=SweepOptions)


def _main(argv: list[str]) -> int:
    parsed = read_command(SweepCommand, argv, "llm-sweep", HELP, COMMON)
    config, options = parsed.tree, parsed.tree.options
    space = parse_space(options.over)
    has_budget = options.budget_each is not None
    check_run(parsed, set(space), has_budget)
    check_space(space, config)
    if "dataset" not in space:
        from ..training.check import check

        check(config)
    folder = Path(FOLDER) / (options.name or "-".join(space)[:60])
    grid = combinations(space) if options.sampler in ("auto", "grid") else None
    trials = options.trials or (len(grid) if grid else TRIALS)
    settings = run_settings(parsed, has_budget)
    about = {
        "over": {name: str(part) for name, part in space.items()}, "settings": settings, "seeds": options.seeds,
        "metric": options.metric, "budget_each": options.budget_each,
    }  # fmt: skip
    study = Study(folder, space, about, trials, options.sampler, options.pruner, config.system.seed)
    return run_study(study, parsed, options, about, argv)


main = command(_main)

if __name__ == "__main__":
    sys.exit(main())
