"""Hostile files that pose as a checkpoint, a tokenizer, a preset or a text.

Each maker writes one into a folder. A payload that runs would create the file named CANARY in the working directory.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib
import io
import json
import operator
import os
import pickle
import shutil
import socket
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llm_from_scratch.checkpoint import hashed_folder as sealed
from llm_from_scratch.checkpoint import store as checkpoint
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.interop.nanogpt import MODEL_ARGS

from ..tiny import TOKENIZER

CANARY = "canary-has-sung"
MODEL = GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=4, bias=False)
Maker = Callable[[Path], Any]
MB = 1 << 20


class Calls:
    """Pickled, it asks for a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def payloads() -> dict[str, Any]:
    touch = f"touch {CANARY}"
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, f"open({CANARY!r}, 'w')"),
        "exec": Calls(exec, f"open({CANARY!r}, 'w')"),
        "open": Calls(open, CANARY, "w"),
        "subprocess": Calls(subprocess.Popen, ["touch", CANARY]),
        "socket": Calls(socket.create_connection, ("127.0.0.1", 9)),
        "import": Calls(importlib.import_module, "antigravity"),
        "__import__": Calls(builtins.__import__, "antigravity"),
        "methodcaller": Calls(operator.methodcaller, "system", touch),
        "partial": Calls(functools.partial, os.system, touch),
        "rmtree": Calls(shutil.rmtree, "."),
        "makedirs": Calls(os.makedirs, CANARY),
        "torch.load": Calls(torch.load, CANARY),
        "torch.hub": Calls(torch.hub.load, "someone/something", "model"),
        "torch.save": Calls(torch.save, 1, CANARY),
        "from_file": Calls(torch.from_file, CANARY, True, 1 << 10),
        "bytearray": Calls(bytearray, 1 << 40),
        "giant tensor": Calls(torch.Tensor, 1 << 40),
    }


# --- ckpt.pt ---


@functools.cache
def nanogpt_content() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model": GPT(MODEL).state_dict(),
        "optimizer": None,
        "model_args": {name: getattr(MODEL, name) for name in MODEL_ARGS},
        "iter_num": 5,
        "best_val_loss": 2.5,
        "config": {"dataset": "x", "batch_size": 4},
    }


def pt(change: Callable[[dict[str, Any]], Any] | None = None, **fields: Any) -> Maker:
    def make(path: Path) -> None:
        content = {**nanogpt_content(), **fields}
        if change is not None:
            change(content)
        torch.save(content, path)

    return make


