"""Does a run that was killed and resumed end with the weights of an uninterrupted one? Ours, and nanoGPT's train.py.

python benchmarks/resume.py [--nanogpt=DIR] [--data=DIR] [--threads=N]

The command of nanoGPT's README for a CPU, with STEPS steps: twice without interruption, and once killed (SIGKILL) after
the checkpoint in the middle and resumed. A figure is the largest difference of a weight to the first run; 0 means that
all bits are equal. The projects run side by side, each with half of the threads. --data: a folder with train.bin,
val.bin and meta.pkl, by default that of the nanoGPT checkout. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from contenders import ROOT, arguments, environment, machine, nanogpt_readme

STEPS = 100


def run(command: list[str], folder: Path, threads: int, kill_at: str | None = None) -> None:
    """Runs a command to its end, or kills it at the first line that starts with kill_at."""
    with subprocess.Popen(
        command, cwd=folder, env=environment(threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if kill_at is not None and line.startswith(kill_at):
                process.kill()
    if process.returncode != (-9 if kill_at else 0):
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}:\n{''.join(lines)[-2000:]}")


def weights(folder: Path) -> dict[str, Any]:
    """The last weights of a run."""
    import torch

    if (folder / "ckpt.pt").is_file():
        return torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True)["model"]
    from llm_from_scratch.checkpoint.load import load

    return load(folder, which="last", weights_only=True, need_tokenizer=False).model


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def compared(checkout: Path, data: Path, threads: int) -> dict[str, float]:
    """The differences of a second run, and of a killed and resumed run, to the first run."""
    with tempfile.TemporaryDirectory() as folder:
        first, again, killed = (Path(folder) / word for word in ("first", "again", "killed"))
        length = [f"--max_iters={STEPS}", f"--eval_interval={STEPS // 2}", "--always_save_checkpoint=True"]
        for out_dir in (first, again):
            run([*nanogpt_readme(data, out_dir), *length], checkout, threads)
        command = [*nanogpt_readme(data, killed), *length]
        run(command, checkout, threads, kill_at=f"iter {STEPS * 3 // 4}:")
        run([*command, "--init_from=resume"], checkout, threads)
        whole = weights(first)
        return {"again": difference(whole, weights(again)), "resumed": difference(whole, weights(killed))}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    if options.nanogpt is None and options.data is None:
        parser.error("give --nanogpt=DIR, --data=DIR or both")
    data = (options.data or options.nanogpt / "data" / "shakespeare_char").resolve()
    checkouts = {"ours": ROOT} | ({"nanogpt": options.nanogpt} if options.nanogpt else {})
    threads = max(1, options.threads // len(checkouts))
    with ThreadPoolExecutor() as pool:
        runs = {name: pool.submit(compared, checkout, data, threads) for name, checkout in checkouts.items()}
    found = {name: done.result() for name, done in runs.items()}
    for name, values in found.items():
        print(f"{name}: a second run differs by {values['again']:.3g}, a killed and resumed run by "
              f"{values['resumed']:.3g}", flush=True)  # fmt: skip
    print(json.dumps({**machine(), "threads": threads, "steps": STEPS, "found": found}))


if __name__ == "__main__":
    main()
