"""Mutated tokenizers, data, presets, command lines and metrics; the classes are as in mutated_checkpoints.py."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from llm_from_scratch import presets
from llm_from_scratch.cli.export import Export
from llm_from_scratch.cli.sample import SampleSettings
from llm_from_scratch.config import Config
from llm_from_scratch.core import tokenfile
from llm_from_scratch.core.dataset import TokenData
from llm_from_scratch.core.tokenizer import CharTokenizer, HFTokenizer, TiktokenTokenizer, Tokenizer, build_tokenizer
from llm_from_scratch.setting_text import literal_values, union_members
from llm_from_scratch.settings import flatten, leaf_types, validate
from llm_from_scratch.training.loggers import read_entries

from .mutants import NASTY, Mutant, expect, write
from .mutated_checkpoints import LETTERS, check_tokenizer


class MetaPickle:
    def __init__(self, folder: Path) -> None:
        self.content = {
            "vocab_size": len(LETTERS), "itos": dict(enumerate(LETTERS)), "stoi": {c: i for i, c in enumerate(LETTERS)}
        }  # fmt: skip

    def make(self, mutant: Mutant, folder: Path) -> bool:
        valid = mutant.random() < 0.6
        content: Any = self.content
        if valid:
            for _ in range(mutant.randint(1, 2)):
                content = mutant.value(content)
        try:
            data = pickle.dumps(content, protocol=mutant.choice((0, 2, 4, 5)))
        except UnicodeEncodeError:
            data = pickle.dumps(None)
        (folder / "meta.pkl").write_bytes(data if valid else mutant.bytes(data))
        return valid

    def read(self, folder: Path) -> None:
        check_tokenizer(Tokenizer.from_nanogpt_meta(folder / "meta.pkl"))


class SavedTokenizer:
    """tokenizer.meta.json and what belongs to it; a changed one gets the fingerprint that it then has."""

    def __init__(self, folder: Path) -> None:
        special = {"<|endoftext|>": 256 + 2}
        ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"cd": 257}
        kinds = (
            CharTokenizer(LETTERS), TiktokenTokenizer("gpt2", ranks, r"\w+|\s+|.", special),
            HFTokenizer.train(["abc abd abc fed"] * 3, 270),
        )  # fmt: skip
        self.kinds = []
        for number, kind in enumerate(kinds):
            kind.save(folder / f"tok{number}")
            self.kinds.append({f.name: f.read_bytes() for f in (folder / f"tok{number}").iterdir()})
        self.present: dict[str, bytes] = {}

    def make(self, mutant: Mutant, folder: Path) -> bool:
        files = dict(mutant.choice(self.kinds))
        name = "tokenizer.meta.json" if mutant.random() < 0.6 else mutant.choice(sorted(files))
        valid = mutant.random() < 0.7
        if name.endswith(".json"):
            files[name] = mutant.json(files[name]) if valid else mutant.bytes(files[name])
        elif valid:
            lines = [line.split() for line in files[name].splitlines()]
            line = mutant.choice(lines)
            way = mutant.randrange(4)
            line[1] = str(mutant.choice(NASTY)).encode(errors="replace") if way == 0 else line[1]
            line[0] = base64.b64encode(mutant.bytes(base64.b64decode(line[0]))) if way == 1 else line[0]
            lines += [line] if way == 2 else []
            lines.remove(line) if way == 3 else None
            files[name] = b"".join(b" ".join(parts) + b"\n" for parts in lines)
        else:
            files[name] = mutant.bytes(files[name])
        write(folder, files, self.present)
        if valid:
            with contextlib.suppress(BaseException):
                meta = json.loads(files["tokenizer.meta.json"])
                meta["fingerprint"] = build_tokenizer(folder, meta).fingerprint()
                write(folder, {**files, "tokenizer.meta.json": json.dumps(meta).encode()}, self.present)
        return valid

    def read(self, folder: Path) -> None:
        check_tokenizer(Tokenizer.load(folder))


class ForeignTokenizer:
    """A tokenizer.json of Hugging Face's, and the tokenizer_config.json next to it."""

    def __init__(self, folder: Path) -> None:
        HFTokenizer.train(["abc abd abc fed"] * 3, 270).save(folder / "hf")
        self.raw = (folder / "hf" / "tokenizer.json").read_bytes()
        body = json.loads(self.raw)
        extra = {"normalizer": {"type": "NFC"}, "post_processor": None, "truncation": {"max_length": 3, "stride": 0,
                 "strategy": "LongestFirst", "direction": "Right"}}  # fmt: skip
        model = {"type": "WordLevel", "vocab": {"abc": 0, "[UNK]": 1, "</s>": 2}, "unk_token": "[UNK]"}
        words = {"type": "Split", "pattern": {"Regex": r"\w+|\s"}, "behavior": "Isolated", "invert": False}
        other = body | extra | {"model": model, "pre_tokenizer": words, "decoder": {"type": "Fuse"}, "added_tokens": []}
        self.files = (self.raw, json.dumps(other).encode())

    def make(self, mutant: Mutant, folder: Path) -> bool:
        raw, valid = mutant.choice(self.files), mutant.random() < 0.75
        config = b'{"eos_token": {"content": "abc"}}'
        if mutant.random() < 0.1:
            config = mutant.json(config)
        elif valid and mutant.random() < 0.7:  # outside the vocabulary, which is most of the file
            body = json.loads(raw)
            vocab = body["model"].pop("vocab")
            body = mutant.value(body)
            if isinstance(body, dict) and isinstance(body.get("model"), dict):
                body["model"]["vocab"] = vocab if mutant.random() < 0.8 else mutant.value(vocab)
            raw = json.dumps(body).encode()
        else:
            raw = mutant.json(raw) if valid else mutant.bytes(raw)
        (folder / "tokenizer.json").write_bytes(raw)
        (folder / "tokenizer_config.json").write_bytes(config)
        return valid

    def read(self, folder: Path) -> None:
        check_tokenizer(Tokenizer.from_name(str(folder / "tokenizer.json")))


