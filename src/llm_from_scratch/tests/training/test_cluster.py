"""training/cluster.py: estimates for many GPUs against hand-worked numbers, and against what processes here send."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.cli.train import main, main_plan
from llm_from_scratch.config import Config
from llm_from_scratch.core.adapters import trained_model
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.training.cluster import Cluster, Exchange, cluster_of, estimate, exchanges, modes, table_sizes
from llm_from_scratch.training.optimizer import make_optimizer
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train_step

from ..ranks import bytes_sent, in_ranks
from ..tiny import tiny_config, write_data

WIDE: dict[str, Any] = {
    "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 192, "batch_size": 2, "gradient_accumulation_steps": 8,
    "optimizer_type": "muon", "backend": "gloo", "parallel": "ddp",
}  # fmt: skip


def counted(config: Config, processes: int, passes: int) -> float:
    """The estimate for processes on CPUs, in float32."""
    model, system = trained_model(config), config.system
    optimizer, mode = make_optimizer(model, config.optimizer, torch.device("cpu")), system.parallel
    near = system.shard_group or processes
    cluster, reshard = Cluster("H100", near, processes // near), system.reshard_after_forward
    return sum(e.sent for e in exchanges(model, optimizer, mode, cluster, passes, 4, 4, reshard, backend="gloo"))


def sent_by_steps(dataset: Path, settings: dict[str, Any]) -> tuple[float, int]:
    """Bytes that this process sends in an update, and its number of micro-batches."""
    plan = make_plan(tiny_config(dataset, out_dir="unused", **WIDE | settings))
    runtimes.start(plan.runtime, plan.config.system)
    run = Run(plan)
    for step in range(5):
        if step == 2:  # in the first one, DDP orders its buckets
            torch.distributed.barrier()
            before = bytes_sent()
        train_step(run, *run.next_batch())
    torch.distributed.barrier()  # the others have received it all
    found = (bytes_sent() - before) / 3
    run.close()
    runtimes.stop()
    return found, plan.micro_steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, settings",
    [
        (2, {}),
        (2, {"optimizer_type": "adamw"}),
        (4, {"parallel": "fsdp"}),
        (2, {"parallel": "fsdp", "reshard_after_forward": False}),
        (4, {"parallel": "hsdp", "shard_group": 2}),
    ],
    ids=["muon", "adamw", "sharded", "sharded, gathered once", "groups"],
)
def test_the_estimated_bytes_equal_the_sent_bytes(
    processes: int, settings: dict[str, Any], here: Path, tiny_data: Path
) -> None:
    config = tiny_config(tiny_data, **WIDE | settings)
    config.model.vocab_size = 20
    of_each = in_ranks(processes, sent_by_steps, here, tiny_data, settings)
    expected = counted(config, processes, of_each[0][1])
    assert sum(sent for sent, _ in of_each) / processes == pytest.approx(expected, rel=0.02)


# --- by hand ---


def gpt2(**leaves: Any) -> Config:
    """GPT-2 124M, 12 x 40 sequences per update, in float32 on a GPU of the table."""
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": False, "dtype": "auto"}
    sizes |= {"batch_size": 12, "gradient_accumulation_steps": 40}
    config = tiny_config("none", **sizes | leaves)
    config.model.vocab_size = 50304
    return config


def test_memory_and_bytes_of_gpt2_by_hand() -> None:
    """N = 124,373,760: 4 bytes for weights and gradients each, 8 for AdamW's moments; a ring sends 2 (W - 1) / W."""
    n, eight = 124_373_760, Cluster("H100", 8, 1)
    found = estimate(gpt2(), eight, "ddp")
    assert (found.sequences, found.micro_batch) == (60, 12)
    assert found.memory["parameters"] == found.memory["gradients"] == found.memory["buffers"] == 4 * n
    assert found.memory["optimizer"] == 8 * n and found.fits
    assert found.sent == pytest.approx(2 * 7 / 8 * 4 * n)
    sharded = estimate(gpt2(), eight, "fsdp")
    assert sharded.memory["optimizer"] == n and sharded.memory["parameters"] == n / 2
    # each of 5 micro-batches gathers the blocks twice and the rest once, in bfloat16; gradients are float32
    blocks = 12 * (12 * 768**2 + 2 * 768)
    assert sharded.sent == pytest.approx(7 / 8 * (5 * 2 * (2 * blocks + n - blocks) + 5 * 4 * n), rel=1e-3)
    half = estimate(gpt2(dtype="float16"), eight, "fsdp")  # which gathers float32
    assert half.exchanges[0].sent == 2 * sharded.exchanges[0].sent
    assert half.exchanges[1].sent == sharded.exchanges[1].sent
    two = estimate(gpt2(), Cluster("H100", 8, 2), "hsdp")
    weights, gradients, replicas = (exchange.sent for exchange in two.exchanges)
    assert two.sequences / two.micro_batch == 5
    assert gradients == pytest.approx(5 * 7 / 8 * 4 * n, rel=1e-3)
    assert replicas == pytest.approx(5 * 4 * n / 8, rel=1e-3)
    assert (two.exchanges[0].near, two.exchanges[0].far) == (8, 1) and weights > 0
    assert (two.exchanges[2].near, two.exchanges[2].far) == (1, 2)


