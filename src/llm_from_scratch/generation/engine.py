"""Continuous batching: requests join and leave while others run.

An Engine owns a model and a thread. submit() accepts a request from any thread. New text and tokens of the request are
delivered from the engine's thread, once per step.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..config import GenerationConfig
from ..errors import EngineError, UserError, one_line
from .batch import Batch, Overflow, Prefill
from .generator import NOT_FINITE, Generator, evaluating
from .row_sampler import Sampler
from .sampling import log_probabilities
from .text_stream import TextStream

CHUNK = 512  # tokens of a prompt that are read while the others wait
FinishReason = Literal["length", "stop"]
Alternative = tuple[int, bytes, float]  # id, the bytes it would add to the text, log-probability


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    params: sampling settings. num_samples samples are drawn; sample k uses the seed seed + k. start is ignored.
    stop_tokens: ids that end a sample; they are not part of its text. logit_bias: added to the logits of these ids.
    logprobs: None, or the number of alternatives to return for each token in addition to its own log-probability (0 or
    more). prompt_logprobs: return them for the tokens of the prompt too.
    """

    prompt: Sequence[int]
    params: GenerationConfig = field(default_factory=GenerationConfig)
    seed: int = 1337
    stop_tokens: frozenset[int] = frozenset()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Token:
    """A drawn token. logprob and top (id, bytes, logprob; most likely first) are the model's own, before temperature,
    penalties and filters, as natural logarithms; None if not requested."""

    id: int
    bytes: bytes
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Delta:
    """The progress of one sample: final text (no partial characters, no possible stop sequence), and the drawn
    tokens. The text may be empty although there are tokens, and the last delta may have only text."""

    sample: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Update:
    """The progress of a request in one step of the engine.

    prompt: in the first update only, if prompt_logprobs is set: the tokens of the prompt (the first one has no
    log-probability). error: the request has failed; this is the last update. done: this is the last update.
    """

    deltas: tuple[Delta, ...] = ()
    prompt: tuple[Token, ...] = ()
    error: str | None = None
    done: bool = False


class Handle:
    """A submitted request."""

    def __init__(self, request: Request, deliver: Callable[[Update], None]):
        self.request, self.deliver = request, deliver
        self.cancelled = self.done = False

    def cancel(self) -> None:
        """Ends the request within one step of the engine. At most one more update is delivered. Callable from any
        thread."""
        self.cancelled = True

    def give(self, update: Update) -> None:
        """Delivers an update, unless the request is cancelled or done. If deliver() raises, it cancels the request."""
        if self.cancelled or self.done:
            return
        self.done = update.done
        try:
            self.deliver(update)
        except Exception as error:
            self.cancelled = True
            print(f"request dropped: its receiver failed ({type(error).__name__}: {error})", file=sys.stderr)


@dataclass(frozen=True)
class Stats:
    """running, waiting: number of requests. prompt_tokens, generated_tokens, steps: since the engine started."""

    running: int
    waiting: int
    slots: int
    prompt_tokens: int
    generated_tokens: int
    steps: int


@dataclass
class _Reading:
    """Prompts that are being read.

    scored: log-probabilities of a prompt, if requested.
    """

    prefill: Prefill
    handles: list[Handle]
    scored: list[Token]


@dataclass
class _Sample:
    """A row of the batch."""

    handle: Handle
    index: int
    text: TextStream
    drawn: int = 0
    ended: bool = False


