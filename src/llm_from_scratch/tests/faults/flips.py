"""A flipped bit, a truncated or extended file, or another checkpoint's file: is it detected, and by which check?

More than half of the mutations leave a file that is valid in its own format: only a hash detects them. Some get a new,
matching manifest: then the contents must be detected as invalid.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as write_tensors

from llm_from_scratch.checkpoint import contents as state
from llm_from_scratch.checkpoint import hashed_folder as sealed
from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.checkpoint.load import load as load_any
from llm_from_scratch.core import weights
from llm_from_scratch.errors import UserError

from .rows import Report, Row
from .saves import contents, quiet, replaced, same, save, tag_of

Files = dict[str, bytes]
OLDER, NEWER = (1, 11), (2, 12)  # (step, tag)
RESEALED = 0.05
FALLBACK, WEIGHTS_ONLY = 0.05, 0.1  # of the cases, tried by load_any, and as sampling loads


def _pick(files: Files, rng: random.Random, ending: str) -> str:
    return rng.choice(sorted(name for name, data in files.items() if name.endswith(ending) and data))


def _data_begins(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _flip(files: Files, rng: random.Random, name: str, begin: int = 0, end: int | None = None) -> None:
    data = bytearray(files[name])
    data[rng.randrange(begin, len(data) if end is None else end)] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


def _flip_anywhere(files: Files, rng: random.Random, other: Files) -> None:
    _flip(files, rng, _pick(files, rng, ""))


def _flip_in_tensors(files: Files, rng: random.Random, other: Files) -> None:
    name = _pick(files, rng, ".safetensors")
    _flip(files, rng, name, begin=_data_begins(files[name]))


def _flip_in_header(files: Files, rng: random.Random, other: Files) -> None:
    name = _pick(files, rng, ".safetensors")
    _flip(files, rng, name, end=_data_begins(files[name]))


def _other_digit(files: Files, rng: random.Random, other: Files) -> None:
    """A flipped bit that makes one digit another."""
    name = _pick(files, rng, ".json")
    places = [m.start() for m in re.finditer(rb"\d", files[name])]
    if not places:
        return
    data, at = bytearray(files[name]), rng.choice(places)
    data[at] = rng.choice([d for d in (data[at] ^ (1 << bit) for bit in range(4)) if d in b"0123456789"])
    files[name] = bytes(data)


def _other_letter(files: Files, rng: random.Random, other: Files) -> None:
    """A flipped bit that makes one letter another, in JSON or in the header of a tensor file."""
    name = _pick(files, rng, rng.choice((".json", ".safetensors")))
    end = _data_begins(files[name]) if name.endswith(".safetensors") else len(files[name])
    places = [m.start() for m in re.finditer(rb"[a-z]", files[name][:end])]
    if not places:
        return
    data, at = bytearray(files[name]), rng.choice(places)
    data[at] = rng.choice([c for c in (data[at] ^ (1 << bit) for bit in range(6)) if chr(c).isalpha()])
    files[name] = bytes(data)


def _cut(files: Files, rng: random.Random, other: Files) -> None:
    name = _pick(files, rng, "")
    files[name] = files[name][: rng.choice((rng.randrange(len(files[name])), len(files[name]) - 1, 0))]


def _longer(files: Files, rng: random.Random, other: Files) -> None:
    files[_pick(files, rng, "")] += rng.choice((b"\0", b"\n", b" ", rng.randbytes(rng.randint(1, 600))))


def _space_after(files: Files, rng: random.Random, other: Files) -> None:
    """JSON stays what it is."""
    files[_pick(files, rng, ".json")] += rng.choice((b"\n", b" ", b"\t"))


def _written_otherwise(files: Files, rng: random.Random, other: Files) -> None:
    """The same JSON, in other bytes."""
    name = _pick(files, rng, ".json")
    files[name] = json.dumps(json.loads(files[name]), indent=rng.choice((None, 0, 2)), sort_keys=True).encode()


def _zeroed(files: Files, rng: random.Random, other: Files) -> None:
    name = _pick(files, rng, ".safetensors")
    begin = rng.randrange(_data_begins(files[name]), len(files[name]))
    end = min(len(files[name]), begin + rng.randint(1, 512))
    files[name] = files[name][:begin] + bytes(end - begin) + files[name][end:]


def _of_another(files: Files, rng: random.Random, other: Files) -> None:
    """A file of the older checkpoint: whole, and of the same size."""
    name = _pick(files, rng, "")
    files[name] = other[name]


def _gone(files: Files, rng: random.Random, other: Files) -> None:
    del files[_pick(files, rng, "")]


def _tensors_changed(files: Files, rng: random.Random, other: Files) -> None:
    """A tensor file that is well formed, and holds other tensors."""
    name = rng.choice(("model.safetensors", "optimizer.safetensors"))
    tensors = parse_tensors(files[name])
    keys = sorted(key for key in tensors if tensors[key].dim())
    key = rng.choice(keys)
    how = rng.randrange(5)
    if how == 0:
        tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice((float("nan"), float("inf")))
    elif how == 1:
        tensors[key] = torch.cat([tensors[key], tensors[key][:1]])
    elif how == 2 and name == "model.safetensors":
        del tensors[key]
    elif how == 3:
        tensors[key + "x" if name == "model.safetensors" else "x/" + key] = torch.zeros(3)
    else:
        tensors[key] = tensors[key].to(torch.int32) if name == "model.safetensors" else tensors[key][:, None]
    files[name] = write_tensors(tensors)


MUTATIONS: dict[Callable[[Files, random.Random, Files], None], int] = {
    _flip_anywhere: 25, _flip_in_tensors: 25, _flip_in_header: 5, _other_digit: 10, _other_letter: 10, _cut: 10,
    _longer: 3, _space_after: 2, _written_otherwise: 2, _zeroed: 3, _of_another: 2, _gone: 1, _tensors_changed: 2,
}  # fmt: skip


def run(count: int, seed: int, folder: Path) -> Report:
    report, rng = Report(), random.Random(seed)
    out = folder / "out"
    older, newer = (_files(save(out, *which)) for which in (OLDER, NEWER))
    path = out / "step-00000002"
    for number in range(count):
        files = dict(newer)
        sealed_anew = rng.random() < RESEALED
        mutation = _tensors_changed if sealed_anew else rng.choices(list(MUTATIONS), list(MUTATIONS.values()))[0]
        while files == newer:
            mutation(files, rng, older)
        changed = next(name for name in newer if files.get(name) != newer[name])
        if sealed_anew:
            files[cp.MANIFEST] = reseal(files)
        label = f"case {number}, {mutation.__name__.strip('_')} of {changed}{', sealed anew' * sealed_anew}"
        _write(path, files, newer)
        report.done += 1
        report.count("flips of a single bit", "flip" in mutation.__name__ or "_other_" in mutation.__name__)
        report.count("truncations", mutation is _cut)
        report.count("whose container stays valid", changed in files and _is_valid(changed, files[changed]))
        report.count("sealed anew", sealed_anew)
        falls_back = rng.random() < FALLBACK and files.get(cp.MANIFEST) != older[cp.MANIFEST]  # else it is as old
        report.count("falling back", falls_back)
        wrong = _wrong(out, path, changed, falls_back, rng)
        report.check(wrong is None, f"{label}: {wrong}")
        _write(path, newer, files)
    report.check(same(cp.load_checkpoint(path), contents(*NEWER)), "the unchanged one does not come back")
    shutil.rmtree(out)
    return report


def _files(path: Path) -> Files:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def _write(path: Path, files: Files, there: Files) -> None:
    for name in files.keys() | there.keys():
        if name not in files:
            os.unlink(path / name)
        elif files[name] != there.get(name):
            (path / name).write_bytes(files[name])


def reseal(files: Files) -> bytes:
    """A manifest for the present files, as a liar writes it."""
    body = json.loads(files[cp.MANIFEST])
    body.pop("sha256")
    body["files"] = {
        name: {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in body["files"]
        if name in files
    }
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _is_valid(name: str, data: bytes) -> bool:
    """Whether a file is one of its format."""
    try:
        if name.endswith(".safetensors"):
            parse_tensors(data)
        else:
            json.loads(data)
    except Exception:
        return False
    return True


def _wrong(out: Path, path: Path, changed: str, falls_back: bool, rng: random.Random) -> str | None:
    try:
        got = cp.load_checkpoint(path)
    except UserError:
        pass
    except Exception as error:
        return f"{error!r}"
    else:
        return "wrong tensors are returned" if not same(got, contents(*NEWER)) else "not noticed"
    if rng.random() < WEIGHTS_ONLY:
        try:
            some = cp.load_checkpoint(path, weights_only=True)
        except UserError:
            pass
        else:
            wanted = contents(*NEWER)["model"]
            if not all(torch.equal(some.model[name], wanted[name]) for name in wanted):
                return "wrong weights are returned for sampling"
            if changed == "model.safetensors":
                return "not noticed for sampling"
    if falls_back:
        with quiet() as said:
            try:
                got, found = load_any(out), cp.find_checkpoint(out)
            except UserError as error:
                return f"no fall back to the older one: {error}"
        lines = said.getvalue().splitlines()
        if tag_of(got) != OLDER[1] or not same(got, contents(*OLDER)) or found.name != "step-00000001":
            return f"load_any returns {got.path}, find_checkpoint {found}"
        if len(lines) != 2 or any(path.name not in line or "warning" not in line for line in lines):
            return f"two falls back said {lines}"
        if cp.prune(out / "step-00000001", keep_last=1) or tag_of(load_any(out / "step-00000001")) != OLDER[1]:
            return "the one just read back is pruned, though the newest is damaged"
    return None


# ------------------------------------------------------------------------------------------------------------- defects


def _unsealed_manifest(folder: Path) -> dict[str, Any]:
    body = sealed.from_json((folder / cp.MANIFEST).read_bytes(), folder)
    body.pop("sha256", None)
    return body


ROW = Row(
    title="flipped bits, truncations, other files in a checkpoint",
    target=10_000,
    quick=50,
    prove=600,
    run=run,
    defects={
        "hashes of files not compared": replaced(
            state, "read_member", lambda folder, name, manifest: (folder / name).read_bytes()
        ),
        "the manifest's own hash not compared": replaced(sealed, "read_manifest", _unsealed_manifest),
        "finite numbers not asked for": replaced(weights, "not_finite", lambda *tensors: None),
        "a damaged one taken at its word": replaced(
            cp, "verify_checkpoint", lambda path: sealed.read_manifest(path) and path
        ),
    },
)
