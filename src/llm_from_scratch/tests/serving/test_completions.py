"""/v1/completions and related routes, called by OpenAI's own client over a socket."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.core.tokenizer import ByteTokenizer
from llm_from_scratch.generation.engine import Delta, Request, Token, Update
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.serving.completions import Plan, token_text

from ..lazy import openai
from ..memorised import TEXT, TOKENIZER, memorised
from ..served import NAME, Served, answer, http, served

PROMPT = TEXT[:6]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(max_tokens=500, max_prompt_tokens=100) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return server.client()


def expected(seed: int = 0, prompt: Any = PROMPT, **params: Any) -> list[str]:
    """The texts that the model writes by itself."""
    settings = {"num_samples": 1, "max_new_tokens": 16, "temperature": 1.0, "top_k": None, **params}
    generator = Generator(memorised("modern"), TOKENIZER)
    return [sample.text for sample in generator.generate([prompt], GenerationConfig(**settings), seed)]


def ask(client: Any, **fields: Any) -> Any:
    return client.completions.create(**{"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 16, **fields})


def test_a_text(client):
    answer = ask(client)
    assert [choice.text for choice in answer.choices] == expected(temperature=0.0)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 16, 22)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == NAME


def test_defaults_equal_the_api(client):
    answer = client.completions.create(model=NAME, prompt=PROMPT, seed=5)
    assert answer.choices[0].text == expected(5)[0], "16 tokens at temperature 1, no filter"


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("sent", "params"),
    [
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"top_p": 0.6}, {"top_p": 0.6}),
        ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
        ({"extra_body": {"top_k": 3}}, {"top_k": 3}),
        pytest.param({"presence_penalty": 1.5}, {"presence_penalty": 1.5}, marks=pytest.mark.slow),
        pytest.param({"extra_body": {"top_k": -1}}, {}, marks=pytest.mark.slow),
        pytest.param({"extra_body": {"min_p": 0.3}}, {"min_p": 0.3}, marks=pytest.mark.slow),
        pytest.param({"extra_body": {"repetition_penalty": 1.8}}, {"repetition_penalty": 1.8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_samplers_reach_the_model(client, sent, params):
    """Three samples of 40 tokens, which are those of the same settings and seed without a server."""
    answer = ask(client, **{"temperature": 1, "n": 3, "seed": 11, "max_tokens": 40, **sent})
    texts = [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    assert texts == expected(11, num_samples=3, max_new_tokens=40, **params)
    if params:
        assert texts != expected(11, num_samples=3, max_new_tokens=40)
    assert answer.usage.prompt_tokens == 6 and answer.usage.completion_tokens == 120


def test_seeds(client):
    texts = {ask(client, temperature=1.5, max_tokens=30).choices[0].text for _ in range(4)}
    assert len(texts) == 4, "without a seed each request draws anew"
    with served(seed=3) as first, served(seed=3) as second:
        drawn = [[ask(s.client(), temperature=1.5).choices[0].text for _ in range(2)] for s in (first, second)]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1], "a server that was given one repeats itself"
    assert ask(client, temperature=1, seed=-3).choices[0].text == expected(2**63 - 3)[0]


def test_logit_bias(client):
    wanted = int(TOKENIZER.encode("q")[0])
    answer = ask(client, logit_bias={str(wanted): 100})
    assert answer.choices[0].text == "q" * 16
    first = expected(temperature=0.0)[0][0]
    assert ask(client, logit_bias={str(int(TOKENIZER.encode(first)[0])): -100}).choices[0].text[0] != first


def test_stop_texts(client):
    whole = expected(temperature=0.0)[0]
    answer = ask(client, stop=[whole[9:11], whole[5:7]])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[:5], "stop")
    assert answer.usage.completion_tokens == 7, "the tokens of the stop text were drawn"
    assert ask(client, stop=whole[5:7]).choices[0].text == whole[:5]
    streamed = list(ask(client, stop=whole[5:7], stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole[:5]


def test_stop_tokens_and_the_end_of_a_text(client):
    whole = expected(temperature=0.0)[0]
    end = int(TOKENIZER.encode(whole[4])[0])
    answer = ask(client, extra_body={"stop_token_ids": [end]})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[:4], "stop")
    with served(ends=frozenset([end])) as server:
        assert ask(server.client()).choices[0].text == whole[:4]
        assert ask(server.client(), extra_body={"ignore_eos": True}).choices[0].text == whole


@pytest.mark.cases(1)
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_text(client, n):
    fields = {"n": n, "seed": 7, "temperature": 1, "max_tokens": 50, "logprobs": 1}
    whole = ask(client, **fields)
    chunks = list(ask(client, **fields, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert all(part.usage is None and part.id == last.id for part in parts)
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + ["length"]
        for name in ("tokens", "token_logprobs", "text_offset", "token_ids", "token_bytes", "top"):
            joined = [item for part in mine for item in getattr(part.logprobs, name)]
            assert joined == getattr(choice.logprobs, name), name


def test_several_prompts(client):
    prompts = [TEXT[:5], TEXT[60:70], TEXT[3:4]]
    answer = ask(client, prompt=prompts, n=2)
    texts = [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    assert texts == [text for prompt in prompts for text in expected(prompt=prompt, temperature=0.0) * 2]
    assert answer.usage.prompt_tokens == 16 and answer.usage.completion_tokens == 96
    ids = [TOKENIZER.encode(prompt).tolist() for prompt in prompts]
    assert [choice.text for choice in ask(client, prompt=ids).choices] == texts[::2]
    assert ask(client, prompt=ids[0]).choices[0].text == texts[0]
    drawn = ask(client, prompt=[PROMPT] * 2, temperature=1, seed=0, n=2).choices
    assert [choice.text for choice in drawn] == expected(0, num_samples=4), "each sample has a seed of its own"


def log_probabilities(ids: list[int]) -> torch.Tensor:
    """The model's, for what follows each of the ids, (T, vocabulary)."""
    model = memorised("modern")
    with torch.no_grad():
        logits = model(torch.tensor([ids]), targets=torch.tensor([ids]))[0][0]
    return logits[:, : TOKENIZER.vocab_size].float().log_softmax(-1)


