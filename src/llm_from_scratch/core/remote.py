"""Datasets in an object store (extra: remote): a shard is downloaded when it is first read, compared with its hash in
the manifest, and kept in a local folder of bounded size. The shards used longest ago are deleted."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, UserError, one_line
from ..machine.extras import missing_store, require
from ..machine.files import lock_file, open_file, open_whole, read_json, to_json, write_whole
from .tokenfile import MANIFEST, TokenFile, dtype_of, read_manifest
from .tokenizer import HF_FILE, META_FILE, RANKS_FILE, TIKTOKEN_NAMES

URL = re.compile(r"[a-z][a-z0-9+]*(::[a-z][a-z0-9+]*)*://", re.IGNORECASE)
SOURCE = ".remote.json"  # in the local folder: {url}
MOST = 1 << 26  # bytes of a manifest or tokenizer file
CHUNK = 1 << 22  # bytes of a read
ATTEMPTS = 3
FILE_OF = {"bpe": HF_FILE, "hf": HF_FILE, **dict.fromkeys(TIKTOKEN_NAMES, RANKS_FILE)}  # by the kind of tokenizer


def is_url(name: str) -> bool:
    return URL.match(name) is not None


def local_folder(url: str, root: str | Path = ".") -> Path:
    """A folder with the manifest and the tokenizer of the dataset at this address, for the shards to come. Raises
    UserError."""
    require("fsspec", "remote", f"--dataset={url}")
    url = url.removesuffix("/" + MANIFEST).rstrip("/")
    name = f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    folder = Path(root) / "data" / "cache" / "remote" / name
    if (manifest := _read(f"{url}/{MANIFEST}")) is None:
        raise UserError(f"{url} does not have a {MANIFEST}: upload the folder that llm-prepare wrote")
    write_whole(folder / MANIFEST, manifest)
    needed: list[str | None] = [META_FILE] if "tokenizer" in (read_manifest(folder) or {}) else []
    for file in (META_FILE, RANKS_FILE, HF_FILE):
        if (content := _read(f"{url}/{file}")) is not None:
            write_whole(folder / file, content)
        elif file in needed:
            raise DataError(
                f"{url}/{file} cannot be read, but the tokenizer in its {MANIFEST} needs it: run the same command again"
                ", or upload the dataset again"
            )
        if file == META_FILE and content is not None:
            needed.append(FILE_OF.get(str(read_json(folder / file).get("name"))))
    write_whole(folder / SOURCE, to_json({"url": url}))
    return folder


def source_of(folder: Path) -> str | None:
    """The address of a folder that local_folder() made."""
    return str(read_json(folder / SOURCE)["url"]) if (folder / SOURCE).is_file() else None


def open_remote(url: str, folder: Path, split: str, limit: int) -> tuple[list[RemoteFile], bool]:
    """The files of a split, and whether both splits fit into `limit` bytes. Raises UserError."""
    manifest = read_manifest(folder)
    stated = {name: entry["shards"] for name, entry in manifest["splits"].items()} if manifest else {}
    dtype = dtype_of(manifest)
    if not any(shard["tokens"] for shard in stated.get(split, [])):
        raise UserError(f"{url}: its {MANIFEST} does not have tokens in the {split} split")
    for shard in (shard for shards in stated.values() for shard in shards):
        if not re.fullmatch("[0-9a-f]{64}", str(shard.get("sha256"))) or Path(shard["file"]).name != shard["file"]:
            raise UserError(f"{url}: its {MANIFEST} does not have the hash of {shard['file']}; prepare it again")
    sizes = {name: [shard["tokens"] * dtype.itemsize for shard in shards] for name, shards in stated.items()}
    needed = sum(sizes.get("val", [])) + 3 * max(sizes.get("train", [0]))
    if needed > limit:
        raise UserError(
            f"--data_cache is too small for {url}: it must hold the validation split and three training "
            f"shards, {needed / (1 << 30):.2g} GiB"
        )
    cache = Cache(url, folder, limit)
    files = [RemoteFile(cache, shard, dtype) for shard in stated[split] if shard["tokens"]]
    return files, sum(map(sum, sizes.values())) <= limit


class Cache:
    """The downloaded shards of a dataset. Shared by threads; other processes may use the same folder."""

    def __init__(self, url: str, folder: Path, limit: int):
        self.url, self.folder, self.limit = url, folder, limit
        self.lock = threading.RLock()
        self.open = dict[Path, int]()  # descriptors, those used last at the end
        weakref.finalize(self, _close, self.open)

    def read(self, shard: RemoteFile, at: int, size: int) -> bytes:
        """Bytes of a shard; fewer at its end. No other thread closes the file meanwhile."""
        with self.lock:
            handle = self.open.pop(shard.path, None)
            if handle is None:
                handle = self._opened(shard)
            self.open[shard.path] = handle
            if hasattr(os, "pread"):
                return os.pread(handle, size, at)
            os.lseek(handle, at, os.SEEK_SET)
            return os.read(handle, size)

    def _opened(self, shard: RemoteFile) -> int:
        try:
            lock = lock_file(self.folder / ".lock", wait=True)  # one process downloads, the others wait for it
            try:
                if not shard.path.exists() or shard.path.stat().st_size != shard.nbytes:
                    self._make_room(shard.nbytes)
                    self._download(shard)
                os.utime(shard.path)
                return open_file(shard.path)
            finally:
                lock.release()
        except OSError as error:
            raise UserError(f"cannot cache {shard.path}: {error.strerror or error}") from None

    def _make_room(self, size: int) -> None:
        """Deletes shards until `size` bytes fit."""
        sizes = {path: path.stat().st_size for path in self.folder.glob("*.bin")}
        times = {path: path.stat().st_mtime_ns for path in sizes}
        ours = [path for path in self.open if path in sizes]  # open: the one used longest ago first
        used = sum(sizes.values())
        for path in [*sorted(sizes.keys() - ours, key=lambda path: times[path]), *ours]:
            if used + size <= self.limit:
                return
            if (handle := self.open.pop(path, None)) is not None:
                os.close(handle)
            path.unlink()
            used -= sizes[path]

    def _download(self, shard: RemoteFile) -> None:
        where = f"{self.url}/{shard.name}"
        for attempt in range(ATTEMPTS):
            digest = hashlib.sha256()
            try:
                with open_whole(shard.path) as target:
                    for chunk in _chunks(where):
                        digest.update(chunk)
                        target.write(chunk)
                    if digest.hexdigest() != shard.sha256:
                        raise DataError(f"{where} does not match its hash in {MANIFEST}; upload the dataset again")
                return
            except FileNotFoundError:
                raise DataError(f"{where} is missing; upload the dataset again") from None
            except DataError:
                if attempt + 1 == ATTEMPTS:
                    raise


def _close(handles: dict[Path, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


class RemoteFile(TokenFile):
    """The ids of a shard in an object store."""

    def __init__(self, cache: Cache, shard: dict[str, Any], dtype: np.dtype | str):
        self.cache, self.name, self.sha256 = cache, str(shard["file"]), str(shard["sha256"])
        self.path, self.dtype = cache.folder / f"{self.sha256[:16]}-{self.name}", np.dtype(dtype)
        self.nbytes = shard["tokens"] * self.dtype.itemsize

    def rows(self, starts: list[int], length: int) -> np.ndarray:
        return np.array([self[start : start + length] for start in starts], self.dtype).reshape(len(starts), length)

    def _read(self, at: int, size: int) -> bytes:
        data = b""
        while len(data) < size and (more := self.cache.read(self, at + len(data), size - len(data))):
            data += more
        if len(data) < size:
            raise DataError(f"{self.path} was truncated: delete it, and resume with --init_from=resume")
        return data


def _read(url: str) -> bytes | None:
    """A small file; None if there is none. Asks several times: some stores report a failed connection as a missing
    file."""
    failed: DataError | None = None
    for _ in range(ATTEMPTS):
        found = b""
        try:
            for chunk in _chunks(url):
                found += chunk
                if len(found) > MOST:
                    raise UserError(f"{url} has more than {MOST} bytes: not a file of a dataset")
            return found
        except FileNotFoundError:
            failed = None
        except DataError as error:
            failed = error
    if failed is not None:
        raise failed
    return None


def _chunks(url: str) -> Iterator[bytes]:
    """The content of a file. Raises DataError, and FileNotFoundError."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise missing_store(error, f"reading {url}") from None
    except Exception as error:  # each store raises its own errors
        if isinstance(error, UserError):
            raise
        raise DataError(
            f"cannot read {url}: {one_line(error) or type(error).__name__}; when it can be read again, resume with "
            "--init_from=resume"
        ) from None
