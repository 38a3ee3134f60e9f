"""Matrices shared among processes: which process computes which, and the exchange of the results.

Each process holds all matrices (DDP) or some rows of each (FSDP2). Every matrix has an owner, which computes its step.
The work goes in rounds: in a round, each process computes a batch of matrices of one shape, while the results of the
previous round are on their way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..machine.processes import gather
from .sharding import local, rows_of


class Matrix(NamedTuple):
    """Rows begin to end of a parameter."""

    name: str
    p: Tensor
    begin: int
    end: int

    @property
    def height(self) -> int:
        return self.end - self.begin

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) with the longer side horizontal."""
        short, long = sorted((self.height, self.p.size(1)))
        return short, long

    @property
    def gradient(self) -> Tensor:
        """Gradient of the whole parameter. Parameters without a gradient are left out of a step."""
        assert self.p.grad is not None
        return self.p.grad

    def lying(self, matrix: Tensor) -> Tensor:
        """Transposed if it is higher than wide. Twice gives the original."""
        return matrix.mT if self.height > self.p.size(1) else matrix


Batch = list[Matrix]  # of one shape


def matrices_of(group: dict[str, Any]) -> Iterator[Matrix]:
    """The matrices that are stacked in the parameters of a group; "rows" has their heights."""
    for name, p, heights in zip(group["names"], group["params"], group["rows"], strict=True):
        ends = list(itertools.accumulate(heights))
        yield from (Matrix(name, p, end - height, end) for height, end in zip(heights, ends, strict=True))