def test_logprobs(client):
    answer = ask(client, logprobs=3, max_tokens=10).choices[0]
    told, prompt = answer.logprobs, TOKENIZER.encode(PROMPT).tolist()
    ids = TOKENIZER.encode(answer.text).tolist()
    table = log_probabilities(prompt + ids)[len(prompt) - 1 : -1]
    assert told.token_ids == ids and "".join(told.tokens) == answer.text
    assert told.token_logprobs == pytest.approx(table[range(10), ids].tolist(), abs=1e-4)
    assert told.text_offset == list(range(10))
    assert told.token_bytes == [list(char.encode()) for char in answer.text]
    for row, plain, full in zip(table, told.top_logprobs, told.top, strict=True):
        values, likeliest = row.topk(3)
        assert [item["id"] for item in full] == likeliest.tolist()
        assert [item["logprob"] for item in full] == pytest.approx(values.tolist(), abs=1e-4)
        assert plain == {item["token"]: item["logprob"] for item in full}
        assert all(bytes(item["bytes"]).decode() == item["token"] for item in full)


def test_logprobs_are_the_models_own(client):
    """Before temperature, bias and filters; and the drawn token is returned even if others are likelier."""
    unlikely = int(log_probabilities(TOKENIZER.encode(PROMPT).tolist())[-1].argmin())
    answer = ask(client, logprobs=1, max_tokens=1, logit_bias={str(unlikely): 100}).choices[0].logprobs
    row = log_probabilities(TOKENIZER.encode(PROMPT).tolist())[-1]
    assert answer.token_logprobs == pytest.approx([float(row[unlikely])], abs=1e-3)
    assert len(answer.top_logprobs[0]) == 2 and len(answer.top[0]) == 1
    alone = ask(client, logprobs=0, max_tokens=1).choices[0].logprobs
    assert alone.top == [[]] and list(alone.top_logprobs[0]) == alone.tokens


