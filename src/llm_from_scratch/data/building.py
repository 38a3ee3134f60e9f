"""From the sources of a dataset to its files: tokenizer, shards and manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.load import named_tokenizer
from ..core.tokenfile import FORMAT, MANIFEST
from ..core.tokenizer import CharTokenizer, Tokenizer
from ..errors import UserError
from . import chats
from . import sources as src
from .encode import TokenCache, Unit, Workers, read_progress, units_of, write_shards
from .fast_bpe import FAST_FROM, can_encode, train
from .meter import Meter
from .shards import stored_dtype
from .split import Documents, Split, choose_split

POOL_FROM = 1 << 25  # bytes of input from which worker processes are faster
VERSION = 1  # of the manifest
SIMPLE = ("char", "byte")  # tokenizers that are faster than worker processes and the cache
Report = Callable[[str], None]


@dataclass
class DatasetSpec:
    """The dataset to prepare. sources: of train and of val; or one list, which is split: one document by
    position, several by document."""

    name: str
    sources: list[list[src.Source]]
    tokenizer: str
    val_fraction: float
    seed: int
    chat_template: str | None = None
    is_chat: bool = False
    permuted: bool = False  # the documents of val are nanoGPT's choice
    loaded: Tokenizer | None = None  # the tokenizer, if it was loaded before
    pool: Workers | None = None  # workers that were started with it

    @property
    def learns_tokenizer(self) -> bool:
        """Whether the tokenizer is made from the text, which is read for that."""
        return self.tokenizer == "char" or self.tokenizer.startswith("bpe:")

    def all(self) -> list[src.Source]:
        return [source for some in self.sources for source in some]


def build(
    spec: DatasetSpec, folder: Path, shard_size: int, workers: int | None, cache_dir: Path | None,
    extra: dict[str, Any], report: Report,
) -> dict[str, Any]:  # fmt: skip
    """Writes shards, tokenizer and manifest to folder. Returns the manifest."""
    if spec.is_chat:
        lists = [[source for source in some if isinstance(source, src.FileSource)] for some in spec.sources]
        rule = Split("hash" if len(lists) == 1 else "files", spec.val_fraction, spec.seed)
        tokenizer, splits, more = chats.build(
            lists, spec.tokenizer, spec.chat_template, rule, folder, shard_size, report
        )
        return write_manifest(spec, folder, tokenizer, splits, extra | more)
    groups = [Documents(sources) for sources in spec.sources]
    total = sum(source.size for source in spec.all())
    tokenizer, rules = make_rules(spec, groups, folder, extra.get("request", ""), report)
    is_slow = not rules.fast and tokenizer.name not in SIMPLE
    if workers is None:
        workers = 0 if tokenizer.name in SIMPLE else choose_workers(total)
    # to read cached tokens takes longer than to encode fast
    cache = TokenCache(cache_dir / "tokens" if cache_dir and is_slow else None, tokenizer.dtype)
    meter = Meter(total, lambda: sum(group.position for group in groups), report)
    try:
        splits = write_shards(
            lambda: rules.units(groups), tokenizer, folder, shard_size, workers, cache, rules.fast,
            extra.get("request", ""), meter, report, spec.pool,
        )  # fmt: skip
    finally:
        meter.close()
    if cache.hits:
        report(f"{cache.hits} of {cache.hits + cache.misses} parts were read from the cache {cache_dir}")
    cache.finish()
    return write_manifest(spec, folder, tokenizer, splits, extra | rules.manifest())


@dataclass
class Rules:
    """How documents become tokens."""

    split: Split
    mark_ends: bool  # an end-of-text token follows each document
    lines: bool
    end: int | None  # the id that ends a document
    fast: bool

    @property
    def needs_order(self) -> bool:
        """Whether a document's number or position decides, so that one reader must see them all."""
        return self.split.by in ("position", "permutation") or self.split.moved is not None

    def units(self, groups: list[Documents]) -> Iterator[Unit]:
        return units_of(self.split.apply(groups), self.mark_ends)

    def manifest(self) -> dict[str, Any]:
        """Its entries of the manifest."""
        extra: dict[str, Any] = {"document_end": self.end} if self.lines or self.mark_ends else {}
        return extra | ({"units": "lines"} if self.lines else {}) | {"split": self.split.describe()}


