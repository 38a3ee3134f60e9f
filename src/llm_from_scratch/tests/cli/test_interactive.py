"""The conversation of `llm-generate --interactive`: its commands, and what is not a command."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_from_scratch.cli.interactive import Chat, Conversation, converse
from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.data.chats import conversations
from llm_from_scratch.data.sources import FileSource
from llm_from_scratch.errors import UserError

Asked = list[tuple[float, str, int]]
Talk = Callable[..., tuple[Asked, str]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types lines; returns (temperature, prompt, seed) of each answer, and what was printed on standard error.
    None is Ctrl-C."""

    def typed(*lines: str | None, terminal: bool = True, made: Callable = Conversation) -> tuple[Asked, str]:
        rest, asked = iter(lines), Asked()

        def read(prompt: str = "") -> str:
            try:
                line = next(rest)
            except StopIteration:
                raise EOFError from None
            if line is None:
                raise KeyboardInterrupt
            return line

        def check(params: GenerationConfig) -> None:
            if params.max_new_tokens > 1000:
                raise UserError("too long for this model")

        monkeypatch.setattr(builtins, "input", read)
        if terminal:
            monkeypatch.setattr(sys, "stdin", Terminal())
            monkeypatch.setattr(sys, "stdout", Terminal())
        start = GenerationConfig(num_samples=2, temperature=0.5)
        answer = lambda params, prompt, seed: asked.append((params.temperature, prompt, seed))  # noqa: E731
        assert converse(made(start, 7, answer, check)) == 0
        return asked, capsys.readouterr().err

    return typed


def test_settings_are_changed_and_restored(talk: Talk) -> None:
    asked, errors = talk("a", "/set temperature 0.9", "b", "/set seed 3", "c", "/reset", "d")
    assert asked == [(0.5, "a", 7), (0.9, "b", 9), (0.9, "c", 3), (0.5, "d", 7)]
    assert "error" not in errors


def test_retry_uses_the_next_seed(talk: Talk) -> None:
    asked, errors = talk("/retry", "a", "/retry")
    assert asked == [(0.5, "a", 7), (0.5, "a", 9)]
    assert "error: there is no prompt to repeat yet" in errors


def test_several_lines_between_quotes(talk: Talk) -> None:
    asked, _ = talk('"""one', "two", 'three"""', '"""/not a command"""', '"""open')
    assert [prompt for _, prompt, _ in asked] == ["one\ntwo\nthree", "/not a command"]


def test_ctrl_c_drops_the_typed_line(talk: Talk) -> None:
    asked, _ = talk(None, '"""one', None, "a")
    assert [prompt for _, prompt, _ in asked] == ["a"]


def test_help_lists_every_command_and_the_settings(talk: Talk) -> None:
    asked, errors = talk("/help", "/set")
    assert not asked and "continues your text" in errors
    assert all(name in errors for name in ("/set", "/retry", "/reset", "/help", "temperature 0.5", "seed 7"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/", "no command /; /help lists the commands"),
        ("/hlep", "no command /hlep; did you mean /help?"),
        ("/usr/bin", "no command /usr/bin; /help lists the commands"),
        ("/set temprature 1", "unknown setting temprature; did you mean temperature?"),
        ("/set max_iters 5", "unknown setting max_iters; "),
        ("/set device cuda", "unknown setting device; /set lists the settings"),
        ("/set start x", "unknown setting start; "),
        ("/set seed -3", "seed='-3' is not valid"),
        ("/set seed abc", "seed='abc' is not valid"),
        ("/retry 3", "/retry does not accept a value"),
        ("/reset now", "/reset does not accept a value"),
        ("/set temperature hot", "temperature='hot' is not valid"),
        ("/set temperature -1", "temperature=-1.0"),
        ("/set temperature", "/set needs a name and a value"),
        ("/set max_new_tokens 5000", "too long for this model"),
    ],
)
def test_a_mistake_changes_nothing(talk: Talk, line: str, message: str) -> None:
    asked, errors = talk(line, "a")
    assert asked == [(0.5, "a", 7)]
    assert f"error: {message}" in errors and "Traceback" not in errors


def test_commands_are_not_read_from_a_pipe(talk: Talk) -> None:
    assert [prompt for _, prompt, _ in talk("/help", '"""a', terminal=False)[0]] == ["/help", '"""a']


def chat(seen: list[tuple[list[str], int]], fails: int | None = None, **options: str) -> Callable[..., Chat]:
    """A chat whose answers count the messages; Ctrl-C interrupts the one of seed `fails`. seen: gets all contents."""

    def reply(params: GenerationConfig, messages: list[dict[str, str]], seed: int) -> str:
        seen.append(([m["content"] for m in messages], seed))
        if seed == fails:
            raise KeyboardInterrupt
        return f"answer {len(seen)}"

    return lambda params, seed, _, check: Chat(params, seed, reply, check, **options)


def test_a_chat_keeps_its_messages(talk: Talk) -> None:
    seen: list[tuple[list[str], int]] = []
    _, errors = talk("a", "b", "/retry", "/retry", "/reset", "/retry", "c", made=chat(seen, system="s"))
    told = ["s", "a", "answer 1", "b"]
    assert seen == [(["s", "a"], 7), (told, 8), (told, 9), (told, 10), (["s", "c"], 7)]
    assert "error: there is no prompt to repeat yet" in errors and "answers your messages" in errors


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(talk: Talk) -> None:
    seen: list[tuple[list[str], int]] = []
    talk("a", "b", "c", "/retry", made=chat(seen, fails=8))
    assert seen == [
        (["a"], 7), (["a", "answer 1", "b"], 8), (["a", "answer 1", "c"], 9), (["a", "answer 1", "c"], 10)
    ]  # fmt: skip


def test_a_conversation_is_saved_for_training(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    _, errors = talk("é?", "/save", f"/save {file}", f"/save {file}", f"/save {file}/x", made=chat([]))
    assert [messages for _, messages in conversations(FileSource(file))] == [
        [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "answer 1"}]
    ]
    for message in ("/save needs the name of a file", f"{file} exists", "cannot write", "saved 2 messages"):
        assert message in errors
    assert "no command /save; " in talk("/save x")[1]