@pytest.mark.cases(2)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("length", [0, 4])
def test_echo_scores_a_prompt(client, length, stream):
    answer = ask(client, echo=True, logprobs=2, max_tokens=length, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    text = PROMPT + expected(temperature=0.0)[0][:length]
    assert "".join(choice.text for choice in choices) == text
    assert choices[-1].finish_reason == "length"
    ids = TOKENIZER.encode(text).tolist()
    table = log_probabilities(ids)[:-1]
    told = [value for choice in choices for value in choice.logprobs.token_logprobs]
    assert told[0] is None and told[1:] == pytest.approx(table[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)
    assert [i for choice in choices for i in choice.logprobs.token_ids] == ids
    assert [i for choice in choices for i in choice.logprobs.text_offset] == list(range(len(ids)))
    assert choices[0].logprobs.top_logprobs[0] is None and choices[0].logprobs.top[0] is None
    if not stream:
        assert answer.usage.completion_tokens == length and answer.usage.total_tokens == 6 + length


def test_echo_scores_the_prompt_within_the_context(client):
    told = ask(client, prompt=TEXT[:30], echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    ids = TOKENIZER.encode(TEXT[:30]).tolist()
    assert told.token_ids == ids and told.token_logprobs[:7] == [None] * 7, "6 lie before its window of 24"
    table = log_probabilities(ids[6:])[:-1]
    assert told.token_logprobs[7:] == pytest.approx(table[range(23), ids[7:]].tolist(), abs=1e-4)


def test_echo_of_text_alone(client):
    answer = ask(client, prompt=[PROMPT, TEXT[9:12]], echo=True, n=2, max_tokens=3)
    begin = [PROMPT, PROMPT, TEXT[9:12], TEXT[9:12]]
    assert [choice.text[:-3] for choice in answer.choices] == begin
    assert ask(client, prompt=TOKENIZER.encode(PROMPT).tolist(), echo=True).choices[0].text.startswith(PROMPT)


def test_tokens_that_are_part_of_a_character():
    plan = Plan("m", [Request([1], GenerationConfig(num_samples=1), logprobs=0)], stream=False, usage=False)
    parts = [Token(i, bytes([byte]), -1.0) for i, byte in enumerate("a€b".encode())]
    assert plan.add(0, Update((Delta(0, "a€b", tuple(parts), "length"),)))
    told = json.loads(plan.whole())["choices"][0]["logprobs"]
    assert told["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert told["token_bytes"] == [[97], [0xE2], [0x82], [0xAC], [98]]
    assert told["text_offset"] == [0, 1, 1, 1, 2]
    assert token_text(b"\xff") == "bytes:\\xff"


def test_bytes_are_whole_characters_in_the_text():
    """A byte model's stream never shows half a character."""
    torch.manual_seed(0)
    from llm_from_scratch.config import GPTConfig
    from llm_from_scratch.core.model import GPT

    model = GPT(GPTConfig(vocab_size=256, block_size=32, n_layer=1, n_head=1, n_embd=8)).eval()
    euro = [str(byte) for byte in "€".encode()]
    with served(Generator(model, ByteTokenizer())) as server:
        bias = dict.fromkeys(euro, 100)
        whole = ask(server.client(), prompt="€", max_tokens=40, temperature=1, seed=1, logit_bias=bias)
        chunks = list(
            ask(server.client(), prompt="€", max_tokens=40, temperature=1, seed=1, logit_bias=bias, stream=True)
        )
    assert whole.usage.prompt_tokens == 3 and whole.usage.completion_tokens == 40
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "\u4e2d"}, "prompt", "never saw the character"),
        ({"prompt": [10**30]}, "prompt", "outside the vocabulary"),
        ({"prompt": [1, "a"]}, "prompt", "expected a string"),
        ({"prompt": "a" * 101}, "prompt", "the limit is 100"),
        ({"max_tokens": 501}, "max_tokens", "500"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than"),
        ({"n": 17}, "n", "16"),
        ({"n": 2, "best_of": 3}, "best_of", "n"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": 20, "n": 16, "max_tokens": 500}, "logprobs", "131072"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [""]}, "stop", "1 to 256"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"logit_bias": {"62": 1}}, "logit_bias", "0 to 61"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"extra_body": {"tempreature": 1}}, "tempreature", "did you mean temperature"),
        ({"extra_body": {"stop_token_ids": [99]}}, "stop_token_ids", "0 to 61"),
    ],
    ids=str,
)
def test_mistakes_are_named(client, fields, param, says):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param and says in refused.value.message
    assert refused.value.type == "invalid_request_error" and "\n" not in refused.value.body["message"]


HALF, WHOLE = r'"\ud83d"', '"ab"'


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (f'{{"prompt": {HALF}}}', "prompt", "half of a surrogate"),
        (f'{{"prompt": ["a", {HALF}]}}', "prompt", "half of a surrogate"),
        (f'{{"prompt": {WHOLE}, "stop": {HALF}}}', "stop", "half of a surrogate"),
        (f'{{"prompt": {WHOLE}, "temperature": NaN}}', "temperature", "finite"),
        (f'{{"prompt": {WHOLE}, "top_p": -Infinity}}', "top_p", "finite"),
        (f'{{"prompt": {WHOLE}, "max_tokens": NaN}}', "max_tokens", "integer"),
        (f'{{"prompt": {WHOLE}, "logit_bias": {{"1": NaN}}}}', "logit_bias", "-100 to 100"),
        (f'{{"prompt": {WHOLE}, "n": 1, "seed": 2, "n": 1}}', "n", "more than once"),
        (f'{{"prompt": {WHOLE}, "logit_bias": {{"1": 2, "1": 2}}}}', "1", "more than once"),
        (f'{{"prompt": {WHOLE}, "store": 0}}', "store", "not supported"),
        (f'{{"prompt": {WHOLE}, "stream_options": {{"include_obfuscation": true}}}}', "stream_options", "false"),
    ],
)
def test_json_with_duplicate_keys_and_other_tricks(server, body, param, says):
    status, _, told = answer(server.connect(http("/v1/completions", raw=body.encode())))
    error = json.loads(told)["error"]
    assert status == 400 and error["param"].startswith(param) and says in error["message"].lower()


