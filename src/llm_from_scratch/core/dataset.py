"""Token data, the order of samples, and the batch loader. A data folder contains train.bin and val.bin, or numbered
shards of them: raw little-endian token ids, uint16 (nanoGPT's format), or the type in manifest.json."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import UserError
from . import tokenfile
from .dataset_folder import resolve_dataset as resolve_dataset
from .remote import RemoteFile, open_remote, source_of
from .tokenfile import BLOCK, BackgroundScan, Shards, open_shards, refuse_outside
from .tokenfile import read_manifest as read_manifest

if TYPE_CHECKING:  # importing torch takes seconds; a missing dataset must be reported before
    import torch
    from torch import Tensor

DEVICE_SHARE, MAX_ON_DEVICE = 0.1, 4 << 30  # of free device memory, and bytes: auto's limits for tokens on the device
TOKEN_BYTES = 4  # int32, torch's smallest index type for every vocabulary


class TokenData:
    """One split of a dataset: its files (see TokenFile) or arrays as one long sequence of token ids."""

    marks: Shards = ()  # of conversations, see packing.py
    is_packed = False
    group: int | None = None  # tokens of an epoch that are read before others, if not all fit into --data_cache

    def __init__(self, shards: Shards, name: str = "tokens"):
        self.shards = shards
        self.name = name
        self.vocab_size: int | None = None  # set by check(), used by windows()
        self.largest_id: int | None = None  # found by check(); None for very large splits
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])  # start of each shard, and the end

    @classmethod
    def open(cls, folder: str | Path, split: str, data_cache: float = 100.0) -> TokenData:
        """Raises UserError if the split is missing, empty or not in the format of its manifest. data_cache: GiB for
        downloaded shards."""
        if url := source_of(Path(folder)):
            limit = int(data_cache * (1 << 30))
            files, fits = open_remote(url, Path(folder), split, limit)
            data = cls(files, f"{url} ({split})")
            data.group = None if fits else limit // 4 // files[0].dtype.itemsize
            return data
        return cls(open_shards(Path(folder), split), f"{Path(folder).as_posix()} ({split})")

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def positions(self) -> int:
        """Positions of the windows of an epoch."""
        return len(self)

    @property
    def weighted(self) -> list[tuple[str, float, TokenData]]:
        """(name, weight, data) of the parts of a mixture; of other data, only this."""
        return [("", 1.0, self)]

    def check(self, block_size: int, vocab_size: int | None, remember: bool = True) -> BackgroundScan | None:
        """Raises UserError if the split is shorter than one window or has an id outside the vocabulary. The ids of a
        very large split are checked in the background, by the returned scan."""
        if len(self) <= block_size:
            smaller = f"use --block_size={len(self) - 1}, or " if len(self) > 1 else ""
            raise UserError(
                f"{self.name} has {len(self)} tokens, but a window needs block_size + 1 = {block_size + 1}: "
                f"{smaller}prepare more text"
            )
        if vocab_size is None:
            return None
        self.vocab_size = vocab_size
        shards = [shard for shard in self.shards if not isinstance(shard, RemoteFile)]  # their hashes are checked
        if sum(shard.nbytes for shard in shards) > tokenfile.SCAN_LIMIT:
            return BackgroundScan(shards, self.name, vocab_size, remember)
        self.largest_id = tokenfile.scan(shards, self.name, vocab_size, remember)
        return None

    def windows(self, starts: np.ndarray, length: int, vocab_size: int | None = None) -> np.ndarray:
        """Tokens starts[i] to starts[i] + length - 1 in row i: (len(starts), length) int64. Raises DataError if a file
        fails or is truncated, or if an id is outside the vocabulary."""
        starts = np.asarray(starts, dtype=np.int64)
        out = tokenfile.rows(self.shards[0], starts, length) if len(self.shards) == 1 else self._across(starts, length)
        bound = self.vocab_size if vocab_size is None else vocab_size
        if bound is not None and out.size and int(out.max()) >= bound:
            for start, row in zip(starts, out, strict=True):
                tokenfile.refuse_outside(self.shards, self.name, bound, int(start), row)
        return out.astype(np.int64, copy=False)

    def order(self, block_size: int, kind: Literal["random", "shuffled"], stride: int | None, seed: int) -> SampleOrder:
        return SampleOrder(len(self), block_size, kind, stride, seed)

    def batch(
        self, starts: np.ndarray, block_size: int, share: slice, processes: int = 1, vocab_size: int | None = None
    ) -> list[np.ndarray]:
        """Inputs and targets, (2, B, T), of the windows at starts[share], a process's share of the global batch."""
        rows = self.windows(starts[share], block_size + 1, vocab_size)
        return [np.stack((rows[:, :-1], rows[:, 1:]))]  # one copy to the device for both

    def _across(self, starts: np.ndarray, length: int) -> np.ndarray:
        first, last = (np.searchsorted(self.starts, ends, side="right") - 1 for ends in (starts, starts + length - 1))
        out = np.empty((len(starts), length), dtype=np.int64)
        for index in np.unique(first).tolist():
            here = (first == index) & (last == index)
            out[here] = tokenfile.rows(self.shards[index], starts[here] - self.starts[index], length)
        for row in np.flatnonzero(first != last):  # windows that span shards
            parts, index, at, end = [], int(first[row]), int(starts[row]), int(starts[row]) + length
            while at < end:
                begin = int(self.starts[index])
                parts.append(self.shards[index][at - begin : end - begin])
                index, at = index + 1, at + len(parts[-1])
            out[row] = np.concatenate(parts)
        return out


