"""Shared by llm-sweep and llm-scale: the settings of their runs, the workers, the report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..machine.files import write_whole
from ..machine.processes import shield_children
from ..machine.terminal import announce
from ..presets import Parsed, parse
from ..settings import to_dict
from ..sweep.results import RESULTS, table, train_command, write_results
from ..sweep.study import SETTINGS, Row, Study
from .common import data_prepared_last, need_data
from .train import choose_length

if TYPE_CHECKING:  # it imports what --help does not need
    from ..sweep.worker import Runs

FOLDER = "out-sweep"
# Settings of the runs, unless they are given
SMALL = {"keep_last": "1", "loss_plot": "False"}
LENGTHS = ("max_iters", "epochs")
GPUS = Path("/proc/driver/nvidia/gpus")


def read_command(tree_type: type, argv: list[str], prog: str, text: str, common: Sequence[str]) -> Parsed[Any]:
    """The settings of a command line, checked. Raises UserError."""
    prepared = data_prepared_last()
    none = {} if prepared else {"dataset": "none found: run llm-prepare FILE"}
    parsed: Parsed[Any] = parse(
        tree_type, argv, prog=f"{prog} [PRESET ...]", description=text, defaults=prepared, base_preset="default",
        common=common, shown=lambda settings, files: none,
    )  # fmt: skip
    choose_length(parsed)
    parsed.tree.validate()
    return parsed


def check_run(parsed: Parsed[Any], over: set[str], has_budget: bool) -> None:
    """Raises UserError if settings do not suit the runs, or if no data is named or prepared. over: what is swept;
    has_budget: it sets their length."""
    config, options = parsed.tree, parsed.tree.options
    if parsed.on_command_line("out_dir"):
        raise UserError(f"the runs are written to {FOLDER}/NAME: choose it with --name instead of --out_dir")
    if config.training.init_from in ("resume", "auto"):
        raise UserError("each run resumes by itself: start from scratch (remove --init_from) or from weights")
    if config.training.eval_only:
        raise UserError("eval_only does not train: remove it")
    if options.metric != "val_loss" and not config.training.final_eval:
        raise UserError(f"metric={options.metric} needs --final_eval=True; or compare by --metric=val_loss")
    if "dataset" in over and (options.metric != "bits_per_byte" or options.pruner != "none"):
        raise UserError(
            "losses of different datasets are not comparable, because their tokenizers may differ: use "
            "--metric=bits_per_byte --pruner=none"
        )
    both = [name for name in LENGTHS if has_budget and (parsed.on_command_line(name) or name in over)]
    if both:
        raise UserError(f"the budget and {both[0]} both set the length of a run; remove one")
    if "seed" in over and options.seeds > 1:
        raise UserError("seed and seeds both set the seeds of the runs; remove one")
    if "dataset" not in parsed.sources and "dataset" not in over:
        need_data(config.data.dataset)


def run_settings(parsed: Parsed[Any], has_budget: bool) -> dict[str, Any]:
    """The settings that all runs share, by section."""
    settings = {section: values for section, values in to_dict(parsed.tree).items() if section != "options"}
    training = settings["training"]
    del training["out_dir"]
    if has_budget:
        training["epochs"] = settings["scheduler"]["lr_decay_iters"] = None
    if training["epochs"] is not None:
        del training["max_iters"]  # set by epochs; both would be refused
    return settings


def run_study(
    study: Study, parsed: Parsed[Any], options: Any, about: dict[str, Any], argv: list[str], prog: str = "llm-sweep"
) -> int:
    """Works on the trials of a study and reports. Returns the exit code."""
    import yaml

    from ..sweep.worker import run_trials

    shared = study.folder / SETTINGS
    write_whole(shared, yaml.safe_dump(about["settings"], sort_keys=False, allow_unicode=True).encode())
    shield_children()
    announce(f"{study.wanted} trials in {study.folder}: {' '.join(f'{k}={v}' for k, v in about['over'].items())}")
    code = run_trials(study, _runs(parsed, options, shared), options.workers, announce)
    rows = study.rows()
    failed = _report(study, rows, parsed, options, about)
    if code:
        announce(f"stopped; resume with: {shlex.join([prog, *argv])}")
    return code or failed


def _runs(parsed: Parsed[Any], options: Any, shared: Path) -> Runs:
    from ..sweep.worker import Runs

    config = parsed.tree
    seeds = [config.system.seed + k for k in range(options.seeds)]
    small = {name: value for name, value in SMALL.items() if name not in parsed.sources}
    if options.metric != "val_loss":  # without it, a trained trial would have no result
        small["final_eval"] = "always"
    threads, devices = _share(config, options.workers)
    return Runs(
        shared, seeds, options.metric, config.training.init_from, options.budget_each,
        parsed.on_command_line("eval_interval"), small, threads, devices,
    )  # fmt: skip


def _share(config: Any, workers: int) -> tuple[int | None, tuple[str, ...]]:
    """(threads of each run, CUDA devices to choose from), if several runs share the machine."""
    if workers == 1:
        return None, ()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_set = config.system.threads is not None or "OMP_NUM_THREADS" in os.environ
    threads = None if is_set else max(1, cores // workers)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(n) for n, _ in enumerate(GPUS.glob("*"))))
    many = config.system.device in ("auto", "cuda") and "," in visible
    return threads, tuple(visible.split(",")) if many else ()


def _report(study: Study, rows: list[Row], parsed: Parsed[Any], options: Any, about: dict[str, Any]) -> int:
    """Prints the table and the best trial, and writes the files. Returns 1 if all trials have failed."""
    print("\n".join(table(rows, options.metric)))
    write_results(study.folder, rows, about, study.space)
    announce(f"results: {study.folder / RESULTS}")
    elsewhere = sum(row.state == "running" for row in rows)
    if elsewhere:
        announce(f"{elsewhere} of the trials are unfinished, or run in other processes")
    best = rows[0] if rows and rows[0].loss is not None else None
    if best is not None:
        announce(f"repeat the best trial: {train_command(study, best, parsed.tree.system.seed)}")
    return int(bool(rows) and all(row.state == "failed" for row in rows))
