"""Checkpoints that several processes write: every tensor once, loaded by any number of processes and by none."""

from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from llm_from_scratch.checkpoint import hashed_folder
from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.checkpoint.shards import Joined, OnDisk, Place
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import DamagedError, SaveError, UserError
from llm_from_scratch.machine.team import Team
from llm_from_scratch.training.moments import load_optimizer_state, optimizer_state
from llm_from_scratch.training.optimizer import make_adamw
from llm_from_scratch.training.shares import own_share

from ..ranks import in_ranks, process_group
from ..together import chunk_of, together
from .test_store import MODERN, SMALL, contents, damage, reseal, save


def write_cut(out: Path, step: int, size: int, **more: Any) -> list[Any]:
    """A checkpoint from a team of threads, each with its chunk of every tensor, as FSDP holds them."""
    given = contents(step, **more)
    return together(size, lambda team: cp.save_checkpoint(out, **chunk_of(given, team), team=team))


def write_shared(out: Path, step: int, size: int, **more: Any) -> list[Any]:
    """The same from a team that holds everything, as DDP does."""

    given = {"adapter": {}} | contents(step, **more)

    def work(team: Team) -> Path:
        return cp.save_checkpoint(out, **own_share(given, team), team=team)

    return together(size, work)


def assert_same(got: cp.Checkpoint, given: dict[str, Any]) -> None:
    assert got.optimizer is not None and got.model.keys() == given["model"].keys()
    state = given["optimizer"]["state"]
    assert got.optimizer["state"].keys() == state.keys()
    pairs = [(got.model[name], tensor) for name, tensor in given["model"].items()]
    pairs += [(got.optimizer["state"][name][slot], t) for name, slots in state.items() for slot, t in slots.items()]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    assert got.optimizer["param_groups"] == given["optimizer"]["param_groups"]
    assert (got.step, got.trainer, got.config) == (given["step"], given["trainer"], given["config"])


def elements_in(files: list[Path]) -> Counter[str]:
    """Elements of each tensor in all files together, by an independent reader."""
    found: Counter[str] = Counter()
    for path in files:
        with safe_open(path, "pt") as file:
            found.update({key: file.get_tensor(key).numel() for key in file.keys()})
    return found


@pytest.mark.parametrize("write", [write_cut, write_shared])
@pytest.mark.parametrize(("shape", "size"), [(SMALL, 3), (MODERN, 4)])
def test_every_tensor_is_written_once_and_restored(tmp_path: Path, write: Any, shape: GPTConfig, size: int) -> None:
    path = tmp_path / "step-00000007"
    assert write(tmp_path, 7, size, shape=shape) == [path] * size
    given, manifest = contents(7, shape), json.loads((path / "MANIFEST.json").read_text())
    assert_same(cp.load_checkpoint(path), given)
    assert cp.load_checkpoint(path, weights_only=True).model.keys() == given["model"].keys()
    names = [f"{kind}-{i:05d}-of-{size:05d}.safetensors" for kind in ("model", "optimizer") for i in range(1, size + 1)]
    plain = [f"{name}.json" for name in ("config", "model", "optimizer", "trainer")]
    assert sorted(manifest["files"]) == sorted([*names, *plain, "rng.safetensors"])
    assert manifest["version"] == 2  # which an older program refuses by this number
    elements = elements_in([path / name for name in names])
    whole = {name: t.numel() for name, t in given["model"].items() if name != "lm_head.weight" or shape == MODERN}
    state = given["optimizer"]["state"].items()
    assert elements == whole | {f"{name}/{slot}": t.numel() for name, slots in state for slot, t in slots.items()}
    sizes = [sum(manifest["files"][name]["size"] for name in names[i::size]) for i in range(size)]
    assert max(sizes) < 1.25 * sum(sizes) / size


@pytest.mark.parametrize("size", [1, 3])
def test_tensors_on_disk_equal_memory(tmp_path: Path, size: int) -> None:
    write: Any = write_cut if size > 1 else lambda out, step, size, **more: [save(out, step, **more)]
    path: Path = write(tmp_path, 7, size, shape=SMALL)[0]
    got, given = cp.load_checkpoint(path, lazily=True), contents(7, SMALL)
    assert isinstance(got.model, OnDisk)
    assert_same(got, given)
    optimizer = make_adamw(model := GPT(SMALL), 0.1, 1e-3, (0.9, 0.95))
    model.load_state_dict(got.model)
    load_optimizer_state(optimizer, got.optimizer or {})
    again = optimizer_state(optimizer)["state"]
    assert all(
        torch.equal(again[n][s], t) for n, slots in given["optimizer"]["state"].items() for s, t in slots.items()
    )
    file = next(path.glob("optimizer*.safetensors"))
    damage(file)
    with pytest.raises(DamagedError, match=file.name):
        cp.load_checkpoint(path, lazily=True)