def test_muon_sends_each_result_once() -> None:
    """85 million elements of matrices in bfloat16; the shares of 8 processes are equal."""
    cluster, config = Cluster("H100", 8, 1), gpt2(optimizer_type="muon")
    of_matrices = 12 * 12 * 768**2
    (muon,) = [e for e in estimate(config, cluster, "ddp").exchanges if e.name == "Muon"]
    assert muon.sent == pytest.approx(7 / 8 * 2 * of_matrices, rel=0.15)  # padded to the longest share of a round
    (muon,) = [e for e in estimate(config, cluster, "fsdp").exchanges if e.name == "Muon"]
    assert muon.sent == pytest.approx(2 * 7 / 8 * 2 * of_matrices / 8)


def test_a_ring_uses_the_links_of_its_nodes() -> None:
    """8 GB in all over 2 nodes of 4: 3/4 of it inside, at 360 GB/s, and a fourth of the half outside, at 40."""
    one = Exchange("gradients", 7.0e9, 0, 4, 2)
    assert one.seconds("H100") == pytest.approx(8 * 3 / 4 / 360 + 8 / 4 / 2 / 40)
    assert Exchange("x", 0.0, 1, 8, 128).seconds("A100") == pytest.approx(10 * 20e-6)
    assert Exchange("x", 0.0, 1, 1, 1).seconds("A100") == 0.0


def test_an_edited_model_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter in every block of the model counts for every way to share it."""

    def gated(config: Config) -> Any:
        model = copy.deepcopy(trained_model(config))
        for block in model.transformer.h:
            block.gate = torch.nn.Parameter(torch.empty(5, 100, device="meta"))
            block.number = torch.nn.Parameter(torch.empty((), device="meta"))
        return model

    cluster = Cluster("A100", 2, 2)
    before = [estimate(gpt2(), cluster, mode) for mode in modes(gpt2(), cluster)]
    monkeypatch.setattr("llm_from_scratch.training.cluster.trained_model", gated)
    after = [estimate(gpt2(), cluster, mode) for mode in modes(gpt2(), cluster)]
    for one, other in zip(before, after, strict=True):
        assert other.memory["optimizer"] > one.memory["optimizer"]
        assert other.sent > one.sent


def test_the_tables_of_ngrams_stay_whole() -> None:
    """By hand: weights, gradients and Adagrad's sums of a table, and of everything else over the shards."""
    small, ngrams = gpt2(n_layer=2), gpt2(n_layer=2, max_ngram=3, ngram_rows=1000)
    one, eight = (Cluster("H100", n, 1) for n in (1, 8))
    table = estimate(ngrams, one, "ddp").memory["parameters"] - estimate(small, one, "ddp").memory["parameters"]
    without, found = (estimate(config, eight, "fsdp").memory for config in (small, ngrams))
    assert found["parameters"] - without["parameters"] == table == found["gradients"] - without["gradients"]
    assert table > 0 and found["buffers"] == without["buffers"]
    plain = estimate(ngrams, one, "ddp").memory["optimizer"] - estimate(small, one, "ddp").memory["optimizer"]
    assert found["optimizer"] - without["optimizer"] == plain > 0


