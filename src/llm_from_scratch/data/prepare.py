"""Preparation of a dataset: sources -> documents -> tokens -> shards and a manifest. Texts are streamed in units of
about a megabyte, so memory is bounded. The dataset is built in a temporary folder, which is renamed when it is
complete. An interrupted run leaves it with its progress, and the same command resumes from there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import tempfile
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.load import is_gguf, tokenizer_place
from ..checkpoint.store import find_checkpoint, list_checkpoints
from ..config import Config
from ..core.characters import TextScan
from ..core.chat import ends_in
from ..core.dataset import resolve_dataset
from ..core.tokenfile import CHECKED, MANIFEST, dtype_of, read_manifest
from ..core.tokenizer import HF_FILE, META_FILE, RANKS_FILE, Tokenizer
from ..errors import UserError
from ..machine.budget import Budget, parse_budget
from ..machine.files import read_json, replace_folder, temporary_folder, write_errors
from . import chats, cleaning
from . import sources as src
from .building import DatasetSpec, Report, build, choose_workers
from .cleaning_report import FILES as REPORTS
from .encode import read_progress
from .executor import make_job, run_steps
from .options import CLEANING, PrepareOptions
from .readers import check_lines
from .split import empty
from .work_folder import remove_work, work_folder

MAX_SUGGESTED = 1024  # tokens of context for conversations: attention's cost grows with it
DATASET = "the dataset or its temporary files"  # in an error
EXAMPLE = 200  # characters; a token of a text with long lines may have thousands
TOKENIZER_FILES = (META_FILE, RANKS_FILE, HF_FILE)
READ_BESIDE = ("meta.pkl", "tokenizer_config.json", "chat_template.jinja")
# The tokenizer for training texts of fewer than this many bytes (docs/DATA.md has the reasons)
TOKENIZER_BY_SIZE = ((2e6, "char"), (100e6, "bpe:4096"), (math.inf, "gpt2"))
BYTES_PER_PARAMETER = 5  # that a well-sized small model reads


def prepare(
    sources: str | Path | Sequence[str | Path] = (), *, root: str | Path = ".", report: Report = print, **settings: Any
) -> Path:
    """Prepares training data and returns its folder (default: data/processed/NAME). settings: fields of PrepareOptions,
    which `llm-prepare --help` explains. Paths are relative to root. If sources and settings have not changed, nothing
    is done. Raises UserError. After an error or Ctrl-C, only cached tokens remain."""
    options, root = PrepareOptions(**settings), Path(root)
    given = [str(some) for some in ([sources] if isinstance(sources, (str, Path)) else sources)]
    options.validate()
    with tempfile.TemporaryDirectory(prefix="llm-prepare-") as spool, write_errors(DATASET):
        run = options.tokenizer
        if run and (list_checkpoints(run) or (Path(run) / "model.json").is_file()):  # a run's folder, a step's
            options.tokenizer = str(find_checkpoint(run, verify=False))
        elif run and not is_gguf(Path(run)):
            options.tokenizer, run = tokenizer_place(run), None
        spec = _make_spec(given, options, root, Path(spool), report)
        if Path(spec.name).name != spec.name or spec.name in ("", ".", ".."):
            raise UserError(f"name={spec.name!r} is empty or a path: choose another with --name")
        target = root / (options.out_dir or Path("data/processed") / spec.name)
        request, identities = hash_request(spec, options.shard_size)
        plain = dataclasses.replace(options, include=(), exclude=())
        evaluation = src.find_sources(options.decontaminate, root, Path(spool), plain, report)
        request = cleaning.extend_request(request, options, evaluation, spec.is_chat)
        cache = root / options.cache_dir if options.cache_dir else None
        beside = cache or target.parent
        if _up_to_date(target, request):
            remove_work(beside, target, request)  # of an interrupted wait for the tasks
            report(f"{src.display_path(target, root)} is up to date: sources and settings have not changed")
            os.utime(target / MANIFEST)  # now the dataset prepared last
        else:
            _refuse_foreign(target)
            extra = {"request": request, "sources": identities}
            if options.executor:
                work = work_folder(beside, "executor", target, request)
                run_steps(make_job(spec, options, evaluation, work, target, extra), report)
            else:
                _make(spec, options, evaluation, cache, Path(spool), target, extra, report)
            remove_work(beside, target)  # also of abandoned requests
        _print_summary(target, root, report)
        if given != ["demo"]:  # which trains by itself
            report(_next_command(target, root, run, options.budget))
    return target


def _make(
    spec: DatasetSpec, options: PrepareOptions, evaluation: list[src.Source], cache: Path | None, spool: Path,
    target: Path, extra: dict[str, Any], report: Report,
) -> None:  # fmt: skip
    """Cleans and encodes in this process and its workers."""
    request, read = extra["request"], spec.all()
    parts = work_folder(cache or spool, "cleaning", target, request)
    with temporary_folder(target, lambda folder: read_progress(folder, request) is not None) as folder:
        if options.given(*CLEANING):
            total = sum(source.size for source in spec.all())
            workers = choose_workers(total) if options.workers is None else options.workers
            try:
                spec.sources, extra["cleaning"] = cleaning.clean(
                    spec.sources, options, evaluation, parts, folder, workers, report
                )
            except UserError:
                with contextlib.suppress(OSError):
                    parts.rmdir()  # if no part is complete
                raise
        build(spec, folder, options.shard_size, options.workers, cache, extra, report)
        src.check_unchanged(read, extra["sources"])
        replace_folder(target, folder)


def _make_spec(sources: list[str], options: PrepareOptions, root: Path, spool: Path, report: Report) -> DatasetSpec:
    """The dataset of a command line, with the defaults of its sources."""
    if sources and options.train_files:
        raise UserError("SOURCE and --train_files both name training texts: use only one of them")
    given = list(options.train_files) or sources
    if not given:
        raise UserError("no source: llm-prepare FILE|FOLDER|GLOB|-|NAME ..., such as llm-prepare book.txt; see --help")
    name, key, tokenizer = options.name or _default_name(given[0], root), options.text_key, options.tokenizer
    known = [argument for argument in given if argument in src.KNOWN_TEXTS]
    if known:
        if options.budget:
            raise UserError(f"the built-in source {known[0]} has its own tokenizer: remove --budget")
        if len(given) > 1 or options.val_files:
            raise UserError(f"{known[0]} is a built-in source and must be the only one; for a file, write ./{known[0]}")
        text = src.KNOWN_TEXTS[known[0]]
        source = text.open(root, key, report)
        if isinstance(source, src.FileSource):
            source = dataclasses.replace(source, label=src.display_path(source.path, root), lines=options.lines)
        useless = options.given("chat_template", "separator", "include", "exclude", "encoding", "bad_files")
        useless += ["lines"] if options.lines and not isinstance(source, src.FileSource) else []
        if useless:
            raise UserError(f"{known[0]} does not support --{' and --'.join(useless)}: remove it")
        fraction = options.val_fraction or text.val_fraction
        permuted = known[0] == "openwebtext"
        return DatasetSpec(name, [[source]], tokenizer or text.tokenizer, fraction, options.seed, permuted=permuted)
    lists = [src.find_sources(some, root, spool, options, report) for some in (given, options.val_files) if some]
    if len(lists) == 2 and (twice := {source.key for source in lists[0]} & {source.key for source in lists[1]}):
        raise UserError(f"{min(twice)} is both a training and a validation file")
    size = sum(source.size for source in lists[0])
    if any(isinstance(source, src.HubSource) for source in lists[0]):
        size = 1 << 40  # unknown, but not small
    if not size:
        raise empty(lists[0])
    is_chat = chats.are_conversations([source for some in lists for source in some], options, report)
    for source in (source for some in lists for source in some if options.lines):
        check_lines(source)
    budget = parse_budget(options.budget) if options.budget else None
    tokenizer = tokenizer or tokenizer_for(size, report, budget, is_chat)
    fraction = options.val_fraction or 0.1
    return DatasetSpec(name, lists, tokenizer, fraction, options.seed, options.chat_template, is_chat)


def tokenizer_for(size: int, report: Report, budget: Budget | None = None, is_chat: bool = False) -> str:
    """The default tokenizer for a training text of this size in bytes: a short text, or as much as a run with this
    budget reads of it, needs a small vocabulary. That of a chat model has every character that its users may type."""
    by_size = [(limit, "byte" if is_chat and name == "char" else name) for limit, name in TOKENIZER_BY_SIZE]
    if budget is not None and (read := text_within(budget)) < size:
        name = next(name for limit, name in by_size if read < limit)
        report(f"tokenizer: {name} (a run of {budget.text} reads about {read / 1e6:,.1f} MB of the text)")
        return name
    limits = [0.0, *(limit for limit, _ in by_size)]
    at, name = next((at, name) for at, (limit, name) in enumerate(by_size) if size < limit)
    span = f"below {limits[at + 1] / 1e6:g} MB" if limits[at + 1] < math.inf else f"of {limits[at] / 1e6:g} MB or more"
    report(f"tokenizer: {name} (text {span}; override with --tokenizer=NAME)")
    return name


def text_within(budget: Budget) -> float:
    """Bytes of text that a run with this budget reads if size and text are in balance (law.py)."""
    if budget.unit == "tokens":
        return budget.amount
    flops = budget.amount
    if budget.unit == "seconds":
        a = np.ones((512, 512), np.float32)
        took = min(timeit.repeat(lambda: a @ a, number=1, repeat=5))
        flops *= 2 * 512**3 / took / 2  # a training step reaches about half of the speed of its products
    return math.sqrt(flops / 6 * BYTES_PER_PARAMETER)


def _default_name(first: str, root: Path) -> str:
    if first == "-":
        return "stdin"
    path = root / first
    while not path.exists() and any(sign in path.name for sign in "*?["):
        path = path.parent  # books/*.txt: the folder
    return (path.resolve().name if path.is_dir() else path.stem) or "text"


def hash_request(spec: DatasetSpec, shard_size: int) -> tuple[str, list[dict[str, Any]]]:
    """A hash of everything that determines the result, and the identities of the sources."""
    if len(sources := spec.all()) == 1 and isinstance(sources[0], src.FileSource):
        # bpe:N reads the text for its vocabulary and counts it then
        scan = None if spec.tokenizer.startswith("bpe:") else TextScan(alphabet=spec.tokenizer == "char")
        identities = [[sources[0].identity(scan)]]
    else:
        identities = [[source.identity() for source in some] for some in spec.sources]
    given = Path(spec.tokenizer)
    beside = given.parent if given.is_file() else given
    own_files = [p for p in (given, *(beside / file for file in (*TOKENIZER_FILES, *READ_BESIDE))) if p.is_file()]
    own_files += [p for p in (ends_in(beside),) if p]
    what = {
        "version": 1,
        "sources": [*identities, []][:2],
        "split": len(identities) == 2,
        "name": spec.name,
        "tokenizer": [spec.tokenizer, *(src.FileSource(p).identity()["sha256"] for p in own_files)],
        "val_fraction": spec.val_fraction,
        "seed": spec.seed,
        "shard_size": shard_size,
        "keys": [getattr(source, "text_key", "") for source in spec.all()],
    }
    if spec.is_chat:
        template = src.FileSource(Path(spec.chat_template)).identity()["sha256"] if spec.chat_template else ""
        what["chat"] = [chats.VERSION, template]
    reading = [source.reading() for source in spec.all() if isinstance(source, src.FileSource)]
    what |= {"reading": reading} if any(reading) else {}
    what |= {"lines": 2} if any(getattr(source, "lines", False) for source in spec.all()) else {}  # a version
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest(), sum(identities, [])


def _manifest(target: Path) -> dict[str, Any]:
    """The manifest of prepared data; empty if there is none that can be read."""
    with contextlib.suppress(UserError):
        return read_manifest(target) or {}
    return {}


def _shards_in(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    splits = manifest.get("splits", {}).values()
    return [shard for split in splits for shard in [*split["shards"], *split.get("marks", [])]]


def _up_to_date(target: Path, request: str) -> bool:
    """Whether target is complete and was made by the same request."""
    manifest = _manifest(target)
    hashes = ((src.FileSource(target / shard["file"]).identity()["sha256"], shard) for shard in _shards_in(manifest))
    with contextlib.suppress(UserError):
        is_same = manifest.get("request") == request and Tokenizer.exists(target)
        return is_same and all(digest == shard["sha256"] for digest, shard in hashes)
    return False


def _refuse_foreign(target: Path) -> None:
    """Raises UserError if replacing target would delete files of the user."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: choose another --out_dir")
    manifest = _manifest(target)
    shards = {shard["file"] for shard in _shards_in(manifest)}
    ours = shards | {MANIFEST, *TOKENIZER_FILES, *REPORTS} if manifest else set()
    names = sorted(path.name for path in target.glob("*"))
    if foreign := [name for name in names if name not in ours and not name.startswith(CHECKED)]:
        what = f"{target} contains {foreign[0]}, which llm-prepare did not write"
        raise UserError(f"{what}: choose another --out_dir or --name")


