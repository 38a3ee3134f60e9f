"""The journal of a sweep: trials are claimed once, continued if they were cut, and pruned by hand-worked values."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.extras import is_installed
from llm_from_scratch.sweep.space import Space, parse_space
from llm_from_scratch.sweep.study import JOURNAL, Study

# not imported here: every worker of the tests would import it
pytestmark = pytest.mark.skipif(not is_installed("optuna"), reason="needs optuna")
LISTS = parse_space(["n_layer=1,2,3 bias=true,false"])
RANGES = parse_space(["learning_rate=log(1e-4,1e-1)"])


def study_in(folder: Path, space: Space = RANGES, trials: int = 8, **options: Any) -> Study:
    return Study(folder, space, {"over": {k: str(v) for k, v in space.items()}}, trials, **options)


def test_a_grid_is_searched_once(tmp_path: Path) -> None:
    a, b = study_in(tmp_path, LISTS, 6), study_in(tmp_path, LISTS, 6)  # two workers
    claims = [worker.claim() for _ in range(3) for worker in (a, b)]
    points = [tuple(claim.point.items()) for claim in claims if claim]
    assert len(points) == len(set(points)) == 6 and [claim.number for claim in claims if claim] == [*range(6)]
    assert a.claim() is None and b.claim() is None


def test_a_grid_has_at_most_one_trial_per_combination(tmp_path: Path) -> None:
    def claimed(trials: int) -> list[dict[str, str]]:
        study, found = study_in(tmp_path, LISTS, trials, seed=1), []
        while (claim := study.claim()) is not None:
            study.finish(claim, "complete", {"1": 1.0})
            found.append(claim.point)
        return found

    first = claimed(2)  # fewer than the combinations: drawn
    rest = claimed(100)
    assert len(first) == 2 and len(rest) == 4 and not any(point in first for point in rest)


def test_a_cut_trial_is_continued_first(tmp_path: Path) -> None:
    first = study_in(tmp_path)
    claims = [first.claim(), first.claim()]
    assert claims[0] and claims[1]
    first.note(claims[0], "max_iters", 30)
    claims[0].lock.release()  # as the system does when a process ends
    again = study_in(tmp_path).claim()
    assert again and (again.number, again.settings) == (0, claims[0].settings)
    assert again.attributes["max_iters"] == 30
    other = study_in(tmp_path).claim()
    assert other and other.number == 2  # the second one is still held


def test_workers_draw_different_points_and_a_sweep_is_repeatable(tmp_path: Path) -> None:
    drawn, held = [], []
    for name in ("a", "b"):
        for sampler in ("tpe", "random"):
            for _ in range(4):
                claim = study_in(tmp_path / name / sampler, sampler=sampler, seed=3).claim()
                assert claim
                held.append(claim)
                drawn.append(claim.settings["learning_rate"])
    assert drawn[:8] == drawn[8:] and len(set(drawn[:4])) == len(set(drawn[4:8])) == 4


def ended(study: Study, losses: list[float], final: float) -> str:
    """Reports the losses of a trial tenth by tenth; how it ended."""
    claim = study.claim()
    assert claim
    for tenth, loss in enumerate(losses, 1):
        if study.is_hopeless(claim, tenth, loss):
            study.finish(claim, "pruned")
            return f"pruned at {tenth}"
    study.finish(claim, "complete", {"1": final})
    return "complete"


def test_the_median_prunes(tmp_path: Path) -> None:
    study = study_in(tmp_path, pruner="median")
    for k in range(5):  # after one tenth 1, 2, 3, 4, 5, after two 0.5 less: the medians are 3 and 2.5
        assert ended(study, [1.0 + k, 0.5 + k], k) == "complete"
    assert ended(study, [3.1], 0) == "pruned at 1"
    assert ended(study, [2.9, 2.6], 0) == "pruned at 2"
    assert ended(study, [2.9, 2.4], 9) == "complete"
    rows = study.rows()
    assert [row.state for row in rows] == ["complete"] * 6 + ["pruned"] * 2
    assert [row.loss for row in rows[:6]] == [0.0, 1.0, 2.0, 3.0, 4.0, 9.0]
    assert [row.reached for row in rows[6:]] == [(1, 3.1), (2, 2.6)]


def test_halving_keeps_the_best_third(tmp_path: Path) -> None:
    study = study_in(tmp_path, pruner="halving")
    assert ended(study, [2.0], 2.0) == "complete"
    assert ended(study, [3.0], 0) == "pruned at 1"  # 2 is the best third of (2, 3)
    assert ended(study, [1.0, 1.0], 1.0) == "complete"
    assert ended(study, [1.5], 0) == "pruned at 1"


def test_the_last_report_of_a_cut_trial_is_judged_again(tmp_path: Path) -> None:
    study = study_in(tmp_path, pruner="median")
    for k in range(5):
        ended(study, [1.0 + k], k)
    claim = study.claim()
    assert claim
    claim.trial.report(4.0, 1)  # and the process is killed before it asks
    claim.lock.release()
    study = study_in(tmp_path, pruner="median")
    again = study.claim()
    assert again and again.number == claim.number
    assert study.is_hopeless(again, 1, 4.0)


def test_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    claim = study.claim()
    assert claim
    study.finish(claim, "complete", {"1": 1.0, "2": 2.0, "3": 6.0})
    (row,) = study.rows()
    assert row.loss == 3.0 and row.spread == pytest.approx(7**0.5)
    assert study.runs(row) == [tmp_path / "trial-0" / f"seed-{seed}" for seed in (1, 2, 3)]


def test_another_sweep_in_the_folder_is_refused(tmp_path: Path) -> None:
    study_in(tmp_path)
    with pytest.raises(UserError, match=r"another over\.n_layer: None there, 1,2,3 now; choose another --name"):
        study_in(tmp_path, LISTS)
    with pytest.raises(UserError, match=r"another over\.learning_rate: log\(0.0001,0.1\) there, log\(0.0001,0.2\) now"):
        study_in(tmp_path, parse_space(["learning_rate=log(1e-4,2e-1)"]))
    study_in(tmp_path, trials=99)  # more trials are welcome


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    study_in(tmp_path).claim()
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "stu')  # a power cut
    study = study_in(tmp_path)
    assert [row.number for row in study.rows()] == [0] and study.claim()
    assert [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_grid_needs_lists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sampler=grid needs lists"):
        study_in(tmp_path, sampler="grid")


def test_a_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every write of a sweep with one trial."""
    from optuna.storages.journal import JournalFileBackend

    append, left = JournalFileBackend.append_logs, 0

    def full(*given: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(*given)

    def sweep(folder: Path) -> str:
        """The part that failed."""
        folder.mkdir()
        part = "open"
        try:
            study = study_in(folder)
            part = "claim"
            claim = study.claim()
            assert claim
            part = "note"
            study.note(claim, "max_iters", 30)
            part = "report"
            study.is_hopeless(claim, 1, 2.0)
            part = "finish"
            study.finish(claim, "complete", {"1": 1.0})
        except UserError as error:
            assert str(error) == f"cannot write {folder}: No space left on device"
            return part
        return ""

    monkeypatch.setattr(JournalFileBackend, "append_logs", full)
    failed: list[str] = []
    while not failed or failed[-1]:
        left = len(failed)
        failed.append(sweep(tmp_path / str(left)))
    assert list(dict.fromkeys(failed)) == ["open", "claim", "note", "report", "finish", ""]
    assert failed.count("finish") == 2  # the losses, the state


def test_settings_with_numbers_as_keys_are_the_same_sweep(tmp_path: Path) -> None:
    for bias in (-1.5, -1.5, 2.0):
        setup = {"settings": {"generation": {"logit_bias": {5: bias}}, "training": {"betas": (0.9, 0.95)}}}
        if bias < 0:
            Study(tmp_path, RANGES, setup, 2)
        else:
            with pytest.raises(UserError, match="another settings.logit_bias|another settings.generation.logit_bias"):
                Study(tmp_path, RANGES, setup, 2)
