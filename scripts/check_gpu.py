"""Reports the accelerator that PyTorch can use, and what to do if it does not find the GPU."""

from __future__ import annotations

import shutil
import subprocess

import torch


def driver_sees_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        return subprocess.run([command, "-L"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def main() -> int:
    print(f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'none (CPU build)'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            bf16 = "bfloat16" if gpu.major >= 8 else "float16"
            print(f"cuda:{index}  {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, sm_{gpu.major}{gpu.minor}, {bf16}")
    elif torch.backends.mps.is_available():
        print("mps     Apple GPU")
    else:
        print(f"no GPU: training runs on the CPU with {torch.get_num_threads()} threads")
        if driver_sees_gpu():
            why = "this is torch's CPU build" if torch.version.cuda is None else "its driver is too old for this torch"
            print(f"nvidia-smi sees a GPU, but {why}; for the CUDA build delete .venv and run ./just setup")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
