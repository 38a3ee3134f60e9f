"""Several datasets as one: windows in given proportions, in an order that is a pure function of (seed, step).

A sample has a number, and its part and its number within the part follow from it by arithmetic: at every length of a
run, a part has its share of the samples to within one or two. Nothing is drawn from earlier samples, so that any step
begins at once. Within an epoch of a part, its windows are in random order and none repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from ..mixture import Part
from .dataset import SampleOrder, TokenData, generator
from .packing import PackedData, shares_of
from .tokenfile import BackgroundScan

ONE = 24  # bits of a fraction; numbers of samples may have 39
ROUNDS = 6  # of the permutation
CHUNK = 4096  # samples
U32 = np.uint64(0xFFFFFFFF)


class Mixture(TokenData):
    """A split of a mixture: the tokens of its parts one after the other, or the rows of their documents."""

    def __init__(self, names: Sequence[Part], parts: Sequence[TokenData]):
        super().__init__([shard for part in parts for shard in part.shards], ", ".join(part.name for part in names))
        self.names, self.parts = tuple(names), tuple(parts)
        self.marks = [shard for part in parts for shard in part.marks]
        self.is_packed = any(part.is_packed for part in parts)
        learned = [part.learned for part in parts if isinstance(part, PackedData)]
        self.learned = np.concatenate(learned or [np.empty(0, np.int64)])
        self.first = np.cumsum([0, *map(len, learned or parts)])  # row or token of each part, and the end

    @property
    def weighted(self) -> list[tuple[str, float, TokenData]]:
        if len(self.parts) == 1:
            return [("", 1.0, self.parts[0])]
        return [(part.name, part.weight, data) for part, data in zip(self.names, self.parts, strict=True)]

    @property
    def positions(self) -> int:
        return sum(part.positions for part in self.parts)

    def check(self, block_size: int, vocab_size: int | None, remember: bool = True) -> BackgroundScan | None:
        for part in self.parts:
            part.check(block_size, None)
            part.vocab_size = vocab_size
        return super().check(1, vocab_size, remember)

    def order(self, block_size: int, kind: Literal["random", "shuffled"], stride: int | None, seed: int) -> MixedOrder:
        orders = tuple(part.order(block_size, kind, stride, seed) for part in self.parts)
        first = tuple(self.first[:-1].tolist())
        total, length = sum(order.tokens for order in orders), orders[0].block_size
        spacing = stride or length
        groups = tuple(max(1, part.group // spacing) if part.group else 0 for part in self.parts)
        return MixedOrder(total, length, kind, stride, seed, self.names, orders, first, groups)

    def batch(
        self, starts: np.ndarray, block_size: int, share: slice, processes: int = 1, vocab_size: int | None = None
    ) -> list[np.ndarray]:
        if not self.is_packed:
            return super().batch(starts, block_size, share, processes, vocab_size)
        mine = starts[share]
        which = np.searchsorted(self.first, mine, side="right") - 1
        used = np.unique(which).tolist()
        each = [self._packed(index).rows(mine[which == index] - self.first[index]) for index in used]
        back = np.argsort(np.argsort(which, kind="stable"))  # from the order of the parts to that of the batch
        tokens, numbers = (np.concatenate(some, axis=-2)[..., back, :] for some in zip(*each, strict=True))
        return [tokens, numbers, shares_of(self.learned, starts, share, processes)]

    def _packed(self, index: int) -> PackedData:
        part = self.parts[index]
        assert isinstance(part, PackedData)
        return part


@dataclass(frozen=True)
class Phase:
    """Windows between two ends of parts, from `begin` on."""

    begin: int
    counts: tuple[int, ...]
    """Windows of each part before the phase."""
    split: tuple[tuple[int, int], ...]
    """(part, its share of the remainder after the earlier parts), in units of 2^-ONE; the last part gets the rest."""

    def parts(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each sample, and its number within the part: (N,) int64 each."""
        part, number = np.empty_like(samples), np.empty_like(samples)
        where, left = np.arange(len(samples)), samples - self.begin
        for index, share in self.split:
            before, after = _rounded(left, share), _rounded(left + 1, share)
            here = after > before
            part[where[here]], number[where[here]] = index, self.counts[index] + before[here]
            where, left = where[~here], (left - before)[~here]
        return part, number

    def counts_at(self, sample: int) -> list[int]:
        """Samples of each part before this one."""
        counts, left = list(self.counts), sample - self.begin
        for index, share in self.split:
            taken = int(_rounded(left, share))
            counts[index] += taken
            left -= taken
        return counts


