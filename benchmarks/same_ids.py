"""Compares the ids of the fast encoder with those of the libraries that it replaces, on mixed text.

python benchmarks/same_ids.py [--tokenizers=gpt2,cl100k_base,o200k_base,bpe:8192,FILE.json] [--mb=200] [--seed=0]
    [--transformers=gpt2,FILE.json] [--folder=DIR]

The text is two thirds Python sources and documentation of this machine; the rest is emoji, CJK, right-to-left and
combining scripts, control characters, digits, long runs and random code points. The reference is tiktoken for its
vocabularies, tokenizers for a tokenizer.json, and transformers for --transformers. --folder keeps the result of every
part of the text, so the same command resumes. Prints a table after each part, and a line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from preparing import changed, documents

from llm_from_scratch.core.tokenizer import Tokenizer
from llm_from_scratch.data.fast_bpe import FastTokenizer, may_differ
from llm_from_scratch.interop.hf_tokenizer import to_backend
from llm_from_scratch.machine.files import write_whole

UNIT = 1 << 20  # characters
TRAINED = 20  # MB of text on which bpe:N is trained
PARTS = 8  # of the text, each with every eighth document
RANGES = {  # of code points
    "emoji": (0x1F300, 0x1FAFF), "CJK": (0x4E00, 0x9FFF), "kana": (0x3040, 0x30FF), "Hangul": (0xAC00, 0xD7A3),
    "Cyrillic": (0x400, 0x4FF), "Arabic": (0x600, 0x6FF), "Hebrew": (0x590, 0x5FF), "Devanagari": (0x900, 0x97F),
    "Thai": (0xE00, 0xE7F), "Latin": (0xC0, 0x24F), "marks": (0x300, 0x36F), "control": (0, 0x9F),
    "punctuation": (0x2000, 0x206F), "symbols": (0x2190, 0x2BFF), "any": (0, 0x2FFFF),
}  # fmt: skip
JOINTS = (" ", "\n", "", "\u200d", "\ufe0f", "\t", "\r\n", "  ", "\n\n", "'s", "1", "a", ".", "\u3000", "\xa0")


def strange(rng: random.Random, size: int, alphabets: dict[str, list[str]]) -> str:
    """A text of one or two scripts, joined by what tokenizers treat in special ways."""
    names = rng.sample(sorted(alphabets), 2)
    joints, parts, length = rng.sample(JOINTS, 3), [], 0
    while length < size:
        kind = rng.random()
        if kind < 0.02:
            part = rng.choice(alphabets[names[0]]) * rng.randint(2, 300)
        elif kind < 0.05:
            part = str(rng.randrange(10 ** rng.randint(1, 30)))
        else:
            part = "".join(rng.choices(alphabets[names[rng.random() < 0.3]], k=rng.randint(1, 12)))
        parts += [part, rng.choice(joints)]
        length += len(part) + 1
    return "".join(parts)


def texts(size: int, seed: int, part: int = 0) -> Iterator[str]:
    """Units of about a megabyte, `size` bytes in all."""
    alphabets = {}
    for name, (low, high) in RANGES.items():
        chars = [chr(code) for code in range(low, high + 1)]
        alphabets[name] = [char for char in chars if unicodedata.category(char) not in ("Cn", "Cs")]
    rng = random.Random(seed * PARTS + part)
    chosen = (itertools.islice(documents(), part, None, PARTS) for _ in itertools.count())
    real = (changed(text, at) for at, some in enumerate(chosen) for text in some)
    while size > 0:
        parts, length = [], 0
        while length < min(UNIT, size):
            piece = next(real) if rng.random() < 0.8 else strange(rng, rng.randint(10, 20_000), alphabets)
            parts.append(piece)
            length += len(piece)
        text = "".join(parts)
        size -= len(text.encode())
        yield text


def of_transformers(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    import transformers

    own: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=to_backend(tokenizer))
    return lambda text: own.encode(text, add_special_tokens=False, split_special_tokens=True)


def load(name: str, seed: int, folder: Path) -> Tokenizer:
    """A tokenizer, saved in the folder. bpe:N is trained once."""
    if not Tokenizer.exists(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trained = texts(TRAINED * 10**6, seed + 1) if name.startswith("bpe:") else None
        Tokenizer.from_name(name, trained).save(folder)
    return Tokenizer.load(folder)


def compare(tokenizer: Tokenizer, folder: Path, with_transformers: bool, content: list[str]) -> dict[str, float]:
    fast = FastTokenizer(tokenizer, folder)
    reference = of_transformers(tokenizer) if with_transformers else tokenizer.encode
    found: dict[str, float] = {"MB": 0.0, "by gigatoken": 0.0, "tokens": 0, "units": 0, "units that differ": 0}
    begin = time.process_time()
    for text in content:
        ids, expected = fast.encode(text), np.asarray(reference(text))
        megabytes = len(text.encode()) / 1e6
        found["MB"] += megabytes
        found["by gigatoken"] += 0 if may_differ(text.encode()) else megabytes
        found["tokens"] += len(expected)
        found["units"] += 1
        if not np.array_equal(ids, expected):
            found["units that differ"] += 1
            print(f"{tokenizer.name}: unit {found['units']} differs", file=sys.stderr)
    return found | {"processor seconds": time.process_time() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", default="gpt2,cl100k_base,o200k_base,bpe:8192")
    parser.add_argument("--transformers", default="")
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    cases = [(name, False) for name in given.tokenizers.split(",") if name]
    cases += [(name, True) for name in given.transformers.split(",") if name]
    results = {f"{name}{', transformers' if by else ''}": Counter[str]() for name, by in cases}
    with tempfile.TemporaryDirectory() as spool:
        for part in range(PARTS):
            content: list[str] = []
            for (name, with_transformers), found in zip(cases, results.values(), strict=True):
                place = (given.folder or Path(spool)) / name.replace("/", "+")
                path = place / f"part-{part}-{given.mb}-{given.seed}-{with_transformers}.json"
                if not path.is_file():
                    content = content or list(texts(given.mb * 10**6 // PARTS, given.seed, part))
                    one = compare(load(name, given.seed, place), place, with_transformers, content)
                    write_whole(path, json.dumps(one).encode())
                found.update(json.loads(path.read_text()))
            for label, found in results.items():
                print(
                    f"{label}: {found['MB']:.0f} MB ({found['by gigatoken']:.0f} by gigatoken), {found['tokens']:,} "
                    f"tokens, {found['units that differ']} of {found['units']} units differ, "
                    f"{found['processor seconds']:.0f} s",
                    flush=True,
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
