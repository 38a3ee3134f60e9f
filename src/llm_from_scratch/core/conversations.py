"""Conversations as tokens: the plain template, what ends a turn, and which tokens a model learns."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from .chat import END, PLAIN, ChatTemplate, Message
from .tokenizer import Tokenizer


def add_plain_template(tokenizer: Tokenizer) -> None:
    """Gives a tokenizer the plain template. Raises UserError if it has no token that could end a turn."""
    eos = END if tokenizer.eot_id is None else tokenizer.decode([tokenizer.eot_id])
    ids: Any = []
    with contextlib.suppress(UserError):  # a char vocabulary without it
        ids = tokenizer.encode(eos, allow_special=True)
    if len(ids) != 1:
        raise UserError(
            f"the {tokenizer.name} tokenizer does not have a token that ends a turn, which conversations need: use "
            "another, for example --tokenizer=byte or bpe:4096"
        )
    tokenizer.chat, tokenizer.ends = ChatTemplate(PLAIN, "", eos), tokenizer.ends | {int(ids[0])}


def find_turn_ends(tokenizer: Tokenizer, messages: Sequence[Message]) -> bool:
    """Adds the special token that ends the assistant's turns to the tokenizer's ends. messages: a conversation. Returns
    whether there is one."""
    ids, learned = encode_conversation(tokenizer, messages)[-1]
    for i in reversed(ids[learned].tolist()):
        text = tokenizer.decode([i])
        if tokenizer.encode(text, allow_special=True).tolist() == [i] != tokenizer.encode(text).tolist():
            tokenizer.ends |= {i}
            return True
    return bool(tokenizer.end_ids & set(ids[learned].tolist()))


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, whether each is learned) of a conversation: the assistant's turns with their ends are learned.

    Usually one sequence. If the template writes earlier turns differently once the conversation continues (as one
    that drops earlier reasoning does), one for each turn of the assistant. Raises UserError if the template rejects the
    messages.
    """
    assert tokenizer.chat is not None
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    parts = tokenizer.chat.render_parts(messages, [(i + k, not k) for i in turns for k in (0, 1)])
    text, spans = "", list[tuple[int, int]]()
    separate: list[tuple[np.ndarray, np.ndarray]] = []  # the turns, if they are not those of one text
    for (kept, prompt), (same, turn) in zip(parts[::2], parts[1::2], strict=True):
        begin = kept + len(prompt)
        if same != begin or not turn:
            raise UserError(
                "with add_generation_prompt=True, the chat template begins the assistant's turn differently: use "
                "another --chat_template"
            )
        after = text[:kept] + prompt + turn
        if not separate and not after.startswith(text):
            separate = [_encode(tokenizer, text[: span[1]], [span]) for span in spans]
        spans.append((begin, len(after)))
        if separate:
            separate.append(_encode(tokenizer, after, spans[-1:]))
        text = after
    return separate or ([_encode(tokenizer, text, spans)] if spans else [])


def _encode(tokenizer: Tokenizer, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a text, and whether they are in one of the spans, up to the token that ends the turn. The last span
    ends with the text."""
    cuts = [cut for span in spans for cut in span]
    ids = tokenizer.encode(text, allow_special=True)
    parts = [tokenizer.encode(text[a:b], allow_special=True) for a, b in zip([0, *cuts], cuts, strict=False)]
    joined, edges = np.concatenate(parts), np.cumsum([len(part) for part in parts]).tolist()
    if not np.array_equal(ids, joined):
        heads = _heads(tokenizer, text, cuts, ids)
        # without them, a token would span the border between a prompt and the answer: the model is never asked for it
        ids, edges = (joined, edges) if heads is None else (ids, heads)
    learned, ends = np.zeros(len(ids), dtype=bool), list(tokenizer.end_ids)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        found = np.flatnonzero(np.isin(ids[begin:end], ends))
        learned[begin : begin + found[-1] + 1 if len(found) else end] = True
    last = int(np.flatnonzero(learned)[-1]) + 1
    return ids[:last], learned[:last]


def _heads(tokenizer: Tokenizer, text: str, cuts: list[int], ids: np.ndarray) -> list[int] | None:
    """How many tokens the text has up to each cut; None if they are not the first ones of ids."""
    edges = []
    for cut in cuts:
        head = tokenizer.encode(text[:cut], allow_special=True)
        if not np.array_equal(ids[: len(head)], head):
            return None
        edges.append(len(head))
    return edges
