"""machine/processes.py: child processes of Python never import a module of the working directory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from llm_from_scratch.errors import SaveError, UserError
from llm_from_scratch.machine import processes
from llm_from_scratch.machine import watch as watches
from llm_from_scratch.machine.team import Team
from llm_from_scratch.machine.watch import Watch

from ..tiny import arguments, babble, write_data

HOSTILE = ("ctypes", "multiprocessing", "subprocess", "numpy", "torch", "sympy")


@pytest.fixture
def hostile(here: Path) -> Path:
    """The working directory, full of modules that leave a file marker-NAME when they are imported."""
    for name in HOSTILE:
        marker = here / f"marker-{name}"
        (here / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ImportError('hostile')\n")
    return here


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with the working directory kept out of its own search: what is tested is what it starts."""
    program = f"import sys; sys.path.remove(''); from {command[0]} import main; sys.exit(main(sys.argv[1:]))"
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    source = str(Path(processes.__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(1, {source!r}); {program}", *command[1:]],
        env={**clean, **environment}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def markers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("marker-*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 refuses instead")
def test_the_workers_of_llm_prepare_ignore_the_working_directory(hostile: Path) -> None:
    (hostile / "text.txt").write_text(babble(5000))
    done = start("llm_from_scratch.cli.prepare_data", "text.txt", "--tokenizer=byte", "--workers=2")
    assert (done.returncode, markers(hostile)) == (0, []), done.stderr
    assert "worker processes failed" not in done.stdout and done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 refuses instead")
def test_compiling_ignores_the_working_directory(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data, cache = write_data(hostile / "tiny"), tmp_path_factory.mktemp("cache")  # an empty cache asks the processor
    run = arguments(compile=True, max_iters=1, eval_iters=1, dataset=data, out_dir=hostile / "run")
    done = start("llm_from_scratch.cli.train", *run, TORCHINDUCTOR_CACHE_DIR=str(cache))
    assert (done.returncode, markers(hostile)) == (0, []), done.stderr
    assert "compiling the model" in done.stdout


def test_python_3_10_refuses_a_directory_that_shadows_modules(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr(processes.sys, "version_info", (3, 10, 13))
    for name in ("model.py", "train.py", "ctypes.txt", "notes.md"):
        (here / name).touch()
    (here / "json").mkdir()  # without an __init__.py: the real one is found
    processes.shield_children()
    for hostile in ("ctypes.py", "numpy.so", "multiprocessing/__init__.py"):
        path = here / hostile
        path.parent.mkdir(exist_ok=True)
        path.touch()
        with pytest.raises(UserError, match=f"would import {hostile.split('/')[0]} of the working directory"):
            processes.shield_children()
        path.unlink()
    processes.shield_children()


def test_a_package_of_ours_does_not_shadow_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "llm_from_scratch" not in processes.shadowing(Path(processes.__file__).parents[2])


def test_the_age_of_a_process() -> None:
    program = "import time; time.sleep(0.2)\nfrom llm_from_scratch.machine.processes import process_age as age\n"
    begin = time.monotonic()
    said = subprocess.run([sys.executable, "-c", program + "print(age(0.01))"], capture_output=True, text=True).stdout
    assert 0.15 < float(said) <= time.monotonic() - begin + 0.02


def test_the_age_of_an_old_process_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "OLD", 0.0)
    assert processes.process_age(0.5) == 0.5 and processes.process_age(99.0) == processes.YOUNG


def test_processes_meet_in_a_store_that_an_earlier_start_has_used() -> None:
    """Two threads for two processes, three times with one store: each time both get the same new name."""
    names, store = list[str](), HashStore()
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(processes.meet, store, rank, 2, 20.0) for rank in (1, 0)]
            one, other = (future.result() for future in found)
        assert one == other and one[1] == [] and one[0] not in names
        names.append(one[0])
    assert processes.meet(store, 0, 2, 0.1)[1] == [1]  # what rank 1 left there does not count
    assert processes.meet(HashStore(), 1, 2, 0.1)[1] == [0]


def test_errors_of_gloo_are_failed_exchanges() -> None:
    for text in ("[/gloo/transport/tcp/pair.cc:547] Connection reset", "Application timeout caused pair closure"):
        assert processes.is_failed_exchange(RuntimeError(text))
    assert not processes.is_failed_exchange(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_team_that_loses_a_process_ends_the_run_but_not_the_thread_that_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*args: object, **settings: object) -> None:
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    team = Team()
    team.size = 2
    monkeypatch.setattr(torch.distributed, "all_gather_object", lost)
    with pytest.raises(RuntimeError) as caught:  # the watch names the process
        team.first(lambda: None)
    assert processes.is_failed_exchange(caught.value)
    with ThreadPoolExecutor(1) as pool, pytest.raises(SaveError, match="another process of the run has ended"):
        pool.submit(team.first, lambda: None).result()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows which processes have died")
def test_the_timeout_begins_when_a_death_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not half a second later, at the next sign of life. It leaves the launcher time for its own end."""
    gone, store, beats, left = subprocess.Popen(["true"]), HashStore(), list[int](), threading.Event()
    gone.wait()

    def leave(code: int) -> None:
        beats.append(watch.beats)
        left.set()
        sys.exit()  # ends the thread

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(watches, "LAST_WORDS", 600.0)
    watch = Watch(store, 0, 2, timeout=600.1)
    store.set("who/1", json.dumps([socket.gethostname(), gone.pid, 1, os.readlink("/proc/self/ns/pid")]))
    store.set("beat/1", store.get("beat/0").decode())
    watch.begin()
    assert left.wait(60) and beats == [2]
    watch.end()
