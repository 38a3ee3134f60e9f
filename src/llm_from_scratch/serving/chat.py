"""Chat templates, rendered in a sandbox. They have the same variables and functions as in transformers: messages,
add_generation_prompt, bos_token, eos_token, raise_exception, strftime_now, tojson without HTML escapes, and Jinja's
loop controls."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ApiError, UserError
from ..machine.files import MAX_JSON, parse_json, read_file, read_json

MAX_TEMPLATE = 1 << 20  # bytes


class ChatTemplate:
    """Raises UserError for a template that does not parse."""

    def __init__(self, source: str, bos: str = "", eos: str = ""):
        loops = ["jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self.tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template cannot be read: {error}") from None

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a conversation. Raises ApiError if the template rejects it."""
        try:
            return self.template.render(messages=list(messages), add_generation_prompt=True, tools=None, **self.tokens)
        except Exception as error:  # any error of the template
            raise ApiError(400, f"the chat template rejects these messages: {str(error)[:300]}", "messages") from None


def find_template(file: str | None, folder: Path | None, eot: str = "") -> ChatTemplate | None:
    """The template of --chat_template, else of the model's folder, else None. eot: the end-of-text token, if the folder
    does not name one. Raises UserError if the template cannot be read."""
    config: dict[str, Any] = {}
    path = Path(file) if file is not None else None
    try:
        if folder is not None:
            if (folder / "tokenizer_config.json").is_file():
                content = parse_json(read_file(folder / "tokenizer_config.json", MAX_JSON))
                config = content if isinstance(content, dict) else {}
            if path is None and (folder / "chat_template.jinja").is_file():
                path = folder / "chat_template.jinja"
        source = config.get("chat_template")
        if path is not None:
            source = read_file(path, MAX_TEMPLATE).decode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the chat template {file or folder}: {reason}") from None
    if isinstance(source, list):  # several by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    bos, eos = (_content(config.get(name)) for name in ("bos_token", "eos_token"))
    return ChatTemplate(source, bos if bos is not None else eot, eos if eos is not None else eot)


def end_ids(folder: Path | None, vocab_size: int) -> frozenset[int]:
    """The end-of-text ids in a folder's generation_config.json."""
    path = folder / "generation_config.json" if folder is not None else None
    if path is None or not path.is_file():
        return frozenset()
    found = read_json(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return frozenset(i for i in ids if type(i) is int and 0 <= i < vocab_size)


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)
