"""Tokens per second of training steps: ours, nanoGPT's train.py, transformers' GPT-2 and litgpt, interleaved.

python benchmarks/throughput.py [--nanogpt=DIR] [--litgpt=PYTHON] [--cases=cpu-readme,char,char-nodrop,gpt2]
       [--contenders=ours,floor] [--rounds=7] [--turn=1.0] [--threads=N] [SETTING ...]

A step is batch, forward, backward, clipping and optimizer. The contenders take turns of --turn seconds, --rounds times;
a figure is the median over the turns, a ratio the median of the ratios within a round. "floor" is our step's matrix
products alone, each by the fastest library; "x floor" is a contender's time divided by the floor's. Cases for a
GPU: cuda-gpt2, cuda-char. SETTINGs are those of llm-train, such as --compile=False, and apply to ours only. Prints a
table, and a line of JSON last.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from contenders import CASES, NAMES, Case, Contender, arguments, lined_up, machine, present

CPU_CASES = "cpu-readme,char,char-nodrop,gpt2"


def measured(contenders: list[Contender], case: Case, rounds: int, turn: float) -> dict[str, list[float]]:
    """{name: tokens/s of each round}."""
    turns: dict[str, int] = {}
    for contender in contenders:
        contender.ask(0)  # wait for the imports of all contenders
    for contender in contenders:
        contender.per_step(case.log_interval)  # compiles, makes the optimizer's moments
        once = contender.per_step(case.log_interval)
        turns[contender.name] = case.log_interval * max(1, round(turn / once / case.log_interval))
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for index in range(rounds):
        for contender in contenders if index % 2 == 0 else contenders[::-1]:
            rates[contender.name].append(case.tokens / contender.per_step(turns[contender.name]))
    return rates


def _ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--cases", default=CPU_CASES)
    parser.add_argument("--contenders", default=",".join(NAMES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of training before the next contender's turn")
    options, settings = parser.parse_known_args()
    results: dict[str, Any] = {}
    print(f"{'case':<12} {'contender':<13} {'ms/step':>9} {'tokens/s':>10} {'from':>10} {'to':>10} {'ours is':>8} "
          f"{'x floor':>8}")  # fmt: skip
    for label in options.cases.split(","):
        case, found = CASES[label], {}
        with tempfile.TemporaryDirectory() as name:
            contenders: list[Contender] = []
            try:
                contenders += lined_up(present(options), case, options.threads, settings, Path(name))
                rates = measured(contenders, case, options.rounds, options.turn)
            finally:
                for contender in contenders:
                    contender.close()
        for who, values in rates.items():
            middle = statistics.median(values)
            ratio, above = (_ratio(rates.get(other, values), values) for other in ("ours", "floor"))
            found[who] = {"tokens_per_s": middle, "min": min(values), "max": max(values), "ours_is": ratio}
            found[who] |= {"x_floor": above} if "floor" in rates else {}
            print(f"{label:<12} {who:<13} {case.tokens / middle * 1e3:>9.2f} {middle:>10,.0f} {min(values):>10,.0f} "
                  f"{max(values):>10,.0f} {f'{ratio:.2f} x' if who not in ('ours', 'floor') else '':>8} "
                  f"{f'{above:.2f}' if 'floor' in rates else '':>8}", flush=True)  # fmt: skip
        results[label] = found
    print(json.dumps({**machine(), "threads": options.threads, "rounds": options.rounds, "turn_s": options.turn,
                      "settings": settings, "cases": results}))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
