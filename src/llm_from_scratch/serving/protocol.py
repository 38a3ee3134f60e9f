"""Request bodies: JSON of bounded size and depth with OpenAI's fields and ours, each checked. Unknown fields are
refused with a suggestion. No field is ignored."""

from __future__ import annotations

import difflib
import json
import math
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from ..errors import ApiError

MAX_VALUES = 1 << 18  # commas and brackets of a body: ids of a long prompt, at most a few MB of memory
MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_MESSAGES, MAX_LOGPROBS = 16, 256, 1024, 4096, 20
# OpenAI's fields that this server does not support
UNSUPPORTED = {
    "audio", "function_call", "functions", "include_obfuscation", "metadata", "modalities", "parallel_tool_calls",
    "prediction", "prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier", "service_tier",
    "store", "suffix", "tool_choice", "tools", "verbosity", "web_search_options", "moderation", "guided_json",
}  # fmt: skip
Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Real = Annotated[float, Field(allow_inf_nan=False)]
T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class StreamOptions(Strict):
    include_usage: bool | None = None


class Sampling(Strict):
    """The common fields of completions and chats. null is the same as a missing field."""

    model: str | None = None
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    temperature: Annotated[Real, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    n: Annotated[Int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Any = None
    presence_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = None
    logit_bias: Any = None
    seed: Int | None = None
    user: str | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    min_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Real, Field(gt=0, le=100)] | None = None
    stop_token_ids: Any = None
    ignore_eos: bool | None = None

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: Any) -> tuple[str, ...]:
        texts = () if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            _refuse("expected a text or a list of texts")
        if len(texts) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_LENGTH for text in texts):
            _refuse(f"expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")
        return tuple(texts)

    @field_validator("stop_token_ids")
    @classmethod
    def _ids(cls, value: Any) -> frozenset[int]:
        ids = value or []
        if not isinstance(ids, list) or len(ids) > MAX_BIASES or not all(type(i) is int for i in ids):
            _refuse(f"expected a list of at most {MAX_BIASES} token ids")
        return frozenset(ids)

    @field_validator("logit_bias")
    @classmethod
    def _bias(cls, value: Any) -> dict[int, float]:
        biases = value or {}
        if not isinstance(biases, dict) or len(biases) > MAX_BIASES:
            _refuse(f"expected an object with at most {MAX_BIASES} token ids")
        for key, bias in biases.items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                _refuse(f"{key[:20]!r} is not a token id")
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
                _refuse(f"the bias of token {key} must be a number from -100 to 100")
        return {int(key): float(bias) for key, bias in biases.items()}

    @property
    def samples(self) -> int:
        return self.n or 1


class CompletionRequest(Sampling):
    prompt: Any
    best_of: Annotated[Int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, value: Any) -> list[str] | list[list[int]]:
        """A list of prompts from any of OpenAI's four forms."""
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            kinds = set(map(type, value))
            if kinds == {int}:
                return [value]
            if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value)):
                return value
        _refuse("expected a text, a list of texts, a list of token ids, or a list of such lists")


class TextPart(Strict):
    type: str
    text: str

    @field_validator("type")
    @classmethod
    def _text(cls, value: str) -> str:
        return value if value == "text" else _refuse("only parts of the type text are supported")


class Message(Strict):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Any = None
    name: Annotated[str, Field(max_length=256)] | None = None

    @field_validator("content")
    @classmethod
    def _content(cls, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        if not isinstance(value, list) or len(value) > MAX_MESSAGES:
            _refuse("expected a text or a list of parts")
        return "".join(TextPart.model_validate(part).text for part in value)

    def plain(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content} | ({"name": self.name} if self.name else {})


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    allow_special: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Any

    @field_validator("tokens")
    @classmethod
    def _ids(cls, value: Any) -> list[int]:
        return value if isinstance(value, list) and set(map(type, value)) <= {int} else _refuse("expected token ids")


def _refuse(reason: str) -> NoReturn:
    raise PydanticCustomError("refused", "{reason}", {"reason": reason})


def parse_json(raw: bytes) -> Any:
    """A body's JSON. Raises ApiError: 400."""
    if sum(raw.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:
        # count again without the strings, which is slower
        outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
        if sum(outside.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:
            raise ApiError(400, f"the body has too many values; the limit is {MAX_VALUES}")
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=lambda name: _refuse(f"{name} is not JSON"))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:100]}") from None


def read(kind: type[T], raw: bytes) -> T:
    """A request of one kind from a body. Raises ApiError: 400."""
    content = parse_json(raw)
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _as_sentence(kind, error) from None


def _as_sentence(kind: type[BaseModel], error: ValidationError) -> ApiError:
    """The first error as one sentence."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    name = ".".join(str(part)[:64] for part in place) or None
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])[:64]
        if unknown in UNSUPPORTED:
            return ApiError(400, f"{unknown} is not supported by this server", unknown, "unsupported_parameter")
        known = kind.model_fields if len(first["loc"]) == 1 else {}
        near = difflib.get_close_matches(unknown, list(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return ApiError(400, f"unknown field {unknown!r}{hint}", unknown, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    message = first["msg"][0].lower() + first["msg"][1:]
    return ApiError(400, f"{name}: {message}", name, "invalid_value")


def finite(value: float | None) -> float | None:
    """The number, or None if it is not finite (JSON has no infinities)."""
    return value if value is not None and math.isfinite(value) else None
