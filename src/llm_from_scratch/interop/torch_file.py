"""Files of torch.save, read without running their pickle. Such a file is a zip archive with one pickle and the bytes of
the tensors. The pickle's opcodes are inspected before torch reads it (weights_only)."""

from __future__ import annotations

import os
import pickletools
import re
import struct
import zipfile
from collections import deque
from pathlib import Path
from typing import Any

from ..errors import DamagedError, UserError, first_line

MARK = "llm-from-scratch export; it may be written anew"  # marks files of this program
MAX_PICKLE = 4 << 20  # bytes; a model of 48 layers has 0.2 MB of it
MAX_OPCODES, MAX_MADE, MAX_CALLS = 1 << 19, 1 << 18, 1 << 15  # in it; 48 layers: 70,000, 17,000, 7,000
MAX_MEMBERS = 4 << 20  # bytes of the archive's list of members; that of 48 layers has 0.2 MB
# What a dict of plain values and tensors is pickled with. torch's own list is longer, and part of it allocates memory
# by a number in the file.
_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
_OPCODES = re.compile(
    r"PROTO|STOP|MARK|GLOBAL|REDUCE|BUILD|BINPERSID|NONE|NEWTRUE|NEWFALSE|EMPTY_(DICT|LIST|TUPLE)|APPENDS?|SETITEMS?"
    r"|TUPLE[123]?|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|BINPUT|LONG_BINPUT|BINGET|LONG_BINGET"
)
_ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
}  # fmt: skip
_VALUES = ("BINUNICODE", "GLOBAL", "BININT", "BININT1", "BININT2", "LONG1")


def load_plain(path: Path) -> dict[Any, Any]:
    """The dict in a file of torch.save, if it contains only plain values and tensors. Needs about as much memory as the
    file has bytes, even if it claims larger sizes. Raises UserError, DamagedError."""
    import torch

    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        _check_list_of_members(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
                raise UserError(f"{path} is a compressed archive, not a file of torch.save")
            if sum(m.file_size for m in members) > path.stat().st_size:
                raise DamagedError(f"{path} claims more bytes than it has")
            sizes = {m.filename.lower(): m.file_size for m in members}  # torch ignores case
            if len(sizes) < len(members):
                raise UserError(f"{path} has two members of the same name: not a file of torch.save")
            pickled = _pickle_member(archive, path)
            storages = _look_through(archive.read(pickled), path)
        folder = pickled.filename.removesuffix("data.pkl")
        for key, claimed in storages:  # torch 2.8 does not compare them and reads beyond the end
            if claimed > sizes.get(f"{folder}data/{key}".lower(), -1):
                raise DamagedError(f"{path} claims {claimed} bytes for its tensor {key[:80]!r}, which has fewer")
        # memory-mapped tensors would change with a file that nanoGPT overwrites in place
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (UserError, MemoryError):
        raise
    except zipfile.BadZipFile as error:
        raise DamagedError(
            f"{path} is not a file that torch.save (1.6 or newer) wrote, or it is truncated: {error}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # any error of torch's reader for a corrupt file
        raise DamagedError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, expected a dict")
    return content


def _check_list_of_members(path: Path) -> None:
    """Limits the list of members at the end of a zip archive, which zipfile reads into memory."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16) - 22))
        tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        raise DamagedError(f"{path} is not a file that torch.save (1.6 or newer) wrote, or it is truncated")
    (length,) = struct.unpack_from("<I", tail, at + 12)
    if length == 0xFFFFFFFF and (at64 := tail.rfind(b"PK\6\6")) >= 0 and len(tail) >= at64 + 56:
        (length,) = struct.unpack_from("<Q", tail, at64 + 40)
    if length > MAX_MEMBERS:
        raise UserError(f"{path} has a list of members of {length} bytes: not a file of torch.save")


def _pickle_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    found = [m for m in archive.infolist() if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].file_size > MAX_PICKLE or found[0].compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path} is not a file of torch.save: expected one data.pkl of at most {MAX_PICKLE} bytes")
    return found[0]


def _look_through(pickled: bytes, path: Path) -> list[tuple[str, int]]:
    """The storages that the pickle asks for: key and bytes. Raises UserError if it does more than build plain values,
    dicts and tensors. Runs none of it."""
    made = calls = 0
    last = deque[tuple[str, Any]]([("", None)], maxlen=7)  # opcodes and arguments; for a BINGET, those that it repeats
    memo: dict[Any, tuple[str, Any]] = {}
    storages = []
    for count, (opcode, arg, _) in enumerate(pickletools.genops(pickled)):
        name = opcode.name
        made += name[:5] in ("EMPTY", "TUPLE", "MARK", "BUILD")
        calls += name in ("REDUCE", "BINPERSID")
        if count > MAX_OPCODES or made > MAX_MADE or calls > MAX_CALLS:
            raise UserError(f"{path} contains too many values for a checkpoint")
        if not _OPCODES.fullmatch(name):
            raise UserError(f"{path} is pickled in a way that torch.save does not use ({name})")
        if name == "GLOBAL" and not _GLOBALS.fullmatch(str(arg)):
            raise UserError(f"{path} asks for {str(arg)[:80]!r}: it contains more than plain values and tensors")
        if name.endswith("BINPUT"):
            memo[arg] = last[-1] if last[-1][0] in _VALUES else ("", None)
            continue
        if name == "BINPERSID":
            storages.append(_storage(list(last), path))
        last.append(memo.get(arg, ("", None)) if name.endswith("BINGET") else (name, arg))
    return storages


def _storage(opcodes: list[tuple[str, Any]], path: Path) -> tuple[str, int]:
    """The key and the bytes of the storage that torch.save asks for with these opcodes."""
    match opcodes:
        case [
            ("MARK", _), ("BINUNICODE", "storage"), ("GLOBAL", str(kind)), ("BINUNICODE", str(key)),
            ("BINUNICODE", _), ("BININT" | "BININT1" | "BININT2" | "LONG1", int(elements)), ("TUPLE", _),
        ]:  # fmt: skip
            if size := _ITEM_BYTES.get(kind.removeprefix("torch ").removesuffix("Storage")):
                return key, elements * size
    raise UserError(f"{path} asks for a tensor in a way that torch.save does not use")


def is_plain_tensor(value: Any) -> bool:
    """A dense tensor that owns the memory for its shape; a view of stride 0 claims more than the file has."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def is_ours(path: Path) -> bool:
    """Whether write_nanogpt wrote this ckpt.pt and nothing has changed it. False if there is no file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return MARK.encode() in archive.read(_pickle_member(archive, path))
    except (OSError, zipfile.BadZipFile, UserError, RuntimeError, NotImplementedError):
        return False
