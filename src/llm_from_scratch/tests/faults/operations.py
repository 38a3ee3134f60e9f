"""A file operation of a save or a clean-up fails, or the process dies at it: each operation in turn."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import select
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llm_from_scratch.checkpoint import hashed_folder as sealed
from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine import files

from .disk import Operation, watched
from .rows import Report, Row
from .saves import contents, load, replaced, same, save, tag_of

DIED, DONE, REFUSED, CRASHED = 9, 0, 3, 4
TAKES_SPACE = ("create", "write", "fsync", "close", "mkdir", "rename")
EVERY = (*TAKES_SPACE, "open", "read", "list", "stat", "unlink", "rmdir")
HOWS = {
    "dies": (*EVERY, "release"), "disk full": TAKES_SPACE, "I/O error": EVERY,
    "short write": ("write",), "lost write": ("write",),
}  # fmt: skip
BYTES = re.compile(r"it needs [\d,]+ bytes, [\d,]+ bytes are free there")


class Fault:
    """A hook for watched(): the at-th operation fails in the way `how`."""

    def __init__(self, at: int = 0, how: str = ""):
        self.at, self.how, self.seen = at, how, list[Operation]()

    def __call__(self, operation: Operation, do: Callable[..., Any]) -> Any:
        self.seen.append(operation)
        number, kind, data = len(self.seen), operation.kind, operation.data
        full = self.how == "disk full" or (self.how == "short write" and number > self.at)
        if full and number >= self.at and kind in TAKES_SPACE:  # and it stays so
            raise self._failed(kind, do, errno.ENOSPC)
        if number != self.at or self.how == "disk full":
            return do()
        if self.how == "dies":
            if kind == "write":
                do(data[: len(data) // 2])
            os._exit(DIED)
        if self.how == "I/O error":
            raise self._failed(kind, do, errno.EIO)
        written = do(data[: (len(data) + 1) // 2])
        return written if self.how == "short write" else len(data)

    @staticmethod
    def _failed(kind: str, do: Callable[..., Any], code: int) -> OSError:
        if kind == "close":  # the handle is gone all the same
            do()
        return OSError(code, os.strerror(code))


@dataclass(frozen=True)
class Scene:
    """What there was, what is done, and what must hold after it; all get the folder and a number that tags contents."""

    before: Callable[[Path, int], Any]
    act: Callable[[Path, int], Any]
    after: Callable[[Path, int, bool], str | None]
    """after(folder, tag, whether act succeeded): what is wrong, if anything is. The next start, and what follows."""
    saves: bool = True
    """Whether a failure is a SaveError that names bytes."""
    checked: bool = True
    """Whether what is written is read back, so that a disk that loses some is found out."""


def _nothing(out: Path, tag: int) -> None:
    pass


def _one(out: Path, tag: int) -> None:
    save(out, 1, tag)


def _two(out: Path, tag: int) -> None:
    save(out, 1, tag, val_loss=1.5)
    save(out, 2, tag + 1, val_loss=2.5)


def _put(place: Path, step: int, tag: int) -> Path:
    """A checkpoint under any name, next to others of its step."""
    path = save(place.parent / "other", step, tag).rename(place)
    (place.parent / "other").rmdir()
    return path


def _cut_replacement(out: Path, tag: int) -> None:
    _put(out / "step-00000001.old", 1, tag)
    _harm(_put(out / "step-00000001", 1, tag + 4))
    (out / ".tmp-step-00000001").mkdir()
    (out / ".tmp-step-00000001" / "model.safetensors").write_bytes(b"half")


def _five(out: Path, tag: int) -> None:
    for step in range(1, 6):
        save(out, step, tag + step, val_loss=1.0 + abs(step - 2))


def _leftovers(out: Path, tag: int) -> None:
    _put(out / "step-00000003.old", 3, tag + 9)
    _put(out / "step-00000003", 3, tag + 3)
    _put(out / "step-00000002.old", 2, tag + 2)
    for name in (".tmp-step-00000004", ".tmp-remove-step-00000001"):
        (out / name).mkdir()
        (out / name / "model.safetensors").write_bytes(b"half")
    (out / ".tmp-ckpt.pt").write_bytes(b"half")


def _earlier_run(out: Path, tag: int) -> None:
    for step in (1, 2, 3):
        save(out, step, tag + step)
    (out / "metrics.jsonl").write_text("{}")
    _harm(out / "step-00000003")


def _damaged(out: Path, tag: int) -> None:
    _earlier_run(out, tag)
    _harm(out / "step-00000002")


def _harm(folder: Path) -> None:
    (folder / "trainer.json").write_bytes(b"{}")


def _start(out: Path, which: str | int = "last") -> cp.Checkpoint:
    try:
        return load(out, which, set_aside=True)
    finally:
        cp.clean_leftovers(out)


def _after_save(step: int, old: int | None) -> Callable[[Path, int, bool], str | None]:
    """The old checkpoint (its tag's offset) or the new one comes back, and the next save succeeds."""

    def after(out: Path, tag: int, done: bool) -> str | None:
        try:
            got = _start(out)
        except UserError as error:
            if old is not None or done:
                return f"nothing comes back: {error}"
        else:
            allowed = {tag + 5: step} | ({} if done or old is None else {tag + old: max(1, step - 1)})
            if tag_of(got) not in allowed:
                return f"tag {tag_of(got)} comes back, expected one of {sorted(allowed)}"
            losses = {tag + 1: 2.5} if step == 3 else {}
            if not same(got, contents(allowed[tag_of(got)], tag_of(got), losses.get(tag_of(got)))):
                return "other contents come back"
        if step == 3 and tag_of(load(out, "best")) != tag:
            return "the best is gone"
        save(out, 9, tag + 6, val_loss=0.5, keep_last=1)
        if not same(load(out), contents(9, tag + 6, 0.5)):
            return "the next save is not what comes back"
        left = [name for name in os.listdir(out) if not name.startswith("damaged-step-")]
        return None if left == ["step-00000009"] else f"after the next save there is {sorted(left)}"

    return after


def _after_prune(out: Path, tag: int, done: bool) -> str | None:
    for step, path in cp.list_checkpoints(out):
        if not same(cp.load_checkpoint(path), contents(step, tag + step, 1.0 + abs(step - 2))):
            return f"{path.name} is not whole"
    got = [tag_of(_start(out, which)) - tag for which in ("last", "best")]
    if got != [5, 2]:
        return f"last and best are {got}"
    cp.prune(out / "step-00000005", keep_last=2)
    left = sorted(os.listdir(out))
    return None if left == ["step-00000002", "step-00000004", "step-00000005"] else f"there is {left}"


def _after_cleaning(out: Path, tag: int, done: bool) -> str | None:
    for step in (3, 2):
        if not same(_start(out, step), contents(step, tag + step)):
            return f"step {step} is another"
    left = sorted(os.listdir(out))
    return None if left == ["step-00000002", "step-00000003"] else f"there is {left}"


def _after_moving(out: Path, tag: int, done: bool) -> str | None:
    cp.archive_previous(out)
    left = sorted(os.listdir(out))
    if left != ["previous-run-a"]:
        return f"there is {left}"
    left = sorted(os.listdir(out / "previous-run-a"))
    if left != ["metrics.jsonl", "step-00000001", "step-00000002", "step-00000003"]:
        return f"there is {left}"
    return None if same(load(out / "previous-run-a"), contents(2, tag + 2)) else "step 2 is another"


def _after_falling_back(out: Path, tag: int, done: bool) -> str | None:
    if not same(_start(out), contents(1, tag + 1)):
        return "step 1 is another"
    left = [name for name in os.listdir(out) if "step-" in name]
    return None if len(left) == 3 else f"a damaged one is gone, there is {sorted(left)}"


def _write_pt(out: Path, tag: int) -> None:
    """A ckpt.pt as write_nanogpt writes it, without its import of all of torch.optim."""
    files.write_file(out / "ckpt.pt", lambda file: torch.save(contents(1, tag)["model"], file))


def _after_pt(out: Path, tag: int, done: bool) -> str | None:
    allowed = [tag + 5] if done else [tag, tag + 5]
    got = torch.load(out / "ckpt.pt", weights_only=True)
    if not any(all(torch.equal(got[name], value) for name, value in contents(1, t)["model"].items()) for t in allowed):
        return "other weights come back"
    _write_pt(out, tag + 6)
    cp.clean_leftovers(out)
    return None if os.listdir(out) == ["ckpt.pt"] else f"there is {os.listdir(out)}"


def _saving(step: int, **more: Any) -> Callable[[Path, int], Any]:
    return lambda out, tag: save(out, step, tag + 5, **more)


SCENES: dict[str, Scene] = {
    "the first save": Scene(_nothing, _saving(1), _after_save(1, None)),
    "a save that prunes": Scene(_two, _saving(3, keep_last=1), _after_save(3, 1)),
    "a replacement": Scene(_one, _saving(1, keep_last=1), _after_save(1, 0)),
    "a replacement after a cut one": Scene(_cut_replacement, _saving(1), _after_save(1, 0)),
    "a prune": Scene(_five, lambda out, tag: cp.prune(out / "step-00000005", keep_last=2), _after_prune, saves=False),
    "a cleaning": Scene(_leftovers, lambda out, tag: cp.clean_leftovers(out), _after_cleaning, saves=False),
    "a move of an earlier run": Scene(
        _earlier_run, lambda out, tag: cp.archive_previous(out), _after_moving, saves=False
    ),
    "a fallback": Scene(_damaged, lambda out, tag: load(out, set_aside=True), _after_falling_back, saves=False),
    "a ckpt.pt": Scene(_write_pt, lambda out, tag: _write_pt(out, tag + 5), _after_pt, checked=False),
}


def run(count: int, seed: int, folder: Path) -> Report:
    report, rng = Report(), random.Random(seed)
    for number in itertools.count(seed * 1000):  # once all operations have failed: again, with other contents
        cases = list(_cases(folder, number * 10, report))
        if count < ROW.target:
            rng.shuffle(cases)
            scenes = ([case for case in cases if case[0] == name] for name in SCENES)
            in_turn = [case for row in itertools.zip_longest(*scenes) for case in row if case]  # of every scene some
            cases = in_turn[: count - report.done]
        for scene, how, at, operation in cases:
            _try(scene, how, at, number * 10, folder, report, f"{scene}: {how} at {operation}")
        shutil.rmtree(folder / f"base{number * 10}")
        if report.done >= count:
            return report
    raise AssertionError


def _cases(folder: Path, tag: int, report: Report) -> Iterator[tuple[str, str, int, str]]:
    """(scene, way to fail, number of the operation, its name) for all that there are. Makes what they begin from."""
    for name, scene in SCENES.items():
        base = folder / f"base{tag}" / name
        (base / "out").mkdir(parents=True)
        with mock.patch.object(os, "fsync", lambda handle: None):
            scene.before(base / "out", tag)
        trial = Path(shutil.copytree(base, folder / "trial", symlinks=True))
        with watched(folder, fault := Fault()):
            scene.act(trial / "out", tag)
        shutil.rmtree(trial)
        report.counts["file operations"] = report.counts.get("file operations", 0) + len(fault.seen)
        for at, operation in enumerate(fault.seen, 1):
            sealed_file = os.path.basename(operation.path) in (*cp.OWN_FILES, cp.MANIFEST)
            for how, kinds in HOWS.items():
                if operation.kind in kinds and (how != "lost write" or (scene.checked and sealed_file)):
                    place = os.path.relpath(operation.path, trial)
                    yield name, how, at, f"operation {at} of {len(fault.seen)}, {operation.kind} {place}"


def _try(scene_name: str, how: str, at: int, tag: int, folder: Path, report: Report, label: str) -> None:
    scene = SCENES[scene_name]
    trial = Path(shutil.copytree(folder / f"base{tag}" / scene_name, folder / "trial", symlinks=True))
    out = trial / "out"
    said = ""

    def act() -> int:
        nonlocal said
        with watched(folder, Fault(at, how)):
            try:
                scene.act(out, tag)
                return DONE
            except cp.SaveError as error:
                said = str(error)
                read_back = "returned different bytes" in said or "cannot read back" in said
                return REFUSED if scene.saves and (read_back or BYTES.search(said)) else CRASHED
            except UserError as error:
                said = str(error)
                return CRASHED if scene.saves else REFUSED
            except Exception as error:
                said = repr(error)
                return CRASHED

    outcome = in_child(act) if how == "dies" else act()
    report.done += 1
    report.count(how)
    try:
        with mock.patch.object(os, "fsync", lambda handle: None):
            wrong = scene.after(out, tag, outcome == DONE)
    except Exception as error:
        wrong = f"afterwards {error!r}"
    if outcome not in ((DIED,) if how == "dies" else (DONE, REFUSED)):
        wrong = f"ended with {outcome} {said}; {wrong or ''}"
    report.check(wrong is None, f"{label}: {wrong}")
    shutil.rmtree(trial)


def in_child(act: Callable[[], int], deadline: float = 60.0) -> int:
    """The exit code of a forked child that does it; -1 if it had to be killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    end, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = CRASHED
        try:
            os.close(end)
            code = act()
        finally:
            os._exit(code)
    os.close(held)  # the child's death closes the other one
    ended, _, _ = select.select([end], [], [], deadline)
    os.close(end)
    if not ended:
        os.kill(pid, 9)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status) if ended else -1


# ------------------------------------------------------------------------------------------------------------- defects


def _write_in_place(final: Path, parts: Any, fields: Any, write_more: Any = None, team: Any = None) -> None:
    try:
        sealed.remove_tree(final)
        sealed.make_folder(final)
        files = {name: sealed.write_synced(final / name, make()) for name, make in parts.items()}
        if write_more is not None:
            write_more(final)
            for path in sorted(path for path in final.iterdir() if path.name not in files):
                files[path.name] = sealed.write_synced(path, [path.read_bytes()])
        sealed.write_synced(final / cp.MANIFEST, [sealed.with_own_hash({**fields, "files": files})])
    except OSError as error:
        raise cp.SaveError(f"{error}; it needs 1 bytes, 1 bytes are free there") from error


def _write_file_in_place(path: Path, write: Callable[[Any], None]) -> None:
    try:
        with open(path, "wb") as file:
            write(file)
    except OSError as error:
        raise cp.SaveError(f"{error}; it needs 1 bytes, 1 bytes are free there") from error


def _prune_first() -> Any:
    real = cp.save_checkpoint

    def save_checkpoint(out: Path, keep_last: int | None = None, **more: Any) -> Path:
        if keep_last is not None:
            for _, path in cp.list_checkpoints(out):
                sealed.remove_folder(path)
        return real(out, keep_last=keep_last, **more)

    return mock.patch.object(cp, "save_checkpoint", save_checkpoint)


ROW = Row(
    title="death, full disk, I/O error, short write at every file operation of a save and a clean-up",
    target=2300,
    quick=8,
    prove=250,
    run=run,
    defects={
        "a folder written in its place": replaced(sealed, "write_folder", _write_in_place),
        "a file written in its place": replaced(files, "write_file", _write_file_in_place),
        "older ones removed before the save": _prune_first,
        "the replaced one removed first": replaced(sealed, "_make_way", lambda final, old: sealed.remove_folder(final)),
        "what was written not read back": replaced(sealed, "verify", lambda final, *files: sealed.read_manifest(final)),
        "bytes needed and free not said": replaced(sealed, "space_for", lambda folder, needed: ""),
    },
)
