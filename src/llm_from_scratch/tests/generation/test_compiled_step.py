"""generation/compiled_step.py and kernels/step.c: each operation against torch, and whole steps against the record."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import CannotRecord
from llm_from_scratch.generation import compiled_step, decode_step
from llm_from_scratch.generation.compiled_step import Builder, CompiledStep
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.generation.recorder import Line
from llm_from_scratch.kernels import compiled
from llm_from_scratch.kernels.compiled import Kernel

from ..memorised import OPTIONS, TOKENIZER, memorised
from .test_decode_step import model_of

x, y, z = torch.randn((3, 2, 5, 24), generator=torch.Generator().manual_seed(0))
ids = torch.tensor([[3], [0], [4]])
heads = torch.randn(2, 4, 1, 24, generator=torch.Generator().manual_seed(1))
keys = torch.randn(2, 2, 7, 2, 24, generator=torch.Generator().manual_seed(2))
mask = torch.zeros(2, 1, 1, 7).index_fill_(3, torch.tensor([1, 5, 6]), -torch.inf)
mask[1, 0, 0, 6] = 0.5

KERNEL = "compiled"  # LLM_KERNEL while the kernel is there


def run(kernel: Kernel, function: Any, *args: Any, **options: Any) -> Tensor:
    """The result of a step that is this operation alone."""
    expected = function(*args, **options)
    builder = Builder(lambda t: "y" if t.untyped_storage()._cdata == expected.untyped_storage()._cdata else None)
    builder.reserve("y", expected)
    builder.translate(Line((), function, [], {}, given=(args, options, expected)))
    step = CompiledStep(kernel, builder, (), None, expected)
    with torch.inference_mode():
        step()
        at = step.at
        arena = CompiledStep.arena[at : at + expected.untyped_storage().nbytes() // 4]
        return arena.as_strided(expected.shape, expected.stride(), 0).clone()


OPERATIONS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    **{name: (getattr(torch, name), (x,), {}) for name in ("neg", "sqrt", "square", "relu", "sigmoid", "exp", "tanh")},
    **{name: (getattr(torch, name), (x.abs() + 0.1,), {}) for name in ("rsqrt", "reciprocal", "sqrt")},
    **{name: (getattr(torch, name), (3 * x,), {}) for name in ("erf", "cos", "sin")},
    **{name: (getattr(torch, name), (x, y), {}) for name in ("mul", "div", "maximum", "minimum")},
    "silu": (torch._C._nn.silu, (20 * x,), {}),
    "gelu": (torch._C._nn.gelu, (3 * x,), {}),
    "gelu_tanh": (torch._C._nn.gelu, (3 * x,), {"approximate": "tanh"}),
    "a view": (torch.sigmoid, (x.transpose(0, 1)[:, ::2],), {}),
    "add": (torch.add, (x, y), {"alpha": 0.5}),
    "add a number": (torch.add, (x, 2), {}),
    "a row": (torch.sub, (x, y[0, 0]), {"alpha": 3.0}),
    "a column": (torch.mul, (x, y[..., :1]), {}),
    "addcmul": (torch.addcmul, (x, y, z), {"value": -1}),
    "addcmul with a number": (torch.addcmul, (torch.tensor(0.1), x, y), {"value": 0.25}),
    "concatenation": (torch.cat, ((x, y[..., :3], z), -1), {}),
    "reshape": (torch.reshape, (x.transpose(0, 1), (10, 24)), {}),
    "to": (torch.Tensor.to, (ids, torch.float32), {}),
    "where": (torch.where, (x > 0, torch.tensor(0.0), y), {}),
    "norm": (torch.linalg.vector_norm, (x, 2, -1, True), {}),
    "layer_norm": (torch.layer_norm, (x, (24,), y[0, 0], z[0, 0], 1e-3), {}),
    "layer_norm without weights": (torch.layer_norm, (3 + x, (24,)), {}),
    "embedding": (torch.embedding, (x[0], ids), {}),
    "attention": (torch._C._nn.scaled_dot_product_attention, (heads, keys[0].transpose(1, 2).repeat_interleave(2, 1),
                  keys[1].transpose(1, 2).repeat_interleave(2, 1), mask), {}),
    "grouped attention": (torch._C._nn.scaled_dot_product_attention, (heads, keys[0].transpose(1, 2),
                          keys[1].transpose(1, 2), mask), {"enable_gqa": True, "scale": 0.3}),
    "attention without a mask": (torch._C._nn.scaled_dot_product_attention, (heads, heads.expand(2, 4, 9, 24).clone(),
                                 heads.expand(2, 4, 9, 24).contiguous() * 2), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchs(name: str, kernel: Kernel) -> None:
    function, args, options = OPERATIONS[name]
    torch.testing.assert_close(
        run(kernel, function, *args, **options), function(*args, **options), rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0])
def test_extreme_numbers(value: float, kernel: Kernel) -> None:
    given = torch.full((3, 24), value)
    for function in (torch.sigmoid, torch._C._nn.silu, torch.relu, torch.tanh, torch.exp):
        if not (function is torch._C._nn.silu and value == -float("inf")):  # torch: NaN
            torch.testing.assert_close(run(kernel, function, given), function(given), equal_nan=True)


@pytest.mark.parametrize(
    ("function", "args", "options"),
    [
        (torch.cumsum, (x, -1), {}),
        (torch.add, (x.double(), y.double()), {}),
        (torch.linalg.vector_norm, (x, 1, -1, True), {}),
        (torch.linalg.vector_norm, (x, 2, 1, True), {}),
        (torch.div, (x, y), {"rounding_mode": "floor"}),
        (torch.add, (x[None, None], y), {}),
        (torch._C._nn.scaled_dot_product_attention, (heads, heads, heads), {"is_causal": True}),
    ],
)
def test_other_arguments_stay_with_torch(function: Any, args: Any, options: Any) -> None:
    with pytest.raises(CannotRecord):
        Builder(lambda t: None).translate(Line((), function, [], {}, given=(args, options, function(*args, **options))))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_wrong_index_is_an_error(wrong: int, kernel: Kernel) -> None:
    table, rows = x[0].clone(), ids.clone()
    found = torch.embedding(table, rows)
    builder = Builder(lambda t: "y" if t.data_ptr() == found.data_ptr() else None)
    builder.reserve("y", found)
    builder.translate(Line((), torch.embedding, [], {}, given=((table, rows), {}, found)))
    step = CompiledStep(kernel, builder, (), None, found)
    assert torch.equal(step(), found)
    rows[1] = wrong
    with pytest.raises(IndexError, match="out of range"):
        step()


def texts(model: GPT, wanted: str, patch: pytest.MonkeyPatch, quantize: Any = "none") -> tuple[Any, Generator]:
    patch.setenv(compiled.VARIABLE, wanted)
    generator = Generator(model, TOKENIZER, quantize=quantize)
    config = GenerationConfig(max_new_tokens=14, temperature=0.0)
    found = [s.tokens for prompts in ([[1, 2, 3]], [[1, 2], [5]]) for s in generator.generate(prompts, config)]
    return found, generator


def steps(generator: Generator) -> list[Callable[..., Tensor]]:
    return [record.step for key, record in generator.decoder.recorded.records.items() if len(key) == 2 and key[0]]


@pytest.mark.parametrize(
    "option", [pytest.param(o, marks=() if o in ("gpt2", "modern") else pytest.mark.slow) for o in OPTIONS]
)
def test_a_whole_step_is_compiled(option: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = memorised(option)
    expected, _ = texts(model, "torch", monkeypatch)
    found, generator = texts(model, "compiled", monkeypatch)
    assert found == expected
    used = [step for step in steps(generator) if isinstance(step, CompiledStep)]
    assert used and all(len(step.made) <= 1 for step in used)  # at most the sum of n-gram embeddings is torch's


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_logits_equal_the_record(quantize: Any, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    apart: list[float] = []

    def near(found: Tensor, expected: Tensor) -> bool:
        apart.append(((found - expected).norm() / expected.norm()).item())
        return True

    monkeypatch.setattr(decode_step, "near", near)
    _, generator = texts(model_of("modern"), "compiled", monkeypatch, quantize)
    assert generator.decoder.recorded.in_kernel and len(apart) >= 4 and max(apart) < 1e-5


def test_steps_are_compared_without_rounded_rows(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large model the smallest difference before an int8 product rounds some number to another step."""
    kinds = list[set[int]]()

    def near(found: Tensor, expected: Tensor) -> bool:
        kinds.append({matrix.kind for matrix in matrices})
        return True

    monkeypatch.setenv(compiled.VARIABLE, "compiled")
    generator = Generator(model_of("modern"), TOKENIZER, quantize="int8")
    matrices = [product.matrix for product in generator.decoder.linears.packed.values()]
    rounded = {matrix.kind for matrix in matrices}
    monkeypatch.setattr(decode_step, "near", near)
    generator.generate([[1, 2, 3]], GenerationConfig(max_new_tokens=3, temperature=0.0))
    assert {compiled.UNROUNDED} in kinds and {matrix.kind for matrix in matrices} == rounded == {3}


