"""The folder of a dataset that is given by name, as a folder, or as an address in an object store."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..errors import UserError
from ..mixture import read_mixture
from .remote import SOURCE, is_url, local_folder


def resolve_dataset(name: str | Path, root: str | Path = ".") -> Path:
    """The folder of a dataset, given as a folder, as a NAME in data/ or data/processed/ below root, or as an address in
    an object store. Raises UserError if there is none (with the command that makes it) or if both places have one."""
    if not str(name):
        raise UserError("the dataset's name is empty; expected a name or a folder with train.bin and val.bin")
    if read_mixture(str(name)):
        raise UserError(f"{str(name)!r} is a mixture, but this command needs one dataset: name one of its parts")
    if is_url(str(name)):
        return local_folder(str(name), root)
    places = [Path(root) / "data" / name, Path(root) / "data" / "processed" / name]
    found = [place for place in places if _has_tokens(place)] if not Path(name).is_absolute() else []
    if len(found) == 2:
        raise UserError(f"dataset {str(name)!r} is ambiguous: {found[0]} and {found[1]}; use one of the two folders")
    if found:
        return found[0]
    if _has_tokens(Path(name)):
        return Path(name)
    script = places[0] / "prepare.py"
    prepare = ["llm-prepare", "FILE", f"--out_dir={places[1].as_posix()}"]
    make = shlex.join(["python", script.as_posix()] if script.exists() else prepare)
    where = str(name) if Path(name).is_dir() else f"{places[0].as_posix()} or {places[1].as_posix()}"
    there = sorted({p.parent.name for d in ("data", "data/processed") for p in Path(root, d).glob("*/train*.bin")})
    others = f" (prepared: {', '.join(there[:8])})" if there else ""
    raise UserError(
        f"dataset {str(name)!r} not found: no train.bin or val.bin in {where}; make it with: {make}{others}"
    )


def _has_tokens(folder: Path) -> bool:
    names = [f"{split}{tail}.bin" for split in ("train", "val") for tail in ("", "_000000")]
    return any((folder / name).is_file() for name in (*names, SOURCE)) or any(folder.glob("*.ds"))
