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

from ..errors import UserError
from ..machine.files import MAX_JSON, parse_json, read_file, read_json

MAX_TEMPLATE = 1 << 20  # bytes
MAX_HELD = 1 << 26  # characters of one conversation's texts, if the template rewrites it for each turn
RUN_SECONDS = 30.0  # of processor time for all texts of a dataset, and a millisecond for each message in them
SECONDS = 20.0  # to wait for an answer where the system does not limit the time of a process, as render.py asks it to
# For tokenizers without a template. Every turn ends with eos_token.
PLAIN = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant, not ' ~ message.role) }}{% endif %}"
    "{{ message.role | capitalize }}:\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
END = "\x03"  # ends a turn if the tokenizer has no end-of-text token: ASCII's end of text
Message = dict[str, str]  # role, content


class ChatTemplate:
    """A template, rendered in a separate process (render.py) with limited time and memory, because an untrusted
    template may loop forever. The process starts when it is first needed."""

    def __init__(self, source: str, bos: str = "", eos: str = ""):
        self.source, self.bos, self.eos = source, bos, eos
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.total: float | None = None  # processor time of all texts: see RUN_SECONDS

    def start(self) -> None:
        """Starts the process. Raises UserError for a template that does not parse."""
        try:
            with self.lock:
                self._start()
        except (OSError, ValueError) as error:
            raise UserError(f"the chat template cannot be read: {error}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, which ends where the assistant's turn begins. May take seconds, so call it in a
        thread. Raises UserError if the template rejects the messages or does not end."""
        return self.render_parts(messages, [(len(messages), True)])[0][1]

    def render_parts(self, messages: Sequence[Message], asked: Sequence[tuple[int, bool]]) -> list[tuple[int, str]]:
        """The texts of some (how many of the messages, whether the assistant's turn begins at the end), as render().
        Of each: how many characters of the text before it begins with (all or none), and the others."""
        found: list[tuple[int, str]] = []
        held = 0
        try:
            with self.lock:
                if self.process is None or self.process.poll() is not None:
                    self._start()
                for number in range(len(asked)):
                    kept, text = self._ask([list(messages), list(asked), self.total] if number == 0 else None)
                    held += len(text)
                    if held > MAX_HELD:
                        assert self.process is not None
                        _end(self.process)
                        raise ValueError(f"its turns have more than {MAX_HELD:,} characters in total")
                    found.append((kept, text))
                return found
        except (OSError, ValueError) as error:
            raise UserError(f"the chat template rejects these messages: {error}") from None

    def _start(self) -> None:
        import jinja2  # a tokenizer with a template must load without it

        program, packages = Path(__file__).with_name("render.py"), Path(jinja2.__path__[0]).parent
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(program), str(packages)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        weakref.finalize(self, _end, self.process)
        self._ask([self.source, {"bos_token": self.bos, "eos_token": self.eos}])

    def _ask(self, content: Any = None) -> tuple[int, str]:
        """The process's answer to a request, or its next one. Raises ValueError with the reason if there is none, or
        if it took too much, when the process is gone."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            if content is not None:
                process.stdin.write(json.dumps(content).encode() + b"\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            _end(process)
            raise ValueError("it exceeds the time or memory limit")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["kept"], answer["text"]


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    with contextlib.suppress(OSError):
        process.communicate()  # closes the pipes


def read_template(file: str, bos: str = "", eos: str = "") -> ChatTemplate:
    """The template in a file, started. Raises UserError."""
    try:
        source = read_file(Path(file), MAX_TEMPLATE).decode("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the chat template {file}: {reason}") from None
    template = ChatTemplate(source, bos, eos)
    template.start()
    return template


def chat_in(folder: Path, eot: str, vocab_size: int) -> tuple[ChatTemplate | None, frozenset[int]]:
    """The chat template and the end-of-text ids in a Hugging Face folder. eot: the end-of-text token, if the folder
    does not name one. Raises UserError if they cannot be read."""
    config: dict[str, Any] = {}
    try:
        if (folder / "tokenizer_config.json").is_file():
            content = parse_json(read_file(folder / "tokenizer_config.json", MAX_JSON))
            config = content if isinstance(content, dict) else {}
        if (folder / "chat_template.jinja").is_file():
            config["chat_template"] = read_file(folder / "chat_template.jinja", MAX_TEMPLATE).decode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the chat template in {folder}: {reason}") from None
    ids: Any = []
    if file := ends_in(folder):
        found = read_json(file).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
    return template_of(config, eot), frozenset(i for i in ids if type(i) is int and 0 <= i < vocab_size)


def ends_in(folder: Path) -> Path | None:
    """The file of a Hugging Face folder that names the end-of-text ids: as in transformers, one file."""
    files = (folder / name for name in ("generation_config.json", "config.json"))
    return next((file for file in files if file.is_file()), None)


def template_of(config: dict[str, Any], eot: str = "") -> ChatTemplate | None:
    """The template in the content of a tokenizer_config.json. eot: the end-of-text token, if that does not name one."""
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
        return None
    bos, eos = (_content(config.get(name)) for name in ("bos_token", "eos_token"))
    return ChatTemplate(source, bos if bos is not None else eot, eos if eos is not None else eot)


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
