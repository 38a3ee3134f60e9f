"""Hostile files for every command that reads them: no code runs, no connection, no memory growth, no hang.

A case is one file (see poison.py) given to one command, in a forked child with an audit hook. It ends with exit code 2
and a line with the reason, or, if the file is harmless, as usual.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch  # noqa: F401  (here, so that no child needs seconds and memory to import it)
import tiktoken  # noqa: F401
import tokenizers  # noqa: F401
import torch
import yaml

from llm_from_scratch.cli import evaluate, export, generate, prepare_data, sample, train
from llm_from_scratch.config import Config
from llm_from_scratch.core import vocab_files as vocabulary
from llm_from_scratch.generation import generator  # noqa: F401
from llm_from_scratch.interop import (
    hf,  # noqa: F401
    torch_file,
)
from llm_from_scratch.presets import parse
from llm_from_scratch.training import evaluate as evaluation  # noqa: F401
from llm_from_scratch.training import trainer  # noqa: F401

from ..tiny import arguments, babble, write_data
from . import poison, poison_texts
from .doors import Outcome, call
from .rows import Report, Row

LIMIT, ROOM = 3.0, 64 << 20
Command = tuple[Callable[[list[str]], int], list[str]]


@dataclass
class Kind:
    """Artifacts of one kind."""

    place: str
    """Where in the case's folder the artifact is made."""
    artifacts: dict[str, poison.Maker]
    good: poison.Maker
    """Makes one that each command accepts."""
    commands: Callable[[Path, Path], dict[str, Command]]
    """By name, for the artifact's path and the folder with good data and a good checkpoint."""


def training(*more: str, **settings: Any) -> list[str]:
    return [*arguments(**{"max_iters": 8, "eval_iters": 1, "n_head": 1, "n_embd": 4, **settings}), *more]


CPU = ["--device=cpu", "--dtype=float32"]
FEW = [*CPU, "--max_new_tokens=4", "--num_samples=1", "--start=a"]


def of_a_step(path: Path, base: Path) -> dict[str, Command]:
    out = path.parent
    return {
        "llm-train": (train.main, training("--init_from=resume", out_dir=out, dataset=base / "data")),
        "llm-generate": (generate.main, [f"--out_dir={out}", *FEW]),
        "llm-eval": (evaluate.main, [f"--out_dir={out}", f"--dataset={base / 'data'}", *CPU]),
        "llm-export": (export.main, [f"--out_dir={out}", "--format=nanogpt", f"--output={out / 'x.pt'}"]),
    }


def of_a_model(path: Path, base: Path) -> dict[str, Command]:
    """A ckpt.pt or a folder in Hugging Face's format."""
    data, out = f"--dataset={base / 'data'}", path.parent / "out"
    last: Command = (export.main, [f"--checkpoint={path}", data, "--format=nanogpt", f"--output={out}"])
    if path.name == "model":
        last = (generate.main, [f"--init_from={path}", data, *FEW])
    return {
        "llm-train": (train.main, training(out_dir=out, dataset=base / "data", init_from=path)),
        "sample.py": (sample.main, [f"--init_from={path}", data, *FEW]),
        "llm-eval": (evaluate.main, [f"--out_dir={path}", data, *CPU]),
        "llm-export" if path.name != "model" else "llm-generate": last,
    }


def of_a_vocabulary(path: Path, base: Path) -> dict[str, Command]:
    """meta.pkl in a folder with data."""
    for name in ("train.bin", "val.bin"):
        if not (path.parent / name).exists():
            shutil.copy(base / "data" / name, path.parent)
    good, data = base / "ckpt.pt", f"--dataset={path.parent}"
    return {
        "llm-train": (train.main, training(dataset=path.parent, out_dir=path.parent / "out")),
        "llm-generate": (generate.main, [f"--checkpoint={good}", data, *FEW]),
        "llm-eval": (evaluate.main, [f"--out_dir={good}", data, *CPU]),
        "llm-prepare": (prepare_data.main, [str(base / "text.txt"), f"--tokenizer={path.parent}",
                                            f"--out_dir={path.parent / 'made'}"]),
    }  # fmt: skip