def make_rules(
    spec: DatasetSpec, groups: list[Documents], folder: Path, request: str, report: Report
) -> tuple[Tokenizer, Rules]:
    """The tokenizer, which is saved in folder, and the rules. Reads the documents if it must, and sets their
    separators."""
    tokenizer = _tokenizer(spec, groups, folder, request, report)
    split = choose_split(groups, spec.val_fraction, spec.seed, spec.permuted, report)
    lines = all(getattr(source, "lines", False) for source in spec.all())
    end = tokenizer.eot_id  # not another id of tokenizer.end_ids, which may have a smaller one: this one is written
    if lines and end is None:
        tokenizer.ends |= {end := int(tokenizer.encode("\n")[-1])}
    tokenizer.save(folder)
    mark_ends = tokenizer.eot_id is not None and (lines or split.several)
    fast = can_encode(tokenizer) and (sum(source.size for source in spec.all()) or FAST_FROM) >= FAST_FROM
    return tokenizer, Rules(split, mark_ends, lines, end, fast)


def _tokenizer(spec: DatasetSpec, groups: list[Documents], folder: Path, request: str, report: Report) -> Tokenizer:
    """The tokenizer of a dataset: by name, trained on the documents, or that of the interrupted run in the folder."""
    if read_progress(folder, request):
        with contextlib.suppress(UserError):
            tokenizer = Tokenizer.load(folder)
            _settle(groups, tokenizer.name, tokenizer.eot_id is None)
            return tokenizer
    if spec.learns_tokenizer:
        _settle(groups, spec.tokenizer, spec.tokenizer == "char")

        def texts() -> Iterator[str]:
            return (text for group in groups for _, text, _ in group.pieces(report))

        if spec.tokenizer == "char" and len(groups) == 1 and (scan := groups[0].scan()):
            return CharTokenizer(scan.characters() or "")
        is_large = sum(source.size for source in spec.all()) >= FAST_FROM
        return (train(spec.tokenizer, texts(), folder, report) if is_large else None) or named_tokenizer(
            spec.tokenizer, texts()
        )
    tokenizer = spec.loaded or named_tokenizer(spec.tokenizer)  # before reading, so that a wrong name fails early
    _settle(groups, tokenizer.name, tokenizer.eot_id is None)
    return tokenizer


def _settle(groups: list[Documents], tokenizer: str, separated: bool) -> None:
    """How a tokenizer needs the documents. separated: without an end-of-text id, they end with a line break; a single
    text is not changed."""
    for group in groups:
        group.separator = "\n" if separated and group.may_be_many else ""
        if tokenizer in SIMPLE and not group.may_be_many:  # of many, the first pieces choose the split
            group.sources = [
                dataclasses.replace(source, cut_anywhere=True) if isinstance(source, src.FileSource) else source
                for source in group.sources
            ]


def write_manifest(
    spec: DatasetSpec, folder: Path, tokenizer: Tokenizer, splits: dict[str, Any], extra: dict[str, Any]
) -> dict[str, Any]:
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": spec.name,
        "dtype": stored_dtype(tokenizer, max(entry["tokens"] for entry in splits.values())).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint()},
        "splits": splits,
        **extra,
    }
    for name, entry in splits.items():
        if not entry["tokens"]:
            raise UserError(f"the {name} split of {spec.name} would be empty: use more text or change --val_fraction")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def choose_workers(total: int) -> int:
    """All cores if the input is large or of unknown size (0), else none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 and (total or POOL_FROM) >= POOL_FROM else 0