@dataclass(frozen=True)
class MixedOrder(SampleOrder):
    """The order of the windows of a mixture. Every part has an order of its own, and its share of the samples. A part
    without epochs left leaves its share to the others, in proportion to their weights."""

    parts: tuple[Part, ...] = ()
    orders: tuple[SampleOrder, ...] = ()
    first: tuple[int, ...] = ()
    """Start position of each part."""
    groups: tuple[int, ...] = ()
    """Of each part, how many neighbouring windows are shuffled together; 0: all."""
    phases: tuple[Phase, ...] = field(init=False)
    samples: float = field(init=False, default=math.inf)
    """Windows until all parts are used up."""
    made: dict[int, np.ndarray] = field(init=False, default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", self._phases())
        if all(part.max_epochs is not None for part in self.parts):
            object.__setattr__(self, "samples", self.phases[-1].begin)

    @property
    def windows_per_epoch(self) -> int:
        """Windows of all parts."""
        return sum(order.windows_per_epoch for order in self.orders)

    def begins_epoch(self, step: int, batch: int) -> bool:
        return False  # the parts begin theirs at different steps

    def limit(self, part: int) -> float:
        """The number of samples after which a part is used up."""
        epochs = self.parts[part].max_epochs
        return math.inf if epochs is None else max(1, int(epochs * self.orders[part].windows_per_epoch))

    def starts(self, step: int, batch: int) -> np.ndarray:
        begin, end = step * batch, (step + 1) * batch
        found = np.concatenate([self._chunk(n) for n in range(begin // CHUNK, -(-end // CHUNK))], axis=1)
        which, starts = found[:, begin % CHUNK :][:, :batch]
        if self.order == "shuffled":
            return starts
        ends = np.array([order.last_start + 1 for order in self.orders])
        return np.array(self.first)[which] + generator(self.seed, step).integers(0, ends[which])

    def _chunk(self, number: int) -> np.ndarray:
        """Parts and shuffled starts of CHUNK samples, (2, CHUNK), which are made at once to save time."""
        if (found := self.made.get(number)) is None:
            which, numbers = self.assigned(np.arange(number * CHUNK, (number + 1) * CHUNK))
            found = np.stack((which, self._shuffled(which, numbers)))
            if len(self.made) > 1:
                self.made.clear()
            self.made[number] = found
        return found

    def _shuffled(self, which: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        out = np.array(self.first)[which]
        epochs, places = np.divmod(numbers, np.array([order.windows_per_epoch for order in self.orders])[which])
        for index, epoch in {*zip(which.tolist(), epochs.tolist(), strict=True)}:
            here = (which == index) & (epochs == epoch)
            out[here] += self._epoch(index, epoch, places[here])
        return out

    def _epoch(self, part: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Start positions in a part's tokens of the samples at these places of an epoch."""
        order = self.orders[part]
        spacing, count = order.stride or order.block_size, order.windows_per_epoch
        rng = generator(self.seed, epoch << 16 | part)
        shift = int(rng.integers(0, min(spacing - 1, order.last_start) + 1))
        keys, size = rng.integers(0, 1 << 32, ROUNDS, np.uint64), self.groups[part] or count
        groups = rng.permutation(-(-count // size))
        ends = np.cumsum(np.minimum(size, count - groups * size))
        which, out = np.searchsorted(ends, places, side="right"), np.empty_like(places)
        for at in np.unique(which).tolist():
            begin, first, here = int(ends[at - 1]) if at else 0, int(groups[at]) * size, which == at
            out[here] = first + permuted(places[here] - begin, int(ends[at]) - begin, keys + np.uint64(first))
        return out * spacing + shift

    def assigned(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each sample, and its number within the part."""
        which = np.searchsorted([phase.begin for phase in self.phases], samples, side="right") - 1
        part, number = np.empty_like(samples), np.empty_like(samples)
        for index in np.unique(which).tolist():
            here = which == index
            part[here], number[here] = self.phases[index].parts(samples[here])
        return part, number

    def counts(self, samples: int) -> list[int]:
        """Samples of each part among the first ones."""
        return next(phase for phase in reversed(self.phases) if phase.begin <= samples).counts_at(samples)

    def _phases(self) -> tuple[Phase, ...]:
        begin, counts, phases = 0, [0] * len(self.parts), list[Phase]()
        while True:
            active = [i for i, n in enumerate(counts) if n < self.limit(i)]
            is_over = not active  # only a run that rolled back comes here: then all parts begin again
            active = active or list(range(len(self.parts)))
            weights = [self.parts[i].weight for i in active]
            shares = [max(1, round(w / sum(weights[at:]) * (1 << ONE))) for at, w in enumerate(weights)]
            phases.append(phase := Phase(begin, tuple(counts), tuple(zip(active, shares, strict=True))))
            limited = [i for i in active if self.limit(i) < math.inf]
            if is_over or not limited:
                return tuple(phases)
            begin = min(self._reaches(phase, i) for i in limited)
            counts = phase.counts_at(begin)

    def _reaches(self, phase: Phase, part: int) -> int:
        """The first number of samples that have all of a part's."""
        low, step = phase.begin, 1
        while phase.counts_at(low + step)[part] < self.limit(part):
            step *= 2
        high = low + step
        while low + 1 < high:
            middle = (low + high) // 2
            is_enough = phase.counts_at(middle)[part] >= self.limit(part)
            low, high = (low, middle) if is_enough else (middle, high)
        return high

    def lines(self, samples: int) -> list[str]:
        """The expected epochs of the parts in the first samples, and when a part is used up."""
        each = [
            f"{part.name} {part.weight:.1%} of the windows ({count / order.windows_per_epoch:.2f} epochs)"
            for part, order, count in zip(self.parts, self.orders, self.counts(samples), strict=True)
        ]
        if len(each) == 1:
            return []
        lines = [f"mixture: {', '.join(each)}"]
        for phase in self.phases[1:]:
            used = [part.name for i, part in enumerate(self.parts) if phase.counts[i] >= self.limit(i)]
            if phase.begin < samples and len(used) < len(self.parts):
                lines.append(
                    f"mixture: after {phase.begin:,} windows, {', '.join(used)} reached max_epochs; then only the "
                    "other parts are used"
                )
        return lines

    def refuse_longer(self, samples: int, batch: int) -> None:
        """Raises UserError if a run of so many samples needs more epochs than the parts may have."""
        if samples > self.samples:
            steps = int(self.samples) // batch
            raise UserError(
                f"with max_epochs on every part, the mixture is enough for {steps:,} steps, but the run has "
                f"{samples // batch:,}: raise or remove one max_epochs, or set --max_iters={steps}"
            )


def _rounded(samples: Any, share: int) -> Any:
    return (samples * share + (1 << ONE - 1)) >> ONE


def permuted(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """The elements at these places of a random order of range(count), without making the order: a Feistel network over
    the next larger power of 4, applied again to what falls outside the range (cycle walking)."""
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    found, outside = places.astype(np.uint64), np.ones(len(places), bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[outside] = left << half | right
        outside = found >= count
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A hash of 32-bit numbers (the finisher of MurmurHash3)."""
    x = (x ^ x >> np.uint64(16)) * np.uint64(0x85EBCA6B) & U32
    x = (x ^ x >> np.uint64(13)) * np.uint64(0xC2B2AE35) & U32
    return x ^ x >> np.uint64(16)
