"""How many updates fit into a budget."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_from_scratch.core.sizes import sizes
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.budget import Budget
from llm_from_scratch.sweep.length import updates_for
from llm_from_scratch.training import forecast

from ..tiny import tiny_config


def test_tokens_and_flops(tiny_data: Path) -> None:
    config = tiny_config(tiny_data, batch_size=4, gradient_accumulation_steps=2, block_size=8)
    assert updates_for(config, Budget(6400.0, "tokens", "")) == 100
    assert updates_for(config, Budget(1.0, "tokens", "")) == 1
    config.model.vocab_size = 20
    arithmetic = 6400.0 * sizes(config.model, 1).flops_per_token
    assert updates_for(config, Budget(arithmetic, "flops", "")) == 100


def test_a_time_includes_start_evaluations_and_end(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measured(plan: Any) -> Any:
        seen.append(plan)
        return SimpleNamespace(step=0.5, total=530.0, seconds={"steps": 500.0})

    monkeypatch.setattr(forecast, "forecast", measured)
    config = tiny_config(tiny_data, epochs=3.0)
    assert updates_for(config, Budget(90.0, "seconds", "")) == 120  # (90 - 30) / 0.5
    assert seen[0].last_step == 1000 and seen[0].config.training.eval_interval == 100
    with pytest.raises(UserError, match="needs 30 s or more"):
        updates_for(config, Budget(30.0, "seconds", ""))
