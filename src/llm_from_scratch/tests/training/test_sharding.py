"""Sharded models: FSDP and HSDP in several processes equal one process."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.config import Config, GPTConfig, OptimizerConfig, SystemConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.dataset import TokenData
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.packing import PackedData
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.machine.device import Runtime
from llm_from_scratch.training import parallel
from llm_from_scratch.training.opening import open_run
from llm_from_scratch.training.optimizer import clip_gradients, make_optimizer
from llm_from_scratch.training.parallel import with_parallel
from llm_from_scratch.training.rule import Dither
from llm_from_scratch.training.sharding import local, rows_of, total_norm
from llm_from_scratch.training.trainer import train, train_step
from llm_from_scratch.training.wrap import shard

from ..ranks import in_ranks, process_group
from ..tiny import read_metrics, tiny_config

SLOW = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
SETTINGS: dict[str, Any] = {
    "batch_size": 2, "gradient_accumulation_steps": 4, "max_iters": 20, "eval_interval": 20, "bias": False,
    "n_layer": 2, "n_embd": 18, "learning_rate": 3e-3,
}  # fmt: skip


def test_rows_are_cut_as_torch_cuts_them() -> None:
    for height in range(1, 12):
        for shards in range(1, 6):
            found = [list(range(height))[rows_of(height, shards, i)] for i in range(shards)]
            expected = [chunk.tolist() for chunk in torch.arange(height).chunk(shards)]
            assert found == expected + [[]] * (shards - len(expected))


def test_the_noise_of_an_element_does_not_depend_on_the_process() -> None:
    torch.manual_seed(0)
    size = (1 << 17) + 1000
    values, dither = torch.randn(size), Dither(3)
    whole = torch.empty(size, dtype=torch.bfloat16)
    dither.round([(whole, values.clone())], "w", 4, 0)
    for begin in (1, 77, 1 << 17, (1 << 17) + 5):
        part = torch.empty(size - begin, dtype=torch.bfloat16)
        dither.round([(part, values[begin:].clone())], "w", 4, 0, begin)
        assert torch.equal(part, whole[begin:])
    assert not torch.equal(whole, values.bfloat16())


def test_the_norm_is_precise_for_gradients_of_any_shape() -> None:
    torch.manual_seed(0)
    shapes = (torch.randn(()), torch.randn(7), torch.randn(4, 3, 2).permute(1, 2, 0), torch.full((2000, 1500), 0.3))
    gradients = [*shapes, torch.empty(0, 5)]  # the last one is of a process without rows
    exact = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    assert float(total_norm(gradients)) == pytest.approx(exact, rel=1e-6)
    assert float(total_norm([])) == 0.0


# --- the choice ---


def chosen(monkeypatch: pytest.MonkeyPatch, world: int, memory: int | None = 1 << 40, **system: Any) -> Runtime:
    monkeypatch.setattr(parallel, "total_memory", lambda device: memory)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(system.pop("here", world)))
    tasks = system.pop("eval_tasks", None)
    again: Any = SimpleNamespace(trainer={"machine": {"parallel": "fsdp"}}) if system.pop("again", False) else None
    config = Config(system=SystemConfig(device="cpu", **system), model=GPTConfig(n_layer=2, vocab_size=1000))
    config.training.eval_tasks = tasks
    runtime = runtimes.resolve(SystemConfig(device="cpu", backend="gloo"))
    return with_parallel(config, Runtime(**{**vars(runtime), "world_size": world}), again)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_auto_is_ddp_if_all_fits_and_prints_the_arithmetic(monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    model = GPT(GPTConfig(n_layer=2, vocab_size=1000))
    needed = 4 * 5 * sum(p.numel() for p in model.parameters())  # weights, gradients twice, two moments
    enough = chosen(monkeypatch, 4, memory=int(needed * 4 / 0.85) + 8)
    assert (enough.parallel, enough.shards) == ("ddp", 1) and "within 85% of a process's" in enough.reasons["parallel"]
    short = chosen(monkeypatch, 4, memory=int(needed * 4 / 0.85) - 8)
    assert (short.parallel, short.shards) == ("fsdp", 4) and "more than 85%" in short.reasons["parallel"]
    assert f"= {needed / 2**30:.2f} GiB" in short.reasons["parallel"]
    assert chosen(monkeypatch, 4, memory=None).parallel == "ddp"
    resumed = chosen(monkeypatch, 4, again=True)
    assert (resumed.shards, resumed.reasons["parallel"]) == (4, "fsdp (as at the start of the run)")
    assert "parallel" not in chosen(monkeypatch, 1).reasons


def test_the_groups_of_hsdp_divide_the_processes(monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    found = chosen(monkeypatch, 8, parallel="hsdp", here=4)
    assert (found.parallel, found.shards) == ("hsdp", 4)
    assert found.reasons["parallel"] == "hsdp (as set, 2 groups of 4 processes)"
    assert chosen(monkeypatch, 8, parallel="hsdp", shard_group=2).shards == 2
    with pytest.raises(UserError, match=r"8 processes into groups of 3 \(shard_group=3\).*one of 2, 4, 8"):
        chosen(monkeypatch, 8, parallel="hsdp", shard_group=3)
    with pytest.raises(UserError, match=r"groups of 1 \(the processes of a machine\)"):
        chosen(monkeypatch, 8, parallel="hsdp", here=1)


def test_one_process_that_remains_of_hsdp_trains_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # as torchrun restarts it
        monkeypatch.setenv(name, str(int(name == "WORLD_SIZE")))
    found = chosen(monkeypatch, 1, parallel="hsdp", shard_group=2)
    assert (found.parallel, found.shards) == ("ddp", 1)
    assert found.reasons["parallel"] == "hsdp has no effect in one process"


def test_options_that_a_sharded_model_does_not_support_are_refused(
    monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    with pytest.raises(UserError, match="parallel=fsdp .*does not fit.* does not support eval_tasks: remove it"):
        chosen(monkeypatch, 2, memory=1000, eval_tasks="a.yaml")
    with pytest.raises(UserError, match="shard_group needs --parallel=hsdp"):
        Config(system=SystemConfig(shard_group=2)).validate()
    with pytest.raises(UserError, match="reshard_after_forward has no effect with --parallel=ddp"):
        Config(system=SystemConfig(parallel="ddp", reshard_after_forward=False)).validate()


# --- in several processes ---


def trained(dataset: Path, out_dir: Path, leaves: dict[str, Any]) -> int:
    """A run; in a process of several, if torchrun's variables say so."""
    torch.set_num_threads(1)
    return train(tiny_config(dataset, out_dir=str(out_dir), **{**SETTINGS, **leaves}), quiet=True).exit_code


