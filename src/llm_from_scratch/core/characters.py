"""Characters and their ids, for the tokenizer char."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

ASCII, INNER = bytes(range(128)), bytes(range(128, 192))  # INNER: the bytes of UTF-8 that continue a character
OTHER = 255  # in place of the id of a character that is not ASCII


class CharTable:
    """The ids of characters: their positions in `chars`, and len(chars) for unknown ones."""

    def __init__(self, chars: str) -> None:
        self.codes = np.frombuffer(chars.encode("utf-32-le"), "<u4")
        # code point -> id. All after the last one are unknown
        self.ids = np.full(int(self.codes.max()) + 2, len(chars), np.min_scalar_type(len(chars)))
        self.ids[self.codes] = np.arange(len(chars))
        # For bytes.translate, several times as fast, if the ids of ASCII fit in a byte
        ids = self.ids.take(range(128), mode="clip")
        is_known = ids < len(chars)
        fits = ids[is_known].max(initial=0) < OTHER
        self.ascii = np.where(is_known, ids, OTHER).astype("u1").tobytes().ljust(256, b"\xff") if fits else b""

    def encode(self, text: str) -> np.ndarray:
        """Shape (len(text),), of unsigned integers. Raises UnicodeEncodeError for a lone surrogate."""
        ids = self._encode_ascii(text)
        return self.ids.take(code_points(text), mode="clip") if ids is None else ids

    def _encode_ascii(self, text: str) -> np.ndarray | None:
        """The ids of a text in which few characters are not ASCII. None for other texts, and for unknown ASCII."""
        data = text.encode()
        if not self.ascii or 8 * (len(data) - len(text)) > len(text):
            return None
        if len(data) == len(text):
            known = data.translate(self.ascii)
            return np.frombuffer(known, "u1") if OTHER not in known else None
        ids = np.frombuffer(data.translate(self.ascii, INNER), "u1")  # of the first byte of each character
        others = np.flatnonzero(ids == OTHER)
        if len(others):
            codes = points_beyond_ascii(data)
            if len(codes) != len(others):
                return None
            ids = ids.astype(self.ids.dtype)
            ids[others] = self.ids.take(codes, mode="clip")
        return ids


def characters_of(texts: Iterable[str]) -> str:
    """The sorted characters of all texts."""
    seen, known = np.zeros(0x110000, dtype=bool), b""
    for text in texts:
        data = text.encode()
        known += bytes(set(data.translate(None, known)))  # most texts have no new byte
        if not text.isascii():
            seen[points_beyond_ascii(data)] = True
    seen[[byte for byte in known if byte in ASCII]] = True
    return np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le")


def code_points(text: str) -> np.ndarray:
    """Shape (len(text),), of integers. Raises UnicodeEncodeError for a lone surrogate."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def points_beyond_ascii(data: bytes) -> np.ndarray:
    """The code points of a text in UTF-8 that are not ASCII, in order."""
    return code_points(data.translate(None, ASCII).decode())
