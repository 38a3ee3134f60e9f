"""BPE by the optional package gigatoken, many times as fast as tiktoken and tokenizers. It is used only while its
results equal theirs."""

from __future__ import annotations

import functools
import json
import os
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..core.characters import points_beyond_ascii
from ..core.cuts import cut_text, without_surrogates
from ..core.tokenizer import RANKS_FILE, TRAINED_PART, HFTokenizer, TiktokenTokenizer, Tokenizer
from ..core.vocab_files import EOT, byte_to_char
from ..errors import EncoderDiffersError, UserError, one_line
from ..machine.extras import is_installed
from ..machine.processes import end_with_parent, shield_children

FAST_FROM = 8 << 20  # bytes of input from which loading it takes less time than it saves
RENEW = 128 << 20  # bytes of text after which its cache of words is dropped
PATTERNS = {"gpt2": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}  # its names
SEPARATOR = b"\xff"  # of the parts of a text; UTF-8 does not have this byte
COMPARED, FEW = 1 << 20, 1024  # characters and ids with which a training is compared
MAX_ADDED = 64  # special tokens that are tried as text

# Texts on which implementations are likely to differ
HARD_TEXTS = (
    "Hello, world! I'll say it's DON'T can't we'Ve'S 'twas y'all'd've",
    " leading, trailing  \n\n  \r\n\t\t x\ty \r z\r\n\r\n ", "a" * 300 + " " * 200 + "b" + "\n" * 100 + "=" * 150,
    " \n", "\n ", "0 12 345 6789 1,234.56 0x1F 1e-9 \u0661\u0662\u0663 ४५६ ½ Ⅷ ²³",
    "<|endoftext|> <|fim_prefix|><|im_start|> </s> <s> [INST] <0x41>",
    "naïve café cafe\u0301 e\u0301\u0301 Å A\u030a ﬁ ß ẞ İstanbul ıI ŉ Ǆǅǆ",
    "日本語のテキスト。中文字符，한국어 텍스트! ｆｕｌｌ\u3000ｗｉｄｔｈ",
    ("\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0646\u0635 \u200f\u0639\u0628\u0631\u05d9\u05ea\u200e ह\u093fन"
     "\u094dद\u0940 म\u0947\u0902 ไทยไม\u0e48ม\u0e35วรรค မ\u103cန\u103aမ\u102c"),
    "😀👩\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈👍\U0001f3fd🇩🇪 x😀y 🧑\u200d💻",
    "\xa0\u2003\u2028\u2029\u3000\u200b\ufeff\xad\x85 .", "\x00 \x01\x02\x1b[0m\x7f\x80\x9f�\ufffe\U0010ffff \ue000",
    "𝐀𝒜𝔄 𐍈 𠀀𪚥 \u0300\u0301 \u05d0\u05b7 각",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}\n\n\n\tif not x != y: pass  # TODO\n",
    "camelCaseHTTPServer2XML snake_case_Name ABCdef AbC dEF",
    "http://a.b/c?d=e&f=%20#g user@example.com C:\\path\\to \"quoted\" `code` $x_1^2$",
    "...!!!???---___***###   --> <-- == != /* */ //", "\u1680\u180e\u2000 \u202f\u205fx", "", " ", "x", "é", "\n",
    "'", "'s", " 's", "\u2019s I\u2019m", "ſ'ſ K's", "a\x00b", "   a", "\t\ta", "1" * 40, "é" * 33, "的" * 70,
    "\u0308" * 20,
)  # fmt: skip


@functools.cache
def uncertain(normalized: bool) -> np.ndarray:
    """Code points on which libraries with different versions of Unicode may disagree: not defined by this
    Python, and perhaps letters; normalized: also code points that tokenizers and Python normalize differently. The last
    entry is for all later code points."""
    found = np.array([unicodedata.category(chr(code)) == "Cn" for code in range(0x2FFFF)] + [True])
    if normalized:
        from tokenizers.normalizers import NFKD

        normalize = NFKD().normalize_str
        for code, char in enumerate(map(chr, range(0x2FFFF))):
            if unicodedata.combining(char) or unicodedata.decomposition(char):
                text = f"a\u0301{char}\u0334"  # between marks that belong behind and before it
                if normalize(text) != unicodedata.normalize("NFKD", text):
                    # also the first of those that NFC makes it of
                    found[[code, ord(unicodedata.normalize("NFD", char)[0])]] = True
    return found


def may_differ(data: bytes, normalized: bool = False) -> bool:
    """data: a text as UTF-8. normalized: the tokenizer changes a text to a normal form first."""
    if data.isascii():
        return False
    return bool(uncertain(normalized).take(points_beyond_ascii(data), mode="clip").any())


def can_encode(tokenizer: Tokenizer) -> bool:
    """Whether the package is installed and the tokenizer is of a kind that it may encode."""
    return isinstance(tokenizer, (TiktokenTokenizer, HFTokenizer)) and is_installed("gigatoken")


