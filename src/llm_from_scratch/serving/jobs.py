"""A request's work in the engine: admitted, fed back to the event loop, and ended in time, whatever the client does."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UserError
from ..generation.engine import Handle, Request, Update
from .errors import ApiError, overloaded
from .supervisor import Supervisor

MAX_PENDING = 1 << 16  # tokens and alternatives of one request that wait for a client to read


class Post:
    """Updates from the engine's thread to the event loop: one wake-up of the loop, however many there are."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.signalled = loop, False
        self.letters: deque[tuple[Job, int, Update]] = deque()

    def put(self, job: Job, index: int, update: Update) -> None:
        """From any thread."""
        self.letters.append((job, index, update))
        if not self.signalled:
            self.signalled = True
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is there to read
                self.loop.call_soon_threadsafe(self._open)

    def _open(self) -> None:
        self.signalled = False  # first: what comes from here on signals anew
        while self.letters:
            job, index, update = self.letters.popleft()
            job.take(index, update)


class Rate:
    """Events a second, of the last few seconds."""

    span = 3.0

    def __init__(self) -> None:
        self.sum, self.at = 0.0, time.monotonic()

    def value(self) -> float:
        return self.sum * math.exp((self.at - time.monotonic()) / self.span) / self.span

    def count(self) -> None:
        self.sum, self.at = self.value() * self.span + 1, time.monotonic()


class Desk:
    """Admits jobs up to so many samples, and knows those that run."""

    def __init__(self, supervisor: Supervisor, limit: int, seconds: float):
        self.supervisor, self.limit, self.seconds = supervisor, limit, seconds
        self.samples = 0
        self.jobs: set[Job] = set()
        self.draining = False
        self.post: Post | None = None
        self.ended, self.refused = Rate(), Rate()

    def check(self, samples: int = 1) -> None:
        """Raises ApiError where so many samples are not taken now: 429, or 503 while draining."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=10)
        if not self.supervisor.alive:
            raise self.supervisor.unavailable()
        if self.samples + samples > self.limit:
            self.refused.count()
            # those who are told so now come back one after the other, as fast as the engine serves
            raise overloaded(max(1, min(60, round(self.refused.value() / max(0.5, self.ended.value())))))

    def full(self) -> bool:
        """Whether no request is taken now."""
        return self.draining or self.samples >= self.limit

    def submit(self, requests: Sequence[Request], began: float) -> Job:
        """Raises ApiError."""
        samples = sum(request.params.num_samples for request in requests)
        if samples > self.limit:
            raise ApiError(400, f"the request asks for {samples} samples; at most {self.limit} are taken at once", "n")
        self.check(samples)
        if self.post is None:
            self.post = Post(asyncio.get_running_loop())
        job = Job(self, samples, began)
        try:
            for index, request in enumerate(requests):
                job.handles.append(self.supervisor.submit(request, self._deliver(job, index)))
        except UserError as error:
            job.close()
            raise ApiError(400, str(error)) from None
        except BaseException:
            job.close()
            raise
        return job

    def _deliver(self, job: Job, index: int) -> Callable[[Update], None]:
        post = self.post
        assert post is not None
        return lambda update: post.put(job, index, update)

    def end_all(self) -> None:
        """Every job ends with what it has."""
        for job in list(self.jobs):
            job.end()


class Job:
    """The engine's requests that belong to one request of a client."""

    def __init__(self, desk: Desk, samples: int, began: float):
        self.desk, self.samples, self.began = desk, samples, began
        self.handles: list[Handle] = []
        self.pending: list[tuple[int, Update]] = []
        self.weight = 0
        self.gone = self.over = self.closed = False
        self.wake = asyncio.Event()
        self.done = 0
        self.engine = desk.supervisor.engine
        self.connection: Any = None  # the server's, which can be cut
        self.sending: float | None = None  # since when the client is to take what was sent
        desk.samples += samples
        desk.jobs.add(self)
        loop = asyncio.get_running_loop()
        rest = max(0.0, began + desk.seconds - time.monotonic())
        self.timer = loop.call_later(rest, self.end)

    def take(self, index: int, update: Update) -> None:
        if self.closed or self.over or self.gone:
            return
        self.pending.append((index, update))
        for delta in update.deltas:
            for token in delta.tokens:
                self.weight += 1 + len(token.top)
        if self.weight > MAX_PENDING:
            self.abort()  # a client that does not read
        self.wake.set()

    async def next(self) -> list[tuple[int, Update]]:
        """What has come since the last call, at least one update; empty where nothing follows: see gone and over."""
        while True:
            if self.pending:
                batch, self.pending, self.weight = self.pending, [], 0
                self.done += sum(update.done for _, update in batch)
                return batch
            if self.gone or self.over or self.done >= len(self.handles):
                return []
            self.wake.clear()
            await self.wake.wait()

    def end(self) -> None:
        """Nothing more is drawn; what there is counts."""
        self.over = True
        self._cancel()

    def leave(self) -> None:
        """The client has gone."""
        self.gone, self.pending = True, []
        self._cancel()

    def abort(self) -> None:
        """Ends the connection, too: a client that does not read would hold it open."""
        self.leave()
        if self.connection is not None:
            self.connection.abort()

    def _cancel(self) -> None:
        for handle in self.handles:
            handle.cancel()
        self.wake.set()

    def close(self) -> None:
        """Gives back what the job holds. Has to be called, however the job ends."""
        if self.closed:
            return
        self.closed = True
        self.timer.cancel()
        if self.done < len(self.handles):
            self._cancel()
        self.desk.samples -= self.samples
        self.desk.jobs.discard(self)
        self.desk.ended.count()
