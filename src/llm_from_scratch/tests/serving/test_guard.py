"""Access control: keys, host names, origins, sizes and time limits, over plain sockets."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from llm_from_scratch.errors import UserError
from llm_from_scratch.serving import guard
from llm_from_scratch.serving.options import ServeOptions, is_loopback
from llm_from_scratch.serving.service import Service

from ..lazy import app
from ..served import Served, answer, http, served, until
from ..tiny import slow_except

KEY = "sk-a-secret"
BODY = {"prompt": "abc", "max_tokens": 2}
OPEN = ["/", "/health", "/static/app.js"]
GUARDED = [
    "/metrics", "/v1/models", "/v1/info", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize",
    "/v1/watch", "/v1/watch/metrics", "/v1/watch/samples", "/v1/models/memorised", "/v1/models/no", "/none", "/docs",
    "/openapi.json", "//", "/static/../v1/info",
    "/static/x/../../v1/info", "/V1/models", "/health/", "/health%2f..%2fv1/info",
]  # fmt: skip


@pytest.fixture(scope="module")
def open_server():
    with served(max_body_bytes=10_000) as found:
        yield found


@pytest.fixture(scope="module")
def locked_server():
    with served(api_key=KEY) as found:
        yield found


def ask(found: Served, path: str, body: Any = None, **more: Any) -> tuple[int, dict[str, str], bytes]:
    return answer(found.connect(http(path, body, **more)))


def error(reply: tuple[int, dict[str, str], bytes]) -> dict[str, Any]:
    """An answer's error; every one has OpenAI's shape."""
    content = json.loads(reply[2])["error"]
    assert set(content) == {"message", "type", "param", "code"} and content["message"]
    return content


def test_every_route_is_named_here(locked_server):
    routes = {route.path for route in app.make_app(locked_server.service).routes}
    assert routes == {*OPEN[:2], "/static/{name}", "/v1/models/{name:path}", *GUARDED[:10]}


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "key",
    slow_except(
        [None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer \xff\xfe"],
        *(None, f"Bearer {KEY}x", f"Basic {KEY}"),
    ),
)
def test_without_the_key_there_is_nothing(locked_server, path, key):
    for method, body in (("GET", None), ("POST", BODY)):
        reply = ask(locked_server, path, body, method=method, authorization=key)
        assert reply[0] == 401 and error(reply)["code"] == "invalid_api_key"
        assert reply[1]["www-authenticate"] == "Bearer"


def test_with_the_key(locked_server):
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert ask(locked_server, "/v1/models", authorization=f"{scheme} {KEY}")[0] == 200
    assert ask(locked_server, "/v1/completions", BODY, authorization=f"Bearer {KEY}")[0] == 200
    assert ask(locked_server, "/none", authorization=f"Bearer {KEY}")[0] == 404
    assert all(ask(locked_server, path)[0] in (200, 404) for path in OPEN)
    twice = http("/v1/models", authorization=f"Bearer {KEY}\r\nauthorization: Bearer {KEY}")
    assert answer(locked_server.connect(twice))[0] == 400


def test_the_comparison_takes_constant_time(locked_server, monkeypatch):
    seen = []
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: seen.append((a, b)))
    assert ask(locked_server, "/v1/models", authorization="Bearer x")[0] == 401
    assert seen == [(b"x", KEY.encode())]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200), ("localhost.", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("", 403),
        ("evil.example:localhost", 403), ("localhost@evil.example", 403), ("\xff", 403),
    ],
)  # fmt: skip
def test_names_of_the_server(open_server, host, status):
    """A page elsewhere whose name was made to point here says so in the Host header."""
    assert ask(open_server, "/v1/models", host=host)[0] == status
    assert ask(open_server, "/v1/completions", BODY, host=host)[0] == status
    assert ask(open_server, "/health", host=host)[0] == 200


def test_further_names():
    with served(allowed_hosts=("LLM.example.org",)) as found:
        assert ask(found, "/v1/models", host="llm.example.org:443")[0] == 200
        assert ask(found, "/v1/models", host="other.example.org")[0] == 403
        behind_a_proxy = {"host": "127.0.0.1:8000", "origin": "https://llm.example.org"}
        assert ask(found, "/v1/completions", BODY, **behind_a_proxy)[0] == 200
    with served(allowed_hosts=("*",)) as found:
        assert ask(found, "/v1/models", host="whatever")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1.evil.example"}, 403),
        ({"origin": "http://evil.example/http://127.0.0.1"}, 403),
        ({"origin": "file://127.0.0.1"}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
    ],
    ids=str,
)
def test_pages_of_other_origins_cannot_write(open_server, headers, status):
    assert ask(open_server, "/v1/completions", BODY, **headers)[0] == status
    assert "access-control-allow-origin" not in ask(open_server, "/v1/models", **headers)[1]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None])
def test_a_body_that_a_form_could_send_is_refused(open_server, kind):
    """Such a body needs no permission of the server's to be sent by a page elsewhere."""
    assert ask(open_server, "/v1/completions", BODY, content_type=kind)[0] == 415


