"""Responses of the generating routes: one body or a stream. They end with the client, the deadline or the engine."""

from __future__ import annotations

import asyncio
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import ApiError
from .completions import Plan
from .errors import error_body, json_response
from .jobs import Job, JobQueue
from .metrics import Metrics

STALLED = 30.0  # seconds after which a client that does not read is disconnected
LARGE = 1024  # tokens with log-probabilities, from which the JSON is built in a thread
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


class Answer(Response):
    """Submits the request when it is sent, and frees its resources in every case."""

    def __init__(self, plan: Plan, queue: JobQueue, metrics: Metrics, began: float):
        super().__init__()
        self.plan, self.queue, self.metrics, self.began = plan, queue, metrics, began

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError if nothing was sent yet."""
        job = self.queue.submit(self.plan.requests, self.began)
        job.connection = scope.get("state", {}).get("connection")
        watcher = asyncio.create_task(_leave_with_client(receive, job))
        try:
            await (self._stream if self.plan.stream else self._whole)(job, scope, receive, send)
            if not job.gone:
                self.metrics.duration.observe(time.monotonic() - self.began)
        finally:
            if job.gone:
                self.metrics.aborted.inc()
            job.close()
            watcher.cancel()

    async def _progress(self, job: Job) -> bool:
        """Waits until the choices have grown. False at the end. Raises ApiError if the engine failed."""
        while not job.gone:
            batch = await job.next()
            if any(update.error is not None for _, update in batch):
                if not job.engine.alive:
                    raise self.queue.supervisor.unavailable()
                raise ApiError(500, "the engine failed on this request", code="generation_failed")
            if job.over and not batch and not self.plan.begun:
                raise ApiError(503, "the request did not start in time: the server is busy", retry_after=5)
            if not batch:
                return job.over and self.plan.cut()
            if self.plan.add(batch):
                return True
        return False

    async def _whole(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        if await self._progress(job):
            self.metrics.first_token.observe(time.monotonic() - self.began)
            while await self._progress(job):
                pass
        if not job.gone:
            if not job.over:
                self.queue.supervisor.completed()
            large = self.plan.logprobs and sum(len(choice.tokens) for choice in self.plan.choices) > LARGE
            body = await asyncio.to_thread(self.plan.whole) if large else self.plan.whole()
            await json_response(body)(scope, receive, send)

    async def _stream(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        more = await self._progress(job)  # before the status is sent, so that errors have their own status
        if job.gone:
            return
        self.metrics.first_token.observe(time.monotonic() - self.began)
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        text = self.plan.opening()
        try:
            while more and not job.gone:
                text += self.plan.chunks()
                if text:
                    await self._send(job, send, text)
                text, more = "", await self._progress(job)
        except ApiError as error:
            text = f"data: {error_body(error)}\n\ndata: [DONE]\n\n"
        else:
            text += self.plan.closing()
            if not job.over:
                self.queue.supervisor.completed()
        if not job.gone:
            await self._send(job, send, text, more=False)

    async def _send(self, job: Job, send: Send, text: str, more: bool = True) -> None:
        """Sends; waits for slow clients, but disconnects one that does not read."""
        stalled = asyncio.get_running_loop().call_later(STALLED, job.abort)
        try:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
        finally:
            stalled.cancel()


async def _leave_with_client(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.leave()
