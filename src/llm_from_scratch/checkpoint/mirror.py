"""A copy of a run's checkpoints in an object store, or in any other place that fsspec writes to.

    URL/step-00000250/ ...         the files of a checkpoint
    URL/step-00000250.complete     written when all of them have been read back; without it the rest does not count

A thread uploads. It compares what the run has with what the store has, so whatever failed is tried again, and what a
killed process left is completed by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DamagedError, OtherRunError, UserError, first_line
from ..machine.extras import missing_store, require
from ..machine.files import MAX_JSON, make_folder, remove_tree, sync_folder
from .contents import read_manifest
from .hashed_folder import MANIFEST, from_json, set_aside, sha256_of, to_json, verify, write_synced
from .store import kept_steps, list_checkpoints

CHUNK = 4 << 20  # bytes
RETRIES = (1.0, 60.0)  # seconds until a failed upload is tried again, doubled up to the second
_FOLDER, _MARKER = re.compile(r"step-\d{8,15}"), re.compile(r"(step-\d{8,15})\.complete")


@dataclass(frozen=True)
class Complete:
    """The content of a marker."""

    step: int
    run_id: str
    val_loss: float | None
    manifest: str
    """SHA-256 of MANIFEST.json, which lists the hashes of the other files."""

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}"


class Store:
    """The place of the copies. Raises UserError if it fails in any way."""

    def __init__(self, url: str):
        """url: of fsspec, such as s3://BUCKET/FOLDER; "memory" is fsspec's store in memory."""
        self.url = "memory://mirror" if url == "memory" else url.rstrip("/")
        require("fsspec", "remote", "--mirror")
        import fsspec

        try:
            options = {"use_listings_cache": False, "skip_instance_cache": True}
            self.fs, self.root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            raise missing_store(error, f"mirror={url}") from None
        except ValueError as error:
            raise UserError(f"mirror={url}: unsupported URL: {first_line(error)}") from None
        self.arrived: dict[str, str] = {}
        """SHA-256 of the files of an upload that has not been completed: the next attempt continues after them."""

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """Around calls of the store's library, which raises anything."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.url}: {first_line(error)}") from None

    def complete(self) -> list[Complete]:
        """The checkpoints that are complete, newest first."""
        found = []
        with self.reached():
            for name in self._names():
                if _MARKER.fullmatch(name):
                    with contextlib.suppress(DamagedError):
                        found.append(self._marker(name))
        return sorted(found, key=lambda c: c.step, reverse=True)

    def _names(self) -> list[str]:
        try:
            return [str(path).rpartition("/")[2] for path in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []

    def partial(self) -> list[str]:
        """The folders without a marker: of uploads that were abandoned."""
        names = self._names()
        return sorted(name for name in names if _FOLDER.fullmatch(name) and f"{name}.complete" not in names)

    def _marker(self, name: str) -> Complete:
        raw = from_json(b"".join(self.read(name, MAX_JSON)), Path(name))
        try:
            marker = Complete(**raw)
        except TypeError:
            raise DamagedError(f"{name} is damaged") from None
        kinds = [(int,), (str,), (float, type(None)), (str,)]
        values = dataclasses.astuple(marker)
        if any(type(value) not in kind for value, kind in zip(values, kinds, strict=True)):
            raise DamagedError(f"{name} is damaged")
        if f"{marker.name}.complete" != name:
            raise DamagedError(f"{name} is damaged: it names step {marker.step}")
        return marker

    def read(self, name: str, limit: int) -> Iterator[bytes]:
        """The content of a file in chunks. Raises DamagedError if it is missing or has more bytes than the limit."""
        try:
            file = self.fs.open(f"{self.root}/{name}", "rb")
        except FileNotFoundError:
            raise DamagedError(f"{self.url}/{name} is missing") from None
        with file:
            while chunk := file.read(CHUNK):
                if (limit := limit - len(chunk)) < 0:
                    raise DamagedError(f"{self.url}/{name} is too large")
                yield chunk

    def write(self, name: str, chunks: Iterable[bytes], on_chunk: Callable[[], None]) -> None:
        """Writes a file and reads it back. Raises DamagedError if it comes back different."""
        digest, size, back = hashlib.sha256(), 0, hashlib.sha256()
        with self.fs.open(f"{self.root}/{name}", "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                on_chunk()
        for chunk in self.read(name, size):
            back.update(chunk)
            on_chunk()
        if back.digest() != digest.digest():
            raise DamagedError(f"{self.url}/{name} differs from the upload")

    def remove(self, *names: str) -> None:
        self.arrived = {name: digest for name, digest in self.arrived.items() if name.partition("/")[0] not in names}
        for name in names:
            if self.fs.exists(f"{self.root}/{name}"):
                self.fs.rm(f"{self.root}/{name}", recursive=True)

    def upload(self, folder: Path, on_chunk: Callable[[], None]) -> None:
        """Uploads a checkpoint that is complete here. Raises DamagedError if it is not, or is removed meanwhile."""
        wanted, raw = _local(folder)
        with self.reached():
            self.remove(f"{wanted.name}.complete")
            self.fs.makedirs(f"{self.root}/{wanted.name}", exist_ok=True)
            for name, entry in read_manifest(folder)["files"].items():
                if self.arrived.get(f"{wanted.name}/{name}") != entry["sha256"]:
                    chunks = _checked(_chunks(folder / name), entry, folder / name)
                    self.write(f"{wanted.name}/{name}", chunks, on_chunk)
                    self.arrived[f"{wanted.name}/{name}"] = entry["sha256"]
            self.write(f"{wanted.name}/{MANIFEST}", [raw], on_chunk)
            self.write(f"{wanted.name}.complete", [to_json(dataclasses.asdict(wanted))], on_chunk)
            self.arrived.clear()

    def download(self, wanted: Complete, out: Path) -> Path:
        """Downloads a checkpoint to out/step-N. One that is there is set aside. Raises DamagedError."""
        final, tmp = out / wanted.name, out / f".tmp-{wanted.name}"
        with self.reached():
            raw = b"".join(self.read(f"{wanted.name}/{MANIFEST}", MAX_JSON))
            if sha256_of(raw) != wanted.manifest:
                raise DamagedError(f"{self.url}/{wanted.name}/{MANIFEST} differs from the upload")
            make_folder(out)
            remove_tree(tmp)
            tmp.mkdir()
            write_synced(tmp / MANIFEST, [raw])
            for name, entry in read_manifest(tmp)["files"].items():
                chunks = self.read(f"{wanted.name}/{name}", entry["size"])
                write_synced(tmp / name, _checked(chunks, entry, Path(wanted.name, name)))
            sync_folder(tmp)
            verify(tmp)
            if os.path.lexists(final):
                set_aside(final)
            os.rename(tmp, final)
            sync_folder(out)
        return final


def _local(folder: Path) -> tuple[Complete, bytes]:
    """The marker for a local checkpoint, and the bytes of its manifest. Raises DamagedError."""
    manifest = read_manifest(folder)
    with contextlib.suppress(OSError):
        raw = (folder / MANIFEST).read_bytes()
        return Complete(manifest["step"], str(manifest.get("run_id")), manifest["val_loss"], sha256_of(raw)), raw
    raise DamagedError(f"{folder} was removed")


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except FileNotFoundError:  # pruned
        raise DamagedError(f"{path} was removed") from None


def _checked(chunks: Iterable[bytes], entry: dict[str, Any], name: Path) -> Iterator[bytes]:
    """The chunks. Raises DamagedError at their end if they do not match the manifest's entry."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != entry["sha256"]:
        raise DamagedError(f"{name} does not match its sha256")


