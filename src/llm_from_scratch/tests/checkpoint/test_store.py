"""Checkpoint directories: what is written, what is detected, which one is selected, and that no failure loses one."""

from __future__ import annotations

import builtins
import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from safetensors.torch import save as to_bytes

from llm_from_scratch.checkpoint import contents as state
from llm_from_scratch.checkpoint import hashed_folder as sealed
from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.checkpoint.load import load as load_any
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core import weights
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.sizes import meta_model, meta_tensors, tied_names
from llm_from_scratch.core.tokenizer import CharTokenizer, Tokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine import files
from llm_from_scratch.training.moments import load_optimizer_state, optimizer_state
from llm_from_scratch.training.optimizer import make_adamw

TINY = GPTConfig(block_size=4, vocab_size=6, n_layer=1, n_head=1, n_embd=4, bias=False)
SMALL = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
MODERN = GPTConfig(
    block_size=8, vocab_size=11, n_layer=2, n_head=4, n_embd=16, bias=False, n_kv_head=2, pos_embedding="rope",
    norm="rmsnorm", activation="swiglu", qk_norm=True, tie_embeddings=False, logit_softcap=15.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing is recorded where it matters; waiting for this machine's disk shows nothing."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def contents(step: int, shape: GPTConfig = TINY, seed: int | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of save_checkpoint for a model with random weights and one AdamW step behind it."""
    torch.manual_seed(step if seed is None else seed)
    model = GPT(shape)
    optimizer = make_adamw(model, 0.1, 1e-3, (0.9, 0.95))
    idx = torch.randint(shape.vocab_size or 1, (2, shape.block_size))
    model(idx, idx)[1].backward()
    optimizer.step()
    return {
        "step": step,
        "model_config": shape,
        "model": model.state_dict(),
        "run_id": "run-a",
        "optimizer": optimizer_state(optimizer),
        "trainer": {"best_val_loss": 2.5, "tag": seed},
        "rng": {"cpu.0": torch.get_rng_state()},
        "config": {"training": {"always_save_checkpoint": True, "stop": ["a"]}},
    } | more


def save(out: Path, step: int, **more: Any) -> Path:
    return cp.save_checkpoint(out, **contents(step, **more))


def damage(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at if at >= 0 else len(data) // 2] ^= 1
    path.write_bytes(data)


def reseal(folder: Path, **fields: Any) -> None:
    """Writes a manifest that fits the folder's present files: what a liar would do."""
    body = json.loads((folder / "MANIFEST.json").read_bytes())
    body.pop("sha256")
    for name in body["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            body["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body |= fields
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("config", [SMALL, MODERN], ids=["gpt2", "modern"])
def test_everything_is_restored_bit_for_bit(tmp_path: Path, config: GPTConfig) -> None:
    tokenizer = Tokenizer.from_name("char", text="hello world")
    given = contents(250, config, tokenizer=tokenizer, val_loss=2.25, dataset_hash="ab")
    path = cp.save_checkpoint(tmp_path / "new" / "out", **given)
    assert path == tmp_path / "new" / "out" / "step-00000250"
    got = cp.load_checkpoint(path)
    assert (got.step, got.path, got.model_config) == (250, path, config)
    assert got.model.keys() == given["model"].keys()
    assert all(torch.equal(got.model[k], v) and got.model[k].dtype == v.dtype for k, v in given["model"].items())
    assert got.optimizer is not None and got.optimizer["state"].keys() == given["optimizer"]["state"].keys()
    for name, slots in given["optimizer"]["state"].items():
        assert got.optimizer["state"][name].keys() == slots.keys()
        assert all(torch.equal(got.optimizer["state"][name][slot], value) for slot, value in slots.items())
    assert got.optimizer["param_groups"] == given["optimizer"]["param_groups"]  # betas are a tuple again
    assert torch.equal(got.rng["cpu.0"], given["rng"]["cpu.0"])
    assert (got.trainer, got.config) == (given["trainer"], given["config"])
    assert got.tokenizer is not None and got.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert (got.manifest["val_loss"], got.manifest["run_id"], got.manifest["dataset_sha256"]) == (2.25, "run-a", "ab")


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    def step(model: GPT, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(idx, idx)[1].backward()
        optimizer.step()

    idx = torch.arange(8)[None]
    torch.manual_seed(0)
    model = GPT(SMALL)
    optimizer = make_adamw(model, 0.1, 1e-2, (0.9, 0.95))
    step(model, optimizer)
    given = contents(1, SMALL) | {"model": model.state_dict(), "optimizer": optimizer_state(optimizer)}
    got = cp.load_checkpoint(cp.save_checkpoint(tmp_path, **given))
    again = GPT(SMALL)
    again.load_state_dict(got.model)
    other = make_adamw(again, 0.1, 1e-2, (0.9, 0.95))
    assert got.optimizer is not None
    load_optimizer_state(other, got.optimizer)
    step(model, optimizer)
    step(again, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_manifest_holds_true_sizes_and_hashes_and_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 3, tokenizer=Tokenizer.from_name("byte"))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    on_disk = {p.name for p in path.iterdir()} - {"MANIFEST.json"}
    assert set(manifest["files"]) == on_disk
    assert {Path(name).suffix for name in on_disk} == {".safetensors", ".json"}
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with safe_open(path / "model.safetensors", "pt") as file:  # an independent reader; the tied head is stored once
        assert "lm_head.weight" not in file.keys() and "transformer.wte.weight" in file.keys()


def test_prefixes_of_compile_are_taken_off_and_other_types_kept(tmp_path: Path) -> None:
    given = contents(1)
    half = {f"_orig_mod.{name}": tensor.bfloat16() for name, tensor in given["model"].items()}
    half["_orig_mod.lm_head.weight"] = half["_orig_mod.transformer.wte.weight"]
    got = cp.load_checkpoint(cp.save_checkpoint(tmp_path, **given | {"model": half, "optimizer": None}))
    assert got.model.keys() == given["model"].keys() and got.optimizer is None
    assert all(tensor.dtype == torch.bfloat16 for tensor in got.model.values())


def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    for part, bad in (("model", float("nan")), ("optimizer", float("inf"))):
        given = contents(2)
        if part == "model":
            given["model"]["transformer.wpe.weight"][0, 0] = bad
        else:
            given["optimizer"]["state"]["transformer.wpe.weight"]["exp_avg"][0, 0] = bad
        with pytest.raises(UserError, match="step 2 is not saved.*wpe.*not finite"):
            cp.save_checkpoint(tmp_path, **given)
    assert os.listdir(tmp_path) == [first.name]
    save(tmp_path, 3, val_loss=float("nan"))  # a NaN loss is never the best
    assert cp.load_checkpoint(tmp_path / "step-00000003").manifest["val_loss"] is None
    tensors = cp.load_checkpoint(first).model
    tensors.pop("lm_head.weight")
    tensors["transformer.ln_f.weight"][1] = float("nan")
    save_file(tensors, first / "model.safetensors")
    reseal(first)
    with pytest.raises(cp.DamagedError, match="ln_f.weight contains values that are not finite"):
        cp.load_checkpoint(first)


# --------------------------------------------------------------------------------------------------- what is noticed


@pytest.mark.parametrize("share", [0.2, pytest.param(1.0, marks=pytest.mark.slow)])
def test_every_changed_bit_is_noticed(share: float, tmp_path: Path) -> None:
    path = save(tmp_path, 7, tokenizer=Tokenizer.from_name("byte"), val_loss=1.5)
    rng, flips = random.Random(0), 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        every = [(at, bit) for at in range(len(whole)) for bit in range(8)]
        for at, bit in rng.sample(every, min(len(every), int(share * (200 if file.name == "MANIFEST.json" else 40)))):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            file.write_bytes(changed)
            for read in (cp.load_checkpoint, cp.verify_checkpoint):
                with pytest.raises(cp.DamagedError, match=file.name):
                    read(path)
            flips += 1
        file.write_bytes(whole)
    assert flips > 450 * share and cp.load_checkpoint(path).step == 7


def test_truncated_longer_and_missing_files_are_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for content in (b"", whole[: len(whole) // 2], whole[:-1], whole + b"\0", whole + b"\n"):
            file.write_bytes(content)
            with pytest.raises(cp.DamagedError, match=file.name):
                cp.load_checkpoint(path)
        file.unlink()
        for read in (cp.load_checkpoint, cp.verify_checkpoint, cp.find_checkpoint):
            with pytest.raises(cp.DamagedError, match=file.name):
                read(path)
        file.write_bytes(whole)
    (path / "notes.txt").write_text("a stranger's file is not looked at")
    assert cp.load_checkpoint(path).step == 7


def test_sampling_needs_neither_optimizer_nor_random_states(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    (path / "optimizer.safetensors").unlink()
    damage(path / "rng.safetensors")
    got = cp.load_checkpoint(path, weights_only=True)
    assert got.optimizer is None and got.rng == {} and len(got.model) == len(contents(7)["model"])
    damage(path / "model.safetensors")
    with pytest.raises(cp.DamagedError):
        cp.load_checkpoint(path, weights_only=True)


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | changes))

    return edit


def replace_with(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(data)


LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deeper than its tensors": (edit_json("model.json", n_layer=10**9), "n_layer"),
    "wider": (edit_json("model.json", n_embd=5), "expected floats of shape"),
    "a billion wide": (edit_json("model.json", n_embd=1 << 30), "cannot be built"),
    "beyond what torch counts": (edit_json("model.json", mlp_hidden=(1 << 31) - 1), "expected floats of shape"),
    "heads that do not divide": (edit_json("model.json", n_head=3), "not divisible"),
    "a text for a number": (edit_json("model.json", n_layer="1"), "n_layer"),
    "true for a number": (edit_json("model.json", n_layer=True), "n_layer"),
    "an unknown activation": (edit_json("model.json", activation="__import__"), "activation"),
    "an infinite number": (edit_json("model.json", logit_softcap=float("inf")), "logit_softcap"),
    "an unknown setting": (edit_json("model.json", experts=8), "experts"),
    "no vocabulary": (edit_json("model.json", vocab_size=None), "vocab_size"),
    "another model's tensors": (edit_json("model.json", bias=True), "lacks tensor"),
    "a list for an object": (replace_with("config.json", b"[]"), "config.json"),
    "nested without end": (replace_with("trainer.json", b"[" * 100_000), "trainer.json"),
    "a header of 2^63 bytes": (replace_with("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}"), "model.safetensors"),
    "no tensors": (replace_with("model.safetensors", b"\x02" + b"\0" * 7 + b"{}"), "n_layer|lacks"),
    "moments of nobody": (edit_json("optimizer.json", state={}), "optimizer"),
    "groups that are numbers": (edit_json("optimizer.json", param_groups=[1]), "optimizer"),
}


@pytest.mark.parametrize("lie", LIES)
def test_wrong_contents_are_refused_although_every_hash_matches(tmp_path: Path, lie: str) -> None:
    path = save(tmp_path, 7)
    change, message = LIES[lie]
    change(path)
    reseal(path)
    with pytest.raises(UserError, match=message):
        cp.load_checkpoint(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "..", "a\\b", ""])
def test_paths_in_a_manifest_are_not_followed(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 7)
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    reseal(path, files=files | {name: {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}})
    with pytest.raises(cp.DamagedError, match="MANIFEST"):
        cp.load_checkpoint(path)


@pytest.mark.parametrize("fields", [{"step": -1}, {"step": "9"}, {"val_loss": "1"}, {"format": "x"}, {"files": []}])
def test_a_manifest_with_wrong_fields_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = save(tmp_path, 7)
    reseal(path, **fields)
    with pytest.raises(cp.DamagedError):
        cp.load_checkpoint(path)


def test_a_newer_format_is_not_taken_for_damage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    reseal(save(tmp_path, 2), version=3)
    with pytest.raises(UserError, match="version 3; this program reads versions 1 and 2") as error:
        load_any(tmp_path, set_aside=True)
    assert not isinstance(error.value, cp.DamagedError)
    assert (tmp_path / "step-00000002").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs")
def test_a_fifo_or_a_folder_does_not_block(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")
    with pytest.raises(cp.DamagedError, match="regular"):
        cp.load_checkpoint(path)
    os.unlink(path / "config.json")
    (path / "config.json").mkdir()
    with pytest.raises(cp.DamagedError, match="regular"):
        cp.verify_checkpoint(path)


# ---------------------------------------------------------------------------------------------- which one is chosen


def test_order_is_by_the_step_in_the_manifest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003").rename(tmp_path / "x")
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000003")
    (tmp_path / "x").rename(tmp_path / "step-00000001")
    os.utime(tmp_path / "step-00000002", (4e9, 4e9))  # a clock in the future
    for stray in ("step-99.bak", "step-", "step-x", "mystep-00000009", ".tmp-step-00000009", "previous-run-b"):
        (tmp_path / stray).mkdir()
    (tmp_path / "step-00000008").write_text("a file of that name")
    assert cp.find_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert load_any(tmp_path, need_tokenizer=False).step == 3
    assert cp.list_checkpoints(tmp_path) == [
        (1, tmp_path / "step-00000003"),
        (2, tmp_path / "step-00000002"),
        (3, tmp_path / "step-00000001"),
    ]


def test_a_copy_under_another_step_is_not_newer(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.copytree(save(tmp_path, 4), tmp_path / "step-00000099")
    assert cp.find_checkpoint(tmp_path).name == "step-00000005"
    assert cp.find_checkpoint(tmp_path, 4).name == "step-00000004"


def test_which(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, None)):
        save(tmp_path, step, val_loss=loss)
    names = {w: cp.find_checkpoint(tmp_path, w).name for w in (None, "last", "best", 30, "30")}
    assert names == {
        None: "step-00000040",
        "last": "step-00000040",
        "best": "step-00000020",
        30: "step-00000030",
        "30": "step-00000030",
    }
    with pytest.raises(UserError, match="no checkpoint of step 25 .*40, 30, 20, 10"):
        cp.find_checkpoint(tmp_path, 25)
    for bad in ("newest", "-1", -1, 2.0, ""):
        with pytest.raises(UserError, match="last, best or a step"):
            cp.find_checkpoint(tmp_path, bad)  # type: ignore[arg-type]
    only_better = {"training": {"always_save_checkpoint": False}}
    save(tmp_path, 50, val_loss=2.25, config=only_better)
    assert cp.find_checkpoint(tmp_path).name == "step-00000020"
    assert cp.find_checkpoint(tmp_path, "last").name == "step-00000050"


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        cp.find_checkpoint(tmp_path / "nope")
    with pytest.raises(UserError, match="cannot read xxx"):
        cp.find_checkpoint("x" * 5000)
    with pytest.raises(UserError, match="no checkpoint in .*expected step-"):
        load_any(tmp_path)
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(cp.DamagedError, match="MANIFEST.json"):
        load_any(tmp_path / "step-00000001")
    save(tmp_path / "run", 1)
    with pytest.raises(UserError, match="has a val loss.*--which=last"):
        cp.find_checkpoint(tmp_path / "run", "best")


@pytest.mark.cases(4)
@pytest.mark.parametrize("set_aside", [True, False])
@pytest.mark.parametrize("damaged", range(5))
def test_the_newest_good_one_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: int, set_aside: bool
) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    harm: list[Callable[[Path], Any]] = [
        lambda p: damage(p / "model.safetensors"),
        lambda p: (p / "MANIFEST.json").unlink(),
        lambda p: damage(p / "MANIFEST.json"),
        lambda p: (p / "trainer.json").write_bytes(b""),
    ]
    bad = [f"step-{5 - i:08d}" for i in range(damaged)]
    for i, name in enumerate(bad):
        harm[i](tmp_path / name)
    before = sorted(os.listdir(tmp_path))
    assert load_any(tmp_path, need_tokenizer=False, set_aside=set_aside).step == 5 - damaged
    warning = capsys.readouterr().err
    assert warning.count("\n") == (1 if damaged else 0)
    assert all(name in warning for name in [*bad, f"step-{5 - damaged:08d}"] if damaged)
    expected = [f"damaged-{n}" if set_aside and n in bad else n for n in before]
    assert sorted(os.listdir(tmp_path)) == sorted(expected)
    assert cp.find_checkpoint(tmp_path).name == f"step-{5 - damaged:08d}"
    if set_aside:
        assert capsys.readouterr().err == ""  # said once


def test_without_a_good_checkpoint_nothing_starts_or_moves(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(save(tmp_path, step) / "model.safetensors")
    before = sorted(os.listdir(tmp_path))
    for _ in range(2):
        with pytest.raises(cp.DamagedError, match="no good checkpoint.*step-00000002.*step-00000001"):
            load_any(tmp_path, set_aside=True)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_requested_damaged_checkpoint_is_not_replaced_by_another(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path / "model.safetensors")
    for location, which in ((tmp_path, 2), (path, None)):
        with pytest.raises(cp.DamagedError, match="step-00000002"):
            load_any(location, which, set_aside=True)
    assert path.exists()


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 4.0)):
        save(tmp_path, step, val_loss=loss)
    damage(tmp_path / "step-00000002" / "model.safetensors")
    assert load_any(tmp_path, "best", need_tokenizer=False).step == 3


def test_a_checkpoint_removed_during_a_read_is_not_reported_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    load = cp.load_checkpoint

    def vanish(folder: Path) -> cp.Checkpoint:
        if folder == newest:
            sealed.remove_folder(newest)
        return load(folder)

    monkeypatch.setattr(state, "load_checkpoint", vanish)
    assert cp.find_checkpoint(tmp_path, set_aside=True).name == "step-00000001"
    assert capsys.readouterr().err == "" and os.listdir(tmp_path) == ["step-00000001"]


# ----------------------------------------------------------------------------------------- what is kept, moved, cleaned


def steps(out: Path) -> list[int]:
    return [step for step, _ in cp.list_checkpoints(out)]


def test_kept_are_the_last_the_best_and_every_nth(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, None)):
        save(tmp_path, step, val_loss=loss)
    gone = cp.prune(tmp_path / "step-00000050", keep_last=2, keep_every=30)
    assert [p.name for p in gone] == ["step-00000010"] and steps(tmp_path) == [20, 30, 40, 50]
    cp.prune(tmp_path / "step-00000050", keep_last=1)
    assert steps(tmp_path) == [20, 50]
    save(tmp_path, 60, val_loss=0.5, keep_last=1)
    assert steps(tmp_path) == [60]
    save(tmp_path, 55, keep_last=1)  # an older step, after a rollback: the one just written stays
    assert steps(tmp_path) == [55, 60]
    assert sorted(os.listdir(tmp_path)) == ["step-00000055", "step-00000060"]


def test_nothing_is_removed_unless_the_newest_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    write = sealed.write_synced

    def rotten(path: Path, data: bytes) -> dict[str, Any]:
        entry = write(path, data)
        if path.name == "model.safetensors":
            damage(path)
        return entry

    monkeypatch.setattr(sealed, "write_synced", rotten)
    with pytest.raises(cp.SaveError, match="different bytes"):
        save(tmp_path, 4, keep_last=1)
    assert steps(tmp_path) == [1, 2, 3] and (tmp_path / "damaged-step-00000004").is_dir()
    monkeypatch.undo()
    damage(tmp_path / "step-00000003" / "rng.safetensors")  # nobody has noticed
    save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [2, 3] and load_any(tmp_path, need_tokenizer=False).step == 2


def test_a_checkpoint_that_cannot_be_pruned_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    reseal(tmp_path / "step-00000002", version=3)  # of a program to come
    assert save(tmp_path, 4, keep_last=1).exists()
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000004"]

    def unreadable(out: Path, skip_foreign: bool = False) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cp, "find_entries", unreadable)
    assert save(tmp_path, 5, keep_last=1).exists()


def test_a_file_or_link_with_a_checkpoints_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").write_text("a stranger's")
    (tmp_path / "step-00000002").symlink_to(tmp_path / "nowhere")
    for step in (1, 2):
        save(tmp_path, step)
    assert steps(tmp_path) == [1, 2]
    assert (tmp_path / "damaged-step-00000001").read_text() == "a stranger's"


def test_of_a_cut_replacement_the_whole_one_is_kept_until_the_next_is_read_back(tmp_path: Path) -> None:
    save(tmp_path / "other", 1, seed=1).rename(tmp_path / "step-00000001.old")
    shutil.copytree(tmp_path / "step-00000001.old", tmp_path / "step-00000001")
    damage(tmp_path / "step-00000001" / "model.safetensors")
    (tmp_path / "other").rmdir()
    rename, seen = os.rename, []

    def watching(old: Any, new: Any) -> None:
        rename(old, new)
        seen.append(load_any(tmp_path, need_tokenizer=False).trainer["tag"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", watching)
        save(tmp_path, 1, seed=3)
    assert seen == [1, 3, 3] and sorted(os.listdir(tmp_path)) == ["damaged-step-00000001", "step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_numbers_that_are_not_finite_are_never_good(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    tensors = load_file(newest / name)
    next(iter(tensors.values())).view(-1)[0] = float("inf")
    save_file(tensors, newest / name)
    reseal(newest)
    with pytest.raises(cp.DamagedError, match="not finite"):
        cp.verify_checkpoint(newest)
    assert cp.find_checkpoint(tmp_path, set_aside=True).name == "step-00000001"


def test_leftovers_of_ours_are_removed_and_others_stay(tmp_path: Path) -> None:
    for name in (".tmp-step-00000002", ".tmp-remove-step-00000001", ".tmp-mine", "step-x.old", "damaged-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".tmp-ckpt.pt").write_text("x")
    cp.clean_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".tmp-mine", "damaged-step-00000001", "step-x.old"]
    cp.clean_leftovers(tmp_path / "nope")
    assert not (tmp_path / "nope").exists()


def test_an_earlier_run_is_moved_aside_whole(tmp_path: Path) -> None:
    assert cp.archive_previous(tmp_path / "nope") is None and cp.archive_previous(tmp_path) is None
    (tmp_path / "samples.jsonl").write_text("{}")
    assert cp.archive_previous(tmp_path) is None
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "step-00000002" / "MANIFEST.json")
    cp.write_nanogpt(tmp_path / "ckpt.pt", load_any(tmp_path, 1, need_tokenizer=False))
    for name in ("README.md", "metrics.jsonl", "loss.png", "notes.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "tensorboard").mkdir()
    moved = cp.archive_previous(tmp_path)
    assert moved == tmp_path / "previous-run-a"
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "previous-run-a"]
    names = ["README.md", "ckpt.pt", "loss.png", "metrics.jsonl", "samples.jsonl", "step-00000001", "step-00000002"]
    assert sorted(os.listdir(moved)) == [*names, "tensorboard"]
    assert load_any(moved, need_tokenizer=False).step == 1  # it is an out_dir like any other
    save(tmp_path, 1)
    assert cp.archive_previous(tmp_path) == tmp_path / "previous-run-a-2"
    (tmp_path / "damaged-step-00000001").mkdir()
    assert cp.archive_previous(tmp_path) == tmp_path / "previous-unknown"
    assert cp.archive_previous(tmp_path) is None


def test_a_foreign_ckpt_pt_is_not_a_run(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "ckpt.pt")
    assert cp.archive_previous(tmp_path) is None
    save(tmp_path, 1, run_id="../../x")
    moved = cp.archive_previous(tmp_path)
    assert moved is not None and moved.parent == tmp_path
    assert (tmp_path / "ckpt.pt").exists() and not (moved / "ckpt.pt").exists()


# ------------------------------------------------------------------------------------- no failure loses a checkpoint


class Dead(BaseException):
    """The process is gone: nothing runs any more, clean-up included."""


CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int, how: str) -> Iterator[list[str]]:
    """Lets the at-th call that changes the disk fail. how: "die" (and all later ones do), "error", "short" (half of
    a write arrives, then an error). Yields the list of calls made."""
    calls: list[str] = []

    def happens(what: str) -> bool:
        calls.append(what)
        if how == "die" and len(calls) > at:
            raise Dead
        return len(calls) == at

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if happens(name):
                raise Dead if how == "die" else OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    class File:
        def __init__(self, file: Any):
            self.file = file

        def write(self, data: Any) -> int:
            if happens("write"):
                self.file.write(bytes(data)[: len(data) // 2])
                self.file.flush()
                raise Dead if how == "die" else OSError(errno.EIO, "Input/output error")
            return self.file.write(data)

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    real_open = builtins.open

    def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return real_open(file, mode, *args, **kwargs)
        if happens("open"):
            raise Dead if how == "die" else OSError(errno.EIO, "Input/output error")
        return File(real_open(file, mode, *args, **kwargs))

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name))
        patch.setattr(sealed, "open", opening, raising=False)
        patch.setattr(files, "open", opening, raising=False)
        yield calls


def every_failure(
    monkeypatch: pytest.MonkeyPatch, fresh: Callable[[], Path], act: Callable[[Path], Any], stride: int = 1
) -> Any:
    """Yields (place, whether act succeeded, how it failed) for a failure at every disk call that act makes, or at every
    stride-th one."""
    with failing(monkeypatch, 0, "error") as calls:
        act(fresh())
    total = len(calls)
    assert total > 3
    for how in ("die", "error"):
        for at in range(1, total + 1, stride):
            place = fresh()
            done = True
            with failing(monkeypatch, at, how):
                try:
                    act(place)
                except (Dead, cp.SaveError, UserError):
                    done = False
            yield place, done, f"{how} at call {at} of {total} ({calls[at - 1]})"


@pytest.mark.parametrize(
    ("new_step", "stride"),
    [
        pytest.param(2, 6, id="next step, every sixth call"),
        pytest.param(2, 1, id="next step", marks=pytest.mark.slow),
        pytest.param(1, 1, id="same step again", marks=pytest.mark.slow),
    ],
)
def test_a_failure_at_any_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_step: int, stride: int
) -> None:
    base = tmp_path / "base"
    save(base, 1, seed=111, tokenizer=Tokenizer.from_name("byte"))
    numbers = iter(range(10**6))

    def fresh() -> Path:
        return Path(shutil.copytree(base, tmp_path / f"run{next(numbers)}"))

    new, third = contents(new_step, seed=222), contents(3, seed=333)

    def act(out: Path) -> None:
        cp.save_checkpoint(out, **new, keep_last=1)

    wanted = {seed: contents(1, seed=seed)["model"] for seed in (111, 222)}
    outcomes = set()
    for out, done, failure in every_failure(monkeypatch, fresh, act, stride):
        for _ in range(2):  # for a concurrent reader, and after the next start
            got = load_any(out, need_tokenizer=False, set_aside=True)
            tag = got.trainer["tag"]
            assert tag == 222 or not done, failure
            assert all(torch.equal(got.model[name], tensor) for name, tensor in wanted[tag].items()), failure
            cp.clean_leftovers(out)
        outcomes.add((done, tag))
        assert not any(name.startswith(".tmp") or name.endswith(".old") for name in os.listdir(out)), failure
        cp.save_checkpoint(out, **third, keep_last=1)
        assert os.listdir(out) == ["step-00000003"], failure
        shutil.rmtree(out)
    assert {(False, 111), (False, 222)} <= outcomes  # cuts on both sides of the moment that counts


@pytest.mark.skipif(os.name != "posix", reason="names in a folder are synced on POSIX only")
def test_everything_is_synced_before_its_dependents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    events: list[str] = []
    really_open, really_rename = os.open, os.rename
    opened: dict[int, str] = {}

    def remembering(path: Any, *args: Any, **kwargs: Any) -> int:
        handle = really_open(path, *args, **kwargs)
        opened[handle] = Path(os.fsdecode(path)).name
        return handle

    def opening(path: Any, mode: str = "r", **kwargs: Any) -> Any:
        return builtins.open(path, mode, opener=remembering, **kwargs)

    def renaming(old: Any, new: Any) -> None:
        events.append(f"rename {Path(old).name}")
        really_rename(old, new)

    monkeypatch.setattr(files, "open", opening, raising=False)
    monkeypatch.setattr(os, "open", remembering)
    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(f"sync {opened[handle]}"))
    path = save(tmp_path, 2, keep_last=1)
    members = sorted(p.name for p in path.iterdir())
    parents = [f"sync {parent.name}" for parent in tmp_path.parents]
    assert events[: len(parents)] == parents  # whoever made the folder
    del events[: len(parents)]
    written, rest = events[: len(members)], events[len(members) :]
    assert sorted(written) == [f"sync {name}" for name in members] and written[-1] == "sync MANIFEST.json"
    assert rest == [
        "sync .tmp-step-00000002", "rename .tmp-step-00000002", f"sync {tmp_path.name}", "rename step-00000001",
        f"sync {tmp_path.name}",
    ]  # fmt: skip


