"""Conversations as training data: JSON lines with messages, or with a prompt and a completion, become tokens and a mark
for each token (see core/packing.py), by the chat template of the tokenizer."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.load import named_tokenizer
from ..core.chat import END, PLAIN, RUN_SECONDS, Message, read_template
from ..core.conversations import add_plain_template, encode_conversation, find_turn_ends
from ..core.packing import BEGINS, LEARNED, marked
from ..core.tokenizer import Tokenizer
from ..errors import AccessError, UserError, one_line
from ..machine.files import parse_json
from .options import PrepareOptions
from .shards import ShardWriter, close_writers, make_writers
from .sources import FileSource, Source
from .split import Split, choose_by_hash, hash_document
from .stores import reading

VERSION = 1  # of what is written for the same conversations
MAX_LINE = 4 << 20  # bytes of a conversation
BOM = b"\xef\xbb\xbf"  # of UTF-8
MAX_MESSAGES, MAX_ROLE = 1 << 10, 64  # a template is rendered up to each message of the assistant
FIELDS = "messages (a list of objects with role and content), or prompt and completion"
PAIR = ("prompt", "chosen", "rejected")
NO_TEXT = "is not a string, or a list of parts of type text"


def are_conversations(sources: list[Source], options: PrepareOptions, report: Callable[[str], None]) -> bool:
    """Whether the sources are conversations. Raises UserError if only some are, or if an option has no effect."""
    found = [(source, isinstance(source, FileSource) and is_conversations(source)) for source in sources]
    chat = [source for source, is_chat in found if is_chat and isinstance(source, FileSource)]
    others = [source for source, is_chat in found if is_chat is False]
    if chat and others:
        raise UserError(f"{chat[0].name} holds conversations, {others[0].name} does not: prepare them separately")
    if chat and (useless := options.given("lines", "separator", "encoding", "bad_files")):
        raise UserError(f"{chat[0].name} holds conversations: remove --{' and --'.join(useless)}")
    if not chat and options.chat_template is not None:
        raise UserError(f"--chat_template needs conversations: JSON lines with {FIELDS}")
    if chat:
        pairs = [file for file in chat if are_pairs(file)]
        if 0 < len(pairs) < len(chat):
            other = next(file for file in chat if file not in pairs)
            raise UserError(f"{pairs[0].name} holds pairs of answers, {other.name} does not: prepare them separately")
        what = "conversations (JSON lines with messages, or a prompt and a completion)"
        what = "pairs of answers (JSON lines with a prompt, chosen and rejected)" if pairs else what
        report(f"{chat[0].name}{', ...' * (len(chat) > 1)}: {what}")
    return bool(chat)


def is_conversations(source: FileSource) -> bool | None:
    """Whether the first line that is not blank is a conversation, or a pair of answers. A field named by --text_key
    makes it a text. None if the line is damaged: reading the file reports it."""
    fields = _first_fields(source)
    if fields is None:
        return None
    is_chat = "messages" in fields or {"prompt", "completion"} <= fields or fields.issuperset(PAIR)
    return is_chat and source.text_key not in fields


def are_pairs(source: FileSource) -> bool:
    """Whether a file with conversations holds pairs of answers."""
    return (_first_fields(source) or set()).issuperset(PAIR)


def _first_fields(source: FileSource) -> set[str] | None:
    """The fields of the first line that is not blank; empty if it is not an object, None if it is damaged. Raises
    AccessError."""
    if source.suffix != ".jsonl" and source.path.name != "stdin.txt":
        return set()
    try:
        with reading(source.name, source.url), source.open() as file:
            lines = (line.removeprefix(BOM).strip() for line in iter(lambda: file.readline(MAX_LINE), b""))
            line = next(filter(None, lines), b"")
    except AccessError:
        raise
    except UserError:
        return None
    try:
        row = parse_json(line)
    except (ValueError, RecursionError):
        return None if line and source.suffix == ".jsonl" else set()
    return set(row) if isinstance(row, dict) else set()


def conversations(source: FileSource) -> Iterator[tuple[str, list[Message]]]:
    """(file and line, messages) of every line; of a pair, first with the chosen and then with the rejected answer.
    Raises UserError with file and line for another line."""
    paired = are_pairs(source)
    with reading(source.name, source.url), source.open() as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where = f"{source.name}, line {number}"
            if len(line) > MAX_LINE:
                raise UserError(f"{where} is longer than {MAX_LINE >> 20} MiB: expected one conversation per line")
            line = line.removeprefix(BOM).strip()
            if not line:
                continue
            try:
                row = parse_json(line)
                for part in _sides(row) if paired else [row]:
                    yield where, messages_of(part)
            except RecursionError:
                raise UserError(f"{where} is nested too deeply: expected {FIELDS}") from None
            except ValueError as error:
                raise UserError(f"{where}: {one_line(error)}") from None


def _sides(row: Any) -> list[dict[str, Any]]:
    """A pair of answers as two conversations. Raises ValueError."""
    if not isinstance(row, dict) or not row.keys() >= set(PAIR):
        raise ValueError(f"expected an object with {', '.join(PAIR)}, as in the first line")
    return [{"prompt": row["prompt"], "completion": row[side]} for side in PAIR[1:]]


def messages_of(row: Any) -> list[Message]:
    """The messages of a conversation. Raises ValueError with the reason if it is not one, or if nothing is learned."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with {FIELDS}")
    if "messages" in row:
        given = row["messages"]
    elif "prompt" in row and "completion" in row:
        sides = [("prompt", "user"), ("completion", "assistant")]
        lists = [row[name] if isinstance(row[name], list) else [{"role": role, "content": row[name]}]
                 for name, role in sides]  # fmt: skip
        given = lists[0] + lists[1]
    else:
        raise ValueError(f"its fields are {', '.join(map(repr, row))[:100]}: expected {FIELDS}")
    if not isinstance(given, list) or not given:
        raise ValueError(f"messages is not a list of 1 to {MAX_MESSAGES} messages")
    if len(given) > MAX_MESSAGES:
        raise ValueError(f"{len(given):,} messages are more than {MAX_MESSAGES:,}: divide the conversation")
    messages = [_message(message, f"message {number}") for number, message in enumerate(given, 1)]
    if messages[0]["role"] == "assistant":
        raise ValueError("the first message is the assistant's: expected a message of the user or the system")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message has the role assistant, so there is nothing to train on")
    return messages


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict) or "role" not in given or "content" not in given:
        raise ValueError(f"{where} is not an object with role and content")
    role, content = given["role"], given["content"]
    if not isinstance(role, str) or not 0 < len(role) <= MAX_ROLE:
        raise ValueError(f"{where}: role is not a string of 1 to {MAX_ROLE} characters")
    if given.get("tool_calls") or given.get("function_call"):
        raise ValueError(f"{where} calls a tool, which is not supported")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise ValueError(f"{where}: content {NO_TEXT}")
    for name, text in (("role", role), ("content", content)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: character {error.start} of {name} is half of a surrogate pair") from None
    return {"role": role, "content": content}


def texts_of(sources: list[FileSource], ends: str) -> Iterator[str]:
    """The training text of a tokenizer: the messages, as the plain template writes them, and every role."""
    yield "System:\nUser:\nAssistant:\n"
    for source in sources:
        for _, messages in conversations(source):
            for message in messages:
                yield f"{message['role'].capitalize()}:\n{message['content']}{ends}\n"


def build(
    lists: list[list[FileSource]], name: str, template: str | None, rule: Split, folder: Path, shard_size: int,
    report: Callable[[str], None],
) -> tuple[Tokenizer, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Writes a dataset of conversations, which are read twice: to count them, and to encode them.

    lists: the files of train and of val, or of one that is split; name: of the tokenizer; template: --chat_template;
    rule: how one is split. Returns the tokenizer, and the manifest's entries: of the splits, and others. Raises
    UserError.
    """
    learns = name == "char" or name.startswith("bpe:")
    texts = (text for some in lists for text in texts_of(some, END if name == "char" else ""))
    tokenizer = named_tokenizer(name, texts if learns else None)
    paired = are_pairs(lists[0][0])
    hashes = [
        [
            hash_document(json.dumps(messages[:-1] if paired else messages), rule.seed)
            for source in some
            for _, messages in itertools.islice(conversations(source), None, None, 1 + paired)
        ]
        for some in lists
    ]
    if not all(hashes) or (len(lists) == 1 and len(hashes[0]) < 2):
        count = len(hashes[0])
        raise UserError(f"{lists[0][0].name}: {count} conversations are too few to split: add more, or --val_files")
    give_template(tokenizer, template, next(one for source in lists[0] for one in conversations(source)), report)
    mask = choose_by_hash(hashes[0], rule.fraction) if len(lists) == 1 else np.zeros(len(hashes[0]), dtype=bool)

    def split() -> Iterator[tuple[str, str, list[Message]]]:
        for group, some in enumerate(lists):
            each = (one for source in some for one in conversations(source))
            for number, (where, messages) in enumerate(each):
                # a file that grows meanwhile may have more
                number //= 1 + paired
                yield "val" if group or (number < len(mask) and mask[number]) else "train", where, messages

    splits, longest = write_conversations(tokenizer, split(), folder, shard_size, report, paired)
    tokenizer.save(folder)
    units = "preferences" if paired else "conversations"
    return tokenizer, splits, {"units": units, "longest": longest * (1 + paired), "split": rule.describe()}


def give_template(
    tokenizer: Tokenizer, file: str | None, first: tuple[str, list[Message]], report: Callable[[str], None]
) -> None:
    """The tokenizer's chat template: that of --chat_template, its own, or the plain one. first: the first conversation,
    by which the token is found that ends a turn. Raises UserError."""
    own = tokenizer.chat
    if file is not None:
        eot = "" if tokenizer.eot_id is None else tokenizer.decode([tokenizer.eot_id])
        tokenizer.chat = read_template(file, *([own.bos, own.eos] if own else [eot, eot]))
    elif own is None:
        add_plain_template(tokenizer)
    template = file or ("plain (the tokenizer does not have one)" if own is None else "the model's")
    report(f"chat template: {template}; only the assistant's turns count in the loss")
    assert tokenizer.chat is not None
    tokenizer.chat.total = RUN_SECONDS
    try:
        if tokenizer.chat.source != PLAIN and not find_turn_ends(tokenizer, first[1]):
            report("note: no single token ends a turn in this chat template, so the model will not know when to stop")
    except UserError as error:
        raise UserError(f"{first[0]}: {error}") from None


def write_conversations(
    tokenizer: Tokenizer, split: Iterator[tuple[str, str, list[Message]]], folder: Path, shard_size: int,
    report: Callable[[str], None], paired: bool = False,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """Writes the tokens and the marks of (split, file and line, messages). paired: of pairs of answers, of which only
    the last turn is learned. Returns the manifest's entries of the
    splits, and the tokens of the longest conversation. Raises UserError with file and line for messages that the
    template or the tokenizer rejects."""
    names = ("train", "val")
    tokens = make_writers(tokenizer, folder, shard_size, 0)
    marks = {name: ShardWriter(folder, f"{name}_marks", shard_size, np.dtype("u1")) for name in names}
    longest, count, reported, example = 0, 0, time.monotonic(), ""
    for name, where, messages in split:
        try:
            sequences = encode_conversation(tokenizer, messages)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        for ids, learned in sequences[-1:] if paired else sequences:
            if paired:
                learned[: np.flatnonzero(~learned)[-1]] = False
            mark = learned.astype(np.uint8) * LEARNED
            mark[0] |= BEGINS
            tokens[name].append(ids)
            marks[name].append(mark)
            longest = max(longest, len(ids))
            example = example or marked(tokenizer, ids, learned)
        tokens[name].text_bytes += sum(len(message["content"].encode()) for message in messages)
        count += 1
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            report(f"  {count:,} conversations so far")
    report(f"example (in the loss: >>...<<): {example}")
    splits = close_writers(tokenizer, tokens)
    return {name: splits[name] | {"marks": marks[name].close()["shards"]} for name in splits}, longest