def _print_summary(target: Path, root: Path, report: Report) -> None:
    """Reports sizes and a decoded example."""
    manifest, tokenizer = _manifest(target), Tokenizer.load(target)
    kind = "" if tokenizer.name == manifest["name"] else f"tokenizer {tokenizer.name}, "
    report(f"{src.display_path(target, root)}: {kind}vocabulary of {tokenizer.vocab_size:,}, {manifest['dtype']}")
    for split, entry in manifest["splits"].items():
        files = ", ".join(shard["file"] for shard in entry["shards"][:2])
        files += ", ..." if len(entry["shards"]) > 2 else ""
        report(f"  {split:5} {entry['tokens']:>14,} tokens {entry['bytes']:>14,} bytes of text  {files}")
    sizes = [manifest["splits"][split]["bytes"] for split in ("train", "val")]
    if sizes[1] > sizes[0]:
        report("note: the validation split is larger than the training split; use --val_files or another --seed")
    if manifest.get("units") in ("conversations", "preferences"):  # an example was shown when they were written
        return
    first = np.fromfile(target / manifest["splits"]["train"]["shards"][0]["file"], dtype_of(manifest), count=32)
    text = tokenizer.decode(first)
    shown = repr(text[:EXAMPLE]) + (f" and {len(text) - EXAMPLE:,} more characters" if len(text) > EXAMPLE else "")
    report(f"example: {' '.join(map(str, first[:8]))} ... is {shown}")