def of_a_tokenizer(path: Path, base: Path) -> dict[str, Command]:
    """tokenizer.json in a folder of Hugging Face's format."""
    model = path.parent
    if not (model / "config.json").exists():
        shutil.copytree(base / "hf", model, dirs_exist_ok=True)
    out = model.parent / "out"
    return {
        **{k: v for k, v in of_a_model(model, base).items() if k != "llm-eval"},
        "llm-train": (train.main, training(out_dir=out, dataset=base / "plain", init_from=model)),
        "llm-prepare": (prepare_data.main, [str(base / "text.txt"), f"--tokenizer={path}", "--workers=0",
                                            f"--out_dir={model.parent / 'made'}"]),
    }  # fmt: skip


def of_a_preset(path: Path, base: Path) -> dict[str, Command]:
    good = f"{base / 'ckpt.pt'}"
    return {
        "llm-train": (train.main, [str(path), *training(dataset=base / "data", out_dir=path.parent / "out")]),
        "--print_config": (train.main, [str(path), "--print_config"]),
        "llm-generate": (generate.main, [str(path), f"--checkpoint={good}", f"--dataset={base / 'data'}", *FEW[:-1]]),
        "sample.py": (sample.main, [str(path), f"--init_from={good}", f"--dataset={base / 'data'}", *FEW[:-1]]),
    }


def of_a_text(path: Path, base: Path) -> dict[str, Command]:
    good, data, made = f"{base / 'ckpt.pt'}", f"--dataset={base / 'data'}", path.parent / "made"
    start = [*FEW[:-1], f"--start=FILE:{path}"]
    return {
        "llm-generate": (generate.main, [f"--checkpoint={good}", data, *start]),
        "sample.py": (sample.main, [f"--init_from={good}", data, *start]),
        "llm-eval": (evaluate.main, [str(path), f"--out_dir={base / 'run'}", *CPU]),
        "llm-prepare": (prepare_data.main, [str(path), "--tokenizer=byte", "--workers=0", f"--out_dir={made}"]),
    }  # fmt: skip


