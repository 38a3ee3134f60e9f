"""Runs of several processes that save together: resumed by as many, by others, and by one."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.cli.evaluate import main as evaluate
from llm_from_scratch.cli.export import main as export
from llm_from_scratch.cli.generate import main as generate
from llm_from_scratch.cli.train import main as train
from llm_from_scratch.training import trainer
from llm_from_scratch.training.moments import optimizer_state
from llm_from_scratch.training.opening import open_run

from ..contract.test_llm_serve import running
from ..ranks import in_ranks
from ..tiny import arguments, read_metrics, tiny_config

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "batch_size": 3, "gradient_accumulation_steps": 4, "max_iters": 8, "eval_interval": 4, "n_layer": 2,
    "decay_lr": False, "dropout": 0.0,
}  # fmt: skip
_number = itertools.count()


def command(argv: list[str], nan_at: int | None = None) -> tuple[int, str]:
    """llm-train in a process of in_ranks(): its exit code and what it printed. nan_at: a step whose loss is NaN on rank
    1, the first time."""
    update, seen = trainer.train_step, list[Any]()

    def faulty(run: Any, x: Any, y: Any) -> Any:
        hook = None
        if run.state.step == nan_at and run.runtime.rank == 1 and not seen:
            seen.append(nan_at)
            hook = run.model.register_forward_hook(lambda m, a, out: (out[0], out[1] * math.nan))
        try:
            return update(run, x, y)
        finally:
            if hook is not None:
                hook.remove()

    trainer.train_step = faulty if nan_at is not None else update  # type: ignore[assignment]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = train(argv)
    return code, printed.getvalue()


def run(ranks: int, nan_at: int | None = None, **settings: Any) -> str:
    """llm-train in so many processes; 0: in this one, without a process group. Returns what the first printed."""
    argv = arguments(**{**SETTINGS, **settings})
    if not ranks:
        code, printed = command(argv)
    else:
        folder = Path(f"job{next(_number)}")
        folder.mkdir()
        code, printed = in_ranks(ranks, command, folder.absolute(), argv, nan_at)[0]
    assert code == 0, printed
    return printed


def state(run: str, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint."""
    found = load(run, step, need_tokenizer=False, merge=False)
    assert found.optimizer is not None
    moments = {f"{n}/{s}": value for n, slots in found.optimizer["state"].items() for s, value in slots.items()}
    return found.model | found.adapter | {key: torch.as_tensor(value) for key, value in moments.items()}


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.allclose(a[key].float(), b[key].float(), atol=1e-4, rtol=1e-3)] == []


def test_two_processes_resume_a_save_of_two_and_one_reads_it(here: Path, tiny_data: Path) -> None:
    given: dict[str, Any] = {"dataset": tiny_data, "optimizer_type": "muon", "dropout": 0.1}
    run(2, out_dir="whole", **given)
    run(2, out_dir="cut", **given | {"max_iters": 4})
    files = {path.name for path in Path("cut/step-00000004").iterdir()}
    assert {f"{kind}-0000{i}-of-00002.safetensors" for kind in ("model", "optimizer") for i in (1, 2)} < files
    shutil.copytree("cut", "other")
    printed = run(2, out_dir="cut", init_from="resume", **given)
    assert "resuming from cut/step-00000004" in printed and "not bit-exact" not in printed
    assert_equal(state("cut", 8), state("whole", 8))
    assert [entry["step"] for entry in read_metrics(Path("cut")) if "loss" in entry] == list(range(8))
    # in one process, without torch.distributed, the same weights give the same text and the same export
    found = load("other", need_tokenizer=False)
    again = {name: getattr(found, name) for name in ("step", "model_config", "model", "optimizer", "trainer", "rng")}
    cp.save_checkpoint("one", run_id="x", config=found.config, tokenizer=found.tokenizer, **again)
    texts = []
    for name in ("other", "one"):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            assert generate([f"--out_dir={name}", "--max_new_tokens=30", "--num_samples=1", "--device=cpu"]) == 0
        texts.append(text.getvalue())
        assert export([f"--checkpoint={name}", "--format=nanogpt", f"--output={name}.pt"]) == 0
    assert texts[0] == texts[1] and texts[0].strip()
    weights = [torch.load(f"{name}.pt", weights_only=True)["model"] for name in ("other", "one")]
    assert_equal(*weights)
    printed = run(0, out_dir="other", init_from="resume", **given | {"dropout": 0.0})
    assert "not bit-exact from here on: " in printed and "processes 2 -> 1" in printed
    assert (Path("other") / "step-00000008" / "model.safetensors").is_file()