class FastTokenizer:
    """Encodes as a tokenizer does. Raises EncoderDiffersError if it does not."""

    def __init__(self, tokenizer: Tokenizer, saved: Path) -> None:
        """saved: the folder with the tokenizer's files."""
        self.tokenizer, self.saved = tokenizer, saved
        self.eot_id, self.dtype, self.vocab_size = tokenizer.eot_id, tokenizer.dtype, tokenizer.vocab_size
        self._load()
        added = [token.decode("utf-8", "replace") for token in getattr(tokenizer, "_added", {}).values()][:MAX_ADDED]
        for text in (*HARD_TEXTS, "".join(HARD_TEXTS), *added, *(f"a{token}b {token} c" for token in added)):
            self.compare(text)

    def _load(self) -> None:
        self.encoded, self.normalized = 0, False
        try:
            import gigatoken

            if isinstance(self.tokenizer, TiktokenTokenizer):
                # with special tokens, it would always recognize them in text
                pattern, path = PATTERNS[self.tokenizer.name], self.saved / RANKS_FILE
                self._backend = gigatoken.Tokenizer.from_tiktoken(str(path), pattern, {})
            else:
                assert isinstance(self.tokenizer, HFTokenizer)
                body = json.loads(self.tokenizer.json_text)
                self.normalized = bool(body.get("normalizer"))
                body["added_tokens"] = [token for token in body.get("added_tokens", []) if not token.get("special")]
                self._backend = gigatoken.Tokenizer.from_json(json.dumps(body))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a Rust panic is not an Exception
            reason = one_line(error) or type(error).__name__
            raise EncoderDiffersError(f"gigatoken cannot encode with {self.tokenizer.name} ({reason})") from None

    def encode(self, text: str) -> np.ndarray:
        """The ids in the library's type: a unit casts all of its ids at once."""
        try:
            data = text.encode()
        except UnicodeEncodeError:  # as in Tokenizer.encode
            text = without_surrogates(text)
            data = text.encode()
        if may_differ(data, self.normalized):
            return self.tokenizer.encode(text)
        try:
            ids: Any = self._backend.encode(data)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise EncoderDiffersError(f"gigatoken failed ({one_line(error)})") from None
        self.encoded += len(data)
        if self.encoded > RENEW:
            self._load()
        return np.asarray(ids)

    encode_uncast = encode

    def compare(self, text: str) -> None:
        """Raises EncoderDiffersError if the ids of a text differ from the tokenizer's."""
        if not np.array_equal(self.encode(text), self.tokenizer.encode(text)):
            raise EncoderDiffersError(f"gigatoken's ids differ from {self.tokenizer.name}'s for {text[:40]!r}")


def train(name: str, texts: Iterable[str], folder: Path, report: Callable[[str], None]) -> HFTokenizer | None:
    """The tokenizer bpe:N that HFTokenizer.train gives, in less time. folder: for a copy of the texts, which is
    deleted. None if the package is missing or fails, or if it finds other merges in the first part of the texts."""
    size = name.partition(":")[2]
    if not (is_installed("gigatoken") and size.isdecimal() and int(size) > 256):
        return None
    spool, beginning, characters, first = folder / "texts", folder / "texts-beginning", 0, list[str]()
    try:
        with spool.open("wb") as file, beginning.open("wb") as small:
            for part in (part for text in texts for part in cut_text(text, TRAINED_PART)):
                data = part.encode()
                if may_differ(data):
                    raise EncoderDiffersError("the text has characters that this Python's Unicode does not define")
                file.write(data + SEPARATOR)
                if characters < COMPARED:
                    small.write(data + SEPARATOR)
                    first.append(part)
                characters += len(part)
        shield_children()
        with ProcessPoolExecutor(1, get_context("spawn"), silence) as pool:
            few = min(int(size), FEW)
            if (
                with_merges(pool.submit(find_merges, beginning, few).result())
                != HFTokenizer.train(first, few).json_text
            ):
                raise EncoderDiffersError("its merges differ")
            return HFTokenizer(with_merges(pool.submit(find_merges, spool, int(size)).result()), "bpe", 0)
    except UserError:  # of the texts
        raise
    except Exception as error:
        report(f"gigatoken cannot train {name} ({one_line(error)}): using tokenizers")
        return None
    finally:
        spool.unlink(missing_ok=True)
        beginning.unlink(missing_ok=True)


def silence() -> None:
    """In the child process: the library prints its progress."""
    end_with_parent()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def find_merges(path: Path, size: int) -> list[tuple[bytes, bytes]]:
    """In the child process."""
    from gigatoken.gigatoken_rs import train_bpe

    vocabulary, merges = train_bpe(path, size, [EOT], separator=SEPARATOR)
    if len(set(vocabulary.values())) < len(vocabulary):  # tokenizers gives such a token one id
        raise EncoderDiffersError("two of its merges give the same token")
    return merges


def with_merges(merges: list[tuple[bytes, bytes]]) -> str:
    """The definition that HFTokenizer.train gives if it finds these merges."""
    chars = byte_to_char()
    pairs = [("".join(chars[b] for b in left), "".join(chars[b] for b in right)) for left, right in merges]
    tokens = [EOT, *sorted(chars), *(left + right for left, right in pairs)]
    backend = HFTokenizer.untrained(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs)
    backend.add_special_tokens([EOT])
    return backend.to_str()
