"""training/muon.py and training/adamw.py: Muon against its formula and torch's, AdamW against torch's, moments in
bfloat16, steps that are skipped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.config import Config, GPTConfig, OptimizerConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.training import muon
from llm_from_scratch.training.moments import load_optimizer_state, optimizer_state
from llm_from_scratch.training.muon import COEFFICIENTS, Muon, orthogonalized
from llm_from_scratch.training.optimizer import Optimizer, make_optimizer, parameter_groups
from llm_from_scratch.training.rule import PIECE, Dither
from llm_from_scratch.training.trainer import train as run_training

from ..stepping import same_weights as same
from ..stepping import train_steps as train
from ..tiny import tiny_config

CPU = torch.device("cpu")
UNTIED = {"norm": "rmsnorm", "qk_norm": True, "activation": "swiglu", "tie_embeddings": False, "n_kv_head": 2}


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 4, "n_embd": 16, **changes}))


def made(model: nn.Module, **settings: Any) -> Any:
    return make_optimizer(model, OptimizerConfig(**{"optimizer_type": "muon", "learning_rate": 3e-3, **settings}), CPU)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.float32)


# --- the iteration ---


def with_singular_values(values: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, V, U diag(values) V^T), float64, from random orthogonal U (rows, n) and V (cols, n)."""
    generator = torch.Generator().manual_seed(rows + cols)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, rows, generator=generator, dtype=torch.float64))[0]
    return u, v, (u * values) @ v.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (48, 64), (48, 192)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_singular_values_end_near_one(dtype: torch.dtype, shape: tuple[int, int], scale: float) -> None:
    """Of spectra that fall evenly, fast, and from one value that stands out; U and V stay as they are."""
    n = shape[0]
    standing_out = torch.cat([torch.ones(1), torch.full((n - 1,), 0.05)])
    spectra = [torch.linspace(1, 0.02, n), torch.logspace(0, -1.5, n), standing_out]
    parts = [with_singular_values(values.double(), *shape) for values in spectra]
    results = orthogonalized(torch.stack([m for _, _, m in parts]).mul(scale).to(dtype)).double()
    for (u, v, _), result in zip(parts, results, strict=True):
        core = u.T @ result @ v
        if dtype == torch.float32:
            assert 0.984 <= core.diagonal().min() and core.diagonal().max() <= 1.016
            assert (core - core.diagonal().diag()).abs().max() < 1e-4
        else:  # 8 bits
            assert 0.8 <= core.diagonal().min() and torch.linalg.svdvals(result).max() <= 1.05


def test_the_polynomials_reach_the_stated_range() -> None:
    x = torch.linspace(0.01, 1, 100_001, dtype=torch.float64)
    slope = 1.0
    for a, b, c in COEFFICIENTS:
        x, slope = a * x + b * x**3 + c * x**5, slope * a
    assert (round(x.min().item(), 3), round(x.max().item(), 3), round(slope)) == (0.984, 1.015, 149)


def test_zero_is_kept() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not orthogonalized(torch.zeros(2, 4, 8, dtype=dtype)).any()


def adamw(**parameters: nn.Parameter) -> dict[str, Any]:
    """A group that AdamW steps."""
    return {"rule": "adamw", "params": list(parameters.values()), "names": list(parameters)}


# --- Muon ---