def _next_command(target: Path, root: Path, run: str | None, budget: str | None = None) -> str:
    """The command that trains on prepared data: from scratch, or from the weights of a run."""
    block_size = Config().model.block_size
    options = [f"--dataset={_dataset_of(target, root)}"]
    if run:
        options += [f"--init_from={run}", f"--out_dir=out-{target.name}"]
        if not is_gguf(Path(run)):
            block_size = min(block_size, read_json(find_checkpoint(run, verify=False) / "model.json")["block_size"])
    manifest = _manifest(target)
    options += ["--loss=dpo"] if manifest.get("units") == "preferences" else []
    longest = min(entry["tokens"] for entry in manifest["splits"].values()) - 1  # window
    if manifest.get("units"):  # windows are filled with documents, and padded
        wanted = min(64 * -(-int(manifest.get("longest", 0)) // 64), MAX_SUGGESTED)
        options += [f"--block_size={wanted}"] if wanted > block_size and not run else []
        longest = block_size
    if budget and longest:
        return f"next: llm-train {shlex.join([*options, f'--budget={budget}'])}"
    if not longest:
        return "note: a split of one token is too short to train on: use more text"
    options += [f"--block_size={longest}"] if longest < block_size else []
    return f"next: llm-train {shlex.join(options)}"


def _dataset_of(target: Path, root: Path) -> str:
    """The shortest --dataset that means this folder."""
    for name in (target.name, src.display_path(target, root)):
        with contextlib.suppress(UserError):
            if resolve_dataset(name).resolve() == target.resolve():
                return name
    return str(target.resolve())
