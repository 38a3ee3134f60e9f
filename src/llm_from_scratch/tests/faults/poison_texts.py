"""More hostile files: Hugging Face folders, vocabularies, presets, prompts. See poison.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import HFTokenizer

from ..tiny import LETTERS, TOKENIZER, babble
from .poison import CANARY, LINKS, MB, MODEL, Calls, Maker, archive, payloads

# --- Hugging Face's folders ---


def hf(change: Callable[[Path], Any] | None = None, rows: int = 20, **config: Any) -> Maker:
    def make(path: Path) -> None:
        path.mkdir(parents=True)
        described = {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 1, "n_embd": 4,
            "n_positions": 8, "vocab_size": rows, "activation_function": "gelu_new", **config,
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(described))
        torch.manual_seed(0)
        state = GPT(dataclasses.replace(MODEL, bias=True, vocab_size=rows)).state_dict()
        transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        save_file(
            {
                k: (v.t() if k.endswith(transposed) else v).contiguous()
                for k, v in state.items()
                if k != "lm_head.weight"
            },
            path / "model.safetensors",
        )
        TOKENIZER.save(path)
        if change is not None:
            change(path)

    return make


def only_pickled(make: Maker) -> Maker:
    def change(path: Path) -> None:
        (path / "model.safetensors").unlink()
        make(path / "pytorch_model.bin")

    return hf(change)


def index(**weights: str) -> Maker:
    def change(path: Path) -> None:
        (path / "model.safetensors").unlink()
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    return hf(change)


def weights_are_a_fifo(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def hf_folders() -> dict[str, Maker]:
    evil = Calls(os.system, f"touch {CANARY}")
    remote = {"AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": "evil.Evil"}

    def with_code(path: Path) -> None:
        (path / "evil.py").write_text(f"open({CANARY!r}, 'w')")
        (path / "tokenizer_config.json").write_text(json.dumps({"auto_map": remote, "tokenizer_class": "Evil"}))

    return {
        "its own code": hf(with_code, auto_map=remote, trust_remote_code=True),
        "pickled call": only_pickled(lambda path: torch.save({"a": evil}, path)),
        "pickled call, old format": only_pickled(
            lambda path: torch.save({"a": evil}, path, _use_new_zipfile_serialization=False)
        ),
        "zip bomb": only_pickled(archive(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED, n0=bytes(256 * MB))),
        "marks": only_pickled(archive(b"\x80\x02" + b"(" * (3 * MB) + b".")),
        "an index above": index(a="../../model.safetensors"),
        "an index of /etc": index(a="/etc/passwd"),
        "an index of everything": index(**{f"t{i}": "model-1.safetensors" for i in range(50_000)}),
        "layers": hf(n_layer=10**9),
        "width": hf(n_embd=10**9),
        "vocabulary": hf(vocab_size=10**12),
        "config.json is nested": hf(lambda path: (path / "config.json").write_text('{"a":' * 100_000)),
        "config.json opens wide": hf(
            lambda path: (path / "config.json").write_bytes(b'{"a":[' + b"[]," * (4 * MB) + b"1]}")
        ),
        "weights are a FIFO": hf(weights_are_a_fifo),
    }  # fmt: skip


# --- vocabularies ---


def meta_pickles() -> dict[str, Maker]:
    right = {"vocab_size": 20, "itos": dict(enumerate(LETTERS)), "stoi": {c: i for i, c in enumerate(LETTERS)}}
    made: dict[str, Any] = {k: pickle.dumps({**right, "x": v}) for k, v in payloads().items() if k in
                            ("os.system", "eval", "socket", "torch.load")}  # fmt: skip
    made |= {
        "protocol 0": pickle.dumps(Calls(os.system, f"touch {CANARY}"), 0),
        "marks": b"\x80\x02" + b"(" * MB + b".",
        "dicts": b"\x80\x02" + b"}" * (MB - 9) + b".",
        "a memo of 2 GB": b"\x80\x02}r\xff\xff\xff\x7f.",
        "too large": bytes(5 * MB),
        "a count of ids": pickle.dumps({**right, "vocab_size": 10**400}),
    }
    return {name: functools.partial(_write_bytes, content) for name, content in made.items()}


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def tokenizers() -> dict[str, Maker]:
    """tokenizer.json files."""

    def changed(change: Callable[[dict[str, Any]], Any]) -> Maker:
        def make(path: Path) -> None:
            body = json.loads(trained())
            change(body)
            path.write_text(json.dumps(body))

        return make

    words = "pre_tokenizer"
    return {
        "nested": lambda path: path.write_bytes(b'{"a":' * 100_000),
        "opens wide": lambda path: path.write_bytes(b'{"model":[' + b"[]," * (4 * MB) + b"1]}"),
        "ids in the billions": changed(lambda body: body["model"]["vocab"].update({"zz": (1 << 32) - 1})),
        "a pattern that backtracks": changed(
            lambda body: body.update({words: {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                                              "invert": False}})
        ),
        "a pattern that repeats": changed(
            lambda body: body.update({words: {"type": "Split", "pattern": {"Regex": "((a{1,9}){1,9}){1,9}" * 9},
                                              "behavior": "Isolated", "invert": False}})
        ),
        "another type": lambda path: path.write_text(json.dumps({"type": "os.system", "model": CANARY})),
        "a replacement that grows": changed(
            lambda body: body.update(normalizer={"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 12})
        ),
    }  # fmt: skip


def right_tokenizer(path: Path) -> None:
    path.write_text(trained())


@functools.cache
def trained() -> str:
    return HFTokenizer.train([babble(3000)], 270).json_text


# --- presets and texts ---


def presets() -> dict[str, Maker]:
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    laughs += "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9))
    merges = "a: &a {k0: 1}\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join(['*' + chr(97 + i)] * 9)}]}}\n" for i in range(9)
    )
    texts = {
        "calls": f"start: !!python/object/apply:os.system ['touch {CANARY}']\n",
        "news": f"!!python/object/new:os.system ['touch {CANARY}']\n",
        "names": "start: !!python/name:os.system\n",
        "modules": "start: !!python/module:antigravity\n",
        "a billion laughs": laughs,
        "a billion merges": merges,
        "nested brackets": "start: " + "[" * 30_000,
        "nested lists": "- " * 30_000,
        "a number of 60,000 digits": "seed: " + "9" * 60_000,
        "100 MB": "#" * (100 * MB),
        "a path": "start: FILE:/etc/shadow-of-nothing\n",
        "an unknown setting": "hooks: [os.system]\n",
    }
    return {name: functools.partial(_write_text, text) for name, text in texts.items()}


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


def prompts() -> dict[str, Maker]:
    spaces = " " * 10**6 + "x"
    return {
        "not UTF-8": functools.partial(_write_bytes, b"\xff\xfe" * 100),
        "nulls": functools.partial(_write_bytes, bytes(1000)),
        "a million spaces": functools.partial(_write_text, spaces),
        "special tokens": functools.partial(_write_text, "<|endoftext|>" * 100),
        "40 MB": lambda path: path.write_bytes(b"a" * (40 * MB) + b"\xff"),
        **{f"is a {name}": make for name, make in LINKS.items()},
    }