class Engine:
    """Decodes many requests together, up to `slots` samples at a time. The others wait in order of arrival.

    A long prompt is read in parts, and other requests continue in between. overflow: see batch.py. If a step fails,
    every request gets the error (Update.error), and alive becomes False.
    """

    def __init__(self, generator: Generator, slots: int = 64, overflow: Overflow = "recompute"):
        self.generator, self.slots, self.overflow = generator, slots, overflow
        self.failure: str | None = None
        self._waiting: deque[Handle] = deque()
        self._open: list[Handle] = []  # submitted, neither done nor cancelled
        self._reading: _Reading | None = None
        self._samples: list[_Sample] = []  # in the order of the batch's rows
        self._batch: Batch | None = None
        self._sampler: Sampler | None = None
        self._wake = threading.Condition()
        self._closed = False
        self._begin: float | None = None  # of the step that runs
        self._prompt_tokens = self._generated = self._steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def submit(self, request: Request, deliver: Callable[[Update], None]) -> Handle:
        """Queues a request. deliver(update) is called on the engine's thread and must neither block nor raise.

        Raises UserError for an invalid request (an empty prompt, an unknown id, a setting out of range, more samples
        than slots), and EngineError if the engine is not running.
        """
        prompt = self.generator.encode(request.prompt)
        params = dataclasses.replace(request.params, logit_bias={**request.params.logit_bias, **request.logit_bias})
        self.generator.check(params)
        if request.logprobs is not None and request.logprobs < 0:
            raise UserError(f"logprobs={request.logprobs} is out of range: expected None, or 0 or more alternatives")
        if request.params.num_samples > self.slots:
            raise UserError(f"num_samples={request.params.num_samples} is more than the engine's {self.slots} slots")
        handle = Handle(dataclasses.replace(request, prompt=prompt, params=params), deliver)
        with self._wake:
            if not self.alive:
                raise EngineError(self.failure or "the engine was closed")
            self._waiting.append(handle)
            self._open.append(handle)
            self._wake.notify()
        return handle

    def stats(self) -> Stats:
        with self._wake:
            alive = [handle for handle in self._open if not handle.cancelled and not handle.done]
            waiting = sum(not handle.cancelled for handle in self._waiting)
        running = len(alive) - waiting
        return Stats(running, waiting, self.slots, self._prompt_tokens, self._generated, self._steps)

    def step_seconds(self) -> float:
        """For how long the current step has run; 0 between steps."""
        begin = self._begin
        return 0.0 if begin is None else time.monotonic() - begin

    def close(self) -> None:
        """Ends the thread. Unfinished requests get an error. To finish them, wait for them first."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._fail_open()

    def _run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # threads do not inherit it everywhere
        try:
            with evaluating(self.generator.model), torch.inference_mode():
                while True:
                    with self._wake:
                        self._open = [h for h in self._open if not h.cancelled and not h.done]
                        self._wake.wait_for(lambda: self._waiting or self._reading or self._samples or self._closed)
                        if self._closed:
                            break
                    self._begin = time.monotonic()
                    self._read()
                    self._step()
                    self._begin = None
        except BaseException as error:  # a SystemExit too ends the thread, and with it every request
            self.failure = f"{type(error).__name__}: {one_line(error, None)}"
        self._fail_open()

    def _fail_open(self) -> None:
        """Ends every request that is still open with an error."""
        with self._wake:
            self._closed = True
            left, self._open = self._open, []
            self._waiting.clear()
        self._samples, self._reading, self._batch, self._sampler = [], None, None, None  # and their memory
        for handle in left:
            handle.give(Update(error=self.failure or "the engine was closed", done=True))

    def _read(self) -> None:
        """Reads the next part of the prompts. Completed prompts join the batch."""
        if self._reading is None:
            self._reading = self._next()
        if self._reading is None:
            return
        reading = self._reading
        try:
            if all(handle.cancelled for handle in reading.handles):
                self._reading = None
            elif reading.prefill.step(CHUNK):
                self._reading = None
                self._join(reading)
        except UserError as error:  # the request is impossible; the engine has not failed
            self._reading = None
            for handle in reading.handles:
                handle.give(Update(error=str(error), done=True))

    def _next(self) -> _Reading | None:
        """The prompts to read together: as many waiting ones as there are free slots, with at most CHUNK tokens
        including padding, or a single longer one."""
        model, longest = self.generator.model, 0
        handles: list[Handle] = []
        prompts: list[Sequence[int]] = []
        free, block = self.slots - len(self._samples), model.config.block_size
        with self._wake:
            while self._waiting:
                request = self._waiting[0].request
                if self._waiting[0].cancelled:
                    self._waiting.popleft()
                    continue
                n, prompt = request.params.num_samples, request.prompt[-block:]
                longest = max(longest, len(prompt))
                if n > free or (handles and (longest * (len(handles) + 1) > CHUNK or request.prompt_logprobs)):
                    break
                handles.append(self._waiting.popleft())
                prompts.append(prompt)
                free -= n
                if request.prompt_logprobs:
                    break
        if not handles:
            return None
        self._prompt_tokens += sum(len(handle.request.prompt) for handle in handles)
        scored: list[Token] = []
        observe = self._observer(handles[0].request, scored) if handles[0].request.prompt_logprobs else None
        return _Reading(Prefill(self.generator.decoder, prompts, observe=observe), handles, scored)

    def _observer(self, request: Request, scored: list[Token]) -> Callable[[int, Tensor], None]:
        """Collects the log-probabilities of a prompt while it is read: of all tokens in its context but the first."""
        ids, block = list(request.prompt), self.generator.model.config.block_size
        first = max(0, len(ids) - block)  # earlier tokens are not read
        before = [ids[0], *ids]
        scored.append(Token(ids[0], self.generator.tokenizer.decode_bytes(ids[:1])))
        scored += [Token(ids[i], self.generator.bytes_of(before[i], ids[i])) for i in range(1, first + 1)]

        def observe(begin: int, logits: Tensor) -> None:
            at = range(first + begin + 1, min(first + begin + 1 + len(logits), len(ids)))
            if at:
                real = self.generator.choosable(logits[: len(at)], check=True)
                tokens = [ids[i] for i in at]
                scored.extend(self._tokens(real, tokens, [ids[i - 1] for i in at], [request.logprobs or 0] * len(at)))

        return observe

    def _join(self, reading: _Reading) -> None:
        """Creates rows for the prompts that were read, and draws their first tokens."""
        generator, prefill = self.generator, reading.prefill
        rows = [(handle, k) for handle in reading.handles for k in range(handle.request.params.num_samples)]
        place = [prefill.place[reading.handles.index(handle)] for handle, _ in rows]
        prompts = [handle.request.prompt for handle, _ in rows]
        prefill.place = place
        first = len(self._samples)
        if self._batch is None:
            self._batch = Batch(generator.decoder, [], 0, overflow=self.overflow)
        longest = max(handle.request.params.max_new_tokens for handle in reading.handles)
        logits = self._batch.join(prompts, longest, prefill)
        assert logits is not None
        params = [handle.request.params for handle, _ in rows]
        seeds = [(handle.request.seed + k) % 2**63 for handle, k in rows]
        device = generator.model.lm_head.weight.device
        sampler = Sampler(params, prompts, seeds, generator.tokenizer.vocab_size, device)
        self._samples += [
            _Sample(handle, k, TextStream(generator.bytes_of, handle.request.prompt[-1], handle.request.params.stop))
            for handle, k in rows
        ]
        self._draw(logits, sampler, first, tuple(reading.scored))
        self._sampler = sampler if self._sampler is None else self._sampler.join(sampler)
        self._leave()

    def _step(self) -> None:
        """One token for every row."""
        self._leave()
        if not self._samples:
            return
        assert self._batch is not None and self._sampler is not None
        self._draw(self._batch.logits(), self._sampler, 0)
        self._leave()

    def _draw(self, logits: Tensor, sampler: Sampler, first: int, scored: tuple[Token, ...] = ()) -> None:
        """Draws a token for each row from `first` on, and delivers the progress to the requests.

        logits: (n, V), from the model. A request fails if the logits of one of its rows are not finite.
        """
        assert self._batch is not None
        self._steps += 1
        samples = self._samples[first:]
        sound = logits[:, : self.generator.tokenizer.vocab_size].isfinite().all(dim=1)
        logits = self.generator.choosable(logits, check=False)
        ids = sampler.draw(logits)
        self._batch.append(ids, first)
        drawn = ids.tolist()
        for sample, good in zip(samples, sound.tolist(), strict=True):
            if not good:
                sample.handle.give(Update(error=NOT_FINITE, done=True))
        before, asked = [s.text.before for s in samples], [s.handle.request.logprobs for s in samples]
        tokens = self._tokens(logits, drawn, before, asked)
        updates: dict[int, tuple[Handle, list[Delta]]] = {}
        for sample, token in zip(samples, tokens, strict=True):
            handle = sample.handle
            if not handle.cancelled and not handle.done:
                updates.setdefault(id(handle), (handle, []))[1].append(self._gained(sample, token))
        going = {id(sample.handle) for sample in self._samples if not sample.ended}
        for key, (handle, deltas) in updates.items():
            handle.give(Update(tuple(deltas), scored, done=key not in going))

    def _gained(self, sample: _Sample, token: Token) -> Delta:
        request, text = sample.handle.request, sample.text
        sample.drawn += 1
        self._generated += 1
        if token.id in request.stop_tokens:
            sample.ended = True
            return Delta(sample.index, text.finish(), (), "stop")
        piece, reason = text.push(token.id), None
        if not text.stopped and sample.drawn == request.params.max_new_tokens:
            piece, reason = piece + text.finish(), "length"
        if text.stopped:
            reason = "stop"
        sample.ended = reason is not None
        return Delta(sample.index, piece, (token,), reason)  # type: ignore[arg-type]

    def _tokens(self, logits: Tensor, ids: list[int], before: list[int], asked: Sequence[int | None]) -> list[Token]:
        """Tokens with log-probabilities. logits: (n, V); asked: number of alternatives per row, None for no
        log-probability."""
        bytes_of = self.generator.bytes_of
        tokens = [Token(token, bytes_of(b, token)) for b, token in zip(before, ids, strict=True)]
        rows = [i for i, k in enumerate(asked) if k is not None]
        if not rows:
            return tokens
        index = torch.tensor(rows, device=logits.device)
        chosen = torch.tensor([ids[i] for i in rows], device=logits.device)
        found = log_probabilities(logits[index], chosen, max(k or 0 for k in asked))
        for i, own, logs, top in zip(rows, *(t.tolist() for t in found), strict=True):
            b, pairs = before[i], list(zip(top, logs, strict=True))[: asked[i]]
            likely = tuple((t, bytes_of(b, t), log) for t, log in pairs if log > -math.inf)
            tokens[i] = dataclasses.replace(tokens[i], logprob=own, top=likely)
        return tokens

    def _leave(self) -> None:
        """Removes finished samples and samples of cancelled requests."""
        stay = [i for i, s in enumerate(self._samples) if not (s.ended or s.handle.cancelled or s.handle.done)]
        if len(stay) == len(self._samples):
            return
        assert self._batch is not None and self._sampler is not None
        self._samples = [self._samples[i] for i in stay]
        self._batch.keep(stay)
        self._sampler = self._sampler.select(torch.tensor(stay, dtype=torch.long)) if stay else None
