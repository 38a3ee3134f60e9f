"""Files of torch.save, read without running their pickle. Such a file is a zip archive with one pickle and the bytes of
the tensors. The pickle's opcodes are inspected before torch reads it (weights_only)."""

from __future__ import annotations

import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

from ..errors import DamagedError, UserError

MARK = "llm-from-scratch export; it may be written anew"  # marks files of this program
MAX_PICKLE = 4 << 20  # bytes; a model of 48 layers has 0.2 MB of it
MAX_OPCODES, MAX_MADE, MAX_CALLS = 1 << 19, 1 << 18, 1 << 15  # in it; 48 layers: 70,000, 17,000, 7,000
MAX_MEMBERS = 4 << 20  # bytes of the archive's list of members; that of 48 layers has 0.2 MB
# What a dict of plain values and tensors is pickled with. torch's own list is longer, and part of it allocates memory
# by a number in the file.
_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage|storage UntypedStorage)"
)
_OPCODES = re.compile(
    r"PROTO|STOP|MARK|GLOBAL|REDUCE|BUILD|BINPERSID|NONE|NEWTRUE|NEWFALSE|EMPTY_(DICT|LIST|TUPLE)|APPENDS?|SETITEMS?"
    r"|TUPLE[123]?|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|BINPUT|LONG_BINPUT|BINGET|LONG_BINGET"
)


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
                raise UserError(f"{path} is a compressed archive, not what torch.save writes")
            if sum(m.file_size for m in members) > path.stat().st_size:
                raise DamagedError(f"{path} claims more bytes than it has")
            _look_through(archive.read(_pickle_member(archive, path)), path)
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
        raise DamagedError(
            f"{path} cannot be read: {str(error).splitlines()[0][:200] if str(error) else error!r}"
        ) from None
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
        raise UserError(f"{path} has a list of members of {length} bytes: not what torch.save writes")


def _pickle_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    found = [m for m in archive.infolist() if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].file_size > MAX_PICKLE or found[0].compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path} is not what torch.save writes: expected one data.pkl of at most {MAX_PICKLE} bytes")
    return found[0]


def _look_through(pickled: bytes, path: Path) -> None:
    """Raises UserError if the pickle does more than build plain values, dicts and tensors. Runs none of it."""
    made = calls = 0
    for count, (opcode, arg, _) in enumerate(pickletools.genops(pickled)):
        made += opcode.name[:5] in ("EMPTY", "TUPLE", "MARK", "BUILD")
        calls += opcode.name in ("REDUCE", "BINPERSID")
        if count > MAX_OPCODES or made > MAX_MADE or calls > MAX_CALLS:
            raise UserError(f"{path} contains more values than a checkpoint")
        if not _OPCODES.fullmatch(opcode.name):
            raise UserError(f"{path} is pickled in a way that torch.save does not use ({opcode.name})")
        if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(arg)):
            raise UserError(f"{path} asks for {str(arg)[:80]!r}: it contains more than plain values and tensors")


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
