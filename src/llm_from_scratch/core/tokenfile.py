"""Token files: opening, checking and reading by position. Files are read, not memory-mapped. If a file is truncated
during a run, a read raises DataError; a memory map would kill the process with SIGBUS."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, UserError, one_line
from ..machine.files import open_file, read_json, to_json, write_whole

BLOCK = 1 << 20  # ids per read of a scan
SCAN_LIMIT = 4 << 30  # bytes; a larger split is scanned in the background during the first steps
REMEMBER_FROM = 64 << 20  # bytes of a split from which the scan's result is saved
FORMAT, MANIFEST = "llm-from-scratch-data", "manifest.json"
CHECKED = ".checked.json"  # in the data folder: {file: size, modification times, largest id}
HEAD = 1 << 12  # bytes read to detect the format
DTYPES = {"uint8": "u1", "uint16": "<u2", "uint32": "<u4"}  # of ids, as named in a manifest
OTHER_DTYPES = ("<i8", ">i8", "<f8", "<u4", ">u4", "<f4", "<u2", ">u2")  # formats that users confuse


class TokenFile:
    """The ids of one file, read with file[a:b] or file[a]. All threads and forked processes share one descriptor."""

    def __init__(self, path: str | Path, dtype: np.dtype | str):
        """Raises UserError if it is not a file of ids: missing, a FIFO, odd length, .npy, text."""
        self.path, self.dtype = Path(path), np.dtype(dtype)
        try:
            self._handle = open_file(self.path)
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing; prepare the data again") from None
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self._handle)
        self._lock = threading.Lock()
        self.nbytes = os.fstat(self._handle).st_size
        # one byte per id may be the bytes of a text
        if self.dtype.itemsize > 1 and (kind := _foreign_format(self._read(0, min(self.nbytes, HEAD)))):
            raise DataError(f"{self.path} is {kind}: expected raw {self.dtype} ids without a header")
        if self.nbytes % self.dtype.itemsize:
            raise DataError(
                f"{self.path} has {self.nbytes} bytes, not a multiple of {self.dtype.itemsize}: not a file of "
                f"{self.dtype} ids"
            )

    def __len__(self) -> int:
        return self.nbytes // self.dtype.itemsize

    def __getitem__(self, part: slice | int) -> np.ndarray:
        """The ids begin:end, or one id. Raises DataError if the file was truncated."""
        if isinstance(part, int):
            return self[part : part + 1][0]
        begin, end, _ = part.indices(len(self))
        size = self.dtype.itemsize
        return np.frombuffer(self._read(begin * size, max(0, end - begin) * size), self.dtype)

    def rows(self, starts: list[int], length: int) -> np.ndarray:
        """self[start : start + length] for each start, faster than slicing for each."""
        size, data = self.dtype.itemsize, b""
        if hasattr(os, "pread"):
            with contextlib.suppress(OSError):
                data = b"".join([os.pread(self._handle, length * size, start * size) for start in starts])
        if len(data) < length * size * len(starts):  # read again; this raises the exact error
            data = b"".join([self._read(start * size, length * size) for start in starts])
        return np.frombuffer(data, self.dtype).reshape(len(starts), length)

    def _read(self, at: int, size: int) -> bytes:
        try:
            data = self._read_at(size, at)
            while len(data) < size and (more := self._read_at(size - len(data), at + len(data))):
                data += more  # interrupted by a signal, or beyond the system's limit per read
        except OSError as error:  # a failing disk or file server
            raise DataError(
                f"cannot read {self.path}: {error.strerror or error}; when the file is readable again, resume with "
                "--init_from=resume"
            ) from None
        if len(data) < size:
            raise DataError(
                f"{self.path} was truncated during the run: it had {self.nbytes} bytes, now "
                f"{os.fstat(self._handle).st_size}; restore it and resume with --init_from=resume"
            )
        return data

    def _read_at(self, size: int, at: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._handle, size, at)
        with self._lock:
            os.lseek(self._handle, at, os.SEEK_SET)
            return os.read(self._handle, size)

    def identity(self) -> dict[str, int]:
        """Size and times of the file, which change with its content."""
        info = os.fstat(self._handle)
        return {"size": info.st_size, "mtime_ns": info.st_mtime_ns, "ctime_ns": info.st_ctime_ns}


Shards = Sequence[TokenFile | np.ndarray]


def rows(shard: TokenFile | np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """shard[start : start + length] for each start, as the rows of one array."""
    if isinstance(shard, TokenFile):
        return shard.rows(starts.tolist(), length)
    return shard[starts[:, None] + np.arange(length)]


def _foreign_format(head: bytes) -> str | None:
    """The format of a file with this head, if it is not raw ids."""
    if head.startswith(b"\x93NUMPY") and b"'descr'" in head[:64]:
        return "a NumPy file with a header (.npy); write the array with array.tofile(path)"
    if len(head) >= 64:
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut at the end
            if not re.search(r"[\0-\x08\x0e-\x1f\x7f]", text):  # token files contain such bytes
                return "a text; prepare it with llm-prepare"
    return None


def open_shards(folder: Path, split: str) -> list[TokenFile]:
    """The non-empty files of a split, in order. Raises UserError if the split is missing, empty, in a wrong format or
    does not have the length in its manifest."""
    manifest = read_manifest(folder)
    dtype = dtype_of(manifest)
    stated = _stated(folder, split, manifest)
    if manifest is None and not any(os.path.lexists(path) for path in stated) and any(folder.glob("*.ds")):
        return _datatrove_shards(folder, split)
    shards = []
    for path, tokens in stated.items():
        if not os.path.lexists(path):
            raise UserError(f"{path} is missing: the dataset does not have its {split} split")
        shard = TokenFile(path, dtype)
        if tokens is not None and len(shard) != tokens:
            raise DataError(f"{path} has {len(shard)} tokens, but its manifest lists {tokens}; prepare the data again")
        if manifest is None and _every_second_is_zero(shard):
            raise DataError(
                f"{path}: every second id is 0, so these are probably uint32 or int64 ids. A folder without "
                "manifest.json needs uint16: use array.astype('uint16').tofile(path) or llm-prepare"
            )
        if len(shard):
            shards.append(shard)
    if not shards:
        raise UserError(f"{', '.join(map(str, stated)) or folder} is empty: the {split} split does not have tokens")
    return shards


def _stated(folder: Path, split: str, manifest: dict[str, Any] | None) -> dict[Path, int | None]:
    """The files of a split with their number of tokens in the manifest."""
    if manifest and split in manifest["splits"]:
        listed = manifest["splits"][split]["shards"]
        stated = {folder / s["file"]: s["tokens"] for s in listed}
        if any(path.parent != folder or path.name in ("", "..") for path in stated):
            raise UserError(f"{folder / MANIFEST} names files outside its folder; prepare the data again")
        if len(stated) < len(listed):
            raise UserError(f"{folder / MANIFEST} names a file twice; prepare the data again")
        return stated
    numbered = re.compile(rf"{split}_(\d{{1,9}})\.bin")
    found = {int(match[1]): p for p in sorted(folder.glob("*.bin")) if (match := numbered.fullmatch(p.name))}
    if not found:
        return {folder / f"{split}.bin": None}
    if os.path.lexists(folder / f"{split}.bin"):
        raise UserError(f"{folder} contains both {split}.bin and {found[min(found)].name}: remove one of them")
    if gap := next((number for number in range(min(found), max(found)) if number not in found), None):
        raise UserError(f"{folder} has {len(found)} files of the {split} split, but number {gap} is missing")
    return {found[number]: None for number in sorted(found)}


def _datatrove_shards(folder: Path, split: str) -> list[TokenFile]:
    """The shards that datatrove wrote: NAME.ds with the ids, NAME.ds.index with the ends of the documents. The
    validation split is the shards with names that begin with val, or else the last one."""
    files = [path for path in sorted(folder.glob("*.ds")) if path.stat().st_size]
    val = [path for path in files if path.name.startswith("val")] or files[-1:]
    chosen = val if split == "val" else [path for path in files if path not in val]
    if not chosen:
        raise UserError(
            f"{folder} needs two .ds files with tokens, but has {len(files)}: the last one is the validation split"
        )
    shards = []
    for path in chosen:
        ends = _read_index(path)
        width, rest = divmod(path.stat().st_size, int(ends[-1]) if len(ends) and ends[-1] else 1)
        if rest or width not in (2, 4) or (np.diff(ends.astype(np.int64), prepend=0) < 0).any():
            raise DataError(f"{path} does not match its index: prepare the shard again")
        shards.append(TokenFile(path, f"<u{width}"))
    if len({shard.dtype for shard in shards}) > 1:
        raise DataError(f"{folder} has .ds files with 2 and with 4 bytes per token: put them into two folders")
    return shards


def _read_index(path: Path) -> np.ndarray:
    index = path.with_name(path.name + ".index")
    try:
        return np.frombuffer(index.read_bytes(), "<u8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {index} ({one_line(error)}): datatrove writes it next to {path.name}") from None


def document_ends(shards: Shards) -> np.ndarray | None:
    """Where the documents of datatrove's shards end, over all shards; None for other shards."""
    if not all(isinstance(shard, TokenFile) and shard.path.suffix == ".ds" for shard in shards):
        return None
    starts = np.cumsum([0] + [len(shard) for shard in shards])
    each = [_read_index(shard.path).astype(np.int64) for shard in shards if isinstance(shard, TokenFile)]
    return np.unique(np.concatenate([start + ends for start, ends in zip(starts, each, strict=False)]))


