"""A run that one number of processes saved and another number resumes: are the weights those of an unbroken run?

python benchmarks/resharding.py [--most=4] [--cases=ddp-adamw,fsdp-muon,...]

For every pair (W, V) of up to --most processes: W processes train 4 steps, V resume to step 8 (gloo, one thread each).
With W = V every tensor, moments included, must have the bits of an unbroken run of V processes. Otherwise the figure is
the largest difference of a parameter to that run, relative to its norm: that of sums in another order. Prints a line
per case, and a line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
    "bf16": {"optimizer_type": "adamw", "optimizer_dtype": "bfloat16"},
    "ngrams": {"optimizer_type": "adamw", "max_ngram": 3},
}
CASES = [f"{parallel}-{name}" for parallel in ("ddp", "fsdp") for name in OPTIMIZERS]


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest of ||a - b|| / ||b|| over the parameters."""
    weights = [name for name in b if "/" not in name]
    return max(float((a[n] - b[n]).double().norm() / b[n].double().norm().clamp(min=1e-9)) for n in weights)


def pairs(case: str, most: int, data: Path) -> dict[str, Any]:
    parallel, name = case.split("-")
    given = {"dataset": data, "parallel": parallel, "save_interval": 4, "eval_interval": 8, **OPTIMIZERS[name]}
    whole = {}
    for count in range(1, most + 1):
        run(count, out_dir=f"{case}-whole-{count}", **given)
        whole[count] = state(f"{case}-whole-{count}", 8)
        run(count, out_dir=f"{case}-cut-{count}", **given | {"max_iters": 4})
    found: dict[str, Any] = {}
    for before in whole:
        for after in whole:
            out_dir = f"{case}-{before}-{after}"
            shutil.copytree(f"{case}-cut-{before}", out_dir)
            run(after, out_dir=out_dir, init_from="resume", **given)
            got = state(out_dir, 8)
            same = got.keys() == whole[after].keys() and all(torch.equal(got[key], whole[after][key]) for key in got)
            found[f"{before}-{after}"] = 0.0 if same else distance(got, whole[after])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=4)
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    before, results = os.getcwd(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder  # of the process that forks the others; it ends with the folder
        os.chdir(folder)
        ranks.PATIENCE = 600.0
        data = write_data(Path(folder) / "data")
        for case in options.cases.split(","):
            results[case] = found = pairs(case, options.most, data)
            print(f"{case}: {', '.join(f'{pair} {value:.1e}' for pair, value in found.items())}", flush=True)
        os.chdir(before)
    print(json.dumps({"torch": torch.__version__, "cases": results}))


if __name__ == "__main__":
    main()
