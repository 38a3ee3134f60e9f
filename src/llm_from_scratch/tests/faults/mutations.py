"""Mutated inputs to each parser: only the program's own errors, in time, and accepted values are in range.

A case is one valid input of one parser with one to three random changes. Most changes keep the container valid: JSON
stays JSON, folders get a new manifest, archives get correct checksums; the others change bits and bytes or truncate.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from llm_from_scratch.checkpoint import contents as state
from llm_from_scratch.core import weights
from llm_from_scratch.errors import UserError

from .mutants import Mutant
from .mutated_checkpoints import Archive, Checkpoints
from .mutated_files import (
    CommandLine,
    DataManifest,
    ForeignTokenizer,
    MetaPickle,
    Metrics,
    SavedTokenizer,
    Yaml,
)  # fmt: skip
from .mutated_finetuning import Conversations, Peft, Template
from .mutated_gguf import GGUF
from .rows import Report, Row

LIMIT, HANG = 3.0, 60.0  # seconds a case: of the processor, which other processes cannot use up, and by the clock
TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, LIMIT), (signal.SIGALRM, signal.ITIMER_REAL, HANG))


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {LIMIT if signum == signal.SIGPROF else HANG:g} s")

    before = [signal.signal(signum, stop) for signum, _, _ in TIMERS]
    for _, timer, seconds in TIMERS:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (signum, timer, _), handler in zip(TIMERS, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(signum, handler)


JSON_MEMBERS = ("config.json", "trainer.json", "model.json", "optimizer.json", "tokenizer.meta.json")
ADAPTER_MEMBERS = ("adapter.json", "adapter.safetensors")
TENSOR_MEMBERS = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
PARSERS: dict[str, Callable[[Path], Any]] = {
    "JSON of a checkpoint": lambda folder: Checkpoints(folder, JSON_MEMBERS, True),
    "safetensors": lambda folder: Checkpoints(folder, TENSOR_MEMBERS, False),
    "ckpt.pt": Archive,
    "meta.pkl": MetaPickle,
    "tokenizer.meta.json": SavedTokenizer,
    "tokenizer.json": ForeignTokenizer,
    "data manifest": DataManifest,
    "YAML": Yaml,
    "command line": CommandLine,
    "metrics.jsonl": Metrics,
    "adapter": lambda folder: Checkpoints(folder, ADAPTER_MEMBERS, True, is_adapter=True),
    "adapter of peft": Peft,
    "conversations": Conversations,
}
if importlib.util.find_spec("jinja2"):
    PARSERS["chat template"] = Template
if importlib.util.find_spec("gguf"):
    PARSERS["GGUF"] = GGUF


def run(count: int, seed: int, folder: Path) -> Report:
    report = Report()
    # the disk itself is not what is tried here, and each Rust panic prints a page
    with mock.patch.object(os, "fsync", lambda handle: None), contextlib.redirect_stderr(io.StringIO()):
        for number, (name, kind) in enumerate(PARSERS.items()):
            home = folder / f"parser{number}"
            place = home / "step-00000007"
            place.mkdir(parents=True)
            parser = kind(home)
            for case in range(count * number // len(PARSERS), count * (number + 1) // len(PARSERS)):
                valid = parser.make(Mutant(f"{seed} {name} {case}"), place)
                report.done += 1
                report.count("in a valid container", int(valid))
                begin = time.process_time()
                try:
                    with in_time():
                        parser.read(place)
                    report.count("accepted, in range")
                except UserError as error:
                    if not report.check("\n" not in str(error), f"{name} {case}: an error of several lines"):
                        report.failures[-1] += f": {str(error)[:200]!r}"
                except BaseException as error:
                    report.check(False, f"{name} {case}: {type(error).__name__}: {str(error)[:200]}")
                    if isinstance(error, KeyboardInterrupt):
                        raise
                took = time.process_time() - begin
                report.check(took < LIMIT, f"{name} {case}: took {took:.1f} s")
    return report


@contextlib.contextmanager
def _replaced(where: Any, name: str, by: Any) -> Iterator[None]:
    with mock.patch.object(where, name, by):
        yield


ROW = Row(
    title="mutated inputs to each parser: typed errors only, values in range",
    target=100_000,
    quick=100,
    prove=2000,
    run=run,
    defects={
        "JSON that is none raises what json raises": lambda: _replaced(
            state, "from_json", lambda raw, where: json.loads(raw)
        ),
        "shapes of weights unchecked": lambda: _replaced(weights, "checked_weights", lambda model, *_: dict(model)),
        "numbers of a model config unchecked": lambda: _replaced(weights, "fits", lambda value, hint: True),
    },
)
