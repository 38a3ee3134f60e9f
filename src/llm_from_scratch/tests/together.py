"""Threads that act as the processes of a run."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from llm_from_scratch.checkpoint.shards import Place
from llm_from_scratch.machine.team import Team

T = TypeVar("T")
PATIENCE = 300.0  # seconds that a member waits for the others


class Member(Team):
    """One of several threads. What they send each other is pickled, as between processes."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier):
        super().__init__()
        self.rank, self.size, self.values, self.barrier = rank, len(values), values, barrier

    def gather(self, value: T) -> list[T]:
        self.values[self.rank] = pickle.dumps(value)
        self.barrier.wait(PATIENCE)
        values = [pickle.loads(data) for data in self.values]
        self.barrier.wait(PATIENCE)
        return values


def together(size: int, work: Callable[[Team], T]) -> list[T | Exception]:
    """The results of work(member) for each member of a team of threads, or what it raised."""
    barrier, values = threading.Barrier(size), [b""] * size

    def one(rank: int) -> T | Exception:
        try:
            return work(Member(rank, values, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def chunk_of(given: dict[str, Any], team: Team) -> dict[str, Any]:
    """Contents of a checkpoint with only a member's chunk of every tensor, as FSDP gives each process some rows."""
    parts: dict[str, Place] = {}

    def of(tensors: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        own = {}
        for name, tensor in tensors.items():
            chunks = tensor.chunk(team.size) if tensor.dim() else [tensor]
            if team.rank < len(chunks):
                own[name] = chunks[team.rank]
                if tensor.dim():
                    begin = sum(len(chunk) for chunk in chunks[: team.rank])
                    parts[prefix + name] = Place(0, begin, len(tensor))
        return own

    state = {name: of(slots, f"{name}/") for name, slots in given["optimizer"]["state"].items()}
    own = {"model": of(given["model"]), "optimizer": given["optimizer"] | {"state": state}}
    return given | own | {"parts": parts}