class DataManifest:
    def __init__(self, folder: Path) -> None:
        shards = [{"file": "train_000000.bin", "tokens": 9}, {"file": "train_000001.bin", "tokens": 3}]
        val = {"tokens": 5, "bytes": 5, "shards": [{"file": "val.bin", "tokens": 5, "sha256": "0" * 64}]}
        manifest = {
            "format": "llm-from-scratch-data", "version": 1, "dtype": "uint16", "vocab_size": 6,
            "splits": {"train": {"tokens": 12, "bytes": 12, "shards": shards}, "val": val},
        }  # fmt: skip
        self.raw = json.dumps(manifest).encode()
        self.done: set[Path] = set()

    def make(self, mutant: Mutant, folder: Path) -> bool:
        if folder not in self.done:
            for name, count in (("train_000000", 9), ("train_000001", 3), ("val", 5)):
                np.arange(count, dtype="<u2").tofile(folder / f"{name}.bin")
            self.done.add(folder)
        valid = mutant.random() < 0.75
        (folder / "manifest.json").write_bytes(mutant.json(self.raw) if valid else mutant.bytes(self.raw))
        return valid

    def read(self, folder: Path) -> None:
        manifest = tokenfile.read_manifest(folder)
        assert manifest is not None
        expect(0 < manifest["vocab_size"] <= 1 << 32, "vocab_size is out of range")
        for split in ("train", "val"):
            data = TokenData.open(folder, split)
            expect(len(data) == sum(len(shard[:]) for shard in data.shards) > 0, "the length is not that of the files")
            data.check(1, manifest["vocab_size"])
            expect(int(data.windows(np.array([0]), len(data)).max()) < manifest["vocab_size"], "an id is outside")