def test_cors_if_enabled():
    ours, other = "https://app.example.org", "https://evil.example"
    preflight = {"method": "OPTIONS", "access_control_request_method": "POST"}
    with served(api_key=KEY, cors_origins=(ours,)) as found:
        asked = {"access_control_request_headers": "authorization,content-type,x-stainless-os"}
        allowed = ask(found, "/v1/completions", origin=ours, **preflight, **asked)
        assert allowed[0] == 200 and allowed[1]["access-control-allow-origin"] == ours
        assert ask(found, "/v1/completions", origin=other, **preflight)[0] == 400
        reply = ask(found, "/v1/completions", BODY, origin=ours, authorization=f"Bearer {KEY}")
        assert reply[0] == 200 and reply[1]["access-control-allow-origin"] == ours
        assert ask(found, "/v1/completions", BODY, origin=ours)[1]["access-control-allow-origin"] == ours, "of a 401"
        assert ask(found, "/v1/completions", BODY, origin=other, authorization=f"Bearer {KEY}")[0] == 403


def test_bodies_of_any_size(open_server):
    large = http("/v1/completions", {"prompt": "a" * 11_000})
    assert answer(open_server.connect(large))[0] == 413
    said = http("/v1/completions", raw=b"{}", content_length=str(10**18))
    assert answer(open_server.connect(said))[0] == 413
    head = http("/v1/completions", method="POST", transfer_encoding="chunked", content_length=None)
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    reply = answer(open_server.connect(head + chunk * 3 + b"0\r\n\r\n"))
    assert reply[0] == 413 and error(reply)["code"] == "body_too_large"
    small = json.dumps(BODY).encode()
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in small) + b"0\r\n\r\n"
    assert answer(open_server.connect(head + pieces))[0] == 200


def test_bodies_together(open_server, monkeypatch):
    """What many clients send at once does not fill the memory."""
    monkeypatch.setattr(guard, "BODIES", 15_000)
    with served(max_body_bytes=9000) as found:
        monkeypatch.undo()
        begun = http("/v1/completions", raw=b" " * 8000, content_length="9000")
        connections = [found.connect(begun) for _ in range(6)]
        replies = [answer(connection) for connection in connections[5:]]
        assert replies[0][0] == 429 and replies[0][1]["retry-after"]
        for connection in connections:
            connection.close()
        assert until(lambda: ask(found, "/v1/completions", BODY)[0] == 200)


