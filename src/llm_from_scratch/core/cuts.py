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


def divide(text: str, successor: bool) -> Iterator[str]:
    """Parts of a text that is too hard to encode whole: cut where the pattern of GPT-2, or of a successor, would cut,
    else in half."""
    cuts = set()
    for run in re.finditer(r"\s{1000,}", text):
        # GPT-2 joins the last space of a run to the next word; its successors first cut after the last line break
        line_end = max(text.rfind("\n", run.start(), run.end()), text.rfind("\r", run.start(), run.end())) + 1
        cuts |= {line_end} if successor else set()
        if line_end != run.end() or not successor:
            cuts.add(run.end() - (run.end() < len(text)))
    edges = sorted(cuts - {0, len(text)}) or [safe_cut(text, (len(text) + 1) // 2)]
    return (text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True))


def without_surrogates(text: str) -> str:
    """Lone surrogates, which UTF-8 does not have, become U+FFFD."""
    if text.isascii():  # a flag of the text
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