class TwoTables(nn.Module):
    """Token embeddings as the sum of two, looked up by ids that are no view of the tokens' memory."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.weight, self.table = table.weight, table

    def forward(self, idx: Tensor) -> Tensor:
        codes = torch.stack([idx, idx // 2])
        one, other = self.table(codes.permute(1, 2, 0)).unbind(2)
        return one + 0.5 * other


class Scattered(nn.Module):
    """Writes rows to a tensor that the step makes."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, given: Tensor) -> Tensor:
        rows = self.mlp(given).flatten(0, 1)
        return torch.zeros_like(rows).index_copy_(0, torch.arange(len(rows)), rows).view(given.shape)


@pytest.mark.cases(1)
@pytest.mark.parametrize("edit", [TwoTables, Scattered])
def test_no_operand_is_a_copy_or_missing(
    edit: Any, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy.deepcopy(memorised("modern"))
    if edit is TwoTables:
        model.transformer.wte = edit(model.transformer.wte)
    else:
        for block in model.transformer.h:
            block.mlp = edit(block.mlp)
    expected, _ = texts(model, "torch", monkeypatch)
    assert texts(model, "compiled", monkeypatch)[0] == expected
    said = capsys.readouterr().err  # not that the compiled step gives other logits
    assert said == ("" if edit is TwoTables else "decoding with torch: the compiled kernels lack index_copy_\n")


class Unusual(nn.Module):
    """An MLP with an operation that the kernel does not have."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, given: Tensor) -> Tensor:
        return self.mlp(given) + F.softplus(given)


def test_an_edited_model_decodes_with_torch(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy.deepcopy(memorised("modern"))
    for block in model.transformer.h:
        block.mlp = Unusual(block.mlp)
    expected, _ = texts(model, "torch", monkeypatch)
    found, generator = texts(model, "compiled", monkeypatch)
    assert found == expected and not any(isinstance(step, CompiledStep) for step in steps(generator))
    assert capsys.readouterr().err == "decoding with torch: the compiled kernels lack softplus\n"


def test_a_step_with_other_logits_is_not_used(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = memorised("modern")
    expected, _ = texts(model, "torch", monkeypatch)
    monkeypatch.setitem(compiled_step.CODES, "add", compiled_step.CODES["sub"])
    found, generator = texts(model, "compiled", monkeypatch)
    assert found == expected and not generator.decoder.recorded.in_kernel
    assert "decoding with torch: the compiled step's logits differ" in capsys.readouterr().err
