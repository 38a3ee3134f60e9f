"""Damaged files of every format: each must give text or an error that names the file, in bounded memory and time.

python benchmarks/fuzz_sources.py [--files=10000] [FORMAT ...]"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from llm_from_scratch.data.sources import FileSource
from llm_from_scratch.errors import UserError
from llm_from_scratch.tests.data.samples import damaged, samples

MEMORY, SECONDS = 1 << 30, 10.0


def run(name: str, files: int) -> dict[str, object]:
    """The outcomes of damaged copies of a file, in this process."""
    content, _ = samples()[name]
    results, slowest = Counter[str](), 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = Path(folder, name)
        list(_pieces(path, content))  # loads the libraries
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for seed in range(files):
            begin = time.perf_counter()
            try:
                list(_pieces(path, damaged(content, random.Random(f"{name} {seed}"))))
                results["text"] += 1
            except UserError as error:
                results["named error" if name in str(error) and "\n" not in str(error) else "UNNAMED"] += 1
            except BaseException as error:
                results["CRASH"] += 1
                print(f"{name} seed {seed}: {error!r}", file=sys.stderr)
            took = time.perf_counter() - begin
            slowest = max(slowest, took)
            results["SLOW"] += took > SECONDS
        left = [file for file in os.listdir(folder) if file != name]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {**+results, "slowest s": round(slowest, 2), "MiB": peak, "files left": len(left)}


def _pieces(path: Path, content: bytes) -> list[tuple[str, bool]]:
    path.write_bytes(content)
    return list(FileSource(path).pieces())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("formats", nargs="*")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(run(options.here, options.files)))
        return 0
    bad = False
    for name in options.formats or samples():
        command = [sys.executable, __file__, f"--here={name}", f"--files={options.files}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout) if done.returncode == 0 else {"DIED": done.returncode}
        bad |= any(key.isupper() and key != "MiB" for key in result)
        print(f"{name:12}", ", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