def test_a_tensor_that_one_process_holds_is_written_by_it(tmp_path: Path) -> None:
    """As Muon's momentum may be, and its counter, which is a number."""

    given = {"adapter": {}} | contents(2, MODERN)
    for index, slots in enumerate(given["optimizer"]["state"].values()):
        slots["draws"] = index

    def work(team: Team) -> Path:
        state = {
            name: slots if index % team.size == team.rank else {}
            for index, (name, slots) in enumerate(given["optimizer"]["state"].items())
        }
        own = given | {"optimizer": given["optimizer"] | {"state": state}}
        return cp.save_checkpoint(tmp_path, **own_share(own, team), team=team)

    together(3, work)
    found = cp.load_checkpoint(tmp_path / "step-00000002").optimizer
    assert found is not None
    for name, slots in given["optimizer"]["state"].items():
        assert found["state"][name].pop("draws") == slots.pop("draws")
        assert all(torch.equal(found["state"][name][slot], tensor) for slot, tensor in slots.items())


@pytest.mark.parametrize("rank", [0, 2])
def test_if_one_disk_fails_no_process_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    write_cut(tmp_path, 1, 3)
    before = sorted(tmp_path.rglob("*"))
    write = hashed_folder.write_synced

    def full(path: Path, pieces: Any) -> Any:
        if path.name == f"optimizer-{rank + 1:05d}-of-00003.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, pieces)

    monkeypatch.setattr(hashed_folder, "write_synced", full)
    errors = write_cut(tmp_path, 2, 3)
    assert all(isinstance(error, SaveError) and "No space left on device" in str(error) for error in errors)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(hashed_folder, "write_synced", write)
    assert write_cut(tmp_path, 2, 3) == [tmp_path / "step-00000002"] * 3


def test_each_process_reads_its_files_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = hashed_folder.write_synced

    def lying(path: Path, pieces: Any) -> Any:
        entry = write(path, pieces)
        if path.name.startswith("model-00002"):
            damage(path)
        return entry

    monkeypatch.setattr(hashed_folder, "write_synced", lying)
    errors = write_cut(tmp_path, 1, 3)
    assert all(isinstance(error, SaveError) and "model-00002-of-00003" in str(error) for error in errors)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged-step-00000001"]


