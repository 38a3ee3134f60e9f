"""The application: its routes and the files of the page."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from ..errors import ApiError
from . import protocol
from .answers import Answer
from .completions import Plan
from .errors import error_response, json_response
from .guard import Bodies, Guard
from .service import Service
from .watch import Watch

PAGE = Path(__file__).resolve().parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'"
SHORT, WORKERS = 2048, 2  # bytes of a body that is parsed in the event loop; threads for longer ones
T = TypeVar("T", protocol.CompletionRequest, protocol.ChatRequest, protocol.TokenizeRequest, protocol.DetokenizeRequest)
U = TypeVar("U")


def make_app(service: Service) -> FastAPI:
    """The application. Its lifespan runs and closes the engine."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = [asyncio.create_task(one.supervisor.watch()) for one in service.all]
        yield
        for one, task in zip(service.all, watching, strict=True):
            task.cancel()
            one.queue.end_all()
            await asyncio.to_thread(one.supervisor.engine.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    options = service.options
    app.add_middleware(Guard, metrics=service.metrics, routes=app.routes, options=options)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        messages = {404: "no such route", 405: f"this route does not support {request.method}"}
        response = error_response(ApiError(error.status_code, messages.get(error.status_code, str(error.detail))))
        response.headers.update(error.headers or {})
        return response

    bodies, workers, renderer = Bodies(options.max_body_bytes), CapacityLimiter(WORKERS), CapacityLimiter(1)

    async def understood(request: Request, kind: type[T], use: Callable[[Service, T], U]) -> tuple[Service, U]:
        """Parses a request's body and calls `use` on the model that it names and on it: in a thread if it is long,
        because encoding takes time, or a chat, because its template may."""
        raw = await bodies.read(request)
        asked = protocol.read(kind, raw)
        model = service.named(asked.model)
        if isinstance(asked, protocol.ChatRequest):
            return model, await to_thread.run_sync(use, model, asked, limiter=renderer)
        done = use(model, asked) if len(raw) < SHORT else await to_thread.run_sync(use, model, asked, limiter=workers)
        return model, done

    async def answer(request: Request, kind: type[T], use: Callable[[Service, T], Plan]) -> Response:
        began = time.monotonic()
        if not service.others:
            service.queue.check()  # before reading the body: refusing must be cheap
        model, plan = await understood(request, kind, use)
        return Answer(plan, model.queue, service.metrics, began)

    def get(path: str) -> Callable[[Any], Any]:
        return app.api_route(path, methods=["GET", "HEAD"])

    @get("/health")
    async def health() -> Response:
        status = service.health()
        return json_response({"status": status}, 200 if status == "ok" else 503)

    @get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [one.about() for one in service.all]})

    @get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(service.named(name).about())

    @get("/v1/info")
    async def info() -> Response:
        return json_response(service.info())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, protocol.CompletionRequest, Service.completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, protocol.ChatRequest, Service.chat)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return json_response((await understood(request, protocol.TokenizeRequest, Service.tokenize))[1])

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return json_response((await understood(request, protocol.DetokenizeRequest, Service.detokenize))[1])

    # the routes below read files, so they are not async: FastAPI calls them in threads

    @get("/v1/watch")
    def watch() -> Response:
        return json_response(_watched(service).about())

    @get("/v1/watch/metrics")
    def watch_metrics(request: Request) -> Response:
        return json_response(_watched(service).metrics(_place(request)))

    @get("/v1/watch/samples")
    def watch_samples(request: Request) -> Response:
        return json_response(_watched(service).samples(_place(request)))

    @get("/")
    def page() -> Response:
        return _static("index.html")

    get("/static/{name}")(_static)
    return app


def _static(name: str) -> Response:
    kind = KINDS.get(Path(name).suffix)
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
    if kind is not None and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) and (PAGE / name).is_file():
        return Response((PAGE / name).read_bytes(), headers=headers, media_type=kind)
    if name == "index.html":
        return PlainTextResponse("The playground's files are missing. The API is at /v1.\n", 404, headers)
    raise ApiError(404, "no such file")


def _watched(service: Service) -> Watch:
    if service.watch is None:
        raise ApiError(404, "there is no run to show: start the server with --watch=FOLDER")
    return service.watch


def _place(request: Request) -> int:
    text = request.query_params.get("after", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 17):
        raise ApiError(400, "'after' must be the value of 'next' in an earlier response", "after")
    return int(text)