def rounds(matrices: Sequence[Matrix], processes: int, limit: int) -> Iterator[list[Batch]]:
    """The rounds, each with a batch of at most `limit` elements for every process; it is empty if a process has fewer.

    Matrices are assigned from the most expensive on, each to the process with the least work. The cost is that of the
    products: rows^2 x columns."""
    work, shares = [0] * processes, [dict[tuple[int, int], Batch]() for _ in range(processes)]
    for matrix in sorted(matrices, key=lambda m: -m.shape[0] ** 2 * m.shape[1]):
        owner = work.index(min(work))
        work[owner] += matrix.shape[0] ** 2 * matrix.shape[1]
        shares[owner].setdefault(matrix.shape, []).append(matrix)
    of_each: list[list[Batch]] = []
    for share in shares:
        of_each.append([])
        for (short, long), alike in share.items():
            at_once = max(1, limit // (short * long))
            of_each[-1] += [alike[first : first + at_once] for first in range(0, len(alike), at_once)]
    return (list(one) for one in itertools.zip_longest(*of_each, fillvalue=[]))


class Whole:
    """Every process holds whole matrices. The owners' results go to all."""

    sharded = False

    def __init__(self, processes: int):
        self.processes, self.rank = processes, torch.distributed.get_rank() if processes > 1 else 0

    def of(self, m: Matrix, tensor: Tensor) -> Tensor:
        """The rows of a matrix that this process holds, of its parameter or of a tensor of the same shape."""
        return tensor[m.begin : m.end]

    def skipped(self, m: Matrix) -> int:
        """The elements of a matrix before the part that this process holds."""
        return 0

    def collect(self, batches: list[Batch], held: list[list[Tensor]]) -> Tensor | None:
        """The own batch of a round, (n, rows, columns), the longer side horizontal; None if it is empty. held: what
        this process holds of the matrices of each batch."""
        own = [m.lying(rows) for m, rows in zip(batches[self.rank], held[self.rank], strict=True)]
        return torch.stack(own) if own else None

    def send(self, batches: list[Batch], own: Tensor | None, like: Tensor) -> Callable[[], list[list[Tensor]]]:
        """Sends the results of the own batch. Returns a function that waits, and returns the results of each batch in
        the form of `held`. like: a tensor with their dtype and device."""
        if self.processes == 1:
            assert own is not None
            return lambda: [[m.lying(x) for m, x in zip(batches[0], own, strict=True)]]
        sizes = [sum(m.height * m.p.size(1) for m in batch) for batch in batches]
        mine, all_of_them = like if own is None else own.flatten(), like.new_empty(self.processes, max(sizes))
        if missing := max(sizes) - mine.numel():
            mine = torch.cat([mine, like.new_zeros(missing)])
        arrive = gather(mine, all_of_them.view(-1))

        def wait() -> list[list[Tensor]]:
            arrive()
            found = []
            for batch, size, flat in zip(batches, sizes, all_of_them, strict=True):
                parts = flat[:size].view(-1, *batch[0].shape) if batch else ()
                found.append([m.lying(x) for m, x in zip(batch, parts, strict=True)])
            return found

        return wait


class Sharded:
    """Every process holds some rows of each matrix. They are gathered by the owner, and the results return."""

    sharded = True

    def __init__(self, p: Any):
        """p: a parameter, sharded as the others. With several groups (HSDP), each group does all the work."""
        mesh, dim = p.device_mesh, p.device_mesh.ndim - 1
        self.group, self.processes, self.rank = mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim)

    def _within(self, m: Matrix, rank: int) -> tuple[int, int]:
        """The rows of a matrix that a process holds, counted from the matrix's first."""
        held = rows_of(m.p.size(0), self.processes, rank)
        first, last = (min(max(row, m.begin), m.end) - m.begin for row in (held.start, held.stop))
        return first, last

    def of(self, m: Matrix, tensor: Tensor) -> Tensor:
        first, last = self._within(m, self.rank)
        begin = m.begin + first - rows_of(m.p.size(0), self.processes, self.rank).start
        return local(tensor)[begin : begin + last - first]

    def skipped(self, m: Matrix) -> int:
        return self._within(m, self.rank)[0] * m.p.size(1)

    def _exchange(self, pieces: list[list[Tensor]], sizes: list[list[int]], like: Tensor) -> Callable[[], list[Any]]:
        """Sends pieces[r] to process r. Returns a function that waits, and returns what came from each process, in
        pieces of sizes[r] elements."""
        flat = [torch.cat([piece.flatten() for piece in part]) if part else like.new_empty(0) for part in pieces]
        received = like.new_empty(sum(map(sum, sizes)))
        sent = torch.distributed.all_to_all_single(
            received,
            torch.cat(flat),
            [sum(part) for part in sizes],
            [t.numel() for t in flat],
            self.group,
            async_op=True,
        )

        def wait() -> list[Any]:
            sent.wait()
            parts = received.split([sum(part) for part in sizes])
            return [part.split(of_one) for part, of_one in zip(parts, sizes, strict=True)]

        return wait

    def _sizes(self, batch: Batch, rank: int) -> list[int]:
        """Elements of each matrix that a process holds."""
        return [(last - first) * m.p.size(1) for m in batch for first, last in [self._within(m, rank)]]

    def collect(self, batches: list[Batch], held: list[list[Tensor]]) -> Tensor | None:
        own, like = batches[self.rank], next(rows for part in held for rows in part)
        of_each = self._exchange(held, [self._sizes(own, rank) for rank in range(self.processes)], like)()
        whole = [torch.cat(pieces).view(m.height, -1) for m, *pieces in zip(own, *of_each, strict=True)]
        return torch.stack([m.lying(matrix) for m, matrix in zip(own, whole, strict=True)]) if own else None

    def send(self, batches: list[Batch], own: Tensor | None, like: Tensor) -> Callable[[], list[list[Tensor]]]:
        pieces: list[list[Tensor]] = [[] for _ in range(self.processes)]
        for m, result in zip(batches[self.rank], () if own is None else own, strict=True):
            for rank, part in enumerate(pieces):
                first, last = self._within(m, rank)
                part.append(m.lying(result)[first:last])
        wait = self._exchange(pieces, [self._sizes(batch, self.rank) for batch in batches], like)

        def shaped() -> list[list[Tensor]]:
            both = zip(batches, wait(), strict=True)
            return [[x.view(-1, m.p.size(1)) for m, x in zip(batch, parts, strict=True)] for batch, parts in both]

        return shaped
