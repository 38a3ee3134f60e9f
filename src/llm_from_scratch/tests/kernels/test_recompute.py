"""kernels/recompute.py: less is stored for the backward pass, and nothing else changes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm_from_scratch.config import Config, GPTConfig, SystemConfig
from llm_from_scratch.core.model import GPT, Block, LayerNorm
from llm_from_scratch.errors import UserError
from llm_from_scratch.kernels import recompute as activations
from llm_from_scratch.kernels.compiled import Kernel
from llm_from_scratch.kernels.layers import layer_replacements, layers_in_c
from llm_from_scratch.kernels.recompute import GIB, kept_by_a_block, recompute_cheap
from llm_from_scratch.kernels.swap import swap
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.training.wrap import exchange

SHAPE: dict[str, Any] = {"block_size": 16, "vocab_size": 20, "n_layer": 4, "n_head": 2, "n_embd": 32}
BATCH = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"bias": True},
    "dropout": {"dropout": 0.3},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "pos_embedding": "rope",
        "n_kv_head": 1,
        "tie_embeddings": False,
    },
    "relu2": {"norm": "rmsnorm", "activation": "relu2", "pos_embedding": "rope", "qk_norm": True},
}


def runtime(dtype: str = "float32") -> runtimes.Runtime:
    return runtimes.resolve(SystemConfig(device="cpu", dtype=dtype, compile=False))  # type: ignore[arg-type]


def build(variant: str = "gpt2", dtype: str = "float32", **training: Any) -> tuple[GPT, list[str]]:
    """A model set up as the settings say, and what was announced."""
    torch.manual_seed(0)
    config = Config(model=GPTConfig(**SHAPE | VARIANTS[variant]))
    for name, value in training.items():
        setattr(config.training, name, value)
    config.validate()
    model, said = GPT(config.model), []  # type: ignore[var-annotated]
    runtime(dtype).place(model)
    exchange(model, config, runtime(dtype), BATCH, said.append)
    return model, said


def step(model: GPT) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    tokens = torch.randint(20, (BATCH, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def saved_by(model: GPT, index: int = 0) -> int:
    """Bytes that autograd saves of a block, and those of its output: counted by another means than the code's."""
    block, found = model.transformer.h[index], {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    def whole(_block: Any, args: Any, forward: Any = block.forward) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = forward(*args)
        for known in (*block.parameters(), *args, *(args[1] or ())):
            if isinstance(known, Tensor):
                found.pop(known.untyped_storage().data_ptr(), None)
        found[out.untyped_storage().data_ptr()] = out.untyped_storage()
        return out

    block.forward = lambda *args: whole(block, args)
    loss = model(torch.zeros((BATCH, 16), dtype=torch.long))[0].sum()
    size = sum(storage.nbytes() for storage in found.values())
    del loss, block.forward
    return size


@pytest.mark.cases(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["gpt2", "llama", "relu2"])
def test_the_stored_tensors_of_a_block_are_counted(variant: str, dtype: str) -> None:
    model, _ = build(variant, dtype, activation_budget=None)
    kept, out = kept_by_a_block(model, runtime(dtype), BATCH)
    assert out == BATCH * 16 * 32 * (4 if dtype == "float32" else 2)
    assert kept == saved_by(model)


def test_cheap_recomputation_stores_only_the_products() -> None:
    model, _ = build("gpt2", activation_budget=None)
    recompute_cheap(model, print)
    tokens, width = BATCH * 16, 32
    # queries, keys and values; the attention's result, its log-sum for each of 2 heads; the sum; c_fc's; the output;
    # mean and scale of two norms
    floats = tokens * (3 * width + width + 2 + width + 4 * width + width + 4)
    kept, _ = kept_by_a_block(model, runtime(), BATCH)
    assert 4 * floats <= kept <= 4 * floats + 64  # and a seed that torch's attention keeps


QUICK = [("gpt2", "float32"), ("llama", "bfloat16")]
CASES = [(variant, dtype) for variant in VARIANTS for dtype in ("float32", "bfloat16")]


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("variant", "dtype"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_loss_and_gradients_stay_as_they_are(variant: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "WORTH_IT", 0)
    loss, gradients = step(build(variant, dtype, activation_budget=None)[0])
    middle = 3.5 * kept_by_a_block(build(variant, dtype, activation_budget=None)[0], runtime(dtype), BATCH)[0] / GIB / 2
    for changes in ({}, {"gradient_checkpointing": True}, {"activation_budget": middle}):
        model, said = build(variant, dtype, **changes)
        other, theirs = step(model)
        assert torch.equal(other, loss), changes
        for ours, plain in zip(theirs, gradients, strict=True):
            assert torch.equal(ours, plain), changes
        assert bool(said) == ("gradient_checkpointing" not in changes)
        model.eval()
        other_model, _ = build(variant, dtype, activation_budget=None)
        tokens = torch.randint(20, (2, 5))
        assert torch.equal(model(tokens)[0], other_model.eval()(tokens)[0])


class Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.cases(1)
@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_the_cheap_way_does_no_product_twice(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "WORTH_IT", 0)
    counts = []
    for changes in ({"activation_budget": None}, {}, {"gradient_checkpointing": True}):
        model, _ = build(variant, **changes)
        with Products() as products:
            step(model)
        counts.append(products.count)
    assert counts[0] == counts[1] < counts[2]


def test_a_value_shared_by_two_layers_is_recomputed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "WORTH_IT", 0)
    model, _ = build("llama")
    made, again = list[int](), activations.Made.again

    def counted(self: Any) -> Any:
        made.append(self.kept is None)
        return again(self)

    monkeypatch.setattr(activations.Made, "again", counted)
    step(model)
    blocks = len(model.transformer.h)
    # in each block c_attn, c_gate and c_fc need a norm, and c_proj the activation; gate and fc share their norm
    assert (len(made), sum(made)) == (4 * blocks, 3 * blocks)


def test_as_few_blocks_as_the_budget_needs() -> None:
    plain, _ = build(activation_budget=None)
    everything, out = kept_by_a_block(plain, runtime(), BATCH)
    recompute_cheap(plain, print)
    cheap, _ = kept_by_a_block(plain, runtime(), BATCH)
    for blocks in range(4):
        needed = blocks * out + (4 - blocks) * cheap
        model, said = build(activation_budget=needed / GIB)
        ours = [isinstance(b, activations.RecomputedBlock) for b in model.transformer.h]
        assert ours == [True] * blocks + [False] * (4 - blocks)
        assert f"{blocks} of 4 blocks" in said[0] or not blocks
        with activations.Allocated() as made:
            loss = model(torch.zeros((BATCH, 16), dtype=torch.long))[0].sum()
        alive = made.alive({p.untyped_storage()._cdata for p in model.parameters()})
        # outside the blocks: position numbers, two embeddings' sum, the last norm, its part at the end, the logits
        around = (16 * 2 + BATCH * 16) * 8 + BATCH * 16 * 4 * (3 * 32 + 2) + BATCH * 4 * (32 + 20) + 16 * 4 * 32 + 64
        assert needed <= alive <= needed + around
        del loss
    assert build(activation_budget=4 * everything / GIB)[1] == [
        f"activations: {4 * everything / GIB:.2f} GiB per micro-batch, within the budget of "
        f"{4 * everything / GIB:g} GiB"
    ]


def test_a_budget_that_cannot_be_kept_names_the_least() -> None:
    with pytest.raises(UserError, match="is too small: even with all blocks recomputed") as error:
        build(activation_budget=1e-6)
    least = re.search(r"needs ([0-9.e-]+) GiB", str(error.value))
    assert least is not None
    build(activation_budget=float(least[1]))


def test_a_small_model_is_left_alone() -> None:
    model, said = build()
    assert not said and all(type(block) is Block and type(block.ln_1) is LayerNorm for block in model.transformer.h)


def test_a_second_try_with_a_smaller_batch_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "WORTH_IT", 0)
    model, _ = build()
    before = {name: type(module) for name, module in model.named_modules()}
    exchange(model, Config(model=model.config), runtime(), 1, print)
    assert before == {name: type(module) for name, module in model.named_modules()}


