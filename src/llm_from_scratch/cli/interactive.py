"""`llm-generate --interactive` and llm-chat: one prompt per line; in a terminal also the commands that /help lists."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import GenerationConfig
from ..errors import UserError, one_line
from ..machine.files import write_whole
from ..machine.terminal import note
from ..presets import build
from ..settings import did_you_mean, flatten

QUIT = "/help lists commands. Ctrl-C stops a sample, Ctrl-D quits."
GREETING = f"""The model continues your text. Only chat models answer (docs/GENERATE.md).
{QUIT}"""
CHAT_GREETING = f"The model answers your messages. {QUIT}"
HELP = '''/set NAME VALUE  change a setting, for example /set temperature 0.7
/set             show the settings
/retry           repeat the prompt with the next seed
/reset           restore the initial settings and seed
/help            show this list
"""              enclose a text of several lines, or one that starts with /'''
CHAT_HELP = HELP.replace("repeat the prompt", "answer the last message again").replace(
    "settings and seed\n",
    "settings and seed, forget the messages\n/save FILE       write the conversation as JSON\n",
)
QUOTES = '"""'
Message = dict[str, str]  # role, content
Answer = Callable[[GenerationConfig, str, int], None]  # settings, prompt, seed: prints the samples
Reply = Callable[[GenerationConfig, list[Message], int], str]  # settings, messages, seed: prints and returns an answer


class Conversation:
    """The settings and prompts of a user so far."""

    greeting, help = GREETING, HELP
    commands: tuple[str, ...] = ("help", "set", "retry", "reset")

    def __init__(self, params: GenerationConfig, seed: int, answer: Answer, check: Callable[[GenerationConfig], None]):
        """check raises UserError for settings that the model cannot follow."""
        self.params, self.seed, self.answer, self.check = params, seed, answer, check
        self.at_start, self.last = (params, seed), ""

    def ask(self, prompt: str) -> None:
        """Prints the samples of a prompt. The next prompt has other seeds."""
        self.last = prompt
        try:
            self.answer(self.params, prompt, self.seed)
        finally:
            self.seed += self.params.num_samples

    def command(self, line: str) -> None:
        """Runs a line that starts with /. Raises UserError."""
        name, value = [*line[1:].split(maxsplit=1), "", ""][:2]
        if name not in self.commands:
            hint = f"/help lists the commands; a text may start with / inside {QUOTES}"
            known = [f"/{one}" for one in self.commands]
            raise UserError(f"no command /{one_line(name)}; {did_you_mean(f'/{name}', known, hint)}")
        if name == "help":
            note(self.help)
        elif name == "set" and value:
            words = value.split(maxsplit=1)
            if len(words) < 2:
                raise UserError("/set needs a name and a value")
            self._set(*words)
        elif name == "set":
            note("\n".join(f"{key} {value!r}" for key, value in self._settings().items()))
        elif name == "save":
            self.save(value)
        elif value:
            raise UserError(f"/{name} does not accept a value")
        elif name == "retry":
            if not self.last:
                raise UserError("there is no prompt to repeat yet")
            self.retry()
        else:
            self.reset()

    def retry(self) -> None:
        self.ask(self.last)

    def reset(self) -> None:
        self.params, self.seed = self.at_start

    def save(self, file: str) -> None:
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        shown = flatten(self.params) | {"seed": self.seed}
        del shown["start"]  # each line is one
        return shown

    def _set(self, name: str, value: str) -> None:
        name = name.replace("-", "_")
        if name == "seed":
            if not value.isdecimal():
                raise UserError(f"seed={one_line(value)!r} is not valid: expected a whole number, 0 or more")
            self.seed = int(value)
            return
        known = self._settings()
        if name not in known:
            raise UserError(f"unknown setting {one_line(name)}; {did_you_mean(name, known, '/set lists the settings')}")
        params = build(GenerationConfig, dataclasses.asdict(self.params) | {name: value})
        params.validate()
        self.check(params)
        self.params = params


class Chat(Conversation):
    """A conversation with a chat model. It keeps the messages."""

    greeting, help = CHAT_GREETING, CHAT_HELP
    commands = (*Conversation.commands, "save")

    def __init__(self, params: GenerationConfig, seed: int, reply: Reply, check: Callable[[GenerationConfig], None],
                 system: str | None = None):  # fmt: skip
        """reply: prints and returns the answer to messages. system: the message of the system, if any."""
        super().__init__(params, seed, lambda *_: None, check)
        self.reply = reply
        self.start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)

    def ask(self, prompt: str) -> None:
        self.last = prompt
        self._answer([*self.messages, {"role": "user", "content": prompt}])

    def _answer(self, messages: list[Message]) -> None:
        """The conversation stays as it was if the answer fails or is interrupted."""
        try:
            text = self.reply(self.params, messages, self.seed)
        finally:
            self.seed += 1
        self.messages = [*messages, {"role": "assistant", "content": text}]

    def retry(self) -> None:
        is_answered = self.messages[-1:] and self.messages[-1]["role"] == "assistant"
        if is_answered and self.messages[-2]["content"] == self.last:
            self._answer(self.messages[:-1])
        else:
            self.ask(self.last)

    def reset(self) -> None:
        super().reset()
        self.messages, self.last = list(self.start), ""

    def save(self, file: str) -> None:
        """Writes the conversation as llm-prepare reads it."""
        if not file:
            raise UserError("/save needs the name of a file")
        if Path(file).exists():
            raise UserError(f"{file} exists: choose another name")
        try:
            write_whole(Path(file), (json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror or error}") from None
        note(f"saved {len(self.messages)} messages to {file}")


def converse(conversation: Conversation) -> int:
    """Reads prompts from standard input until it ends, and answers them. A bad prompt ends nothing."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):  # missing on Windows
            import readline  # noqa: F401  editing and history for input()

        note(conversation.greeting)
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8")
    while True:
        try:
            line = input("> " if at_terminal else "")
            quoted = at_terminal and line.startswith(QUOTES)
            prompt = _quoted(line) if quoted else line
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text ({error.reason}); convert it first") from None
        except EOFError:
            note("")
            return 0
        except KeyboardInterrupt:
            note("")
            if at_terminal:
                continue  # as in a shell, it drops the line
            return 0
        try:
            if at_terminal and not quoted and prompt.startswith("/"):
                conversation.command(prompt)
            elif prompt:
                conversation.ask(prompt)
        except UserError as error:
            note(f"error: {one_line(error, None)}")
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            note("")


def _quoted(line: str) -> str:
    """The text from the quotes that begin this line to the next ones, which may be on a later line."""
    text = line.removeprefix(QUOTES)
    while QUOTES not in text:
        text += "\n" + input("... ")
    return text.partition(QUOTES)[0]
