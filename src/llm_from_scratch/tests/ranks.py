"""A function of a test, called in several processes as torchrun would start them (gloo, one thread each)."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .forked import Forked, rendezvous

TCPI_BYTES_SENT = 200  # its place in struct tcp_info of Linux
PATIENCE = 300  # seconds; other tests run at the same time


def in_ranks(processes: int, function: Callable[..., Any], folder: Path, *given: Any) -> list[Any]:
    """function(*given) of each process, by rank. The function is at the top of its module. Those that still run after
    PATIENCE are killed, and the test fails."""
    job = folder / f"{function.__name__}-{processes}"
    job.mkdir()
    torch.save((function.__module__, function.__name__, given), job / "call.pt")
    with contextlib.ExitStack() as cleanup:
        shared, workers, end = cleanup.enter_context(rendezvous(processes)), [], time.monotonic() + PATIENCE
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            log = cleanup.enter_context(open(job / f"{rank}.log", "w"))
            env, once = {**os.environ, **shared, **own}, (function.__module__, "torch.distributed.fsdp")
            workers.append(Forked(__name__, str(job), env=env, stdout=log, stderr=log, imports=once))
            cleanup.callback(workers[-1].kill)
        codes = [worker.wait(max(0.0, end - time.monotonic())) for worker in workers]
        logs = [(job / f"{rank}.log").read_text() for rank in range(processes)]
        assert codes == [0] * processes, "\n".join(logs)
    return [torch.load(job / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@contextlib.contextmanager
def process_group() -> Iterator[int]:
    """The group of the processes of in_ranks(), for functions that do not train a run. Gives the rank."""
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    try:
        yield torch.distributed.get_rank()
    finally:
        torch.distributed.destroy_process_group()


def bytes_sent() -> int:
    """By the TCP connections of this process, as the kernel counts them; acknowledgements and headers do not count."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry))) as connection:
                    if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        total += struct.unpack_from("Q", info, TCPI_BYTES_SENT)[0]
    return total


def main() -> int:
    torch.set_num_threads(1)
    job = Path(sys.argv[1])
    module, name, given = torch.load(job / "call.pt", weights_only=False)
    result = getattr(importlib.import_module(module), name)(*given)
    torch.save(result, job / f"{os.environ['RANK']}.pt")
    return 0