def test_a_block_edited_in_place_keeps_what_it_needs_or_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual that is changed in place: torch itself refuses its gradient, and so does a lean block."""
    monkeypatch.setattr(activations, "WORTH_IT", 0)

    def forward(self: Block, x: Tensor, where: Any = (), cache: Any = None) -> Tensor:
        x = x.clone()
        x += self.attn(self.ln_1(x), where, cache)
        return x + self.mlp(self.ln_2(x))

    monkeypatch.setattr(Block, "forward", forward)
    model, said = build(activation_budget="auto")
    assert any("Block" in line and "fails" in line for line in said) and type(model.transformer.h[0]) is Block
    with pytest.raises(RuntimeError, match="modified by an inplace operation|changed in place"):
        step(model)


@pytest.mark.cases(2)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_blocks_with_layers_in_c_are_recomputed(kernel: Kernel, variant: str) -> None:
    """torch's checkpoint gives a node its stored tensors once."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, said = GPT(GPTConfig(**SHAPE | VARIANTS[variant])), list[str]()
        swap(model, layer_replacements(model, False), said.append)
        config = Config(model=model.config)
        config.training.gradient_checkpointing = checkpointing
        activations.recompute(model, config, runtime(), BATCH, said.append)
        assert layers_in_c(model) and not said
        stored, out = kept_by_a_block(model, runtime(), BATCH)
        assert (stored == out) == checkpointing
        found.append(step(model))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_only_blocks_that_are_replaced_count(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = build(activation_budget=None)
    out = kept_by_a_block(plain, runtime(), BATCH)[1]
    recompute_cheap(plain, print)
    cheap = kept_by_a_block(plain, runtime(), BATCH)[0]
    budget = (3 * out + cheap) / GIB
    monkeypatch.setattr(activations.RecomputedBlock, "forward", lambda self, x, *others: 2 * x)
    model, said = build(activation_budget=budget)
    assert "using core/model.py's Block" in said[0]
    assert [type(block).__name__ for block in model.transformer.h] == ["LeanBlock"] * 4
    assert "recomputing norms and activation functions: " in said[1]
    assert f"{4 * cheap / GIB:.2f} GiB stored" in said[1] and "more than the budget" in said[1]
