"""A power cut at a random moment: unsynced data is there, missing, or partial. Which checkpoint loads?

The file operations of runs are recorded. Then a disk after a cut at any of them is drawn: of what no fsync has made
durable, each new name, rename and removal has happened or not, in any order, and each file has its old content, the new
one, a part of it, or zeros. A rename is durable once the folders that it touches are synced; so is a name: syncing a
file does not sync its name.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm_from_scratch.checkpoint import hashed_folder as sealed
from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.files import write_file

from .disk import CHANGES, Operation, watched
from .rows import Report, Row
from .saves import contents, load, quiet, replaced, same, save, tag_of

IMAGES_PER_RUN = 40


class File:
    def __init__(self, content: bytes = b""):
        self.durable, self.now = content, content


class Folder:
    def __init__(self) -> None:
        self.durable: dict[str, File | Folder] = {}
        self.now: dict[str, File | Folder] = {}


@dataclass
class Change:
    """Of names: one is gone, one is there, or both at once. Undecided until the folders in `unsynced` are synced."""

    node: File | Folder
    gone: tuple[Folder, str] | None = None
    there: tuple[Folder, str] | None = None
    unsynced: list[Folder] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unsynced = list({id(place[0]): place[0] for place in (self.gone, self.there) if place}.values())

    def apply(self, names: Callable[[Folder], dict[str, Any]]) -> None:
        if self.there is not None:
            folder, name = self.there
            if isinstance(names(folder).get(name), Folder) and names(folder)[name] is not self.node:
                return  # no system puts a folder over another one
        if self.gone is not None and names(self.gone[0]).get(self.gone[1]) is self.node:
            del names(self.gone[0])[self.gone[1]]
        if self.there is not None:
            names(self.there[0])[self.there[1]] = self.node


class Disk:
    """What the system shows, and what has become durable of it."""

    def __init__(self, root: Path):
        self.root, self.top = os.path.realpath(root), Folder()
        self.pending: list[Change] = []
        for folder, _, files in os.walk(root):
            node = self.top if os.path.samefile(folder, root) else Folder()
            if node is not self.top:
                parent, name = self._place(os.path.realpath(folder))
                parent.now[name] = parent.durable[name] = node
            for name in files:
                node.now[name] = node.durable[name] = File(Path(folder, name).read_bytes())

    def _place(self, path: str) -> tuple[Folder, str]:
        *parents, name = os.path.relpath(path, self.root).split(os.sep)
        node: Any = self.top
        for parent in parents:
            node = node.now[parent]
        return node, name

    def take(self, operation: Operation) -> None:
        """Does what the system did."""
        if operation.path == self.root:
            self._sync(self.top)
            return
        folder, name = self._place(operation.path)
        node = folder.now.get(name)
        if operation.kind == "create" and isinstance(node, File):
            node.now = b""
        elif operation.kind in ("create", "mkdir"):
            self._change(Change(File() if operation.kind == "create" else Folder(), there=(folder, name)))
        elif operation.kind == "write":
            assert isinstance(node, File)
            before, after = node.now[: operation.offset], node.now[operation.offset + len(operation.data) :]
            node.now = before.ljust(operation.offset, b"\0") + operation.data + after
        elif operation.kind == "fsync":
            self._sync(node)
        elif operation.kind in ("unlink", "rmdir", "rename"):
            assert node is not None
            there = self._place(operation.target) if operation.kind == "rename" else None
            self._change(Change(node, gone=(folder, name), there=there))

    def _change(self, change: Change) -> None:
        change.apply(lambda folder: folder.now)
        self.pending.append(change)

    def _sync(self, node: File | Folder | None) -> None:
        if isinstance(node, File):
            node.durable = node.now
            return
        for change in self.pending:
            change.unsynced = [folder for folder in change.unsynced if folder is not node]
            if not change.unsynced:
                change.apply(lambda folder: folder.durable)
        self.pending = [change for change in self.pending if change.unsynced]

    def draw(self, rng: random.Random, target: Path) -> None:
        """Writes a disk as the power cut may have left it."""
        chance = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        drawn: dict[int, dict[str, Any]] = {}

        def names(folder: Folder) -> dict[str, Any]:
            return drawn.setdefault(id(folder), dict(folder.durable))

        if rng.random() < 0.3:  # a journal: all up to a moment
            happened = self.pending[: rng.randrange(len(self.pending) + 1)]
        else:
            happened = [change for change in self.pending if rng.random() < chance]
        for change in happened:
            change.apply(names)

        def write(folder: Folder, path: Path) -> None:
            path.mkdir()
            for name, node in names(folder).items():
                if isinstance(node, Folder):
                    write(node, path / name)
                else:
                    (path / name).write_bytes(_content(node, rng))

        write(self.top, target)


def _content(node: File, rng: random.Random) -> bytes:
    if node.now == node.durable:
        return node.now
    size = len(node.now)
    page = max(1, size // 4)
    pages = [node.now[i : i + page] for i in range(0, size, page)]
    return rng.choice(
        (
            node.durable,
            node.now,
            node.now[: rng.randrange(size + 1)],
            bytes(size),
            b"".join(bytes(len(piece)) if rng.random() < 0.5 else piece for piece in pages),
        )
    )


# ------------------------------------------------------------------------------------------------------------ the runs


class Save(NamedTuple):
    """A save that has begun."""

    step: int
    tag: int
    val_loss: float | None


@dataclass
class Known:
    """What somebody watching the run knows at some moment."""

    acknowledged: Save | None = None
    """The last one of which save_checkpoint returned."""
    begun: list[Save] = field(default_factory=list)
    """Those begun since, the acknowledged one first."""
    best: float | None = None
    archived: list[Save] = field(default_factory=list)
    """An earlier run's, that are in out or in a folder previous-..."""
    exported: list[int] = field(default_factory=list)
    """Tags that ckpt.pt may hold."""
    must_export: bool = False

    def copy(self) -> Known:
        return Known(self.acknowledged, list(self.begun), self.best, list(self.archived), list(self.exported),
                     self.must_export)  # fmt: skip