def final(out_dir: Path) -> dict[str, Tensor]:
    return load_checkpoint(find_checkpoint(out_dir, "last")).model


def equal(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-6) -> None:
    for name, tensor in expected.items():
        apart = float((found[name] - tensor).norm() / tensor.norm())
        assert apart <= limit, f"{name}: {apart:.1e}"


@SLOW
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "leaves"),
    [
        (2, {"parallel": "ddp"}),
        (2, {"parallel": "fsdp"}),
        (4, {"parallel": "hsdp", "shard_group": 2}),
        (2, {"parallel": "fsdp", "reshard_after_forward": False, "optimizer_dtype": "bfloat16"}),
    ],
    ids=["ddp", "fsdp", "hsdp", "kept"],
)
def test_processes_train_as_one(processes: int, leaves: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    """Twenty steps, the same global batch: each parameter within a millionth of its norm."""
    assert in_ranks(processes, trained, tmp_path, tiny_data, tmp_path / "many", leaves) == [0] * processes
    alone = {name: value for name, value in leaves.items() if "shard" not in name and name != "parallel"}
    rounded = "optimizer_dtype" in alone  # a moment near the border of two numbers may get the other one
    assert trained(tiny_data, tmp_path / "one", alone) == 0
    equal(final(tmp_path / "many"), final(tmp_path / "one"), 1e-3 if rounded else 1e-6)
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "many"), strict=True):
        for key in {"loss", "val_loss", "train_loss", "grad_norm"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-3 if rounded else 1e-5), key


ODD = {
    "tie_embeddings": False, "pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True,
    "n_embd": 20, "n_kv_head": 1, "max_iters": 3, "eval_interval": 3, "sample_interval": 3, "final_eval": True,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed blocks, a loss in chunks": {"gradient_checkpointing": True, "chunked_loss": True, **ODD},
    "a budget": {"activation_budget": 2e-5, **ODD},
    "bfloat16": {"dtype": "bfloat16", **ODD},
    "float16": {"dtype": "float16", **ODD},
}


@SLOW
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_work_in_shards(name: str, tiny_data: Path, tmp_path: Path) -> None:
    leaves = VARIANTS[name]
    sharded = {"parallel": "fsdp", **leaves}
    assert in_ranks(2, trained, tmp_path, tiny_data, tmp_path / "many", sharded) == [0, 0]
    assert trained(tiny_data, tmp_path / "one", leaves) == 0
    equal(final(tmp_path / "many"), final(tmp_path / "one"), {"bfloat16": 2e-2, "float16": 2e-3}.get(name, 1e-5))


