"""llm-prepare as tasks on this machine, a Slurm cluster or a Ray cluster, run by datatrove. Each step ends before the
next one begins: clean, plan (duplicates, tokenizer, split), encode, merge. A finished task leaves a marker and is not
repeated. The dataset has the same bytes as without an executor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.tokenizer import Tokenizer
from ..errors import UserError, one_line
from ..machine.extras import missing
from ..machine.files import read_json, remove_tree, replace_folder, temporary_folder, to_json, write_whole
from . import cleaning
from .building import DatasetSpec, Rules, make_rules, write_manifest
from .cleaning_report import summarise, without_examples, write_reports
from .encode import TokenCache, write_shards
from .meter import Meter
from .options import CLEANING, PrepareOptions
from .shards import close_writers, make_writers
from .sources import FileSource, Source, check_unchanged
from .split import Documents, Split

POLL = 2.0  # seconds
NEVER = "DependencyNeverSatisfied"
DONE, ERROR, NOTES, JOBS, LEAST = "encoded.json", "error.txt", "notes", "jobs.txt", "bytes_of_a_part.txt"
OUTPUT = "logs/output.txt"  # what datatrove and all tasks print on standard error
SLURM = {"time": "24:00:00", "partition": "", "qos": "", "cpus_per_task": "1", "mem_per_cpu_gb": "4"}


@dataclass(repr=False)  # datatrove prints it in every log
class Job:
    """The input of every task. work: a folder that all machines share."""

    spec: DatasetSpec
    options: PrepareOptions
    evaluation: list[Source]
    work: Path
    target: Path
    extra: dict[str, Any]  # of the manifest
    tasks: int
    least: int  # bytes of a part

    @property
    def cleans(self) -> bool:
        return bool(self.options.given(*CLEANING))

    @property
    def parts(self) -> list[tuple[list[Source], Path]]:
        """(sources, folder) of every part."""
        return cleaning.jobs_of(self.spec.sources, self.work / "parts", self.least)

    def encoding(self, rules: Rules) -> list[tuple[list[list[Source]], Path]]:
        """(sources of each group, folder) of every part, in the order of the documents."""
        sources = self.spec.sources
        if rules.needs_order:  # a document's number decides, so that one task must read them all
            cleaned = cleaning.cleaned_sources(sources, self.work / "parts") if self.cleans else sources
            return [(cleaned, self.work / "tokens")]
        jobs = []
        for some, folder in sorted(self.parts, key=lambda part: part[1].name):
            number = cleaning.group_of(folder)
            groups: list[list[Source]] = [[] for _ in sources]
            groups[number] = [cleaning.cleaned_source(sources[number], [folder])] if self.cleans else some
            jobs.append((groups, self.work / "tokens" / folder.name))
        return jobs

    def plan(self) -> tuple[Rules, Tokenizer, dict[str, Any]]:
        """The plan that plan_step has written."""
        plan = read_json(self.work / "plan" / "plan.json")
        rules = Rules(**plan["rules"] | {"split": Split(**plan["split"])})
        return rules, Tokenizer.load(self.work / "plan"), plan


def make_job(
    spec: DatasetSpec,
    options: PrepareOptions,
    evaluation: list[Source],
    work: Path,
    target: Path,
    extra: dict[str, Any],
) -> Job:
    """Raises UserError for what tasks elsewhere cannot read."""
    if spec.is_chat:
        raise UserError(f"--executor={options.executor} does not support conversations: remove it")
    if spec.permuted:
        raise UserError(f"--executor={options.executor} does not support openwebtext, which is one stream of documents")
    if any(source.name == "standard input" for source in spec.all()):
        raise UserError(f"--executor={options.executor} cannot read standard input: save it to a file")
    sources = [[_absolute(source) for source in group] for group in spec.sources]
    tokenizer = str(Path(spec.tokenizer).absolute()) if os.path.exists(spec.tokenizer) else spec.tokenizer
    spec = dataclasses.replace(spec, sources=sources, tokenizer=tokenizer)
    tasks = options.tasks or os.cpu_count() or 1
    least = min(cleaning.PART, sum(source.size for source in spec.all()) // tasks)
    if (work / LEAST).is_file():  # finished parts are reused, also by another number of tasks
        least = int((work / LEAST).read_text())
    texts = list(map(_absolute, evaluation))
    return Job(spec, options, texts, work.absolute(), target.absolute(), extra, tasks, least)


def _absolute(source: Source) -> Source:
    if isinstance(source, FileSource) and not source.url:
        return dataclasses.replace(source, path=source.path.absolute(), label=source.name)
    return source


# The steps: datatrove calls them with the number of the task


def clean_step(job: Job, rank: int, tasks: int) -> None:
    runs = cleaning.evaluation_of(job.evaluation)
    for part in job.parts[rank::tasks]:
        cleaning.clean_part(part, job.options, runs)


def plan_step(job: Job, rank: int, tasks: int) -> None:
    spec, summary = job.spec, {}
    if job.cleans:
        folders = [folder for _, folder in job.parts]
        cleaning.decide(folders, job.options, job.work / "parts")
        spec = dataclasses.replace(spec, sources=cleaning.cleaned_sources(spec.sources, job.work / "parts"))
        summary = summarise(folders)
    folder = job.work / "plan"
    folder.mkdir(exist_ok=True)
    groups = [Documents(sources) for sources in spec.sources]
    _, rules = make_rules(spec, groups, folder, job.extra["request"], print)
    separators = [group.separator for group in groups]
    plan = {"rules": dataclasses.asdict(rules), "split": dataclasses.asdict(rules.split), "separators": separators}
    write_whole(folder / "plan.json", to_json(plan | {"cleaning": summary}))


def encode_step(job: Job, rank: int, tasks: int) -> None:
    rules, tokenizer, plan = job.plan()
    separators = plan["separators"]
    for groups, folder in job.encoding(rules)[rank::tasks]:
        if (folder / DONE).is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
        documents = [Documents(sources, separator) for sources, separator in zip(groups, separators, strict=True)]
        units, cache = functools.partial(rules.units, documents), TokenCache(None, tokenizer.dtype)
        meter, request = Meter(0, _zero, _ignore), job.extra["request"]
        splits = write_shards(
            units, tokenizer, folder, sys.maxsize, 0, cache, rules.fast, request, meter, print
        )  # fmt: skip
        write_whole(folder / DONE, to_json(splits))


def merge_step(job: Job, rank: int, tasks: int) -> None:
    rules, tokenizer, plan = job.plan()
    with temporary_folder(job.target) as folder:
        tokenizer.save(folder)
        parts = [(part, read_json(part / DONE)) for _, part in job.encoding(rules)]
        most = max(sum(entries[split]["tokens"] for _, entries in parts) for split in ("train", "val"))
        writers = make_writers(tokenizer, folder, job.options.shard_size, most)
        for split, writer in writers.items():
            for part, entries in parts:
                entry = entries[split]
                writer.text_bytes += entry["bytes"]
                for shard in entry["shards"]:
                    path = part / shard["file"]
                    width = path.stat().st_size // max(1, shard["tokens"])  # bytes of an id
                    with path.open("rb") as file:
                        while len(ids := np.fromfile(file, f"<u{width}", 1 << 22)):
                            writer.append(ids)
        splits = close_writers(tokenizer, writers)
        extra = dict(job.extra)
        if plan["cleaning"]:
            write_reports(plan["cleaning"], folder)
            extra["cleaning"] = without_examples(plan["cleaning"])
        write_manifest(job.spec, folder, tokenizer, splits, extra | rules.manifest())
        check_unchanged(job.spec.all(), extra["sources"])
        replace_folder(job.target, folder)


STEPS: dict[str, Callable[[Job, int, int], None]] = {
    "clean": clean_step, "plan": plan_step, "encode": encode_step, "merge": merge_step
}  # fmt: skip


def run_task(data: Any, rank: int, world_size: int, name: str, job: Job) -> None:
    """A task of a step, as datatrove calls it."""
    notes = io.StringIO()
    try:
        with contextlib.redirect_stderr(notes):
            STEPS[name](job, rank, world_size)
    except UserError as error:
        write_whole(job.work / ERROR, one_line(error, None).encode())
        raise
    finally:
        if notes.getvalue():
            write_whole(job.work / NOTES / f"{name}-{rank}.txt", notes.getvalue().encode())


def _zero() -> int:
    return 0


def _ignore(line: str) -> None:
    pass


# Running them


def run_steps(job: Job, report: Callable[[str], None]) -> None:
    """Runs all steps, and waits for them. Raises UserError."""
    try:
        import datatrove.executor  # noqa: F401
    except ImportError:
        raise missing("datatrove", "cluster", f"--executor={job.options.executor}") from None
    if job.options.executor == "slurm":
        _check_slurm(job)
    write_whole(job.work / LEAST, str(job.least).encode())
    remove_tree(job.work / ERROR)
    try:
        if job.options.executor == "slurm":
            _run_on_slurm(job, report)
        else:
            _run_here(job, report)
    finally:
        for line in _notes(job):
            report(line)


def _run_here(job: Job, report: Callable[[str], None]) -> None:
    remove_tree(_merged(job))
    try:
        for name in steps_of(job):
            report(f"{name}: {_tasks(job, name)} tasks on {job.options.executor}")
            try:
                with _errors_in(job.work / OUTPUT):
                    executor = _executor(job, name)
                    executor.run()
            except UserError:
                raise
            except Exception as error:
                raise _failure(job, one_line(error)) from None
            if executor.get_incomplete_ranks():
                raise _failure(job, f"tasks of the step {name} failed")
    except UserError:
        if (job.work / ERROR).is_file() and not _has_parts(job):
            remove_tree(job.work)
        raise


@contextlib.contextmanager
def _errors_in(path: Path) -> Iterator[None]:
    """Standard error, also that of new processes, goes to a file: datatrove prints every step of every task, and the
    traceback of a user's mistake."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _notes(job: Job) -> list[str]:
    """The notes of the tasks, such as skipped files: each line once."""
    texts = (path.read_text(encoding="utf-8") for path in sorted((job.work / NOTES).glob("*.txt")))
    return list(dict.fromkeys(line for text in texts for line in text.splitlines()))


