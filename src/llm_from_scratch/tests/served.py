"""A server for tests: the real one, with a small model, in a thread on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import http.client as http_client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_from_scratch.core.chat import ChatTemplate
from llm_from_scratch.generation.engine import Engine
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.serving.options import ServeOptions
from llm_from_scratch.serving.service import Service

from .lazy import app, openai, server
from .memorised import TOKENIZER, memorised

NAME = "memorised"


class Gate:
    """Stands where a generator turns tokens to bytes: closed, no sample gains a token; broken, the engine fails."""

    def __init__(self, generator: Generator, pause: float = 0.0):
        self.inner, self.pause = generator.bytes_of, pause
        self.open, self.broken, self.tokens = threading.Event(), 0, 0
        self.closes_at: int | None = None  # calls
        self.error: BaseException = RuntimeError("a kernel failed")
        self.open.set()
        generator.bytes_of = self  # type: ignore[assignment]

    def __call__(self, before: int, token: int) -> bytes:
        self.tokens += 1
        if self.tokens == self.closes_at:
            self.open.clear()
        self.open.wait(60)
        if self.broken:
            self.broken -= 1
            raise self.error
        if self.pause:
            time.sleep(self.pause)
        return self.inner(before, token)


@dataclass
class Served:
    service: Service
    port: int
    protocol: type  # of a connection

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, request: bytes = b"", seconds: float = 20.0) -> socket.socket:
        """A connection on which some bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=seconds)
        connection.sendall(request)
        return connection

    def client(self, key: str = "none", **options: Any) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 30.0, **options})

    def advance(self, seconds: float) -> None:
        """Moves the clock of the server's event loop, while a request is there."""
        loop = next(iter(self.service.queue.jobs)).loop
        before = loop.time
        loop.time = lambda: before() + seconds  # type: ignore[method-assign]
        loop.call_soon_threadsafe(lambda: None)  # it looks at its timers again

    def idle(self) -> bool:
        """Whether nothing runs, waits or is held for a request."""
        stats, queue = self.service.supervisor.stats(), self.service.queue
        return not (stats.running or stats.waiting or queue.samples or queue.jobs)


def http(path: str, body: Any = None, method: str | None = None, raw: bytes | None = None, **headers: Any) -> bytes:
    """A request as bytes. body: sent as JSON; headers: with _ for -; one that is None is left out."""
    content = raw if raw is not None else json.dumps(body).encode() if body is not None else b""
    method = method or ("POST" if content else "GET")
    lines = {"host": "127.0.0.1", "content-length": str(len(content)), "content-type": "application/json"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + content


def answer(connection: socket.socket, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer on a connection; status 0 if it was closed without one."""
    reply = http_client.HTTPResponse(connection, method=method)
    try:
        reply.begin()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    except (http_client.HTTPException, OSError):
        return 0, {}, b""
    finally:
        reply.close()
        connection.close()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether a condition has come true within some time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def served(
    generator: Generator | None = None,
    *,
    make_engine: Callable[[], Any] | None = None,
    template: ChatTemplate | None = None,
    watch: Path | None = None,
    ends: frozenset[int] = frozenset(),
    seed: int | None = None,
    send_buffer: int = 0,
    **options: Any,
) -> Iterator[Served]:
    """options: of ServeOptions. send_buffer: bytes that the system keeps for a client that does not read."""
    generator = generator or Generator(memorised("modern"), TOKENIZER)
    settings = ServeOptions(**{"port": 0, "max_concurrent": 16, **options})
    settings.validate()
    service = Service(
        generator,
        make_engine or (lambda: Engine(generator, slots=settings.max_concurrent)),
        settings,
        name=NAME,
        template=template,
        watch=watch,
        ends=ends,
        seed=seed,
    )
    with server.listen(settings) as bound:
        if send_buffer:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # accepted connections inherit it
        serving = server.make_server(app.make_app(service), service)
        thread = threading.Thread(target=lambda: asyncio.run(serving.serve(sockets=[bound])), daemon=True)
        thread.start()
        assert until(lambda: serving.started)
        try:
            yield Served(service, bound.getsockname()[1], serving.config.http_protocol_class)
        finally:
            serving.should_exit = True
            service.queue.end_all()
            thread.join(30)
            assert not thread.is_alive(), "the server did not end"
