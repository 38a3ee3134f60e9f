"""Completions: a checked request becomes engine requests, and the engine's updates become OpenAI's JSON. Chunks are
assembled as text, because objects for each chunk would be slower than the model."""

from __future__ import annotations

import codecs
import functools
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..generation.engine import Request, Token, Update
from .protocol import finite


@dataclass
class Gain:
    """The new text and tokens of one choice. before: how many of the tokens belong to the prompt."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    before: int = 0


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
    """A log-probability in JSON; null if it is infinite."""
    known = finite(value)
    return "null" if known is None else f"{known:.6g}"


class Plan:
    """The engine requests of a client's request, and the format of the response. requests: one per prompt. echo: the
    texts of the prompts, if they are to be repeated. keep: whether to return the generated tokens (max_tokens=0 scores
    the prompt and drops one token)."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self,
        model: str,
        requests: Sequence[Request],
        stream: bool,
        usage: bool,
        echo: Sequence[str] | None = None,
        keep: bool = True,
    ):
        self.requests, self.stream, self.usage, self.echo, self.keep = requests, stream, usage, echo, keep
        self.samples = requests[0].params.num_samples
        self.logprobs = requests[0].logprobs is not None
        self.count = self.samples * len(requests)
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.model = model
        about = f'{{"id":"{self.id}","object":"%s","created":{int(time.time())},"model":{json.dumps(model)},'
        self.head, self.chunk_head = about % self.kind, f"data: {about % self.chunk_kind}"
        self.tail = ',"usage":null}\n\n' if usage else "}\n\n"
        self.begun = [False] * self.count
        self.reasons: list[str | None] = [None] * self.count
        self.generated = 0
        self.offsets = [_Offsets() for _ in range(self.count if self.logprobs else 0)]

    # the engine's updates

    def gains(self, batch: Iterable[tuple[int, Update]]) -> list[Gain]:
        """The gains from some updates, at most one per choice."""
        found: dict[int, Gain] = {}
        for prompt, update in batch:
            first = prompt * self.samples
            if not self.begun[first] and (update.deltas or update.prompt):
                for index in range(first, first + self.samples):
                    self.begun[index] = True
                    if self.echo is not None:
                        found[index] = Gain(index, self.echo[prompt], list(update.prompt), None, len(update.prompt))
            for delta in update.deltas:
                index = first + delta.sample
                gain = found.get(index) or found.setdefault(index, Gain(index))
                if self.keep:
                    gain.text += delta.text
                    gain.tokens += delta.tokens
                    self.generated += len(delta.tokens)
                reason = delta.finish_reason
                if reason is not None:
                    gain.reason = self.reasons[index] = reason if self.keep else "length"
        return list(found.values())

    def cut(self) -> list[Gain]:
        """Finishes the open choices after a timeout."""
        left = [index for index, reason in enumerate(self.reasons) if reason is None]
        for index in left:
            self.reasons[index] = "length"
        return [Gain(index, reason="length") for index in left]

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

    def chunk(self, gain: Gain) -> str:
        """One event, or "" if there is nothing new."""
        if not gain.text and gain.reason is None and not (self.logprobs and gain.tokens):
            return ""
        return f'{self.chunk_head}"choices":[{self._choice(gain)}]{self.tail}'

    def closing(self) -> str:
        """Events after the last token."""
        usage = f'{self.chunk_head}"choices":[],{self.usage_json()}}}\n\n' if self.usage else ""
        return usage + "data: [DONE]\n\n"

    def whole(self, gains: Iterable[Gain]) -> str:
        """The body without streaming. gains: one per choice, in order."""
        choices = ",".join(self._whole_choice(gain) for gain in gains)
        return f'{self.head}"choices":[{choices}],{self.usage_json()}}}'

    def _whole_choice(self, gain: Gain) -> str:
        return self._choice(gain)

    def _choice(self, gain: Gain) -> str:
        reason = "null" if gain.reason is None else f'"{gain.reason}"'
        logprobs = self._logprobs(gain) if self.logprobs else "null"
        text = json.dumps(gain.text)
        return f'{{"index":{gain.index},"text":{text},"logprobs":{logprobs},"finish_reason":{reason}}}'

    def _logprobs(self, gain: Gain) -> str:
        tokens, tops, full = gain.tokens, [], []
        for place, token in enumerate(tokens):
            if place < gain.before and token.logprob is None:  # a prompt's first token
                tops.append("null")
                full.append("null")
                continue
            likely: dict[str, str] = {}
            for _, raw, logprob in token.top:
                likely.setdefault(token_json(raw), number(logprob))  # of equal texts, the most likely
            likely.setdefault(token_json(token.bytes), number(token.logprob))
            tops.append("{" + ",".join(f"{name}:{value}" for name, value in likely.items()) + "}")
            full.append("[" + ",".join(alternative(*item) for item in token.top) + "]")
        offset = self.offsets[gain.index]
        parts = {
            "tokens": (token_json(token.bytes) for token in tokens),
            "token_logprobs": (number(token.logprob) for token in tokens),
            "top_logprobs": tops,
            "text_offset": (str(offset.of(token.bytes)) for token in tokens),
            "token_ids": (str(token.id) for token in tokens),
            "token_bytes": (bytes_json(token.bytes) for token in tokens),
            "top": full,
        }
        return "{" + ",".join(f'"{name}":[{",".join(values)}]' for name, values in parts.items()) + "}"


def alternative(token: int, raw: bytes, logprob: float) -> str:
    return f'{{"id":{token},"token":{token_json(raw)},"bytes":{bytes_json(raw)},"logprob":{number(logprob)}}}'


class _Offsets:
    """The character offsets of tokens in a text."""

    def __init__(self) -> None:
        self.utf8, self.length = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def of(self, raw: bytes) -> int:
        begin = self.length
        self.length += len(self.utf8.decode(raw))
        return begin
