"""Mutated checkpoints: step directories with new manifests, ckpt.pt files with new archives.

Each class makes inputs of one parser: make(mutant, folder) writes one and returns whether its container is valid, and
read(folder) parses it; it raises AssertionError if an accepted value is out of range.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.checkpoint import hashed_folder as sealed
from llm_from_scratch.checkpoint import store as checkpoint
from llm_from_scratch.checkpoint.adapter import Base, weights_hash
from llm_from_scratch.config import Config, FinetuneConfig, GPTConfig
from llm_from_scratch.core.adapters import adapter_of, add_parameters, linear_layers, stacked
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.sizes import meta_model
from llm_from_scratch.core.tokenizer import CharTokenizer, Tokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.interop import nanogpt as nanogpt_ckpt
from llm_from_scratch.settings import flatten

from .mutants import Mutant, expect, write

TINY = GPTConfig(block_size=4, vocab_size=6, n_layer=1, n_head=1, n_embd=4, bias=False)
LETTERS = "abcdef"


def check_tokenizer(tokenizer: Tokenizer) -> None:
    size, eot = tokenizer.vocab_size, tokenizer.eot_id
    expect(type(size) is int and 0 < size < 1 << 31, f"vocab_size {size!r}")
    expect(eot is None or (type(eot) is int and 0 <= eot < size), f"eot_id {eot!r} of {size}")
    with contextlib.suppress(UserError):
        ids = tokenizer.encode("fed abc")
        expect(not len(ids) or int(ids.max()) < size, f"encode gives {ids} of {size}")
        expect(isinstance(tokenizer.decode(ids), str), "decode gives no text")
        tokenizer.decode_bytes([0, size - 1])


class Checkpoints:
    """A step directory with changed members or a changed manifest, and matching hashes."""

    def __init__(self, folder: Path, members: tuple[str, ...], also_manifest: bool, is_adapter: bool = False) -> None:
        torch.manual_seed(0)
        model = GPT(TINY)
        weights: dict[str, Any] = {"model": model.state_dict()}
        trained: dict[str, torch.Tensor] = dict(model.named_parameters())
        if is_adapter:
            base = Base(2, 1.5, weights_hash(model.state_dict()), str(folder / "base"), "../base")
            add_parameters(model, FinetuneConfig(lora_rank=2), 0)
            trained = adapter_of(model)
            weights = {"model": {}, "adapter": trained, "base": base}
        names = list(trained)
        moments = {n: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p)} for n, p in trained.items()}
        path = checkpoint.save_checkpoint(
            folder / "made", step=7, model_config=TINY, **weights, run_id="a",
            optimizer={"state": moments, "param_groups": [{"names": names, "lr": 0.1, "betas": [0.9, 0.95]}]},
            trainer={"best_val_loss": 2.5, "dtype": "float32"}, rng={"cpu.0": torch.get_rng_state()},
            config={"training": {"always_save_checkpoint": True, "max_iters": 9}, "data": {"dataset": "x"}},
            tokenizer=CharTokenizer(LETTERS), val_loss=2.0, dataset_hash="0" * 64,
        )  # fmt: skip
        self.files = {file.name: file.read_bytes() for file in path.iterdir()}
        self.manifest = json.loads(self.files.pop("MANIFEST.json"))
        self.members, self.also_manifest = members, also_manifest
        self.present: dict[str, bytes] = {}

    def make(self, mutant: Mutant, folder: Path) -> bool:
        files, manifest, valid = dict(self.files), json.loads(json.dumps(self.manifest)), mutant.random() < 0.7
        manifest.pop("sha256")
        name = mutant.choice(self.members)
        if self.also_manifest and mutant.random() < 0.3:
            manifest = mutant.value(manifest) if valid else manifest
            raw = sealed.with_own_hash(manifest) if isinstance(manifest, dict) else json.dumps(manifest).encode()
        else:
            if name.endswith(".json"):
                files[name] = mutant.json(files[name]) if valid else mutant.bytes(files[name])
            else:
                files[name] = self.tensors(mutant, files[name]) if valid else mutant.bytes(files[name])
            if name in manifest["files"]:
                digest = hashlib.sha256(files[name]).hexdigest()
                manifest["files"][name] = {"size": len(files[name]), "sha256": digest}
            raw = sealed.with_own_hash(manifest)
        if self.also_manifest and not valid and mutant.random() < 0.3:
            raw = mutant.bytes(raw)
        write(folder, {**files, "MANIFEST.json": raw}, self.present)
        return valid

    def tensors(self, mutant: Mutant, raw: bytes) -> bytes:
        """The file with a changed header of right length."""
        (length,) = struct.unpack("<Q", raw[:8])
        header = mutant.json(raw[8 : 8 + length])
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header + raw[8 + length :]

    def read(self, folder: Path) -> None:
        found = checkpoint.load_checkpoint(folder)
        if found.base is None:
            check_model(found.model_config, found.model)
        else:
            expect(0 < found.base.rank <= 4 and math.isfinite(found.base.scale), f"base {found.base}")
            check_adapter(found.model_config, found.adapter)
        expect(type(found.step) is int and found.step >= 0, f"step {found.step!r}")
        for part in (found.config, found.trainer, found.manifest):
            expect(isinstance(part, dict), f"{part!r} is no dict")
        loss = found.manifest["val_loss"]
        expect(loss is None or math.isfinite(loss), f"val_loss {loss!r}")
        if found.tokenizer is not None:
            check_tokenizer(found.tokenizer)


def check_model(config: GPTConfig, model: dict[str, torch.Tensor]) -> None:
    config.validate()
    shapes = {n: tuple(p.shape) for n, p in meta_model(config).named_parameters()}
    for name, shape in shapes.items():
        expect(tuple(model[name].shape) == shape, f"{name} has shape {tuple(model[name].shape)}")
        expect(bool(torch.isfinite(model[name]).all()), f"{name} is not finite")


def check_adapter(config: GPTConfig, adapter: dict[str, torch.Tensor]) -> None:
    layers = linear_layers(meta_model(config))
    for name in {key.rpartition(".")[0] for key in adapter}:
        a, b, layer = adapter[f"{name}.lora_A"], adapter[f"{name}.lora_B"], layers[name]
        expect(a.shape == (len(stacked(layer)) * b.size(1), layer.in_features), f"{name}: A has shape {a.shape}")
        expect(len(b) == layer.out_features, f"{name}: B has shape {b.shape}")
        expect(bool(a.isfinite().all() and b.isfinite().all()), f"{name} is not finite")


class Archive:
    """nanoGPT's ckpt.pt, rebuilt with correct checksums."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = GPT(TINY)
        shapes = {n: tuple(p.shape) for n, p in meta_model(TINY).named_parameters()}
        order = [n for n, s in shapes.items() if len(s) > 1] + [n for n, s in shapes.items() if len(s) == 1]
        decayed = sum(len(s) > 1 for s in shapes.values())
        self.content: dict[str, Any] = {
            "model": model.state_dict(),
            "optimizer": {
                "state": {
                    i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shapes[n])} for i, n in enumerate(order)
                },
                "param_groups": [
                    {"lr": 0.1, "params": list(range(decayed))}, {"lr": 0.1, "params": list(range(decayed, len(order)))}
                ],
            },
            "model_args": {name: getattr(TINY, name) for name in nanogpt_ckpt.MODEL_ARGS},
            "iter_num": 5,
            "best_val_loss": 2.5,
            "config": {"dataset": "x", "batch_size": 4, "learning_rate": 0.1, "compile": False},
        }  # fmt: skip
        self.raw = self.saved(self.content)

    def saved(self, content: Any) -> bytes:
        torch.save(content, buffer := io.BytesIO())
        return buffer.getvalue()

    def rebuilt(self, mutant: Mutant) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.raw)) as old, zipfile.ZipFile(buffer, "w") as new:
            names = old.namelist()
            chosen = names[0] if mutant.random() < 0.8 else mutant.choice(names)  # data.pkl comes first
            for name in names:
                data = old.read(name)
                if name == chosen:
                    data = mutant.bytes(data)
                    name = name if mutant.random() < 0.9 else mutant.choice((name + "x", "a/../" + name, "data.pkl"))
                new.writestr(name, data)
        return buffer.getvalue()

    def make(self, mutant: Mutant, folder: Path) -> bool:
        way = mutant.random()
        if way < 0.35:  # right in form, with other values
            key = mutant.choice(list(self.content))
            value = self.content[key]
            if key == "model" and mutant.random() < 0.8:
                name = mutant.choice(list(value))
                tensors = (
                    torch.zeros(1).expand(value[name].shape), value[name][:1], value[name].double(), value[name].int(),
                    value[name] * math.nan, value[name].t() if value[name].dim() == 2 else value[name][None], 3,
                    torch.zeros(1).expand(1 << 40), torch.empty(0), value[name].to_sparse(),
                )  # fmt: skip
                value = {**value, name: mutant.choice(tensors)}
            else:
                value = mutant.value(value)
            try:
                data = self.saved({**self.content, key: value})
            except UnicodeEncodeError:
                data = self.rebuilt(mutant)
        else:
            data = self.rebuilt(mutant) if way < 0.8 else mutant.bytes(self.raw)
        (folder / "ckpt.pt").write_bytes(data)
        return way < 0.8

    def read(self, folder: Path) -> None:
        found = nanogpt_ckpt.read_nanogpt(folder / "ckpt.pt")
        check_model(found.config, found.weights)
        expect(0 <= found.step < 1 << 53, f"step {found.step}")
        best = found.best_val_loss
        expect(best is None or math.isfinite(best), f"best_val_loss {best}")
        known = flatten(Config())
        for section in found.settings.values():
            for name, value in section.items():
                expect(type(value) in (bool, int, float, str, type(None)) and name in known, f"{name}={value!r}")