def test_a_body_that_never_arrives(open_server, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    reply = answer(open_server.connect(http("/v1/completions", raw=b'{"pro', content_length="50")))
    assert reply[0] == 408 and open_server.idle()


def test_headers_that_never_arrive(open_server, monkeypatch):
    monkeypatch.setattr("llm_from_scratch.serving.server.HEADER_SECONDS", 0.2)
    for begin in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: a\r\nx: "):
        assert answer(open_server.connect(begin))[0] == 0, "closed without a word"
    connection = open_server.connect(http("/health"))
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    connection.sendall(b"GET /health HT")
    begin = time.monotonic()
    while connection.recv(1000):
        pass
    assert time.monotonic() - begin < 10
    connection.close()


def test_a_refused_body_that_continues_is_cut_off(open_server, monkeypatch):
    monkeypatch.setattr("llm_from_scratch.serving.server.HEADER_SECONDS", 0.2)
    connection = open_server.connect(http("/v1/completions", raw=b" ", content_length=str(10**12)))
    assert b"413" in connection.recv(1000)

    def closed() -> bool:
        try:
            connection.sendall(b" " * 1000)
            return False
        except OSError:
            return True

    assert until(closed)
    connection.close()


def test_too_many_connections(open_server, monkeypatch):
    def many() -> bool:
        reply = answer(open_server.connect(http("/health")))
        return reply[0] == 503 and reply[1]["retry-after"] == "2"

    idle = [open_server.connect() for _ in range(5)]
    monkeypatch.setattr(open_server.protocol, "limit", 5)
    assert until(many)
    monkeypatch.undo()
    for connection in idle:
        connection.close()
    assert answer(open_server.connect(http("/health")))[0] == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\xff\x16\x03\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx" + b"y" * 40_000,
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_requests_that_are_not_http(open_server, raw):
    reply = answer(open_server.connect(raw))
    assert reply[0] == 400 and error(reply)["type"] == "invalid_request_error"


def test_routes_that_are_none(open_server):
    for path, method, status in (
        ("/v2", "GET", 404), ("/v1/completions", "GET", 405), ("/v1/models", "DELETE", 405), ("/%00", "GET", 404),
        ("/v1/models/../info", "GET", 404), ("/", "TRACE", 405), ("*", "OPTIONS", 404), ("/v1/models/", "GET", 404),
    ):  # fmt: skip
        reply = ask(open_server, path, method=method)
        assert reply[0] == status and error(reply), (path, method)


def test_the_page(open_server, monkeypatch, tmp_path):
    monkeypatch.setattr("llm_from_scratch.serving.app.PAGE", tmp_path)
    status, headers, body = ask(open_server, "/")
    assert status == 404 and body.decode().count("\n") == 1
    (tmp_path / "index.html").write_text("<p>hi")
    (tmp_path / "app.js").write_text("1")
    (tmp_path / "secret.py").write_text("1")
    (tmp_path.parent / "outside.js").write_text("1")
    status, headers, body = ask(open_server, "/")
    assert (status, body, headers["content-type"]) == (200, b"<p>hi", "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-cache")
    assert ask(open_server, "/static/app.js")[1]["content-type"] == "text/javascript; charset=utf-8"
    for path in (
        "secret.py",
        "none.js",
        "../outside.js",
        "..%2foutside.js",
        "%2e%2e%2foutside.js",
        ".js",
        "",
        "a%00.js",
        "a" * 300 + ".js",
    ):
        assert ask(open_server, f"/static/{path}")[0] == 404, path


def test_an_internal_error_is_logged_without_the_request(open_server, monkeypatch, capfd):
    def broken(self: Service, asked: Any) -> None:
        raise KeyError(asked.prompt)

    monkeypatch.setattr(Service, "tokenize", broken)
    reply = ask(open_server, "/tokenize", {"prompt": "a private text"})
    assert reply[0] == 500 and error(reply)["type"] == "server_error"
    said = capfd.readouterr()
    assert "KeyError at test_guard.py" in said.err and "private" not in said.err + said.out


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host": "0.0.0.0"}, "LLM_API_KEY"),
        ({"host": "::"}, "LLM_API_KEY"),
        ({"host": ""}, "LLM_API_KEY"),
        ({"cors_origins": ("*",)}, "without an API key"),
        ({"cors_origins": ("example.org",)}, "not an origin"),
        ({"api_key": ""}, "visible"),
        ({"api_key": "a b"}, "visible"),
        ({"api_key": "é"}, "visible"),
        ({"host": "no.such.name.invalid"}, "not an address"),
        ({"host": "\ud800"}, "not an address"),
        ({"port": 65536}, "65535"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"max_queued": -1}, "max_queued"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"watch": "/no/such"}, "no such folder"),
        ({"model_name": "a b"}, "model_name"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        ServeOptions(**settings).validate()


def test_which_hosts_are_this_machine_alone():
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("127.9.9.9")
    assert not is_loopback("0.0.0.0")
    ServeOptions(host="0.0.0.0", api_key="k", cors_origins=("*",)).validate()
