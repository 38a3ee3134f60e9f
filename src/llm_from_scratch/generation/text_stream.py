"""Tokens to text during generation: whole characters, and stop sequences."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence

from ..core.tokenizer import TiktokenTokenizer, Tokenizer
from ..errors import UserError


class TextStream:
    """Tokens to text as they arrive: whole characters only, without any part of a possible stop sequence.

    bytes_of(before, token): the bytes that a token adds after the previous token. ends: tokens that end the text.
    """

    def __init__(
        self, bytes_of: Callable[[int, int], bytes], before: int, stop: str | Sequence[str] = (),
        ends: Collection[int] = (),
    ):  # fmt: skip
        self.bytes_of, self.before, self.ends = bytes_of, before, ends
        self.stop = tuple(filter(None, [stop] if isinstance(stop, str) else stop))
        self.tokens: list[int] = []
        self.text = ""  # final text
        self.held = ""  # a possible beginning of a stop sequence
        self.stopped = False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Adds a token. Returns the text that has become final. Tokens after the end are dropped."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        if token in self.ends:
            text = self.finish()
            self.stopped = True
            return text
        text = self.utf8.decode(self.bytes_of(self.before, token))
        self.before = token
        return self._give(text)

    def finish(self) -> str:
        """Returns the held-back text; an incomplete character becomes U+FFFD."""
        return self._give(self.utf8.decode(b"", final=True), final=True)

    def _give(self, text: str, final: bool = False) -> str:
        held = "" if self.stopped else self.held + text
        found = [at for at in map(held.find, self.stop) if at >= 0]
        sure = min(found) if found else len(held) - (0 if final else self._begun(held))
        self.stopped, self.held = self.stopped or bool(found), "" if found else held[sure:]
        self.text += held[:sure]
        return held[:sure]

    def _begun(self, held: str) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop sequence."""
        longest = min(max(map(len, self.stop), default=1) - 1, len(held))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(held[-n:]) for s in self.stop)), 0)


def unused_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids without a token: the vocabularies after GPT-2's have gaps."""

    def stands_for_nothing(ids: Sequence[int]) -> bool:
        try:
            tokenizer.decode_bytes(ids)
        except UserError:
            return True
        return False

    every = range(tokenizer.vocab_size)
    has_gaps = isinstance(tokenizer, TiktokenTokenizer) and stands_for_nothing(every)
    return [i for i in every if stands_for_nothing([i])] if has_gaps else []
