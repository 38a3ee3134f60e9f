"""Time from process start to the end of the first step: llm-train quick and nanoGPT's command for a CPU.

python benchmarks/startup.py --nanogpt=DIR [--data=DIR] [--rounds=5] [--threads=N] [SETTING ...]

Fresh processes, interleaved. Both evaluate before the first step, as by default; the time before that is printed too.
--data: a folder with train.bin, val.bin and meta.pkl of tiny Shakespeare's characters, by default that of the nanoGPT
checkout. SETTINGs are those of llm-train. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contenders import arguments, environment, machine, nanogpt_readme


def seconds(command: list[str], folder: Path, threads: int) -> tuple[float, float]:
    """(seconds to the end of the first evaluation, and to the end of the first step)."""
    evaluated = 0.0
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment(threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if re.match(r"step 0(:|/\d+) +train loss", line):
                evaluated = time.perf_counter() - begin
            if re.match(r"iter 0:|step 0/\d+  loss", line):
                return evaluated, time.perf_counter() - begin
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    raise SystemExit(f"{' '.join(command)} has made no step:\n{''.join(said)[-2000:]}")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options, settings = parser.parse_known_args()
    if options.nanogpt is None and options.data is None:
        parser.error("give --nanogpt=DIR, --data=DIR or both")
    data = (options.data or options.nanogpt / "data" / "shakespeare_char").resolve()
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            here = Path(name)
            ours = [sys.executable, "-m", "llm_from_scratch.cli.train", "quick", f"--dataset={data}",
                    f"--out_dir={here / 'ours'}", "--progress=lines", *settings]  # fmt: skip
            found.setdefault("ours", []).append(seconds(ours, here, options.threads))
            if options.nanogpt is not None:
                theirs = nanogpt_readme(data, here / "nanogpt")
                found.setdefault("nanogpt", []).append(seconds(theirs, options.nanogpt, options.threads))
    result = {}
    for name, times in found.items():
        evaluated, stepped = (statistics.median(values) for values in zip(*times, strict=True))
        first = [step for _, step in times]
        result[name] = {"evaluated_s": evaluated, "first_step_s": stepped, "min": min(first), "max": max(first)}
        print(f"{name}: first step after {stepped:.2f} s ({min(first):.2f} to {max(first):.2f}), "
              f"first evaluation after {evaluated:.2f} s")  # fmt: skip
    print(json.dumps({**machine(), "threads": options.threads, "rounds": options.rounds, "settings": settings,
                      "found": result}))  # fmt: skip


if __name__ == "__main__":
    main()
