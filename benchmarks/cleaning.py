"""Near-duplicates: planted copies found, other documents lost, MB/s and processor time.

python benchmarks/cleaning.py [--megabytes=1000] [--planted=10000] [--workers=2]

The documents are random walks over the word pairs of a text: like real documents, they share runs of words but are not
copies. A planted document is a copy of another with 1 to 20% of its words replaced, deleted or inserted."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llm_from_scratch.data import cleaning
from llm_from_scratch.data.options import PrepareOptions
from llm_from_scratch.data.sources import find_sources

FILES = 16


def walks(words: list[str], count: int, length: int, rng: np.random.Generator) -> list[str]:
    """Texts in which each word follows the one before it somewhere in `words`."""
    names, ids = np.unique(words, return_inverse=True)
    order = np.argsort(ids[:-1], kind="stable")
    after, begins = ids[1:][order], np.searchsorted(ids[:-1][order], np.arange(len(names) + 1))
    sizes = np.maximum(begins[1:] - begins[:-1], 1)
    at = rng.integers(0, len(names), count)
    steps = np.empty((count, length), np.int32)
    for k in range(length):
        steps[:, k] = at
        at = after[np.minimum(begins[at] + rng.integers(0, 1 << 30, count) % sizes[at], len(after) - 1)]
    lengths = rng.integers(length // 5, length + 1, count)
    return [" ".join(names[row[:size]]) for row, size in zip(steps, lengths, strict=True)]


def edit(text: str, words: list[str], rng: np.random.Generator) -> str:
    parts = text.split(" ")
    share = rng.uniform(0.01, 0.2)
    for at in rng.choice(len(parts), max(1, round(share * len(parts))), replace=False):
        other = words[rng.integers(len(words))]
        parts[at] = (other, "", f"{parts[at]} {other}")[rng.integers(3)]
    return " ".join(filter(None, parts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--planted", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--text", default="data/raw/tinyshakespeare.txt", help="whose words are used")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    words = Path(options.text).read_text(encoding="utf-8").split()
    with tempfile.TemporaryDirectory(prefix="cleaning-") as spool:
        size, number, originals = 0, 0, 0
        share = options.planted / (options.megabytes * 1e6 / 1700)
        files = [open(f"{spool}/{k:02}.jsonl", "w") for k in range(FILES)]
        while size < options.megabytes * 1e6:
            for text in walks(words, 2000, 500, rng):
                files[number % FILES].write(json.dumps({"text": text}) + "\n")
                number, size, originals = number + 1, size + len(text), originals + 1
                if rng.random() < share:  # into a later file
                    copy = "PLANTED " + edit(text, words, rng)
                    files[int(rng.integers((number - 1) % FILES, FILES))].write(json.dumps({"text": copy}) + "\n")
                    size += len(copy)
        for file in files:
            file.close()
        settings = PrepareOptions(dedup="near")
        sources = find_sources([spool], Path("/"), Path(spool), settings)
        begin, before = time.perf_counter(), sum(os.times()[:4])
        folder = Path(spool, "parts")
        result, summary = cleaning.clean([sources], settings, [], folder, Path(spool), options.workers, print)
        took, processor = time.perf_counter() - begin, sum(os.times()[:4]) - before
        planted = summary["documents"] - originals
        left = [text.startswith("PLANTED ") for text in result[0][0].texts()]  # type: ignore[attr-defined]
    found, lost = 1 - sum(left) / planted, 1 - (len(left) - sum(left)) / originals
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = max(usage.ru_maxrss for usage in used) >> 10
    print(f"{size / 1e6:,.0f} MB, {originals:,} documents, {planted:,} planted copies: {found:.2%} of them found, "
          f"{lost:.3%} of the others lost, {size / took / 1e6:.1f} MB/s, "
          f"{processor:.1f} s of processor, at most {peak:,} MiB per process")  # fmt: skip
    result_ = {"found": found, "lost": lost, "mb_per_s": size / took / 1e6, "processor": processor, "mib": peak}
    print(json.dumps(result_), file=sys.stdout)


if __name__ == "__main__":
    main()
