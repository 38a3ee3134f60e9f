"""A run's files while they are written, truncated, replaced and removed."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from llm_from_scratch.machine.files import FolderLock
from llm_from_scratch.serving import watch as module
from llm_from_scratch.serving.watch import Watch
from llm_from_scratch.training.loggers import JsonLines

from ..served import served


def write(path: Path, steps: range, **fields: object) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, "loss": 1.5, **fields}) + "\n" for step in steps)


def test_lines_are_reported_once(tmp_path):
    watch, path = Watch(tmp_path), tmp_path / "metrics.jsonl"
    assert watch.metrics(0) == {"points": [], "next": 0, "reset": False}, "before the run has begun"
    write(path, range(3))
    first = watch.metrics(0)
    assert [p["step"] for p in first["points"]] == [0, 1, 2] and not first["reset"]
    assert watch.metrics(first["next"]) == {"points": [], "next": first["next"], "reset": False}
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
        file.flush()
        assert watch.metrics(first["next"])["points"] == [], "a line that is not complete"
        file.write('ss": null}\n{"step": 4, "loss": NaN}\nnonsense\n[1]\n{"loss": 1}\n')
    second = watch.metrics(first["next"])
    assert second["points"] == [{"step": 3, "loss": None}, {"step": 4, "loss": None}]
    assert second["next"] == path.stat().st_size


def test_answers_are_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    monkeypatch.setattr(module, "LONGEST", 5000)
    path, watch = tmp_path / "metrics.jsonl", Watch(tmp_path)
    write(path, range(100))
    with path.open("a") as file:
        file.write('{"step": 100, "text": "' + "x" * 3000 + '"}\n' + "y" * 12_000 + "\n")
    write(path, range(101, 103))
    steps, after = [], 0
    for _ in range(100):
        answer = watch.metrics(after)
        assert len(answer["points"]) <= 40
        steps += [point["step"] for point in answer["points"]]
        if answer["next"] == after:
            break
        after = answer["next"]
    assert steps == list(range(103)), "one long line is told, one that is too long left out"


def test_a_replaced_file_is_read_again(tmp_path):
    watch, path = Watch(tmp_path), tmp_path / "metrics.jsonl"
    write(path, range(10))
    after = watch.metrics(0)["next"]
    log = JsonLines(path, resume_at=4)  # what a run that is resumed does: the file is replaced by a shorter one
    for step in range(4, 30):
        log.log(step, {"loss": 9.0})
    log.close()
    assert path.stat().st_size > after
    answer = watch.metrics(after)
    assert answer["reset"] and [p["step"] for p in answer["points"]] == list(range(30))
    again = watch.metrics(answer["next"])
    assert not again["reset"] and again["points"] == []
    assert watch.metrics(after)["reset"], "whoever still asks with an old place is told, too"
    other = Watch(tmp_path)  # a server that was restarted does not know how often the file was replaced
    assert other.metrics(answer["next"])["reset"] and len(other.metrics(answer["next"])["points"]) == 30


def test_a_file_that_was_cut_or_removed(tmp_path):
    watch, path = Watch(tmp_path), tmp_path / "samples.jsonl"
    path.write_text('{"step": 1, "text": "abc"}\n{"step": 2, "text": 5}\n')
    answer = watch.samples(0)
    assert answer["samples"] == [{"step": 1, "text": "abc"}]
    os.truncate(path, 0)
    assert watch.samples(answer["next"]) == {"samples": [], "next": 0, "reset": True}
    path.unlink()
    assert watch.samples(answer["next"]) == {"samples": [], "next": 0, "reset": True}
    os.mkfifo(path)
    assert watch.samples(0)["samples"] == [], "not even opened"


def test_description_of_a_run(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    watch = Watch(folder)
    assert watch.about() == {"name": "my-run", "live": False, "step": None, "max_iters": None}
    write(folder / "metrics.jsonl", range(1000))
    os.utime(folder / "metrics.jsonl", (1, 1))
    for step, planned in ((10, 100), (900, 2000)):
        step_folder = folder / f"step-{step:08d}"
        step_folder.mkdir()
        (step_folder / "config.json").write_text(json.dumps({"training": {"max_iters": planned}}))
    assert watch.about() == {"name": "my-run", "live": False, "step": 999, "max_iters": 2000}
    write(folder / "metrics.jsonl", range(1000, 1001))
    assert watch.about()["live"], "written just now"


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="locks can be seen from outside on Linux")
def test_a_run_that_holds_its_folder_is_live(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert Watch(tmp_path).about()["live"]
    lock.release()
    assert not Watch(tmp_path).about()["live"]


def test_routes(tmp_path):
    write(tmp_path / "metrics.jsonl", range(2))

    def get(path: str) -> dict:
        with urllib.request.urlopen(server.url + path) as answer:
            return json.load(answer)

    with served(watch=tmp_path) as server:
        assert get("/v1/watch")["step"] == 1 and get("/v1/info")["watch"]
        assert len(get("/v1/watch/metrics")["points"]) == 2
        assert get("/v1/watch/metrics?after=99")["reset"]
        assert get("/v1/watch/samples?after=0")["samples"] == []
        for wrong in ("-1", "x", "9" * 40, "1e3", "%00"):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                get(f"/v1/watch/metrics?after={wrong}")
    with served() as server, pytest.raises(urllib.error.HTTPError, match="404"):
        get("/v1/watch")