def test_checkpoints_on_a_disk_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            asked.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 1)
    assert asked and cp.load_checkpoint(save(tmp_path, 2, keep_last=1)).step == 2 and steps(tmp_path) == [2]


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    numbers = iter(range(10**6))

    def fresh() -> Path:
        return tmp_path / f"run{next(numbers)}"

    for out, done, failure in every_failure(monkeypatch, fresh, lambda out: save(out, 1), stride):
        if "error" in failure and out.exists():
            left = os.listdir(out)
            assert left in ([], ["step-00000001"]) and (left or not done), failure


def test_a_disk_error_is_one_line_with_the_bytes_needed_and_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = len(tmp_path.parents) + 5  # after the names of the folder and its parents are synced
    size = sum(p.stat().st_size for p in save(tmp_path / "whole", 1).iterdir() if p.name != "MANIFEST.json")
    with failing(monkeypatch, at, "error"), pytest.raises(cp.SaveError) as error:
        save(tmp_path / "a", 1)
    assert re.fullmatch(rf"cannot write .*; it needs {size:,} bytes, [\d,]+ bytes are free there", str(error.value))
    assert isinstance(error.value.__cause__, OSError)
    checkpoint = load_any(tmp_path / "whole", need_tokenizer=False)
    size = cp.write_nanogpt(tmp_path / "ckpt.pt", checkpoint, accept_erf_gelu=True).stat().st_size
    with failing(monkeypatch, at, "error"), pytest.raises(cp.SaveError, match=f"it needs {size:,} bytes, "):
        cp.write_nanogpt(tmp_path / "ckpt.pt", checkpoint, accept_erf_gelu=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(cp.SaveError, match="cannot write"):
        save(tmp_path / "file", 1)


def test_an_interrupted_move_of_an_earlier_run_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    for step in (1, 2, 3):
        save(base, step)
    for step in (1, 3):
        damage(base / f"step-{step:08d}" / "MANIFEST.json")
    (base / "metrics.jsonl").write_text("{}")
    everything = {"metrics.jsonl", "step-00000001", "step-00000002", "step-00000003"}
    numbers = iter(range(10**6))

    def fresh() -> Path:
        return Path(shutil.copytree(base, tmp_path / f"run{next(numbers)}"))

    for out, _, failure in every_failure(monkeypatch, fresh, cp.archive_previous):
        cp.archive_previous(out)
        assert os.listdir(out) == ["previous-run-a"], failure
        assert set(os.listdir(out / "previous-run-a")) == everything, failure


# -------------------------------------------------------------------------------------------------------------- habits


@pytest.mark.parametrize("count", [20, pytest.param(256, marks=pytest.mark.slow)])
def test_the_meta_model_has_the_names_and_shapes_of_the_model(count: int) -> None:
    choices: dict[str, list[Any]] = {
        "bias": [True, False], "n_kv_head": [None, 2], "pos_embedding": ["learned", "rope"],
        "norm": ["layernorm", "rmsnorm"], "activation": ["gelu", "swiglu"], "mlp_hidden": [None, 24],
        "qk_norm": [True, False], "tie_embeddings": [True, False],
    }  # fmt: skip
    for values in random.Random(0).sample([*itertools.product(*choices.values())], count):
        config = GPTConfig(
            block_size=3, vocab_size=5, n_layer=2, n_head=4, n_embd=16, **dict(zip(choices, values, strict=True))
        )
        model = GPT(config)
        real = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()]
        assert [(n, tuple(t.shape), t.dtype) for n, t in meta_tensors(config).items()] == real, config
        tied = {"lm_head.weight": "transformer.wte.weight"} if config.tie_embeddings else {}
        assert tied_names(config) == tied
        assert list(dict(meta_model(config).named_parameters())) == list(dict(model.named_parameters()))


