"""Places where a text can be cut without changing its tokens; lone surrogates."""

from __future__ import annotations

import re
from collections.abc import Iterator

# The patterns of GPT-2 and its successors always cut there. The first that occurs is used.
PLACES = tuple(
    re.compile(place)
    for place in (
        r"(?<=[^\W_])(?=\s)",  # after a word, before white space
        r"(?<=\S)(?=[ \t])",  # after a word or punctuation, before a space: successors join punctuation and line breaks
        r"(?<=[A-Za-z])(?=[!-&(-/:-@\[-^`{-~])",  # after a letter, before punctuation: successors join 's and a word
    )
)


def safe_cut(text: str, limit: int) -> int:
    """The last place below limit where a cut does not change the tokens, else limit."""
    for window in (1 << 10, 1 << 16, limit):
        for place in PLACES:
            ends = [m.start() for m in place.finditer(text[max(0, limit - window) : limit])]
            if ends:
                return max(0, limit - window) + ends[-1]
    return limit


def cut_text(text: str, size: int) -> Iterator[str]:
    """Cuts a text into parts of at most `size` characters without changing its tokens."""
    start = 0
    while len(text) - start > size:
        end = start + safe_cut(text[start : start + size], size)
        yield text[start:end]
        start = end
    yield text[start:]


def without_surrogates(text: str) -> str:
    """Lone surrogates, which UTF-8 does not have, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
