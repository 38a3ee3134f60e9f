"""Filters of documents: each returns the text, perhaps changed, or the reason why it is removed.

Words are divided by white space, so that no language model is needed."""

from __future__ import annotations

import functools
import ipaddress
import re
import string
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ..errors import Removed, UserError
from ..machine.extras import missing
from .hashes import runs_of_words
from .options import PrepareOptions

SHARED_WORDS = 13  # in a row with an evaluation text, as for GPT-3
READ = 4000  # characters by which a language is recognized
PUNCTUATION = frozenset(string.punctuation + "–—‘’“”…•·«»„¡¿、。，！？：；（）")


Filter = Callable[[str], str]


# Quality: the rules of Gopher (Rae et al. 2021, table A1) and of C4 (Raffel et al. 2020, section 2.2)

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


def gopher(text: str) -> str:
    words, lines = text.split(), text.splitlines()
    real = [word for word in words if not PUNCTUATION.issuperset(word)]
    if not 50 <= len(real) <= 100_000:
        raise Removed(f"gopher: {'fewer than 50' if len(real) < 50 else 'more than 100,000'} words")
    if not 3 <= sum(map(len, real)) / len(real) <= 10:
        raise Removed("gopher: mean word length is not 3 to 10")
    if max(text.count("#"), text.count("...") + text.count("…")) > 0.1 * len(words):
        raise Removed("gopher: too many # or ...")
    if sum(line.lstrip().startswith(("•", "-")) for line in lines) > 0.9 * len(lines):
        raise Removed("gopher: nearly all lines are bullet points")
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        raise Removed("gopher: too many lines end with ...")
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        raise Removed("gopher: too few words with a letter")
    if len(STOP_WORDS.intersection(words)) < 2:
        raise Removed("gopher: fewer than 2 of its stop words")
    return text


CITATION = re.compile(r"\[(?:\d{0,6}|edit|citation needed)\]")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")


def c4(text: str) -> str:
    kept, sentences = [], 0
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        if any(len(word) > 1000 for word in words):
            continue
        line = CITATION.sub("", line)
        if not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...") or len(words) < 3:
            continue
        small = line.lower()
        if "lorem ipsum" in small:
            raise Removed("c4: lorem ipsum")
        if "javascript" in small:
            continue
        if "{" in line:
            raise Removed("c4: a curly bracket")
        if any(phrase in small for phrase in POLICY):
            continue
        sentences += count_sentences(line)
        kept.append(line)
    if sentences < 5:
        raise Removed("c4: fewer than 5 sentences")
    return "\n".join(kept)


def count_sentences(line: str) -> int:
    return max(1, len(SENTENCE_END.findall(line)))


# Personal data

EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
IP = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
PHONE = re.compile(r"(?<![\w+])\+\d{1,3}[ .\-/]?(?:\(\d{1,4}\)[ .\-/]?)?\d(?:[ .\-/]?\d){5,12}(?!\d)")
CARD = re.compile(r"(?<![\d.\-])\d(?:[ -]?\d){12,18}(?![\d.\-]*\d)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")


def mask(text: str) -> str:
    """E-mail and public IPv4 addresses, phone numbers with a country code, numbers of bank cards and accounts."""
    if "@" in text:
        text = EMAIL.sub("<EMAIL>", text)
    text = IP.sub(lambda found: "<IP_ADDRESS>" if _is_public(found[0]) else found[0], text)
    text = IBAN.sub(lambda found: "<ACCOUNT>" if _is_iban(found[0]) else found[0], text)
    text = CARD.sub(lambda found: "<CARD>" if _is_card(found[0]) else found[0], text)
    return PHONE.sub("<PHONE>", text) if "+" in text else text


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _is_card(number: str) -> bool:
    """Luhn's checksum."""
    digits = [int(char) for char in number if char.isdigit()][::-1]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(number: str) -> bool:
    """ISO 13616's checksum."""
    number = number.replace(" ", "")
    return 15 <= len(number) <= 34 and int("".join(str(int(char, 36)) for char in number[4:] + number[:4])) % 97 == 1


# The others


def recognize(text: str) -> str:
    """The two-letter code of a text's language."""
    try:
        import py3langid
    except ImportError:
        raise missing("py3langid", "clean", "--language: recognizing languages") from None
    return py3langid.classify(text[:READ])[0]


def in_languages(names: tuple[str, ...]) -> Filter:
    def check(text: str) -> str:
        if (found := recognize(text)) not in names:
            raise Removed(f"language: {found}")
        return text

    return check


def of_length(shortest: int, longest: int | None) -> Filter:
    def check(text: str) -> str:
        if len(text) < shortest:
            raise Removed(f"length: fewer than {shortest:,} characters")
        if longest is not None and len(text) > longest:
            raise Removed(f"length: more than {longest:,} characters")
        return text

    return check


def without(evaluation: np.ndarray) -> Filter:
    """evaluation: the sorted hashes of all runs of words in evaluation texts."""

    def check(text: str) -> str:
        runs, _ = runs_of_words([text], SHARED_WORDS)
        if len(runs) and len(evaluation):
            at = np.minimum(np.searchsorted(evaluation, runs), len(evaluation) - 1)
            if (evaluation[at] == runs).any():
                raise Removed(f"contamination: {SHARED_WORDS} words of an evaluation text")
        return text

    return check


def evaluation_runs(texts: Iterable[str]) -> np.ndarray:
    """Raises UserError if no text has enough words."""
    runs = [found for text in texts if len(found := runs_of_words([text], SHARED_WORDS)[0])]
    if not runs:
        raise UserError(f"--decontaminate: no evaluation text has {SHARED_WORDS} words")
    return np.unique(np.concatenate(runs))


QUALITY: dict[str, Filter] = {"gopher": gopher, "c4": c4}


@dataclass
class Cleaner:
    """The filters that options choose, in order, and what they changed. Called with a text, it returns the cleaned one
    or raises Removed."""

    options: PrepareOptions
    evaluation: np.ndarray | None = None
    changed: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = self.options
        steps: list[tuple[str, Filter]] = []
        if (form := options.unicode) != "none":
            steps.append((f"Unicode {form}", functools.partial(unicodedata.normalize, form)))
        if options.language:
            steps.append(("language", in_languages(options.language)))
        steps += [(name, QUALITY[name]) for name in options.quality]
        if options.personal_data == "mask":
            steps.append(("personal data", mask))
        if options.min_chars or options.max_chars is not None:
            steps.append(("length", of_length(options.min_chars, options.max_chars)))
        if self.evaluation is not None:
            steps.append(("contamination", without(self.evaluation)))
        self.steps = steps

    def __call__(self, text: str) -> str:
        for name, step in self.steps:
            before, text = text, step(text)
            if text != before:
                self.changed[name] = self.changed.get(name, 0) + 1
        return text
