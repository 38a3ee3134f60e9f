"""The service: a model with its engine, client requests as engine requests, and status reports."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import GenerationConfig
from ..core.chat import ChatTemplate, read_template
from ..errors import ApiError, UserError
from ..generation.batch import Overflow
from ..generation.engine import Engine, Request
from ..generation.generator import Generator
from ..generation.sampling import FILTERS
from .completions import ChatPlan, Plan, token_text
from .jobs import JobQueue
from .metrics import Metrics
from .options import ServeOptions
from .protocol import MAX_LOGPROBS, ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest
from .supervisor import Supervisor
from .watch import Watch

STUCK = 60.0  # seconds of one step, after which the server is no longer healthy
MAX_LOGPROBS_TOTAL = 1 << 17  # log-probabilities per response
# Settings of GenerationConfig that requests set by the same name
SAMPLING = (*FILTERS, "repetition_penalty", "presence_penalty", "frequency_penalty")


def open_service(
    generator: Generator, options: ServeOptions, location: str, found: Path | None, overflow: Overflow, seed: int | None
) -> Service:
    """The service of a loaded model. found: the checkpoint at the location. Raises UserError for a bad template."""
    path, tokenizer = Path(location), generator.tokenizer
    name = location if not path.exists() else path.resolve().stem if path.is_file() else path.resolve().name
    template = tokenizer.chat
    if options.chat_template is not None:
        eot = "" if tokenizer.eot_id is None else tokenizer.decode([tokenizer.eot_id])
        template = read_template(options.chat_template, *([template.bos, template.eos] if template else [eot, eot]))
    elif template is not None:
        template.start()  # reports a template that cannot be used
    run = found.parent if found is not None and (found.parent / "metrics.jsonl").is_file() else None
    return Service(
        generator,
        lambda: Engine(generator, options.max_concurrent, overflow),
        options,
        name=options.model_name or name,
        template=template,
        watch=Path(options.watch) if options.watch is not None else run,
        seed=seed,
    )


class Service:
    """make_engine: builds an engine, also after a failure. ends: end-of-text ids besides the tokenizer's. seed: for
    requests without a seed; None: random."""

    def __init__(
        self,
        generator: Generator,
        make_engine: Callable[[], Engine],
        options: ServeOptions,
        *,
        name: str = "model",
        template: ChatTemplate | None = None,
        ends: frozenset[int] = frozenset(),
        watch: Path | None = None,
        seed: int | None = None,
    ):
        self.generator, self.options, self.name, self.template = generator, options, name, template
        self.others: dict[str, Service] = {}  # further models of the server, by name
        self.tokenizer, self.block_size = generator.tokenizer, generator.model.config.block_size
        self.ends = ends | self.tokenizer.end_ids
        self.max_prompt = options.max_prompt_tokens or max(8192, 4 * self.block_size)
        self.supervisor = Supervisor(make_engine, lambda: self.metrics.restarts.inc())
        self.metrics = Metrics(self.supervisor)
        self.queue = JobQueue(self.supervisor, options.max_concurrent + options.max_queued, options.max_seconds)
        self.watch = Watch(watch) if watch is not None else None
        self.seeds = random.Random(seed)
        self.created = int(time.time())

    # status and model

    @property
    def all(self) -> list[Service]:
        """This model and the others."""
        return [self, *self.others.values()]

    def add(self, other: Service) -> None:
        """Serves another model under its name. Raises UserError if the name is taken."""
        if other.name in (self.name, *self.others):
            raise UserError(f"two models are named {other.name}: choose another name in --adapters or --model_name")
        self.others[other.name] = other
        self.metrics.supervisors.append(other.supervisor)

    def health(self) -> str:
        return next((status for one in self.all if (status := one.own_health()) != "ok"), "ok")

    def own_health(self) -> str:
        if self.queue.draining:
            return "the server is shutting down"
        if not self.supervisor.alive:
            return self.supervisor.unavailable().message
        seconds = self.supervisor.engine.step_seconds()
        return "ok" if seconds < STUCK else f"the engine has been busy with one step for {seconds:.0f} s"

    def about(self) -> dict[str, Any]:
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "llm-from-scratch"}
        return about | {"max_model_len": self.block_size}

    def info(self) -> dict[str, Any]:
        weight = self.generator.model.lm_head.weight
        limits = {
            "max_tokens": self.options.max_tokens,
            "max_prompt_tokens": self.max_prompt,
            "max_n": self.options.max_concurrent,
            "max_logprobs": MAX_LOGPROBS,
            "max_told": MAX_LOGPROBS_TOTAL,
            "max_seconds": self.options.max_seconds,
        }
        defaults = asdict(GenerationConfig())
        return {
            "model": self.name,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.tokenizer.vocab_size,
            "block_size": self.block_size,
            "parameters": self.generator.model.get_num_params(),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": str(weight.device),
            "chat": self.template is not None,
            "limits": limits,
            "watch": self.watch is not None,
            "defaults": {name: defaults[name] for name in SAMPLING}
            | {
                "max_tokens": min(defaults["max_new_tokens"], self.options.max_tokens),
                "top_k": defaults["top_k"] if defaults["top_k"] < self.tokenizer.vocab_size else 0,
            },
        }

    def named(self, name: str | None) -> Service:
        """The model of this name; None: this one. Raises ApiError."""
        if name is None or name == self.name:
            return self
        if name not in self.others:
            message = f"no model {name[:100]!r}: this server serves {', '.join(one.name for one in self.all)}"
            raise ApiError(404, message, "model", "model_not_found")
        return self.others[name]

    # requests: encoding takes time, so these run in a thread; they raise ApiError

    def completion(self, asked: CompletionRequest) -> Plan:
        prompts = [self.encode(prompt, "prompt") for prompt in asked.prompt]
        if asked.best_of is not None and asked.best_of != asked.samples:
            raise ApiError(400, "best_of must equal n: all samples are returned", "best_of")
        length = 16 if asked.max_tokens is None else asked.max_tokens
        if not asked.echo:
            if not length:
                raise ApiError(400, "max_tokens=0 needs echo: true", "max_tokens")
            return Plan(*self._plan(asked, prompts, length, asked.logprobs))
        echo = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in asked.prompt]
        parts = self._plan(asked, prompts, max(1, length), asked.logprobs, score=asked.logprobs is not None)
        return Plan(*parts, echo, keep=length > 0)

    def chat(self, asked: ChatRequest) -> ChatPlan:
        if self.template is None:
            ways = "use /v1/completions, or start the server with --chat_template=FILE"
            raise ApiError(400, f"this model does not have a chat template: {ways}", code="no_chat_template")
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens and max_completion_tokens are the same: send one of them", "max_tokens")
        try:
            text = self.template.render([m.plain() for m in asked.messages])
        except UserError as error:
            raise ApiError(400, str(error), "messages") from None
        prompt = self.encode(text, "messages", special=True)
        length = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        if length is None:  # to the end of the turn
            length = self.options.max_tokens
            if asked.logprobs:
                length = min(length, max(1, MAX_LOGPROBS_TOTAL // (asked.samples * (1 + (asked.top_logprobs or 0)))))
        if length < 1:
            raise ApiError(400, "max_tokens must be 1 or more", "max_tokens")
        return ChatPlan(*self._plan(asked, [prompt], length, (asked.top_logprobs or 0) if asked.logprobs else None))

    def encode(self, prompt: str | list[int], param: str, special: bool = False) -> list[int]:
        """Token ids, if the model can read the prompt and it is not too long."""
        try:
            ids = self.generator.encode(prompt, allow_special=special)
        except UserError as error:
            raise ApiError(400, str(error), param) from None
        self._fits(len(ids), param)
        return ids

    def _fits(self, length: int, param: str) -> None:
        if length > self.max_prompt:
            message = f"the prompt has {length} tokens; the limit is {self.max_prompt}"
            raise ApiError(400, message, param, "context_length_exceeded")

    def _plan(
        self, asked: Sampling, prompts: list[list[int]], length: int, logprobs: int | None, score: bool = False
    ) -> tuple[str, list[Request], bool, bool]:
        """The parts of a Plan: the model's name, the engine's requests, whether to stream and to send the usage."""
        if length > (limit := self.options.max_tokens):
            raise ApiError(400, f"max_tokens={length}; the limit is {limit}", "max_tokens")
        if asked.samples > self.options.max_concurrent:
            raise ApiError(400, f"n={asked.samples}; the limit is {self.options.max_concurrent}", "n")
        for name in ("logit_bias", "stop_token_ids"):
            if unknown := [i for i in getattr(asked, name) if not 0 <= i < self.tokenizer.vocab_size]:
                known = f"0 to {self.tokenizer.vocab_size - 1}"
                raise ApiError(400, f"{name}: the model has the token ids {known}, not {str(unknown[0])[:20]}", name)
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        count = sum(length + len(prompt) * score for prompt in prompts) * asked.samples * ((logprobs or 0) + 1)
        if logprobs is not None and count > MAX_LOGPROBS_TOTAL:
            message = f"the response would have {count} log-probabilities (tokens x samples x alternatives)"
            raise ApiError(400, f"{message}; the limit is {MAX_LOGPROBS_TOTAL}", "logprobs")
        chosen = {name: value for name in SAMPLING if (value := getattr(asked, name)) is not None}
        top_k = k if (k := asked.top_k) is not None and 0 < k < self.tokenizer.vocab_size else None
        params = GenerationConfig(
            num_samples=asked.samples, max_new_tokens=length, stop=asked.stop,
            **{"temperature": 1.0} | chosen | {"top_k": top_k},
        )  # fmt: skip
        try:
            params.validate()
        except UserError as error:
            raise ApiError(400, str(error)) from None
        seed = asked.seed if asked.seed is not None else self.seeds.getrandbits(62)
        ends = asked.stop_token_ids | (frozenset() if asked.ignore_eos else self.ends)
        requests = [
            Request(prompt, params, (seed + k * asked.samples) % 2**63, ends, asked.logit_bias, logprobs, score)
            for k, prompt in enumerate(prompts)
        ]
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return self.name, requests, bool(asked.stream), usage

    def tokenize(self, asked: TokenizeRequest) -> dict[str, Any]:
        """add_special_tokens has no effect, because our tokenizers never add special tokens."""
        ids = self.encode(asked.prompt, "prompt", bool(asked.allow_special)) if asked.prompt else []
        pieces = [self.tokenizer.decode_bytes(ids[:1])] if ids else []
        pieces += [self.generator.bytes_of(*pair) for pair in zip(ids, ids[1:], strict=False)]
        return {
            "tokens": ids,
            "token_strs": [token_text(piece) for piece in pieces],
            "token_bytes": [list(piece) for piece in pieces],
            "count": len(ids),
            "max_model_len": self.block_size,
        }

    def detokenize(self, asked: DetokenizeRequest) -> dict[str, Any]:
        self._fits(len(asked.tokens), "tokens")
        ids = self.encode(asked.tokens, "tokens") if asked.tokens else []
        try:
            return {"prompt": self.tokenizer.decode(ids)}
        except UserError as error:
            raise ApiError(400, str(error), "tokens") from None
