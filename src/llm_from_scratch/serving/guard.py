"""Access checks before every route: host name, origin, API key, content type and size. A browser lets any web page send
requests to a server on the same machine. So a server without a key accepts only its own host names (against DNS
rebinding), refuses POST requests from other origins, and refuses content types that a page could send without a
preflight request."""

from __future__ import annotations

import asyncio
import hmac
import re
import traceback
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ApiError
from ..machine.terminal import note
from .errors import error_response, overloaded
from .metrics import Metrics
from .options import ServeOptions, is_loopback

BODY_SECONDS = 20.0  # timeout of a body
BODIES = 64 << 20  # total bytes of the bodies being read
OPEN_PATHS = re.compile(r"/|/static/[^/]*")  # files of the page, which need no key
READING = ("GET", "HEAD", "OPTIONS")
SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
STANDARD_PORTS = {"http": ":80", "https": ":443"}


class Guard:
    """ASGI middleware. routes: named in the metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Iterable[BaseRoute], options: ServeOptions):
        self.app, self.metrics, self.origins = app, metrics, set(options.cors_origins)
        self.routes = {getattr(route, "path", "") for route in routes}
        self.names = _accepted_names(options)
        self.key = options.api_key.encode("ascii") if options.api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *SAFE_HEADERS]}
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, watched)
        except ApiError as error:
            await error_response(error)(scope, receive, watched)
        except ClientDisconnect:
            pass
        except Exception as error:  # our own bug, reported without the request's content
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
            note(f"llm-serve: internal error: {type(error).__name__} at {place}")
            if status:
                raise ConnectionAbortedError from None
            await error_response(ApiError(500, "internal error; see the server's log"))(scope, receive, watched)
        finally:
            path = scope["path"]
            route = path if path in self.routes else "static" if path.startswith("/static/") else "other"
            self.metrics.requests.labels(route, str(status or 499)).inc()  # 499: the client disconnected first

    def _check(self, scope: Scope) -> None:
        """Raises ApiError if the request is not allowed."""
        path, method = scope["path"], scope["method"]
        if path == "/health":
            return
        host = _header(scope, "host").lower()
        if self.names is not None and _host_name(host) not in self.names:
            message = "the server does not accept this host name; start it with --allowed_hosts"
            raise ApiError(403, message, code="unknown_host")
        if method not in READING and not self._is_own_page(scope, host):
            raise ApiError(403, "web pages of other origins are not allowed; start the server with --cors_origins")
        if self.key is not None and not OPEN_PATHS.fullmatch(path):
            scheme, _, key = _header(scope, "authorization").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.key):
                message = "the API key is missing or wrong: send Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")
        if method == "POST":
            kind = _header(scope, "content-type").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "the body must be JSON: send Content-Type: application/json")

    def _is_own_page(self, scope: Scope, host: str) -> bool:
        """Whether the request comes from a page of this server or of an allowed origin, or not from a page."""
        origin = _header(scope, "origin")
        if not origin:
            return _header(scope, "sec-fetch-site") in ("", "same-origin", "none")
        try:
            parts = urlsplit(origin.lower())
        except ValueError:
            parts = urlsplit("")
        port = STANDARD_PORTS.get(parts.scheme)
        netloc = parts.netloc.removesuffix(port) if port else ""
        # a name in --allowed_hosts; local names do not count, because other servers use them too
        is_named = self.names is not None and _host_name(netloc) in self.names - LOCAL_NAMES
        return netloc == host or origin in self.origins or "*" in self.origins or is_named


def _accepted_names(options: ServeOptions) -> set[str] | None:
    """The host names that the server accepts; None for any."""
    if "*" in options.allowed_hosts or (not options.allowed_hosts and not is_loopback(options.host)):
        return None  # such a server has a key, which other web pages do not know
    own = f"[{options.host}]" if ":" in options.host else options.host
    return {*LOCAL_NAMES, own.lower(), *(name.lower() for name in options.allowed_hosts)}


def _header(scope: Scope, name: str) -> str:
    """The value of a header, "" if missing. Raises ApiError if it is sent twice."""
    values = Headers(scope=scope).getlist(name)
    if len(values) > 1:
        raise ApiError(400, f"the header {name} is sent more than once")
    return values[0] if values else ""


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    return re.sub(r":\d*$", "", host).rstrip(".")


class Bodies:
    """Reads bodies with at most `limit` bytes each and BODIES bytes in total."""

    def __init__(self, limit: int):
        self.limit, self.together, self.held = limit, max(BODIES, 4 * limit), 0

    async def read(self, request: Request) -> bytes:
        """Reads a body without trusting its headers. Raises ApiError."""
        length = request.headers.get("content-length", "0")
        if len(length) > 15 or int(length) > self.limit:  # h11 has checked that these are digits
            raise self._too_large()
        parts: list[bytes] = []
        try:
            await asyncio.wait_for(self._collect(request, parts), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
        finally:
            self.held -= sum(map(len, parts))
        return b"".join(parts)

    async def _collect(self, request: Request, parts: list[bytes]) -> None:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            self.held += len(part)
            if size > self.limit:
                raise self._too_large()
            if self.held > self.together:
                raise overloaded(2)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than the limit of {self.limit} bytes", code="body_too_large")
