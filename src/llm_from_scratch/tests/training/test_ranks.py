"""Several processes compute what one computes: optimizers, losses, evaluations, tasks. All start processes."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor

from llm_from_scratch.checkpoint.hashed_folder import write_synced
from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.config import GPTConfig, OptimizerConfig, SystemConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.dataset import TokenData
from llm_from_scratch.core.model import GPT, NextTokenLoss
from llm_from_scratch.core.tokenizer import CharTokenizer
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.machine import processes
from llm_from_scratch.training import muon as muons
from llm_from_scratch.training import rule
from llm_from_scratch.training import run as runs
from llm_from_scratch.training import wrap as wrapping
from llm_from_scratch.training.evaluate import estimate_loss, evaluate_split
from llm_from_scratch.training.harness import TaskModel
from llm_from_scratch.training.opening import open_run
from llm_from_scratch.training.optimizer import make_optimizer
from llm_from_scratch.training.owners import Matrix, rounds
from llm_from_scratch.training.report import TrainResult
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.trainer import train, train_step

from ..lazy import dtensor, fsdp
from ..ranks import in_ranks, process_group
from ..tiny import LETTERS, TOKENIZER, babble, read_metrics, tiny_config, write_data

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
CPU = torch.device("cpu")
STEPS = 20
RUN: dict[str, Any] = {
    "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 32, "batch_size": 3, "gradient_accumulation_steps": 4,
    "max_iters": STEPS, "eval_interval": 10, "backend": "gloo", "learning_rate": 3e-3, "grad_clip": 1.0,
}  # fmt: skip
NGRAMS = {"max_ngram": 3, "ngram_rows": 50}  # most n-grams share a row with others


def trained(dataset: Path, out_dir: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of this process at the end of a run."""
    found: dict[str, Tensor] = {}
    finish = Run.finish

    def finish_and_keep(run: Run) -> TrainResult:
        found.update({name: p.detach().clone() for name, p in run.model.state_dict().items()})
        return finish(run)

    with mock.patch.object(Run, "finish", finish_and_keep):
        train(tiny_config(dataset, out_dir=out_dir, **RUN | settings), quiet=True)
    return found


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest of any parameter, relative to its norm."""
    assert list(one) == list(other)
    pairs = [(p.detach().double(), other[name].double()) for name, p in one.items()]
    return max(float(torch.linalg.vector_norm(p - q) / torch.linalg.vector_norm(p)) for p, q in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, settings",
    [
        (2, {"optimizer_type": "muon"}),
        (2, {"optimizer_type": "normuon"}),
        (3, {"optimizer_type": "muon", **NGRAMS, "tie_embeddings": False, "n_layer": 2}),
        (4, {"optimizer_type": "muon", "optimizer_dtype": "bfloat16", "activation": "swiglu", "norm": "rmsnorm"}),
        (2, {"optimizer_type": "adamw", **NGRAMS, "forget_ngrams": True, "sample_order": "shuffled"}),
    ],
    ids=["muon", "normuon", "muon and n-grams", "muon in bfloat16", "adamw and n-grams"],
)  # fmt: skip
def test_a_run_of_several_processes_is_the_run_of_one(
    processes: int, settings: dict[str, Any], here: Path, tiny_data: Path
) -> None:
    """All processes hold the same bits, and what one process gets that accumulates more gradients."""
    of_each = in_ranks(processes, trained, here, tiny_data, str(here / "many"), settings)
    for other in of_each[1:]:
        assert all(torch.equal(other[name], p) for name, p in of_each[0].items())
    alone, sums = trained(tiny_data, "one", settings), trained(tiny_data, "sums", settings | {"micro_batch": 1})
    # Muon enlarges the rounding errors of sums: so does another order of the same sum in one process
    limit = max(1e-6, 2 * difference(alone, sums))
    assert difference(alone, of_each[0]) <= limit <= (1e-5 if settings.get("optimizer_dtype") is None else 0.1)
    one, many = read_metrics(Path("one")), read_metrics(Path("many"))
    for a, b in zip(one, many, strict=True):
        for key in {"loss", "train_loss", "val_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=10 * limit), (a["step"], key)
    saved = load_checkpoint(find_checkpoint("many", "last"))
    assert all(torch.equal(saved.model[name], of_each[0][name]) for name in saved.model)
    # one process resumes the run of many
    train(tiny_config(tiny_data, **RUN | settings | {"out_dir": "many", "init_from": "resume", "max_iters": 22}))


class Counting(models.Block):
    """It counts its batches."""

    calls: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Any:
        if self.training:
            self.calls += 1
        return super().forward(x, *given, **named)


class Skipped(models.Block):
    """In training, only the second process needs its parameters."""

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Any:
        used = not self.training or os.environ["RANK"] == "1"
        return super().forward(x, *given, **named) if used else x


def edited(dataset: Path, out_dir: str, block: type, settings: dict[str, Any]) -> dict[str, Tensor]:
    with mock.patch.object(models, "Block", block):
        # of a width of its own: models are known by their settings
        return trained(dataset, out_dir, {"optimizer_type": "adamw", "n_embd": 40, **settings})


@pytest.mark.slow
def test_a_buffer_counts_the_batches_of_the_run_alone(here: Path, tiny_data: Path) -> None:
    """Not those that try the model before its first step, or when it resumes."""
    ways: dict[str, dict[str, Any]] = {"start": {}, "resumed": {"init_from": "resume", "max_iters": 25}}
    for name, settings in ways.items():
        many = in_ranks(2, edited, here, tiny_data, str(here / "many"), Counting, {"micro_batch": 3} | settings)
        (here / "edited-2").rename(here / name)
        for found in (*many, edited(tiny_data, "one", Counting, {"micro_batch": 6} | settings)):
            calls = [float(p) for key, p in found.items() if key.endswith("calls")]
            assert calls == [2.0 * settings.get("max_iters", STEPS)] * 3


@pytest.mark.slow
def test_parameters_that_one_process_does_not_use_are_trained_by_the_others(here: Path, tiny_data: Path) -> None:
    one, other = in_ranks(2, edited, here, tiny_data, str(here / "many"), Skipped, {"collective_timeout": 20.0})
    assert all(torch.equal(one[name], p) for name, p in other.items())


def refused(folder: Path) -> str:
    """Why a run does not start whose processes each read the data of their own folder."""
    os.chdir(folder / os.environ["RANK"])
    with pytest.raises(UserError) as caught:
        train(tiny_config("data", out_dir=str(folder / "run"), **RUN), quiet=True)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["tokens", "tokenizer"])
def test_processes_with_other_data_of_the_same_size_do_not_start(differs: str, here: Path) -> None:
    write_data(here / "0" / "data")
    tokenizer = CharTokenizer.from_text([LETTERS.replace("r", "z")]) if differs == "tokenizer" else TOKENIZER
    ids = TOKENIZER.encode(babble(2000, seed=2)) if differs == "tokens" else None
    write_data(here / "1" / "data", ids, tokenizer=tokenizer)
    for error in in_ranks(2, refused, here, here):
        what = "the checksum of the tokens" if differs == "tokens" else "the tokenizer"
        assert error.startswith(f"the processes do not agree: {what} is ")


def waited_for(work: str) -> str:
    """Rank 0 works for twice the timeout: in a thread that writes, or in functions whose stack changes."""
    rank, timeout = int(os.environ["RANK"]), 4.0
    processes.start("gloo", rank, 2, timeout)

    def moves() -> None:
        end = time.monotonic() + 2 * timeout
        while time.monotonic() < end:
            if work == "writes":
                write_synced(Path("file"), (b"x" for _ in range(10)))
            else:
                babble(200)

    if rank == 0 and work == "writes":
        thread = threading.Thread(target=moves)
        thread.start()
        processes.join(thread)
    elif rank == 0:
        moves()
    processes.wait_for_all(2)
    processes.stop()
    return "healthy"


@pytest.mark.slow
@pytest.mark.parametrize("work", ["writes", "computes"])
def test_a_process_that_moves_is_waited_for_longer_than_the_timeout(work: str, here: Path) -> None:
    assert in_ranks(2, waited_for, here, work) == ["healthy", "healthy"]


def after_first(fails: bool) -> str:
    """What each process learns of rank 0's work; then they meet again."""
    done = Path(f"done-{fails}")

    def work() -> None:
        time.sleep(1)
        done.touch()
        if fails:
            raise UserError("no space left")

    try:
        processes.after_first(work, 30.0)
        outcome = "done"
    except UserError as error:
        outcome = str(error)
    assert done.exists()
    processes.start("gloo", int(os.environ["RANK"]), 2, 30.0)
    processes.wait_for_all(2)
    processes.stop()
    return outcome


