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

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ApiError
from ..machine.terminal import note
from .errors import error_response, overloaded
from .metrics import Metrics

BODY_SECONDS = 20.0  # timeout of a body
BODIES = 64 << 20  # total bytes of the bodies being read
OPEN_PATHS = re.compile(r"/|/static/[^/]*")  # files of the page, which need no key
READING = ("GET", "HEAD", "OPTIONS")
SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """ASGI middleware. names: accepted host names, None for any. key: the API key that clients must send."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: Iterable[str],
        names: set[str] | None,
        origins: Iterable[str],
        key: str | None,
    ):
        self.app, self.metrics, self.routes, self.names = app, metrics, set(routes), names
        self.origins = set(origins)
        self.key = key.encode("ascii") if key is not None else None

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
            self.check(scope)
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

    def check(self, scope: Scope) -> None:
        """Raises ApiError if the request is not allowed."""
        path, method = scope["path"], scope["method"]
        if path == "/health":
            return
        host = self._one(scope, b"host")
        if self.names is not None and host_name(host) not in self.names:
            message = "the server does not accept this host name; start it with --allowed_hosts"
            raise ApiError(403, message, code="unknown_host")
        if method not in READING:
            self._check_origin(scope, host)
        if self.key is not None and not OPEN_PATHS.fullmatch(path):
            scheme, _, key = self._one(scope, b"authorization").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key):
                message = "the API key is missing or wrong: send Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")
        if method == "POST":
            kind = self._one(scope, b"content-type").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(415, "the body must be JSON: send Content-Type: application/json")

    def _check_origin(self, scope: Scope, host: bytes) -> None:
        origin = self._one(scope, b"origin")
        if origin:
            text = origin.decode("latin-1")
            netloc = self._netloc(text)
            # a name in --allowed_hosts; local names do not count, because other servers use them too
            name = host_name(netloc.encode("latin-1"))
            named = self.names is not None and name in self.names and name not in LOCAL_NAMES
            if netloc == host.decode("latin-1").lower() or text in self.origins or "*" in self.origins or named:
                return
        elif self._one(scope, b"sec-fetch-site") in (b"", b"same-origin", b"none"):
            return
        raise ApiError(403, "web pages of other origins are not allowed; start the server with --cors_origins")

    @staticmethod
    def _netloc(origin: str) -> str:
        try:
            parts = urlsplit(origin.lower())
        except ValueError:
            return ""
        standard = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
        return parts.netloc.removesuffix(standard) if standard else ""

    @staticmethod
    def _one(scope: Scope, name: bytes) -> bytes:
        """The value of a header, b"" if missing. Raises ApiError if it is sent twice."""
        values = [value for key, value in scope["headers"] if key == name]
        if len(values) > 1:
            raise ApiError(400, f"the header {name.decode()} is sent more than once")
        return values[0] if values else b""


def host_name(host: bytes) -> str:
    """The name in a Host header, without the port."""
    return re.sub(r":\d*$", "", host.decode("latin-1").lower()).rstrip(".")


class Bodies:
    """Reads bodies with at most `limit` bytes each and BODIES bytes in total."""

    def __init__(self, limit: int):
        self.limit, self.together, self.held = limit, max(BODIES, 4 * limit), 0

    async def read(self, request: Request) -> bytes:
        """Reads a body without trusting its headers. Raises ApiError."""
        length = request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > self.limit):
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
