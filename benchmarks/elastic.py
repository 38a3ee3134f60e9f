"""torchrun --nnodes=1:2 here: a second node joins, then its torchrun is killed. The weights are compared with
those of uninterrupted runs with the same numbers of processes.

python benchmarks/elastic.py --join=3 --leave=4 -- quick --dataset=NAME --max_iters=400 --save_interval=20 \\
    --eval_interval=100000 --n_layer=2 --n_embd=64 --n_head=2 --compile=False    # 3 minutes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["-m", "llm_from_scratch.cli.train", "--device=cpu", "--backend=gloo", "--init_from=auto"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--join", type=float, default=5, help="seconds from the first step to the second node")
    parser.add_argument("--leave", type=float, default=5, help="seconds until it is killed")
    parser.add_argument("argv", nargs="+", help="arguments of llm-train, with --max_iters=N")
    options = parser.parse_args()
    last = int(next(word for word in options.argv if word.startswith("--max_iters=")).partition("=")[2])
    with tempfile.TemporaryDirectory(prefix="elastic-") as name:
        cut, whole = Path(name) / "cut", Path(name) / "whole"
        parts = _elastic(Path(name), cut, options)
        ends = [begin for _, begin in parts[1:]] + [last]
        for (processes, _), end in zip(parts, ends, strict=True):
            command = [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}", *TRAIN, *options.argv]
            command += [f"--out_dir={whole}", f"--max_iters={end}", f"--lr_decay_iters={last}"]
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
        equal = _weights(cut) == _weights(whole)
    print(json.dumps({"parts": [{"processes": count, "from_step": begin} for count, begin in parts], "equal": equal}))
    return int(not equal)


def _elastic(folder: Path, out_dir: Path, options: argparse.Namespace) -> list[tuple[int, int]]:
    """Runs until the end. Returns (processes, first step) of each start that trained."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    last = next(word for word in options.argv if word.startswith("--max_iters=")).partition("=")[2]
    command = [
        *TORCHRUN, "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=5", "--rdzv_backend=c10d", "--rdzv_id=elastic",
        f"--rdzv_endpoint=localhost:{port}", "--rdzv_conf=last_call_timeout=2,join_timeout=60", *TRAIN, *options.argv,
        f"--out_dir={out_dir}", f"--lr_decay_iters={last}",
    ]  # fmt: skip
    # without the second variable, torchrun 2.13 waits a minute for a node that joins, and fails
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = folder / "log.txt"
    with open(log, "w") as output:
        first = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _await_steps(out_dir, 1, first, log)
        time.sleep(options.join)
        second = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while "processes: 2" not in log.read_text():
            assert first.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
        _await_steps(out_dir, len((out_dir / "metrics.jsonl").read_text().splitlines()) + 2, first, log)
        time.sleep(options.leave)
        second.send_signal(signal.SIGKILL)
        second.wait()
        code = first.wait()
        assert code == 0, log.read_text()[-2000:]
    starts = re.split(r"^(?=(?:resuming from \S+ at step \d+|device: ))", log.read_text(), flags=re.MULTILINE)
    parts, begin = [], 0
    for text in starts:
        if resumed := re.match(r"resuming from \S+ at step (\d+)", text):
            begin = int(resumed[1])
        elif text.startswith("device: "):
            found = re.search(r"^processes: (\d+)", text, re.MULTILINE)
            parts.append((int(found[1]) if found else 1, begin))
    return [part for part, after in zip(parts, [*parts[1:], (0, -1)], strict=True) if part[1] != after[1]]


def _await_steps(out_dir: Path, lines: int, process: subprocess.Popen[bytes], log: Path) -> None:
    path = out_dir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.1)


def _weights(out_dir: Path) -> tuple[str, str]:
    last = max(out_dir.glob("step-*"))
    parts = sorted(last.glob("model*.safetensors"))
    return last.name, "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in parts)


if __name__ == "__main__":
    sys.exit(main())
