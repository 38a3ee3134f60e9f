"""The supervisor of the engine: replaces a failed one, with growing pauses and a limit of failures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..errors import ApiError, EngineError, one_line
from ..generation.engine import Engine, Handle, Request, Stats, Update
from ..machine.terminal import note

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0  # seconds before a new engine is built
MAX_FAILURES = 6  # in a row, after which it is not restarted
SETTLED = 60.0  # seconds; a failure after a longer life starts a new count
LOOK_EVERY = 0.05
RESTARTING = "the engine failed and is being restarted"


class Supervisor:
    """make: builds an engine. on_restart is called when a new one runs."""

    def __init__(self, make: Callable[[], Engine], on_restart: Callable[[], None] = lambda: None):
        self.make, self.on_restart = make, on_restart
        self.engine = make()
        self.born = time.monotonic()
        self.failures = 0  # since the last request that was completed
        self.before = [0, 0, 0]  # prompt tokens, generated tokens and steps of the engines that died
        self.problem: str | None = None

    @property
    def alive(self) -> bool:
        return self.problem is None and self.engine.alive

    def submit(self, request: Request, deliver: Callable[[Update], None]) -> Handle:
        """Raises ApiError (503) if no engine runs, and UserError as the engine does."""
        try:
            if self.problem is None:
                return self.engine.submit(request, deliver)
        except EngineError:
            pass
        raise self.unavailable()

    def unavailable(self) -> ApiError:
        problem = self.problem or RESTARTING
        return ApiError(503, problem, code="engine_unavailable", retry_after=2 if problem == RESTARTING else 30)

    def stats(self) -> Stats:
        """The sums over all engines so far."""
        now = self.engine.stats()
        sums = [a + b for a, b in zip(self.before, (now.prompt_tokens, now.generated_tokens, now.steps), strict=True)]
        running, waiting = (now.running, now.waiting) if self.engine.alive else (0, 0)
        return Stats(running, waiting, now.slots, *sums)

    async def watch(self) -> None:
        """Replaces failed engines, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if not self.engine.alive:
                await self._replace()

    async def _replace(self) -> None:
        reason = self.engine.failure or "its thread ended"
        self.engine.close()  # its requests get an error
        sums = self.stats()
        self.before = [sums.prompt_tokens, sums.generated_tokens, sums.steps]
        if time.monotonic() - self.born > SETTLED:
            self.failures = 0
        while True:
            self.failures += 1
            note(f"llm-serve: the engine failed: {one_line(reason, 300)}")
            if self.failures >= MAX_FAILURES:
                self.problem = f"the engine failed {self.failures} times and is not restarted: restart the server"
                note(f"llm-serve: {self.problem}")
                await asyncio.Event().wait()
            self.problem = RESTARTING
            await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 3 ** (self.failures - 1)))
            try:
                self.engine = await asyncio.to_thread(self.make)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            self.born, self.problem = time.monotonic(), None
            self.on_restart()
            return
