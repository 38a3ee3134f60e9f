"""/v1/chat/completions: the prompt from a template, and the answers as OpenAI's client reads them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.core.chat import ChatTemplate
from llm_from_scratch.core.tokenizer import HFTokenizer
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.serving import service

from ..lazy import openai
from ..memorised import SIGNS, TEXT, TOKENIZER, memorised
from ..served import NAME, Served, served

SMALL = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    assert "\n" in SIGNS
    with served(template=ChatTemplate(SMALL), max_tokens=40) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return server.client()


MESSAGES: list[Any] = [
    {"role": "system", "content": TEXT[:4]},
    {"role": "user", "content": [{"type": "text", "text": TEXT[4:6]}, {"type": "text", "text": TEXT[6:8]}]},
]


def ask(client: Any, **fields: Any) -> Any:
    given = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **fields}
    return client.chat.completions.create(**given)


def expected(**params: Any) -> list[str]:
    settings = GenerationConfig(**{"num_samples": 1, "max_new_tokens": 12, "temperature": 0.0, **params})
    prompt = f"{TEXT[:4]}\n{TEXT[4:8]}\n"
    return [s.text for s in Generator(memorised("modern"), TOKENIZER).generate([prompt], settings, 0)]


def test_a_conversation(client):
    answer = ask(client)
    message = answer.choices[0].message
    assert (message.role, message.content, message.refusal) == ("assistant", expected()[0], None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 12)
    assert answer.object == "chat.completion" and answer.choices[0].finish_reason == "length"
    assert ask(client, max_tokens=None, max_completion_tokens=5).choices[0].message.content == expected()[0][:5]
    assert ask(client, max_tokens=None).usage.completion_tokens == 40, "to the end of the turn, or --max_tokens"


def test_without_a_limit_the_log_probabilities_fit_in_a_response(client, monkeypatch):
    monkeypatch.setattr(service, "MAX_LOGPROBS_TOTAL", 40)
    found = ask(client, max_tokens=None, n=2, logprobs=True, top_logprobs=1)
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 2
    assert found.usage.completion_tokens == 2 * (40 // (2 * 2))


def test_a_conversation_streamed(client):
    fields = {"n": 2, "temperature": 1, "top_p": 0.9, "seed": 0, "logprobs": True, "top_logprobs": 2}
    texts = expected(temperature=1.0, top_k=None, top_p=0.9, num_samples=2)
    whole = ask(client, **fields)
    chunks = list(ask(client, **fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    for index, text in enumerate(texts):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "length"
        assert "".join(choice.delta.content or "" for choice in mine) == text
        assert whole.choices[index].message.content == text
        told = [token for choice in mine if choice.logprobs for token in choice.logprobs.content]
        assert told == whole.choices[index].logprobs.content and len(told) == 12
        assert [len(token.top_logprobs) for token in told] == [2] * 12
        assert "".join(token.token for token in told) == text
        assert all(bytes(token.bytes).decode() == token.token and token.logprob < 0.001 for token in told)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "expected a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.type", "text"),
        ({"messages": [{"role": "user", "content": "\u4e2d"}]}, "messages", "never saw the character"),
        ({"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
        ({"max_completion_tokens": 3}, "max_tokens", "the same"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
    ],
    ids=str,
)
def test_mistakes_are_named(client, fields, param, says):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param and says in refused.value.message


def test_a_message_is_returned_as_received(client):
    """Clients append the answer to the conversation, with all its empty fields."""
    message = ask(client).choices[0].message.model_dump() | {"annotations": [], "reasoning_content": None}
    assert message["tool_calls"] is None
    harmless = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "top_logprobs": 0}
    again = ask(client, messages=[*MESSAGES, message], **harmless)
    assert again.usage.prompt_tokens == 10 + 12 + 1


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    pytest.param(LOOPS, marks=pytest.mark.slow),
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{{ ('x' * messages | length) | center(10**9) }}",
]


@pytest.mark.cases(1)
@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack[:30])
def test_a_hostile_template_harms_only_its_own_requests(attack):
    with served(template=ChatTemplate(attack)) as server, ThreadPoolExecutor(1) as pool:
        chat = pool.submit(ask, server.client())
        assert (
            server.client().completions.create(model=NAME, prompt=TEXT[:5], max_tokens=3).usage.completion_tokens == 3
        )
        if attack == LOOPS:
            assert not chat.done(), "answered while the template runs"
        with pytest.raises(openai.BadRequestError, match="too much memory|exceeds the time or memory limit"):
            chat.result(60)
        with pytest.raises(openai.BadRequestError, match="too much memory|exceeds the time or memory limit"):
            ask(server.client())


def test_a_model_without_a_template_is_refused():
    with served() as server, pytest.raises(openai.BadRequestError) as refused:
        ask(server.client())
    assert refused.value.code == "no_chat_template" and "--chat_template" in refused.value.message


def test_special_tokens_of_the_template_are_tokens(tmp_path: Path):
    """What ends a turn is one token, in the prompt as well as where the model draws it."""
    tokenizer = HFTokenizer.train(["ab ba " * 50], 270)
    import torch

    from llm_from_scratch.config import GPTConfig
    from llm_from_scratch.core.model import GPT
    from llm_from_scratch.generation.engine import Engine
    from llm_from_scratch.serving.options import ServeOptions
    from llm_from_scratch.serving.protocol import ChatRequest
    from llm_from_scratch.serving.service import Service

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=1, n_embd=8)).eval()
    generator = Generator(model, tokenizer)
    template = ChatTemplate("{{ messages[0].content }}{{ eos_token }}", eos="<|endoftext|>")
    service = Service(generator, lambda: Engine(generator), ServeOptions(), template=template)
    try:
        asked = ChatRequest.model_validate({"messages": [{"role": "user", "content": "ab"}]})
        request = service.chat(asked).requests[0]
        assert request.prompt[-1] == tokenizer.eot_id == 0 and 0 in request.stop_tokens
    finally:
        service.supervisor.engine.close()