class Mirror:
    """Keeps the store as the run's folder is: a thread uploads new checkpoints and removes old ones."""

    def __init__(self, url: str, out_dir: Path, run_id: str, keep_last: int, keep_every: int | None):
        """Raises UserError if the store holds another run. A store that fails is tried again later. Uploads nothing
        before start()."""
        self.store, self.out_dir, self.run_id = Store(url), out_dir, run_id
        self.keep_last, self.keep_every = keep_last, keep_every
        self.lines: list[str] = []
        """Lines that the run will print."""
        self.failure: str | None = None
        """The error of the last attempt."""
        self.active = time.monotonic()
        """When bytes last moved."""
        self.uploading: Path | None = None
        """The checkpoint that is being uploaded: the run keeps it until then."""
        self._changed, self._asked, self._done = threading.Condition(), 0, 0
        with self._noted():
            self._refuse_others(self.store.complete())

    def start(self) -> None:
        """Starts to upload. The folder holds this run, and no other."""
        self.saved()  # what an earlier process has not uploaded
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def saved(self) -> None:
        """A checkpoint was written."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Waits until everything is uploaded. Returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._done == self._asked, seconds)

    def _refuse_others(self, found: list[Complete]) -> None:
        if others := sorted({c.run_id for c in found} - {self.run_id}):
            raise OtherRunError(
                f"mirror={self.store.url} holds the checkpoints of another run ({others[0][:40]}): choose another "
                "--mirror, or resume that run with --init_from=resume and an empty --out_dir"
            )

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Around an attempt. The first failure in a row gets a line."""
        try:
            yield
            self.failure = None
        except OtherRunError:
            raise
        except (UserError, OSError) as error:
            if self.failure is None:
                self.lines.append(f"warning: mirror: {error}; trying again")
            self.failure = str(error)

    def _work(self) -> None:
        delay = RETRIES[0]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._done < self._asked)
                asked, failed = self._asked, self.failure is not None
            try:
                with self._noted():
                    self._synchronize()
            except OtherRunError as error:
                self.lines.append(f"warning: no checkpoint is uploaded: {error}")
                return
            with self._changed:
                if self.failure is not None:
                    self._changed.wait(delay)
                    delay = min(2 * delay, RETRIES[1])
                    continue
                self.lines += [f"mirror: {self.store.url} is up to date again"] if failed else []
                delay, self._done = RETRIES[0], asked
                self._changed.notify_all()

    def _synchronize(self) -> None:
        """Uploads the checkpoints that the run keeps, newest first, and removes the others from the store."""
        remote = {c.step: c for c in self.store.complete()}
        self._refuse_others(list(remote.values()))
        local: dict[int, tuple[Path, Complete]] = {}
        for step, path in list_checkpoints(self.out_dir):
            with contextlib.suppress(DamagedError):
                local[step] = path, _local(path)[0]
        losses = {c.step: c.val_loss for c in [*remote.values(), *(wanted for _, wanted in local.values())]}
        kept = kept_steps(losses, self.keep_last, self.keep_every)
        for step, (path, wanted) in sorted(local.items(), reverse=True):
            if step in kept and remote.get(step) != wanted:
                self.uploading = path
                try:
                    if path.exists():  # else it was removed while a newer one was uploaded
                        self.store.upload(path, self._on_chunk)
                except DamagedError:
                    if path.exists():
                        raise
                    self.lines.append(f"warning: mirror: {path.name} was removed before it was uploaded")
                finally:
                    self.uploading = None
        with self.store.reached():
            for name in (remote[step].name for step in remote.keys() - kept):
                self.store.remove(f"{name}.complete", name)
            self.store.remove(*self.store.partial())

    def _on_chunk(self) -> None:
        self.active = time.monotonic()


