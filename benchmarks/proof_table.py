"""The table at the top of README.md, from the results of benchmarks/proof.sh in build/proof.

python benchmarks/proof_table.py [--write]

--write puts the table into README.md, between the lines <!-- proof --> and <!-- /proof -->.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"ours": "this project", "nanogpt": "nanoGPT", "transformers": "transformers", "litgpt": "litgpt",
           "llama.cpp": "llama.cpp"}  # fmt: skip
MARKS = re.compile(r"(?<=<!-- proof -->\n)(.*?)(?=<!-- /proof -->)", re.DOTALL)


def measured(folder: Path, name: str) -> dict[str, Any]:
    """The line of JSON that a benchmark ends with; warnings may follow it."""
    lines = (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return json.loads([line for line in lines if line.startswith("{")][-1])


def cells(values: dict[str, float], form: str, best: Callable[..., Any]) -> list[str]:
    """One cell per column. The best one is bold."""
    winner = best(values, key=values.__getitem__)
    shown = {name: f"**{value:{form}}**" if name == winner else f"{value:{form}}" for name, value in values.items()}
    return [shown.get(name, "") for name in COLUMNS]


def rates(case: dict[str, Any], key: str) -> dict[str, float]:
    """The median of each project. llama.cpp's label also names the form of its weights; ours has variants."""
    return {label.split(" ")[0]: found[key] for label, found in case.items() if not label.startswith("ours,")}


def table(folder: Path) -> str:
    loss, training = measured(folder, "loss"), measured(folder, "training")["cases"]["gpt2"]
    memory, decoding = measured(folder, "memory")["found"], measured(folder, "decoding")["cases"]
    resumed = {name: found["resumed"] for name, found in measured(folder, "resume")["found"].items()}
    same = {name: "different weights" if difference else "**bit-exact**" for name, difference in resumed.items()}
    rows = [
        ("time to nanoGPT's CPU loss (tiny Shakespeare, 1.90)", "time_to_loss.py", "",
         cells({name: found["seconds"] for name, found in loss["found"].items()}, ".1f", min), "s"),
        ("training GPT-2 124M", "throughput.py", "--cases=gpt2", cells(rates(training, "tokens_per_s"), ",.0f", max),
         "tokens/s"),
        ("memory to train GPT-2 124M", "memory.py", "",
         cells({name: found["peak"] / 2**20 for name, found in memory.items()}, ",.0f", min), "MiB"),
    ]  # fmt: skip
    for what, case in (
        ("decoding, 4 layers, width 128", "char-512"),
        ("decoding, GPT-2 124M, float32", "gpt2-fp32"),
        ("decoding, GPT-2 124M, 8 bits", "gpt2-int8"),
    ):
        rows.append(
            (what, "decoding.py", f"--cases={case}", cells(rates(decoding[case], "per_s"), ",.0f", max), "tokens/s")
        )
    rows.append(("resume after a kill", "resume.py", "", [same.get(name, "") for name in COLUMNS], ""))
    lines = [f"| two CPU cores | {' | '.join(COLUMNS.values())} | | measured by |", "|---" * (len(COLUMNS) + 3) + "|"]
    for what, script, option, values, unit in rows:
        command = f"[{script}](benchmarks/{script})" + (f" `{option}`" if option else "")
        lines.append(f"| {what} | {' | '.join(values)} | {unit} | {command} |")
    date = (folder / "date").read_text(encoding="utf-8").strip()
    machine = f"{loss['cpu']}, {loss['threads']} threads, torch {loss['torch']}, {date}."
    lines += ["", f"{machine} litgpt: GPT-2's sizes with rotary embeddings."]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    text = table(ROOT / "build" / "proof")
    print(text)
    if argv == ["--write"]:
        readme = ROOT / "README.md"
        content = readme.read_text(encoding="utf-8")
        assert MARKS.search(content), "README.md lacks the lines <!-- proof --> and <!-- /proof -->"
        readme.write_text(MARKS.sub(lambda _: text, content), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
