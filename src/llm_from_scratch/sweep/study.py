"""The trials of a sweep in optuna's journal, a file that several processes and machines share.

A worker locks each trial that it runs. The system releases the lock when the worker ends, however it ends, so a running
trial without a lock was cut: the next worker continues it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine.extras import require
from ..machine.files import lock_file, write_errors
from .space import Space, combinations

JOURNAL, SETTINGS = "journal.log", "settings.yaml"
STUDY = "sweep"
STARTUP = 5  # complete trials before the median counts


@dataclass
class Row:
    """A trial: its settings and its result."""

    number: int
    state: str
    """complete, pruned, failed, running or waiting."""
    point: dict[str, str] = field(default_factory=dict)
    """Of the space."""
    settings: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    """Seed -> loss of a complete run."""
    message: str = ""
    reached: tuple[int, float] | None = None
    """The last evaluation that was reported, and its loss."""

    @property
    def loss(self) -> float | None:
        return statistics.fmean(self.losses.values()) if self.state == "complete" else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.losses.values()) if self.state == "complete" and len(self.losses) > 1 else None


@dataclass
class Claim:
    """A trial that this process runs."""

    number: int
    folder: Path
    point: dict[str, str]
    """Of the space."""
    settings: dict[str, str]
    attributes: dict[str, Any]
    """Notes of earlier workers."""
    lock: Any
    trial: Any


class Study:
    """A sweep's folder: its journal and its trials."""

    def __init__(
        self, folder: Path, space: Space, setup: dict[str, Any], trials: int, sampler: str = "auto",
        pruner: str = "none", seed: int = 0, settings_of: Callable[[dict[str, str]], dict[str, str]] = dict,
    ):  # fmt: skip
        """setup: what defines the sweep, compared if it exists already. settings_of: a point of the space -> settings
        of a run. Raises UserError if the folder holds another sweep."""
        require("optuna", "sweep", "a sweep")
        import optuna

        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        setup = json.loads(json.dumps(setup))  # as the journal returns it: the keys of a dict are text
        self.folder, self.space, self.wanted, self.seed = folder, space, trials, seed
        self.settings_of, self.states = settings_of, optuna.trial.TrialState
        self.grid = combinations(space) if sampler in ("auto", "grid") else None
        if sampler == "grid" and self.grid is None:
            raise UserError("sampler=grid needs lists: write each setting as NAME=A,B,C")
        if self.grid is not None and sampler == "auto" and len(self.grid) > trials:
            self.grid = None
        self.sampler = "random" if sampler == "random" else "tpe"
        self.pruner: Any = {
            "none": optuna.pruners.NopPruner,
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
            "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        }[pruner]()
        with self._alone():
            storages: Any = optuna.storages
            journal = storages.journal.JournalFileBackend(
                str(folder / JOURNAL), lock_obj=_JournalLock(folder / JOURNAL)
            )
            self.storage: Any = optuna.storages.JournalStorage(journal)
            study = optuna.create_study(study_name=STUDY, storage=self.storage, load_if_exists=True)
            _compare(folder, study.user_attrs.get("setup"), setup)
            if "setup" not in study.user_attrs:
                study.set_user_attr("setup", setup)
            if self.grid is not None and "grid" not in study.user_attrs:
                started = bool(study.get_trials(deepcopy=False))  # a process that was killed here left a part of them
                for point in self.grid:
                    study.enqueue_trial(point, skip_if_exists=started)
                study.set_user_attr("grid", True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One worker at a time."""
        with write_errors(self.folder):  # optuna's error names no file
            lock = lock_file(self.folder / ".lock", wait=True)
            try:
                yield
            finally:
                lock.release()

    def _study(self, number: int = 0) -> Any:
        """The study with a sampler that draws for trial `number`."""
        import optuna

        seed = (self.seed + number) % (1 << 32)
        if self.sampler == "random":
            sampler: Any = optuna.samplers.RandomSampler(seed=seed)
        else:  # constant_liar: workers that run at once choose different points
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return optuna.load_study(study_name=STUDY, storage=self.storage, sampler=sampler, pruner=self.pruner)

    def _trials(self) -> list[Any]:
        return self._study().get_trials(deepcopy=False)

    def claim(self) -> Claim | None:
        """A trial that was cut, or else the next one; None if all have been started."""
        import optuna

        with self._alone():
            trials = self._trials()
            for old in trials:
                if old.state == self.states.RUNNING and (lock := self._lock(old.number)) is not None:
                    return self._claimed(optuna.trial.Trial(self._study(old.number), old._trial_id), lock)
            waiting = sum(trial.state == self.states.WAITING for trial in trials)
            if len(trials) - waiting >= self.wanted or (self.grid is not None and not waiting):
                return None
            trial = self._study(len(trials)).ask()
            lock = self._lock(trial.number)
            assert lock is not None, "a trial that has just been created is locked"
            return self._claimed(trial, lock)

    def _lock(self, number: int) -> Any:
        return lock_file(self.path(number) / ".worker")

    def path(self, number: int) -> Path:
        return self.folder / f"trial-{number}"

    def _claimed(self, trial: Any, lock: Any) -> Claim:
        point = {name: part.suggest(trial, name) for name, part in self.space.items()}
        settings = self.settings_of(point)
        if "settings" not in trial.user_attrs:
            trial.set_user_attr("point", point)
            trial.set_user_attr("settings", settings)
        return Claim(trial.number, self.path(trial.number), point, settings, dict(trial.user_attrs), lock, trial)

    def note(self, claim: Claim, name: str, value: Any) -> None:
        """Stores an attribute of a trial."""
        with write_errors(self.folder):
            claim.trial.set_user_attr(name, value)
        claim.attributes[name] = value

    def is_hopeless(self, claim: Claim, at: int, loss: float) -> bool:
        """Reports the loss of an evaluation, and returns whether the trial should end there. A step that is known is
        judged again if it is the last one: the process may have been killed before."""
        with write_errors(self.folder):
            known = self._trials()[claim.number].intermediate_values
            if at < max(known, default=at):
                return False
            if at not in known:
                claim.trial.report(loss, at)
            return bool(claim.trial.should_prune())

    def finish(self, claim: Claim, state: str, losses: dict[str, float] | None = None, message: str = "") -> None:
        """Ends a trial: complete, pruned or failed."""
        if losses:
            self.note(claim, "losses", losses)
        if message:
            self.note(claim, "message", message)
        value = statistics.fmean(losses.values()) if losses and state == "complete" else None
        names = {"complete": self.states.COMPLETE, "pruned": self.states.PRUNED, "failed": self.states.FAIL}
        with write_errors(self.folder):
            self._study().tell(claim.number, value, names[state])
        claim.lock.release()

    def runs(self, row: Row) -> list[Path]:
        """The run of each seed of a complete trial."""
        folder = self.path(row.number)
        return [folder] if len(row.losses) == 1 else [folder / f"seed-{seed}" for seed in row.losses]

    def lengths(self, number: int) -> dict[str, str]:
        """The settings that a budget decided for a trial."""
        max_iters = self._trials()[number].user_attrs.get("max_iters")
        return {} if max_iters is None else {"max_iters": str(max_iters)}

    def rows(self) -> list[Row]:
        """All trials: complete ones with the best first, then pruned, failed and unfinished ones."""
        names = {
            self.states.COMPLETE: "complete", self.states.PRUNED: "pruned", self.states.FAIL: "failed",
            self.states.RUNNING: "running", self.states.WAITING: "waiting",
        }  # fmt: skip
        rows = []
        for trial in self._trials():
            last, noted = trial.last_step, trial.user_attrs
            reached = None if last is None else (last, trial.intermediate_values[last])
            known = {name: noted[name] for name in ("point", "settings", "losses", "message") if name in noted}
            rows.append(Row(trial.number, names[trial.state], reached=reached, **known))
        order = list(names.values())
        return sorted(rows, key=lambda row: (order.index(row.state), row.loss or 0.0, row.number))


class _JournalLock:
    """The lock for writing the journal. Optuna's own are files that a killed process leaves behind."""

    def __init__(self, path: Path):
        self.path, self.lock = path, None

    def acquire(self) -> bool:
        self.lock = lock_file(self.path.with_name(".journal-lock"), wait=True)
        _drop_torn_line(self.path)
        return True

    def release(self) -> None:
        assert self.lock is not None
        self.lock.release()


def _drop_torn_line(path: Path) -> None:
    """Cuts a last line without an end, which a power cut leaves: the next line would continue it."""
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        if end and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _compare(folder: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raises UserError if the sweep of a folder is another one."""
    if before is None or before == now:
        return
    for part in now:
        old, new = _flat(before.get(part)), _flat(now[part])
        for name in [*new, *(name for name in old if name not in new)]:
            if old.get(name) != new.get(name):
                what = f"{part}.{name}" if name else part
                raise UserError(
                    f"{folder} holds a sweep with another {what}: {old.get(name)} there, {new.get(name)} now; "
                    "choose another --name"
                )


def _flat(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"": value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= {**item} if isinstance(item, dict) else {name: item}
    return flat
