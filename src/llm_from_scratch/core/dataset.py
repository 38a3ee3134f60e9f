"""Token files and the order in which a run reads them.

A data folder holds train.bin and val.bin, or numbered shards of them: raw little-endian token ids without a header,
uint16 (nanoGPT's format) or uint32. manifest.json, where there is one, says which. Which windows a step sees is a pure
function of (seed, step): it depends neither on the number of processes nor on evaluations, logging or restarts.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import UserError
from . import resident, tokenfile
from .tokenfile import BackgroundScan, Shards, open_shards
from .tokenfile import read_manifest as read_manifest

if TYPE_CHECKING:  # torch takes seconds to import, and a missing dataset is to be told at once
    import torch
    from torch import Tensor


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


class TokenData:
    """One split of a dataset: the token ids of its files (see TokenFile) or arrays, read as one long sequence."""

    def __init__(self, shards: Shards, name: str = "tokens"):
        self.shards = shards
        self.name = name
        self.vocab_size: int | None = None  # the bound that check() was given, and that windows() keeps
        self.largest_id: int | None = None  # as check() has found it; None for very large splits
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])  # where each shard begins, and the end

    @classmethod
    def open(cls, folder: str | Path, split: str) -> TokenData:
        """Raises UserError for a split that is missing, empty, or not in the format that its manifest says."""
        return cls(open_shards(Path(folder), split), f"{Path(folder).as_posix()} ({split})")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def check(self, block_size: int, vocab_size: int | None, remember: bool = True) -> BackgroundScan | None:
        """Raises UserError where the split is shorter than one window, or holds an id outside the vocabulary.

        Of a very large split the ids are checked in the background: the caller polls the scan that is returned.
        """
        if len(self) <= block_size:
            raise UserError(
                f"{self.name} has {len(self)} tokens, a window needs block_size + 1 = {block_size + 1}: "
                f"lower --block_size to at most {max(1, len(self) - 1)}, or prepare more text"
            )
        if vocab_size is None:
            return None
        self.vocab_size = vocab_size
        if sum(shard.nbytes for shard in self.shards) > tokenfile.SCAN_LIMIT:
            return BackgroundScan(self.shards, self.name, vocab_size, remember)
        self.largest_id = tokenfile.scan(self.shards, self.name, vocab_size, remember)
        return None

    def windows(self, starts: np.ndarray, length: int, vocab_size: int | None = None) -> np.ndarray:
        """Tokens starts[i] ... starts[i] + length - 1 in row i: (len(starts), length) int64.

        Raises DataError where a file fails or has become shorter, or an id is outside the vocabulary.
        """
        starts = np.asarray(starts, dtype=np.int64)
        out = tokenfile.rows(self.shards[0], starts, length) if len(self.shards) == 1 else self._across(starts, length)
        bound = self.vocab_size if vocab_size is None else vocab_size
        if bound is not None and out.size and int(out.max()) >= bound:
            for start, row in zip(starts, out, strict=True):
                tokenfile.refuse_outside(self.shards, self.name, bound, int(start), row)
        return out.astype(np.int64, copy=False)

    def _across(self, starts: np.ndarray, length: int) -> np.ndarray:
        first, last = (np.searchsorted(self.starts, ends, side="right") - 1 for ends in (starts, starts + length - 1))
        out = np.empty((len(starts), length), dtype=np.int64)
        for index in np.unique(first).tolist():
            here = (first == index) & (last == index)
            out[here] = tokenfile.rows(self.shards[index], starts[here] - self.starts[index], length)
        for row in np.flatnonzero(first != last):  # a window that goes from one shard into the next
            parts, index, at, end = [], int(first[row]), int(starts[row]), int(starts[row]) + length
            while at < end:
                begin = int(self.starts[index])
                parts.append(self.shards[index][at - begin : end - begin])
                index, at = index + 1, at + len(parts[-1])
            out[row] = np.concatenate(parts)
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

    def begins_epoch(self, step: int, batch: int) -> bool:
        """Whether step is the first that reads a shuffled window a second, third, ... time; batch: sequences a step."""
        last = (step + 1) * batch - 1
        return step > 0 and last // self.windows_per_epoch > (last - batch) // self.windows_per_epoch

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
        self, data: TokenData, order: SampleOrder, batch: int, device: torch.device, rank: int = 0, world_size: int = 1,
        vocab_size: int | None = None, tokens: Tensor | None = None,
    ):  # fmt: skip
        """vocab_size: ids that a batch may hold; another, in a file that changed, is a DataError of get().

        tokens: those of data, where they lie on the device (see resident.py); the files are then not read.
        """
        assert batch % world_size == 0
        self.data, self.order, self.batch, self.device, self.vocab_size = data, order, batch, device, vocab_size
        self.tokens = tokens
        self.rows = slice(rank * batch // world_size, (rank + 1) * batch // world_size)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: tuple[int, Future[Tensor]] | None = None

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `step`: (rows, block_size) int64 each, on the device."""
        if self.ahead is not None and self.ahead[0] == step:
            made = self.ahead[1].result()
        else:
            made = self._make(step)
        self.ahead = (step + 1, self.worker.submit(self._make, step + 1))
        made = made.to(self.device, non_blocking=True)
        x, y = made if self.tokens is None else resident.windows(self.tokens, made, self.order.block_size)
        return x, y

    def _make(self, step: int) -> Tensor:
        import torch

        made = self.order.starts(step, self.batch)[self.rows]
        if self.tokens is None:
            rows = self.data.windows(made, self.order.block_size + 1, self.vocab_size)
            made = np.stack((rows[:, :-1], rows[:, 1:]))  # one copy to the device for both
        batch = torch.from_numpy(made)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def close(self) -> None:
        self.worker.shutdown(wait=True, cancel_futures=True)
