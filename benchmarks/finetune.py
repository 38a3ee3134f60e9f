"""Full finetuning compared with LoRA, with the same text, weights and time (or steps): held-out loss, peak memory and
trained parameters. --peft: also the speed of LoRA with peft and transformers.

python benchmarks/finetune.py --model=MODEL.gguf --text=FILE [--minutes=10 | --steps=N] [--rank=4] [--block_size=256]
       [--batch=8] [--methods=full,lora] [--rates=full:5e-5,lora:2e-3] [--windows=16] [--peft] [--threads=N]
       [SETTING ...]

The text is prepared with the model's tokenizer in a temporary folder. Each method trains in a fresh process; the peak
is its resident memory (VmHWM). The learning rate warms up and stays constant. The loss is measured on the same windows
of the validation split before, in the middle and at the end. Speed is in tokens per second of processor time, which
other programs change little. SETTINGs are those of llm-train. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SPEED_STEPS = 3  # of the comparison with peft, after a first one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--methods", default="full,lora")
    parser.add_argument("--rates", default="full:5e-5,lora:2e-3")
    parser.add_argument("--windows", type=int, default=16, help="of the validation split")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--threads", type=int)
    options, settings = parser.parse_known_args()
    rates = dict(pair.split(":") for pair in options.rates.split(","))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(options, Path(folder))
        common = [f"--init_from={options.model}", f"--dataset={data}", f"--block_size={options.block_size}",
                  f"--batch_size={options.batch}", "--gradient_accumulation_steps=1", "--max_iters=100000",
                  "--schedule=constant", "--warmup_iters=10", "--weight_decay=0.0", "--dropout=0.0", "--beta2=0.95",
                  "--progress=none", "--tensorboard=False", "--loss_plot=False"]  # fmt: skip
        common += [f"--threads={options.threads}"] if options.threads else []
        for method in options.methods.split(","):
            own = [f"--lora_rank={options.rank}"] if method == "lora" else []
            own += [f"--out_dir={folder}/{method}", f"--learning_rate={rates[method]}"]
            results[method] = child(
                "train", options.steps or options.minutes / 1e3, [*common, *own, *settings], options.windows
            )
            show(method, results[method])
        if options.peft:
            own = [f"--lora_rank={options.rank}", f"--out_dir={folder}/speed"]
            ours = [child("speed", 0, [*common, *own, *settings]) for _ in range(2)]
            export = [sys.executable, "-m", "llm_from_scratch.cli.export", f"--checkpoint={options.model}"]
            subprocess.run([*export, f"--output={folder}/hf"], check=True, stdout=subprocess.DEVNULL)
            words = [f"{folder}/hf", str(options.rank), str(options.batch), str(options.block_size)]
            theirs = child("peft", options.threads or 0, words)
            speed = max(one["tokens_per_s"] for one in ours)
            results["speed"] = {"ours": speed, "peft": theirs["tokens_per_s"], "peak_peft": theirs["peak"]}
            other = theirs["tokens_per_s"]
            print(f"tokens/s: ours {speed:,.0f}, peft {other:,.0f}: {speed / other:.2f} x")
    if {"full", "lora"} <= set(results):
        full, lora = results["full"], results["lora"]
        print(
            f"LoRA against full: loss {lora['losses'][-1] - full['losses'][-1]:+.4f}, "
            f"peak {lora['peak'] / full['peak']:.2f}, {lora['trained'] / lora['params']:.2%} of the parameters train"
        )
    print(json.dumps({"model": Path(options.model).name, "minutes": options.minutes, "rank": options.rank,
                      "block_size": options.block_size, "batch": options.batch, "found": results}))  # fmt: skip


def show(method: str, found: dict[str, Any]) -> None:
    losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
    print(
        f"{method}: val loss {losses}; {found['steps']} steps, {found['tokens_per_s']:,.0f} tokens/s; peak "
        f"{found['peak'] / 2**20:,.0f} MiB; {found['trained']:,} of {found['params']:,} parameters train",
        flush=True,
    )


def prepared(options: Any, folder: Path) -> Path:
    """The text as token files, with the model's tokenizer; its last tenth is the validation split."""
    from llm_from_scratch.checkpoint.load import load

    tokenizer = load(options.model, weights_only=True).tokenizer
    assert tokenizer is not None
    ids = np.asarray(tokenizer.encode(Path(options.text).read_text(encoding="utf-8")))
    data, cut = folder / "data", len(ids) * 9 // 10
    data.mkdir()
    tokenizer.save(data)
    for name, part in (("train", ids[:cut]), ("val", ids[cut:])):
        part.astype("<u2").tofile(data / f"{name}.bin")
    return data


def child(what: str, number: float, words: list[str], windows: int = 0) -> dict[str, Any]:
    """The last line of a fresh process of this program, as JSON."""
    command = [sys.executable, __file__, f"--child={what}", str(number), str(windows), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak() -> int:
    """Bytes of this process's largest resident memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def train(amount: float, windows: int, words: list[str]) -> dict[str, Any]:
    """amount: steps, or below 1: thousandths of a minute. windows: of the loss; 0: the speed of a few steps alone."""
    from llm_from_scratch.config import Config
    from llm_from_scratch.presets import parse
    from llm_from_scratch.training.evaluate import estimate_loss
    from llm_from_scratch.training.opening import open_run
    from llm_from_scratch.training.trainer import train_step

    parsed, is_speed = parse(Config, words, prog="finetune.py"), not windows
    with open_run(parsed.tree, parsed.sources, "llm-train", None) as run:
        block_size = run.config.model.block_size

        def loss() -> float:
            return estimate_loss(run.models.compiled, run.plan.val_data, block_size, windows, run.runtime, 4)

        def done() -> float:
            """The part of the run that is behind."""
            of = SPEED_STEPS if is_speed else amount if amount >= 1 else amount * 1e3 * 60
            return (steps if is_speed or amount >= 1 else time.perf_counter() - began) / of

        losses, steps, spent = [] if is_speed else [loss()], -1 if is_speed else 0, 0.0
        began = time.perf_counter()
        while done() < 1:
            begin, before = time.process_time(), done()
            train_step(run, *run.next_batch())
            run.report_steps(wait=True)
            steps += 1
            spent += time.process_time() - begin if steps else 0.0  # the first one of a measurement of speed
            if not is_speed and (before < 0.5 <= done() or done() >= 1):
                losses.append(loss())
        sizes, tokens = run.plan.sizes, steps * run.plan.tokens_per_step
        return {"losses": losses, "steps": steps, "tokens_per_s": tokens / spent, "peak": peak(),
                "trained": sizes.trained, "params": sizes.params}  # fmt: skip


def train_peft(threads: int, words: list[str]) -> dict[str, Any]:
    """LoRA on all linear layers by peft, with a plain loop and torch's AdamW, on random tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if threads:
        torch.set_num_threads(threads)
    folder, rank, batch, block_size = words[0], *map(int, words[1:])
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(base.config.vocab_size, (batch, block_size + 1), generator=torch.Generator().manual_seed(0))
    begin = 0.0
    for step in range(1 + SPEED_STEPS):
        begin = time.process_time() if step == 1 else begin
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.process_time() - begin
    return {"tokens_per_s": SPEED_STEPS * batch * block_size / seconds, "peak": peak()}


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("--child="):
        number, windows, rest = float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
        is_peft = sys.argv[1] == "--child=peft"
        print(json.dumps(train_peft(int(number), rest) if is_peft else train(number, windows, rest)))
    else:
        main()
