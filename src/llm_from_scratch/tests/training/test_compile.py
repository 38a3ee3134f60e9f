"""When a run compiles, and that the compiled model computes what the plain one does."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.config import Config, GPTConfig, SystemConfig, TrainingConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.machine.device import Runtime, resolve
from llm_from_scratch.training import wrap as parallel
from llm_from_scratch.training.wrap import compiled_where_it_pays, wrap

from ..ranks import in_ranks
from .test_ranks import difference, stepped

HOUR = 3600 * 2 * parallel.CPU_FLOPS[torch.float32]  # operations that two threads do in it


def config(**system: Any) -> Config:
    return Config(
        model=GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16),
        training=TrainingConfig(chunked_loss=False, activation_budget=None),
        system=SystemConfig(**{"device": "cpu", "dtype": "float32", "threads": 2, **system}),
    )


@pytest.mark.parametrize("changes", [{"n_embd": 512, "n_head": 2}, {"dropout": 0.1}])
def test_wide_models_and_dropout_do_not_gain(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    settings = config()
    settings.model = dataclasses.replace(settings.model, **changes)
    assert not compiled_where_it_pays(settings, resolve(settings.system), HOUR).compile


@pytest.mark.parametrize(
    ("hours", "has_compiler", "system", "compiles", "told"),
    [
        (1.0, True, {}, True, "on (saves time in a run of about 60 min)"),
        (1.0, False, {}, False, "off (no C++ compiler found; set CXX)"),
        (0.1, True, {}, False, "off (chosen for this machine)"),
        (1.0, True, {"compile": False}, False, "off (as set)"),
        (0.1, True, {"compile": True}, True, "on (as set)"),
    ],
)
def test_a_long_run_on_a_cpu_compiles(
    hours: float, has_compiler: bool, system: Any, compiles: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if has_compiler else None)
    settings = config(**system)
    runtime = compiled_where_it_pays(settings, resolve(settings.system), hours * HOUR)
    assert (runtime.compile, runtime.reasons["compile"]) == (compiles, told)


def wrapped(settings: Config, runtime: Runtime) -> tuple[parallel.Wrapped, list[str]]:
    torch.manual_seed(0)
    model, told = GPT(settings.model), list[str]()
    runtime.place(model)
    return wrap(model, settings, runtime, 2, told.append), told


def gradients(models: parallel.Wrapped) -> list[torch.Tensor]:
    x = torch.arange(16).view(2, 8) % 11
    _, loss = models.train(x, x.roll(1))
    loss.backward()
    return [loss.detach()] + [p.grad for p in models.train.parameters() if p.grad is not None]


def test_if_compilation_fails_the_plain_model_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, **how: Any) -> None:
        self._compiled_call_impl = lambda *args: (_ for _ in ()).throw(RuntimeError("no\ncompiler"))

    monkeypatch.setattr(torch.nn.Module, "compile", fails)
    settings = config(compile="auto")
    plain, _ = wrapped(settings, resolve(config(compile=False).system))
    models, told = wrapped(settings, Runtime(**{**vars(resolve(settings.system)), "compile": True}))
    assert not models.is_compiled and "torch.compile failed (no compiler); training without it" in told
    torch.testing.assert_close(gradients(models), gradients(plain))


@pytest.mark.slow  # the C++ compiler takes half a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_blocks_equal_plain_blocks(dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    results = []
    for compile_it in (False, True):
        settings = config(compile=compile_it)
        modern: dict[str, Any] = {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True}
        settings.model = GPTConfig(
            block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, dropout=dropout, **modern
        )
        models, _ = wrapped(settings, resolve(settings.system))
        assert models.is_compiled is compile_it
        if dropout:
            models.train.eval()  # masks are drawn elsewhere
        results.append(gradients(models))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow  # the compiler, in three processes
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_processes_that_compile_do_the_steps_of_one(
    here: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(here / "cache"))
    given = {"compile": True, "gradient_accumulation_steps": 2, "optimizer_type": "adamw"}
    compiled = stepped(tiny_data, "one", given, False)
    for found in in_ranks(2, stepped, here, tiny_data, str(here / "many"), given | {"parallel": "ddp"}, False):
        assert difference(compiled, found) <= 1e-6
    assert difference(compiled, stepped(tiny_data, "plain", given | {"compile": False}, False)) <= 1e-4