@pytest.mark.slow
def test_the_others_learn_the_result_of_rank_0(here: Path) -> None:
    """So that none waits for ever for a checkpoint that could not be downloaded."""
    assert in_ranks(2, after_first, here, False) == ["done", "done"]
    (here / "after_first-2").rename(here / "first")
    assert in_ranks(2, after_first, here, True) == ["no space left", "no space left"]


# --- Muon ---


def gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 8, "vocab_size": 20, "n_layer": 3, "n_head": 2, "n_embd": 20, "bias": False}
    return GPT(GPTConfig(**shape | changes))


def with_random_gradients(model: GPT, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps on gradients that are the same in every process."""
    generator = torch.Generator().manual_seed(1)
    parameters: list[Any] = [*model.parameters()]
    for _ in range(steps):
        for p in parameters:
            g = torch.randn(p.shape, generator=generator)
            p.grad = dtensor.distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, "placements") else g
        optimizer.step()


def muon(model: GPT, processes: int = 1, **settings: Any) -> torch.optim.Optimizer:
    settings = {"optimizer_type": "muon", "learning_rate": 3e-3, "muon_learning_rate": 0.05, **settings}
    config = OptimizerConfig(**settings)
    return make_optimizer(model, config, CPU, processes=processes)


def sharded_steps(settings: dict[str, Any]) -> dict[str, Tensor]:
    """After steps of Muon on a model whose rows are cut into unequal parts."""
    with process_group():
        model = gpt()
        for block in model.transformer.h:
            fsdp.fully_shard(block)
        fsdp.fully_shard(model)
        with_random_gradients(model, muon(model, torch.distributed.get_world_size(), **settings), 4)
        whole: Any = model.named_parameters()
        return {name: p.full_tensor() for name, p in whole}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer_type": "normuon"}, {"optimizer_dtype": "bfloat16"}],
    ids=["float32", "normuon", "bfloat16"],
)
def test_matrices_of_sharded_rows_are_stepped_whole(processes: int, settings: dict[str, Any], here: Path) -> None:
    """3 does not divide the 20 and 60 rows; a process holds parts of two of the three matrices in a weight."""
    model = gpt()
    with_random_gradients(model, muon(model, **settings), 4)
    for found in in_ranks(processes, sharded_steps, here, settings):
        assert difference(dict(model.named_parameters()), found) <= 1e-6


def stepped(dataset: Path, out_dir: str, settings: dict[str, Any], double: bool) -> dict[str, Tensor]:
    """The weights after a run's steps. double: weights, moments and products in float64."""
    build, zeros = runs.build, rule.new_zeros

    def widened(*given: Any) -> GPT:
        model = build(*given).double()
        for p in (p for p in model.parameters() if hasattr(p, "rows")):
            p.rows = p.rows.double()
        return model

    def loss(self: NextTokenLoss, x: Tensor, targets: Tensor, head: Any) -> tuple[Tensor | None, Tensor]:
        return None, nn.functional.cross_entropy(head(x).flatten(0, 1), targets.flatten())  # not rounded to float32

    with contextlib.ExitStack() as patches:
        if double:
            patches.enter_context(mock.patch.object(runs, "build", widened))
            patches.enter_context(mock.patch.object(wrapping, "exchange", lambda *given: None))
            patches.enter_context(mock.patch.object(NextTokenLoss, "forward", loss))
            patches.enter_context(mock.patch.object(muons, "iteration_dtype", lambda device: torch.float64))
            wide = mock.patch.object(rule, "new_zeros", lambda like, shape, dtype: zeros(like, shape, torch.float64))
            patches.enter_context(wide)
        config = tiny_config(dataset, out_dir=out_dir, progress="none", **RUN | settings)
        run = patches.enter_context(open_run(config, None, "llm-train", None))
        for _ in range(STEPS):
            train_step(run, *run.next_batch())
            run.report_steps(wait=True)
        weights: dict[str, Any] = run.model.state_dict()
        return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in weights.items()}