def archive(pickled: bytes | Callable[[], bytes], compression: int = zipfile.ZIP_STORED, **more: bytes) -> Maker:
    """A zip archive with this data.pkl, and storages by their number."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("a/data.pkl", pickled if isinstance(pickled, bytes) else pickled())
            file.writestr("a/version", b"3\n")
            for name, data in more.items():
                file.writestr(f"a/data/{name.removeprefix('n')}", data)

    return make


def edited(old: bytes, new: bytes) -> Maker:
    """A right ckpt.pt with a changed data.pkl."""

    def make(path: Path) -> None:
        torch.save(nanogpt_content(), buffer := io.BytesIO())
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                data = source.read(name)
                if name.endswith("/data.pkl"):
                    assert old in data
                    data = data.replace(old, new, 1)
                target.writestr(name, data)

    return make


def many_members(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickle.dumps({}, 2))
        for number in range(60_000):
            file.writestr(f"a/data/{number:040d}", b"")


def model_args(**change: Any) -> Maker:
    return pt(model_args={**nanogpt_content()["model_args"], **change})


def tensor(make: Callable[[torch.Tensor], Any]) -> Maker:
    name = "transformer.wte.weight"
    return pt(lambda content: content.update(model={**content["model"], name: make(content["model"][name])}))


def sparse_file(size: int) -> Maker:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


LINKS: dict[str, Maker] = {
    "FIFO": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": lambda path: path.mkdir(),
}  # fmt: skip


def ckpt_pt() -> dict[str, Maker]:
    made: dict[str, Maker] = {
        f"calls {k}": archive(functools.partial(pickle.dumps, v, 2)) for k, v in payloads().items()
    }
    evil = Calls(os.system, f"touch {CANARY}")
    made |= {
        "calls, protocol 4": archive(functools.partial(pickle.dumps, evil, 4)),
        "calls by INST": archive(b"(S'touch " + CANARY.encode() + b"'\nios\nsystem\n."),
        "calls by OBJ": archive(b"(cos\nsystem\nS'touch " + CANARY.encode() + b"'\no."),
        "calls inside right content": pt(config={"dataset": evil}),
        "calls as a weight": tensor(lambda old: evil),
        "old format": lambda path: torch.save(evil, path, _use_new_zipfile_serialization=False),
        "bare pickle": lambda path: path.write_bytes(pickle.dumps(evil)),
        "a persistent id that is a path": archive(b"\x80\x02X\x0b\0\0\0/etc/passwdQ."),
        "a class that is built": archive(b"\x80\x02ctorch\nTensor\n)\x81}X\1\0\0\0aK\1sb."),
        "storage larger than its file": edited(b"K\x50t", b"J\0\0\0\x40t"),
        "marks": archive(b"\x80\x02" + b"(" * (3 * MB) + b"."),
        "dicts": archive(b"\x80\x02" + b"}" * (3 * MB) + b"."),
        "nested lists": archive(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."),
        "nested tuples": archive(b"\x80\x02)" + b"\x85" * (3 * MB) + b"."),
        "a memo of 2 GB": archive(b"\x80\x02}r\xff\xff\xff\x7f."),
        "a text of 2 GB": archive(b"\x80\x02X\xff\xff\xff\x7fa."),
        "opcodes without end": archive(b"\x80\x02}q\0" + b"h\x000" * (MB) + b"."),
        "a pickle that is too large": archive(b"\x80\x02" + bytes(20 * MB)),
        "zip bomb": archive(b"\x80\x02}." + bytes(64 * MB), zipfile.ZIP_DEFLATED),
        "storage bomb": archive(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED, n0=bytes(256 * MB)),
        "many members": many_members,
        "tensor of stride 0": tensor(lambda old: torch.zeros(1).expand(old.shape)),
        "giant tensor of stride 0": tensor(lambda old: torch.zeros(1).expand(1 << 40, 4)),
        "sparse tensor": tensor(lambda old: old.to_sparse()),
        "layers": model_args(n_layer=(1 << 31) - 1),
        "width": model_args(n_embd=1 << 30, n_head=1),
        "vocabulary": model_args(vocab_size=(1 << 31) - 1),
        "context": model_args(block_size=10**400),
        "code as a number": model_args(n_head="__import__('os').system('touch x')"),
        "a dataset of /etc": pt(config={"dataset": "/etc"}),
        "a dataset above": pt(config={"dataset": "../../../etc"}),
        "8 GB of nothing": sparse_file(8 << 30),
        "text": lambda path: path.write_text("import os\n" * 100),
        **{f"is a {name}": make for name, make in LINKS.items()},
    }  # fmt: skip
    return made


# --- step directories ---

STATE = (
    "best_val_loss", "evaluated_at", "recent_losses", "run_id", "step", "rollbacks", "dtype", "scaler", "compile",
    "micro_batch", "order", "saved_at", "threads", "batch_size", "data_shift", "skipped_in_a_row", "best_step",
)  # fmt: skip


@functools.cache
def good_step() -> dict[str, bytes]:
    """The files of a right checkpoint of step 7."""
    torch.manual_seed(0)
    model = GPT(MODEL)
    names = [name for name, _ in model.named_parameters()]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "fsync", lambda handle: None):
        path = checkpoint.save_checkpoint(
            folder, step=7, model_config=MODEL, model=model.state_dict(), run_id="a", tokenizer=TOKENIZER, val_loss=2.0,
            optimizer={"state": {}, "param_groups": [{"names": names, "lr": 0.1}]}, config={"data": {"dataset": "x"}},
        )  # fmt: skip
        return {file.name: file.read_bytes() for file in path.iterdir()}


def step(change: Callable[[dict[str, bytes]], Any] | None = None, after: Maker | None = None, **fields: Any) -> Maker:
    """A step directory with changed files, and a new manifest with changed fields; then after(folder)."""

    def make(path: Path) -> None:
        files = dict(good_step())
        manifest = json.loads(files.pop("MANIFEST.json"))
        manifest.pop("sha256")
        if change is not None:
            change(files)
        manifest["files"] = {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
        if "files" in fields:
            manifest["files"] |= fields["files"]
        manifest |= {k: v for k, v in fields.items() if k != "files"}
        path.mkdir(parents=True)
        for name, data in files.items():
            (path / name).write_bytes(data)
        (path / "MANIFEST.json").write_bytes(sealed.with_own_hash(manifest))
        if after is not None:
            after(path)

    return make


def member(name: str, content: bytes) -> Maker:
    return step(lambda files: files.update({name: content}))


def replaced(name: str, make: Maker) -> Maker:
    def after(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return step(after=after)


def header(text: bytes, length: int | None = None, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


def saved_config(**settings: Any) -> Maker:
    return member("config.json", json.dumps({"data": {"dataset": "x"}, **settings}).encode())


def saved_model(**change: Any) -> Maker:
    return step(
        lambda files: files.update({"model.json": json.dumps({**json.loads(files["model.json"]), **change}).encode()})
    )


def step_folders() -> dict[str, Maker]:
    weights = "model.safetensors"
    passwd = Path("/etc/passwd").read_bytes()
    entry = {"size": len(passwd), "sha256": hashlib.sha256(passwd).hexdigest()}
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    bomb = b'{"a":[' + b"[]," * (4 * MB) + b"1]}"
    made = {
        **{f"weights are a {kind}": replaced(weights, make) for kind, make in LINKS.items()},
        **{f"config.json is a {kind}": replaced("config.json", make) for kind, make in LINKS.items()},
        **{f"manifest is a {kind}": replaced("MANIFEST.json", make) for kind, make in LINKS.items()},
        "weights are a link": replaced(weights, lambda path: path.symlink_to("/etc/passwd")),
        "names a file above": step(files={"../../passwd": entry}),
        "names /etc/passwd": step(files={"/etc/passwd": entry}),
        "a size of exabytes": step(files={weights: {"size": 1 << 62, "sha256": "0" * 64}}),
        "a size below zero": step(files={weights: {"size": -1, "sha256": "0" * 64}}),
        "a manifest of 20 MB": step(after=lambda path: (path / "MANIFEST.json").write_bytes(b" " * (20 * MB))),
        "a manifest that is nested": step(after=lambda path: (path / "MANIFEST.json").write_bytes(b"[" * MB)),
        "config.json is nested": member("config.json", b'{"a":' * 100_000),
        "config.json opens wide": member("config.json", bomb),
        "trainer.json opens wide": member("trainer.json", bomb),
        "optimizer.json opens wide": member("optimizer.json", bomb),
        "weights are a pickle": member(weights, pickle.dumps(Calls(os.system, f"touch {CANARY}"))),
        "header of exabytes": member(weights, header(b"{}", 1 << 62)),
        "header below zero": member(weights, header(b"{}", (1 << 64) - 1)),
        "header of 90 MB": member(weights, header(b" " * 100, 90 * MB)),
        "header is nested": member(weights, header(b'{"a":' * 50_000)),
        "header claims a terabyte": member(
            weights, header(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}', rest=b"abcd")
        ),
        "header overflows": member(
            weights, header(b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}', rest=b"abcd")
        ),
        "tensors of another type": member(
            weights, header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', rest=b"abcd")
        ),
        "many empty tensors": member(
            weights,
            header(json.dumps(dict.fromkeys(map(str, range(90_000)), nothing)).encode()),
        ),
        "random state of another kind": member(
            "rng.safetensors", header(b'{"cpu.0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', rest=b"abcd")
        ),
        "state of other kinds": member("trainer.json", json.dumps(dict.fromkeys(STATE, {"a": ["b"]})).encode()),
        "a state in text": member("trainer.json", json.dumps(dict.fromkeys(STATE, "x")).encode()),
        "layers": saved_model(n_layer=(1 << 31) - 1),
        "width": saved_model(n_embd=1 << 30),
        "vocabulary": saved_model(vocab_size=1 << 31),
        "an unknown setting": saved_model(hook="os.system"),
        "a dataset of /etc": saved_config(data={"dataset": "/etc"}),
        "a dataset above": saved_config(data={"dataset": "../../etc"}),
        "a prompt from /etc/passwd": saved_config(generation={"start": "FILE:/etc/passwd"}),
        "a preset": saved_config(training={"init_from": "evil.py"}, preset="evil.py"),
        "settings of other kinds": saved_config(training={"max_iters": [1], "out_dir": "/etc"}, optimizer=5),
        "a logger that goes online": saved_config(logging={"wandb_log": True, "wandb_project": "x"}),
        "a run id that is a path": step(run_id="../../../evil"),
        "a step of 400 digits": step(step=10**400),
        "a module beside it": member("sitecustomize.py", f"open({CANARY!r}, 'w')".encode()),
        "tokenizer of another kind": member(
            "tokenizer.meta.json", b'{"format": "llm-from-scratch-tokenizer", "version": 1, "name": "os"}'
        ),
        "tokenizer opens wide": member("tokenizer.meta.json", bomb),
    }  # fmt: skip
    return made