def test_three_processes_resume_with_the_bits_of_an_uninterrupted_run(here: Path, tiny_data: Path) -> None:
    """The sum of three gradients depends on their order."""
    given: dict[str, Any] = {"dataset": tiny_data, "parallel": "ddp", "max_ngram": 3}
    run(3, out_dir="whole", **given)
    run(3, out_dir="cut", **given | {"max_iters": 4})
    run(3, out_dir="cut", init_from="resume", **given)
    assert_equal(state("cut", 8), state("whole", 8))


def test_an_fsdp_save_is_resumed_by_others(here: Path, tiny_data: Path) -> None:
    given: dict[str, Any] = {"dataset": tiny_data, "parallel": "fsdp"}
    run(2, out_dir="whole", **given)
    run(2, out_dir="cut", **given | {"max_iters": 4})
    saved = state("cut", 4)
    for name in ("three", "one"):
        shutil.copytree("cut", name)
    run(2, out_dir="cut", init_from="resume", **given)
    assert_equal(state("cut", 8), state("whole", 8))
    run(3, out_dir="three", init_from="resume", **given)
    run(0, out_dir="one", init_from="resume", dataset=tiny_data)
    for name in ("three", "one"):
        assert_equal(state(name, 4), saved)
        assert_close(state(name, 8), state("whole", 8))


