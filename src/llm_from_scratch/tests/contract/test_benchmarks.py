"""benchmarks/: the contenders make exactly the requested steps, and the scripts run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[4]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="an installed package has no benchmarks")


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import contenders

    return contenders


def called(script: str, *words: str) -> dict[str, Any]:
    """The line of JSON that a script ends with."""
    # a compilation in an earlier test sets PYTHONSAFEPATH, which hides the script's folder
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, str(BENCHMARKS / script), "--threads=1", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("every", [1, 2])
def test_a_script_is_stopped_at_its_lines(contenders: Any, tmp_path: Path, every: int) -> None:
    """A stand-in for nanoGPT's train.py, which knows nothing of being asked."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "train.py").write_text(
        "import os, sys\nprint('step 0: train loss')\nstep = 0\nwhile True:\n"
        "    with open(sys.argv[0] + '.steps', 'w') as file:\n        print(*sys.argv[1:], step, file=file)\n"
        f"    if step % {every} == 0:\n        print(f'iter {{step}}: loss 1.0')\n    step += 1\n"
    )
    case = contenders.Case(1, 1, 16, 8, 2, 65, log_interval=every)
    contender = contenders.Contender("nanogpt", case, tmp_path, 1, checkout, [])
    try:
        assert contender.ask(0)["seconds"] == 0.0  # it stands at the line of its first step
        done = 0
        for steps in (2, 6, 4):
            answer = contender.ask(steps)
            done += steps
            *settings, last = (checkout / "train.py.steps").read_text().split()
            assert int(last) == done and answer["seconds"] > 0 and answer["peak"] > 1 << 20
        assert f"--log_interval={every}" in settings and "--n_embd=16" in settings
    finally:
        contender.close()


def test_a_failed_contender_reports_its_error(contenders: Any, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise RuntimeError('no such thing')\n")
    contender = contenders.Contender("nanogpt", contenders.CASES["tiny"], tmp_path, 1, tmp_path, [])
    try:
        with pytest.raises(SystemExit, match="no such thing"):
            contender.ask(0)
    finally:
        contender.close()


def test_the_table_of_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians in the right cells, the best one bold, the variants of ours left out, and the README has its place."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import proof_table

    machine = {"cpu": "A processor", "threads": 2, "torch": "2.13.0"}
    rate = {"ours": {"per_s": 63.0}, "ours, fp32": {"per_s": 99.0}, "llama.cpp q8_0": {"per_s": 106.4}}
    logs = {
        "loss": {**machine, "found": {"ours": {"seconds": 3.64}, "nanogpt": {"seconds": 88.0}}},
        "training": {"cases": {"gpt2": {"ours": {"tokens_per_s": 1302.0}, "litgpt": {"tokens_per_s": 173.2}}}},
        "memory": {"found": {"ours": {"peak": 2470 << 20}, "transformers": {"peak": 3000 << 20}}},
        "decoding": {"cases": {"char-512": rate, "gpt2-fp32": rate, "gpt2-int8": rate}},
        "resume": {"found": {"ours": {"resumed": 0.0}, "nanogpt": {"resumed": 0.03}}},
    }
    for name, found in logs.items():
        (tmp_path / f"{name}.txt").write_text(f"a table\n{json.dumps(found)}\na warning\n")
    (tmp_path / "date").write_text("2026-11-29\n")
    lines = proof_table.table(tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[2:8]] for line in lines[2:9]]
    assert cells[0] == ["**3.6**", "88.0", "", "", "", "s"]
    assert cells[1] == ["**1,302**", "", "", "173", "", "tokens/s"]
    assert cells[2] == ["**2,470**", "", "3,000", "", "", "MiB"]
    assert cells[5] == ["63", "", "", "", "**106**", "tokens/s"]
    assert cells[6] == ["**bit-exact**", "different weights", "", "", "", ""]
    assert len({line.count("|") for line in lines[:9]}) == 1 and lines[-1].startswith("A processor, 2 threads")
    assert proof_table.MARKS.search((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_scripts_run(tmp_path: Path) -> None:
    speed = called("throughput.py", "--cases=tiny", "--rounds=2", "--turn=0.01", "--contenders=ours,transformers,floor")
    found = speed["cases"]["tiny"]
    assert set(found) == {"ours", "transformers", "floor"} and found["ours"]["ours_is"] == 1.0
    assert found["floor"]["x_floor"] == 1.0 < found["ours"]["x_floor"]
    assert all(0 < value["min"] <= value["tokens_per_s"] <= value["max"] for value in found.values())
    memory = called("memory.py", "--case=tiny", "--steps=1", "--dtype=float32")
    assert set(memory["found"]) == {"ours", "ours, --dtype=float32", "transformers"}
    plan = called("planning.py", "--shapes=tiny", "--max_iters=25", "--eval_iters=1", "--clock=cpu")
    assert {"step", "peak", "total"} == set(plan["shapes"]["tiny"]["ratio"])
    assert math.isfinite(plan["shapes"]["tiny"]["run"]["eta"])


@pytest.mark.slow
def test_the_loss_is_that_of_the_whole_split(contenders: Any, tmp_path: Path) -> None:
    contenders.write_tokens(tmp_path, 65, 1 << 10)
    data = tmp_path / "ours"
    assert len(np.fromfile(data / "val.bin", dtype="<u2")) == 128  # not a multiple of 64 and one: the last is shorter
    size = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=64 --batch_size=2 --vocab_size=65"
    command = f"llm-train {size} --max_iters=2 --eval_iters=1 --gradient_accumulation_steps=1 --tensorboard=False"
    result = called("time_to_loss.py", f"--data={data}", f"--ours={command}", "--target=99")
    found = result["found"]["ours"]
    assert found["reached"] == 1 and found["losses"] == [pytest.approx(math.log(65), abs=0.2)]