def restore(url: str, out_dir: Path, say: Callable[[str], None]) -> None:
    """Downloads the newest checkpoint of the mirror, unless out_dir has a good one that is as new. One with wrong
    bytes loses its marker. One process does it, and the others wait. Raises UserError if the store fails and out_dir
    has no checkpoint."""
    store, known = Store(url), dict[tuple[Any, ...], bool]()

    def is_good(path: Path) -> bool:
        try:
            info = os.stat(path / MANIFEST)
            key = (path, info.st_ino, info.st_mtime_ns)
            if key not in known:
                known[key] = False
                verify(path)
                known[key] = True
            return known[key]
        except (DamagedError, OSError):
            return False

    while True:
        local = list_checkpoints(out_dir)
        try:
            found = store.complete()
            newest = found[0] if found else None
            if newest is None or any(step >= newest.step and is_good(path) for step, path in local):
                return
            ids = {str(read_manifest(path).get("run_id")) for _, path in local} - {newest.run_id}
            if ids:
                raise OtherRunError(f"mirror={store.url} holds another run, not {out_dir}: choose another --mirror")
            try:
                say(f"restored {store.download(newest, out_dir)} from {store.url}")
            except DamagedError as error:
                say(f"warning: {error}; using an older checkpoint")
                with store.reached():
                    store.remove(f"{newest.name}.complete")
        except OtherRunError:
            raise
        except UserError as error:
            if not local:
                raise UserError(f"no checkpoint in {out_dir}, and the mirror cannot be read: {error}") from None
            say(f"warning: the mirror cannot be read: {error}; using {out_dir}")
            return
