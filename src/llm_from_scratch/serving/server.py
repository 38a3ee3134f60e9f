"""uvicorn with time limits for headers, a limit of connections, errors in OpenAI's format and a graceful shutdown. The
shutdown waits for running requests and exits with 0. A second signal stops immediately."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http
import os
import re
import socket
import threading
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ApiError, UserError
from ..machine.terminal import note
from .errors import error_body
from .jobs import JobQueue
from .options import ServeOptions, addresses
from .service import Service

HEADER_SECONDS = 10.0  # for a request's headers, and for the rest of a body that was refused
IDLE_SECONDS = 15  # between two requests of a connection
MAX_HEADERS = 1 << 15  # bytes
GENERATING = (b"POST /v1/completions ", b"POST /v1/chat/completions ")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d{1,9})\r", re.IGNORECASE)
MAX_AHEAD = 1 << 16  # bytes of further requests while one is answered
MAX_CONNECTIONS = 2000
CLOSING = 2.0  # seconds of drain_seconds, or a fourth: to send the last events, then to close the connections and end


class Connection(H11Protocol):
    """One connection. The application finds it in scope["state"] and can abort it if the client does not read. service
    and limit are set by make_server."""

    service: Service
    limit = MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "connection": self}
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            self._close_with(ApiError(503, "too many connections", code="overloaded", retry_after=2))
        else:
            self._time()

    def data_received(self, data: bytes) -> None:
        if not self._busy() and self._is_refused(data):
            return
        super().data_received(data)
        if self.flow.read_paused and self._busy() and not self.cycle.more_body:
            # bytes of the next request: uvicorn would stop reading and not notice a disconnect
            if len(self.conn.trailing_data[0]) > MAX_AHEAD:
                self.abort()
            else:
                self.flow.resume_reading()
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._time()

    def abort(self) -> None:
        self.transport.abort()

    def _is_refused(self, data: bytes) -> bool:
        """Refuses a complete request without parsing it if the queue is full: refusing must be cheap under overload."""
        # this response has no CORS headers, so it is not used for pages of other origins
        if not data.startswith(GENERATING) or self.service.options.cors_origins or self.conn.trailing_data[0]:
            return False
        if self.service.others:  # the body names the model, and so the queue
            return False
        length, begin = LENGTH.search(data), data.find(b"\r\n\r\n") + 4
        if length is None or not length.end() < begin or int(length[1]) != len(data) - begin:
            return False
        try:
            self.service.queue.check()
            return False
        except ApiError as error:
            self.service.metrics.requests.labels("refused", str(error.status)).inc()
            self.transport.write(_raw_response(error))
            return True

    def _time(self) -> None:
        """Starts the timeout for incomplete headers and for the rest of a refused body."""
        if self._busy():
            self._stop_timer()
        elif self.timer is None and not self.transport.is_closing():
            self.timer = self.loop.call_later(HEADER_SECONDS, self.abort)

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def send_400_response(self, msg: str) -> None:
        """The request is not HTTP, or its headers are larger than MAX_HEADERS."""
        self._close_with(ApiError(400, "this is not a valid HTTP/1.1 request"))

    def _close_with(self, error: ApiError) -> None:
        self.transport.write(_raw_response(error, "Connection: close\r\n"))
        self.transport.close()


def _raw_response(error: ApiError, headers: str = "") -> bytes:
    body = error_body(error)
    if error.retry_after is not None:
        headers += f"Retry-After: {error.retry_after}\r\n"
    return (
        f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n{body}"
    ).encode("ascii")


class Server(uvicorn.Server):
    """On the first SIGTERM or Ctrl-C, refuses new requests and gives running ones drain_seconds, less the time to end;
    then they end with the text so far. On the second, the process exits."""

    def __init__(self, config: uvicorn.Config, queues: list[JobQueue], drain_seconds: float):
        super().__init__(config)
        self.queues, self.drain_seconds = queues, drain_seconds - 2 * _closing(drain_seconds)
        self.deadline = max(1.0, drain_seconds - _closing(drain_seconds) / 4)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would raise the signal again at the end. This server exits with 0."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        # a busy machine or a long step of the engine may delay the rest: there is nothing to lose at the deadline
        deadline = threading.Timer(self.deadline, os._exit, [0])
        deadline.daemon = True
        deadline.start()
        asyncio.get_running_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        jobs = sum(len(queue.jobs) for queue in self.queues)
        for queue in self.queues:
            queue.draining = True
            asyncio.get_running_loop().call_later(self.drain_seconds, queue.end_all)
        if jobs:
            note(
                f"llm-serve: stopping; {jobs} requests have {self.drain_seconds:g} s to finish "
                "(Ctrl-C stops immediately)"
            )


def listen(options: ServeOptions) -> socket.socket:
    """A socket bound to the address. Raises UserError if the address is in use."""
    family, address = addresses(options.host, options.port)[0]
    # asyncio sets TCP_NODELAY only if the protocol is given
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {options.port} on {options.host} is in use by another program: stop it or choose another --port "
                "(0: any free port)"
            ) from None
        raise UserError(f"cannot listen on {options.host} port {options.port}: {error.strerror or error}") from None
    return bound


def url(options: ServeOptions, bound: socket.socket) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"http://{host}:{bound.getsockname()[1]}"


def make_server(app: FastAPI, service: Service) -> Server:
    options = service.options
    config = uvicorn.Config(
        app,
        http=type("ServedConnection", (Connection,), {"service": service, "limit": _connections()}),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="critical",  # the application reports errors, without the content of requests
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=options.drain_seconds - _closing(options.drain_seconds),  # type: ignore[arg-type]
        h11_max_incomplete_event_size=MAX_HEADERS,
        backlog=1024,
    )
    return Server(config, [one.queue for one in service.all], options.drain_seconds)


def _closing(drain_seconds: float) -> float:
    return min(CLOSING, drain_seconds / 4)


def _connections() -> int:
    """The limit of connections, below the limit of open files."""
    try:
        import resource
    except ImportError:  # Windows
        return 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited, wanted = resource.RLIM_INFINITY, MAX_CONNECTIONS + 200
    if soft != unlimited and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == unlimited else min(wanted, hard), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if soft == unlimited else max(16, min(MAX_CONNECTIONS, soft - 200))
