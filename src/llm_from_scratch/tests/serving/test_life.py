"""Running requests: clients that disconnect or do not read, deadlines, overload, an engine that fails."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from llm_from_scratch.errors import EngineError
from llm_from_scratch.generation.engine import Engine, Request, Update
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.serving import answers, jobs, service, supervisor

from ..lazy import openai
from ..memorised import TEXT, TOKENIZER, memorised
from ..served import NAME, Gate, Served, answer, http, served, until

LONG = {"prompt": TEXT[:5], "max_tokens": 4000}


def generator() -> Generator:
    return Generator(memorised("modern"), TOKENIZER)


def health(server: Served) -> tuple[int, str]:
    status, _, body = answer(server.connect(http("/health")))
    return status, json.loads(body)["status"]


def test_a_disconnected_client_frees_its_slot():
    gate = Gate(model := generator(), pause=0.002)
    with served(model, max_concurrent=2, max_queued=2) as server:
        waiting = {**LONG, "n": 2}
        for stream in (True, False):
            running = server.connect(http("/v1/completions", {**LONG, "n": 2, "stream": stream}))
            begun = gate.tokens
            assert until(lambda begun=begun: gate.tokens > begun + 3)
            queued = server.connect(http("/v1/completions", waiting))
            assert until(lambda: server.service.queue.samples == 4)
            queued.close()
            running.close()
            assert until(server.idle, 5), "long before 4000 tokens are drawn"
        assert gate.tokens < 2000
        assert server.service.metrics.registry.get_sample_value("llm_aborted_total") == 4


def test_a_client_that_disconnects_after_its_request_is_detected():
    """Bytes after a request stop the server from reading on, which must not hide that the client has gone."""
    gate = Gate(model := generator(), pause=0.002)
    with served(model) as server:
        for more in (1000, 200_000):  # the latter is more than is kept, and ends the connection by itself
            request = http("/v1/completions", {**LONG, "stream": False})
            connection = server.connect(request + b"GET /health HTTP/1.1\r\n")
            begun = gate.tokens
            assert until(lambda begun=begun: gate.tokens > begun + 3)
            connection.sendall(b"x: " + b"y" * more)
            connection.close()
            assert until(server.idle, 5), "long before 4000 tokens are drawn"


def test_a_request_after_another_on_one_connection():
    with served() as server:
        two = http("/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True}) + http("/v1/models")
        connection = server.connect(two)
        seen = b""
        while b'"object": "list"' not in seen:
            piece = connection.recv(65536)
            assert piece, seen
            seen += piece
        assert seen.index(b"[DONE]") < seen.index(b'"object": "list"')
        connection.close()


def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(answers, "STALLED", 0.3)
    with served(max_concurrent=3, max_tokens=100_000, send_buffer=4096) as server:
        asked = {**LONG, "max_tokens": 5000, "logprobs": 20, "n": 1, "stream": True}
        slow = server.connect()
        slow.setsockopt(1, 8, 4096)  # SOL_SOCKET, SO_RCVBUF
        slow.sendall(http("/v1/completions", asked))
        assert until(lambda: server.service.queue.samples == 1)
        other = server.client().completions.create(model=NAME, prompt="abc", max_tokens=5)
        assert other.usage.completion_tokens == 5, "it does not hold up another"
        assert until(server.idle, 60)
        assert server.service.metrics.registry.get_sample_value("llm_aborted_total") == 1
        slow.close()


def test_the_buffer_for_a_client_is_bounded(monkeypatch):
    monkeypatch.setattr(jobs, "MAX_PENDING", 500)
    with served(max_tokens=100_000, send_buffer=4096) as server:
        slow = server.connect()
        slow.setsockopt(1, 8, 4096)
        slow.sendall(http("/v1/completions", {**LONG, "max_tokens": 5000, "logprobs": 20, "stream": True}))
        assert until(lambda: server.service.queue.samples == 1)
        largest = 0

        def over() -> bool:
            nonlocal largest
            largest = max([largest, *(job.weight for job in list(server.service.queue.jobs))])
            return server.idle()

        assert until(over, 60) and largest <= 500 + 21 * 16
        slow.close()


def test_a_deadline_returns_the_text_so_far():
    gate = Gate(model := generator())
    with served(model, max_seconds=1000) as server, ThreadPoolExecutor(1) as pool:

        def at_the_deadline(**fields: Any) -> Any:
            jobs = server.service.queue.jobs
            assert until(lambda: not jobs)
            answered = pool.submit(server.client().completions.create, model=NAME, **LONG, **fields)
            assert until(lambda: not gate.open.is_set() and any(job.handles for job in list(jobs)))
            server.advance(1000)
            return answered

        gate.closes_at = 50
        told = at_the_deadline().result(20)
        choice = told.choices[0]
        assert choice.finish_reason == "length" and 5 < len(choice.text) == told.usage.completion_tokens <= 50
        gate.open.set()
        assert until(server.idle)
        gate.closes_at = gate.tokens + 50
        ends = [c.choices[0] for c in at_the_deadline(stream=True, n=2).result(20) if c.choices[0].finish_reason]
        assert sorted((c.index, c.finish_reason) for c in ends) == [(0, "length"), (1, "length")]
        with pytest.raises(openai.InternalServerError, match="did not start") as refused:  # the gate is closed
            at_the_deadline().result(20)
        assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
        gate.open.set()
        assert until(server.idle)


def test_beyond_the_queue_the_answer_is_429():
    gate = Gate(model := generator())
    with served(model, max_concurrent=2, max_queued=3) as server, ThreadPoolExecutor(8) as pool:
        asked = {"model": NAME, "prompt": "abc", "max_tokens": 4}
        with pytest.raises(openai.BadRequestError, match="the limit is 5"):
            server.client().completions.create(**{**asked, "prompt": ["a"] * 6})
        gate.open.clear()
        held = [pool.submit(server.client().completions.create, **asked) for _ in range(5)]
        assert until(lambda: server.service.queue.samples == 5)
        for fields in ({}, {"stream": True}):
            with pytest.raises(openai.RateLimitError) as refused:
                server.client().completions.create(**asked, **fields)
            assert int(refused.value.response.headers["retry-after"]) >= 1
        patient = pool.submit(server.client(max_retries=5).completions.create, **asked)
        gate.open.set()
        assert all(future.result(20).usage.completion_tokens == 4 for future in [*held, patient])
        assert until(server.idle)
        # counted when the answer has been sent; a request whose body comes later is refused by the route
        value = partial(server.service.metrics.registry.get_sample_value, "llm_requests_total")
        where = [{"route": route, "status": "429"} for route in ("refused", "/v1/completions")]
        assert until(lambda: sum(value(labels) or 0 for labels in where) >= 2)


def test_an_engine_that_dies_is_replaced(monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.5)
    gate = Gate(model := generator(), pause=0.005)
    with served(model) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.client().completions.create, model=NAME, **LONG)
        stream = server.connect(http("/v1/completions", {**LONG, "stream": True}))
        assert until(lambda: gate.tokens > 5 and len(server.service.queue.jobs) == 2)
        gate.broken = 1
        with pytest.raises(openai.InternalServerError) as refused:
            whole.result(20)
        assert refused.value.status_code == 503 and "restarted" in refused.value.message
        status, _, told = answer(stream)  # an event if it had begun, else the status
        event = told.rpartition(b"data: {")[2] if status == 200 else told
        assert status in (200, 503) and b"restarted" in event
        assert health(server) == (503, "the engine failed and is being restarted")
        refusal = answer(server.connect(http("/v1/completions", {"prompt": "a"})))
        assert refusal[0] == 503 and int(refusal[1]["retry-after"]) >= 1
        assert until(lambda: health(server) == (200, "ok"))
        asked = {"model": NAME, "prompt": TEXT[:5], "temperature": 0, "max_tokens": 5}
        assert server.client().completions.create(**asked).choices[0].text == TEXT[5:10]
        figures = server.service.metrics.registry
        assert figures.get_sample_value("llm_engine_restarts_total") == 1
        assert figures.get_sample_value("llm_engine_up") == 1
        assert until(server.idle)
    assert "a kernel failed" in capfd.readouterr().err


@pytest.mark.parametrize("stream", [True, False])
def test_requests_fail_immediately_if_the_engine_thread_ends(monkeypatch, stream):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    gate = Gate(model := generator())
    gate.open.clear()
    with served(model, max_seconds=60) as server:
        asked = server.connect(http("/v1/completions", {**LONG, "stream": stream}), seconds=30)
        assert until(lambda: gate.tokens == 1)
        gate.broken, gate.error = 1, SystemExit()
        gate.open.set()
        status, _, told = answer(asked)
        assert status == 503 and b"restarted" in told
        assert until(lambda: health(server) == (200, "ok"))


def test_a_step_that_does_not_end_shows_in_the_health(monkeypatch):
    monkeypatch.setattr(service, "STUCK", 0.2)
    gate = Gate(model := generator())
    with served(model) as server:
        gate.open.clear()
        asked = server.connect(http("/v1/completions", {"prompt": TEXT[:5], "max_tokens": 3}))
        assert until(lambda: health(server)[0] == 503)
        assert "one step" in health(server)[1]
        gate.open.set()
        assert answer(asked)[0] == 200 and health(server) == (200, "ok")


def test_an_engine_that_fails_repeatedly_is_not_restarted(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.001)
    made: list[int] = []
    model = generator()

    class Stillborn(Engine):
        """An engine whose thread ends at once."""

        @property
        def alive(self) -> bool:
            return False

    def make() -> Engine:
        made.append(1)
        engine = Stillborn(model)
        engine.close()
        return engine

    with served(make_engine=make) as server:
        assert until(lambda: "not restarted" in health(server)[1])
        assert len(made) == supervisor.MAX_FAILURES and health(server)[0] == 503
        with pytest.raises(openai.InternalServerError, match="not restarted"):
            server.client().completions.create(model=NAME, prompt="a")
        time.sleep(0.2)
        assert len(made) == supervisor.MAX_FAILURES


def test_an_engine_that_cannot_be_built_is_tried_again(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.001)
    model, attempts = generator(), []

    def make() -> Engine:
        attempts.append(1)
        if len(attempts) in (2, 3):
            raise MemoryError("none left")
        return Engine(model)

    with served(make_engine=make) as server:
        server.service.supervisor.engine.close()
        assert until(lambda: len(attempts) == 4 and health(server) == (200, "ok"))


def test_a_request_that_fails_alone(monkeypatch):
    """An engine that continues: the response contains no detail of its failure."""

    def submit(self: Engine, request: Any, deliver: Any) -> Any:
        deliver(Update(error="secret", done=True))
        return threading.Event  # nothing to cancel: it is done

    monkeypatch.setattr(Engine, "submit", submit)
    with served() as server:
        reply = answer(server.connect(http("/v1/completions", {"prompt": "a"})))
        assert reply[0] == 500 and b"secret" not in reply[2] and server.idle()


@pytest.mark.parametrize(("count", "concurrent"), [(12, 5), pytest.param(24, 8, marks=pytest.mark.slow)])
def test_many_at_once_are_as_each_alone(count: int, concurrent: int):
    asked = [{"prompt": TEXT[i : i + 1 + i % 7], "max_tokens": 5 + i, "seed": i, "top_p": 0.9} for i in range(count)]
    with served(max_concurrent=concurrent, max_queued=64) as server, ThreadPoolExecutor(count) as pool:

        def stream(fields: dict[str, Any]) -> str:
            chunks = server.client().completions.create(model=NAME, **fields, stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks)

        together = list(pool.map(stream, asked))
        alone = [server.client().completions.create(model=NAME, **fields).choices[0].text for fields in asked]
        assert together == alone and until(server.idle)


def test_a_closed_engine_refuses_requests():
    engine = Engine(generator())
    engine.close()
    with pytest.raises(EngineError):
        engine.submit(Request([1]), lambda update: None)
