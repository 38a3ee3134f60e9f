"""Hostile requests, as bytes: invalid JSON, values of every wrong type, and malformed HTTP of every kind."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

from ..served import http

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROUTES = (COMPLETIONS, CHAT, "/tokenize", "/detokenize")
GOOD = {"prompt": "ab", "max_tokens": 2}
FIELDS = (
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stream",
    "stream_options",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "user",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "best_of",
    "echo",
    "logprobs",
    "model",
    "suffix",
    "__proto__",
    "messages",
    "tokens",
)
ODD_VALUES: tuple[Any, ...] = (
    -1,
    0,
    2**31,
    2**63,
    -(2**64),
    10**400,
    1.5,
    -0.0,
    1e308,
    5e-324,
    True,
    "",
    "x" * 5000,
    "\ud800",
    "\x00",
    [],
    [[]],
    [[[]]],
    {},
    {"a": {}},
    [None],
    [1, "a"],
    [-1],
    [2**70],
    ["a", 1],
    {"": 0},
    {"1": "x"},
    {"1e3": 1},
    "1",
    "NaN",
    ["\udfff"],
    [True],
    [1.0],
)
RAW_BODIES = (
    b"",
    b"{",
    b"}",
    b"null",
    b"[]",
    b'"text"',
    b"1",
    b"nul",
    b"{'prompt': 1}",
    b'{"prompt": "ab",}',
    b'{"prompt"}',
    b'{"prompt": NaN}',
    b'{"prompt": "ab", "temperature": NaN}',
    b'{"prompt": "ab", "top_p": Infinity}',
    b'{"prompt": "ab", "min_p": -Infinity}',
    b'{"prompt": "ab", "temperature": 1e999}',
    b'{"prompt": "ab", "seed": 1e3}',
    b'{"prompt": "\xff\xfe"}',
    b"\xff\xfe{\x00}\x00",
    b'\xef\xbb\xbf{"prompt": "ab"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\xc0\x80"}',
    b'{"prompt": "\\u12"}',
    b'{"prompt": "a\x01b"}',
    b'{"prompt": "ab"} x',
    b"\x00" * 100,
    b'{"prompt": "ab", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "ab", "max_tokens": 1' + b"0" * 4000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"[" * 50_000 + b"]" * 50_000,
    b'{"prompt": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    b'{"prompt": [' + b"1," * 400_000 + b"1]}",
    b'{"prompt": [' + b"[]," * 300_000 + b"[]]}",
    b'{"prompt": [' + b'"a",' * 200_000 + b'"a"]}',
    b'{"logit_bias": {' + b'"1":1,' * 100_000 + b'"1":1}, "prompt": "a"}',
    b'{"prompt": "' + b"a" * 1_000_000 + b'"}',
    b'{"prompt": "' + b" " * 1_000_000 + b'"}',
    b'{"prompt": "' + "\u4e2d".encode() * 300_000 + b'"}',
    b'{"prompt": "ab", "' + b"k" * 500_000 + b'": 1}',
    b'{"prompt": "ab", ' + b",".join(b'"k%d": 1' % i for i in range(50_000)) + b"}",
    b'{"prompt": "ab", "stop": [' + b'"a",' * 100_000 + b'"b"]}',
    b'{"prompt": "ab", "stop": "' + b"a" * 900_000 + b'"}',
    b'{"messages": [' + b'{"role": "user", "content": "a"},' * 20_000 + b'{"role": "user"}]}',
    b'{"messages": [{"role": "user", "content": [' + b'{"type": "text", "text": "a"},' * 20_000 + b"1]}]}",
    b'{"prompt": "ab", "prompt": 5}',
)


def bodies() -> Iterator[bytes]:
    """Well-formed HTTP with an invalid request."""
    for raw, route in itertools.product(RAW_BODIES, ROUTES):
        yield http(route, raw=raw, method="POST")
    for field, value in itertools.product(FIELDS, ODD_VALUES):
        yield http(COMPLETIONS, {**GOOD, field: value})
    for field, value in itertools.product(("messages", "tools", "top_logprobs", "max_completion_tokens"), ODD_VALUES):
        yield http(CHAT, {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2, field: value})
    for value in ODD_VALUES:
        yield http(CHAT, {"messages": [{"role": value, "content": "ab"}], "max_tokens": 2})
        yield http(CHAT, {"messages": [{"role": "user", "content": value}], "max_tokens": 2})
        yield http("/tokenize", {"prompt": value})
        yield http("/detokenize", {"tokens": value})
        yield http(COMPLETIONS, value)
    for sent in (
        {"prompt": ["ab"] * 10_000},
        {"prompt": "ab", "n": 10_000},
        {"prompt": "ab", "max_tokens": 10**9},
        {"prompt": "ab" * 60_000},
        {"prompt": [97] * 200_000},
        {"prompt": "ab", "logprobs": 20, "max_tokens": 4096, "n": 30},
        {"prompt": "ab", "echo": True, "logprobs": 20, "max_tokens": 0, "n": 20},
        {"prompt": "ab", "logit_bias": {"97": -100}},
        {"prompt": "ab", "logit_bias": {str(i): -100 for i in range(256)}, "temperature": 1e-30},
        {"prompt": "ab", "repetition_penalty": 1e-30},
        {"prompt": "ab", "repetition_penalty": 100, "temperature": 0.0001},
        {"prompt": "ab", "top_p": 1e-300, "min_p": 1},
        {"prompt": "ab", "stop": ["a" * 256] * 16},
    ):
        yield http(COMPLETIONS, {"max_tokens": 2, **sent})


def framings() -> Iterator[bytes]:
    """HTTP that is odd or none, whatever the body is."""
    good = json.dumps(GOOD).encode()
    names = (
        "authorization",
        "host",
        "origin",
        "cookie",
        "x-forwarded-for",
        "content-encoding",
        "expect",
        "range",
        "connection",
        "upgrade",
        "transfer-encoding",
        "content-type",
        "accept",
        "forwarded",
    )
    values = (
        "",
        " ",
        "\xff",
        "a" * 8000,
        "\t",
        "null",
        "gzip",
        "chunked, gzip",
        "100-continue",
        "close, keep-alive",
        "websocket",
        "bytes=0-",
        "Bearer " + "x" * 5000,
        "evil.example",
        "application/json; charset=utf-16",
    )
    for name, value in itertools.product(names, values):
        yield http(COMPLETIONS, GOOD, **dict[str, Any]({name: value}))
    for path in (
        "/../../etc/passwd",
        "/static/../app.py",
        "/static/..%2f..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/%00",
        "/%ff",
        "//",
        "/v1/completions/",
        "/v1//completions",
        "/V1/COMPLETIONS",
        "/v1/completions;a=1",
        "/v1/completions%20",
        "*",
        "http://evil.example/v1/models",
        "/" + "a" * 20_000,
        "/?" + "a=1&" * 5000,
        "/v1/watch/metrics?after=-1",
        "/v1/watch/metrics?after=" + "9" * 400,
        "/static/" + "a" * 300 + ".js",
        "/static/con.js",
        "/static/a%00.js",
        "/v1/watch/samples?after=1&after=2",
        "/metrics?name[]=../",
        "/${jndi:ldap://evil}",
        "/static/index.html\\..",
    ):
        for method in ("GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", "get", "X" * 50):
            yield http(path, GOOD if method == "POST" else None, method=method)
    chunked = http(COMPLETIONS, method="POST", transfer_encoding="chunked", content_length=None)
    for body in (
        b"zz\r\n",
        b"-1\r\n",
        b"ffffffffffffffff\r\na",
        b"5\r\nabc",
        b"0\r\n\r\n",
        b"1;" + b"x" * 9000 + b"\r\na\r\n",
        b"2\r\n{}\r\n0\r\nx: y\r\n\r\n",
        b"3\r\n{}\r\n0\r\n\r\n",
        b"0\r\n" + b"a: b\r\n" * 2000 + b"\r\n",
    ):
        yield chunked + body
    yield from (
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\r\n" * 500,
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\nhost: a\n\n",
        b"GET / HTTP/1.1\r\n host: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost a\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\x00b\r\n\r\n",
        b"GET  / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 6000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcde",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: +5\r\n\r\nabcde",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0x5\r\n\r\nabcde",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\n\r\n" + good,
        b"CONNECT evil.example:80 HTTP/1.1\r\nhost: evil.example\r\n\r\n",
        b"GET ftp://x/ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\nx: x\r\n\r\n",
        http(COMPLETIONS, GOOD) + http("/v1/models") * 200,
        http("/v1/info") * 300,
        http(COMPLETIONS, GOOD)[:60],
        http(COMPLETIONS, GOOD)[:-5],
        http(COMPLETIONS, GOOD, content_length="3"),
        http(COMPLETIONS, raw=b"a" * 3_000_000),
        http(COMPLETIONS, raw=b"", method="POST", content_length=str(10**15)),
    )


def hostile_requests(count: int, seed: int) -> list[bytes]:
    """So many of them, half bodies and half framings; the same for the same seed."""
    rng = random.Random(seed)
    found: list[bytes] = []
    for kind in (list(bodies()), list(framings())):
        rng.shuffle(kind)
        part = -(-count // 2)
        found += (kind * (part // len(kind) + 1))[:part]
    rng.shuffle(found)
    return found[:count]
