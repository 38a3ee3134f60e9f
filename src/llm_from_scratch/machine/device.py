"""Device, precision, processes and seeds: resolved and printed once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..config import SystemConfig
from ..errors import UserError
from . import processes
from .memory import keep_freed_memory
from .processes import distributed_env
from .processes import stop as stop

OLD_ISAS = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}  # oneDNN's names
LARGE = 1 << 26  # parameters above which memory is the limit on a CPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense peak of the matrix units, FLOP/s, from the makers' data sheets: (name part, {dtype: peak})
PEAKS = [
    ("H200", {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 494e12}),
    ("H100 PCIe", {torch.bfloat16: 756e12, torch.float16: 756e12, torch.float32: 378e12}),
    ("H100", {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 494e12}),
    ("A100", {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 156e12}),
    ("L40S", {torch.bfloat16: 362e12, torch.float16: 362e12, torch.float32: 183e12}),
    ("A10G", {torch.bfloat16: 70e12, torch.float16: 70e12, torch.float32: 35e12}),
    ("V100", {torch.float16: 125e12, torch.float32: 15.7e12}),
    ("T4", {torch.float16: 65e12, torch.float32: 8.1e12}),
    ("RTX 4090", {torch.bfloat16: 165e12, torch.float16: 165e12, torch.float32: 82.6e12}),
    ("RTX 3090", {torch.bfloat16: 71e12, torch.float16: 71e12, torch.float32: 35.6e12}),
]


@dataclass(frozen=True)
class Runtime:
    """The device, precision and processes of the run."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    compile_may_fail: bool
    """Whether a failing compilation falls back to eager (compile=auto) or stops the run (compile=True)."""
    rank: int
    world_size: int
    backend: str
    threads: int | None
    """CPU threads; None leaves torch's own choice."""
    reasons: dict[str, str]
    """Setting -> what was chosen and why, for the announcement."""
    products: dict[str, str] | None = None
    """Libraries of the linear layers' products on a CPU (kernels/products.py); None: to be measured."""
    parallel: str = "ddp"
    """How processes share the model: ddp, fsdp or hsdp."""
    shards: int = 1
    """Processes that share one copy of the model."""
    compiled_layers: bool = False
    """Whether layers run in C on a CPU (kernels/layers.py)."""
    one_call: bool | None = None
    """Whether a training step is one call in C (kernels/tape.py); None: to be measured."""

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded (FSDP2), so that every forward pass needs all processes."""
        return self.parallel != "ddp"

    @property
    def can_regroup(self) -> bool:
        """Whether processes can start another exchange of gradients after a failed one."""
        return self.world_size > 1 and self.backend == "gloo" and not self.is_sharded

    @property
    def peak_flops(self) -> float | None:
        """The device's dense peak in FLOP/s at this precision; None if unknown (every CPU)."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peaks.get(self.dtype) for part, peaks in PEAKS if part in name), None)

    def place(self, model: Any, keep_memory: bool = False) -> None:
        """Moves a model to the device and sets its compute dtype. The weights stay float32. keep_memory: freed memory
        is kept for a large model too; see keep_freed_memory."""
        model.to(self.device)
        model.compute_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else None
        if self.device.type == "cpu":
            keep_freed_memory(keep_memory or model.get_num_params() < LARGE)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast for float16, which has too small a range for some operations. bfloat16 needs none (see place)."""
        if self.dtype != torch.float16:
            return contextlib.nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self.dtype)


def resolve_device(name: str = "auto") -> torch.device:
    """auto: CUDA, then Apple's MPS, then the CPU. Raises UserError for a missing device."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"--device={name}: torch {torch.__version__} does not find a CUDA device; use --device=cpu")
        if (device.index or 0) >= count:
            more = f" to cuda:{count - 1}" if count > 1 else ""
            raise UserError(f"--device={name}: torch finds only cuda:0{more}")
    if device.type == "mps" and not has_mps:
        raise UserError("--device=mps: torch does not find an Apple GPU; use --device=cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights for generation. auto: bfloat16 on CUDA if supported, else float16; float32 elsewhere."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return DTYPES[name]


def cpu_has_native_bf16() -> bool:
    """Whether torch multiplies bfloat16 in hardware here: the processor has AVX-512 BF16 or AMX, and no environment
    variable restricts torch (ATEN_CPU_CAPABILITY) or oneDNN to older instructions."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    restricted = limit in OLD_ISAS or not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return not restricted and any(getattr(torch.cpu, probe, bool)() for probe in probes)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def forked_random(device: torch.device) -> Iterator[None]:
    """Restores the random generators of the CPU and of this device afterwards."""
    before = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    if before is not None:
        torch.mps.set_rng_state(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: CUDA's own error, or that of torch's CPU allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def resolve(config: SystemConfig) -> Runtime:
    """Chooses device, precision and compilation for this machine. Starts nothing. Raises UserError."""
    rank, local_rank, world = distributed_env()
    device = resolve_device(config.device)
    if device.type == "cuda" and world > 1:
        device = resolve_device(f"cuda:{local_rank}")
    if device.type == "mps" and world > 1:
        raise UserError("several processes cannot share an Apple GPU; run without torchrun")
    dtype = resolve_dtype(config.dtype, device)
    if config.dtype == "auto" and device.type == "cpu" and cpu_has_native_bf16():
        dtype = torch.bfloat16  # faster than float32 if the CPU multiplies it
    backend = ("nccl" if device.type == "cuda" else "gloo") if config.backend == "auto" else config.backend
    if backend == "nccl" and device.type != "cuda" and world > 1:
        raise UserError(f"--backend=nccl needs CUDA devices, the device is {device}; use --backend=gloo")
    compiles = config.compile if isinstance(config.compile, bool) else device.type == "cuda" and has_triton()
    if config.cuda_graphs is True and not (device.type == "cuda" and compiles and world == 1):
        raise UserError(
            f"--cuda_graphs=True needs one process that compiles (--compile=True) for a CUDA device; the device is "
            f"{device}, compile {'on' if compiles else 'off'}, processes {world}; leave it at auto"
        )
    found = {"device": device, "dtype": str(dtype).removeprefix("torch."), "compile": "on" if compiles else "off"}
    reasons = {
        name: f"{value} ({'chosen for this machine' if getattr(config, name) == 'auto' else 'as set'})"
        for name, value in found.items()
    }
    if device.type == "cpu" and dtype == torch.bfloat16 and not cpu_has_native_bf16():
        reasons["dtype"] += "; this processor emulates bfloat16, float32 is faster"
    if device.type == "cuda":
        reasons["device"] += f", {torch.cuda.get_device_name(device)}"
    return Runtime(device, dtype, compiles, config.compile == "auto", rank, world, backend, config.threads, reasons)


def wait(device: torch.device) -> None:
    """Returns when the device has done what was asked of it."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def start(runtime: Runtime, config: SystemConfig) -> None:
    """Applies the choice: threads, TF32, seeds, and the process group under torchrun."""
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if (runtime.world_size > 1 or runtime.is_sharded) and not torch.distributed.is_initialized():
        processes.start(runtime.backend, runtime.rank, runtime.world_size, config.collective_timeout)
    # each process drops out other activations; weights are broadcast from rank 0
    torch.manual_seed(config.seed + runtime.rank)
