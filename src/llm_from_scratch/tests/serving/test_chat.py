"""/v1/chat/completions: the prompt from a template, and the answers as OpenAI's client reads them."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.core.tokenizer import HFTokenizer
from llm_from_scratch.errors import ApiError, UserError
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.serving.chat import ChatTemplate, end_ids, find_template

from ..lazy import openai
from ..memorised import SIGNS, TEXT, TOKENIZER, memorised
from ..served import NAME, Served, served

# of the kind that models carry: conditions, loops with their state, filters, white space control, an error
TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message.role) }}
    {% endif %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
{{ bos_token if loop.first else '' }}<|im_start|>{{ message['role'] }}{{ '[' ~ message.name ~ ']' if message.name }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{- {'é': messages | length} | tojson }}
{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{{ eos_token }}{% endif %}"""
SMALL = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
CONVERSATIONS = [
    [{"role": "user", "content": " Hi <b>there</b> & 'you' \n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é?"}],
    [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b\n\nc"},
        {"role": "user", "content": "<|im_end|>"},
    ],
]


def test_a_template_gives_what_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    backend = HFTokenizer.train(["hello there " * 50], 300).backend(special_is_text=False)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(tmp_path)
    ours = find_template(None, tmp_path)
    assert ours is not None
    for messages in CONVERSATIONS:
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages) == wanted
    odd = [{"role": "tool", "content": "x"}]
    with pytest.raises(ApiError, match="unknown role tool"):
        ours.render(odd)
    with pytest.raises(Exception, match="unknown role tool"):
        theirs.apply_chat_template(odd, tokenize=False)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0].content.format(a=messages) | attr('__class__') }}{{ 1/0 }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack):
    with pytest.raises(ApiError, match="rejects"):
        ChatTemplate(attack).render([{"role": "user", "content": "{a.__class__}"}])


def test_where_templates_are_found(tmp_path):
    assert find_template(None, None) is None and find_template(None, tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ bos_token }}|{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": named, "eos_token": {"content": "</s>"}}))
    assert find_template(None, tmp_path, "<eot>").render([]) == "<eot>|</s>"
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert find_template(None, tmp_path).render([]) == "beside"
    (tmp_path / "mine").write_text("mine")
    assert find_template(str(tmp_path / "mine"), tmp_path).render([]) == "mine"
    (tmp_path / "mine").write_text("{% if %}")
    for file in (tmp_path / "mine", tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="chat template"):
            find_template(str(file), None)
    config.write_text("[")
    with pytest.raises(UserError, match="cannot read"):
        find_template(None, tmp_path)


def test_ends_are_those_of_the_folder(tmp_path):
    assert end_ids(None, 9) == end_ids(tmp_path, 9) == frozenset()
    for written, ids in ((3, {3}), ([1, 2, 99], {1, 2}), (None, set()), ("x", set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
        assert end_ids(tmp_path, 9) == ids
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config"):
        end_ids(tmp_path, 9)


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
def test_what_is_wrong_is_said(client, fields, param, says):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param and says in refused.value.message


def test_a_message_comes_back_as_it_was_received(client):
    """Clients append the answer to the conversation, with all its empty fields."""
    message = ask(client).choices[0].message.model_dump() | {"annotations": [], "reasoning_content": None}
    assert message["tool_calls"] is None
    again = ask(client, messages=[*MESSAGES, message], tools=[], tool_choice="none", response_format={"type": "text"})
    assert again.usage.prompt_tokens == 10 + 12 + 1


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    LOOPS,
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{{ ('x' * messages | length) | center(10**9) }}",
]


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack[:30])
def test_a_hostile_template_harms_only_its_own_requests(attack):
    with served(template=ChatTemplate(attack)) as server, ThreadPoolExecutor(1) as pool:
        chat = pool.submit(ask, server.client())
        assert (
            server.client().completions.create(model=NAME, prompt=TEXT[:5], max_tokens=3).usage.completion_tokens == 3
        )
        if attack == LOOPS:
            assert not chat.done(), "answered while the template runs"
        with pytest.raises(openai.BadRequestError, match="too much"):
            chat.result(60)
        with pytest.raises(openai.BadRequestError, match="too much"):
            ask(server.client())


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        *HOSTILE,
        "{{ 'x' * 10**10 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ range(99999) | map('string') | join(messages[0].content * 99999) | length }}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
        "{{ " + "[" * 9000 + "]" * 9000 + " }}",
        "{{ 9 ** (9 ** (9 ** messages | length)) }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ lipsum(n=100000) }}",
        "{{ (messages * 99999) | tojson(indent=99999) | length }}",
        "{{ dict(a=range(99999) | list) | tojson | urlize | wordwrap(1) | indent(99999) }}",
        "{{ strftime_now('%Y' * 10**8) }}",
        "{{ ''.join(cycler.__init__.__globals__) }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ messages | map(attribute='__class__') | list | first | attr('mro') }}{{ 1 / 0 }}",
        "{% import '/etc/passwd' as x %}",
    ],
    ids=lambda attack: attack[:40],
)
def test_hostile_templates_are_refused_in_bounded_time_and_memory(attack):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises((ApiError, UserError), match="the chat template"):
        ChatTemplate(attack).render([{"role": "user", "content": "{a.__class__}" * 99}])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs Linux's /proc")
def test_a_template_has_limited_memory():
    template = ChatTemplate("x")
    limits = Path(f"/proc/{template.process.pid}/limits").read_text()
    assert int(limits.partition("Max address space")[2].split()[0]) <= 200 << 20


def test_a_model_without_a_template_says_so():
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
