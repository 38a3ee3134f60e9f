"""The queue of client requests: admission, updates from the engine to the event loop, timeouts and cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from functools import partial
from typing import Any

from ..errors import ApiError, UserError
from ..generation.engine import Handle, Update
from .completions import Plan
from .errors import overloaded
from .supervisor import Supervisor

MAX_PENDING = 1 << 16  # tokens and alternatives of one request that wait for a client to read


class Rate:
    """Events per second over the last few seconds."""

    span = 3.0

    def __init__(self) -> None:
        self.sum, self.at = 0.0, time.monotonic()

    def value(self) -> float:
        return self.sum * math.exp((self.at - time.monotonic()) / self.span) / self.span

    def count(self) -> None:
        self.sum, self.at = self.value() * self.span + 1, time.monotonic()


class JobQueue:
    """The admitted jobs, up to a limit of samples."""

    def __init__(self, supervisor: Supervisor, limit: int, seconds: float):
        self.supervisor, self.limit, self.seconds = supervisor, limit, seconds
        self.samples = 0
        self.jobs: set[Job] = set()
        self.draining = self.signalled = False
        self.updates: deque[tuple[Job, int, Update]] = deque()  # from the engine's thread
        self.ended, self.refused = Rate(), Rate()

    def check(self, samples: int = 1) -> None:
        """Raises ApiError if there is no room for this many samples (429) or the server shuts down (503)."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=10)
        if not self.supervisor.alive:
            raise self.supervisor.unavailable()
        if self.samples + samples > self.limit:
            self.refused.count()
            # spread the retries, at the rate at which the engine finishes jobs
            raise overloaded(max(1, min(60, round(self.refused.value() / max(0.5, self.ended.value())))))

    def submit(self, plan: Plan, began: float) -> Job:
        """Raises ApiError."""
        samples = len(plan.choices)
        if samples > self.limit:
            raise ApiError(400, f"the request needs {samples} samples; the limit is {self.limit}", "n")
        self.check(samples)
        job = Job(self, plan, began)
        try:
            for index, request in enumerate(plan.requests):
                job.handles.append(self.supervisor.submit(request, partial(self._put, job, index)))
        except BaseException as error:
            job.close()
            if isinstance(error, UserError):
                raise ApiError(400, str(error)) from None
            raise
        return job

    def _put(self, job: Job, index: int, update: Update) -> None:
        """Passes an update from any thread to the event loop. Many updates need only one wake-up."""
        self.updates.append((job, index, update))
        if not self.signalled:
            self.signalled = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                job.loop.call_soon_threadsafe(self._take_all)

    def _take_all(self) -> None:
        self.signalled = False  # first, so that later updates signal again
        while self.updates:
            job, index, update = self.updates.popleft()
            job.take(index, update)

    def end_all(self) -> None:
        """Ends every job with the text so far."""
        for job in list(self.jobs):
            job.end()


class Job:
    """The engine requests of one client request."""

    def __init__(self, queue: JobQueue, plan: Plan, began: float):
        self.queue, self.plan, self.samples = queue, plan, len(plan.choices)
        self.handles: list[Handle] = []
        self.done = self.weight = 0  # finished engine requests; tokens and alternatives since the last call of grown()
        self.has_grown = self.failed = self.gone = self.over = self.closed = False
        self.wake = asyncio.Event()
        self.engine = queue.supervisor.engine
        self.connection: Any = None  # can be aborted
        queue.samples += self.samples
        queue.jobs.add(self)
        self.loop = asyncio.get_running_loop()
        self.timer = self.loop.call_later(max(0.0, began + queue.seconds - time.monotonic()), self.end)

    def take(self, index: int, update: Update) -> None:
        if self.closed or self.over or self.gone:
            return
        self.done += update.done
        self.failed = self.failed or update.error is not None
        if self.done and not self.failed:
            self.queue.supervisor.failures = 0
        self.has_grown = self.plan.add(index, update) or self.has_grown
        self.weight += sum(1 + len(token.top) for delta in update.deltas for token in delta.tokens)
        if self.weight > MAX_PENDING:
            self.abort()  # the client does not read
        self.wake.set()

    async def grown(self) -> bool:
        """Waits until the plan's choices have grown. False at the end. Raises ApiError if the engine failed."""
        while not self.gone:
            if self.failed and not self.engine.alive:
                raise self.queue.supervisor.unavailable()
            if self.failed:
                raise ApiError(500, "the engine failed on this request", code="generation_failed")
            if self.has_grown:
                self.has_grown, self.weight = False, 0
                return True
            if self.over and not self.plan.begun:
                raise ApiError(503, "the request did not start in time: the server is busy", retry_after=5)
            if self.over or self.done >= len(self.handles):
                return self.over and self.plan.cut()
            self.wake.clear()
            await self.wake.wait()
        return False

    def end(self) -> None:
        """Stops generating and keeps the text so far."""
        self.over = True
        self._cancel()

    def leave(self) -> None:
        """Stops, because the client has disconnected."""
        self.gone = True
        self._cancel()

    def abort(self) -> None:
        """Stops and closes the connection, which a client that does not read would keep open."""
        self.leave()
        if self.connection is not None:
            self.connection.abort()

    def _cancel(self) -> None:
        for handle in self.handles:
            handle.cancel()
        self.wake.set()

    def close(self) -> None:
        """Frees the job's resources. Must always be called."""
        self.closed = True
        self.timer.cancel()
        if self.done < len(self.handles):
            self._cancel()
        self.queue.samples -= self.samples
        self.queue.jobs.discard(self)
        self.queue.ended.count()
