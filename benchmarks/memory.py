"""Peak memory and speed of training the 124M shape: ours, nanoGPT's train.py, transformers' GPT-2 and litgpt.

python benchmarks/memory.py [--nanogpt=DIR] [--litgpt=PYTHON] [--contenders=ours,nanogpt] [--case=gpt2-512] [--steps=3]
       [--rounds=1] [--threads=N] [SETTING ...]

Each contender trains in a fresh process, one after the other; the peak is the process's resident memory (VmHWM), or,
in the case cuda-gpt2, the memory that torch allocated on the device. SETTINGs are those of llm-train, such as
--optimizer_dtype=bfloat16; ours is then measured without and with them. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from contenders import CASES, NAMES, Contender, arguments, machine, present, write_tokens


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--contenders", default=",".join(NAMES[:4]))
    parser.add_argument("--case", default="gpt2-512")
    parser.add_argument("--steps", type=int, default=3, help="after a first one")
    parser.add_argument("--rounds", type=int, default=1)
    options, settings = parser.parse_known_args()
    case = CASES[options.case]
    places = present(options)
    entries: list[tuple[str, str, list[str]]] = [(name, name, []) for name in places]
    entries[1:1] = [(f"ours, {' '.join(settings)}", "ours", settings)] if settings else []
    found: dict[str, dict[str, list[float]]] = {label: {"peak": [], "tokens_per_s": []} for label, _, _ in entries}
    for _ in range(options.rounds):
        for label, name, extra in entries:
            with tempfile.TemporaryDirectory() as folder:
                write_tokens(Path(folder), case.vocab_size)
                contender = Contender(name, case, Path(folder), options.threads, places[name], extra)
                try:
                    contender.ask(0)
                    contender.ask(case.log_interval)
                    steps = case.log_interval * options.steps
                    answer = contender.ask(steps)
                finally:
                    contender.close()
            found[label]["peak"].append(answer["peak"])
            found[label]["tokens_per_s"].append(case.tokens * steps / answer["seconds"])
    middle: dict[str, Any] = {
        label: {key: statistics.median(values) for key, values in measured.items()} for label, measured in found.items()
    }
    for label, value in middle.items():
        value["of_nanogpt"] = value["peak"] / middle["nanogpt"]["peak"] if "nanogpt" in middle else None
        share = f", {value['of_nanogpt']:.2f} of nanoGPT's" if value["of_nanogpt"] else ""
        print(f"{label}: {value['peak'] / 2**20:,.0f} MiB{share}; {value['tokens_per_s']:,.0f} tokens/s")
    print(json.dumps({**machine(), "case": options.case, "threads": options.threads, "steps": options.steps,
                      "rounds": options.rounds, "found": middle}))  # fmt: skip


if __name__ == "__main__":
    main()