def held(dataset: Path, out_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Every tensor that a run has read when it resumes; torch gathers the shards."""
    leaves = {**SETTINGS, "out_dir": str(out_dir), "init_from": "resume", "progress": "none", **settings}
    with open_run(tiny_config(dataset, **leaves), None, "llm-train", None) as run:
        slots = optimizer_state(run.optimizer)["state"].items()
        moments = {f"{name}/{slot}": torch.as_tensor(value) for name, of in slots for slot, value in of.items()}
        found: dict[str, Any] = run.model.state_dict() | moments
        return {name: (t.full_tensor() if hasattr(t, "device_mesh") else t).clone() for name, t in found.items()}


def read_plainly(folder: Path) -> dict[str, Any]:
    """The weights, by safetensors and the places in the headers alone."""
    parts: dict[str, list[tuple[int, Any]]] = {}
    for path in folder.glob("model-*-of-*.safetensors"):
        with safe_open(path, "pt") as file:
            places = json.loads((file.metadata() or {}).get("parts", "{}"))
            for name in file.keys():
                parts.setdefault(name, []).append((places.get(name, [0, 0])[1], file.get_tensor(name)))
    return {name: torch.cat([t for _, t in sorted(rows, key=lambda row: row[0])]) for name, rows in parts.items()}


def test_a_save_of_four_fsdp_processes_is_read_everywhere_bit_for_bit(here: Path, tiny_data: Path) -> None:
    """By 3, 2 and 1 processes, without torch.distributed, and by the commands."""
    run(4, dataset=tiny_data, out_dir="cut", parallel="fsdp", max_iters=4, optimizer_type="muon")
    assert len([*Path("cut/step-00000004").glob("model-*-of-00004.safetensors")]) == 4
    saved = state("cut", 4)
    plain = read_plainly(Path("cut/step-00000004"))
    assert_equal(plain, {name: saved[name] for name in plain})
    for ranks, settings in ((3, {"parallel": "fsdp"}), (2, {"parallel": "ddp"}), (1, {"parallel": "fsdp"}), (0, {})):
        given = (tiny_data, here / "cut", {"optimizer_type": "muon", **settings})
        for found in in_ranks(ranks, held, here, *given) if ranks else [held(*given)]:
            assert_equal(found, saved)
    found = load("cut", need_tokenizer=False)
    again = {name: getattr(found, name) for name in ("step", "model_config", "model", "trainer")}
    cp.save_checkpoint("whole", run_id="x", config=found.config, tokenizer=found.tokenizer, **again)
    assert (Path("whole") / "step-00000004" / "model.safetensors").is_file()
    answers = []
    for name in ("cut", "whole"):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            assert generate([f"--out_dir={name}", "--max_new_tokens=30", "--num_samples=1", "--device=cpu"]) == 0
        with contextlib.redirect_stdout(io.StringIO()) as evaluation:
            words = [f"--out_dir={name}", f"--dataset={tiny_data}", "--device=cpu", "--json=True"]
            assert evaluate(words) == 0
        with running(f"--out_dir={name}", "--model_name=m") as (_, url):
            body = json.dumps({"model": "m", "prompt": "ba", "max_tokens": 8, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                served = json.load(reply)["choices"][0]["text"]
        assert export([f"--checkpoint={name}", "--format=hf", f"--output={name}-hf"]) == 0
        exported = Path(f"{name}-hf/model.safetensors").read_bytes()
        answers.append((text.getvalue(), json.loads(evaluation.getvalue())["loss"], served, exported))
    assert answers[0] == answers[1] and all(answers[0])


def test_a_run_rolls_back_to_shards_prunes_and_cools_down(here: Path, tiny_data: Path) -> None:
    given: dict[str, Any] = {"dataset": tiny_data, "save_interval": 2, "keep_last": 1, "max_skipped_steps": 1}
    Path("run/.tmp-step-00000003").mkdir(parents=True)  # what processes that were killed while they saved have left
    Path("run/.tmp-step-00000003/model-00002-of-00002.safetensors").write_bytes(b"half")
    printed = run(2, nan_at=5, out_dir="run", **given)
    assert "rolled back to run/step-00000004" in printed
    names = sorted(path.name for path in Path("run").iterdir() if "step" in path.name)
    assert names == ["step-00000004", "step-00000008"]  # the best and the last
    assert train(["--init_from=run/step-00000008", "--cooldown=0.25", "--out_dir=cool", f"--dataset={tiny_data}"]) == 0
    assert [step for step, _ in cp.list_checkpoints("cool")][-1] == 10
    printed = run(2, out_dir="run", **given)  # a new run moves the earlier one aside
    moved = next(Path("run").glob("previous-*"))
    assert f"moved to {moved}" in printed and (moved / "step-00000008" / "MANIFEST.json").is_file()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_train_and_are_saved_together(here: Path, tiny_data: Path, parallel: str) -> None:
    run(0, dataset=tiny_data, out_dir="base")
    # of one row, a shard is empty
    given: dict[str, Any] = {"dataset": tiny_data, "init_from": "base", "lora_rank": 1, "learning_rate": 3e-3}
    run(0, **given, out_dir="alone")
    run(2, **given, out_dir="whole", parallel=parallel)
    run(2, **given | {"max_iters": 4}, out_dir="tuned", parallel=parallel)
    shutil.copytree("tuned", "again")
    run(2, **given | {"init_from": "resume"}, out_dir="tuned", parallel=parallel)
    assert_equal(state("tuned", 8), state("whole", 8))
    with safe_open("tuned/step-00000008/adapter-00002-of-00002.safetensors", "pt") as file:
        assert file.keys()
    assert load("tuned").model.keys() == load("base").model.keys()
    alone, whole = load("alone", 8, merge=False).adapter, load("whole", 8, merge=False).adapter
    for name, tensor in alone.items():
        assert float((whole[name] - tensor).norm() / tensor.norm()) < 1e-6, name
    run(0, **given | {"init_from": "resume"}, out_dir="again")
    assert_close(state("again", 8), state("tuned", 8))