class Run:
    """A random run in `out`, its operations recorded with what was known at each."""

    def __init__(self, root: Path, rng: random.Random, tags: Iterator[int], known: Known):
        self.out, self.rng, self.tags, self.known = root / "runs" / "a", rng, tags, known
        self.record: list[tuple[Operation | None, Known]] = []
        self.step = known.acknowledged.step if known.acknowledged else 0

    def hook(self, operation: Operation, do: Callable[[], Any]) -> Any:
        result = do()
        if operation.kind in CHANGES:
            self.record.append((operation, self.known.copy()))
        return result

    def go(self) -> None:
        """A start, as the trainer's, then a few saves; now and then a fresh start over an earlier run."""
        rng = self.rng
        if rng.random() < 0.7:  # by the run's lock, or its log
            self.out.mkdir(parents=True, exist_ok=True)
        fresh = self.known.acknowledged is not None and rng.random() < 0.2
        if fresh:
            left = [Save(path_step, _tag(path), _loss(path)) for path_step, path in cp.list_checkpoints(self.out)]
            self.known = Known(archived=left, exported=self.known.exported)
            cp.archive_previous(self.out)
            self.step = 0
        elif self.known.acknowledged is not None:
            load(self.out, set_aside=True)
        cp.clean_leftovers(self.out)
        for _ in range(rng.randint(2, 4)):
            self._save(keep_last=rng.choice((None, 1, 1, 2)), anew=rng.random() < 0.3 and self.step > 0)
            if rng.random() < 0.25:
                self._export()
        self.record.append((None, self.known.copy()))

    def _save(self, keep_last: int | None, anew: bool) -> None:
        known, last = self.known, self.known.acknowledged
        if anew and last is not None:
            new = Save(self.step, next(self.tags), last.val_loss)
        else:
            self.step += self.rng.randint(1, 3)
            new = Save(self.step, next(self.tags), self.rng.choice((None, 1.0, 2.0, 3.0)))
        known.begun.append(new)
        save(self.out, *new, keep_last=keep_last)
        known.acknowledged, known.begun = new, [new]
        if new.val_loss is not None:
            known.best = min(new.val_loss, known.best or new.val_loss)
        self.record.append((None, known.copy()))

    def _export(self) -> None:
        known = self.known
        tag = next(self.tags)
        known.exported.append(tag)
        write_file(self.out / "ckpt.pt", lambda file: torch.save({"tag": tag, "x": torch.ones(9)}, file))
        known.exported, known.must_export = [tag], True
        self.record.append((None, known.copy()))


def _tag(path: Path) -> int:
    return tag_of(cp.load_checkpoint(path))


def _loss(path: Path) -> float | None:
    return cp.load_checkpoint(path).manifest["val_loss"]


