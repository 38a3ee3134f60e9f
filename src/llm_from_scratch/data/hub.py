"""Datasets on the Hugging Face hub as streams of documents."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.vocab_files import check_reachable
from ..errors import UserError, one_line
from ..machine.extras import missing
from .readers import ROWS, split_document


@dataclass(frozen=True)
class HubSource:
    """A text dataset on the Hugging Face hub, streamed by the library `datasets` (extra: data)."""

    name: str
    text_key: str
    documents: int | None
    rows: Any  # iterable of {column: value}
    config: str = ""  # of a dataset with several
    has_many = True
    size = 0  # unknown

    @property
    def key(self) -> str:
        return f"{self.name} {self.config}"

    @classmethod
    def open(cls, name: str, text_key: str = "text", config: str = "") -> HubSource:
        """Raises UserError without the extra or the network."""
        try:
            import datasets
        except ImportError:
            raise missing("datasets", "data", f"reading {name}") from None
        try:
            offline = any(os.environ.get(f"HF_{part}_OFFLINE", "0") not in ("0", "") for part in ("HUB", "DATASETS"))
            if not offline and not Path(name).exists():  # datasets would wait half a minute
                check_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
            with _without_torch():
                rows = datasets.load_dataset(name, *filter(None, [config]), split="train", streaming=True)
            info = (rows.info.splits or {}).get("train")
        except Exception as error:
            advice = "check the network, or run llm-prepare on its files (.parquet, .jsonl)"
            raise UserError(f"cannot load the dataset {name} ({one_line(error)}): {advice}") from None
        return cls(name, text_key, info.num_examples if info and info.num_examples else None, rows, config)

    def identity(self) -> dict[str, Any]:
        version = str(getattr(self.rows, "info", ""))[:4096]
        config = {"config": self.config} if self.config else {}
        return {"dataset": self.name, "documents": self.documents, "version": version, **config}

    def pieces(self) -> Iterator[tuple[str, bool]]:
        try:
            for names, texts in self._columns():
                for text in texts:
                    if text is None and self.text_key in names:
                        continue  # as in a table
                    if not isinstance(text, str):
                        has = f"does not have a text column {self.text_key!r} (it has {', '.join(map(repr, names))})"
                        raise UserError(f"{self.name} {has}: see llm-prepare --text_key")
                    yield from split_document(text)
        except UserError:
            raise
        except Exception as error:
            advice = "run the same command again to resume from the cache"
            raise UserError(f"reading {self.name} failed ({one_line(error)}): {advice}") from None

    def _columns(self) -> Iterator[tuple[list[str], list[Any]]]:
        """(names of the columns, texts) of a few rows: documents may be large, and other columns larger. A column of a
        table is read many times as fast as rows."""
        if not hasattr(self.rows, "with_format"):
            yield from ((list(row), [row.get(self.text_key)]) for row in self.rows)
            return
        known = list(self.rows.column_names or ())  # of JSON they may be unknown
        with _without_torch():
            rows = self.rows.select_columns(self.text_key) if self.text_key in known else self.rows
            rows = rows.with_format("arrow")
        for table in rows.iter(ROWS):
            found = table.column_names
            yield known or found, table.column(self.text_key).to_pylist() if self.text_key in found else [None]


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """For torch's loader, which is not used here, every new stream imports torch: 1.5 seconds, 200 MB."""
    config: Any = getattr(sys.modules.get("datasets"), "config", None)
    before = getattr(config, "TORCH_AVAILABLE", False)
    if before:
        config.TORCH_AVAILABLE = False
    try:
        yield
    finally:
        if before:
            config.TORCH_AVAILABLE = before
