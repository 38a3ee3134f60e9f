"""Characters and their ids, for the tokenizer char."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import numpy as np

ASCII, INNER = bytes(range(128)), bytes(range(128, 192))  # INNER: the bytes of UTF-8 that continue a character
INNER_END = -64  # as signed bytes, those of INNER are smaller
CHECKED = 1 << 15  # bytes
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
    alphabet = Alphabet()
    for text in texts:
        alphabet.add(text.encode())
    return alphabet.characters()


class Alphabet:
    """The characters of texts in UTF-8."""

    def __init__(self) -> None:
        self._ascii, self._others = b"", np.zeros(0x110000, dtype=bool)

    def add(self, data: bytes) -> None:
        """data: whole characters. Raises UnicodeDecodeError."""
        rest = data.translate(None, self._ascii)  # mostly empty
        if rest:
            self._ascii += bytes({*rest} & {*ASCII})
            self._others[points_beyond_ascii(rest)] = True

    def characters(self) -> str:
        """The sorted characters so far."""
        self._others[list(self._ascii)] = True
        return np.flatnonzero(self._others).astype("<u4").tobytes().decode("utf-32-le")


class TextScan:
    """Counts the characters of a UTF-8 file that arrives in blocks: a line break is one character, a byte order mark at
    the beginning none. alphabet: finds which characters there are, too."""

    def __init__(self, alphabet: bool) -> None:
        self.count = 0
        self._alphabet = Alphabet() if alphabet else None
        self._begun, self._held = False, b""  # held: the first bytes, then half of a character or line break

    def add(self, block: bytes, last: bool = False) -> None:
        """Raises UnicodeDecodeError if it is not UTF-8."""
        block = self._held + block
        if len(block) < len(codecs.BOM_UTF8) and not last:
            self._held = block
            return
        if not self._begun:
            self._begun, block = True, block.removeprefix(codecs.BOM_UTF8)
        rest = begun_character(block)
        if last:
            rest.decode()  # raises
        elif block.endswith(b"\r"):
            rest = b"\r"
        block, self._held = block[: len(block) - len(rest)], rest
        self.count += int(np.count_nonzero(np.frombuffer(block, np.int8) >= INNER_END))
        self.count -= block.count(b"\r\n") if b"\r" in block else 0
        if self._alphabet is not None:
            self._alphabet.add(block)

    def characters(self) -> str | None:
        """The sorted characters; None if they were not wanted."""
        if self._alphabet is None:
            return None
        found = self._alphabet.characters()
        return "".join(sorted({*found.replace("\r", "\n")}))


def begun_character(data: bytes) -> bytes:
    """The part of a character at the end of a text in UTF-8. Raises UnicodeDecodeError. Decodes short parts: most
    are ASCII."""
    rest = b""
    for begin in range(0, len(data), CHECKED):
        part = rest + data[begin : begin + CHECKED]
        rest = b"" if part.isascii() else part[codecs.utf_8_decode(part, "strict", False)[1] :]
    return rest


def code_points(text: str) -> np.ndarray:
    """Shape (len(text),), of integers. Raises UnicodeEncodeError for a lone surrogate."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def points_beyond_ascii(data: bytes) -> np.ndarray:
    """The code points of a text in UTF-8 that are not ASCII, in order."""
    return code_points(data.translate(None, ASCII).decode())
