"""The page in a browser, with a model behind it: fixtures and user actions for its tests."""

from __future__ import annotations

import functools
import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.config import GenerationConfig, GPTConfig, OptimizerConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from llm_from_scratch.generation.engine import Engine
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.training.optimizer import make_optimizer

from .browser import Browser, Site
from .memorised import TEXT, TOKENIZER, memorised
from .shared import weights_of

START = TEXT[:6]
ENDLESS = 60_000  # tokens, which no test waits for
SCRIPTS = "The price is 5€ – “cheap”, said Zoë:\n\tnaïve 语言 modèle…\n"
BYTES = ByteTokenizer()
BPE = HFTokenizer.train([SCRIPTS * 3], 290)  # leaves characters that two tokens share


@functools.cache
def learned(tokenizer: Tokenizer, text: str) -> Generator:
    """A small model that has learned a short text by heart, in half a second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.tensor(tokenizer.encode(text * 3).tolist())
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=24, n_layer=1, n_head=2, n_embd=48))

        def learn() -> None:
            settings = OptimizerConfig(learning_rate=5e-3, weight_decay=0.0, beta2=0.999)
            optimizer = make_optimizer(model, settings, torch.device("cpu"))
            for _ in range(120):
                windows = ids[torch.randint(len(ids) - 25, (16,))[:, None] + torch.arange(25)]
                _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        weights_of(model, f"{tokenizer.fingerprint()}-{hashlib.sha256(text.encode()).hexdigest()}", learn)
    return Generator(model.eval(), tokenizer)


class Served(Site):
    """A model behind the server, with the engine at hand."""

    def __init__(self, generator: Generator, run: Path | None = None, chat: bool = False, **options: Any):
        pytest.importorskip("fastapi")
        from llm_from_scratch.core.chat import ChatTemplate
        from llm_from_scratch.serving.app import make_app
        from llm_from_scratch.serving.options import ServeOptions
        from llm_from_scratch.serving.service import Service

        self.generator = generator
        template = ChatTemplate("{{ messages[-1].content }}") if chat else None
        serve = ServeOptions(max_tokens=ENDLESS, **options)
        self.service = Service(generator, lambda: Engine(generator, 8), serve, template=template, watch=run)
        super().__init__(make_app(self.service))

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        params = GenerationConfig(num_samples=1, max_new_tokens=count, temperature=0.0)
        return self.generator.generate([prompt], params)[0].tokens

    @property
    def running(self) -> int:
        return self.service.supervisor.stats().running


def link(site: Site, prompt: str = START, **settings: Any) -> str:
    """An address as "Copy link" makes it. Greedy, and of few tokens, unless said otherwise."""
    values = {"prompt": prompt, "temperature": 0, "max_tokens": 12, **settings}
    return f"{site.url}/#{urllib.parse.urlencode(values)}"


def visit(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.wait(lambda: browser.js("return document.body.dataset.ready"))


def finish(browser: Browser) -> None:
    """Waits until what was begun has ended."""
    browser.wait(lambda: browser.js("return document.getElementById('stop').disabled"))


def generate(browser: Browser) -> None:
    browser.click("#generate")
    finish(browser)


def tokens(browser: Browser, card: int = 1) -> list[int]:
    """The ids that a sample shows."""
    script = "return [...document.querySelectorAll(arguments[0])].map(span => Number(span.dataset.id))"
    return browser.js(script, f".card:nth-child({card}) .t")


def write(path: Path, *entries: dict[str, Any]) -> None:
    """Appends lines, as a run does."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


@pytest.fixture(name="chromium", scope="session")
def chromium_fixture(tmp_path_factory) -> Iterator[Browser]:
    """One for all tests: it takes a second to start."""
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(name="browser")
def browser_fixture(chromium: Browser) -> Iterator[Browser]:
    """In a wide window; the test fails if the page has logged an error."""
    chromium.window(1200, 900)
    chromium.console()
    yield chromium
    assert chromium.console() == []


@pytest.fixture(name="run_dir", scope="session")
def run_dir_fixture(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "out-watched"
    folder.mkdir()
    return folder


@pytest.fixture(name="site", scope="session")
def site_fixture(chromium: Browser, run_dir: Path) -> Iterator[Served]:
    served = Served(Generator(memorised(), TOKENIZER), run=run_dir, chat=True)
    yield served
    served.close()
