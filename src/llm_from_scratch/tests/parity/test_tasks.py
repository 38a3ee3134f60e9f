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
from llm_from_scratch.interop.hf_tokenizer import write_tokenizer
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


def texts(longest: int) -> list[str]:
    return [babble(20 + (longest - 20) * seed // 8, seed=seed) for seed in range(9)]


def test_ours_is_the_hf_model_of_the_harness_on_our_export(generator: Generator, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    gpt, tasks = generator.model, str(write_tasks(tmp_path / "tasks", texts(60)))  # some exceed the context
    assert max(len(generator.encode(text)) for text in texts(60)) > BLOCK
    export_hf(gpt.config, gpt.state_dict(), generator.tokenizer, tmp_path / "hf")
    hf = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
    for fewshot in (0, 1):
        loaded = load_tasks(tasks, fewshot=fewshot)
        ours = numbers(evaluate_tasks(TaskModel(generator), loaded))
        theirs = numbers(lm_eval.evaluate(lm=hf, task_dict=loaded, bootstrap_iters=10, log_samples=False))
        assert ours == pytest.approx(theirs, rel=1e-6) and len(ours) == 6


def test_the_server_gives_the_harness_the_same_scores(generator: Generator, tmp_path: Path) -> None:
    """With the harness's local-completions model, for texts that fit in the context."""
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    loaded = load_tasks(str(write_tasks(tmp_path / "tasks", texts(40))))
    assert max(len(generator.encode(text)) for text in texts(40)) < BLOCK
    ours = numbers(evaluate_tasks(TaskModel(generator), loaded))
    write_tokenizer(generator.tokenizer, tmp_path, BLOCK)
    with served(generator, make_engine=lambda: Engine(generator, slots=4)) as server:
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions", model=NAME, tokenizer=str(tmp_path),
            max_length=BLOCK + 1, batch_size=2,
        )  # fmt: skip
        theirs = numbers(lm_eval.evaluate(lm=client, task_dict=loaded, bootstrap_iters=10, log_samples=False))
    assert ours == pytest.approx(theirs, rel=1e-6) and len(ours) == 6