def test_a_missing_checkpoint_is_reported_without_torch() -> None:
    code = (
        "import sys\nfrom llm_from_scratch.checkpoint.store import find_checkpoint, archive_previous\n"
        "from llm_from_scratch.checkpoint.load import load\n"
        "for call in (find_checkpoint, load):\n"
        "    try: call('nowhere')\n"
        "    except ValueError as e: print(e)\n"
        "archive_previous('.')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and done.stdout.count("no checkpoint nowhere") == 2


def test_tensors_are_written_as_safetensors_writes_them() -> None:
    tensors = {
        f"tensor {i}": torch.arange(n).reshape(shape).to(dtype)
        for i, (n, shape, dtype) in enumerate(
            [
                (6, (2, 3), torch.float32), (5, (5,), torch.bfloat16), (1, (), torch.float32), (3, (3,), torch.uint8),
                (4, (2, 2), torch.int64), (2, (2,), torch.float16), (0, (0, 4), torch.float64), (2, (2,), torch.bool),
                (2, (1, 2), torch.int32),
            ]
        )
    }  # fmt: skip
    written = b"".join(bytes(piece) for piece in weights.file_of(tensors))
    read = load(written)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert len(written) == len(to_bytes(tensors))
    assert load(b"".join(weights.file_of({}))) == {}


def test_a_file_is_written_without_a_copy_of_its_tensors() -> None:
    weight = torch.zeros(1000)
    header, content = weights.file_of({"weight": weight})
    assert len(content) == 4000 and (len(header) - 8) % 8 == 0
    weight += 1
    assert bytes(content[:4]) == bytes(weight[:1].numpy())  # the tensor's own memory


# of each file as version 1 of the format has it, the beginning of its sha256
VERSION_1 = {
    "config.json": "85c0ba1aedf10cb5",
    "model.json": None,  # new settings of the model are added to it
    "model.safetensors": "e99341141ef54cb2",
    "optimizer.json": "a81d7a69768701e3",
    "optimizer.safetensors": "9a56842f6224a81c",
    "rng.safetensors": "599fa9cdad72a6cf",
    "tokenizer.meta.json": "2015da01b0a24cf9",
    "trainer.json": "cca343bf61f6b58f",
}


def test_the_bytes_of_a_checkpoint_have_not_changed(tmp_path: Path) -> None:
    config = GPTConfig(block_size=4, vocab_size=6, n_layer=1, n_head=1, n_embd=4)
    model = {name: torch.arange(t.numel()).reshape(t.shape) / 8 for name, t in GPT(config).state_dict().items()}
    model["lm_head.weight"] = model["transformer.wte.weight"]
    names = [name for name in model if name != "lm_head.weight"]
    moments = {name: {"step": torch.tensor(3.0), "exp_avg": model[name] * 2} for name in names}
    path = cp.save_checkpoint(
        tmp_path, step=3, model_config=config, model=model, run_id="a",
        optimizer={"state": moments, "param_groups": [{"names": names, "lr": 0.1, "betas": (0.9, 0.95)}]},
        trainer={"best_val_loss": 2.5}, rng={"cpu.0": torch.arange(16, dtype=torch.uint8)},
        config={"training": {"max_iters": 9}}, tokenizer=CharTokenizer("abcdef"), val_loss=2.0,
    )  # fmt: skip
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    assert files.keys() == VERSION_1.keys()
    assert {n: e["sha256"][:16] for n, e in files.items() if VERSION_1[n]} == {n: d for n, d in VERSION_1.items() if d}