def polynomials_of(matrix: Tensor) -> Tensor:
    """What orthogonalized() is to give, from the singular values themselves."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (1.02 * (s**8).sum() ** 0.125)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_updates_follow_the_formula(kv_heads: int) -> None:
    """Three steps in float64, a matrix at a time: queries, keys and values each for itself."""
    model = make(n_kv_head=kv_heads, bias=True)
    optimizer = made(model, muon_learning_rate=0.1, muon_momentum=0.8, weight_decay=0.5)
    names = [n for n, _ in model.named_parameters() if (".attn.c" in n or ".mlp.c" in n) and n.endswith("weight")]
    assert optimizer.param_groups[0]["names"] == names and len(names) == 8
    values = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    momenta = {n: torch.zeros_like(values[n]) for n in names}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            if name not in names:
                continue
            g = p.grad.double()
            momenta[name] = 0.8 * momenta[name] + 0.2 * g
            ahead = 0.2 * g + 0.8 * momenta[name]
            values[name] *= 1 - 0.1 * 0.5
            k, v = 16, 16 + 4 * kv_heads
            parts = [slice(k), slice(k, v), slice(v, None)] if "c_attn" in name else [slice(None)]
            for part in parts:
                rows, cols = ahead[part].shape
                values[name][part] -= 0.1 * max(1, rows / cols) ** 0.5 * polynomials_of(ahead[part])
        optimizer.step()
    parameters = dict(model.named_parameters())
    for name in names:
        torch.testing.assert_close(parameters[name].double(), values[name], atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("in_float32")
def test_updates_equal_torch_except_for_the_polynomials(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon iterates in bfloat16 from the Frobenius norm, with one polynomial: so do we here."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has none")

    def theirs_iterated(x: Tensor) -> Tensor:
        from torch.optim._muon import _zeropower_via_newtonschulz as iterate

        return torch.stack([iterate(m, (3.4445, -4.775, 2.0315), 5, 1e-7) for m in x]).to(x.dtype)

    monkeypatch.setattr(muon, "orthogonalized", theirs_iterated)
    ours, theirs = (nn.Sequential(nn.Linear(6, 24, bias=False), nn.Linear(24, 6, bias=False)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = made(ours, muon_learning_rate=0.05, muon_momentum=0.9, weight_decay=0.3)
    reference = torch.optim.Muon(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=0.3)
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(8, 6)
        for model, stepper in ((ours, optimizer), (theirs, reference)):
            stepper.zero_grad()
            model(x).square().sum().backward()
            stepper.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, UNTIED, {"pos_embedding": "rope", "bias": False}])
def test_groups_hold_every_parameter_once(changes: dict[str, Any]) -> None:
    model = make(**changes)
    config = OptimizerConfig(optimizer_type="muon", learning_rate=1e-3, muon_learning_rate=0.03)
    groups = Muon.groups(model, config, parameter_groups(model, config.weight_decay))
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    of = {name: group for group in groups for name in group["names"]}
    for name, p in model.named_parameters():
        assert of[name]["params"][of[name]["names"].index(name)] is p
        is_matrix = p.dim() == 2 and ".h." in name
        assert ("momentum" in of[name], of[name]["weight_decay"] > 0) == (is_matrix, is_matrix), name
        assert of[name]["lr"] == pytest.approx(of[name]["lr_scale"] * 1e-3) == (0.03 if is_matrix else 1e-3)


def test_rates_of_their_own_for_embeddings_and_head() -> None:
    rates = {"learning_rate": 1e-3, "embedding_learning_rate": 0.2, "head_learning_rate": 0.004}
    model = make(tie_embeddings=False)
    of = {name: group["lr"] for group in made(model, **rates).param_groups for name in group["names"]}
    assert (of["transformer.wte.weight"], of["transformer.wpe.weight"], of["lm_head.weight"]) == (0.2, 0.2, 0.004)
    assert of["transformer.ln_f.weight"] == 1e-3
    tied = made(make(), **rates)
    of = {name: group["lr"] for group in tied.param_groups for name in group["names"]}
    assert (of["transformer.wte.weight"], of["transformer.wpe.weight"]) == (0.004, 0.2)
    with pytest.raises(
        UserError, match="the model does not have separate embeddings to train: set --embedding_learning_rate=None"
    ):
        made(make(pos_embedding="rope"), **rates)
    with pytest.raises(UserError, match="head_learning_rate needs --optimizer_type=muon"):
        Config(optimizer=OptimizerConfig(head_learning_rate=0.1)).validate()


@pytest.mark.cases(2)
@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_other_parameters_are_stepped_as_by_torch(fused: Any, decay: float) -> None:
    ours, theirs = make(**UNTIED), make(**UNTIED)
    group = adamw(**dict(ours.named_parameters())) | {"weight_decay": decay}
    optimizer = Optimizer([group], 3e-3, (0.8, 0.9), fused == "on")
    reference = torch.optim.AdamW(theirs.parameters(), 3e-3, (0.8, 0.9), weight_decay=decay, fused=fused == "on")
    train(ours, optimizer, 5)
    train(theirs, reference, 5)
    assert same(ours, theirs)
    mixed, plain = make(**UNTIED), make(**UNTIED)
    optimizer = made(mixed, fused=fused, weight_decay=decay)
    reference = torch.optim.AdamW(plain.parameters(), 3e-3, (0.9, 0.99), weight_decay=0.0, fused=fused == "on")
    train(mixed, optimizer, 1)
    train(plain, reference, 1)
    moved = dict(plain.named_parameters())
    for name, p in mixed.named_parameters():
        assert torch.equal(p, moved[name]) != (name in optimizer.param_groups[0]["names"]), name


def test_the_summed_gradient_counts() -> None:
    """Muon's step has the same length for any gradient: that of a sum is not the sum of the parts' steps."""
    models = [make(), make()]
    x = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    for model, parts in zip(models, (1, 2), strict=True):
        optimizer = made(model)
        for part in x.chunk(parts):
            (model(part[:, :-1], part[:, 1:])[1] / parts).backward()
        optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)


def test_many_matrices_at_once_are_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = make(n_layer=3), make(n_layer=3)
    train(whole, made(whole), 3)
    monkeypatch.setattr(muon, "CHUNK", 16 * 16 * 2)
    train(cut, made(cut), 3)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)


# --- the state ---


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_saved_by_name_and_restored_exactly(kind: Any, dtype: Any) -> None:
    settings = {"optimizer_type": kind, "optimizer_dtype": dtype}
    model = make(**UNTIED)
    optimizer = made(model, **settings)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer_state(optimizer))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert set(saved["state"]) == set(shapes)
    for name, slots in saved["state"].items():
        moments = {slot: value for slot, value in slots.items() if slot not in ("step", "draws")}
        is_muons = kind == "muon" and name in optimizer.param_groups[0]["names"]
        assert set(moments) == ({"momentum_buffer"} if is_muons else {"exp_avg", "exp_avg_sq"})
        assert all(m.shape == shapes[name] and m.dtype == getattr(torch, dtype) for m in moments.values())
    saved["state"] = dict(sorted(saved["state"].items(), reverse=True))
    twin = make(**UNTIED)
    twin.load_state_dict(model.state_dict())
    resumed = made(twin, **settings)
    load_optimizer_state(resumed, saved)
    train(model, optimizer, 3, seed=1)
    train(twin, resumed, 3, seed=1)
    assert same(model, twin)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "kind, dtype, longest",
    [
        ("muon", "bfloat16", 3),
        ("normuon", "float32", 0),
        pytest.param("muon", "float32", 0, marks=pytest.mark.slow),
        pytest.param("adamw", "bfloat16", 0, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_bit_exact(here: Path, tiny_data: Path, kind: str, dtype: str, longest: int) -> None:
    """Through a checkpoint on the disk, in which the state keeps its type."""
    settings = {"optimizer_type": kind, "optimizer_dtype": dtype, "max_ngram": longest, "ngram_rows": 64}
    settings |= {"schedule": "constant", "final_eval": False}
    run_training(tiny_config(tiny_data, out_dir="whole", max_iters=6, **settings))
    run_training(tiny_config(tiny_data, out_dir="cut", max_iters=3, **settings))
    run_training(tiny_config(tiny_data, out_dir="cut", max_iters=6, init_from="resume", **settings))
    whole, cut = (load_checkpoint(find_checkpoint(name, "last")) for name in ("whole", "cut"))
    assert cut.step == 6 and all(torch.equal(whole.model[name], cut.model[name]) for name in whole.model)
    assert whole.optimizer is not None and cut.optimizer is not None
    kinds = set()
    for name, slots in whole.optimizer["state"].items():
        for slot, value in slots.items():
            found = cut.optimizer["state"][name][slot]
            assert torch.equal(value, found) if isinstance(value, Tensor) else value == found, (name, slot)
            if isinstance(value, Tensor) and value.dim() and slot != "sum":
                kinds.add(found.dtype)
    assert kinds == {getattr(torch, dtype)}


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_may_change_how_its_state_is_kept(kind: Any) -> None:
    for before, after in (("float32", "bfloat16"), ("bfloat16", "float32")):
        model = make()
        optimizer = made(model, optimizer_type=kind, optimizer_dtype=before)
        train(model, optimizer, 2)
        saved = copy.deepcopy(optimizer_state(optimizer))
        other = made(model, optimizer_type=kind, optimizer_dtype=after)
        load_optimizer_state(other, saved)
        for name, slots in optimizer_state(other)["state"].items():
            for slot, value in slots.items():
                if isinstance(value, Tensor) and value.dim():
                    assert torch.equal(value, saved["state"][name][slot].to(getattr(torch, after)))
        train(model, other, 1)


def test_a_state_of_the_other_optimizer_is_refused() -> None:
    model = make()
    states = {}
    for kind in ("adamw", "muon", "normuon"):
        optimizer = made(model, optimizer_type=kind)
        train(model, optimizer, 1)
        states[kind] = optimizer_state(optimizer)
    for kind, other in (("adamw", "muon"), ("muon", "adamw"), ("muon", "normuon"), ("normuon", "muon")):
        with pytest.raises(UserError, match=f"{other}'s, not {kind}'s: resume with --optimizer_type={other}"):
            load_optimizer_state(made(make(), optimizer_type=kind), states[other])


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", ["muon", "normuon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skipped_step_changes_nothing(dtype: Any, kind: Any) -> None:
    """As on a GPU, where nobody waits to know whether the gradient is finite."""
    model, settings = make(), {"optimizer_type": kind, "optimizer_dtype": dtype, "fused": "on"}
    optimizer = made(model, **settings)
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer_state(optimizer)["state"]))
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = (model.state_dict(), optimizer_state(optimizer)["state"])
    for name, tensor in before[0].items():
        assert torch.equal(tensor.view(torch.int32), after[0][name].view(torch.int32)), name
    for name, slots in before[1].items():
        for slot, value in slots.items():
            assert slot == "draws" or torch.equal(value, after[1][name][slot]), (name, slot)
    # and one that is not skipped is the step without the flag
    twin = make()
    twin.load_state_dict(model.state_dict())
    plain = made(twin, **settings)
    load_optimizer_state(plain, copy.deepcopy(optimizer_state(optimizer)))
    optimizer.found_inf = torch.zeros(())
    for each, stepper in ((model, optimizer), (twin, plain)):
        stepper.zero_grad()
        train(each, stepper, 1, seed=5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


# --- moments in bfloat16 ---


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bfloat16_halves_the_state(kind: Any) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = make()
        optimizer = made(model, optimizer_type=kind, optimizer_dtype=dtype)
        train(model, optimizer, 1)
        slots = [v for s in optimizer_state(optimizer)["state"].values() for v in s.values()]
        found[dtype] = sum(v.nbytes for v in slots if isinstance(v, Tensor) and v.dim())
    assert 2 * found["bfloat16"] == found["float32"] > 0


def test_rounding_keeps_the_mean_and_exact_numbers() -> None:
    dither = Dither(seed=3)
    value = 1 + 2**-7 * 0.3  # between the neighbours 1 and 1 + 2^-7
    target = torch.empty(1 << 8, 1 << 10, dtype=torch.bfloat16)
    found = []
    for count in range(40):
        dither.round([(target.view(-1), torch.full((target.numel(),), value))], "w", count, 0)
        assert set(target.unique().tolist()) == {1.0, 1 + 2**-7}
        found.append(target > 1)
        assert found[-1].double().mean().item() == pytest.approx(0.3, abs=0.01)
    of_each = torch.stack(found).double().mean(0)  # an element is rounded up at 3 in 10 times too: 12 of 40, +- 2.9
    assert of_each.mean().item() == pytest.approx(0.3, abs=0.01)
    assert 0.05 < of_each.std().item() < 0.1 and 0.0 < of_each.min() and of_each.max() < 0.75
    for sign in (1, -1):
        exact = sign * torch.tensor([0.0, 1.5, 3.0, 2.0**-120, float("inf")])
        result = torch.empty(5, dtype=torch.bfloat16)
        for count in range(50):
            dither.round([(result, exact.clone())], "w", count, 0)
            assert torch.equal(result.float().view(torch.int32), exact.view(torch.int32))


def test_small_changes_of_the_second_moment_are_not_lost() -> None:
    """beta2 = 0.999: rounded to nearest, the moment of a steady gradient would stand still at half of its value."""
    p = nn.Parameter(torch.zeros(4096))
    optimizer = Optimizer([adamw(p=p)], 0.0, (0.9, 0.999), True, torch.bfloat16)
    nearest = torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(2000):
        p.grad = torch.ones(4096)
        optimizer.step()
        nearest = (nearest.float().lerp(torch.ones(1), 0.001)).bfloat16()
    expected = 1 - 0.999**2000
    assert optimizer.state[p]["exp_avg_sq"].float().mean().item() == pytest.approx(expected, rel=0.01)
    assert nearest.item() < 0.6 * expected


def test_a_tensor_of_several_pieces_is_stepped_as_one() -> None:
    """With moments that bfloat16 holds exactly after the first step, AdamW's second step is torch's."""
    size = 2 * PIECE + 7
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, size)) for _ in range(2))
    small, twin = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = Optimizer([adamw(s=small, p=ours)], 0.1, (0.5, 0.5), True, torch.bfloat16)
    reference = torch.optim.AdamW([twin, theirs], 0.1, (0.5, 0.5), weight_decay=0.0, fused=True)
    for value in (1.0, 2.0):
        for p in (ours, theirs, small, twin):
            p.grad = torch.full_like(p, value)
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs) and torch.equal(small, twin)
    assert optimizer.state[ours]["step"].item() == 2


def test_losses_equal_a_float32_state() -> None:
    """A noisy regression: what is left of the error is the noise of the steps, which the moments average."""
    inputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    outputs = inputs @ torch.linspace(-1, 1, 32) + torch.randn(512, generator=torch.Generator().manual_seed(1))
    errors = {}
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.zeros(32))
        optimizer = Optimizer([adamw(p=p)], 0.01, (0.9, 0.999), True, dtype)
        for step in range(600):
            rows = slice(step % 32 * 16, step % 32 * 16 + 16)
            p.grad = inputs[rows].T @ (inputs[rows] @ p.detach() - outputs[rows]) / 16
            optimizer.step()
        errors[dtype] = (inputs @ p.detach() - outputs).square().mean().item()
    assert torch.equal(state, torch.get_rng_state())  # the rounding draws from nobody's numbers
    assert errors[torch.float32] < 0.97 * outputs.square().mean() / 10
    assert errors[torch.bfloat16] == pytest.approx(errors[torch.float32], rel=0.02)
    assert errors[torch.bfloat16] != errors[torch.float32]
