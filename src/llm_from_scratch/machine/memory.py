"""Memory of the machine: free, total, peak, and the allocator's settings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")  # control groups, version 2; memory.max holds "max" if there is no limit


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate; on a CPU within its container's limit. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _read_numbers("/proc/meminfo").get("MemAvailable:")
    used, limit = _read_numbers(CGROUP / "memory.stat").get("anon"), _container_limit()
    machine = None if available is None else available * 1024
    container = None if used is None or limit is None else max(0, limit - used)
    return min((size for size in (machine, container) if size is not None), default=None)


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device; on a CPU of the machine, or the container's limit. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _container_limit()
    return machine if limit is None else min(machine, limit)


def peak_memory(device: torch.device) -> int:
    """The most bytes used so far: on a GPU by torch's allocator, on a CPU by this process. 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (resident := _read_numbers("/proc/self/status").get("VmHWM:")) is not None:
        return resident * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory(keep: bool) -> None:
    """Whether glibc keeps freed memory for the next step or returns blocks of 2 MiB to the system at once. Keeping it
    saves a sixth of a step, because new pages are zeroed, and needs up to a fifth more memory. Other C libraries have
    no mallopt."""
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0 if keep else 1 << 16)
        libc.mallopt(mmap_threshold, 2 << 20)
        libc.mallopt(trim_threshold, (1 << 31) - 1 if keep else 1 << 20)


def _container_limit() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((CGROUP / "memory.max").read_text())
    return None


def _read_numbers(path: str | Path) -> dict[str, int]:
    """The lines `name number ...` of a file of the system. Empty if there is no such file."""
    with contextlib.suppress(OSError, ValueError):
        found = re.findall(r"^(\S+)[ \t]+(\d+)", Path(path).read_text(), re.MULTILINE)
        return {name: int(number) for name, number in found}
    return {}