@dataclass(frozen=True)
class SampleOrder:
    """The order of the windows: start positions as a pure function of (seed, index of the sample). random: independent
    uniform offsets, as in nanoGPT. shuffled: a window every `stride` tokens, each once per epoch in a new random order;
    each epoch starts at another offset below the stride, so texts are cut at different places."""

    tokens: int
    block_size: int
    order: Literal["random", "shuffled"] = "random"
    stride: int | None = None
    seed: int = 1337
    shifts: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)
    """(step, samples): from this step on, the numbers of the samples are higher by this amount."""
    samples = math.inf  # after which the data is used up

    @property
    def last_start(self) -> int:
        return self.tokens - 1 - self.block_size  # the targets need one more token than the inputs

    @property
    def windows_per_epoch(self) -> int:
        spacing = self.stride or self.block_size
        return (self.last_start - min(spacing - 1, self.last_start)) // spacing + 1

    def begins_epoch(self, step: int, batch: int) -> bool:
        """Whether a new epoch (not the first) starts in this step. batch: sequences per step."""
        epoch, before = (
            (self.first_sample(at, batch) + batch - 1) // self.windows_per_epoch for at in (step, step - 1)
        )
        return step > 0 and epoch > before

    def first_sample(self, step: int, batch: int) -> int:
        """The number of the first sample of a step."""
        return step * batch + next((shift for begin, shift in reversed(self.shifts) if begin <= step), 0)

    def starts(self, step: int, batch: int) -> np.ndarray:
        """Start positions of the global batch of `step`: (batch,) int64."""
        if self.order == "random":
            # a counter-based generator keyed by the step needs no earlier draws
            return generator(self.seed, step).integers(0, self.last_start + 1, size=batch)
        index = np.arange(batch) + self.first_sample(step, batch)
        epochs, places = np.divmod(index, self.windows_per_epoch)
        out = np.empty(batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = _epoch_starts(self, int(epoch))[places[here]]
        return out


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch_starts(order: SampleOrder, epoch: int) -> np.ndarray:
    """The ordered start positions of one epoch of shuffled windows: (windows_per_epoch,) int64."""
    spacing = order.stride or order.block_size
    rng = generator(order.seed, epoch)
    shift = int(rng.integers(0, min(spacing - 1, order.last_start) + 1))
    return rng.permutation(order.windows_per_epoch) * spacing + shift


def generator(seed: int, counter: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), counter]))