@SLOW
@pytest.mark.slow
def test_a_process_without_documents_takes_part_in_an_evaluation(tmp_path: Path) -> None:
    """The validation split is one row, and two processes share it."""
    (tmp_path / "t.txt").write_text("".join(f"{a}+{a}={2 * a}\n" for a in range(40)))
    lines = prepare("t.txt", root=tmp_path, report=lambda line: None, tokenizer="char", lines=True)
    leaves = {"block_size": 64, "documents": True, "sample_order": "shuffled", "max_iters": 4, "eval_interval": 2}
    leaves |= {"n_embd": 16, "final_eval": True}
    assert len(PackedData.of(TokenData.open(lines, "val"), lines, "val", 64, None).learned) == 1
    sharded = {"parallel": "fsdp", **leaves}
    assert in_ranks(2, trained, tmp_path, lines, tmp_path / "many", sharded) == [0, 0]
    assert trained(lines, tmp_path / "one", leaves) == 0
    one, many = (
        [entry["val_loss_full"] for entry in read_metrics(tmp_path / name) if "val_loss_full" in entry]
        for name in ("one", "many")
    )
    assert len(one) == 1 and many == pytest.approx(one, rel=1e-5)


def states(dataset: Path, out_dir: Path, leaves: dict[str, Any]) -> dict[str, int]:
    """Bytes that this process keeps after a step."""
    config = tiny_config(dataset, out_dir=str(out_dir), **{**SETTINGS, **leaves})
    with open_run(config, None, "llm-train", None) as run:
        train_step(run, *run.next_batch())
        run.report_steps(wait=True)
        kept = [value for state in run.optimizer.state.values() for value in state.values()]
        moments = [value for value in kept if isinstance(value, Tensor)]
        groups: dict[str, list[Tensor]] = {"weights": [*run.model.parameters()], "moments": moments}
        with torch.no_grad():
            return {name: sum(local(t).numel() * t.itemsize for t in group) for name, group in groups.items()}


@SLOW
@pytest.mark.slow
def test_each_process_keeps_its_share_of_the_states(tiny_data: Path, tmp_path: Path) -> None:
    leaves = {"n_embd": 32, "progress": "none"}
    whole = states(tiny_data, tmp_path / "one", leaves)
    for processes, share in ((2, 0.55), (4, 0.30)):
        given = (tiny_data, tmp_path / str(processes), {"parallel": "fsdp", **leaves})
        for found in in_ranks(processes, states, tmp_path, *given):
            assert all(found[name] <= share * whole[name] for name in whole), (found, whole)


def rounded_in_shards(seed: int) -> list[dict[str, Tensor]]:
    """Weights and moments of three steps with the same gradients, whole and in shards, with moments in bfloat16."""
    runtime = Runtime(
        torch.device("cpu"), torch.float32, False, True, int(os.environ["RANK"]), 2, "gloo", None, {}, None, "fsdp", 2
    )
    found, norms = [], list[Tensor]()
    with process_group(), torch.no_grad():
        for sharded in (False, True):
            torch.manual_seed(seed)
            # torch's kernel may round the last elements differently if half the width is not a multiple of 16
            model = GPT(GPTConfig(vocab_size=301, block_size=8, n_layer=1, n_head=2, n_embd=544))
            if sharded:
                shard(model, Config(), runtime)
            optimizer = make_optimizer(model, OptimizerConfig(optimizer_dtype="bfloat16"), runtime.device, 5)
            for _ in range(3):
                for p in model.parameters():
                    gradient = torch.randn(p.shape)
                    if sharded:
                        rows = rows_of(len(gradient), 2, runtime.rank)
                        p.grad = torch.zeros_like(p)
                        local(p.grad).copy_(gradient[rows])
                    else:
                        p.grad = gradient
                norms.append(clip_gradients(model, 1e9))
                optimizer.step()
            parameters: dict[str, Any] = dict(model.named_parameters())
            whole = {name: p.full_tensor() if sharded else p for name, p in parameters.items()}
            for name, p in parameters.items():
                for slot in ("exp_avg", "exp_avg_sq"):
                    value: Any = optimizer.state[p][slot]
                    whole[f"{name}/{slot}"] = value.full_tensor() if sharded else value
            found.append({name: tensor.detach().clone() for name, tensor in whole.items()})
    torch.testing.assert_close(norms[:3], norms[3:], rtol=1e-5, atol=0)  # float32 sums in another order
    return found


@SLOW
@pytest.mark.slow
def test_moments_in_bfloat16_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    for whole, sharded in in_ranks(2, rounded_in_shards, tmp_path, 0):
        for name, tensor in whole.items():
            assert torch.equal(sharded[name], tensor), name


