"""Wall-clock time from process start to exit, and the loss: a command of ours and nanoGPT's command for a CPU.

python benchmarks/time_to_loss.py --nanogpt=DIR [--data=DIR] [--rounds=1] [--threads=N] [--target=1.898]
       [--ours="llm-train speedrun"]

The loss is that of the whole validation split in adjacent windows of 64 tokens, computed by each project's own model
from its checkpoint. --data: a folder with train.bin, val.bin and meta.pkl of tiny Shakespeare's characters, by default
that of the nanoGPT checkout. Seeds: --seed of round k is 1337 + k for ours; nanoGPT
has only one. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import arguments, environment, machine, nanogpt_readme

WINDOW = 64


def run(command: list[str], folder: Path, threads: int) -> float:
    """The duration of a command in seconds. The command must succeed."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(threads), capture_output=True, text=True)
    took = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} has failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return took


def loss_of(kind: str, place: Path, data: Path, nanogpt: Path | None, threads: int) -> float:
    """The loss over the whole validation split, computed in a separate process."""
    job = json.dumps({"kind": kind, "place": str(place), "data": str(data), "nanogpt": str(nanogpt)})
    done = subprocess.run([sys.executable, __file__, "--child", job], env=environment(threads), capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the loss of {kind} could not be computed:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def evaluated(job: dict[str, str]) -> float:
    """Mean cross-entropy over all tokens but the first, in neighbouring windows, in float32."""
    import numpy as np
    import torch

    model = loaded(job).float().eval()
    tokens = torch.from_numpy(np.fromfile(Path(job["data"]) / "val.bin", dtype="<u2").astype(np.int64))
    whole = (len(tokens) - 1) // WINDOW * WINDOW
    x, y = tokens[:whole].view(-1, WINDOW), tokens[1 : whole + 1].view(-1, WINDOW)
    parts = list(zip(x.split(256), y.split(256), strict=True))
    parts += [(tokens[whole:-1][None], tokens[whole + 1 :][None])] if whole < len(tokens) - 1 else []
    total = 0.0
    with torch.no_grad():
        for inputs, targets in parts:
            total += float(model(inputs, targets)[1]) * targets.numel()
    return total / (len(tokens) - 1)


def loaded(job: dict[str, str]) -> Any:
    """The final model of a run."""
    import torch

    if job["kind"] == "nanogpt":
        sys.path.insert(0, job["nanogpt"])
        from model import GPT, GPTConfig  # type: ignore[attr-defined]

        saved = torch.load(Path(job["place"]) / "ckpt.pt", map_location="cpu")
        model = GPT(GPTConfig(**saved["model_args"]))
        model.load_state_dict(saved["model"])
        return model
    from llm_from_scratch.checkpoint.load import load
    from llm_from_scratch.core.model import GPT as Ours

    found = load(job["place"], which="last", weights_only=True, need_tokenizer=False)
    ours = Ours(found.model_config)
    ours.load_state_dict(found.model)
    return ours


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--target", type=float, default=1.898)
    parser.add_argument("--ours", default="llm-train speedrun")
    options = parser.parse_args()
    if options.nanogpt is None and options.data is None:
        parser.error("give --nanogpt=DIR, --data=DIR or both")
    data = (options.data or options.nanogpt / "data" / "shakespeare_char").resolve()
    words = shlex.split(options.ours)
    if words[0] == "llm-train":
        words[:1] = [sys.executable, "-m", "llm_from_scratch.cli.train"]
    found: dict[str, list[tuple[float, float]]] = {}
    for index in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            here = Path(name)
            ours = [*words, f"--dataset={data}", f"--out_dir={here / 'ours'}", f"--seed={1337 + index}"]
            took = run(ours, here, options.threads)
            found.setdefault("ours", []).append((took, loss_of("ours", here / "ours", data, None, options.threads)))
            print(f"ours: {took:.1f} s, loss {found['ours'][-1][1]:.4f}", flush=True)
            if options.nanogpt is not None:
                checkout = options.nanogpt.resolve()
                took = run(nanogpt_readme(data, here / "nanogpt"), checkout, options.threads)
                loss = loss_of("nanogpt", here / "nanogpt", data, checkout, options.threads)
                found.setdefault("nanogpt", []).append((took, loss))
                print(f"nanogpt: {took:.1f} s, loss {loss:.4f}", flush=True)
    result = {}
    for name, pairs in found.items():
        times, losses = zip(*pairs, strict=True)
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        reached = sum(loss <= options.target for loss in losses)
        result[name] = {"seconds": statistics.median(times), "loss": statistics.fmean(losses), "spread": spread,
                        "reached": reached, "losses": losses, "times": times}  # fmt: skip
        print(f"{name}: {statistics.median(times):.1f} s in the median, loss {statistics.fmean(losses):.4f} +- "
              f"{spread:.4f}; {options.target} reached by {reached} of {len(losses)}")  # fmt: skip
    if "nanogpt" in found:
        ratio = statistics.median(b[0] / a[0] for a, b in zip(found["ours"], found["nanogpt"], strict=True))
        print(f"ours is {ratio:.2f} times as fast")
    print(json.dumps({**machine(), "threads": options.threads, "ours": options.ours, "target": options.target,
                      "window": WINDOW, "found": result}))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(evaluated(json.loads(sys.argv[2])))
    else:
        main()
