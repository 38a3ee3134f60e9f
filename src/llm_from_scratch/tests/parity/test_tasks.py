"""Scores on tasks by lm-evaluation-harness: of our model, of its own `hf` model on our export, and of its
`local-completions` model on our server."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import HFTokenizer
from llm_from_scratch.generation.engine import Engine
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.interop.hf import export_hf
from llm_from_scratch.training.harness import TaskModel, evaluate_tasks, load_tasks

from ..served import NAME, served
from ..tiny import babble
from ..training.test_harness import numbers, write_tasks

PACKAGES = ("lm_eval", "accelerate", "peft", "aiohttp", "tenacity")
BLOCK = 48
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="needs lm_eval[hf,api]"
    ),
]


@pytest.fixture(scope="module")
def generator() -> Generator:
    """A random model of a BPE vocabulary, far from uniform."""
    torch.manual_seed(0)
    tokenizer = HFTokenizer.train([babble(4000)], 290)
    shape: dict[str, Any] = {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1}
    model = GPT(GPTConfig(BLOCK, tokenizer.vocab_size, 2, 2, 32, bias=False, **shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return Generator(model.eval(), tokenizer)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    return str(write_tasks(folder, [babble(20 + 5 * seed, seed=seed) for seed in range(9)]))


def test_ours_is_that_of_the_harness_and_of_the_server(generator: Generator, tasks: str, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    expected: dict[str, float] = {}
    for fewshot in (0, 1):
        loaded = load_tasks(tasks, fewshot=fewshot)
        ours = numbers(evaluate_tasks(TaskModel(generator), loaded))
        assert {"own_choice/acc", "own_choice/acc_norm", "own_generation/exact_match"} < set(ours)
        if not expected:
            gpt = generator.model
            export_hf(gpt.config, gpt.state_dict(), generator.tokenizer, tmp_path / "hf")
        hf = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
        expected = numbers(lm_eval.evaluate(lm=hf, task_dict=loaded, bootstrap_iters=10, log_samples=False))
        assert ours == pytest.approx(expected, rel=1e-6)

    with served(generator, make_engine=lambda: Engine(generator, slots=4)) as server:
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions", model=NAME, tokenizer=str(tmp_path / "hf"),
            max_length=BLOCK + 1, batch_size=2,
        )  # fmt: skip
        loaded = load_tasks(tasks)
        over_http = numbers(lm_eval.evaluate(lm=client, task_dict=loaded, bootstrap_iters=10, log_samples=False))
    assert over_http == pytest.approx(numbers(evaluate_tasks(TaskModel(generator), load_tasks(tasks))), rel=1e-6)
