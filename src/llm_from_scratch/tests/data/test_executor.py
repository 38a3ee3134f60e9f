"""The same bytes from datatrove's tasks as without: on this machine, on Ray, on a stand-in for Slurm that kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.data import cleaning, executor, shards
from llm_from_scratch.data import prepare as prepare_module
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.errors import UserError
from llm_from_scratch.tests.texts import real_text

pytestmark = pytest.mark.slow

SBATCH = """#!{python}
import os, random, re, signal, subprocess, sys, time
root = {root!r}
if len(sys.argv) > 2 and sys.argv[1] == "--run":
    job, script, after = sys.argv[2], open(sys.argv[3]).read(), sys.argv[4].split(",")
    until = time.time() + 60
    while not all(os.path.exists(f"{{root}}/{{one}}.done") for one in after if one):
        if time.time() > until:  # the job before it has failed, or the test
            sys.exit()
        if any(os.path.exists(f"{{root}}/{{one}}.{{end}}") for one in after for end in ("failed", "never")):
            open(f"{{root}}/{{job}}.never", "w").close()
            sys.exit()
        time.sleep(0.1)
    last = int(re.search(r"--array=0-(\\d+)", script)[1])
    for rank in range(last + 1):
        for attempt in range(3):
            env = os.environ | {{"SLURM_ARRAY_TASK_ID": str(rank), "SLURM_JOB_ID": job, "SLURM_NODELIST": "here"}}
            process = subprocess.Popen(["bash", sys.argv[3]], env=env, start_new_session=True,
                                       stdout=open(f"{{root}}/log", "a"), stderr=subprocess.STDOUT)
            if attempt < 1 and "merge_stats" not in script:  # a node fails
                try:
                    process.wait(random.Random(f"{{job}} {{rank}} {{attempt}}").uniform(0.2, {seconds}))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    open(f"{{root}}/killed", "a").write(f"{{job}} {{rank}}\\n")
            if process.wait() == 0:
                break
        else:
            open(f"{{root}}/{{job}}.failed", "w").close()
            sys.exit()
    open(f"{{root}}/{{job}}.done", "w").close()
