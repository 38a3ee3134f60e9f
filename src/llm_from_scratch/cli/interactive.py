"""The conversation of `llm-generate --interactive`: a prompt a line, and at a terminal the commands of /help."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from ..config import GenerationConfig
from ..errors import UserError, one_line
from ..machine.terminal import note
from ..presets import build
from ..settings import did_you_mean, flatten

GREETING = """The model continues your text. (Only chat models answer questions: see docs/SERVE.md.)
/help lists commands. Ctrl-C stops a sample, Ctrl-D quits."""
HELP = '''/set NAME VALUE  change a setting, for example /set temperature 0.7
/set             show the settings
/retry           repeat the prompt with the next seed
/reset           restore the initial settings and seed
/help            show this list
"""              enclose a text of several lines, or one that starts with /'''
QUOTES = '"""'
Answer = Callable[[GenerationConfig, str, int], None]  # settings, prompt, seed: prints the samples


class Conversation:
    """What a user has set and asked so far."""

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
        name, *words = line[1:].split(maxsplit=2) or [""]
        if name == "help":
            note(HELP)
        elif name == "set" and not words:
            note("\n".join(f"{key} {value!r}" for key, value in self._settings().items()))
        elif name == "set" and len(words) == 2:
            self._set(*words)
        elif words and name in ("retry", "reset"):
            raise UserError(f"/{name} does not accept a value")
        elif name == "retry" and self.last:
            self.ask(self.last)
        elif name == "reset":
            self.params, self.seed = self.at_start
        elif name in ("set", "retry"):
            raise UserError("/set needs a name and a value" if name == "set" else "there is no prompt to repeat yet")
        else:
            hint = f"/help lists them; a text may start with / inside {QUOTES}"
            known = ("/help", "/set", "/retry", "/reset")
            raise UserError(f"no command /{one_line(name)}; {did_you_mean(f'/{name}', known, hint)}")

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
            raise UserError(f"unknown setting {one_line(name)}; {did_you_mean(name, known, '/set lists them')}")
        params = build(GenerationConfig, dataclasses.asdict(self.params) | {name: value})
        params.validate()
        self.check(params)
        self.params = params


def converse(conversation: Conversation) -> int:
    """Reads prompts from standard input until it ends, and answers them. A bad prompt ends nothing."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):  # missing on Windows
            import readline  # noqa: F401  editing and history for input()

        note(GREETING)
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