def skipped(dataset: Path, out_dir: Path, dtype: str) -> tuple[list[bool], bool, float]:
    """Step 1 is not finite on rank 1: its loss, or in float16 the rows of a gradient, as if they overflowed. Returns
    the verdicts, whether that step left this process's rows as they were, and the last scale of the loss."""
    leaves = {**SETTINGS, "parallel": "fsdp", "progress": "none", "dtype": dtype}
    config = tiny_config(dataset, out_dir=str(out_dir), **leaves)
    verdicts = []
    with open_run(config, None, "llm-train", None) as run, torch.no_grad():
        unscale = run.scaler.unscale_

        def overflow(optimizer: torch.optim.Optimizer) -> None:
            if run.state.step == 1 and run.runtime.rank == 1 and run.scaler.is_enabled():
                local(run.model.lm_head.weight.grad).fill_(float("inf"))
            unscale(optimizer)

        run.scaler.unscale_ = overflow  # type: ignore[method-assign]
        for step in range(3):
            before = [local(p).clone() for p in run.model.parameters()]
            hook = None
            if step == 1 and run.runtime.rank == 1 and dtype == "float32":
                hook = run.model.register_forward_hook(lambda m, a, out: (out[0], out[1] * float("nan")))
            with torch.enable_grad():
                verdicts.append(bool(train_step(run, *run.next_batch()).skipped))
            if hook is not None:
                hook.remove()
            same = [torch.equal(local(p), old) for p, old in zip(run.model.parameters(), before, strict=True)]
            if step == 1:
                unchanged = all(same)
        run.report_steps(wait=True)
        return verdicts, unchanged, run.scaler.get_scale()


@SLOW
@pytest.mark.slow
@pytest.mark.parametrize("dtype, scale", [("float32", 1.0), ("float16", 2.0**15)])
def test_a_step_that_is_not_finite_is_skipped_in_all_shards(
    dtype: str, scale: float, tiny_data: Path, tmp_path: Path
) -> None:
    """In float16 it also halves the scale of every process, which is 2^16 at first."""
    results = in_ranks(2, skipped, tmp_path, tiny_data, tmp_path / "run", dtype)
    assert results == [([False, True, False], True, scale)] * 2


class Idle(models.Block):
    """A parameter that an edit has left without a use."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.idle = torch.nn.Parameter(torch.ones(3))


def idle(dataset: Path, out_dir: Path, leaves: dict[str, Any]) -> int:
    with mock.patch.object(models, "Block", Idle):
        return trained(dataset, out_dir, leaves | {"n_embd": 22})


@SLOW
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_unused_parameter_does_not_change(parallel: str, tiny_data: Path, tmp_path: Path) -> None:
    leaves = {"parallel": parallel, "max_iters": 5, "eval_interval": 5}
    assert in_ranks(2, idle, tmp_path, tiny_data, tmp_path / "many", leaves) == [0, 0]
    assert idle(tiny_data, tmp_path / "one", leaves | {"parallel": "auto"}) == 0
    equal(final(tmp_path / "many"), final(tmp_path / "one"))
    found = [tensor for name, tensor in final(tmp_path / "many").items() if name.endswith("idle")]
    assert len(found) == 2 and all(torch.equal(tensor, torch.ones(3)) for tensor in found)


class Gated(models.Block):
    """A researcher's first edit: a learned number."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.gate = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return x + self.gate * (super().forward(x, *more) - x)


def gated(dataset: Path, out_dir: Path, leaves: dict[str, Any]) -> int:
    with mock.patch.object(models, "Block", Gated):  # of a width of its own: models are known by their settings
        return trained(dataset, out_dir, leaves | {"n_embd": 28})


@SLOW
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "leaves"),
    [
        (2, {"parallel": "fsdp", "reshard_after_forward": False, "optimizer_type": "muon"}),
        (4, {"parallel": "hsdp", "shard_group": 2}),
    ],
)
def test_a_learned_scalar_trains_with_shards(
    processes: int, leaves: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    """FSDP2 does not shard parameters without a dimension."""
    assert in_ranks(processes, gated, tmp_path, tiny_data, tmp_path / "many", leaves) == [0] * processes
    alone = {name: value for name, value in leaves.items() if name == "optimizer_type"}
    assert gated(tiny_data, tmp_path / "one", alone) == 0
    equal(final(tmp_path / "many"), final(tmp_path / "one"), 1e-5 if alone else 1e-6)
    gates = [tensor for name, tensor in final(tmp_path / "many").items() if name.endswith("gate")]
    assert len(gates) == 2 and all(abs(float(gate) - 0.7) > 1e-3 for gate in gates)
    assert gated(tiny_data, tmp_path / "many", alone | {"init_from": "resume", "max_iters": 22}) == 0
