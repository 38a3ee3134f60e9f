"""Mutated adapters, conversations and chat templates; the classes are as in mutated_checkpoints.py."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from pathlib import Path

import torch

from llm_from_scratch.config import FinetuneConfig, GPTConfig
from llm_from_scratch.core.adapters import adapter_of, add_parameters
from llm_from_scratch.core.chat import PLAIN, ChatTemplate
from llm_from_scratch.core.conversations import add_plain_template, encode_conversation
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import ByteTokenizer
from llm_from_scratch.data.chats import are_pairs, conversations, is_conversations
from llm_from_scratch.data.sources import FileSource
from llm_from_scratch.interop import peft

from .mutants import Mutant, expect, write
from .mutated_checkpoints import check_adapter
from .mutated_gguf import SHAPE


class Peft:
    """An adapter of peft's, with changed settings, header or bytes."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.config = GPTConfig(**SHAPE, vocab_size=6)
        model = GPT(self.config)
        weights = dict(model.state_dict())
        add_parameters(model, FinetuneConfig(lora_rank=2), 0)
        adapter = {name: torch.randn(p.shape) for name, p in adapter_of(model).items()}
        with contextlib.redirect_stdout(io.StringIO()):
            peft.export_peft(self.config, weights, adapter, 2, 1.5, str(folder), None, folder / "made")
        self.files = {file.name: file.read_bytes() for file in (folder / "made").iterdir()}
        self.present: dict[str, bytes] = {}

    def make(self, mutant: Mutant, folder: Path) -> bool:
        files, name, valid = dict(self.files), mutant.choice((peft.CONFIG, peft.WEIGHTS)), mutant.random() < 0.7
        raw = files[name]
        if not valid:
            files[name] = mutant.bytes(raw)
        elif name == peft.CONFIG:
            files[name] = mutant.json(raw)
        else:
            (length,) = struct.unpack("<Q", raw[:8])
            header = mutant.json(raw[8 : 8 + length])
            files[name] = struct.pack("<Q", len(header)) + header + raw[8 + length :]
        write(folder, files, self.present)
        return valid

    def read(self, folder: Path) -> None:
        expect(isinstance(peft.base_of(folder), str), "no name of the base")
        check_adapter(self.config, peft.read_peft(folder, self.config))


ROWS = [
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it far?"},
                  {"role": "assistant", "content": [{"type": "text", "text": "Two miles."}]}]},
    {"prompt": "Is it far?", "completion": "Two miles.", "id": 3},
    {"prompt": [{"role": "user", "content": "Is it?"}], "chosen": "Yes.", "rejected": "No."},
]  # fmt: skip


class Conversations:
    """JSON lines of conversations, or of pairs of answers, made into tokens."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = ByteTokenizer()
        add_plain_template(self.tokenizer)

    def make(self, mutant: Mutant, folder: Path) -> bool:
        lines = [json.dumps(row).encode() for row in (ROWS[:2] if mutant.random() < 0.7 else ROWS[2:]) * 2]
        at, valid = mutant.randrange(len(lines)), mutant.random() < 0.8
        lines[at] = mutant.json(lines[at]) if valid else mutant.bytes(lines[at])
        (folder / "c.jsonl").write_bytes(b"\n".join(lines))
        return valid

    def read(self, folder: Path) -> None:
        source = FileSource(folder / "c.jsonl")
        for _, messages in conversations(source) if is_conversations(source) else ():
            expect(all(m.keys() == {"role", "content"} for m in messages), f"messages {messages}")
            for ids, learned in encode_conversation(self.tokenizer, messages):
                expect(len(ids) == len(learned) and bool(learned.any()) and not learned[0], "what is learned")
        expect(isinstance(are_pairs(source), bool), "are_pairs")


class Template:
    """A chat template, rendered in its process."""

    def __init__(self, folder: Path) -> None:
        self.source = PLAIN

    def make(self, mutant: Mutant, folder: Path) -> bool:
        parts = (
            "{{",
            "}}",
            "{%",
            "%}",
            "{% for i in range(99999) %}",
            "{% endfor %}",
            "messages",
            "* 99999",
            "|",
            "()",
        )
        at = mutant.randrange(len(PLAIN))
        cut = mutant.bytes(PLAIN.encode()).decode("utf-8", "replace")
        self.source = PLAIN[:at] + mutant.choice(parts) + PLAIN[at:] if mutant.random() < 0.5 else cut
        return True

    def read(self, folder: Path) -> None:
        text = ChatTemplate(self.source, "<s>", "</s>").render([{"role": "user", "content": "{{ 1 / 0 }}"}])
        expect(isinstance(text, str), "a text")
