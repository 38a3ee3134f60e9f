"""Request bodies: JSON of bounded size and depth with OpenAI's fields and ours, each checked. Unknown fields are
refused with a suggestion. No field is ignored."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from ..config import GenerationConfig
from ..errors import ApiError
from ..generation.sampling import FILTERS
from ..settings import did_you_mean, type_hints

MAX_VALUES = 1 << 18  # commas and brackets of a body: ids of a long prompt, at most a few MB of memory
MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_MESSAGES, MAX_LOGPROBS = 16, 256, 1024, 4096, 20
# OpenAI's fields that this server does not support, with the values that ask for nothing, apart from null
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (), "function_call": ("none", "auto"), "functions": ([],), "guided_json": (), "modalities": (["text"],),
    "moderation": (), "parallel_tool_calls": (True, False), "prediction": (), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "service_tier": ("auto", "default"), "store": (False,), "suffix": ("",),
    "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": ("medium",), "web_search_options": (),
}  # fmt: skip
LABELS = {"metadata", "prompt_cache_key", "safety_identifier"}  # accepted: they never change an answer
# of a message that a client sends back as it came
EMPTY_PARTS = {"annotations", "audio", "function_call", "reasoning_content", "refusal", "tool_calls"}
T = TypeVar("T", bound=BaseModel)


def _refuse(reason: str) -> NoReturn:
    raise PydanticCustomError("refused", "{reason}", {"reason": reason})


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        _refuse(f"character {error.start} is half of a surrogate pair, which is not text")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        _refuse("expected a string or a list of strings")
    if len(texts) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_LENGTH for text in texts):
        _refuse(f"expected at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(map(_text, texts))


def _stop_ids(value: Any) -> frozenset[int]:
    ids = value or []
    if not isinstance(ids, list) or len(ids) > MAX_BIASES or not all(type(i) is int for i in ids):
        _refuse(f"expected a list of at most {MAX_BIASES} token ids")
    return frozenset(ids)


def _biases(value: Any) -> dict[int, float]:
    biases = value or {}
    if not isinstance(biases, dict) or len(biases) > MAX_BIASES:
        _refuse(f"expected an object with at most {MAX_BIASES} token ids")
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            _refuse(f"{key[:20]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            _refuse(f"the bias of token {key} must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in biases.items()}


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A list of prompts from any of OpenAI's four forms."""
    if isinstance(value, str):
        return [_text(value)]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if kinds == {str}:
            return [_text(text) for text in value]
        if kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value):
            return value
    _refuse("expected a string, a list of strings, a list of token ids, or a list of such lists")


def _content(value: Any) -> str:
    if value is None or isinstance(value, str):
        return _text(value or "")
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        _refuse("expected a string or a list of parts")
    return "".join(TextPart.model_validate(part).text for part in value)


def _text_type(value: str) -> str:
    return value if value == "text" else _refuse("only parts of the type text are supported")


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field of OpenAI's that is not supported leaves the answer as it is."""
    if name in UNSUPPORTED:
        return value is None or any(value == v and type(value) is type(v) for v in UNSUPPORTED[name])
    return name in LABELS


def _tokens(value: Any) -> list[int]:
    return value if isinstance(value, list) and set(map(type, value)) <= {int} else _refuse("expected token ids")


Text = Annotated[str, AfterValidator(_text)]
Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Positive = Annotated[Int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Alternatives = Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


_types = type_hints(GenerationConfig)
_fields: dict[str, Any] = {name: (_types[name] | None, None) for name in FILTERS}
Filters: Any = create_model("Filters", __base__=Strict, **_fields)


class Sampling(Filters):
    """The common fields of completions and chats. null is the same as a missing field. A new filter of sampling.py has
    the limits of its setting."""

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, content: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in content.items() if not _asks_for_nothing(name, value)}

    model: str | None = None
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Positive | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[Any, AfterValidator(_stops)] = ()
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[Any, AfterValidator(_biases)] = {}
    seed: Int | None = None
    user: str | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[Any, AfterValidator(_stop_ids)] = frozenset()
    ignore_eos: bool | None = None

    @property
    def samples(self) -> int:
        return self.n or 1


class CompletionRequest(Sampling):
    prompt: Annotated[Any, AfterValidator(_prompts)]
    best_of: Positive | None = None
    echo: bool | None = None
    logprobs: Alternatives | None = None


class TextPart(Strict):
    type: Annotated[str, AfterValidator(_text_type)]
    text: Text


class Message(Strict):
    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Annotated[Any, AfterValidator(_content)] = ""
    name: Annotated[Text, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {name: value for name, value in content.items() if name not in EMPTY_PARTS or value not in (None, [])}

    def plain(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content} | ({"name": self.name} if self.name else {})


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: Text
    add_special_tokens: bool | None = None
    allow_special: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[Any, AfterValidator(_tokens)]


def parse_json(raw: bytes) -> Any:
    """A body's JSON. Raises ApiError: 400."""
    if sum(raw.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:
        # count again without the strings, which is slower
        outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
        if sum(outside.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:
            raise ApiError(400, f"the body has too many values; the limit is {MAX_VALUES}")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object)  # NaN is refused by the field
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:100]}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0][:64]
        raise ApiError(400, f"the key {twice!r} appears more than once in an object", twice, "invalid_value")
    return content


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
        hint = did_you_mean(unknown, known, "see docs/SERVE.md")
        return ApiError(400, f"unknown field {unknown!r}; {hint}", unknown, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    message = first["msg"][0].lower() + first["msg"][1:]
    return ApiError(400, f"{name or 'the body'}: {message}", name, "invalid_value")
