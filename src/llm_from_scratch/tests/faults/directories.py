"""A run's folder with damaged, stray and swapped entries: which checkpoint is selected, what is printed and changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from llm_from_scratch.checkpoint import hashed_folder as sealed
from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.checkpoint.load import load as load_any
from llm_from_scratch.errors import UserError

from .flips import reseal
from .rows import Report, Row
from .saves import contents, load, quiet, replaced, same, save, tag_of

STEPS = (3, 20, 100, 250, 1000)
DATES = (0.0, 1e9, 1.7e9, 4e9)  # 1970 to 2096
Harm = Callable[[Path, random.Random], Any]


def _flip(path: Path, rng: random.Random) -> None:
    file = path / rng.choice(sorted(os.listdir(path)))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _member(path: Path, rng: random.Random) -> Path:
    return path / rng.choice([name for name in cp.OWN_FILES if (path / name).exists()])


def _empty(path: Path, rng: random.Random) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _not_finite(path: Path, rng: random.Random) -> None:
    """Every hash fits, and a weight is a NaN."""
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-4:] = b"\0\0\xc0\x7f"
    (path / "model.safetensors").write_bytes(data)
    (path / cp.MANIFEST).write_bytes(reseal({p.name: p.read_bytes() for p in path.iterdir()}))


def _replace(make: Callable[[Path], Any]) -> Harm:
    def harm(path: Path, rng: random.Random) -> None:
        member = _member(path, rng)
        member.unlink()
        make(member)

    return harm


HARMS: dict[str, Harm] = {
    "a flipped bit": _flip,
    "a file cut short": lambda path, rng: os.truncate(_member(path, rng), rng.randrange(10)),
    "a file of zeros": lambda path, rng: (m := _member(path, rng)).write_bytes(bytes(m.stat().st_size + 1)),
    "a file gone": lambda path, rng: _member(path, rng).unlink(),
    "a folder for a file": _replace(os.mkdir),
    "a FIFO for a file": _replace(os.mkfifo),
    "a link to nowhere for a file": _replace(lambda member: member.symlink_to("nowhere")),
    "a link to itself for a file": _replace(lambda member: member.symlink_to(member.name)),
    "no manifest": lambda path, rng: (path / cp.MANIFEST).unlink(),
    "an empty manifest": lambda path, rng: (path / cp.MANIFEST).write_bytes(b""),
    "half a manifest": lambda path, rng: os.truncate(path / cp.MANIFEST, 200),
    "a manifest of rubbish": lambda path, rng: (path / cp.MANIFEST).write_bytes(rng.randbytes(500)),
    "an empty folder": _empty,
    "a number that is not finite": _not_finite,
}


@dataclass
class Case:
    """What a folder holds, and what therefore must happen."""

    good: dict[int, int] = field(default_factory=dict)
    """{step: tag} of the whole ones."""
    damaged: dict[int, list[str]] = field(default_factory=dict)
    """{step: names} of the damaged ones, the step as far as it can be known."""
    told: list[str] = field(default_factory=list)
    """What was done, for the line of a failure."""


def _build(out: Path, rng: random.Random, tags: int) -> Case:
    case = Case()
    for index, step in enumerate(STEPS):
        save(out, step, tags + index)
    names = {step: f"step-{step:08d}" for step in STEPS}
    if rng.random() < 0.3:  # each under another's name
        case.told.append("names exchanged")
        shuffled = rng.sample(STEPS, len(STEPS))
        for step in STEPS:
            (out / names[step]).rename(out / f"moving-{step}")
        for step, other in zip(STEPS, shuffled, strict=True):
            (out / f"moving-{step}").rename(out / names[other])
        names = {step: f"step-{other:08d}" for step, other in zip(STEPS, shuffled, strict=True)}
    case.good = {step: tags + index for index, step in enumerate(STEPS)}
    newest = rng.choice((0, 0, 1, 1, 2, 2, 3, 4, 5))
    chosen = list(STEPS[len(STEPS) - newest :])
    if rng.random() < 0.3 and newest < len(STEPS) - 1:  # an older one as well
        chosen.append(STEPS[0])
    for step in chosen:
        kind = rng.choice(sorted(HARMS))
        path = out / names[step]
        with_manifest = _print(path / cp.MANIFEST)
        HARMS[kind](path, rng)
        case.told.append(f"{path.name}: {kind}")
        del case.good[step]
        sure = kind == "a number that is not finite" or _print(path / cp.MANIFEST) == with_manifest
        case.damaged.setdefault(step if sure else int(path.name.removeprefix("step-")), []).append(path.name)
        if (
            rng.random() < 0.2 and path.name == f"step-{step:08d}"
        ):  # the replacement of one was cut, the old one is whole
            case.told.append("its old one is whole")
            case.good[step] = tags + 50 + step % 40
            save(out / "other", step, case.good[step]).rename(out / f"{path.name}.old")
            (out / "other").rmdir()
        if rng.random() < 0.2:
            (out / f"damaged-{path.name}").mkdir()
            case.told.append("its next name is taken")
    return case


def _strays(out: Path, rng: random.Random, case: Case) -> None:
    """Names that are none of ours, or are of another run."""

    def copy(name: str) -> None:
        save(out / "other", 5000, 1).rename(out / name)
        (out / "other").rmdir()

    def folder(name: str) -> None:
        (out / name).mkdir()

    strays: dict[str, Callable[[str], Any]] = {
        "step-00000007": lambda name: (out / name).write_text("a file"),
        "step-00009999": lambda name: os.mkfifo(out / name),
        "step-00008888": lambda name: (out / name).symlink_to("nowhere"),
        "step-00008887": lambda name: (out / name).symlink_to(name),
        "step-00007777.bak": copy,
        "step-": folder,
        "step-x": folder,
        "step--1": copy,
        "mystep-00009999": copy,
        "STEP-00009999": copy,
        "step-00006666 (copy)": copy,
        "damaged-step-00006000": copy,
        ".tmp-mine": copy,
        "previous-run-b": lambda name: save(out / name, 7000, 2),
        "step-0000000000000000000009": copy,  # longer than any of ours
        "ckpt.pt": lambda name: (out / name).write_bytes(b"not one of nanoGPT's"),
        "metrics.jsonl": lambda name: (out / name).write_text("{}\n"),
    }
    for name in rng.sample(sorted(strays), rng.randint(0, 6)):
        strays[name](name)
        case.told.append(f"a stray {name}")
    if rng.random() < 0.3:  # an empty folder of a step's name is a checkpoint that is damaged
        (out / "step-4321").mkdir()
        case.damaged.setdefault(4321, []).append("step-4321")
        case.told.append("an empty step-4321")
    if rng.random() < 0.3:
        copy(f".tmp-step-{5000:08d}")
        copy(f".tmp-remove-step-{3:08d}")
        case.told.append("leftovers that are whole")


def _clocks(out: Path, rng: random.Random) -> None:
    for path in out.iterdir():
        if not path.is_symlink():
            os.utime(path, (rng.choice(DATES), rng.choice(DATES) + rng.random()))


def _try(out: Path, case: Case, rng: random.Random) -> str | None:
    before = _prints(out)
    if case.damaged and rng.random() < 0.3:  # one that was asked for is never replaced by another
        step = rng.choice([step for step, names in case.damaged.items()])
        if step not in case.good:
            try:
                load(out, step)
            except cp.DamagedError:
                pass
            else:
                return f"step {step} was asked for, and is damaged"
    newest = max(case.good, default=None)
    with quiet() as said:
        try:
            got = load_any(out, "last", set_aside=True)
        except cp.DamagedError as error:
            if newest is not None:
                return f"nothing comes back: {error}"
            missing = [name for names in case.damaged.values() for name in names if name not in str(error)]
            if missing or _prints(out) != before or said.getvalue():
                return f"it stops without a word of {missing}, or has changed something: {error}"
            return None
    if newest is None:
        return f"none is good, and {got.path} comes back"
    if got.step != newest or not same(got, contents(newest, case.good[newest])):
        return f"{got.path} with tag {tag_of(got)} comes back, expected step {newest}"
    lines = said.getvalue().splitlines()
    assert got.path is not None
    rank = _rank(newest, got.path.name)
    passed = [name for step, names in case.damaged.items() for name in names if _rank(step, name) > rank]
    if len(lines) != bool(passed) or any(f"/{name}" not in lines[0] for name in passed):
        return f"{passed} are passed over, and it says {lines}"
    after = _prints(out)
    if sorted(before.values()) != sorted(after.values()):
        return "something is gone, or changed"
    gone = sorted(before.keys() - after.keys())
    if gone != sorted(passed) or not all(name.startswith("damaged-step-") for name in after.keys() - before.keys()):
        return f"{gone} were renamed, expected {passed}"
    cp.clean_leftovers(out)
    with quiet() as said:
        again = load_any(out, "last", set_aside=True)
    if said.getvalue() or again.step != newest or tag_of(again) != tag_of(got):
        return f"the second time {again.path} comes back, and it says {said.getvalue()!r}"
    return None


def _rank(step: int, name: str) -> tuple[int, bool]:
    """The order in which checkpoints are tried: by step; of two with one step, the one that bears its name is first."""
    return step, name == f"step-{step:08d}"


def _prints(out: Path) -> dict[str, str]:
    """{name: what it holds} of the entries of a folder."""
    return {path.name: _print(path) for path in out.iterdir()}


def _print(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_dir():
        return str(sorted((p.name, _print(p)) for p in path.iterdir()))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"


def run(count: int, seed: int, folder: Path) -> Report:
    report, rng = Report(), random.Random(seed)
    for number in range(count):
        out = folder / "out"
        with mock.patch.object(os, "fsync", lambda handle: None):
            case = _build(out, rng, tags=1000 * (number % 8))
            _strays(out, rng, case)
        _clocks(out, rng)
        report.done += 1
        report.count("damaged folders", sum(len(names) for names in case.damaged.values()))
        report.count("in which none is good", not case.good)
        try:
            wrong = _try(out, case, rng)
        except Exception as error:
            wrong = f"{error!r}"
        report.check(wrong is None, f"case {number} ({', '.join(case.told)}): {wrong}")
        shutil.rmtree(out)
    return report


# ------------------------------------------------------------------------------------------------------------- defects


def _by(key: Callable[[Any], Any]) -> Callable[..., Any]:
    real = cp.find_entries
    return lambda out, **more: sorted(real(out, **more), key=key, reverse=True)


def _silent() -> contextlib.AbstractContextManager[Any]:
    real = cp.first_good

    def first_good(*args: Any) -> Any:
        with contextlib.redirect_stderr(io.StringIO()):
            return real(*args)

    return mock.patch.object(cp, "first_good", first_good)


def _remove(folder: Path) -> Path:
    sealed.remove_tree(folder)
    return folder


def _as_if_new() -> contextlib.AbstractContextManager[Any]:
    real = cp.first_good

    def first_good(*args: Any) -> Any:
        try:
            return real(*args)
        except cp.DamagedError as error:
            raise UserError("no checkpoint: a new run starts") from error

    return mock.patch.object(cp, "first_good", first_good)


ROW = Row(
    title="newest m of 5 damaged, stray names, exchanged names, clocks in the future",
    target=100,
    quick=4,
    prove=40,
    run=run,
    defects={
        "order by the clock": replaced(cp, "find_entries", _by(lambda entry: entry.path.stat().st_mtime)),
        "order by the name": replaced(cp, "find_entries", _by(lambda entry: entry.path.name)),
        "damaged ones left in place": replaced(sealed, "set_aside", lambda folder: folder),
        "damaged ones removed": replaced(sealed, "set_aside", _remove),
        "no word of a fallback": _silent,
        "none good taken for a new run": _as_if_new,
    },
)