class Yaml:
    """A preset of nanoGPT's sample.py settings; now and then of the whole tree."""

    CONTENT = {
        SampleSettings: {"temperature": 0.5, "top_k": 3, "start": "abc", "compile": False, "which": "best"},
        Config: {"model": {"n_layer": 2, "dropout": 0.1}, "training": {"max_iters": 10}, "dataset": "x",
                 "dtype": "auto", "stop": ["a", "b"]},
    }  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.tree: type = SampleSettings

    def make(self, mutant: Mutant, folder: Path) -> bool:
        import yaml

        self.tree = Config if mutant.random() < 0.04 else SampleSettings
        content: Any = self.CONTENT[self.tree]
        valid = mutant.random() < 0.7
        if valid:
            for _ in range(mutant.randint(1, 2)):
                content = mutant.value(content)
        raw = yaml.safe_dump(content).encode("utf-8", "surrogatepass")
        if valid and mutant.random() < 0.3:  # valid YAML that JSON has no word for
            tail = ("!!python/object/apply:os.system [x]", "!!int ''", "!!float x", "2001-99-99", "&a [*a]",
                    "!!binary ü", "? [1]\n: 2", "<<: 3", "!!set {a}", "1:2:3", "0x",
                    "!!timestamp x", ".nan", "'\ud800'")  # fmt: skip
            raw += b"seed: " + mutant.choice(tail).encode("utf-8", "surrogatepass") + b"\n"
        (folder / "x.yaml").write_bytes(raw if valid else mutant.bytes(raw))
        return valid

    def read(self, folder: Path) -> None:
        check_settings(presets.parse(self.tree, [str(folder / "x.yaml")], prog="x").tree)


def check_settings(tree: Any) -> None:
    kinds = leaf_types(type(tree))
    for name, value in flatten(tree).items():
        options = union_members(kinds[name])
        plain = {option for option in options if isinstance(option, type)}
        literal = literal_values(options)
        if isinstance(value, dict):
            good = all(type(key) is int and type(number) is float for key, number in value.items())
        else:
            good = type(value) in plain or value in literal or isinstance(value, (tuple, list))
        expect(good or (float in plain and type(value) is int), f"{name}={value!r} is none of {options}")
    if type(tree) is Config:
        validate(tree)


class CommandLine:
    WORDS = {
        SampleSettings: [
            "--temperature=0.5",
            "--top_k=3",
            "--start=abc",
            "--compile=False",
            "--which=best",
            "--seed=7",
        ],
        Export: ["--out_dir=a", "--which=3", "--format=hf", "--output=b", "--overwrite"],
        Config: [
            "--n_layer=2",
            "--training.max_iters=10",
            "--dataset=x",
            "--dtype=auto",
            "--stop=['a','b']",
            "--logit_bias={3: 1.5}",
        ],
    }

    def __init__(self, folder: Path) -> None:
        self.tree: type = SampleSettings
        self.words: list[str] = []

    def make(self, mutant: Mutant, folder: Path) -> bool:
        way = mutant.random()
        self.tree = Config if way < 0.04 else Export if way < 0.6 else SampleSettings
        words = list(self.WORDS[self.tree])
        valid = mutant.random() < 0.6
        at = mutant.randrange(len(words))
        if valid:  # a setting that exists, with another value
            name = words[at].partition("=")[0]
            words[at] = f"{name}={mutant.choice((*NASTY, '[1,2]', '(', '[' * 5000, '9' * 5000, '1e400', 'nan', 'inf'))}"
        else:
            words[at] = mutant.bytes(words[at].encode()).decode("utf-8", "surrogateescape")
        words[at] = words[at].replace("\0", "")  # the system gives none
        self.words = [word for word in words if word not in ("-h", "--help")]
        return valid

    def read(self, folder: Path) -> None:
        check_settings(presets.parse(self.tree, self.words, prog="x", presets=False).tree)


class Metrics:
    def __init__(self, folder: Path) -> None:
        self.lines = [{"step": i, "loss": 2.5, "lr": 1e-3, "val_loss": None} for i in range(5)]

    def make(self, mutant: Mutant, folder: Path) -> bool:
        valid = mutant.random() < 0.7
        lines = [json.dumps(line).encode() for line in self.lines]
        at = mutant.randrange(5)
        lines[at] = mutant.json(lines[at]) if valid else mutant.bytes(lines[at])
        (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return valid

    def read(self, folder: Path) -> None:
        for entry in read_entries(folder / "metrics.jsonl"):
            expect(isinstance(entry, dict), f"{entry!r} is no object")
            expect(type(entry.get("step", 0)) is int, f"step {entry['step']!r}")