else:
    job = str(100 + len([name for name in os.listdir(root) if name.endswith(".sh")]))
    with open(f"{{root}}/{{job}}.sh", "w") as file:
        file.write(open(sys.argv[-1]).read())
    after = ",".join(re.findall(r"afterok:(\\d+)", " ".join(sys.argv) + open(sys.argv[-1]).read()))
    subprocess.Popen([sys.executable, __file__, "--run", job, f"{{root}}/{{job}}.sh", after], start_new_session=True,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print("Submitted batch job", job)
"""
SQUEUE = """#!{python}
import os, sys
jobs = sys.argv[-1].removeprefix("--jobs=").split(",")
ended = [job for job in jobs for end in ("done", "failed") if os.path.exists(f"{root}/{{job}}.{{end}}")]
never = [job for job in jobs if os.path.exists(f"{root}/{{job}}.never")]
print("\\n".join("DependencyNeverSatisfied" if job in never else "None" for job in jobs if job not in ended))
"""


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datatrove")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cleaning, "PART", 20_000)
    words = real_text().split()
    for number in range(6):
        rows = [{"text": " ".join(words[at : at + 80])} for at in range(4000 * number, 4000 * (number + 1) - 200, 80)]
        rows += rows[:3]
        Path(f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def same(one: Path, two: Path) -> None:
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in two.iterdir()} and any(name.startswith("train") for name in names)
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_local_tasks_give_the_same(texts: Path) -> None:
    settings: dict[str, Any] = {"dedup": "exact", "boilerplate": 3, "tokenizer": "gpt2", "shard_size": 5000}
    given: dict[str, Any] = {"report": lambda line: None, "val_files": ("5.jsonl",), **settings}
    alone = prepare(["[0-4].jsonl"], out_dir="alone", **given)
    same(alone, prepare(["[0-4].jsonl"], out_dir="tasks", executor="local", tasks=4, **given))
    assert not list(Path("data/cache").glob("executor-*"))


def test_one_byte_per_token_from_tasks_too(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LARGE", 20_000)
    given: dict[str, Any] = {"tokenizer": "byte", "shard_size": 30_000, "report": lambda line: None}
    alone = prepare(["*.jsonl"], out_dir="alone", **given)
    same(alone, prepare(["*.jsonl"], out_dir="tasks", executor="local", tasks=1, **given))
    assert json.loads((alone / "manifest.json").read_text())["dtype"] == "uint8"


def fail_to_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C before the last step does."""
    steps = executor.steps_of
    monkeypatch.setattr(executor, "steps_of", lambda job: steps(job)[:-1])


def test_a_file_that_grows_while_tasks_read_it_is_named(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = executor.STEPS["encode"]

    def growing(*task: Any) -> None:
        with open("0.jsonl", "a") as file:
            file.write('{"text": "one more"}\n')
        encode(*task)

    given: dict[str, Any] = {"tokenizer": "byte", "report": lambda line: None}
    with monkeypatch.context() as patch:
        patch.setitem(executor.STEPS, "encode", growing)
        with pytest.raises(UserError, match="0.jsonl changed while it was read: run the same command again"):
            prepare(["0.jsonl"], out_dir="tasks", executor="local", tasks=1, **given)
    assert not Path("tasks").exists()
    alone = prepare(["0.jsonl"], out_dir="alone", **given)
    same(alone, prepare(["0.jsonl"], out_dir="tasks", executor="local", tasks=1, **given))
    assert not list(Path("data/cache").glob("executor-*"))


def test_another_number_of_tasks_resumes(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "PART", 1 << 25)
    settings: dict[str, Any] = {"tokenizer": "gpt2", "dedup": "exact", "report": lambda line: None}
    alone = prepare(["*.jsonl"], out_dir="alone", **settings)
    with monkeypatch.context() as patch, pytest.raises(UserError):
        fail_to_merge(patch)
        prepare(["*.jsonl"], out_dir="tasks", executor="local", tasks=2, **settings)
    same(alone, prepare(["*.jsonl"], out_dir="tasks", executor="local", tasks=5, **settings))


def test_a_replaced_dataset_is_merged_again(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its last step had ended before Ctrl-C."""
    settings: dict[str, Any] = {"tokenizer": "gpt2", "report": lambda line: None}
    alone = prepare(["*.jsonl"], out_dir="alone", **settings)
    tasks: dict[str, Any] = {"out_dir": "tasks", "executor": "local", "tasks": 2, **settings}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "remove_work", lambda *_: None)
        prepare(["*.jsonl"], **tasks)
        prepare(["0.jsonl"], **{**tasks, "executor": None, "tasks": None})
    assert list(Path("data/cache").glob("executor-*"))
    same(alone, prepare(["*.jsonl"], **tasks))
    assert not list(Path("data/cache").glob("executor-*"))


def test_a_killed_run_resumes(texts: Path) -> None:
    settings: dict[str, Any] = {"tokenizer": "gpt2", "report": lambda line: None}
    alone = prepare(["*.jsonl"], out_dir="alone", **settings)
    command = [sys.executable, "-m", "llm_from_scratch.cli.prepare_data", "*.jsonl", "--out_dir=tasks"]
    command += ["--tokenizer=gpt2", "--executor=local", "--tasks=3"]
    killed = 0
    for files in (1, 6):  # that the tasks have written
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(Path("data/cache").glob("executor-*/**/*.*"))) < files:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    same(alone, prepare(["*.jsonl"], out_dir="tasks", executor="local", tasks=3, **settings))
    assert killed


def stand_in(texts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of Slurm. Returns the folder of their jobs."""
    bin_, root = texts / "bin", texts / "jobs"
    bin_.mkdir()
    root.mkdir()
    scripts = {
        "sbatch": SBATCH.format(python=sys.executable, root=str(root), seconds=1.6),
        "squeue": SQUEUE.format(python=sys.executable, root=str(root)),
        "scontrol": '#!/bin/sh\necho "$3"\n',
        "srun": f'#!/bin/sh\nshift 3\n[ -e {root}/broken ] || exec "$@"\nexit 1\n',  # srun -l -n 1 COMMAND
        "scancel": f'#!/bin/sh\necho "$@" >{root}/cancelled\n',
    }
    for name, script in scripts.items():
        (bin_ / name).write_text(script)
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    return root


def test_jobs_after_a_failed_one_are_not_waited_for(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are cancelled, and the same command submits all again."""
    root = stand_in(texts, monkeypatch)
    monkeypatch.setattr(executor, "POLL", 0.1)
    slurm: dict[str, Any] = {"executor": "slurm", "tasks": 2, "tokenizer": "gpt2", "report": lambda line: None}
    (root / "broken").touch()
    with pytest.raises(UserError, match="the jobs ended before the dataset was complete: see .*the same command"):
        prepare(["*.jsonl"], **slurm)
    assert (root / "cancelled").read_text().split() == ["100", "102", "104"]
    (root / "broken").unlink()
    assert prepare(["*.jsonl"], **slurm).is_dir()


def test_slurm_with_failing_nodes(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = stand_in(texts, monkeypatch)
    settings: dict[str, Any] = {"tokenizer": "gpt2", "dedup": "exact", "report": lambda line: None}
    alone = prepare(["*.jsonl"], out_dir="alone", **settings)
    slurm: dict[str, Any] = {"executor": "slurm", "tasks": 2, "slurm": "partition=cpu time=01:00:00 account=me"}
    same(alone, prepare(["*.jsonl"], out_dir="tasks", **slurm, **settings))
    script = (root / "100.sh").read_text()
    assert "#SBATCH --partition=cpu" in script and "#SBATCH --account=me" in script
    assert (root / "killed").exists()
    until = time.monotonic() + 60
    # The folder of the last statistics may be gone before its job starts
    while any(not {".done", ".failed"} & {p.suffix for p in root.glob(f"{job.stem}.*")} for job in root.glob("*.sh")):
        assert time.monotonic() < until
        time.sleep(0.2)  # for the jobs that add up the statistics


def test_a_job_that_slurm_refuses_is_one_line(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = texts / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    command = [sys.executable, "-m", "llm_from_scratch.cli.prepare_data", "*.jsonl", "--tokenizer=gpt2", "--tasks=2"]
    command += ["--executor=slurm", "--slurm"]
    for given, message in (
        ("partition=cpu", "error: sbatch: error: invalid partition specified: see "),
        ("cpus_per_task=many", "error: invalid literal for int() with base 10: 'many': see "),
    ):
        failed = subprocess.run([*command, given], capture_output=True, text=True)
        (line,) = failed.stderr.splitlines()
        assert failed.returncode == 2 and message in line


@pytest.mark.slow
def test_the_jobs_before_a_refused_one_are_cancelled(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = {
        "sbatch": f"[ -e {texts}/first ] && {{ echo 'sbatch: error: too many jobs' >&2; exit 1; }}\n"
        f"touch {texts}/first\necho 'Submitted batch job 107'",
        "scancel": f'echo "$@" >{texts}/cancelled',
    }
    for name, script in scripts.items():
        (texts / "bin").mkdir(exist_ok=True)
        (texts / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (texts / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{texts / 'bin'}:{os.environ['PATH']}")
    slurm: dict[str, Any] = {"executor": "slurm", "tasks": 2, "tokenizer": "gpt2", "report": lambda line: None}
    with pytest.raises(UserError, match=r"too many jobs \(the earlier jobs are cancelled: 107\): see "):
        prepare(["*.jsonl"], **slurm)
    assert (texts / "cancelled").read_text() == "107\n"
    (texts / "first").unlink()
    (texts / "bin" / "scancel").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match=r"too many jobs \(cancel the earlier jobs: scancel 107\): see "):
        prepare(["*.jsonl"], **slurm)
    assert not list(Path("data/cache").glob("executor-*/jobs.txt"))


def test_an_error_in_a_task_is_the_users_line(texts: Path) -> None:
    """Without logs and tracebacks. What tasks note is printed, too."""
    Path("3.jsonl").write_text('{"body": 1}\n')
    Path("4.jsonl.gz").write_bytes(b"no gzip")
    command = [sys.executable, "-m", "llm_from_scratch.cli.prepare_data", "[0-3].jsonl", "--tokenizer=gpt2"]
    command += ["--executor=local"]
    failed = subprocess.run([*command, "--tasks=1"], capture_output=True, text=True)  # another's part would be kept
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert "3.jsonl, line 1 does not have the text field 'text'" in line
    assert not Path("data/processed/0").exists() and not list(Path("data/cache").glob("executor-*"))
    done = subprocess.run([*command, "4.jsonl.gz", "--tasks=2", "--bad_files=skip"], capture_output=True, text=True)
    skipped = [line.split(" ")[1].rstrip(",") for line in done.stdout.splitlines() if line.startswith("skipped: ")]
    assert sorted(skipped) == ["3.jsonl", "4.jsonl.gz"] and not done.stderr and not done.returncode


def test_ray(texts: Path) -> None:
    pytest.importorskip("ray")
    settings: dict[str, Any] = {"tokenizer": "gpt2", "dedup": "exact", "report": lambda line: None}
    alone = prepare(["*.jsonl"], out_dir="alone", **settings)
    same(alone, prepare(["*.jsonl"], out_dir="tasks", executor="ray", tasks=2, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "slurm"}, "needs the command sbatch"),
        ({"tasks": 4}, "--tasks needs --executor"),
        ({"slurm": "partition=cpu"}, "--slurm needs --executor=slurm"),
        ({"executor": "slurm", "slurm": "cpu"}, "expected NAME=VALUE"),
    ],
)
def test_impossible_executors(
    texts: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match=message):
        prepare(["*.jsonl"], tokenizer="gpt2", **settings)
    assert not list(Path("data/cache").glob("executor-*"))
