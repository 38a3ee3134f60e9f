"""Chat templates: finding and rendering them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..errors import ApiError, UserError
from ..interop.gguf import is_gguf, read_chat
from ..machine.files import MAX_JSON, parse_json, read_file, read_json

MAX_TEMPLATE = 1 << 20  # bytes
SECONDS = 20.0  # to wait for an answer where the system does not limit the time of a process, as render.py asks it to


class ChatTemplate:
    """A template, rendered in a separate process (render.py) with limited time and memory, because an untrusted
    template may loop forever. Raises UserError for a template that does not parse."""

    def __init__(self, source: str, bos: str = "", eos: str = ""):
        self.setup = [source, {"bos_token": bos, "eos_token": eos}]
        self.lock = threading.Lock()
        try:
            self._start()
        except (OSError, ValueError) as error:
            raise UserError(f"the chat template cannot be read: {error}") from None

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a conversation. May take seconds, so call it in a thread. Raises ApiError if the template
        rejects it or does not end."""
        try:
            with self.lock:
                if self.process.poll() is not None:
                    self._start()
                return self._ask(list(messages))
        except ValueError as error:
            raise ApiError(400, f"the chat template rejects these messages: {error}", "messages") from None

    def _start(self) -> None:
        program, packages = Path(__file__).with_name("render.py"), Path(jinja2.__path__[0]).parent
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(program), str(packages)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        weakref.finalize(self, _end, self.process)
        self._ask(self.setup)

    def _ask(self, content: Any) -> str:
        """The process's answer. Raises ValueError with the reason if there is none; the process is then gone."""
        timer = threading.Timer(SECONDS, self.process.kill)
        timer.start()
        try:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps(content).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            _end(self.process)
            raise ValueError("it takes too much time or memory")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    with contextlib.suppress(OSError):
        process.communicate()  # closes the pipes


def find_template(file: str | None, folder: Path | None, eot: str = "") -> ChatTemplate | None:
    """The template of --chat_template, else of the model's folder or GGUF file, else None. eot: the end-of-text token,
    if the folder does not name one. Raises UserError if the template cannot be read."""
    config: dict[str, Any] = {}
    if folder is not None and is_gguf(folder):
        config, folder = read_chat(folder), None
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