def test_the_table_has_whole_nodes() -> None:
    assert table_sizes(Cluster("H100", 6, 3)) == [1, 2, 4, 6, 12, 18, 24, 48, 96, 192, 384, 768]
    assert table_sizes(Cluster("H100", 8, 4)) == [1 << n for n in range(11)]
    assert table_sizes(Cluster("H100", 1, 3)) == sorted({3, *(1 << n for n in range(11))})


def test_the_command(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert main_plan(["gpt2-124m", "--gpus=8", "--gpu=h100", "--nodes=4", "--dataset=nowhere"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dataset nowhere is not prepared here: assuming GPT-2's vocabulary"
    assert "124,373,760 parameters" in lines[1] and "4 x 8 H100; each has 80 GB and 989 TFLOP/s" in lines[2]
    assert [line.split()[0] for line in lines[6:9]] == ["ddp", "fsdp", "hsdp"]
    table = [line.split() for line in lines[11:22]]
    assert [row[0] for row in table] == [*(f"{2**n:,}" for n in range(11))]
    assert table[0][-1] == "100%" and int(table[-1][-1][:-1]) < 100
    assert lines[23].startswith("hours: for 294,912,000,000 tokens (600,000 steps of 480 sequences: --max_iters);")
    rates, hours = ([float(row[at].replace(",", "")) for row in table] for at in (-3, -2))
    assert [294.912e9 / rate / 3600 for rate in rates] == pytest.approx(hours, abs=0.051)
    assert list(here.iterdir()) == []


def test_a_mixture_has_the_vocabulary_of_its_parts(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    for name in ("a", "b"):
        write_data(here / "data" / name)
    assert main_plan(["quick", "--gpus=8", "--dataset=a:0.5,b:0.5"]) == 0
    assert "vocabulary 20," in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, given, says",
    [
        (main_plan, ["--gpu=h1000"], "unknown --gpu=h1000: did you mean h100?"),
        (main_plan, ["--gpus=0"], "--gpus=0 is not a whole number from 1 to"),
        (main_plan, ["--nodes=two"], "--nodes=two is not a whole number"),
        (main_plan, ["--gpu=v100", "--dtype=bfloat16"], "--dtype=bfloat16: the V100 does not support it"),
        (main_plan, ["--gpus=8", "--init_from=gpt2"], "remove --init_from"),
        (main_plan, ["--gpus=8", "--budget=1min"], "--budget has no effect with --gpus"),
        (main_plan, ["--gpus=8", "--print_config"], "--print_config has no effect with --gpus"),
        (main_plan, ["--gpus=8", "--parallel=hsdp"], "--parallel=hsdp cannot train on 1 x 8 H100: choose ddp or fsdp"),
        (main_plan, ["--gpus=8", "--gpu=t4", "--parallel=hsdp"], "cannot train on 1 x 8 T4: choose ddp or fsdp"),
        (main, ["--gpus=8"], "--gpus estimates a run on other machines: use it with llm-plan"),
    ],
)
def test_mistakes_are_one_line(
    command: Any, given: list[str], says: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert command(["quick", "--dataset=nowhere", *given]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out
    assert cluster_of({}) == Cluster("H100", 1, 1)
