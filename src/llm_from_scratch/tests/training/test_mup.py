"""training/mup.py: which parameters are scaled, and the coordinate check: over widths of 64 to 512, activations and
their changes in the first steps keep their size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from llm_from_scratch.config import Config, GPTConfig, OptimizerConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.training.mup import summed_over_width
from llm_from_scratch.training.optimizer import make_optimizer

CPU = torch.device("cpu")
MODEL: dict[str, Any] = {
    "block_size": 16, "vocab_size": 64, "n_layer": 2, "bias": False, "tie_embeddings": False, "zero_init": True,
    "norm": "rmsnorm",
}  # fmt: skip
MUP: dict[str, Any] = {"lr_scaling": "mup", "base_width": 64}


def model_of(width: int, **changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**MODEL, "n_embd": width, "n_head": width // 32, **changes}))


def rates(optimizer: Any) -> dict[str, tuple[float, float, float]]:
    """Parameter -> (rate, its share of the schedule's, decay)."""
    return {
        name: (group["lr"], group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["names"]
    }


def test_matrices_and_the_head_are_scaled() -> None:
    model = model_of(256, bias=True, pos_embedding="learned", n_kv_head=4, activation="swiglu")
    plain = OptimizerConfig(learning_rate=0.01, weight_decay=0.1)
    scaled = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, **MUP)
    before, after = (rates(make_optimizer(model, config, CPU)) for config in (plain, scaled))
    assert after.keys() == before.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        is_table = name in ("transformer.wte.weight", "transformer.wpe.weight")
        if p.dim() >= 2 and not is_table:
            assert after[name] == pytest.approx((0.0025, 0.25, 0.4)), name  # 64 / 256, and the decay per step as before
        else:
            assert after[name] == before[name] == (0.01, 1.0, 0.1 if is_table else 0.0), name


def test_at_the_base_width_nothing_changes() -> None:
    model = model_of(64)
    assert rates(make_optimizer(model, OptimizerConfig(**MUP), CPU)) == rates(
        make_optimizer(model, OptimizerConfig(), CPU)
    )


def test_muon_keeps_its_rate() -> None:
    model = model_of(256)
    optimizer = make_optimizer(model, OptimizerConfig(optimizer_type="muon", **MUP), CPU)
    scales = {group["names"][0]: (group["rule"], group["lr_scale"]) for group in optimizer.param_groups}
    assert scales["lm_head.weight"] == ("adamw", 0.25) and scales["transformer.wte.weight"] == ("adamw", 1.0)
    assert scales["transformer.h.0.attn.c_attn.weight"] == ("muon", 0.02 / 1e-3)


def test_an_edited_model_is_scaled_by_its_shapes_or_refused() -> None:
    model = model_of(64)
    model.transformer.h[0].extra = nn.Linear(64, 3)
    with pytest.raises(UserError, match=r"the width scaling of transformer\.h\.0\.extra\.weight is unknown"):
        summed_over_width(model)  # the plain model does not have it
    with pytest.raises(UserError, match="needs --tie_embeddings=False"):
        make_optimizer(model_of(64, tie_embeddings=True), OptimizerConfig(**MUP), CPU)
    with pytest.raises(UserError, match="need each other"):
        Config(optimizer=OptimizerConfig(lr_scaling="mup")).validate()
    with pytest.raises(UserError, match="need each other"):
        Config(optimizer=OptimizerConfig(base_width=64)).validate()


def sizes_after_steps(width: int, steps: int = 4, **optimizer: Any) -> dict[str, float]:
    """Mean absolute activations after the blocks, the change of the logits, and the change of the blocks' output."""
    model = model_of(width)
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, beta1=0.8, beta2=0.95, **optimizer)
    stepper = make_optimizer(model, config, CPU)
    seen: list[torch.Tensor] = []
    model.transformer.h[-1].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(64, (8, 17), generator=generator)
    with torch.no_grad():
        first, _ = model(batch[:, :-1], batch[:, 1:])
    for _ in range(steps):
        _, loss = model(batch[:, :-1], batch[:, 1:])
        assert loss is not None
        loss.backward()
        stepper.step()
        stepper.zero_grad()
    with torch.no_grad():
        last, _ = model(batch[:, :-1], batch[:, 1:])
    return {
        "activations": float(seen[-1].abs().mean()), "change of activations": float((seen[-1] - seen[0]).abs().mean()),
        "change of logits": float((last - first).abs().mean()),
    }  # fmt: skip


def slopes(**optimizer: Any) -> dict[str, float]:
    """Exponent of the width with which each size grows from 64 to 512."""
    found = {width: sizes_after_steps(width, **optimizer) for width in (64, 128, 256, 512)}
    log = [math.log(width) for width in found]
    mean = sum(log) / len(log)
    return {
        name: sum((x - mean) * math.log(sizes[name]) for x, sizes in zip(log, found.values(), strict=True))
        / sum((x - mean) ** 2 for x in log)
        for name in found[64]
    }


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
def test_coordinate_check(optimizer_type: str) -> None:
    scaled = slopes(optimizer_type=optimizer_type, **MUP)
    assert abs(scaled["activations"]) < 0.1 and abs(scaled["change of activations"]) < 0.1, scaled
    # tokens of a narrow model share directions, so their logits change a little more
    assert abs(scaled["change of logits"]) < 0.25, scaled
    plain = slopes(optimizer_type=optimizer_type)
    assert plain["change of logits"] > 0.5, plain
    assert optimizer_type == "muon" or plain["change of activations"] > 0.5, plain
