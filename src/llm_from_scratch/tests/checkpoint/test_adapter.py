"""Checkpoints of adapters: what they hold, how they find their base, what happens if it is gone or has changed."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.checkpoint import hashed_folder
from llm_from_scratch.checkpoint.adapter import weights_hash
from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.cli.common import check_location
from llm_from_scratch.core.adapters import merged
from llm_from_scratch.errors import DamagedError, UserError
from llm_from_scratch.interop.hf import export_hf
from llm_from_scratch.training import trainer
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train

from ..tiny import tiny_config

pytestmark = pytest.mark.usefixtures("here")
LORA: dict[str, Any] = {"init_from": "base", "out_dir": "run", "lora_rank": 2, "eval_interval": 100, "max_iters": 3}


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `base` and an adapter of it, `run`."""
    folder = tmp_path_factory.mktemp("adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(tiny_config(tiny_data, out_dir="base", max_iters=2, n_layer=2))
        train(tiny_config(tiny_data, **LORA))
    return folder


@pytest.fixture
def runs(trained: Path, here: Path) -> Path:
    shutil.copytree(trained, here, dirs_exist_ok=True)
    return here


def test_a_checkpoint_holds_only_the_adapter(runs: Path) -> None:
    step = find_checkpoint("run", "last")
    names = {path.name for path in step.iterdir()}
    assert {"adapter.safetensors", "adapter.json", "MANIFEST.json"} <= names and "model.safetensors" not in names
    saved = load_checkpoint(step)
    assert saved.base is not None and saved.base.rank == 2 and saved.base.scale == 2.0 and not saved.model
    assert saved.base.sha256 == weights_hash(load("base").model)
    assert len(saved.adapter) == 2 * 4 * 2 and any(t.any() for n, t in saved.adapter.items() if n.endswith("lora_B"))
    assert saved.optimizer is not None and set(saved.optimizer["state"]) == set(saved.adapter)


def test_load_merges_the_adapter_into_its_base(runs: Path) -> None:
    found, base, alone = load("run"), load("base"), load("run", merge=False)
    expected = merged(base.model_config, base.model, alone.adapter, 2.0)
    assert all(torch.equal(found.model[name], expected[name]) for name in expected)
    assert all(torch.equal(alone.model[name], base.model[name]) for name in expected)
    changed = {name for name in expected if not torch.equal(found.model[name], base.model[name])}
    assert changed == {name.replace("lora_B", "weight") for name in alone.adapter if name.endswith("lora_B")}
    assert found.tokenizer is not None


def rewrite_base(step: Path, **changes: Any) -> None:
    """Changes adapter.json, with good hashes."""
    manifest = hashed_folder.read_manifest(step)
    content = json.loads((step / "adapter.json").read_text()) | changes
    entry = hashed_folder.write_synced(step / "adapter.json", [json.dumps(content).encode()])
    manifest["files"]["adapter.json"] = entry
    (step / "MANIFEST.json").write_bytes(hashed_folder.with_own_hash(manifest))


def test_a_base_that_moved_together_with_the_run_is_found(runs: Path) -> None:
    rewrite_base(find_checkpoint("run", "last"), path=str(runs / "nowhere"))
    (runs / "elsewhere").mkdir()
    for name in ("base", "run"):
        (runs / name).rename(runs / "elsewhere" / name)
    assert load("elsewhere/run").step == 3


def test_a_missing_or_changed_base_is_a_one_line_error(runs: Path, tiny_data: Path) -> None:
    step = find_checkpoint("run", "last")
    rewrite_base(step, path=str(runs / "nowhere"), near=None)
    with pytest.raises(UserError, match=r"is an adapter of .*nowhere, which does not exist: restore that model"):
        load("run")
    rewrite_base(step, path=str(step), near=None)
    with pytest.raises(UserError, match="which does not exist"):
        load("run")
    train(tiny_config(tiny_data, out_dir="other", max_iters=1, n_layer=2))
    rewrite_base(step, path=str(runs / "other"), near=None)
    with pytest.raises(UserError, match=r"is an adapter of .*other, which has changed since .*: restore the original"):
        load("run")


def test_adapters_of_adapters_load_and_a_circle_ends(runs: Path, tiny_data: Path) -> None:
    train(tiny_config(tiny_data, **{**LORA, "init_from": "run", "out_dir": "second", "lora_targets": ("mlp",)}))
    first, second = load("run").model, load("second")
    assert second.base is not None and second.base.sha256 == weights_hash(first)
    rewrite_base(find_checkpoint("run", "last"), path=str(runs / "second"), near=None)
    with pytest.raises(UserError, match="adapters on top of each other"):
        load("second")


HOSTILE: dict[str, dict[str, Any]] = {
    "rank": {"rank": 3},
    "no rank": {"rank": 0},
    "huge rank": {"rank": 1 << 60},
    "text": {"rank": "2"},
    "scale": {"scale": float("inf")},
    "path": {"path": "a\0b"},
    "long path": {"path": "x" * 5000},
    "list": {"path": ["base"]},
    "unknown": {"more": 1},
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_adapter_is_damaged(runs: Path, change: str) -> None:
    rewrite_base(find_checkpoint("run", "last"), **HOSTILE[change])
    with pytest.raises(DamagedError):
        load("run")


def test_the_hash_is_of_names_shapes_and_numbers_in_any_precision() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    same = weights_hash(state)
    assert same == weights_hash({"b": state["b"], "a": state["a"].bfloat16()})
    assert same != weights_hash({**state, "a": state["a"].reshape(3, 2)})
    assert same != weights_hash({**state, "a": state["a"] + 1e-6})
    assert same != weights_hash({"c": state["a"], "b": state["b"]})


@pytest.mark.parametrize("init_from", ["base", "base/step-00000002", "./base", "run"])
def test_a_run_does_not_move_its_base_away(runs: Path, tiny_data: Path, init_from: str) -> None:
    out_dir = init_from.removeprefix("./").partition("/")[0]
    before = sorted(runs.rglob("*"))
    with pytest.raises(UserError, match=f"^{out_dir} holds the adapter's base model, .*: choose another --out_dir$"):
        make_plan(tiny_config(tiny_data, **LORA | {"init_from": init_from, "out_dir": out_dir}))
    assert sorted(runs.rglob("*")) == before


def test_a_base_within_out_dir_is_not_moved(runs: Path, tiny_data: Path) -> None:
    (runs / "new").mkdir()
    (runs / "base").rename(runs / "new" / "base")
    train(tiny_config(tiny_data, **LORA | {"init_from": "new/base", "out_dir": "new"}))
    assert load("new").step == 3


def test_another_lora_alpha_on_resume_is_refused(runs: Path, tiny_data: Path) -> None:
    more = {"init_from": "resume", "lora_alpha": 8.5, "max_iters": 4}
    with pytest.raises(UserError, match="has lora_alpha=4, not 8.5: remove --lora_alpha"):
        make_plan(tiny_config(tiny_data, **LORA | more))
    make_plan(tiny_config(tiny_data, **LORA | more | {"lora_alpha": 4.0}))  # the default, by name


def test_an_adapter_of_a_model_on_the_hub(runs: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded from the cache. What adapter.json names is never downloaded."""
    asked: list[str] = []
    cached, base = runs / "cache" / "snapshot", load("base")
    cached.parent.mkdir()
    monkeypatch.setitem(sys.modules, "transformers", None)  # which takes seconds to import
    export_hf(base.model_config, base.model, base.tokenizer, cached)

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    train(tiny_config(tiny_data, **LORA | {"init_from": "owner/model-1.5", "out_dir": "hub"}))
    assert set(asked) == {"owner/model-1.5"}
    asked.clear()
    found = load("hub", merge=False)
    assert found.step == 3 and found.base is not None and found.base.path == str(cached)
    assert all(torch.equal(found.model[name], tensor) for name, tensor in base.model.items())
    rewrite_base(find_checkpoint("hub", "last"), path="owner/model-1.5", near=None)
    with pytest.raises(UserError, match=r"is an adapter of owner/model-1.5, which does not exist"):
        load("hub")
    assert not asked


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("LocalEntryNotFoundError", "Hugging Face could not be reached"),
        ("RepositoryNotFoundError", "Hugging Face does not have this model"),
    ],
)
def test_a_mistyped_folder_may_be_a_name_on_the_hub(
    here: Path, tiny_data: Path, kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise type(kind, (Exception,), {})("some\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    expected = f"^Cannot load 'runs/a': no such folder, and {message}.$"
    with pytest.raises(UserError, match=expected):
        load("runs/a")
    with pytest.raises(UserError, match=expected):
        make_plan(tiny_config(tiny_data, init_from="runs/a"))
    check_location("runs/a", None)  # before torch is imported
    for ask in (load, check_location):
        with pytest.raises(UserError, match="no checkpoint runs/a"):
            ask("runs/a", "best")  # only a run has a best checkpoint
    with pytest.raises(UserError, match="no checkpoint runs/a"):
        make_plan(tiny_config(tiny_data, init_from="resume", out_dir="runs/a"))


@pytest.mark.slow
def test_a_run_cut_at_20_random_steps_ends_in_the_same_adapter(
    runs: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with its optimizer: stopped by a signal, or by an error that saves nothing."""
    settings = LORA | {"max_iters": 20, "eval_interval": 6, "lora_dropout": 0.2, "dropout": 0.1}
    train(tiny_config(tiny_data, **settings | {"out_dir": "whole"}))
    expected, step, original = load_checkpoint(find_checkpoint("whole", "last")), [0], trainer.train_step
    assert expected.optimizer is not None

    def cut(run: Any, *batch: Any) -> Any:
        if run.state.step == step[0]:
            if step[0] % 2:
                raise RuntimeError("cut")
            signal.raise_signal(signal.SIGTERM)
        return original(run, *batch)

    monkeypatch.setattr(trainer, "train_step", cut)
    rng, seen = random.Random(0), set[int]()
    for attempt in range(20):
        step[0] = rng.randrange(7, 19)
        out = f"cut-{attempt}"
        with contextlib.suppress(RuntimeError):
            train(tiny_config(tiny_data, **settings | {"out_dir": out}))
        seen.add(load_checkpoint(find_checkpoint(out, "last")).step)
        step[0] = -1
        train(tiny_config(tiny_data, **settings | {"out_dir": out, "init_from": "resume"}))
        found = load_checkpoint(find_checkpoint(out, "last"))
        assert found.step == 20 and found.optimizer is not None and found.base == expected.base
        assert found.adapter.keys() == expected.adapter.keys()
        assert all(torch.equal(found.adapter[name], tensor) for name, tensor in expected.adapter.items()), out
        for name, slots in expected.optimizer["state"].items():
            assert all(torch.equal(found.optimizer["state"][name][key], t) for key, t in slots.items()), (out, name)
    assert len(seen) > 4 and max(seen) < 20