def _wrong(root: Path, known: Known, rng: random.Random) -> str | None:
    """What is wrong with what comes back from a disk after the cut. This is the next start."""
    out = root / "runs" / "a"
    for path in root.rglob("step-*"):
        with quiet():
            try:
                cp.verify_checkpoint(path)
            except UserError as error:
                return f"of {path.name} half is there: {error}"
    if rng.random() < 0.5:
        cp.clean_leftovers(out)
    places = [out, *out.glob("previous-*")]
    for old in known.archived:
        if not any(_holds(place, old) for place in places):
            return f"step {old.step} of the earlier run is in neither place"
    if known.acknowledged is None:
        expected = known.begun + known.archived
    else:
        expected = known.begun
    try:
        got = load(out, set_aside=True)
    except UserError as error:
        # the second: only the export is there, which stands in for a file of nanoGPT
        nothing = "no checkpoint" in str(error) or "ckpt.pt is not a nanoGPT checkpoint" in str(error)
        if known.acknowledged is not None or not nothing:
            return f"nothing comes back: {error}"
    else:
        match = [new for new in expected if new.tag == tag_of(got)]
        if not match:
            return f"tag {tag_of(got)} comes back, not one of {expected}"
        if not same(got, contents(*match[0])):
            return f"{match[0]} comes back changed"
    if known.best is not None and load(out, "best").manifest["val_loss"] > known.best:
        return "the best is lost"
    if known.must_export or (out / "ckpt.pt").exists():
        try:
            tag = torch.load(out / "ckpt.pt", weights_only=True)["tag"]
        except Exception as error:
            return f"ckpt.pt: {error!r}"
        if tag not in known.exported:
            return f"ckpt.pt is of tag {tag}, not one of {known.exported}"
    cp.clean_leftovers(out)
    left = [p.name for p in out.iterdir() if p.name.startswith(".") or p.name.endswith(".old")] if out.exists() else []
    return f"there is still {left}" if left else None


def _holds(place: Path, old: Save) -> bool:
    return any(step == old.step and _tag(path) == old.tag for step, path in cp.list_checkpoints(place))


def run(count: int, seed: int, folder: Path) -> Report:
    report, rng = Report(), random.Random(seed)
    tags = iter(range(1, 1 << 30))
    before, known = folder / "disk", Known()
    before.mkdir()
    while report.done < count:
        disk = Disk(before)
        one = Run(before, rng, tags, known)
        with watched(before, one.hook):
            one.go()
        report.count("runs")
        report.count("changes of the disk", len(one.record))
        moments = sorted(rng.randrange(len(one.record)) for _ in range(min(IMAGES_PER_RUN, count - report.done)))
        done, keep = 0, rng.choice(moments)
        following, known = folder / "following", Known()
        for number, moment in enumerate(moments):
            for operation, _ in one.record[done:moment]:
                if operation is not None:
                    disk.take(operation)
            done, known_then, image = moment, one.record[moment][1], folder / "image"
            disk.draw(rng, image)
            report.count("images with undecided names", bool(disk.pending))
            try:
                wrong = _wrong(image, known_then, rng)
            except Exception as error:
                wrong = f"{error!r}"
            report.done += 1
            if wrong is not None:
                at = one.record[moment][0]
                what = f"{at.kind} of {os.path.relpath(at.path, before)}" if at else "a return"
                report.check(False, f"run {report.counts['runs']}, image {number}, cut before {what}: {wrong}")
            elif moment == keep and known_then.acknowledged and not known_then.archived and not following.exists():
                report.count("runs from such an image")
                image.rename(following)
                came = tag_of(load(following / "runs" / "a"))
                known = known_then.copy()
                known.begun = [new for new in known.begun if new.tag == came]
                known.acknowledged = known.begun[0]
                continue
            shutil.rmtree(image)
        shutil.rmtree(before)
        if following.exists():
            following.rename(before)
        else:
            before.mkdir()
    return report


# ------------------------------------------------------------------------------------------------------------- defects


def _write_unsynced(path: Path, pieces: Iterable[Any]) -> dict[str, Any]:
    data = b"".join(pieces)
    path.write_bytes(data)
    return {"size": len(data), "sha256": sealed.sha256_of(data)}


def _sync_only(wanted: Callable[[Path], bool]) -> Callable[[Path], None]:
    real = sealed.sync_folder
    return lambda path: real(path) if wanted(path) else None


def _remove_at_once(folder: Path) -> bool:
    if folder.exists():
        shutil.rmtree(folder)
    return True


ROW = Row(
    title="power cuts: un-fsynced writes dropped, truncated, zeroed, names reordered",
    target=3000,
    quick=20,
    prove=200,
    run=run,
    defects={
        "files not synced": replaced(sealed, "write_synced", _write_unsynced),
        "the new folder not synced": replaced(
            sealed, "sync_folder", _sync_only(lambda path: not path.name.startswith(".tmp-"))
        ),
        "the parent not synced": replaced(
            sealed, "sync_folder", _sync_only(lambda path: path.name.startswith(".tmp-"))
        ),
        "the run's own folder not synced": replaced(
            sealed, "make_folder", lambda path: path.mkdir(parents=True, exist_ok=True)
        ),
        "a removal not made durable first": replaced(sealed, "remove_folder", _remove_at_once),
    },
)
