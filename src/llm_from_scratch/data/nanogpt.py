"""What nanoGPT's three data/*/prepare.py leave beside themselves, byte for byte where that can be."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path

from ..core.tokenizer import CharTokenizer, Tokenizer
from ..errors import UserError
from .prepare import Job, Report, build, disk_errors, workshop
from .sources import OPENWEBTEXT, FileSource, HubSource, fetch_tiny_shakespeare, write_atomic


def prepare_shakespeare(folder: str | Path, tokenizer_name: str, report: Report = print) -> None:
    """train.bin and val.bin (uint16) of folder/input.txt, which is downloaded unless it is there; for the tokenizer
    char also meta.pkl, the one pickle that this project writes. Raises UserError."""
    folder = Path(folder)
    with disk_errors():
        path = fetch_tiny_shakespeare(folder / "input.txt")
        text = "".join(piece for piece, _ in FileSource(path, keep_bom=True).pieces())
        if len(text) < 2:
            raise UserError(f"{path} is too short to be split into training and validation: {len(text)} characters")
        tokenizer = Tokenizer.from_name(tokenizer_name, text)
        report(f"{path.name}: {len(text):,} characters, vocabulary of {tokenizer.vocab_size:,}")
        border = int(len(text) * 0.9)
        files = {"train.bin": tokenizer.encode(text[:border]), "val.bin": tokenizer.encode(text[border:])}
        for file, ids in files.items():
            write_atomic(folder / file, ids.astype("<u2").tobytes())
            report(f"{file}: {len(ids):,} tokens")
        if isinstance(tokenizer, CharTokenizer):
            stoi = {char: i for i, char in enumerate(tokenizer.chars)}
            meta = {"vocab_size": len(stoi), "itos": dict(enumerate(tokenizer.chars)), "stoi": stoi}
            write_atomic(folder / "meta.pkl", pickle.dumps(meta))


def prepare_openwebtext(folder: str | Path, workers: int | None = None, report: Report = print) -> None:
    """train.bin and val.bin of OpenWebText, streamed. The documents of nanoGPT's split, in the order of the dataset
    where nanoGPT shuffles them. An interrupted run goes on from folder/cache. Raises UserError."""
    folder = Path(folder)
    with disk_errors():
        job = Job("openwebtext", [HubSource.open(OPENWEBTEXT)], None, "gpt2", 0.0005, 2357)
        with workshop(folder / "openwebtext") as built:
            manifest = build(job, built, sys.maxsize, workers, folder / "cache", {}, report)
            for split, entry in manifest["splits"].items():
                os.replace(built / f"{split}.bin", folder / f"{split}.bin")
                report(f"{split}.bin: {entry['tokens']:,} tokens")
        shutil.rmtree(folder / "cache", ignore_errors=True)