def _has_parts(job: Job) -> bool:
    return any(any(job.work.glob(f"*/*/{done}")) for done in (cleaning.DONE, DONE))


def _merged(job: Job) -> Path:
    """The marker of the last step. The target may have been replaced since, so that it must run again."""
    return job.work / "logs" / "merge-1" / "completions" / "00000"


def steps_of(job: Job) -> list[str]:
    return [name for name in STEPS if name != "clean" or job.cleans]


def _failure(job: Job, reason: str) -> UserError:
    """The error of a task, if it was the user's."""
    error = job.work / ERROR
    if error.is_file():
        return UserError(error.read_text(encoding="utf-8"))
    return UserError(f"{reason}: see {job.work / 'logs'}; the same command resumes")


def _tasks(job: Job, name: str) -> int:
    return job.tasks if name in ("clean", "encode") else 1


def _executor(job: Job, name: str, depends: Any = None) -> Any:
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor

    tasks = _tasks(job, name)
    pipeline = [functools.partial(run_task, name=name, job=job)]
    logs = str(job.work / "logs" / f"{name}-{tasks}")  # of another number of tasks, other ones are complete
    if job.options.executor == "slurm":
        given = SLURM | _slurm_options(job.options)
        return SlurmPipelineExecutor(
            pipeline, tasks, given.pop("time"), given.pop("partition"), int(given.pop("cpus_per_task")),
            int(given.pop("mem_per_cpu_gb")), qos=given.pop("qos"), job_name=f"llm-prepare-{name}", depends=depends,
            env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH", logging_dir=logs,
            workers=job.options.workers or -1, sbatch_args=given,
        )  # fmt: skip
    workers = min(tasks, job.options.workers or (tasks if job.options.executor == "ray" else os.cpu_count() or 1))
    if job.options.executor == "ray":
        return RayPipelineExecutor(pipeline, tasks, workers, logging_dir=logs, mem_per_cpu_gb=0.5)
    return LocalPipelineExecutor(pipeline, tasks, workers, logging_dir=logs)


