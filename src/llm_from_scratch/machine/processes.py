"""Processes: torchrun's variables, process groups, reductions over ranks, and the children that multiprocessing and
torch.compile start. Imports torch only to communicate."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SharedError, TrainingError, UserError
from .watch import Watch

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

watch: Watch | None = None
"""The watch over the processes of this process group."""
LONGEST = timedelta(hours=1)  # that processes wait for a healthy one, such as one that writes a long sample
FIRST_POLL = 0.2  # seconds between looks whether rank 0 is done
_kept: list[Any] = []  # stores of after_first: rank 0 may serve them, and start() uses them again
YOUNG, OLD = 1.5, 30.0  # seconds that a command's imports take, and that they take at most on a busy machine


def distributed_env() -> tuple[int, int, int]:
    """(rank, local rank, world size) from torchrun; (0, 0, 1) without it. Raises UserError if it is half set."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 0, 1
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the distributed environment is incomplete: {', '.join(missing)} missing; start with torchrun, "
            "or unset RANK and WORLD_SIZE"
        )
    try:
        rank, local_rank, world, port = (int(os.environ[name]) for name in names if name != "MASTER_ADDR")
    except ValueError:
        raise UserError(
            "RANK, LOCAL_RANK, WORLD_SIZE and MASTER_PORT must be whole numbers; start with torchrun"
        ) from None
    if not 0 <= port < 1 << 16:
        raise UserError(f"MASTER_PORT={port} must be between 0 and 65535")
    if not 0 <= rank < world or local_rank < 0:
        raise UserError(f"RANK={rank} must be between 0 and WORLD_SIZE - 1 = {world - 1}")
    return rank, local_rank, world


def launch() -> str:
    """Identifies this start of torchrun: the same after its restarts. Empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return name if name != "none" else f"{platform.node()}-{os.getppid()}"


def is_restarted() -> bool:
    """Whether torchrun has started the processes again after one of them failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def may_restart() -> bool:
    """Whether torchrun starts the processes again if one of them fails."""
    most, done = (os.environ.get(f"TORCHELASTIC_{name}") or "0" for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return int(done) < int(most)


def process_age(otherwise: float) -> float:
    """Seconds since this process started. `otherwise`: the answer if the start is unknown, or if the process is so
    old that it must have done something else before."""
    with contextlib.suppress(OSError, AttributeError, ValueError, IndexError):
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
        if 0 <= age < OLD:
            return age
    return min(otherwise, YOUNG)


def device_mesh(device: torch.device, world_size: int, shards: int) -> DeviceMesh:
    """All processes, in groups of `shards` neighbours: (shard,), or (replicate, shard) for several groups."""
    from torch.distributed.device_mesh import init_device_mesh

    if shards == world_size:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))


def after_first(work: Callable[[], None], timeout: float) -> None:
    """Rank 0 does the work, and the others wait until it is done. Before start(). timeout: seconds until all are there.
    Raises UserError; if rank 0's work raises it, it does so in every process."""
    rank, _, world = distributed_env()
    if world == 1:
        return work()
    store, shared = _meeting("gloo", rank, world, timeout)
    _kept.append(store)
    if rank == 0:
        outcome = "rank 0 has failed"
        try:
            work()
            outcome = ""
        except UserError as error:
            outcome = str(error)
            raise
        finally:
            shared.set("first", json.dumps(outcome))
        return None
    try:
        while not (found := _read(shared, "first")):
            time.sleep(FIRST_POLL)
    except RuntimeError:  # torch's errors of a store that is gone
        found = json.dumps("rank 0 has ended")
    if outcome := json.loads(found):
        raise SharedError(outcome)
    return None


def _meeting(backend: str, rank: int, world_size: int, timeout: float) -> tuple[Any, Any]:
    """Waits until all processes are there. Returns two connections to the store of this meeting: one for torch, and one
    for other threads. Raises UserError, with the likely reason, if the processes do not find each other."""
    import torch.distributed as dist

    from .preflight import diagnosed

    missing: list[int] | None = None
    patience, address, port = timedelta(seconds=timeout), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=patience))
        shared = dist.TCPStore(address, port, timeout=patience, wait_for_workers=False)
        prefix, missing = meet(shared, rank, world_size, timeout)
        if missing:
            raise RuntimeError(f"no answer within {timeout:g} s (--collective_timeout)")
        return dist.PrefixStore(prefix, store), dist.PrefixStore(prefix, shared)
    except (RuntimeError, ValueError) as error:
        raise diagnosed(error, backend, rank, missing) from None


def start(backend: str, rank: int, world_size: int, timeout: float) -> None:
    """Joins the other processes of torchrun and begins to watch them. timeout: seconds that an exchange may take.
    Raises UserError, with the likely reason, if the processes do not find each other."""
    global watch
    import torch.distributed as dist

    from .preflight import diagnosed

    patience = timedelta(seconds=timeout)
    store, own = _meeting(backend, rank, world_size, timeout)
    found = Watch(own, rank, world_size, timeout)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
        dist.barrier()
        # from here on the watch ends what hangs, and a healthy process may be waited for longer
        dist.distributed_c10d._set_pg_timeout(max(patience, LONGEST))
        found.begin()
        watch = found
    except (RuntimeError, ValueError) as error:
        raise diagnosed(error, backend, rank, found.missing()) from None


