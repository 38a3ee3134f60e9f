"""The settings of llm-prepare. Imports no tokenizer, so that `--help` is fast."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..machine.budget import parse_budget
from ..settings import at_least, between

CLEANING = (
    *("unicode", "min_chars", "max_chars", "language", "quality", "personal_data", "decontaminate", "dedup"),
    "boilerplate",
)


@dataclass
class PrepareOptions:
    """Tokenizer, splits and output."""

    tokenizer: str | None = None
    """char, byte, gpt2, cl100k_base, o200k_base, bpe:N (BPE with N ids, trained on the text), a tokenizer.json, a
    GGUF file, a folder with a tokenizer (a run, prepared data, a Hugging Face model), or owner/name of a model on
    Hugging Face. None: char (conversations: byte) below 2 MB of text, bpe:4096 below 100 MB, else gpt2."""
    budget: str | None = None
    """Choose the tokenizer for a run with this budget (llm-train --budget), such as 10min: a short run needs a small
    vocabulary."""
    out_dir: str | None = None
    """Output folder. None: data/processed/NAME."""
    name: str | None = None
    """Name of the dataset. None: from the first source."""
    train_files: tuple[str, ...] = ()
    """Training texts, instead of SOURCE. One, or a list such as '["a.txt", "b/*.md"]'."""
    val_files: tuple[str, ...] = ()
    """Validation texts. All sources are then used for training."""
    val_fraction: float | None = None
    """Fraction of the characters (one text) or documents (several) for validation. None: 0.1; openwebtext: 0.0005."""
    seed: int = 2357
    """Seed of the hash that chooses the validation documents."""
    text_key: str = "text"
    """Field of a .jsonl line, or column of a .parquet file, with the text."""
    lines: bool = False
    """Each line of a text file is a document, and training uses whole documents (--documents)."""
    separator: str = ""
    r"""Text between the documents of a text file, such as '\n\n' or '<|endoftext|>'."""
    include: tuple[str, ...] = ()
    """Patterns of the files to read in folders and archives, as in .gitignore: '*.py', 'src/'. With --include,
    files that a .gitignore excludes are not read."""
    exclude: tuple[str, ...] = ()
    """Patterns of the files to leave out, as in .gitignore."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    bad_files: Literal["stop", "skip"] = "stop"
    """skip: leave out damaged files and files in another encoding, and print their names."""
    unicode: Literal["none", "NFC", "NFKC"] = "none"
    """Unicode normalization."""
    min_chars: int = 0
    """Remove documents with fewer characters."""
    max_chars: int | None = None
    """Remove documents with more characters."""
    language: tuple[str, ...] = ()
    """Keep only documents in these languages, such as en."""
    quality: tuple[Literal["gopher", "c4"], ...] = ()
    """Quality rules for English web pages: Gopher's, C4's, or both."""
    personal_data: Literal["keep", "mask"] = "keep"
    """mask: replace e-mail and public IPv4 addresses, phone numbers with a country code, card and account numbers."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation texts: remove documents that share 13 words in a row with them."""
    dedup: Literal["none", "exact", "near"] = "none"
    """exact: remove documents that equal an earlier one. near: also near-duplicates, which differ in some words."""
    boilerplate: int = 0
    """Remove lines that occur in at least this number of documents. 0: none."""
    chat_template: str | None = None
    """File with the chat template (Jinja) for conversations. None: the tokenizer's, else a plain one."""
    shard_size: int = 1 << 30
    """Maximum number of tokens per file. A single file is named train.bin or val.bin."""
    executor: Literal["local", "slurm", "ray"] | None = None
    """Run cleaning and encoding as datatrove tasks (extra: cluster) on this machine, a Slurm or a Ray cluster."""
    tasks: int | None = None
    """Tasks of --executor. None: the number of cores. More tasks than files have no effect."""
    slurm: str = ""
    """Options for sbatch, such as 'partition=cpu time=10:00:00 mem_per_cpu_gb=8'."""
    workers: int | None = None
    """Worker processes for encoding. None: all cores for large inputs. 0: no workers."""
    cache_dir: str | None = "data/cache"
    """Cache folder for encoded parts, used if reading them is faster than encoding again. None: no cache."""

    def given(self, *names: str) -> list[str]:
        """The named settings that are not at their defaults."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]

    def text_separator(self) -> str:
        """separator, as typed in a shell."""
        plain = self.separator.replace(r"\n", "\n").replace(r"\r", "\r").replace(r"\t", "\t")
        return plain.replace("\r\n", "\n").replace("\r", "\n")  # as in a text that is read

    def validate(self) -> None:
        if self.budget is not None:
            parse_budget(self.budget)
            if self.tokenizer is not None:
                raise UserError("--budget chooses the tokenizer: remove --tokenizer or --budget")
        between(self, 0, 1, "val_fraction", open_left=True, open_right=True)
        at_least(self, 1, "shard_size")
        at_least(self, 0, "workers", "min_chars", "max_chars", "boilerplate")
        at_least(self, 1, "tasks")
        if self.tasks is not None and self.executor is None:
            raise UserError("--tasks needs --executor: add it, or use --workers")
        if self.slurm and self.executor != "slurm":
            raise UserError("--slurm needs --executor=slurm")
        if self.lines and self.separator:
            raise UserError("--lines and --separator both divide a text: remove one of them")
        try:
            self.encoding = codecs.lookup(self.encoding).name
            "".encode(self.encoding)  # not one from bytes to bytes
        except (LookupError, UnicodeError):
            expected = "expected utf-8, utf-16, latin-1, cp1252 or another encoding of Python"
            raise UserError(f"encoding={self.encoding!r} is unknown: {expected}") from None
