"""nanoGPT's three data/*/prepare.py: the same files, byte for byte where possible."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

from ..core.tokenizer import CharTokenizer, Tokenizer
from ..errors import UserError
from ..machine.extras import require
from ..machine.files import temporary_folder, write_errors, write_whole
from .building import DatasetSpec, Report, build, choose_workers
from .encode import read_progress, start_pool
from .fast_bpe import can_encode
from .prepare import DATASET, hash_request
from .sources import OPENWEBTEXT, FileSource, HubSource, fetch_tiny_shakespeare


def prepare_shakespeare(folder: str | Path, tokenizer_name: str, report: Report = print) -> None:
    """Writes train.bin and val.bin (uint16) from folder/input.txt, which is downloaded if missing. The tokenizer char
    also gets meta.pkl, the only pickle that this project writes. Raises UserError."""
    folder = Path(folder)
    with write_errors(DATASET):
        path = fetch_tiny_shakespeare(folder / "input.txt")
        text = "".join(piece for piece, _ in FileSource(path, keep_bom=True).pieces())
        if len(text) < 2:
            raise UserError(f"{path} is too short for a training and a validation split: {len(text)} characters")
        tokenizer = Tokenizer.from_name(tokenizer_name, text)
        report(f"{path.name}: {len(text):,} characters, vocabulary of {tokenizer.vocab_size:,}")
        border = int(len(text) * 0.9)
        files = {"train.bin": tokenizer.encode(text[:border]), "val.bin": tokenizer.encode(text[border:])}
        for file, ids in files.items():
            write_whole(folder / file, ids.astype("<u2").tobytes())
            report(f"{file}: {len(ids):,} tokens")
        if isinstance(tokenizer, CharTokenizer):
            stoi = {char: i for i, char in enumerate(tokenizer.chars)}
            meta = {"vocab_size": len(stoi), "itos": dict(enumerate(tokenizer.chars)), "stoi": stoi}
            write_whole(folder / "meta.pkl", pickle.dumps(meta))


def prepare_openwebtext(folder: str | Path, workers: int | None = None, report: Report = print) -> None:
    """Writes train.bin and val.bin of OpenWebText, streamed. The splits have the same documents as nanoGPT's, but in
    the order of the dataset. The same call resumes an interrupted run. Raises UserError."""
    folder = Path(folder)
    if "datasets" not in sys.modules:  # before anything is loaded or started
        require("datasets", "data", f"reading {OPENWEBTEXT}")
    with write_errors(DATASET), contextlib.ExitStack() as stack:
        tokenizer, workers = Tokenizer.from_name("gpt2"), choose_workers(0) if workers is None else workers
        tokenizer.save(saved := Path(stack.enter_context(tempfile.TemporaryDirectory())))
        # they start while this process imports the library datasets, which takes more than a second
        pool = stack.enter_context(start_pool(workers, saved, can_encode(tokenizer))) if workers else None
        source = HubSource.open(OPENWEBTEXT)
        spec = DatasetSpec("openwebtext", [[source]], "gpt2", 0.0005, 2357, None, False, True, tokenizer, pool)
        request, _ = hash_request(spec, sys.maxsize)
        with temporary_folder(folder / "openwebtext", lambda built: read_progress(built, request) is not None) as built:
            manifest = build(spec, built, sys.maxsize, workers, folder / "cache", {"request": request}, report)
            for split, entry in manifest["splits"].items():
                os.replace(built / f"{split}.bin", folder / f"{split}.bin")
                report(f"{split}.bin: {entry['tokens']:,} tokens")
        shutil.rmtree(folder / "cache", ignore_errors=True)