def meet(store: Any, rank: int, world_size: int, timeout: float) -> tuple[str, list[int]]:
    """A name for this meeting of the processes, and the ranks that have not come. The store may hold what processes of
    an earlier start have left, so each one waits until rank 0 has seen its own new token."""
    token, ranks, end = secrets.token_hex(8), range(world_size), time.monotonic() + timeout
    store.set(f"token/{rank}", token)
    missing = [other for other in ranks if other != rank]
    while missing and time.monotonic() < end:
        tokens = {other: _read(store, f"token/{other}") for other in (ranks if rank == 0 else [rank])}
        if rank == 0:
            store.set("meeting", json.dumps([token, tokens]))
            missing = [other for other in ranks[1:] if _read(store, f"came/{other}") != f"{token} {tokens[other]}"]
        elif (found := _read(store, "meeting")) and json.loads(found)[1].get(str(rank)) == token:
            store.set(f"came/{rank}", f"{json.loads(found)[0]} {token}")
            return json.loads(found)[0], []
        time.sleep(0.02)
    return token, [other for other in missing if rank == 0 or not _read(store, f"token/{other}")] or missing[:1]


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def stop() -> None:
    """Leaves the process group, if there is one."""
    global watch
    import torch.distributed as dist

    if watch is not None:
        watch.end()
        watch = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def moved() -> None:
    """Shows the watch that this process moves, in a loop in which its stack stays the same."""
    if watch is not None:
        watch.moves += 1


def join(thread: threading.Thread) -> None:
    """Waits for a thread that works for the one that trains. The watch looks at its stack meanwhile."""
    found = watch
    if found is None:
        thread.join()
        return
    before, found.trainer = found.trainer, thread.ident or found.trainer
    try:
        thread.join()
    finally:
        found.trainer = before


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """A failed exchange becomes a TrainingError that names the process that caused it. Any other error that ends this
    process is made known to the others as their reason to end."""
    try:
        yield
    except BaseException as error:
        if watch is None:
            raise
        if not is_failed_exchange(error):
            watch.fail(error)
            raise
        raise TrainingError(watch.explain(error)) from None


def is_failed_exchange(error: BaseException) -> bool:
    """Whether an error is that of an exchange with another process, which has gone or does not answer."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "pair closure"))


def is_refused_exchange(error: BaseException) -> bool:
    """Whether an exchange failed although every process still runs: one of them has left it."""
    return watch is not None and is_failed_exchange(error) and not watch.knows_the_reason()


def wait_for_all(world_size: int) -> None:
    """Returns when every process has called it."""
    if world_size > 1:
        import torch.distributed as dist

        dist.barrier()


def sum_over_ranks(values: list[float], device: torch.device, world_size: int) -> list[float]:
    """The sums over all processes, in float64."""
    if world_size == 1:
        return values
    import torch

    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def gather(own: torch.Tensor, found: torch.Tensor) -> Callable[[], None]:
    """Sends a tensor to all processes. Returns a function that waits until everybody's tensors are in `found`, one
    after the other by rank."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    # else gloo's messages end after the start's timeout
    longest = max(LONGEST, timedelta(seconds=watch.timeout)) if watch else LONGEST
    patience = [longest] if dist.get_backend() == "gloo" else []
    if patience:  # gloo's all_gather copies everything twice more
        parts, others = found.view(len(ranks), *own.shape), [other for other in ranks if other != rank]
        wanted = [dist.P2POp(dist.irecv, parts[other], other) for other in others]
        works = dist.batch_isend_irecv(wanted + [dist.P2POp(dist.isend, own, other) for other in others])
        parts[rank].copy_(own)
    else:
        together = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        works = [together(found, own, async_op=True)]

    def wait() -> None:
        for work in works:
            work.wait(*patience)

    return wait


def largest(value: float, device: torch.device, world_size: int) -> float:
    """The largest value of any process."""
    if world_size == 1:
        return value
    import torch

    found = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.item()


def any_rank(condition: bool, device: torch.device, world_size: int) -> bool:
    """Whether the condition is true in one of the processes."""
    return sum_over_ranks([float(condition)], device, world_size)[0] > 0


def shield_children() -> None:
    """Keeps the working directory out of the module search of child processes: `python -c` searches it first, so a
    ctypes.py in a downloaded folder would run there. Call it before any is started. Python 3.10 has no switch for this,
    so there it raises UserError if the directory holds a module that would shadow another."""
    os.environ["PYTHONSAFEPATH"] = "1"  # ours is already running: only the children read it
    if sys.version_info < (3, 11) and (names := shadowing(Path.cwd())):
        raise UserError(
            f"child processes of Python 3.10 would import {names[0]} of the working directory instead of the real "
            "module: rename it, start from another directory, or use Python 3.11"
        )


def end_with_parent() -> None:
    """Ends this child when its parent ends. A worker of a killed run would wait forever, or write where the next run
    works."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def shadowing(folder: Path) -> list[str]:
    """The names of files and packages in a folder that a child would import in place of modules it needs."""
    loaded = {name.partition(".")[0]: vars(module).get("__file__") for name, module in [*sys.modules.items()] if module}
    own = {name for name, file in loaded.items() if file and Path(file).is_relative_to(folder)}
    needed = sys.stdlib_module_names | loaded.keys() - own
    return sorted(path.name for path in folder.iterdir() if path.name.partition(".")[0] in needed and _is_module(path))


def _is_module(path: Path) -> bool:
    if path.is_dir():  # without an __init__ it is found only if nothing else is
        return any(path.glob("__init__.*"))
    return path.suffix in (".py", ".pyc", ".so", ".pyd")