@pytest.mark.slow
def test_muon_differs_by_rounding_only(here: Path, tiny_data: Path) -> None:
    """Small singular values grow up to 149 times, and rounding errors with them. In float64 two processes do the steps
    of one to 13 digits; in float32 both runs are as far from that."""
    given = {"optimizer_type": "muon", "bias": False}
    exact = stepped(tiny_data, "exact", given, True)
    assert all(p.dtype == torch.float64 for p in exact.values())
    for kind in ("ddp", "fsdp"):
        of_each = in_ranks(2, stepped, here, tiny_data, str(here / kind), given | {"parallel": kind}, True)
        (here / "stepped-2").rename(here / f"stepped-{kind}")
        assert difference(exact, of_each[0]) <= 1e-12
    alone = difference(exact, stepped(tiny_data, "alone", given, False))
    many = difference(exact, in_ranks(2, stepped, here, tiny_data, str(here / "many"), given, False)[0])
    assert 0.5 <= many / alone <= 2 and many <= 1e-5


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer_type": "adamw"}, "muon": {"optimizer_type": "muon"},
    "adamw, n-grams": {"optimizer_type": "adamw", **NGRAMS}, "muon, n-grams": {"optimizer_type": "muon", **NGRAMS},
}  # fmt: skip


def stepped_with_each(dataset: Path, out_dir: str, settings: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    given = {"activation": "swiglu", "grad_clip": 0.5, **settings}
    return {kind: stepped(dataset, f"{out_dir}-{kind}", given | own, False) for kind, own in OPTIMIZERS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hsdp"])
def test_processes_do_the_steps_of_fewer_that_accumulate_twice(parallel: str, here: Path, tiny_data: Path) -> None:
    """With a micro-batch each, they have the same bits: a sum of two gradients does not depend on their order, and
    their norm not on the shards. Two groups of two (hsdp) do the steps of two processes; one process adds up the four
    gradients in another order. Rows of n-grams are added up by twos in any number of processes."""
    starts: dict[int, dict[str, Any]] = {1: {}, 2: {"parallel": parallel}}
    if parallel == "hsdp":
        starts = {1: {}, 2: {"parallel": "ddp"}, 4: {"parallel": "hsdp", "shard_group": 2}}
    found = []
    for count, way in starts.items():
        given = (tiny_data, str(here / f"run-{count}"), {"gradient_accumulation_steps": max(starts), **way})
        found.append(in_ranks(count, stepped_with_each, here, *given))
    (one, *_), (half, *_), many = found[0], found[-2], found[-1]
    for kind in OPTIMIZERS:
        apart, from_one = (max(difference(of[kind], other[kind]) for other in many) for of in (half, one))
        print(f"{parallel}, {kind}: {apart:.1e}, to one process {from_one:.1e}")
        assert apart == 0, kind
        assert from_one <= (1e-6 if "adamw" in kind else 3e-6), kind


def matrix(rows: int, columns: int) -> Matrix:
    return Matrix("", nn.Parameter(torch.empty(rows, columns, device="meta")), 0, rows)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_work_is_shared_by_cost(processes: int) -> None:
    """The matrices of 12 layers of GPT-2: no process has more than the mean and one matrix; a batch has one shape."""
    matrices = [matrix(*shape) for _ in range(12) for shape in [(64, 64)] * 4 + [(256, 64), (64, 256)]]
    limit = 5 * 64 * 256
    work = [0] * processes
    found = []
    for batches in rounds(matrices, processes, limit):
        assert len(batches) == processes
        for rank, batch in enumerate(batches):
            assert len({m.shape for m in batch}) <= 1 and sum(m.p.numel() for m in batch) <= limit
            work[rank] += sum(m.shape[0] ** 2 * m.shape[1] for m in batch)
            found += batch
    assert sorted(map(id, found)) == sorted(map(id, matrices))
    assert max(work) <= sum(work) / processes + 64 * 64 * 256


# --- losses ---


def evaluations(sizes: list[int]) -> dict[Any, tuple[float, int]]:
    """(loss, tokens) of the same data with each batch size: all windows, overlapping windows, random windows."""
    runtime = runtimes.resolve(SystemConfig(device="cpu", backend="gloo", dtype="float32", compile=False))
    with process_group() if runtime.world_size > 1 else contextlib.nullcontext():
        # in float64: float32 products of other numbers of rows may round a loss of 4.6 by more than 1e-6
        model, ids = gpt().double(), np.random.default_rng(0).integers(0, 20, 150).astype(np.uint16)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(5)  # so that each token's loss is its own
        data, found = TokenData([ids]), dict[Any, tuple[float, int]]()
        for size in sizes:
            for stride in (None, 3):
                whole = evaluate_split(model, data, 8, runtime, batch_size=size, stride=stride)
                found[size, stride] = whole.loss, whole.tokens
            found[size, "random"] = estimate_loss(model, data, 8, 13, runtime, size), 0
            found[size, "one"] = estimate_loss(model, data, 8, 1, runtime, size), 0  # most processes have none
        return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_an_evaluation_is_the_same_for_any_number_of_processes(processes: int, here: Path) -> None:
    sizes = list(range(1, 17))
    alone = evaluations(sizes)
    for (_, kind), (loss, tokens) in alone.items():
        assert loss == pytest.approx(alone[1, kind][0], abs=1e-6) and tokens == alone[1, kind][1]
    for found in in_ranks(processes, evaluations, here, sizes):
        assert list(found) == list(alone)
        for key, (loss, tokens) in found.items():
            assert loss == pytest.approx(alone[key][0], abs=1e-6) and tokens == alone[key][1], key


@pytest.mark.slow
def test_the_logged_loss_is_the_mean_over_learned_tokens_of_all_processes(here: Path) -> None:
    """Of conversations, whose rows have different numbers of learned tokens."""
    rows = [{"prompt": f"{n}?", "completion": "ha" * (n % 7) + str(n)} for n in range(60)]
    Path("c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = prepare("c.jsonl", root=here, report=lambda line: None, tokenizer="char")
    settings = {"block_size": 32, "sample_order": "shuffled", "batch_size": 2, "max_iters": 6}
    settings |= {"optimizer_type": "adamw", "gradient_accumulation_steps": 3}
    of_each = in_ranks(3, trained, here, chats, str(here / "many"), settings)
    assert difference(trained(chats, "one", settings), of_each[0]) <= 1e-6
    one, many = (read_metrics(Path(name)) for name in ("one", "many"))
    assert sum("loss" in line for line in one) == 6
    for a, b in zip(one, many, strict=True):
        for key in {"loss", "train_loss", "val_loss", "grad_norm"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-6), (a["step"], key)


# --- tasks ---


def scores(processes: int) -> tuple[Any, ...]:
    """Likelihoods, those of whole texts, and continuations."""
    with process_group() if processes > 1 else contextlib.nullcontext(0) as rank:
        model = TaskModel(Generator(gpt(block_size=32), TOKENIZER), share=(rank, processes))
        shared = babble(20)
        pairs = [SimpleNamespace(args=(shared + babble(n % 5, n), " " + babble(2 + n % 4, 7 * n))) for n in range(23)]
        texts = [SimpleNamespace(args=(babble(5 + 9 * n, n),)) for n in range(5)]
        prompts = [SimpleNamespace(args=(babble(4, n), {"max_gen_toks": 3 + n % 2})) for n in range(9)]
        warm = [SimpleNamespace(args=(babble(4, n), {"max_gen_toks": 5, "temperature": 1.0})) for n in range(5)]
        likelihoods = model.loglikelihood([*pairs, pairs[0]])
        return likelihoods, model.loglikelihood_rolling(texts), model.generate_until([*prompts, *warm])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_requests_of_tasks(processes: int, here: Path) -> None:
    likelihoods, rolling, texts = scores(1)
    for found in in_ranks(processes, scores, here, processes):
        assert [is_best for _, is_best in found[0]] == [is_best for _, is_best in likelihoods]
        assert [value for value, _ in found[0]] == pytest.approx([value for value, _ in likelihoods], abs=1e-5)
        assert found[1] == pytest.approx(rolling, abs=1e-5) and found[2] == texts
