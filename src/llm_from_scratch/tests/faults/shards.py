"""Is a damaged, missing, older or exchanged shard of a checkpoint noticed, and the checkpoint before it used?"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from llm_from_scratch.checkpoint import contents as state
from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.checkpoint.shards import Joined
from llm_from_scratch.errors import DamagedError

from ..together import chunk_of, together
from .flips import reseal
from .rows import Report, Row
from .saves import contents, load, replaced, same

OLDER, NEWER = (1, 11), (2, 12)  # (step, tag)
PROCESSES = 4


def save(out: Path, step: int, tag: int) -> None:
    given = contents(step, tag)
    together(PROCESSES, lambda team: cp.save_checkpoint(out, **chunk_of(given, team), team=team))


def _shards(path: Path, kind: str = "") -> list[Path]:
    return sorted(path.glob(f"{kind}*-of-*.safetensors"))


def _bit(path: Path, older: Path, rng: random.Random) -> None:
    file = rng.choice([*_shards(path), path / cp.MANIFEST])
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _cut(path: Path, older: Path, rng: random.Random) -> None:
    file = rng.choice(_shards(path))
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice((0, len(data) - 1, rng.randrange(len(data))))])


def _gone(path: Path, older: Path, rng: random.Random) -> None:
    rng.choice(_shards(path)).unlink()


def _of_another_step(path: Path, older: Path, rng: random.Random) -> None:
    """The manifest is that of one step, some of the shards are the other's, all of them whole."""
    files = _shards(path)
    for file in rng.sample(files, rng.randint(1, len(files))):
        shutil.copyfile(older / file.name, file)


def _exchanged(path: Path, older: Path, rng: random.Random) -> None:
    first, second = rng.sample(_shards(path, rng.choice(("model", "optimizer"))), 2)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def _left_out(path: Path, older: Path, rng: random.Random) -> None:
    """A shard is missing, and the manifest does not name it."""
    rng.choice(_shards(path)[:-1]).unlink()  # the last ones may be empty
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    (path / cp.MANIFEST).write_bytes(reseal(files))


HARMS: dict[Callable[[Path, Path, random.Random], None], int] = {
    _bit: 6, _cut: 3, _gone: 2, _of_another_step: 4, _exchanged: 3, _left_out: 2,
}  # fmt: skip


def run(count: int, seed: int, folder: Path) -> Report:
    report, rng, good = Report(), random.Random(seed), folder / "good"
    for which in (OLDER, NEWER):
        save(good, *which)
    for number in range(count):
        out = folder / str(number)
        shutil.copytree(good, out)
        path, harm = out / "step-00000002", rng.choices(list(HARMS), list(HARMS.values()))[0]
        harm(path, out / "step-00000001", rng)
        label = f"case {number}, {harm.__name__.strip('_')}"
        report.done += 1
        report.count(harm.__name__.strip("_").replace("_", " "))
        wrong = _wrong(out, path)
        report.check(wrong is None, f"{label}: {wrong}")
        shutil.rmtree(out)
    report.check(same(load(good), contents(*NEWER)), "the unchanged one does not come back")
    return report


def _wrong(out: Path, path: Path) -> str | None:
    try:
        cp.load_checkpoint(path)
        return "not noticed"
    except DamagedError:
        pass
    except Exception as error:
        return f"{error!r}"
    got = load(out, set_aside=True)
    if not same(got, contents(*OLDER)):
        return f"{got.path} is loaded, and is not the older one"
    return None if not path.exists() and (out / "damaged-step-00000002").is_dir() else "not set aside"


ROW = Row(
    title="damaged, missing, older and exchanged shards",
    target=1_000,
    quick=12,
    prove=100,
    run=run,
    defects={
        "hashes of shards not compared": replaced(
            state, "read_member", lambda folder, name, manifest: (folder / name).read_bytes()
        ),
        "parts not counted": replaced(Joined, "whole", lambda joined: joined.tensors),
        "a damaged one not set aside": replaced(cp.hashed_folder, "set_aside", lambda folder: folder),
    },
)
