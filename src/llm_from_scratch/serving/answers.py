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
        job = self.queue.submit(self.plan, self.began)
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

    async def _whole(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        if await job.grown():
            self.metrics.first_token.observe(time.monotonic() - self.began)
            while await job.grown():
                pass
        if not job.gone:
            large = self.plan.logprobs and sum(len(choice.tokens) for choice in self.plan.choices) > LARGE
            body = await asyncio.to_thread(self.plan.whole) if large else self.plan.whole()
            await json_response(body)(scope, receive, send)

    async def _stream(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        more = await job.grown()  # before the status is sent, so that errors have their own status
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
                text, more = "", await job.grown()
        except ApiError as error:
            text = f"data: {error_body(error)}\n\ndata: [DONE]\n\n"
        else:
            text += self.plan.closing()
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