def _every_second_is_zero(shard: TokenFile) -> bool:
    """Whether the file looks like wider ids read as uint16. Checks both ends."""
    head, tail = shard[: HEAD // 2], shard[max(0, len(shard) - HEAD // 2) // 2 * 2 :]
    return len(head) >= 16 and bool(head[::2].any()) and not head[1::2].any() and not tail[1::2].any()


def dtype_of(manifest: dict[str, Any] | None) -> np.dtype:
    """The type of the ids in the files of a dataset; nanoGPT's without a manifest."""
    return np.dtype(DTYPES[manifest["dtype"] if manifest else "uint16"])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json of a data folder, or None (nanoGPT's folders). Raises UserError if it is damaged."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        manifest = read_json(path)
        if manifest["format"] != FORMAT or manifest["dtype"] not in DTYPES:
            raise ValueError("unknown format or dtype")
        if type(manifest["vocab_size"]) is not int or not 0 < manifest["vocab_size"] <= 1 << 32:
            raise ValueError("vocab_size is not a number of ids")
        splits = manifest["splits"].values()
        for shard in (s for split in splits for s in [*split["shards"], *split.get("marks", [])]):
            if not isinstance(shard["file"], str) or "\0" in shard["file"]:
                raise ValueError("a file does not have a name")
            if type(shard["tokens"]) is not int or shard["tokens"] < 0:
                raise ValueError("a file does not have a number of tokens")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); prepare the data again with llm-prepare") from None


# ids outside the vocabulary


def scan(
    shards: Shards, name: str, vocab_size: int, remember: bool = True, stopped: threading.Event | None = None
) -> int:
    """Reads every id and returns the largest. Raises DataError at the first one outside the vocabulary. The results for
    large files are kept next to them and used while they do not change; remember=False writes nothing."""
    is_large, at, found = sum(shard.nbytes for shard in shards) >= REMEMBER_FROM, 0, 0
    for shard in shards:
        largest = _remembered(shard) if is_large and isinstance(shard, TokenFile) else None
        if largest is None or largest >= vocab_size:
            before = shard.identity() if isinstance(shard, TokenFile) else None
            largest = 0
            for begin in range(0, len(shard), BLOCK):
                if stopped is not None and stopped.is_set():
                    return found
                part = shard[begin : begin + BLOCK]
                largest = max(largest, int(part.max()))
                if largest >= vocab_size:
                    refuse_outside(shards, name, vocab_size, at + begin, part)
            if remember and is_large and isinstance(shard, TokenFile) and before == shard.identity():
                _remember(shard, largest)
        at, found = at + len(shard), max(found, largest)
    return found


def refuse_outside(shards: Shards, name: str, vocab_size: int, position: int, ids: np.ndarray) -> None:
    """Raises DataError if one of the ids is not in the vocabulary. position: of the first id in the split."""
    if not len(ids) or int(ids.max()) < vocab_size:
        return
    bad = int(np.argmax(ids >= vocab_size))
    at, why = position + bad, "the data was made with another tokenizer; prepare it again"
    for shard in shards:
        if at < len(shard):
            break
        at -= len(shard)
    if isinstance(shard, TokenFile):
        name, position = str(shard.path), at - bad
        why = _explain(shard, at, vocab_size) or why
    raise DataError(
        f"{name}: token {position + bad} has id {int(ids[bad])}, outside the vocabulary of {vocab_size} ids: {why}"
    )


def _explain(shard: TokenFile, at: int, vocab_size: int) -> str | None:
    """A hint if the ids around a bad one are valid as another number type."""
    begin = at * shard.dtype.itemsize // HEAD * HEAD // shard.dtype.itemsize
    around = shard[begin : begin + HEAD // shard.dtype.itemsize].tobytes()
    for dtype in map(np.dtype, OTHER_DTYPES):
        values = np.frombuffer(around[: len(around) // dtype.itemsize * dtype.itemsize], dtype)
        with np.errstate(invalid="ignore"):
            fits = (values >= 0) & (values < vocab_size) & (values == np.floor(values))
        if dtype != shard.dtype and len(values) > 1 and fits.all():
            order = " in the other byte order" if dtype.byteorder == ">" else ""
            return (
                f"the ids near it are valid as {dtype.name}{order}; convert the file to little-endian "
                f"{shard.dtype.name} or prepare the data again"
            )
    return None


class BackgroundScan:
    """A scan in a background thread. It ends when it is closed or garbage-collected."""

    def __init__(self, shards: Shards, name: str, vocab_size: int, remember: bool = True):
        self._stopped, self._errors = threading.Event(), list[UserError]()
        stopped, errors = self._stopped, self._errors  # the thread must not keep self alive

        def work() -> None:
            try:
                scan(shards, name, vocab_size, remember, stopped)
            except UserError as error:
                errors.append(error)

        self.thread = threading.Thread(target=work, name="scan", daemon=True)
        weakref.finalize(self, self._stopped.set)
        self.thread.start()

    def raise_if_bad(self) -> None:
        """Raises the DataError that the scan has found. Cheap."""
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        self._stopped.set()
        self.thread.join()


def _remembered(shard: TokenFile) -> int | None:
    """The largest id of a file, if it was scanned and has not changed since."""
    entry = _checked(shard.path.parent).get(shard.path.name)
    largest = entry.get("largest") if isinstance(entry, dict) else None
    return largest if type(largest) is int and largest >= 0 and entry == _facts(shard, largest) else None


def _remember(shard: TokenFile, largest: int) -> None:
    content = _checked(shard.path.parent) | {shard.path.name: _facts(shard, largest)}
    with contextlib.suppress(OSError):  # the data of a read-only folder is scanned each time
        write_whole(shard.path.with_name(CHECKED), to_json(content))


def _facts(shard: TokenFile, largest: int) -> dict[str, Any]:
    return {**shard.identity(), "dtype": str(shard.dtype), "largest": largest}


def _checked(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / CHECKED)
    except UserError:
        return {}
