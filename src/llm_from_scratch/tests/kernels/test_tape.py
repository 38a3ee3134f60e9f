"""A training step in one call: against float64, with edits of the model that it must follow or leave to the model."""

from __future__ import annotations

import copy
import dataclasses
import random
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core import model as models
from llm_from_scratch.core.model import GPT, Block
from llm_from_scratch.kernels import compiled, purity, tape
from llm_from_scratch.kernels.compiled import Kernel
from llm_from_scratch.kernels.layers import layer_replacements
from llm_from_scratch.kernels.swap import swap, unswap
from llm_from_scratch.kernels.tape import RecordedGPT, why_not
from llm_from_scratch.machine.device import resolve
from llm_from_scratch.training import wrap
from llm_from_scratch.training.trainer import train
from llm_from_scratch.training.wrap import fits_one_call

from ..tiny import tiny_config

SHAPE: dict[str, Any] = {"block_size": 40, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 32}


def make(**changes: Any) -> GPT:
    torch.manual_seed(0)
    model = models.GPT(GPTConfig(**SHAPE | changes))
    model.compute_dtype = None  # as Runtime.place() does
    for p in model.parameters():  # gains of 1 and biases of 0 would hide mistakes
        nn.init.normal_(p, std=0.2)
    return model


def batch(rows: int = 5, tokens: int = 39) -> tuple[Tensor, Tensor]:
    ids = torch.randint(31, (rows, tokens + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def recorded(model: GPT) -> GPT:
    said: list[str] = []
    assert swap(model, {GPT: RecordedGPT}, said.append) == 1 and not said
    return model


def loss_and_gradients(model: GPT, ids: Tensor, targets: Tensor) -> list[Tensor]:
    loss = model(ids, targets)[1]
    assert loss is not None
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def runs_in_c(model: GPT, *given: Tensor) -> bool:
    logits, _ = model(*(given or batch()))
    return logits is None


@pytest.fixture
def in_c(level: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX2, and with AVX-512."""
    monkeypatch.setattr(tape, "load_kernel", lambda: level)


SHAPES: list[Any] = [
    {"bias": False}, {"bias": True, "n_head": 1, "activation": "gelu_tanh", "n_layer": 1},
    {"norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1, "tie_embeddings": False, "bias": False},
    pytest.param({"activation": "relu2", "n_embd": 96, "n_head": 3}, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.cases(2)
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_it_is_the_model_of_float64(in_c: None, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, targets) = make(**changes), batch()
    targets[1, 5:9] = -1
    exact = copy.deepcopy(model).double()
    swap(model, layer_replacements(model, False), print)
    kinds = [type(m) for m in model.modules()][1:]
    monkeypatch.setattr(tape, "ROWS", 80)  # two sequences at once
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = loss_and_gradients(recorded(model), ids, targets)
    assert runs_in_c(model) and kinds == [type(m) for m in model.modules()][1:]
    for a, b in zip(loss_and_gradients(exact, ids, targets), found, strict=True):
        assert (b - a).norm() <= 2e-6 * a.norm()


def test_micro_batches_and_repetitions_give_the_same(kernel: Kernel) -> None:
    model, given = recorded(make()), batch(6)
    whole, again = loss_and_gradients(model, *given), loss_and_gradients(model, *given)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    parts = [loss_and_gradients(model, *(t[rows] for t in given)) for rows in (slice(0, 2), slice(2, 6))]
    for a, b, c in zip(whole, *parts, strict=True):
        assert (a - b / 3 - c * 2 / 3).norm() <= 1e-5 * a.norm()


def test_gradients_are_added_and_scaled_by_autograd(kernel: Kernel) -> None:
    model, given = recorded(make()), batch()
    expected = loss_and_gradients(model, *given)[1:]
    for share in (0.25, 0.75):
        (model(*given)[1] * share).backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None and (p.grad - g).norm() <= 1e-6 * g.norm()
    loss = model(*given)[1]
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(model(*given)[1], list(model.parameters()), create_graph=True)


def test_wrong_input_and_numbers_match_the_model(kernel: Kernel) -> None:
    model, (ids, targets) = recorded(make()), batch()
    assert runs_in_c(model, ids, targets)
    for wrong in (-1, 31):
        with pytest.raises(IndexError):
            model(ids.clone().index_fill_(1, torch.tensor([3]), wrong), targets)
    with pytest.raises(IndexError):
        model(ids, torch.full_like(targets, 31))
    assert model(ids, torch.full_like(targets, -1))[1].isnan()
    with pytest.raises(models.UserError):
        model(*batch(2, 41))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 3] = torch.nan
    found = loss_and_gradients(model, ids, targets)
    assert found[0].isnan() and all(g.isnan().any() for g in found[1:])


def test_other_passes_use_the_models_own_forward(kernel: Kernel) -> None:
    model, (ids, targets) = recorded(make()), batch()
    plain = copy.deepcopy(model)
    unswap(plain)
    assert type(plain) is GPT
    with torch.no_grad():
        assert torch.equal(model(ids, targets)[0], plain(ids, targets)[0])
    assert torch.equal(model(ids)[0], plain(ids)[0])
    assert not runs_in_c(model, *batch(2, 1)) and runs_in_c(model, ids[:, 1:], targets[:, 1:])
    assert runs_in_c(model)
    model.transformer.wpe.weight.requires_grad_(False)  # frozen later
    assert not runs_in_c(model) and model(ids, targets)[1].requires_grad
    model.transformer.wpe.weight.requires_grad_(True)
    assert runs_in_c(model)


def test_a_change_between_steps_counts(kernel: Kernel) -> None:
    model, given = recorded(make()), batch()
    before = loss_and_gradients(model, *given)
    model.transformer.ln_f.eps = 0.5
    changed = loss_and_gradients(model, *given)
    unswap(model)
    for a, b, c in zip(loss_and_gradients(model, *given), changed, before, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() < (a - c).norm()
    recorded(model)
    seen: list[Any] = []
    hook = model.transformer.h[0].register_forward_hook(lambda *given: seen.append(given))
    assert not runs_in_c(model) and seen
    hook.remove()
    assert runs_in_c(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", Parallel.forward)
        patched = loss_and_gradients(model, *given)
        assert runs_in_c(model) and (patched[0] - changed[0]).abs() > 1e-4
        patch.setattr(Block, "forward", skipped)
        assert not runs_in_c(model)
    assert runs_in_c(model)
    model.transformer.h[1].mlp.dropout.p = 1.0
    assert not runs_in_c(model)
    model.transformer.h[1].mlp.dropout.p = 0.0
    model.transformer.h[1].forward = lambda x, *rest: x
    assert not runs_in_c(model)
    del model.transformer.h[1].forward
    assert runs_in_c(model)
    model.transformer.h[0].mlp.c_fc = models.Linear(32, 128, bias=False)
    assert runs_in_c(model) and model.transformer.h[0].mlp.c_fc.weight.grad is None
    model(*given)[1].backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad is not None


def test_a_function_in_the_memory_of_a_replaced_one_counts(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, where a cell that patches a class runs again."""

    def copied(f: Any) -> Any:
        return types.FunctionType(f.__code__, f.__globals__)

    model = recorded(make())
    monkeypatch.setattr(Block, "forward", first := copied(Parallel.forward))
    assert runs_in_c(model)
    place = id(first)
    Block.forward = copied(skipped)  # type: ignore[method-assign]
    del first
    made: list[Any] = []
    while len(made) < 100 and (not made or id(made[-1]) != place):
        made += (copied(skipped),)
    Block.forward = made[-1]  # type: ignore[method-assign]
    assert not runs_in_c(model)


class Gated(Block):
    scale: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.n_embd))
        self.register_buffer("scale", torch.ones(config.n_embd))
        self.steps, self.log = 0, [0]


def skipped(self: Block, x: Tensor, *rest: Any) -> Tensor:
    return x * random.random()


class WithGate(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x, *rest) + self.gate * x


class WithBuffer(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x * self.scale, *rest)


class DropPath(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x if self.training and random.random() < 0.5 else super().forward(x, *rest)


class DrawnPath(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x + super().forward(x, *rest) * (torch.rand(1) < 0.5)


class Counting(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.steps += 1
        return super().forward(x, *rest)


class CountingCalls(Gated):
    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        self.log += [len(self.log)]
        return super().__call__(x, *rest)


class Printing(Block):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        print(x.shape)
        return super().forward(x, *rest)


class Listing(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x if len(self.log) > 5 else super().forward(x, *rest)


class Reading(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x, *rest) if x.mean().item() < 9 else x


class Clipped(Block):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x, *rest).clamp(-50, 50)


class InPlace(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x, *rest).mul_(1)


class Detached(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x.detach(), *rest)


class Silent(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        with torch.no_grad():
            return super().forward(x, *rest)


class Drawn(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x if torch.rand(()) < 0.5 else super().forward(x, *rest)


class CountingBuffer(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.scale.add_(1)
        return super().forward(x, *rest)


class Steeper(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class OtherGradient(Block):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(Steeper.apply(x), *rest)


stop: Any = torch.detach


class OtherBranch(Block):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(stop(x), *rest)


class FewRows(Block):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x, *rest) if x.size(0) < 4 else x


class Phase:
    now = 0


class InPhase(Block):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x, *rest) if Phase.now < 4 else x


class WithDefault(Block):
    def forward(self, x: Tensor, *rest: Any, seen: Any = []) -> Tensor:  # noqa: B006
        return super().forward(x, *rest) if len(seen) < 4 else x


class Scaled(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return torch.add(x, super().forward(x, *rest), alpha=2)


class Mixed(Gated):
    """A linear layer on the residual: backward overwrites a gradient that the sum still needs."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.mix = models.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = x + self.mix(x)
        return super().forward(x, *rest)


class TwoSkips(Block):
    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        h = self.attn(self.ln_1(x), where, cache) + x
        h = h + x
        return h + self.mlp(self.ln_2(h))


quiet: Any = torch.no_grad


class Quiet(Gated):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        with quiet():
            return super().forward(x, *rest)


class OfLearning(Block):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x, *rest) if x.requires_grad else x


class Tolerant(Block):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        try:
            x = x.clamp(-0.1, 0.1)
        except Exception:
            x = x + self.ln_1(x)
        return super().forward(x, *rest)


EDITS: list[type[Block]] = [
    WithGate, WithBuffer, DropPath, DrawnPath, Counting, Listing, Reading, Clipped, InPlace, Detached, Silent, Drawn,
    CountingBuffer, InPhase, WithDefault, OtherGradient, Scaled, Mixed, TwoSkips, Quiet, OfLearning, OtherBranch,
    Tolerant, CountingCalls, Printing,
]  # fmt: skip


@pytest.mark.parametrize("block", EDITS)
def test_an_edited_block_is_left_to_the_model(block: type[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "Block", block)
    model = make()
    assert why_not(model)
    model.__class__ = RecordedGPT
    assert not runs_in_c(model)


def test_the_comparison_detects_edits_beyond_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model whose gradients are 0 too."""
    monkeypatch.setattr(models, "Block", OtherBranch)
    monkeypatch.setattr(purity, "HIDING", [])  # as if torch had another name for it
    model, given = make(), batch()
    for p in model.transformer.h.parameters():
        nn.init.zeros_(p)
    before = copy.deepcopy(model.state_dict())
    assert why_not(model) == "the kernel's loss or gradients differ"
    model.__class__ = RecordedGPT
    assert not runs_in_c(model, *given)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


def test_another_number_of_rows_is_recorded_again(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "Block", FewRows)
    model = recorded(make())
    plain = copy.deepcopy(model)
    unswap(plain)
    for rows in (3, 5, 3):
        loss, expected = (m(*batch(rows))[1] for m in (model, plain))
        assert runs_in_c(model, *batch(rows)) and (loss - expected).abs() < 1e-5


def on_ids(self: GPT, idx: Tensor, targets: Tensor | None = None, *rest: Any) -> Any:
    return own_forward(self, idx, idx, *rest)


own_forward = GPT.forward


def test_ids_and_targets_in_one_tensor_are_distinguished(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    both, model = torch.stack(batch()), recorded(make())
    assert runs_in_c(model, *both)
    monkeypatch.setattr(GPT, "forward", on_ids)
    assert why_not(model) == "cross_entropy" and not runs_in_c(model, *both)


class Numbered(Block):
    places: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.more = nn.Embedding(config.block_size, config.n_embd)
        self.register_buffer("places", torch.arange(config.block_size))
        self._scale = 1

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = super().forward(x, *rest) + self.more(self.places[: x.size(1)])
        return x if self._scale == 1 else x * self._scale


def test_a_changed_buffer_or_private_attribute_counts(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "Block", Numbered)
    model = recorded(make())
    assert runs_in_c(model)
    model.transformer.h[1]._scale = 2
    assert not runs_in_c(model)
    model.transformer.h[1]._scale = 1
    assert runs_in_c(model)
    model.transformer.h[1].places[0] = 3
    assert not runs_in_c(model)


def test_c_reads_only_weights_of_the_recorded_kind(kernel: Kernel) -> None:
    model, (ids, targets), said = recorded(make()), batch(), list[str]()
    tape.report_to(model, said.append)
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert runs_in_c(model) and not said
    weight.data = weight.data.t().contiguous().t()
    for _ in range(2):
        assert not runs_in_c(model)
    assert len(said) == 1
    assert said[0].startswith("training with torch from now on: the step cannot be recorded (a weight is not")
    weight.data = weight.data.contiguous()
    assert runs_in_c(model)
    model.double()
    assert not runs_in_c(model)
    model.float()
    torch.set_default_dtype(torch.float64)
    try:
        loss = model(ids, targets)[1]
        assert runs_in_c(model) and loss.dtype == torch.float32 and loss < 10
    finally:
        torch.set_default_dtype(torch.float32)


def two_tables(self: Any, idx: Tensor, targets: Tensor | None = None, *rest: Any) -> Any:
    x = self.transformer.wte(idx) + self.more(idx)
    return self.loss(self.transformer.ln_f(x), targets, self.lm_head)


def test_the_smallest_table_is_the_limit(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT, "forward", two_tables)
    model = make()
    model.more = nn.Embedding(20, 32)
    model.__class__ = RecordedGPT
    ids, targets = batch()
    assert runs_in_c(model, ids.clamp(max=19), targets)
    with pytest.raises(IndexError):
        model(ids, targets)


def test_two_threads_may_train_one_model(kernel: Kernel) -> None:
    model, given = recorded(make()), batch()
    expected = loss_and_gradients(model, *given)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: loss_and_gradients(model, *given), range(8)))
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, expected, strict=True))


class Parallel(Block):
    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        return x + self.attn(self.ln_1(x), where, cache) + self.mlp(self.ln_2(x))


class PostNorm(Block):
    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        x = self.ln_1(x + self.attn(x, where, cache))
        return self.ln_2(x + self.mlp(x))


class Slow(Block):
    def forward(self, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        y = self.ln_1(x)
        return self.mlp(self.ln_2(x + self.attn(y, where, cache) + y)) + x


@pytest.mark.slow
@pytest.mark.parametrize("block", [Parallel, PostNorm, Slow])
def test_a_block_of_the_same_operations_is_recorded(
    kernel: Kernel, block: type[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "Block", block)
    model, given = make(), batch()
    exact = copy.deepcopy(model).double()
    found = loss_and_gradients(recorded(model), *given)
    assert runs_in_c(model)
    for a, b in zip(loss_and_gradients(exact, *given), found, strict=True):
        assert (b - a).norm() <= 5e-6 * a.norm()


def test_it_is_chosen_for_the_measured_cases() -> None:
    def fits(micro_batch: int = 12, threads: int = 2, **changes: Any) -> bool:
        config = tiny_config("data", n_embd=128, block_size=64, vocab_size=65, **changes)
        runtime = dataclasses.replace(resolve(config.system), threads=threads)
        model = GPT(dataclasses.replace(config.model, n_layer=1))
        return fits_one_call(model, config, runtime, micro_batch)

    assert fits() and fits(13) and fits(7, 1) and not fits(7) and not fits(12, 6)
    for changes in ({"dropout": 0.1}, {"pos_embedding": "rope"}, {"gradient_checkpointing": True}, {"lora_rank": 4}):
        assert not fits(**changes)


@pytest.mark.parametrize(("stored", "used"), [(None, True), (True, True), (False, False)])
def test_a_resumed_run_keeps_its_settings(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, stored: bool | None, used: bool
) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "compiled")
    config = tiny_config("data", **{**SHAPE, "dtype": "float32", "compile": False})
    runtime = dataclasses.replace(resolve(config.system), compiled_layers=True, threads=1, one_call=stored)
    model, said = make(), list[str]()
    wrap.exchange(model, config, runtime, 4, said.append)
    assert isinstance(model, RecordedGPT) == used
    assert any("recorded from the model and run in C" in line for line in said) == used
    assert not used or runs_in_c(model)


@pytest.mark.slow
def test_a_run_learns_as_without_it_and_resumes_exactly(
    kernel: Kernel, here: Any, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def weights(out: str, **changes: Any) -> dict[str, Tensor]:
        shape = {"n_embd": 32, "schedule": "constant", "dtype": "float32", "compile": False, "threads": 1}
        train(tiny_config(tiny_data, **shape, out_dir=out, **changes))
        return load_checkpoint(find_checkpoint(out, "last")).model

    monkeypatch.setenv(compiled.VARIABLE, "compiled")
    whole = weights("whole", max_iters=6)
    assert "step: recorded from the model and run in C" in capsys.readouterr().out
    weights("cut", max_iters=3)
    for name, w in weights("cut", max_iters=6, init_from="resume").items():
        assert torch.equal(w, whole[name])
    monkeypatch.setattr(models, "Block", Clipped)
    weights("edited", max_iters=1)
    assert "training with torch: the step cannot be recorded (the kernel lacks aten.clamp.de" in capsys.readouterr().out
    monkeypatch.setattr(models, "Block", Block)
    monkeypatch.setenv(compiled.VARIABLE, "torch")
    for name, w in weights("plain", max_iters=6).items():
        assert (whole[name] - w).norm() <= 1e-4 * w.norm()