def test_machines_that_do_not_share_the_folder_are_named(tmp_path: Path) -> None:
    def work(team: Team) -> None:
        cp.check_shared(tmp_path / str(team.rank // 2), team)

    errors = together(4, work)
    assert all(isinstance(e, UserError) and "is not the same folder on all machines" in str(e) for e in errors)
    assert together(2, work) == [None, None] and not list(tmp_path.rglob("*mp-*"))


def test_not_finite_on_one_process_is_not_saved_by_any(tmp_path: Path) -> None:
    given = contents(3)

    def work(team: Team) -> Path:
        name = next(iter(given["model"]))
        own = {name: given["model"][name].clone() / (0 if team.rank == 1 else 1)}
        parts = {name: Place(0, 0, 1)}
        return cp.save_checkpoint(tmp_path, **given | {"model": own, "parts": parts, "optimizer": None}, team=team)

    errors = together(2, work)
    assert all(isinstance(e, UserError) and "contains values that are not finite" in str(e) for e in errors)
    assert list(tmp_path.iterdir()) == []


ROWS = torch.arange(12.0).reshape(4, 3)
JOINED: dict[str, tuple[list[tuple[dict[str, Tensor], dict[str, Place]]], str | None]] = {
    "rows": ([({"a": ROWS[1:]}, {"a": Place(0, 1, 4)}), ({"a": ROWS[:1]}, {"a": Place(0, 0, 4)})], None),
    "columns": ([({"a": ROWS[:, :2]}, {"a": Place(1, 0, 3)}), ({"a": ROWS[:, 2:]}, {"a": Place(1, 2, 3)})], None),
    "whole": ([({}, {}), ({"a": ROWS}, {})], None),
    "a gap": ([({"a": ROWS[:1]}, {"a": Place(0, 0, 4)}), ({"a": ROWS[2:]}, {"a": Place(0, 2, 4)})], "missing"),
    "no end": ([({"a": ROWS[:3]}, {"a": Place(0, 0, 4)})], "missing"),
    "overlap": ([({"a": ROWS[:3]}, {"a": Place(0, 0, 4)}), ({"a": ROWS[2:]}, {"a": Place(0, 2, 4)})], "missing"),
    "twice": ([({"a": ROWS}, {}), ({"a": ROWS}, {})], "two files"),
    "whole and part": ([({"a": ROWS}, {}), ({"a": ROWS[:1]}, {"a": Place(0, 0, 4)})], "fit together"),
    "beyond": ([({"a": ROWS}, {"a": Place(0, 1, 4)})], "fit together"),
    "other width": ([({"a": ROWS[:1]}, {"a": Place(0, 0, 2)}), ({"a": ROWS[:1, :1]}, {"a": Place(0, 1, 2)})], "fit"),
    "other type": ([({"a": ROWS[:2]}, {"a": Place(0, 0, 4)}), ({"a": ROWS[2:].int()}, {"a": Place(0, 2, 4)})], "fit"),
    "no such side": ([({"a": ROWS}, {"a": Place(2, 0, 4)})], "dimension"),
    "huge": ([({"a": ROWS}, {"a": Place(0, 0, 1 << 40)})], "larger than the files"),
}


@pytest.mark.parametrize("case", JOINED)
def test_parts_make_a_whole_or_are_refused(case: str) -> None:
    files, problem = JOINED[case]
    joined = Joined(limit=100)
    if problem is None:
        for content in files:
            joined.add(*content)
        assert torch.equal(joined.whole()["a"], ROWS)
        return
    with pytest.raises(ValueError, match=problem):
        for content in files:
            joined.add(*content)
        joined.whole()


def test_a_manifest_without_a_shard_is_refused(tmp_path: Path) -> None:
    """As a merge of folders might leave it: the manifest fits the files, and parts of tensors are missing."""
    path = write_cut(tmp_path, 1, 3)[0]
    for kind in ("model", "optimizer"):
        (path / f"{kind}-00002-of-00003.safetensors").unlink()
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    reseal(path, files={name: entry for name, entry in files.items() if (path / name).exists()})
    with pytest.raises(DamagedError, match="missing"):
        cp.load_checkpoint(path)


UNEVEN = GPTConfig(block_size=8, vocab_size=21, n_layer=3, n_head=2, n_embd=12)  # 21 rows for 2 or 4 processes


def sharded(seed: int, shards: int) -> GPT:
    """A model that FSDP2 shards among `shards` neighbours."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model, world = GPT(UNEVEN), torch.distributed.get_world_size()
    sizes = (world // shards, shards) if shards < world else (world,)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def save_sharded(folder: Path, shards: int) -> dict[str, Tensor]:
    """Of a process of FSDP2: a step of AdamW, then a checkpoint. Returns the tensors as torch gathers them."""
    with process_group() as rank:
        model = sharded(5, shards)
        optimizer = make_adamw(model, 0.1, 1e-2, (0.9, 0.95))
        idx = torch.randint(21, (2, 8), generator=torch.Generator().manual_seed(rank))
        model(idx, idx)[1].backward()
        optimizer.step()
        state, team = optimizer_state(optimizer), Team(rank, torch.distributed.get_world_size())
        contents = {
            "step": 1, "model_config": UNEVEN, "model": model.state_dict(), "adapter": {}, "optimizer": state,
            "rng": {"cpu.0": torch.get_rng_state()}, "config": {}, "trainer": {},
        }  # fmt: skip
        share = own_share(contents, team)
        cp.save_checkpoint(folder, **share, run_id="a", team=team)
        tensors: dict[str, Any] = dict(model.state_dict())
        for name, slots in state["state"].items():
            tensors |= {f"{name}/{slot}": value for slot, value in slots.items()}
        return {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "shards"), [(4, 4), (2, 2), (4, 2)])
def test_an_fsdp_checkpoint_is_read_without_fsdp(tmp_path: Path, processes: int, shards: int) -> None:
    tensors = in_ranks(processes, save_sharded, tmp_path, tmp_path / "run", shards)[0]
    found = cp.load_checkpoint(tmp_path / "run" / "step-00000001")
    assert found.optimizer is not None
    moments = {f"{name}/{slot}": t for name, slots in found.optimizer["state"].items() for slot, t in slots.items()}
    assert (found.model | moments).keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in (found.model | moments).items())
    written = list((tmp_path / "run" / "step-00000001").glob("*-of-*"))
    assert len(written) == 2 * processes
    assert elements_in(written) == {key: t.numel() for key, t in tensors.items() if key != "lm_head.weight"}
