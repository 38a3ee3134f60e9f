"""Bad data files: llm-train refuses each before it writes anything, with the reason, within seconds.

A case is a data folder in which one file of a split, or its description in the manifest, is wrong.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch  # noqa: F401  (in the parent, so that no child needs seconds to import it)

from llm_from_scratch.cli import train
from llm_from_scratch.config import Config
from llm_from_scratch.core import tokenfile
from llm_from_scratch.presets import parse
from llm_from_scratch.training import trainer  # noqa: F401

from ..tiny import TOKENIZER, arguments, write_data, write_ids
from .doors import Outcome, call
from .rows import Report, Row

LIMIT, BLOCK, IDS = 3.0, 8, 20
Spoil = Callable[[Path, np.ndarray], Any]


def as_dtype(dtype: str) -> Spoil:
    return lambda path, ids: ids.astype(dtype).tofile(path)


def content(make: Callable[[np.ndarray], bytes]) -> Spoil:
    return lambda path, ids: path.write_bytes(make(ids))


def npy(version: tuple[int, int]) -> Spoil:
    def save(path: Path, ids: np.ndarray) -> None:
        with path.open("wb") as file:
            np.lib.format.write_array(file, ids.astype("<u2"), version=version)

    return save


def npz(path: Path, ids: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, ids=ids.astype("<u2"))


def bad_id(at: float, value: int = IDS) -> Spoil:
    """One id outside the vocabulary, at a place between 0 (the first) and 1 (the last)."""

    def save(path: Path, ids: np.ndarray) -> None:
        ids[round(at * (len(ids) - 1))] = value
        write_ids(path, ids)

    return save


def raw(ids: np.ndarray) -> bytes:
    return ids.astype("<u2").tobytes()


def a_socket(path: Path, ids: np.ndarray) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # its name may have some hundred characters only
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(before)


def manifest(path: Path, ids: np.ndarray, **change: Any) -> None:
    """A manifest.json next to the files, correct except for the change; file and tokens belong to the split."""
    split = path.stem
    shard = {"file": path.name, "tokens": len(ids)} | {k: change.pop(k) for k in ("file", "tokens") if k in change}
    shards = change.pop("shards", [shard])
    body = {"format": "llm-from-scratch-data", "version": 1, "dtype": "uint16", "vocab_size": IDS}
    write_ids(path, ids, "<u2")
    (path.parent / "manifest.json").write_text(json.dumps({**body, "splits": {split: {"shards": shards}}, **change}))


def stated(**change: Any) -> Spoil:
    return lambda path, ids: manifest(path, ids, **change)


def damaged_manifest(text: bytes) -> Spoil:
    return beside(lambda path: path.write_bytes(text))


def stated_too_narrow(path: Path, ids: np.ndarray) -> None:
    manifest(path, ids)
    write_ids(path, ids, "<u4")


def beside(make: Callable[[Path], Any], name: str = "manifest.json") -> Spoil:
    """The file is right; another in its folder is not. name: "" means the file itself."""

    def save(path: Path, ids: np.ndarray) -> None:
        write_ids(path, ids)
        spoilt = path.with_name(name) if name else path
        spoilt.unlink(missing_ok=True)
        make(spoilt)

    return save


def numbered(*numbers: int, plain: bool = False) -> Spoil:
    def save(path: Path, ids: np.ndarray) -> None:
        for number in numbers:
            write_ids(path.with_name(f"{path.stem}_{number:06d}.bin"), ids)
        if plain:
            write_ids(path, ids)

    return save


NOT_REGULAR: dict[str, tuple[Callable[[Path], Any], str]] = {
    "FIFO": (os.mkfifo, "is a FIFO"),
    "directory": (Path.mkdir, "is a directory"),
    "endless device": (lambda p: p.symlink_to("/dev/zero"), "is a device"),
    "empty device": (lambda p: p.symlink_to("/dev/null"), "is a device"),
    "dangling link": (lambda p: p.symlink_to("nowhere"), "is missing|No such file"),
    "link to itself": (lambda p: p.symlink_to(p.name), "cannot read|symbolic links"),
}  # fmt: skip
OUTSIDE, DAMAGED = "outside the vocabulary of 20 ids", "manifest.json is damaged"
KINDS: dict[str, tuple[Spoil, str]] = {
    "npy": (npy((1, 0)), "NumPy file with a header"),
    "npy 2.0": (npy((2, 0)), "NumPy file with a header"),
    "npy 3.0": (npy((3, 0)), "NumPy file with a header"),
    "npz": (npz, OUTSIDE),
    "gzip": (content(lambda ids: gzip.compress(raw(ids)).ljust(999, b"\0")[:998]), OUTSIDE),
    "pickle": (content(lambda ids: pickle.dumps(ids).ljust(9999, b"\0")[:9998]), OUTSIDE),
    "text": (content(lambda ids: b"To be, or not to be: that is the question.\n" * 30), "is a text; prepare it"),
    "UTF-8 text": (content(lambda ids: "Être ou ne pas être — 是这样。\n".encode() * 30), "is a text; prepare it"),
    "UTF-16 text": (content(lambda ids: "To be, or not to be.\n".encode("utf-16") * 30), OUTSIDE),
    "uint32": (as_dtype("<u4"), "every second id is 0"),
    "int64": (as_dtype("<i8"), "every second id is 0"),
    "big-endian": (as_dtype(">u2"), "uint16 in the other byte order"),
    "big-endian uint32": (as_dtype(">u4"), "uint32 in the other byte order"),
    "big-endian int64": (as_dtype(">i8"), "int64 in the other byte order"),
    "float32": (as_dtype("<f4"), "valid as float32"),
    "float64": (as_dtype("<f8"), "valid as float64"),
    "float16": (as_dtype("<f2"), OUTSIDE),
    "uint8": (lambda path, ids: (ids[: len(ids) // 2 * 2] + 1).astype("u1").tofile(path), OUTSIDE),
    "padding of -1": (lambda path, ids: np.append(ids, -1).astype("<i2").tofile(path), "has id 65535, " + OUTSIDE),
    "a header before the ids": (content(lambda ids: b"\x93\x12\x34\x01" * 64 + raw(ids)), OUTSIDE),
    "odd length": (content(lambda ids: raw(ids)[:-1]), "not a multiple of 2"),
    "one byte": (content(lambda ids: b"\1"), "not a multiple of 2"),
    "empty": (content(lambda ids: b""), "is empty"),
    "one token": (content(lambda ids: raw(ids[:1])), "a window needs block_size"),
    "one token too short": (content(lambda ids: raw(ids[:BLOCK])), "has 8 tokens, but a window needs block_size"),
    "last id": (bad_id(1), f"has id 20, {OUTSIDE}"),
    "first id": (bad_id(0), f"token 0 has id 20, {OUTSIDE}"),
    "an id in the middle": (bad_id(0.5, 300), f"has id 300, {OUTSIDE}"),
    "the largest id there is": (bad_id(0.9, 65535), f"has id 65535, {OUTSIDE}"),
    "another vocabulary": (lambda path, ids: write_ids(path, ids * 7), OUTSIDE),
    "missing": (lambda path, ids: None, "is missing"),
    "socket": (a_socket, "is a socket"),
    **{name: (beside(make, ""), why) for name, (make, why) in NOT_REGULAR.items()},
    "both plain and numbered": (numbered(0, plain=True), "contains both"),
    "a number is missing": (numbered(0, 1, 3), "number 2 is missing"),
    "truncated": (stated(tokens=10**6), "its manifest lists 1000000"),
    "longer than stated": (stated(tokens=9), "its manifest lists 9"),
    "uint16 stated as uint32": (stated(dtype="uint32"), "its manifest lists|not a multiple of 4"),
    "uint32 stated as uint16": (stated_too_narrow, "its manifest lists"),
    "a file outside": (stated(file="../train.bin"), "names files outside its folder"),
    "a file with a path": (stated(file="/etc/passwd"), "names files outside its folder"),
    "a stated file that is missing": (stated(file="train_000007.bin"), "is missing"),
    "no files": (stated(shards=[]), "is empty"),
    "a file twice": (stated(shards=[{"file": "train.bin", "tokens": 1}] * 2), "names a file twice"),
    "shards of another kind": (stated(shards={"a": 1}), DAMAGED),
    "tokens below zero": (stated(tokens=-1), DAMAGED),
    "tokens in text": (stated(tokens="12"), DAMAGED),
    "a null in a name": (stated(file="train\0.bin"), DAMAGED),
    "another format": (stated(format="other"), DAMAGED),
    "another dtype": (stated(dtype="int8"), DAMAGED),
    "splits of another kind": (stated(splits=[]), DAMAGED),
    **{f"vocab_size {v}": (stated(vocab_size=v), DAMAGED) for v in (0, -5, 1.5, "many", None, 10**30, True)},
    "infinite vocab_size": (stated(vocab_size=float("inf")), DAMAGED),
    "manifest of zeros": (damaged_manifest(bytes(500)), DAMAGED),
    "manifest cut short": (damaged_manifest(b'{"format": "llm-from-scratch-data", "dty'), DAMAGED),
    "manifest without fields": (damaged_manifest(b"{}"), DAMAGED),
    "manifest that is a list": (damaged_manifest(b"[1]"), DAMAGED),
    "nested manifest": (damaged_manifest(b"[" * 100_000), DAMAGED),
    "manifest with a bomb": (damaged_manifest(b'{"a":[' + b"[]," * 1_500_000 + b"1]}"), DAMAGED),
    "manifest that is too large": (damaged_manifest(b" " * (17 << 20)), DAMAGED),
    "manifest that is no text": (damaged_manifest(b"\xff\xfe\x00\xd8"), DAMAGED),
    **{f"manifest: {name}": (beside(make), DAMAGED) for name, (make, _) in NOT_REGULAR.items()},
    "tokenizer cut short": (
        beside(lambda p: p.write_text('{"format": '), "tokenizer.meta.json"), "tokenizer in .*damaged",
    ),
    "another tokenizer": (
        beside(lambda p: p.write_text('{"format": "x", "version": 1}'), "tokenizer.meta.json"), "has the format x 1",
    ),
}  # fmt: skip
LIES = [(name, split) for name in KINDS for split in ("train", "val")]


def good(case: int, folder: Path, rng: np.random.Generator) -> None:
    """Folders that only look odd: they pass."""
    ids = rng.integers(0, IDS, 500)
    if case == 0:
        write_data(folder, train=ids[: BLOCK + 1], val=ids)
    elif case == 1:
        write_data(folder, train=[ids[:3], ids[3:9], ids[9:]], val=ids)
    elif case == 2:
        write_data(folder, train=np.zeros(99), val=ids)
    elif case == 3:
        splits = {"train": {"shards": [{"file": "train.bin", "tokens": 500}]}}
        write_data(folder, train=ids, val=ids, dtype="uint32", splits=splits)
    else:
        write_data(folder.with_name("elsewhere"), train=ids, val=ids)
        write_data(folder)
        (folder / "train.bin").unlink()
        (folder / "train.bin").symlink_to(folder.with_name("elsewhere") / "train.bin")


CONTROLS = 5


def start(folder: Path, *more: str) -> Outcome:
    settings = {"dataset": folder / "data", "out_dir": folder / "out", "max_iters": 1, "eval_iters": 1}
    return call(train.main, [*arguments(**settings, block_size=BLOCK), *more], folder, LIMIT)


def run(count: int, seed: int, folder: Path) -> Report:
    report, order = Report(), list(LIES)
    parse(Config, [], prog="x", base_preset="default")  # imports what each child would import again
    random.Random(seed).shuffle(order)
    for case in range(count):
        name, split = order[case % len(order)]
        rng, here = np.random.default_rng([seed, case]), folder / str(case)
        ids = rng.integers(0, IDS, int(rng.integers(200, 5000)))
        path = write_data(here / "data", train=ids, val=ids, tokenizer=TOKENIZER) / f"{split}.bin"
        path.unlink()
        KINDS[name][0](path, ids.copy())
        outcome = start(here)
        label = f"{name} ({split}, case {case})"
        report.done += 1
        report.check(outcome.refused() and len(outcome.lines()) == 1, f"{label}: {outcome.code} {outcome.err[-300:]!r}")
        report.check(
            bool(re.search(KINDS[name][1], outcome.err)), f"{label}: says another reason: {outcome.err[-300:]!r}"
        )
        report.check(not (here / "out").exists(), f"{label}: something was written")
        report.check(outcome.seconds < LIMIT, f"{label}: took {outcome.seconds:.1f} s")
        shutil.rmtree(here)
    report.count("kinds", len({order[case % len(order)][0] for case in range(count)}))
    for case in range(min(CONTROLS, count // 4)):
        here = folder / f"good{case}"
        here.mkdir()
        good(case, here / "data", np.random.default_rng([seed, case]))
        outcome = start(here, "--dry_run")
        report.check(outcome.code == 0, f"good files {case}: {outcome.code} {outcome.err[-300:]!r}")
        report.count("good files that pass", int(outcome.code == 0))
    return report


@contextlib.contextmanager
def _replaced(name: str, by: Any) -> Iterator[None]:
    with mock.patch.object(tokenfile, name, by):
        yield


ROW = Row(
    title="bad data files, refused before step 0 with the reason",
    target=2 * len(KINDS),
    quick=4,
    prove=50,
    run=run,
    defects={
        "no scan of the ids": lambda: _replaced("scan", lambda *_: None),
        "formats not told apart": lambda: _replaced("_foreign_format", lambda head: None),
        "a FIFO is opened like a file": lambda: _replaced("open_file", lambda path: os.open(path, os.O_RDONLY)),
        "wider ids not noticed": lambda: _replaced("_every_second_is_zero", lambda shard: False),
    },
)
