"""Mutated GGUF files; the class is as in mutated_checkpoints.py."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import CharTokenizer, HFTokenizer, Tokenizer
from llm_from_scratch.interop.gguf import export_gguf, load_gguf
from llm_from_scratch.interop.gguf_file import GGUFFile

from .mutants import NASTY, Mutant, expect
from .mutated_checkpoints import check_tokenizer

SHAPE: dict[str, Any] = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 32, "pos_embedding": "rope"}
SHAPE |= {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "mlp_hidden": 32}


def packed(value: Any) -> bytes:
    """A value with its type before it, by the rules of the format."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<IQ", 10, value) if 0 <= value < 1 << 64 else struct.pack("<Id", 12, float(value % 10**9))
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, list):
        parts = [packed(item) for item in value]
        kind = parts[0][:4] if parts else struct.pack("<I", 4)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts)
    raw = str(value).encode("utf-8", "surrogatepass")
    return struct.pack("<IQ", 8, len(raw)) + raw


class GGUF:
    """The entries changed and packed again, or the bytes of the header."""

    def __init__(self, folder: Path) -> None:
        kinds: tuple[tuple[Tokenizer, dict[str, Any]], ...] = (
            (HFTokenizer.train(["abc abd abc fed"] * 3, 270), {}),
            (CharTokenizer("abcdef "), {"rope_scaling": "llama3", "rope_original": 4, "rope_factor": 2.0}),
        )
        self.files = []
        for number, (tokenizer, more) in enumerate(kinds):
            torch.manual_seed(0)
            model = GPT(GPTConfig(**SHAPE, vocab_size=tokenizer.vocab_size, **more))
            path = folder / f"{number}.gguf"
            export_gguf(model.config, model.state_dict(), tokenizer, path, "q8_0")
            raw, file = path.read_bytes(), GGUFFile(path)
            first = min(stored.start for stored in file.tensors.values())
            infos = b"".join(
                struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(stored.shape))
                + b"".join(struct.pack("<Q", size) for size in stored.shape[::-1])
                + struct.pack("<IQ", stored.kind, stored.start - first)
                for name, stored in file.tensors.items()
            )  # fmt: skip
            self.files.append((raw[:first], file.entries, len(file.tensors), infos, raw[first:]))

    def make(self, mutant: Mutant, folder: Path) -> bool:
        header, entries, count, infos, data = mutant.choice(self.files)
        valid = mutant.random() < 0.6
        if valid:
            for _ in range(mutant.randint(1, 2)):
                changed = mutant.value({**entries, "infos": mutant.choice(NASTY)})
                entries = changed if isinstance(changed, dict) else entries
            pairs = b"".join(packed(str(key))[4:] + packed(value) for key, value in entries.items())
            header = b"GGUF" + struct.pack("<IQQ", 3, count, len(entries)) + pairs + infos
            header += b"\0" * (-len(header) % 32)
        else:
            header = mutant.bytes(header)
            data = mutant.bytes(data) if mutant.random() < 0.2 else data
        (folder / "x.gguf").write_bytes(header + data)
        return valid

    def read(self, folder: Path) -> None:
        config, state, tokenizer = load_gguf(folder / "x.gguf")
        check_tokenizer(tokenizer)
        expect(config.vocab_size == len(state["transformer.wte.weight"]), "another vocabulary than the table's")
        expect(all(bool(tensor.isfinite().all()) for tensor in state.values()), "a number is not finite")
