"""Adapted layers: no effect at first, the merged weight's effect later, only on linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch.config import FinetuneConfig, GPTConfig
from llm_from_scratch.core.adapters import adapter_of, merged
from llm_from_scratch.core.model import GPT, Linear
from llm_from_scratch.core.weights import build_model
from llm_from_scratch.errors import UserError
from llm_from_scratch.kernels import lora
from llm_from_scratch.kernels.lora import MANY_ROWS, adapted, attach, cpu_adapted, with_adapters
from llm_from_scratch.kernels.products import CPULinear, has_onednn
from llm_from_scratch.kernels.swap import swap, unswap

CONFIG = GPTConfig(
    block_size=8, vocab_size=11, n_layer=2, n_head=4, n_embd=16, n_kv_head=2, activation="swiglu", pos_embedding="rope"
)
IDS = torch.arange(16).reshape(2, 8) % 11


def logits(model: GPT) -> Tensor:
    return model.eval()(IDS, IDS)[0].detach()


def moved(model: GPT) -> GPT:
    """The same model, with an adapter that is not zero."""
    generator = torch.Generator().manual_seed(5)
    for tensor in adapter_of(model).values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("targets", ["transformer.h", "c_attn", "mlp"])
def test_an_adapter_starts_without_effect_and_later_equals_its_merged_weights(targets: str) -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    plain = {name: t.clone() for name, t in model.state_dict().items()}
    before = logits(model)
    attach(model, FinetuneConfig(lora_rank=3, lora_targets=(targets,)), seed=0)
    assert torch.equal(logits(model), before)
    after = logits(moved(model))
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(logits(build_model(CONFIG, merged(CONFIG, plain, adapter_of(model), 2.0))), after)


def test_the_class_is_the_only_thing_that_swap_changed_and_unswap_keeps_it() -> None:
    model = GPT(CONFIG)
    attach(model, FinetuneConfig(lora_rank=2, lora_targets=("c_fc",)), seed=0)
    unswap(model)
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, Linear)}
    assert {name for name, kind in kinds.items() if kind is adapted(Linear)} == {
        "transformer.h.0.mlp.c_fc",
        "transformer.h.1.mlp.c_fc",
    }


@pytest.mark.skipif(not has_onednn(), reason="needs oneDNN")
def test_an_adapted_layer_gets_the_faster_products_too() -> None:
    model = GPT(CONFIG)
    attach(model, FinetuneConfig(lora_rank=2), seed=0)
    expected, lines = logits(moved(model)), list[str]()
    count = swap(model, with_adapters({Linear: CPULinear}), lines.append)
    assert count == 10 and not lines
    assert all(type(m) is adapted(CPULinear) for m in model.transformer.h.modules() if isinstance(m, Linear))
    torch.testing.assert_close(logits(model), expected)
    unswap(model)
    assert all(type(m) is adapted(Linear) for m in model.transformer.h.modules() if isinstance(m, Linear))


class Clipped(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


class Unused(nn.Module):
    def __init__(self, mlp: Any):
        super().__init__()
        self.mlp, self.extra = mlp, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def test_a_layer_that_cannot_be_merged_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(CONFIG)
    model.transformer.h[1].mlp.c_fc = Clipped(16, 64, bias=True)
    with pytest.raises(UserError, match=r"cannot adapt transformer\.h\.1\.mlp\.c_fc: it is not linear"):
        attach(model, FinetuneConfig(lora_rank=2), seed=0)
    model = GPT(CONFIG)
    model.transformer.h[1].mlp = Unused(model.transformer.h[1].mlp)
    with pytest.raises(UserError, match=r"cannot adapt transformer\.h\.1\.mlp\.extra: the model does not call it"):
        attach(model, FinetuneConfig(lora_rank=2), seed=0)
    attach(GPT(CONFIG), FinetuneConfig(lora_rank=2, lora_targets=("mlp.c_proj",)), seed=0)
    broken = lora.add_change
    monkeypatch.setattr(lora, "add_change", lambda layer, x, y, b: broken(layer, x, y, b) + 1e-3)
    with pytest.raises(UserError, match=r"cannot adapt transformer\.h\.0\.attn\.c_attn: Linear: AdaptedLinear returns"):
        attach(GPT(CONFIG), FinetuneConfig(lora_rank=2), seed=0)


def test_dropout_is_of_the_adapters_input_and_off_in_evaluation() -> None:
    model = GPT(CONFIG)
    attach(model, FinetuneConfig(lora_rank=2, lora_dropout=0.5), seed=0)
    layer = moved(model).transformer.h[0].mlp.c_fc.train()
    x = torch.randn(1, 16)
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    expected = x @ layer.weight.T + layer.bias + 2.0 * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.eval()(x), layer(x))


@pytest.mark.parametrize("name", ["attn.c_attn", "mlp.c_fc"])
@pytest.mark.parametrize("libraries", ["ttt", "ooo"] if has_onednn() else ["ttt"])
def test_many_rows_go_through_the_merged_weight_with_the_same_gradients(name: str, libraries: str) -> None:
    model = GPT(CONFIG)
    attach(model, FinetuneConfig(lora_rank=3), seed=0)
    layer: Any = moved(model).transformer.h[1].get_submodule(name)
    x, dy = torch.randn(2, MANY_ROWS, 16), torch.randn(2, MANY_ROWS, layer.out_features)
    found = []
    for kind in (adapted(Linear), cpu_adapted()):
        layer.__class__, layer.libraries = kind, libraries
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        y = layer(leaves[0])
        assert kind is adapted(Linear) or "MergedProduct" in str(y.grad_fn)
        found.append([y, *torch.autograd.grad((y * dy).sum(), leaves)])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5 * float(plain.detach().abs().max()))
    layer.lora_dropout.p = 0.5
    assert "MergedProduct" not in str(layer(x).grad_fn)


def test_swap_puts_the_merged_product_in() -> None:
    model = GPT(CONFIG)
    attach(model, FinetuneConfig(lora_rank=2), seed=0)
    lines = list[str]()
    assert swap(model, with_adapters({}, eager_cpu=True), lines.append) == 10 and not lines
    assert all(type(m) is cpu_adapted() for m in model.transformer.h.modules() if isinstance(m, Linear))
