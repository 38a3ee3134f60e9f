"""Memory of the machine: free, total, peak; the allocator's settings; reused memory of large tensors."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_REUSED = 1 << 20  # bytes of a tensor
USES: Any = getattr(torch._C, "_storage_Use_Count", None)  # private: without it, memory is not reused
_own = threading.local()  # memory: the active ReusedMemory of a thread
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
    saves a sixth of a step, because new pages are zeroed, and needs about a fifth more memory. What is free now, as
    after a model was loaded, is returned either way. Other C libraries have no mallopt."""
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0 if keep else 1 << 16)
        libc.mallopt(mmap_threshold, 2 << 20)
        libc.mallopt(trim_threshold, (1 << 31) - 1 if keep else 1 << 20)
        libc.malloc_trim(0)


class ReusedMemory:
    """Memory of large tensors on a CPU, for the next ones of the same size. glibc 2.36 cannot do that: it allocates an
    aligned block in a larger one and frees the ends, so that a freed block is too small for its own size, and stays a
    hole between tensors that live longer. Used as a context, for its thread; what it holds is freed with it."""

    def __init__(self) -> None:
        self.blocks: dict[int, list[torch.UntypedStorage]] = {}  # by size

    def __enter__(self) -> None:
        _own.memory = self

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        _own.memory = None
        if kind is not None:  # perhaps memory ran out, and the next sizes are others
            self.blocks.clear()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        blocks = self.blocks.setdefault(math.prod(shape) * dtype.itemsize, [])
        for block in blocks:
            if USES(block._cdata) == 1:  # no tensor has it
                return torch.empty(0, dtype=dtype).set_(block).view(shape)
        made = torch.empty(shape, dtype=dtype)
        blocks.append(made.untyped_storage())
        return made


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU, in reused memory if the tensor is large and a ReusedMemory is active."""
    found: ReusedMemory | None = getattr(_own, "memory", None)
    if found is None or USES is None or math.prod(shape) * dtype.itemsize < LEAST_REUSED:
        return torch.empty(shape, dtype=dtype)
    return found.empty(shape, dtype)


def empty_like(tensor: Tensor) -> Tensor:
    return empty(tensor.shape, tensor.dtype) if tensor.is_contiguous() else torch.empty_like(tensor)


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
