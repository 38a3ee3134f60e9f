"""The first exchange of the processes: it shows that they reach each other and agree, and how fast; or why not."""

from __future__ import annotations

import collections
import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from ..errors import SharedError, UserError, first_line, listed

MIB = 1 << 20
MESSAGE = {"cpu": 4 * MIB, "cuda": 64 * MIB}  # bytes of the timed all-reduce
PROBE = 3.0  # seconds for a connection, when looking for the reason of a failure


def preflight(device: torch.device, facts: dict[str, Any]) -> list[str]:
    """Ranks, hosts, devices and bandwidth, in lines to print. facts: must be equal in all processes. Raises UserError,
    in every process, if they are not."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), name, facts))
    hosts: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for rank, (host, kind, theirs) in enumerate(everyone):
        hosts[host, kind].append(rank)
        for what, value in everyone[0][2].items():
            if theirs[what] != value:
                raise SharedError(
                    f"the processes do not agree: {what} is {value} on rank 0 ({everyone[0][0]}), {theirs[what]} on "
                    f"rank {rank} ({host}): start all with the same command, data and out_dir; to resume, use "
                    "--init_from=auto"
                )
    lines = [f"{host}: rank{'s' * (len(ranks) > 1)} {listed(ranks)} ({kind})" for (host, kind), ranks in hosts.items()]
    shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
    return [f"hosts: {shown}", _bandwidth(device)]


def _bandwidth(device: torch.device) -> str:
    """Bandwidth of an all-reduce, as nccl-tests count it: the bytes that each process sends, and receives."""
    size, world = MESSAGE.get(device.type, 4 * MIB), dist.get_world_size()
    data = torch.zeros(size // 4, device=device)
    best = float("inf")
    for _ in range(3):  # the first one connects
        begin = time.perf_counter()
        dist.all_reduce(data)
        data[0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    rate = 2 * (world - 1) / world * size / best
    return f"network: all-reduce of {size // MIB} MiB in {best * 1e3:.1f} ms, {rate / 1e9:.2f} GB/s per process"


def diagnosed(error: Exception, backend: str, rank: int, missing: list[int] | None) -> UserError:
    """The most likely reason that the processes do not find each other. missing: ranks that have not reached the store;
    None if this process has not."""
    address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    problem = _store_problem(address, port) if missing is None else _group_problem(backend, missing)
    return UserError(
        f"rank {rank} on {socket.gethostname()} cannot join the other processes: {problem} ({first_line(error)})"
    )


def _store_problem(address: str, port: int) -> str:
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError:
        return f"MASTER_ADDR={address} is not the name of a host: use the address of rank 0's machine"
    families = {family for family, *_ in found}
    for family, kind, _, _, place in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.settimeout(PROBE)
                probe.connect(place)
        except ConnectionRefusedError:
            reason = (
                f"nothing listens at {address}:{port}: is rank 0 running, and is MASTER_ADDR the address of its "
                "machine?"
            )
        except OSError:
            reason = f"{place[0]}:{port} does not answer: a firewall, another network, or a wrong MASTER_ADDR" + (
                f" ({address} has IPv6 addresses only)" if families == {socket.AF_INET6} else ""
            )
        else:
            return f"{address}:{port} is in use by another program: choose another port"
    return reason


def _group_problem(backend: str, missing: list[int]) -> str:
    if missing:
        return f"rank{'s' * (len(missing) > 1)} {listed(missing)} not found: look for their errors above"
    name = f"{backend.upper()}_SOCKET_IFNAME"
    others = ", ".join(interface for _, interface in socket.if_nameindex() if interface != "lo")
    chosen = f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set"
    text = f"all found MASTER_ADDR, but not each other: wrong interface ({chosen}; "
    text += f"interfaces: {others or 'none but lo'})"
    if _is_loopback():
        text += f", {socket.gethostname()} resolves to a loopback address, which other machines cannot reach"
    return text + (
        ", a firewall between the machines" + ", or InfiniBand: try NCCL_IB_DISABLE=1" * (backend == "nccl")
    )  # fmt: skip


def _is_loopback() -> bool:
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return True
