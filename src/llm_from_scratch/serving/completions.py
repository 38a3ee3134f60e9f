"""Completions and chats: the engine's updates become OpenAI's JSON. Chunks are assembled as text, because objects for
each chunk would be slower than the model."""

from __future__ import annotations

import codecs
import functools
import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..generation.engine import Request, Token, Update


@dataclass
class Choice:
    """A choice: its text and tokens, in a stream since the last chunk. before: how many of the tokens belong to
    the prompt. length, utf8: the characters of all tokens so far, for their offsets."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    before: int = 0
    reason: str | None = None
    is_ended: bool = False  # the reason was sent
    length: int = 0
    utf8: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))


@functools.lru_cache(1 << 15)
def token_json(raw: bytes) -> str:
    """A token as a JSON string. Incomplete UTF-8 is written as OpenAI does: "bytes:\\xe2\\x82"."""
    return json.dumps(token_text(raw))


def token_text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@functools.lru_cache(1 << 15)
def bytes_json(raw: bytes) -> str:
    return "[" + ",".join(map(str, raw)) + "]"


def number(value: float | None) -> str:
    """A log-probability in JSON, with all digits of a float32; null if it is infinite."""
    return f"{value:.9g}" if value is not None and math.isfinite(value) else "null"


@dataclass
class Plan:
    """The engine requests of a client's request, and the format of the response. requests: one per prompt. echo: the
    texts of the prompts, if they are to be repeated. keep: whether to return the generated tokens (max_tokens=0 scores
    the prompt and drops one token)."""

    model: str
    requests: Sequence[Request]
    stream: bool
    usage: bool
    echo: Sequence[str] | None = None
    keep: bool = True

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __post_init__(self) -> None:
        self.samples = self.requests[0].params.num_samples
        self.logprobs = self.requests[0].logprobs is not None
        own, model = f"{self.prefix}-{secrets.token_hex(12)}", json.dumps(self.model)
        about = f'{{"id":"{own}","object":"%s","created":{int(time.time())},"model":{model},'
        self.head, self.chunk_head = about % self.kind, f"data: {about % self.chunk_kind}"
        self.tail = ',"usage":null}\n\n' if self.usage else "}\n\n"
        self.begun: set[int] = set()  # prompts with an update
        self.choices = [Choice(index) for index in range(self.samples * len(self.requests))]
        self.generated = 0

    # the engine's updates

    def add(self, prompt: int, update: Update) -> bool:
        """Adds an update of a prompt to its choices. Returns whether it holds anything new."""
        if not update.deltas and not update.prompt:
            return False
        choices = self.choices[prompt * self.samples : (prompt + 1) * self.samples]
        if prompt not in self.begun and self.echo is not None:
            for choice in choices:
                choice.text, choice.tokens = self.echo[prompt], list(update.prompt)
                choice.before = len(update.prompt)
        self.begun.add(prompt)
        for delta in update.deltas:
            choice = choices[delta.sample]
            if self.keep:
                choice.text += delta.text
                choice.tokens += delta.tokens
                self.generated += len(delta.tokens)
            if delta.finish_reason is not None:
                choice.reason = delta.finish_reason if self.keep else "length"
        return True

    def cut(self) -> bool:
        """Finishes the open choices after a timeout. Returns whether there were any."""
        still_open = [choice for choice in self.choices if choice.reason is None]
        for choice in still_open:
            choice.reason = "length"
        return bool(still_open)

    # JSON

    def usage_json(self) -> str:
        prompt = sum(len(request.prompt) for request in self.requests)
        return (
            f'"usage":{{"prompt_tokens":{prompt},"completion_tokens":{self.generated},'
            f'"total_tokens":{prompt + self.generated}}}'
        )

    def opening(self) -> str:
        """Events before the first token."""
        return ""

    def chunks(self) -> str:
        """The events for what is new since the last call."""
        events = []
        for choice in self.choices:
            ends = choice.reason is not None and not choice.is_ended
            if choice.text or ends or (self.logprobs and choice.tokens):
                events.append(f'{self.chunk_head}"choices":[{self._choice(choice)}]{self.tail}')
            choice.text, choice.tokens, choice.before, choice.is_ended = "", [], 0, choice.reason is not None
        return "".join(events)

    def closing(self) -> str:
        """Events after the last token."""
        usage = f'{self.chunk_head}"choices":[],{self.usage_json()}}}\n\n' if self.usage else ""
        return usage + "data: [DONE]\n\n"

    def whole(self) -> str:
        """The body without streaming."""
        choices = ",".join(self._choice(choice, whole=True) for choice in self.choices)
        return f'{self.head}"choices":[{choices}],{self.usage_json()}}}'

    def _choice(self, choice: Choice, whole: bool = False) -> str:
        logprobs = self._logprobs(choice) if self.logprobs else "null"
        reason = "null" if choice.reason is None else f'"{choice.reason}"'
        content = self._content(choice, whole)
        return f'{{"index":{choice.index},{content},"logprobs":{logprobs},"finish_reason":{reason}}}'

    def _content(self, choice: Choice, whole: bool) -> str:
        return f'"text":{json.dumps(choice.text)}'

    def _logprobs(self, choice: Choice) -> str:
        tokens, tops, full, offsets = choice.tokens, [], [], []
        for place, token in enumerate(tokens):
            offsets.append(str(choice.length))
            choice.length += len(choice.utf8.decode(token.bytes))
            if place < choice.before and token.logprob is None:  # a prompt's first token
                tops.append("null")
                full.append("null")
                continue
            likely: dict[str, str] = {}
            for _, raw, logprob in token.top:
                likely.setdefault(token_json(raw), number(logprob))  # of equal texts, the most likely
            likely.setdefault(token_json(token.bytes), number(token.logprob))
            tops.append("{" + ",".join(f"{name}:{value}" for name, value in likely.items()) + "}")
            full.append("[" + ",".join(alternative(*item) for item in token.top) + "]")
        parts = {
            "tokens": (token_json(token.bytes) for token in tokens),
            "token_logprobs": (number(token.logprob) for token in tokens),
            "top_logprobs": tops,
            "text_offset": offsets,
            "token_ids": (str(token.id) for token in tokens),
            "token_bytes": (bytes_json(token.bytes) for token in tokens),
            "top": full,
        }
        return "{" + ",".join(f'"{name}":[{",".join(values)}]' for name, values in parts.items()) + "}"


class ChatPlan(Plan):
    """A Plan with OpenAI's JSON for chats."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> str:
        begin = '{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        events = (f'{self.chunk_head}"choices":[{begin % choice.index}]{self.tail}' for choice in self.choices)
        return "".join(events)

    def _content(self, choice: Choice, whole: bool) -> str:
        text = json.dumps(choice.text)
        if whole:
            return f'"message":{{"role":"assistant","content":{text},"refusal":null}}'
        return f'"delta":{{"content":{text}}}' if choice.text or choice.tokens else '"delta":{}'

    def _logprobs(self, choice: Choice) -> str:
        entries = []
        for token in choice.tokens:
            top = ",".join(alternative(*item) for item in token.top)
            entries.append(
                f'{{"token":{token_json(token.bytes)},"logprob":{number(token.logprob)},'
                f'"bytes":{bytes_json(token.bytes)},"top_logprobs":[{top}]}}'
            )
        return f'{{"content":[{",".join(entries)}],"refusal":null}}'


def alternative(token: int, raw: bytes, logprob: float) -> str:
    return f'{{"id":{token},"token":{token_json(raw)},"bytes":{bytes_json(raw)},"logprob":{number(logprob)}}}'