def right_meta(path: Path) -> None:
    letters = poison_texts.LETTERS
    content = {"vocab_size": 20, "itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
    path.write_bytes(pickle.dumps(content))


def kinds() -> dict[str, Kind]:
    return {
        "step directory": Kind("out/step-00000007", poison.step_folders(), poison.step(), of_a_step),
        "ckpt.pt": Kind("ckpt.pt", poison.ckpt_pt(), poison.pt(), of_a_model),
        "Hugging Face folder": Kind("model", poison_texts.hf_folders(), poison_texts.hf(), of_a_model),
        "meta.pkl": Kind("data/meta.pkl", poison_texts.meta_pickles(), right_meta, of_a_vocabulary),
        "tokenizer.json": Kind(
            "model/tokenizer.json",
            poison_texts.tokenizers(),
            lambda p: p.write_text(poison_texts.trained()),
            of_a_tokenizer,
        ),
        "YAML": Kind("x.yaml", poison_texts.presets(), lambda p: p.write_text("start: a\nseed: 1\n"), of_a_preset),
        "text": Kind("x.txt", poison_texts.prompts(), lambda p: p.write_text(babble(300)), of_a_text),
    }


def prepare(base: Path) -> None:
    """Good data, a good ckpt.pt, a good run and a good folder of Hugging Face's."""
    write_data(base / "data")
    write_data(base / "plain", tokenizer=None, vocab_size=270)
    poison.pt()(base / "ckpt.pt")
    poison.step()(base / "run" / "step-00000007")
    poison_texts.hf(rows=270)(base / "hf")
    (base / "hf" / "tokenizer.meta.json").unlink()
    (base / "text.txt").write_text(babble(3000))
    parse(Config, [], prog="x", base_preset="default")
    torch.optim.AdamW([torch.zeros(1)])  # which imports torch's compiler


def attempt(kind: Kind, make: poison.Maker, entry: int, here: Path, base: Path) -> tuple[str, Outcome, int]:
    """The command's name, how it ended, and the size of the artifact."""
    path = here / kind.place
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    size = sum(f.lstat().st_blocks * 512 for f in [path, *path.rglob("*")] if f.is_file() and not f.is_symlink())
    name, (main, argv) = list(kind.commands(path, base).items())[entry]
    return name, call(main, argv, here, LIMIT), size


def run(count: int, seed: int, folder: Path) -> Report:
    report, base = Report(), folder / "base"
    prepare(base)
    every, rng = kinds(), random.Random(seed)
    piles = [[(name, what, entry) for what in kind.artifacts for entry in range(4)] for name, kind in every.items()]
    for pile in piles:
        rng.shuffle(pile)
    # a few cases are some of each kind
    cases = [case for turn in itertools.zip_longest(*piles) for case in turn if case is not None]
    for case in range(count):
        name, what, entry = cases[case % len(cases)]
        here = folder / str(case)
        here.mkdir()
        command, outcome, size = attempt(every[name], every[name].artifacts[what], entry, here, base)
        label = f"{name}, {what}, {command}"
        report.done += 1
        refused = outcome.refused()
        report.check(refused or outcome.code == 0, f"{label}: ends with {outcome.code}: {outcome.err[-300:]!r}")
        report.check(not outcome.events, f"{label}: {outcome.events[:3]}")
        report.check(not any(folder.rglob(poison.CANARY)), f"{label}: its code ran")
        for canary in folder.rglob(poison.CANARY):
            shutil.rmtree(canary) if canary.is_dir() else canary.unlink()
        report.check(outcome.grown <= 2 * size + ROOM, f"{label}: {outcome.grown >> 20} MB for {size >> 10} KB")
        report.check(outcome.code is not None and outcome.seconds < LIMIT, f"{label}: took {outcome.seconds:.1f} s")
        report.count("refused", int(refused))
        report.count("harmless", int(outcome.code == 0))
        shutil.rmtree(here)
        if not base.exists():  # something removed it
            prepare(base)
    report.count("artifacts", len({case[:2] for case in cases[:count]}))
    for name, kind in every.items() if count >= len(cases) else ():
        for entry in range(4):
            here = folder / f"good-{name}-{entry}"
            here.mkdir()
            command, outcome, _ = attempt(kind, kind.good, entry, here, base)
            report.check(outcome.code == 0, f"a good {name}, {command}: {outcome.code} {outcome.err[-300:]!r}")
            report.count("good ones that pass", int(outcome.code == 0))
    return report


@contextlib.contextmanager
def _replaced(where: Any, name: str, by: Any) -> Iterator[None]:
    with mock.patch.object(where, name, by):
        yield


@contextlib.contextmanager
def _any_pickle() -> Iterator[None]:
    codes = {opcode.name for opcode in __import__("pickletools").opcodes}
    with (
        mock.patch.object(vocabulary, "_PLAIN_OPCODES", codes),
        mock.patch.object(vocabulary, "PlainUnpickler", pickle.Unpickler),
    ):
        yield


ARTIFACTS = sum(len(kind.artifacts) for kind in kinds().values())
ROW = Row(
    title="hostile artifacts at each of four commands: nothing runs",
    target=4 * ARTIFACTS,
    quick=4,
    prove=100,
    run=run,
    defects={
        "meta.pkl read by the plain unpickler": _any_pickle,
        "pickles not looked through": lambda: _replaced(torch_file, "_look_through", lambda pickled, path: []),
        "YAML that builds anything": lambda: _replaced(yaml, "safe_load", yaml.unsafe_load),
    },
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
