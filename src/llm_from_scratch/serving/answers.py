"""Answers of the generating routes: a whole one or a stream, ended with its client, its deadline or its engine."""

from __future__ import annotations

import asyncio
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .completions import Gain, Plan
from .errors import ApiError, json_response
from .jobs import Desk, Job
from .metrics import Metrics

LARGE = 1024  # tokens with log-probabilities, of which the JSON is made in a thread
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


class Answer(Response):
    """Submits the plan when it is sent, so that what it holds is given back however that ends."""

    def __init__(self, plan: Plan, desk: Desk, metrics: Metrics, began: float):
        super().__init__()
        self.plan, self.desk, self.metrics, self.began = plan, desk, metrics, began

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError where nothing was sent yet."""
        job = self.desk.submit(self.plan.requests, self.began)
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

    async def _gains(self, job: Job) -> list[Gain]:
        """The next gains; empty where nothing follows. Raises ApiError where the engine failed."""
        while not job.gone:
            batch = await job.next()
            if any(update.error is not None for _, update in batch):
                raise self._failed(job)
            if not batch:
                gains = self.plan.cut() if job.over else []
                if gains and not any(self.plan.begun):
                    raise ApiError(503, "the request was not begun within its time: the server is busy", retry_after=5)
                return gains
            if gains := self.plan.gains(batch):
                return gains
        return []

    def _failed(self, job: Job) -> ApiError:
        if not job.engine.alive:
            return self.desk.supervisor.unavailable()
        return ApiError(500, "the engine could not go on with this request", code="generation_failed")

    async def _whole(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        choices = [Gain(index) for index in range(self.plan.count)]
        first = True
        while gains := await self._gains(job):
            if first:
                self.metrics.first_token.observe(time.monotonic() - self.began)
                first = False
            for gain in gains:
                choice = choices[gain.index]
                choice.text += gain.text
                choice.tokens += gain.tokens
                choice.before += gain.before
                choice.reason = gain.reason or choice.reason
        if not job.gone:
            if not job.over:
                self.desk.supervisor.completed()
            large = self.plan.logprobs and sum(len(choice.tokens) for choice in choices) > LARGE
            body = await asyncio.to_thread(self.plan.whole, choices) if large else self.plan.whole(choices)
            await json_response(body)(scope, receive, send)

    async def _stream(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        gains = await self._gains(job)  # before the status is sent: what fails until here has one of its own
        if job.gone:
            return
        self.metrics.first_token.observe(time.monotonic() - self.began)
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        text = self.plan.opening()
        try:
            while gains and not job.gone:
                text += "".join(map(self.plan.chunk, gains))
                if text:
                    await self._send(job, send, text)
                text, gains = "", await self._gains(job)
        except ApiError as error:
            text = f"data: {error.body()}\n\ndata: [DONE]\n\n"
        else:
            text += self.plan.closing()
            if not job.over:
                self.desk.supervisor.completed()
        if not job.gone:
            await self._send(job, send, text, more=False)

    async def _send(self, job: Job, send: Send, text: str, more: bool = True) -> None:
        """Waits for a client that reads slowly; job.sending tells since when."""
        job.sending = time.monotonic()
        await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
        job.sending = None


async def _leave_with_client(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.leave()