def test_fields_that_ask_for_nothing_are_accepted(client):
    harmless = {"tools": [], "tool_choice": "none", "suffix": None, "metadata": {"a": "b"}, "reasoning_effort": None,
                "response_format": {"type": "text"}, "store": False, "parallel_tool_calls": True, "user": "x",
                "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "functions": []}  # fmt: skip
    plain = ask(client, temperature=0)
    assert ask(client, temperature=0, extra_body=harmless).choices == plain.choices


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, model="gpt-4")
    assert refused.value.code == "model_not_found" and NAME in refused.value.message


def test_models_info_and_tokens(server, client):
    listed = client.models.list().data
    assert [(model.id, model.max_model_len) for model in listed] == [(NAME, 24)]
    assert client.models.retrieve(NAME) == listed[0]
    with pytest.raises(openai.NotFoundError, match="this server serves"):
        client.models.retrieve("owner/other")
    for path in ("/health", "/v1/models", f"/v1/models/{NAME}", "/metrics", "/"):
        status, headers, body = answer(server.connect(http(path, method="HEAD")), "HEAD")
        assert (status, body) == (200, b"") and int(headers["content-length"]) > 10
    info = get(server, "/v1/info")
    assert info["parameters"] == memorised("modern").get_num_params() and info["vocab_size"] == 62
    assert (info["chat"], info["watch"], info["block_size"], info["tokenizer"]) == (False, False, 24, "char")
    assert info["limits"] == {
        "max_tokens": 500, "max_prompt_tokens": 100, "max_n": 16, "max_logprobs": 20, "max_seconds": 300.0,
        "max_told": 1 << 17,
    }  # fmt: skip
    told = post(server, "/tokenize", {"prompt": "a€é"[::2] + "b"})
    assert told["token_strs"] == ["a", "é", "b"] and told["token_bytes"][1] == [0xC3, 0xA9]
    assert told["tokens"] == TOKENIZER.encode("aéb").tolist() and told["count"] == 3
    assert post(server, "/detokenize", {"tokens": told["tokens"]}) == {"prompt": "aéb"}
    assert post(server, "/tokenize", {"prompt": ""})["tokens"] == []


def test_metrics_count(server, client):
    def value(name: str) -> float:
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return float(next((line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")), 0))

    names = ("llm_prompt_tokens_total", "llm_generated_tokens_total", "llm_generation_seconds_count",
             "llm_time_to_first_token_seconds_count",
             'llm_requests_total{route="/v1/completions",status="200"}')  # fmt: skip
    before = [value(name) for name in names]
    ask(client, max_tokens=9)
    list(ask(client, max_tokens=9, stream=True))
    after = [value(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [12, 18, 2, 2, 2]
    assert value("llm_engine_up") == 1 and value("llm_slots") == 16


def get(server: Served, path: str) -> Any:
    with urllib.request.urlopen(server.url + path) as answer:
        return json.load(answer)


def post(server: Served, path: str, body: Any) -> Any:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
