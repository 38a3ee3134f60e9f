"""launch/slurm.sh under a stand-in for Slurm on this machine: signal, kill at the time limit, requeue, until the run is
complete. Then its weights are compared with those of an uninterrupted run.

python benchmarks/slurm.py [--limit=60] [--warning=30] [--nodes=2] -- quick --dataset=NAME --max_iters=200
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SRUN = """#!/bin/bash
# one task per node; a signal is passed on to all of them
[[ $1 == --kill* ]] && shift
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" & tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    until wait "$task"; last=$?; ! kill -0 "$task" 2>/dev/null; do :; done
    ((last)) && code=$last
done
exit $code
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo localhost ;;
    requeue) touch "$STAND_IN/requeued" ;;
esac
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=60, help="seconds after which a job is killed")
    parser.add_argument("--warning", type=float, default=30, help="seconds before that for SIGTERM; 0: none")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("argv", nargs="+", help="arguments of llm-train")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        for command, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / command).write_text(text)
            (folder / command).chmod(0o755)
        jobs = _jobs(folder, options, f"--out_dir={folder / 'cut'}")
        options.limit, options.warning = 3600, 0
        _jobs(folder, options, f"--out_dir={folder / 'whole'}")
        cut, whole = (_weights(folder / run) for run in ("cut", "whole"))
    print(json.dumps({"jobs": jobs, "step": cut[0], "equal": cut == whole}))
    return int(cut != whole)


def _jobs(folder: Path, options: argparse.Namespace, *more: str) -> int:
    """Runs the script until it is not queued again. Returns how often it ran."""
    for count in range(100):
        job = f"{os.getpid()}{count}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (folder / "requeued").unlink(missing_ok=True)
        script = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "slurm.sh"), *options.argv, *more], start_new_session=True,
            env={
                **os.environ, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PORT": str(port),
                "STAND_IN": str(folder), "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "localhost", "OMP_NUM_THREADS": "1",
                "SLURM_NNODES": str(options.nodes), "SLURM_GPUS_ON_NODE": "1", "SLURM_RESTART_COUNT": str(count),
            },
        )  # fmt: skip
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                script.wait(options.limit - options.warning)
            if script.poll() is None and options.warning:
                script.send_signal(signal.SIGTERM)  # to the script only, as --signal=B:TERM
                with contextlib.suppress(subprocess.TimeoutExpired):
                    script.wait(options.warning)
            killed = script.poll() is None
        finally:
            _kill_job(job)
            script.wait()
        print(f"job {count}: {'killed' if killed else f'ended with {script.returncode}'}", flush=True)
        if killed:  # Slurm queues a job again that it has ended at its limit only if the script has asked for it
            continue
        if not (folder / "requeued").exists():
            if script.returncode:
                raise SystemExit("the run failed")
            return count + 1
    raise SystemExit("the run does not end")


def _kill_job(job: str) -> None:
    """Every process of the job, as Slurm finds them by their control group."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"\0SLURM_JOB_ID={job}\0".encode() in b"\0" + environ.read_bytes():
                os.kill(int(environ.parent.name), signal.SIGKILL)
    time.sleep(0.5)


def _weights(out_dir: Path) -> tuple[int, str]:
    last = max(out_dir.glob("step-*"))
    parts = sorted(last.glob("model*.safetensors"))
    return int(last.name[5:]), "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in parts)


if __name__ == "__main__":
    sys.exit(main())
