"""Token files and the order in which a run reads them.

A data folder holds train.bin and val.bin, or numbered shards of them: raw little-endian token ids without a header,
uint16 (nanoGPT's format) or uint32. manifest.json, where there is one, says which. Which windows a step sees is a pure
function of (seed, step): it depends neither on the number of processes nor on evaluations, logging or restarts.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..config import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and a missing dataset is to be told at once
    import torch
    from torch import Tensor

SCAN_LIMIT = 4 << 30  # bytes of a split whose token ids are all checked before the first step


def resolve_dataset(name: str | Path, root: str | Path = ".") -> Path:
    """The folder of a dataset: a folder as it stands, or NAME in data/ or data/processed/ below root.

    Raises UserError where there is none (with the command that makes it), and where both places hold one.
    """
    if not str(name):
        raise UserError("the dataset's name is empty; give a name or a folder with train.bin and val.bin")
    places = [Path(root) / "data" / name, Path(root) / "data" / "processed" / name]
    found = [place for place in places if _has_tokens(place)] if not Path(name).is_absolute() else []
    if len(found) == 2:
        raise UserError(f"dataset {str(name)!r} is ambiguous: {found[0]} and {found[1]}; give one of the two folders")
    if found:
        return found[0]
    if _has_tokens(Path(name)):
        return Path(name)
    script = places[0] / "prepare.py"
    make = f"python {script.as_posix()}" if script.exists() else f"llm-prepare FILE --out_dir={places[1].as_posix()}"
    where = f"{name} has" if Path(name).is_dir() else f"{places[0].as_posix()} and {places[1].as_posix()} have"
    there = sorted({p.parent.name for d in ("data", "data/processed") for p in Path(root, d).glob("*/train*.bin")})
    others = f" (prepared: {', '.join(there[:8])})" if there else ""
    raise UserError(f"dataset {str(name)!r} not found: {where} no train.bin or val.bin; make it with: {make}{others}")


def _has_tokens(folder: Path) -> bool:
    return any((folder / f"{split}{tail}.bin").is_file() for split in ("train", "val") for tail in ("", "_000000"))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json of a data folder, or None in a folder of nanoGPT's. Raises UserError where it is damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != "llm-from-scratch-data" or manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError("unknown format or dtype")
        manifest["vocab_size"] = int(manifest["vocab_size"])
        for shard in (s for split in manifest["splits"].values() for s in split["shards"]):
            shard["file"], shard["tokens"] = str(shard["file"]), int(shard["tokens"])
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the data again with llm-prepare") from None


class TokenData:
    """One split of a dataset: memory-mapped token ids, read as one long sequence."""

    def __init__(self, shards: list[np.ndarray], name: str = "tokens"):
        self.shards = shards
        self.name = name
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])  # where each shard begins, and the end

    @classmethod
    def open(cls, folder: str | Path, split: str) -> TokenData:
        """Raises UserError for a split that is missing, empty, of odd length or shorter than its manifest says."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        dtype = np.dtype("<u4" if manifest and manifest["dtype"] == "uint32" else "<u2")
        if manifest and split in manifest.get("splits", {}):
            stated = {folder / s["file"]: s["tokens"] for s in manifest["splits"][split]["shards"]}
            if any(path.parent != folder for path in stated):
                raise UserError(f"{folder / 'manifest.json'} names files outside its folder; prepare the data again")
        else:
            numbered = sorted(folder.glob(f"{split}_[0-9]*.bin"))
            stated = dict.fromkeys([folder / f"{split}.bin"] if not numbered else numbered, -1)
        shards: list[np.ndarray] = []
        for path, tokens in stated.items():
            if not path.is_file():
                raise UserError(f"{path} is missing: the {split} split of this dataset is not there")
            size = path.stat().st_size
            if size % dtype.itemsize:
                raise UserError(f"{path} has {size} bytes, no multiple of {dtype.itemsize}: not a file of {dtype} ids")
            if tokens >= 0 and size != tokens * dtype.itemsize:
                raise UserError(
                    f"{path} has {size // dtype.itemsize} tokens, its manifest says {tokens}; prepare it again"
                )
            if size:
                shards.append(np.memmap(path, dtype=dtype, mode="r"))
        if not shards:
            raise UserError(f"{', '.join(str(path) for path in stated)} is empty: the {split} split has no tokens")
        return cls(shards, f"{folder.as_posix()} ({split})")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def check(self, block_size: int, vocab_size: int | None) -> None:
        """Raises UserError where the split is shorter than one window, or holds an id outside the vocabulary."""
        if len(self) <= block_size:
            raise UserError(
                f"{self.name} has {len(self)} tokens, a window needs block_size + 1 = {block_size + 1}: "
                f"lower --block_size to at most {max(1, len(self) - 1)}, or prepare more text"
            )
        if vocab_size is None or sum(shard.nbytes for shard in self.shards) > SCAN_LIMIT:
            return
        for shard, begin in zip(self.shards, self.starts, strict=False):
            for at in range(0, len(shard), 1 << 24):  # 16 M ids at a time keep the memory bounded
                part = shard[at : at + (1 << 24)]
                if int(part.max()) >= vocab_size:
                    bad = int(np.argmax(part >= vocab_size))
                    raise UserError(
                        f"{self.name}: token {int(begin) + at + bad} has id {int(part[bad])}, outside the vocabulary "
                        f"of {vocab_size} ids: the data belongs to another tokenizer; prepare it again"
                    )

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens starts[i] ... starts[i] + length - 1 in row i: (len(starts), length) int64."""
        positions = np.asarray(starts, dtype=np.int64)[:, None] + np.arange(length)
        if len(self.shards) == 1:
            return self.shards[0][positions].astype(np.int64)
        out = np.empty(positions.shape, dtype=np.int64)
        shard_of = np.searchsorted(self.starts, positions, side="right") - 1
        for index in np.unique(shard_of):  # a window may cross from one shard into the next
            here = shard_of == index
            out[here] = self.shards[index][positions[here] - self.starts[index]]
        return out


@dataclass(frozen=True)
class SampleOrder:
    """Which windows the run reads: start positions as a pure function of (seed, index of the sample).

    random: independent uniform offsets, as nanoGPT draws them. shuffled: the windows of `block_size` tokens every
    `stride` tokens, each once per epoch in a new random order; each epoch also begins at another offset below the
    stride, so that texts do not always break at the same places.
    """

    tokens: int
    block_size: int
    order: Literal["random", "shuffled"] = "random"
    stride: int | None = None
    seed: int = 1337

    @property
    def last_start(self) -> int:
        return self.tokens - 1 - self.block_size  # the targets need one token more than the inputs

    @property
    def windows_per_epoch(self) -> int:
        spacing = self.stride or self.block_size
        return (self.last_start - min(spacing - 1, self.last_start)) // spacing + 1

    def starts(self, step: int, batch: int) -> np.ndarray:
        """Start positions of the global batch of `step`: (batch,) int64."""
        if self.order == "random":
            # a counter-based generator: the step is its key, so no earlier draw is needed
            return _generator(self.seed, step).integers(0, self.last_start + 1, size=batch)
        index = np.arange(step * batch, (step + 1) * batch)
        epochs, places = np.divmod(index, self.windows_per_epoch)
        out = np.empty(batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = _epoch_starts(self, int(epoch))[places[here]]
        return out


@functools.lru_cache(maxsize=2)  # a batch may lie in two epochs
def _epoch_starts(order: SampleOrder, epoch: int) -> np.ndarray:
    """Start positions of one epoch of shuffled windows, in their order: (windows_per_epoch,) int64."""
    spacing = order.stride or order.block_size
    rng = _generator(order.seed, epoch)
    shift = int(rng.integers(0, min(spacing - 1, order.last_start) + 1))
    return rng.permutation(order.windows_per_epoch) * spacing + shift


def _generator(seed: int, counter: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), counter]))


class BatchLoader:
    """Batches for one process, the next one made ready in the background while the model works.

    Row i of the global batch of a step is the same sample whatever the number of processes; a process takes a
    contiguous share of the rows.
    """

    def __init__(
        self, data: TokenData, order: SampleOrder, batch: int, device: torch.device, rank: int = 0, world_size: int = 1
    ):
        assert batch % world_size == 0
        self.data, self.order, self.batch, self.device = data, order, batch, device
        self.rows = slice(rank * batch // world_size, (rank + 1) * batch // world_size)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: tuple[int, Future[Tensor]] | None = None

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `step`: (rows, block_size) int64 each, on the device."""
        if self.ahead is not None and self.ahead[0] == step:
            pair = self.ahead[1].result()
        else:
            pair = self._make(step)
        self.ahead = (step + 1, self.worker.submit(self._make, step + 1))
        x, y = pair.to(self.device, non_blocking=True)
        return x, y

    def _make(self, step: int) -> Tensor:
        import torch

        starts = self.order.starts(step, self.batch)[self.rows]
        tokens = self.data.windows(starts, self.order.block_size + 1)
        pair = torch.from_numpy(np.stack((tokens[:, :-1], tokens[:, 1:])))  # one copy to the device for both
        return pair.pin_memory() if self.device.type == "cuda" else pair

    def close(self) -> None:
        self.worker.shutdown(wait=True, cancel_futures=True)