class BatchLoader:
    """The batches of one process: contiguous rows of the global batch, which is the same for any number of processes. A
    background thread prepares the next batch during a step."""

    def __init__(
        self, data: TokenData, order: SampleOrder, batch: int, device: torch.device, rank: int = 0, world_size: int = 1,
        vocab_size: int | None = None, tokens: Tensor | None = None,
    ):  # fmt: skip
        """vocab_size: get() raises DataError for an id outside it, in case a file has changed. tokens: the tokens of
        data on the device (see load_on_device), read instead of the files."""
        assert batch % world_size == 0
        self.data, self.order, self.batch, self.device = data, order, batch, device
        self.vocab_size, self.tokens, self.world_size = vocab_size, tokens, world_size
        self.rows = slice(rank * batch // world_size, (rank + 1) * batch // world_size)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: tuple[int, SampleOrder, Future[list[Tensor]]] | None = None

    def get(self, step: int) -> tuple[Tensor, ...]:
        """Inputs and targets of `step`: (rows, block_size) int64 each, on the device. Of packed documents also their
        numbers, (rows, block_size), and the share of each row in the loss, (rows,)."""
        import torch

        known, order, ahead = self.ahead or (None, None, None)
        made = ahead.result() if ahead and known == step and order is self.order else self._make(step, self.order)
        self.ahead = (step + 1, self.order, self.worker.submit(self._make, step + 1, self.order))
        both, *others = (part.to(self.device, non_blocking=True) for part in made)
        if self.tokens is not None:
            places = both[:, None] + torch.arange(self.order.block_size, device=self.device)  # (B, T)
            both = self.tokens[torch.stack((places, places + 1))].long()  # (2, B, T)
        return both[0], both[1], *others

    def _make(self, step: int, order: SampleOrder) -> list[Tensor]:
        import torch

        starts = order.starts(step, self.batch)
        made = [starts[self.rows]]
        if self.tokens is None:
            made = self.data.batch(starts, order.block_size, self.rows, self.world_size, self.vocab_size)
        batch = map(torch.from_numpy, made)
        return [part.pin_memory() for part in batch] if self.device.type == "cuda" else list(batch)

    def close(self) -> None:
        self.worker.shutdown(wait=True, cancel_futures=True)


def load_on_device(
    device: torch.device, data: TokenData, vocab_size: int | None, wanted: bool | Literal["auto"],
    say: Callable[[str], None],
) -> Tensor | None:  # fmt: skip
    """All tokens of a split on the device, (N,) int32. None: read them from the files. auto: on CUDA, if they are small
    compared with its free memory. Checks every id, so that batches need no check. Raises UserError if they were
    requested and do not fit, and DataError for a bad id or file."""
    import torch

    from ..machine.device import is_out_of_memory

    size, requested = len(data) * TOKEN_BYTES, wanted is True
    if wanted == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        wanted = size <= min(MAX_ON_DEVICE, DEVICE_SHARE * free)
    if not wanted:
        return None
    try:
        tokens = torch.empty(len(data), dtype=torch.int32, device=device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if not requested:
            say(f"data: the training tokens do not fit on {device}; reading them from the files")
            return None
        raise UserError(
            f"--data_on_device=True: the {size / (1 << 30):.1f} GiB of the training tokens do not fit on {device}; "
            "use --data_on_device=auto"
        ) from None
    at, bound = 0, min(vocab_size or 1 << 31, 1 << 31)
    for shard in data.shards:
        for begin in range(0, len(shard), BLOCK):
            part = np.asarray(shard[begin : begin + BLOCK])
            refuse_outside(data.shards, data.name, bound, at, part)
            tokens[at : at + len(part)].copy_(torch.from_numpy(part.astype(np.int32)))
            at += len(part)
    say(f"data: the training tokens are kept on {device} ({size / (1 << 20):,.0f} MiB; --data_on_device)")
    return tokens
