"""`just storm`: every fault, with the number of cases in docs/RELIABILITY.md, and the results.

python -m llm_from_scratch.tests.faults.storm [--prove] [--seed=N] [--share=F] [--jobs=N] [ROW ...]

Each row runs in its own process with one thread: it forks, and a fork of a process that has run two threads of torch
hangs. --share scales the number of cases. --prove adds one defect after another to the program and expects the row to
detect each. Exit code 0 if nothing failed (with --prove: if every defect was detected), else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from .rows import Noticed, Report, Row

ROWS = (
    "cuts", "kills", "processes", "operations", "power", "flips", "directories", "signals", "numbers", "endurance",
    "ranks", "data_files", "hostile", "mutations", "shards",  # last: a library starts threads, and threads write shards
)  # fmt: skip
SHOWN = 5  # failures printed of a row


def load(name: str) -> Row:
    return importlib.import_module(f".{name}", __package__).ROW


def run_row(name: str, count: int, seed: int, defect: str | None = None) -> Report:
    """Runs a row in this process, in a folder that is removed afterwards. With a defect, only until a case fails."""
    row = load(name)
    context = row.defects[defect]() if defect else contextlib.nullcontext()
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix=f"storm-{name}-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        try:
            with context, mock.patch.object(Report, "one_is_enough", defect is not None):
                return row.run(count, seed, Path(folder))
        except Noticed as noticed:
            report: Report = noticed.args[0]
            report.done += 1  # the case that failed is not counted yet in most rows
            return report
        finally:
            os.chdir(before)


def in_process(cases: dict[str, int], seed: int, defect: str | None = None) -> dict[str, Report]:
    """Runs cases of rows, one row after the other, in a separate process that prints nothing here."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--child"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "reports.json"
        child = subprocess.run(
            [*command, json.dumps([cases, seed, str(result), defect])], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        found = json.loads(result.read_text()) if result.exists() else {}
    tail = " | ".join(child.stdout.decode(errors="replace").strip().splitlines()[-3:])
    lost = Report(0, [f"the row itself ended with exit code {child.returncode}: {tail}"])
    return {name: Report(**found[name]) if name in found else lost for name in cases}


def _child(told: str) -> int:
    cases, seed, result, defect = json.loads(told)
    # behind nohup or in the background of a script some signals are ignored, and a trainer leaves them so
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGUSR1", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    pid, reports = os.getpid(), {}
    for name, count in cases.items():
        reports[name] = vars(run_row(name, count, seed, defect))
        if os.getpid() == pid:  # a row's own children do not report
            Path(result).write_text(json.dumps(reports))
    return 0


def _timed(name: str, count: int, seed: int, defect: str | None = None) -> tuple[Report, float]:
    begin = time.monotonic()
    return in_process({name: count}, seed, defect)[name], time.monotonic() - begin


def _count(cases: int, share: float) -> int:
    return max(1, math.ceil(cases * share))


def _storm(names: list[str], share: float, seed: int, jobs: int) -> bool:
    good = True
    counts = {name: _count(load(name).target, share) for name in names}
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {name: pool.submit(_timed, name, counts[name], seed) for name in names}
        for name, future in waiting.items():
            report, seconds = future.result()
            failed = bool(report.failures) or report.done < counts[name]
            good &= not failed
            extra = "".join(f", {value:,} {what}" for what, value in report.counts.items())
            print(
                f"{'FAILED' if failed else 'ok':7}{name:12}{report.done:8,} of {counts[name]:,} "
                f"({load(name).title}){extra}; {len(report.failures)} failures, {seconds:.0f} s",
                flush=True,
            )
            for line in report.failures[:SHOWN]:
                print(f"         {line}", flush=True)
    return good


def _prove(names: list[str], share: float, seed: int, jobs: int) -> bool:
    good = True
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {
            (name, defect): pool.submit(_timed, name, _count(load(name).prove, share), seed, defect)
            for name in names
            for defect in (None, *load(name).defects)
        }
        for (name, defect), future in waiting.items():
            report, seconds = future.result()
            noticed = bool(report.failures)
            right = noticed == (defect is not None) and report.done > 0
            good &= right
            outcome = "a case failed" if noticed else f"none of {report.done} cases failed"
            label = f"with {defect}" if defect else "as it is"
            print(f"{'ok' if right else 'WRONG':7}{name:12}{label:48}{outcome}, {seconds:.0f} s", flush=True)
            for line in report.failures[: 1 if right else SHOWN]:
                print(f"         {line:.300}", flush=True)
    return good


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        return _child(argv[1])
    parser = argparse.ArgumentParser(prog="just storm", description="Injects every fault and checks the result.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of: {', '.join(ROWS)} (default: all)")
    parser.add_argument("--prove", action="store_true", help="add defects, and check that each is detected")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the cases to run")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="rows in parallel")
    options = parser.parse_args(argv)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"unknown row {', '.join(sorted(unknown))}; expected some of {', '.join(ROWS)}")
    names = [name for name in ROWS if name in options.rows or not options.rows]
    begin = time.monotonic()
    if options.prove:
        good = _prove(names, options.share, options.seed, options.jobs)
    else:
        good = _storm(names, options.share, options.seed, options.jobs)
    print(f"{'all passed' if good else 'FAILED'} after {(time.monotonic() - begin) / 60:.1f} min")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