def _slurm_options(options: PrepareOptions) -> dict[str, str]:
    """--slurm='partition=cpu time=10:00:00'"""
    pairs = [word.partition("=") for word in shlex.split(options.slurm)]
    if any(not name or not sign for name, sign, _ in pairs):
        raise UserError(f"slurm={options.slurm!r}: expected NAME=VALUE pairs such as 'partition=cpu time=10:00:00'")
    return {name: value for name, _, value in pairs}


def _check_slurm(job: Job) -> None:
    """Raises UserError if jobs cannot be submitted."""
    _slurm_options(job.options)
    if shutil.which("sbatch") is None:
        raise UserError("--executor=slurm needs the command sbatch: run it on a machine of the cluster")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError("--executor=slurm submits jobs itself: run it outside of a job")


def _run_on_slurm(job: Job, report: Callable[[str], None]) -> None:
    """Submits the jobs, unless jobs of an earlier call are still there, and waits for them."""
    names = job.work / JOBS
    jobs = names.read_text().split() if names.is_file() else []
    if not _queued(jobs):
        remove_tree(_merged(job))
        executors: list[Any] = [None]
        output = job.work / OUTPUT
        before = output.stat().st_size if output.is_file() else 0
        try:
            for name in steps_of(job):
                executors.append(_executor(job, name, executors[-1]))
            with _errors_in(output):
                executors[-1].run()
        except BaseException as error:
            cancelled = _cancel(_job_ids(executors))  # later steps will never run
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            reason = one_line(error)
            if isinstance(error, subprocess.CalledProcessError):  # sbatch has printed the reason
                lines = output.read_bytes()[before:].decode("utf-8", "replace").split("\n")
                reason = next((line for line in map(one_line, reversed(lines)) if line), reason)
            raise _failure(job, reason + cancelled) from None
        jobs = _job_ids(executors)
        write_whole(names, " ".join(jobs).encode())
    report(f"waiting for the jobs {', '.join(jobs)}; Ctrl-C does not cancel them, and the same command waits again")
    while not _merged(job).exists():
        if (job.work / ERROR).exists() or (not _queued(jobs) and not _merged(job).exists()):
            _cancel(jobs)  # those that wait for a failed one
            raise _failure(job, "the jobs ended before the dataset was complete")
        time.sleep(POLL)


def _job_ids(executors: list[Any]) -> list[str]:
    """Ids of the submitted jobs."""
    return [str(one.job_id) for one in executors if one is not None and one.job_id not in (None, -1)]


def _cancel(jobs: list[str]) -> str:
    """Cancels jobs. Returns a note for the error; "" if there are none."""
    if not jobs:
        return ""
    try:
        subprocess.run(["scancel", *jobs], capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return f" (cancel the earlier jobs: scancel {' '.join(jobs)})"
    return f" (the earlier jobs are cancelled: {', '.join(jobs)})"


def _queued(jobs: list[str]) -> bool:
    """Whether one of the jobs runs or will run: jobs after a failed one wait without end."""
    if not jobs:
        return False
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%r", f"--jobs={','.join(jobs)}"], capture_output=True, text=True
    )
    return not done.returncode and any(reason.strip("() ") not in ("", NEVER) for reason in done.stdout.splitlines())
