"""Runs that are saved and resumed by several processes: are the weights those of an uninterrupted run?

python benchmarks/resharding.py [--most=4] [--cases=ddp-adamw,fsdp-muon,...] [--every-pair]

W processes, up to --most, train 8 steps, and V resume from the checkpoint of step 4 (gloo, one thread each). With W = V
every tensor, moments included, must equal the uninterrupted run bit for bit. --every-pair: also W != V. Their figure is
the largest difference between a parameter and that of the uninterrupted run of V, relative to its norm; the cause is
the order of sums. Prints a line per case, and a line of JSON last. The exit code is 1 if a pair W = V differs. Without
--cases: every optimizer, alternately with ddp and fsdp (a case takes 1 to 2 minutes on two cores).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.tests import ranks
from llm_from_scratch.tests.shared import FOLDER
from llm_from_scratch.tests.tiny import write_data
from llm_from_scratch.tests.training.test_shares import run, state

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer_type": "adamw"},
    "muon": {"optimizer_type": "muon"},
    "normuon": {"optimizer_type": "normuon"},
    "bf16": {"optimizer_type": "adamw", "optimizer_dtype": "bfloat16"},
    "ngrams": {"optimizer_type": "adamw", "max_ngram": 3},
}
CASES = [f"{parallel}-{name}" for parallel, name in zip(itertools.cycle(("ddp", "fsdp")), OPTIMIZERS, strict=False)]


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest of ||a - b|| / ||b|| over the parameters."""
    weights = [name for name in b if "/" not in name]
    return max(float((a[n] - b[n]).double().norm() / b[n].double().norm().clamp(min=1e-9)) for n in weights)


def pairs(case: str, most: int, every: bool, data: Path) -> dict[str, float]:
    parallel, name = case.split("-")
    given = {"dataset": data, "parallel": parallel, "save_interval": 4, "eval_interval": 8, **OPTIMIZERS[name]}
    whole = {}
    for count in range(1, most + 1):
        run(count, out_dir=f"{case}-{count}", **given)
        whole[count] = state(f"{case}-{count}", 8)
    found = {}
    for before, after in itertools.product(whole, whole):
        if before == after or every:
            out_dir = f"{case}-{before}-{after}"
            shutil.copytree(f"{case}-{before}/step-00000004", f"{out_dir}/step-00000004")
            run(after, out_dir=out_dir, init_from="resume", **given)
            got = state(out_dir, 8)
            same = got.keys() == whole[after].keys() and all(torch.equal(got[key], whole[after][key]) for key in got)
            found[f"{before}-{after}"] = 0.0 if same else max(distance(got, whole[after]), 1e-300)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=4)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--every-pair", action="store_true")
    options = parser.parse_args()
    before, results = os.getcwd(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder  # of the process that forks the others; it ends with the folder
        os.chdir(folder)
        ranks.PATIENCE = 600.0
        data = write_data(Path(folder) / "data")
        for case in options.cases.split(","):
            results[case] = found = pairs(case, options.most, options.every_pair, data)
            print(f"{case}: {', '.join(f'{pair} {value:.1e}' for pair, value in found.items())}", flush=True)
        os.chdir(before)
    print(json.dumps({"torch": torch.__version__, "cases": results}))
    pairs_of = [(pair.split("-"), value) for found in results.values() for pair, value in found.items()]
    return int(any(value for (before, after), value in pairs_of if before == after))


if __name__ == "__main__":
    sys.exit(main())
