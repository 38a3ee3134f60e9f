"""nanoGPT's ckpt.pt: its checkpoints are ours, ours are its, and a file that lies builds nothing.

The format is written down here by hand; with NANOGPT_DIR set to a checkout of nanoGPT, its own scripts write and read
(marked slow).
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.checkpoint import store as cp
from llm_from_scratch.checkpoint.load import load as load_any
from llm_from_scratch.cli import export
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import Tokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.interop import nanogpt as nanogpt_ckpt
from llm_from_scratch.training.moments import load_optimizer_state
from llm_from_scratch.training.optimizer import make_adamw

L, H, C, T, V = 2, 2, 8, 6, 13
NANOGPT = os.environ.get("NANOGPT_DIR")
needs_nanogpt = pytest.mark.skipif(not NANOGPT, reason="set NANOGPT_DIR to a checkout of nanoGPT")


def nanogpt_names(bias: bool) -> list[str]:
    """nanoGPT's parameters in the order of its modules (the head is the embedding)."""
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for i in range(L):
        for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names += [f"transformer.h.{i}.{module}.{kind}" for kind in (("weight", "bias") if bias else ("weight",))]
    return names + ["transformer.ln_f.weight"] + (["transformer.ln_f.bias"] if bias else [])


def shape_of(name: str) -> tuple[int, ...]:
    matrices = {
        "wte": (V, C), "wpe": (T, C), "c_attn": (3 * C, C), "attn.c_proj": (C, C), "c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }  # fmt: skip
    key = next((k for k in matrices if f".{k}." in name), "")
    if name.endswith(".bias"):
        return (matrices[key][0],) if key else (C,)
    return matrices[key] if key else (C,)


def nanogpt_dict(bias: bool = False) -> dict[str, Any]:
    """What nanoGPT's train.py hands to torch.save, made with torch's own AdamW."""
    torch.manual_seed(5)
    names = nanogpt_names(bias)
    params = {name: torch.nn.Parameter(torch.randn(shape_of(name))) for name in names}
    decayed = [params[n] for n in names if params[n].dim() >= 2]
    others = [params[n] for n in names if params[n].dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for _ in range(3):
        for p in params.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
    weights = collections.OrderedDict((name, p.detach()) for name, p in params.items())
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    weights._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as Module.state_dict() has it
    return {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": dict(n_layer=L, n_head=H, n_embd=C, block_size=T, bias=bias, vocab_size=V, dropout=0.1),
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.4697),
        "config": {
            "out_dir": "out-toy", "dataset": "toy", "eval_iters": 200, "wandb_log": False, "compile": True,
            "learning_rate": 1e-3, "beta2": 0.99, "lr_decay_iters": 5000, "dtype": "bfloat16", "my_own": 3,
            "always_save_checkpoint": False, "device": "cuda",
        },
    }  # fmt: skip


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def moments(content: dict[str, Any], bias: bool) -> dict[str, torch.Tensor]:
    """First moments by name, by nanoGPT's numbering: tensors of two dimensions first."""
    names = nanogpt_names(bias)
    order = [n for n in names if len(shape_of(n)) == 2] + [n for n in names if len(shape_of(n)) == 1]
    return {name: content["optimizer"]["state"][i]["exp_avg"] for i, name in enumerate(order)}


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_is_read_whole(tmp_path: Path, bias: bool) -> None:
    given = nanogpt_dict(bias)
    path = write(tmp_path, given)
    for location in (path, tmp_path):  # the file, or an out_dir that holds only it
        got = load_any(location, need_tokenizer=False)
        assert (got.path, got.step) == (path, 2000)
    assert got.model_config == GPTConfig(
        n_layer=L, n_head=H, n_embd=C, block_size=T, bias=bias, vocab_size=V, dropout=0.1, activation="gelu"
    )
    assert all(torch.equal(got.model[name], tensor) for name, tensor in given["model"].items())
    assert got.trainer["best_val_loss"] == pytest.approx(1.4697)
    assert got.config["data"] == {"dataset": "toy"} and got.config["system"]["compile"] is True
    assert got.config["training"]["always_save_checkpoint"] is False
    assert got.config["scheduler"] == {"lr_decay_iters": 5000} and got.config["optimizer"]["beta2"] == 0.99
    assert got.optimizer is not None and all(v["step"] == 3 for v in got.optimizer["state"].values())
    for name, moment in moments(given, bias).items():
        assert torch.equal(got.optimizer["state"][name]["exp_avg"], moment), name
    assert [g["weight_decay"] for g in got.optimizer["param_groups"]] == [0.1, 0.0]

    model = GPT(got.model_config)
    model.load_state_dict(got.model)
    optimizer = make_adamw(model, 0.1, 1e-3, (0.9, 0.99))
    load_optimizer_state(optimizer, got.optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments(given, bias)[name])


def test_older_and_leaner_checkpoints(tmp_path: Path) -> None:
    plain = load_any(write(tmp_path, nanogpt_dict()), need_tokenizer=False)
    given = nanogpt_dict()
    weights = {f"_orig_mod.{name}": tensor for name, tensor in given["model"].items() if name != "lm_head.weight"}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, T, T).tril()  # the mask of torch 1
    del given["optimizer"], given["config"], given["best_val_loss"]
    given["model"] = weights
    got = load_any(write(tmp_path, given), need_tokenizer=False)
    assert got.model.keys() == plain.model.keys() and got.optimizer is None and got.config == {}
    assert all(torch.equal(got.model[name], tensor) for name, tensor in plain.model.items())
    assert got.trainer == {"best_val_loss": None}
    given["best_val_loss"], given["optimizer"] = float("nan"), None
    assert load_any(write(tmp_path, given), need_tokenizer=False).trainer == {"best_val_loss": None}
    given["model_args"].pop("bias")  # before the setting existed, there were biases
    with pytest.raises(UserError, match="lacks tensor .*bias"):
        load_any(write(tmp_path, given), need_tokenizer=False)


def test_weights_only_excludes_the_optimizer(tmp_path: Path) -> None:
    given = nanogpt_dict()
    given["optimizer"] = "lost"
    path = write(tmp_path, given)
    assert load_any(path, weights_only=True, need_tokenizer=False).optimizer is None
    with pytest.raises(UserError, match="optimizer's state is not nanoGPT's.*--init_from="):
        load_any(path, need_tokenizer=False)


def test_own_checkpoints_are_preferred_to_a_ckpt_pt(tmp_path: Path) -> None:
    got = load_any(write(tmp_path, nanogpt_dict()), need_tokenizer=False)
    with pytest.raises(UserError, match="is at step 2000, not 7"):
        load_any(tmp_path, 7, need_tokenizer=False)
    fields = {name: getattr(got, name) for name in ("model_config", "model", "optimizer", "trainer", "config")}
    cp.save_checkpoint(tmp_path, step=2001, run_id="r", **fields)
    assert load_any(tmp_path, need_tokenizer=False).step == 2001


# ----------------------------------------------------------------------------------------------------------- tokenizer


def make_data(folder: Path, chars: str) -> Path:
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        np.zeros(100, np.uint16).tofile(folder / f"{split}.bin")
    stoi = {c: i for i, c in enumerate(chars)}
    meta = {"vocab_size": len(chars), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_the_tokenizer_is_that_of_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "out", nanogpt_dict())
    with pytest.raises(UserError, match="tokenizer of its dataset 'toy'.*not found"):
        load_any(path)
    assert load_any(path, need_tokenizer=False).tokenizer is None
    elsewhere = make_data(tmp_path / "elsewhere", "abcdefghijklm")
    named = load_any(path, dataset=str(elsewhere)).tokenizer
    assert named is not None and named.decode([0, 12]) == "am"
    make_data(tmp_path / "data" / "toy", "ABCDEFGHIJKLM")
    found = load_any(path).tokenizer
    assert found is not None and found.decode([0, 12]) == "AM"
    make_data(tmp_path / "data" / "other", "abc")
    with pytest.raises(UserError, match="dataset other has 3 ids, but .* trained with 13"):
        load_any(path, dataset="other")


@pytest.mark.parametrize("dataset", ["../secret", "/secret", "a/b", "..", ".hidden", 3, ""])
def test_a_dataset_that_is_a_path_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any
) -> None:
    make_data(tmp_path / "secret", "abcdefghijklm")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    given = nanogpt_dict()
    given["config"]["dataset"] = dataset if dataset != "/secret" else str(tmp_path / "secret")
    # a path is printed, for the user to decide
    option = given["config"]["dataset"] if isinstance(dataset, str) and dataset else "NAME_OR_FOLDER"
    with pytest.raises(UserError, match=f"does not have a tokenizer.*--dataset={option}$"):
        load_any(write(tmp_path / "out", given))


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_a_vocabulary_of_gpt2s_size_is_gpt2s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int) -> None:
    class Gpt2:
        vocab_size = 50257

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Tokenizer, "from_name", staticmethod(lambda name: Gpt2() if name == "gpt2" else None))
    given = nanogpt_dict()
    given["model_args"]["vocab_size"] = vocab_size
    wte = torch.zeros(vocab_size, C)
    given["model"]["transformer.wte.weight"] = given["model"]["lm_head.weight"] = wte
    del given["optimizer"]
    assert isinstance(load_any(write(tmp_path / "out", given)).tokenizer, Gpt2)


# ------------------------------------------------------------------------------------------------- files that lie


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(fields)


def args(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model_args"].update(fields)


def tensor(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update({name: value})


def moment(value: Any, slot: str = "exp_avg") -> Callable[[dict[str, Any]], None]:
    return lambda content: content["optimizer"]["state"][0].update({slot: value})


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit


WPE = "transformer.wpe.weight"
CONTENT_LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no model": (drop("model"), "does not contain the dict model"),
    "no model_args": (drop("model_args"), "does not contain the dict model_args"),
    "a list as model": (change(model=[1]), "does not contain the dict model"),
    "n_layer missing": (drop("model_args", "n_layer"), "lacks n_layer"),
    "n_layer huge": (args(n_layer=10**8), "n_layer"),
    "n_layer beyond 64 bits": (args(n_layer=2**70), "n_layer"),
    "n_layer zero": (args(n_layer=0), "n_layer"),
    "n_layer a text": (args(n_layer="2"), "n_layer"),
    "n_embd other": (args(n_embd=16), "shape"),
    "n_embd huge": (args(n_embd=1 << 30), "cannot be built"),
    "block_size other": (args(block_size=T + 1), "wpe.weight is"),
    "vocab_size none": (args(vocab_size=None), "vocab_size"),
    "bias a number": (args(bias=1), "bias"),
    "bias claimed": (args(bias=True), "lacks tensor"),
    "dropout not a number": (args(dropout=float("nan")), "dropout"),
    "an architecture of someone's own": (args(n_experts=8), "does not have nanoGPT's architecture.*n_experts"),
    "our own options": (args(norm="rmsnorm"), "does not have nanoGPT's architecture.*norm"),
    "a tensor missing": (drop("model", WPE), "lacks tensor transformer.wpe"),
    "a tensor too many": (tensor("evil", torch.ones(1)), "unexpected tensor evil"),
    "a number as tensor": (tensor(WPE, 3), "not a plain tensor"),
    "integers": (tensor(WPE, torch.ones(T, C, dtype=torch.int64)), "expected floats"),
    "NaN": (tensor(WPE, torch.full((T, C), float("nan"))), "not finite"),
    "sparse": (tensor(WPE, torch.ones(T, C).to_sparse()), "not a plain tensor|pickled|asks for"),
    "stride 0": (tensor(WPE, torch.ones(1).expand(T, C)), "not a plain tensor"),
    "a tensor without memory": (tensor(WPE, torch.empty(T, C, device="meta")), "not a plain tensor|asks for"),
    "untied": (tensor("lm_head.weight", torch.ones(V, C)), "ties them"),
    "iter_num negative": (change(iter_num=-1), "iter_num"),
    "iter_num a text": (change(iter_num="9"), "iter_num"),
    "moments of another shape": (moment(torch.ones(2, 2)), "exp_avg of transformer.wte.weight"),
    "moments not finite": (moment(torch.full((V, C), float("inf"))), "not finite"),
    "moments of texts": (moment("x"), "exp_avg of transformer.wte.weight"),
    "a step of many": (moment(torch.ones(3), "step"), "step of transformer.wte.weight"),
    "parameters numbered otherwise": (
        lambda c: c["optimizer"]["param_groups"].reverse(), "groups are not nanoGPT's.*--init_from"
    ),
    "state of a parameter that is not there": (
        lambda c: c["optimizer"]["state"].update({99: {}}), "optimizer's state is not nanoGPT's"
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", CONTENT_LIES)
def test_wrong_contents_are_refused(tmp_path: Path, lie: str) -> None:
    content = nanogpt_dict()
    edit, message = CONTENT_LIES[lie]
    edit(content)
    with pytest.raises(UserError, match=message) as error:
        load_any(write(tmp_path, content), need_tokenizer=False)
    assert "\n" not in str(error.value) and "ckpt.pt" in str(error.value)


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """The zip that torch.save makes, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("ckpt/data.pkl", pickled)
        file.writestr("ckpt/version", "3\n")
    return path


def reduced(function: Callable[..., Any], *arguments: Any) -> bytes:
    class Lure:
        def __reduce__(self) -> Any:
            return function, arguments

    return pickle.dumps({"model": Lure(), "model_args": {}}, protocol=2)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    for function, arguments in (
        (os.mkdir, (str(target),)),
        (eval, (f"__import__('os').mkdir({str(target)!r})",)),
        (torch.load, (str(target),)),
        (bytearray, (1 << 40,)),  # on torch's own list, and a terabyte
        (torch.Tensor, (1 << 40,)),
    ):
        path = archive(tmp_path / "ckpt.pt", reduced(function, *arguments))
        with pytest.raises(UserError, match="more than plain values and tensors"):
            load_any(path)
        path.write_bytes(reduced(function, *arguments))  # the old format without a zip
        with pytest.raises(UserError, match="not a file that torch.save"):
            load_any(path)
    path = archive(tmp_path / "ckpt.pt", pickle.dumps({"model": {}}, protocol=4))
    with pytest.raises(UserError, match="torch.save does not use"):
        load_any(path)
    assert not target.exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, nanogpt_dict())
    whole = path.read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(cp.DamagedError, match="ckpt.pt is not a file that torch.save .* or it is truncated"):
            load_any(path)
    archive(path, pickle.dumps({"a": 0}, protocol=2) + b"\0" * (1 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        load_any(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "a zip of something else")
    with pytest.raises(UserError, match="data.pkl"):
        load_any(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="contains a list"):
        load_any(path)
    # a storage that claims more than its record
    content = io.BytesIO()
    torch.save({"model": {"x": torch.zeros(100)}, "model_args": {}}, content)
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member.filename, data.replace(b"Kdt", b"K\xfft") if "data.pkl" in member.filename else data)
    with pytest.raises(cp.DamagedError, match="claims 1020 bytes for its tensor '0', which has fewer"):
        load_any(path)


def asked(elements: bytes, key: bytes = b"0") -> bytes:
    """The persistent id of a storage of float32, written by hand."""
    return b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + key + b"X\3\0\0\0cpu" + elements + b"t"


STORAGES = {  # of a record of 100 bytes
    "the whole": (asked(b"K\x19") + b"Q", "contains a"),
    "one more": (asked(b"K\x1a") + b"Q", "claims 104 bytes"),
    "billions": (asked(b"\x8a\5\0\0\0\0\1") + b"Q", "claims 17179869184 bytes"),
    "no such record": (asked(b"K\1", b"1") + b"Q", "claims 4 bytes for its tensor '1'"),
    "a number from the memo": (b"](K\x19q\1K\x1aq\1e" + asked(b"h\1") + b"Qa", "claims 104 bytes"),
    "a number that is not the last": (b"](K\x19K\x1ae" + b"q\1" + asked(b"h\1") + b"Qa", "asks for a tensor in a way"),
    "made before": (b"](" + asked(b"K\x1a") + b"q\1eh\1Qa", "asks for a tensor in a way"),
    "made of parts": (b"](" + asked(b"K\x19") + b"K\x19h\1Qe", "asks for a tensor in a way"),
    "of no type": (asked(b"K\x19").replace(b"Float", b"Typed") + b"Q", "asks for a tensor in a way"),
}


@pytest.mark.parametrize("case", STORAGES)
def test_a_storage_has_the_bytes_that_it_claims(tmp_path: Path, case: str) -> None:
    """torch 2.8 reads beyond the end of a record that is shorter."""
    pickled, message = STORAGES[case]
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": b"\x80\2" + pickled + b".", "data/0": bytes(100), "version": b"3\n"}.items():
            file.writestr(f"a/{name}", data)
    with pytest.raises(UserError, match=message):
        load_any(path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("a/DATA/0", bytes(200))
    with pytest.raises(UserError, match="two members of the same name"):
        load_any(path)


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("bias", [True, False])
def test_our_ckpt_pt_has_the_form_that_nanogpt_expects(tmp_path: Path, bias: bool) -> None:
    given = nanogpt_dict(bias)
    got = load_any(write(tmp_path, given), need_tokenizer=False)
    path = cp.write_nanogpt(tmp_path / "new" / "ckpt.pt", got)
    assert os.listdir(path.parent) == ["ckpt.pt"]
    back = torch.load(path, map_location="cpu")  # as nanoGPT's scripts do
    assert set(back) == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "written_by"}
    assert back["model_args"] == given["model_args"] and back["iter_num"] == 2000
    assert back["best_val_loss"] == pytest.approx(1.4697) and back["config"]["dataset"] == "toy"
    assert back["model"].keys() == given["model"].keys()
    assert all(torch.equal(back["model"][name], value) for name, value in given["model"].items())
    head, embedding = back["model"]["lm_head.weight"], back["model"]["transformer.wte.weight"]
    assert head.data_ptr() == embedding.data_ptr()
    assert back["optimizer"]["state"].keys() == given["optimizer"]["state"].keys()
    for i, slots in given["optimizer"]["state"].items():
        assert all(torch.equal(back["optimizer"]["state"][i][slot], value) for slot, value in slots.items())
    for ours, theirs in zip(back["optimizer"]["param_groups"], given["optimizer"]["param_groups"], strict=True):
        assert ours == theirs
    again = load_any(path, need_tokenizer=False)
    assert again.optimizer is not None and got.optimizer is not None
    assert again.optimizer["param_groups"] == got.optimizer["param_groups"] and again.config == got.config


def test_without_moments_nanogpt_starts_with_fresh_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = load_any(write(tmp_path, nanogpt_dict()), need_tokenizer=False)
    muon = {"state": {n: {"momentum_buffer": m} for n, m in moments(nanogpt_dict(), False).items()}}
    for optimizer, note in ((None, ""), (muon | {"param_groups": []}, "will start with fresh moments")):
        got.optimizer = optimizer
        back = torch.load(cp.write_nanogpt(tmp_path / "x.pt", got))
        assert back["optimizer"]["state"] == {} and note in capsys.readouterr().err
        params = [torch.nn.Parameter(p) for n, p in got.model.items() if n != "lm_head.weight"]
        fresh = torch.optim.AdamW(
            [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() < 2]}]
        )
        fresh.load_state_dict(back["optimizer"])
        assert [g["weight_decay"] for g in fresh.param_groups] == [0.1, 0.0]
        assert fresh.param_groups[0]["lr"] == 1e-3 and fresh.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"pos_embedding": "rope"}, "pos_embedding=rope"),
        ({"norm": "rmsnorm"}, "norm=rmsnorm"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"activation": "swiglu"}, "activation=swiglu"),
        ({"activation": "gelu_tanh"}, "activation=gelu_tanh: --accept_erf_gelu"),
        ({"n_kv_head": 1}, "n_kv_head=1"),
        ({"mlp_hidden": 24}, "mlp_hidden=24"),
        ({"qk_norm": True}, "qk_norm"),
        ({"tie_embeddings": False}, "tie_embeddings=False"),
        ({"logit_softcap": 15.0}, "logit_softcap=15.0"),
    ],
)
def test_models_that_nanogpt_cannot_express_are_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    config = GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V, **fields)
    ckpt = cp.Checkpoint(None, 1, config, GPT(config).state_dict())
    with pytest.raises(UserError, match=re.escape(reason).replace("\\ ", " ")):
        cp.write_nanogpt(tmp_path / "ckpt.pt", ckpt)
    assert os.listdir(tmp_path) == []
    if fields == {"activation": "gelu_tanh"}:
        cp.write_nanogpt(tmp_path / "ckpt.pt", ckpt, accept_erf_gelu=True)


def test_a_ckpt_pt_of_the_users_is_never_overwritten_unasked(tmp_path: Path) -> None:
    path = write(tmp_path, nanogpt_dict())
    theirs = path.read_bytes()
    got = load_any(path, need_tokenizer=False)
    with pytest.raises(UserError, match="not written by this program.*--overwrite"):
        cp.write_nanogpt(path, got)
    path.write_bytes(b"something else altogether")
    with pytest.raises(UserError, match="not written by this program"):
        nanogpt_ckpt.check_nanogpt(path, got.model_config)
    path.write_bytes(theirs)
    assert path.read_bytes() == theirs and not nanogpt_ckpt.is_ours(path)
    cp.write_nanogpt(path, got, overwrite=True)
    assert nanogpt_ckpt.is_ours(path)
    got.step = 2001
    cp.write_nanogpt(path, got)  # our own is replaced
    assert load_any(path, need_tokenizer=False).step == 2001
    # nanoGPT resumes from it and saves: now it is the user's
    content = torch.load(path)
    write(tmp_path, {key: content[key] for key in nanogpt_dict()})
    with pytest.raises(UserError, match="not written by this program"):
        cp.write_nanogpt(path, got)
    with pytest.raises(UserError, match="is a folder"):
        cp.write_nanogpt(tmp_path, got)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = load_any(write(tmp_path, nanogpt_dict()), need_tokenizer=False)
    path = cp.write_nanogpt(tmp_path / "out" / "ckpt.pt", got)
    before = path.read_bytes()
    events: list[str] = []
    really_replace = os.replace

    def replace(old: Any, new: Any) -> None:
        events.append(f"to {Path(new).name}")
        really_replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: events.append("sync"))
        patch.setattr(os, "replace", replace)
        cp.write_nanogpt(path, got)
    names = ["sync"] if os.name == "posix" else []
    # the folder's name and its parents', the content before the file's name, that before the return
    assert events == [*names * len(path.parent.parents), "sync", "to ckpt.pt", *names]
    got.step += 1

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(cp.SaveError, match="cannot write .*No space left"):
                cp.write_nanogpt(path, got)
        assert os.listdir(path.parent) == ["ckpt.pt"] and path.read_bytes() == before

    def half(content: Any, file: Any) -> None:
        file.write(b"PK half an archive")
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0\nstack")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(cp.SaveError, match="unexpected pos"):
        cp.write_nanogpt(path, got)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["ckpt.pt"]


# ------------------------------------------------------------------------------------------------------- the command


def run_export(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["llm-export", *arguments])
    return export.main()


def test_llm_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    got = load_any(write(tmp_path / "theirs", nanogpt_dict()), need_tokenizer=False)
    fields = {name: getattr(got, name) for name in ("model_config", "model", "optimizer", "trainer", "config")}
    for step in (10, 20):
        cp.save_checkpoint("out", step=step, run_id="r", val_loss=1 / step, **fields)
    (tmp_path / "folder").mkdir()
    assert run_export(monkeypatch, "--out_dir=out", "--format=nanogpt", "--output=folder") == 0
    assert "wrote folder/ckpt.pt: step 20" in capsys.readouterr().out.replace("\\", "/")
    assert run_export(monkeypatch, "--out_dir=out", "--which=10", "--format=nanogpt", "--output=folder/ckpt.pt") == 0
    assert torch.load("folder/ckpt.pt")["iter_num"] == 10
    for arguments, message in (
        ((), "--out_dir=FOLDER"),
        (("--out_dir=out", "--format=nanogpt"), "--output is missing"),
        (("--out_dir=nowhere", "--format=nanogpt", "--output=x"), "no checkpoint nowhere"),
        (("--out_dir=out", "--which=30", "--output=x"), "no checkpoint of step 30"),
        (("--out_dir=out", "--format=onnx", "--output=x"), "format='onnx' is not valid"),
        (("--out_dir=out", "--output=x", "more"), "unexpected 'more'"),
        (("--out_dir=out", "--format=nanogpt", "--output=theirs"), "not written by this program"),
        (("--out_dir=out", "--format=nanogpt", "--output=out/step-00000010/model.json"), "not written by this program"),
    ):
        assert run_export(monkeypatch, *arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert not (tmp_path / "x").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['llm-export', '--help']\nfrom llm_from_scratch.cli.export import main\n"
        "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "--accept_erf_gelu" in done.stdout


# ---------------------------------------------------------------------------------------------------- nanoGPT itself

SETTINGS = (
    "--dataset=toy --device=cpu --dtype=float32 --compile=False --block_size=16 --batch_size=4 --n_layer=2 --n_head=2 "
    "--n_embd=16 --gradient_accumulation_steps=1 --eval_iters=2 --eval_interval=5 --log_interval=1 --warmup_iters=2"
).split()


@pytest.fixture
def nanogpt(tmp_path: Path) -> Callable[..., str]:
    """Runs one of nanoGPT's scripts in a folder with a small dataset; returns what it printed."""
    assert NANOGPT is not None
    for name in ("train.py", "sample.py", "model.py", "configurator.py"):
        shutil.copy(Path(NANOGPT) / name, tmp_path)
    make_data(tmp_path / "data" / "toy", "abcdefghij\n ")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        rng.integers(0, 12, 2000).astype(np.uint16).tofile(tmp_path / "data" / "toy" / f"{split}.bin")

    def run(script: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def losses(output: str) -> list[str]:
    return re.findall(r"^(?:iter|step) \d+: .*?(?=, time|$)", output, re.MULTILINE)


@pytest.mark.slow
@needs_nanogpt
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_resumes_a_checkpoint_written_from_its_own(
    tmp_path: Path, nanogpt: Callable[..., str], monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*SETTINGS, f"--bias={bias}"]
    printed = nanogpt("train.py", *arguments, "--max_iters=10", "--out_dir=theirs")
    got = load_any("theirs")
    best = re.findall(r"val loss ([\d.]+)", printed)[-1]
    assert got.step == 10 and f"{got.trainer['best_val_loss']:.4f}" == best
    assert got.tokenizer is not None and got.tokenizer.vocab_size == 12
    raw = torch.load("theirs/ckpt.pt")
    assert all(torch.equal(got.model[name], value) for name, value in raw["model"].items())
    assert got.optimizer is not None
    # by the values: each parameter's moments have its shape, and there are as many as nanoGPT has
    assert len(got.optimizer["state"]) == len(raw["optimizer"]["state"]) == len(raw["model"]) - 1
    order = [n for g in got.optimizer["param_groups"] for n in g["names"]]
    for i, name in enumerate(order):
        assert torch.equal(got.optimizer["state"][name]["exp_avg"], raw["optimizer"]["state"][i]["exp_avg"])

    # through our own directory format, and back to nanoGPT
    cp.save_checkpoint(
        "ours", step=got.step, run_id="r", model_config=got.model_config, model=got.model, optimizer=got.optimizer,
        trainer=got.trainer, config=got.config, tokenizer=got.tokenizer,
    )  # fmt: skip
    assert run_export(monkeypatch, "--out_dir=ours", "--format=nanogpt", "--output=exported/ckpt.pt") == 0
    resume = [*arguments, "--max_iters=16", "--init_from=resume"]
    expected = losses(nanogpt("train.py", *resume, "--out_dir=theirs"))
    assert len(expected) >= 8 and expected[0].startswith("step 10:")
    assert losses(nanogpt("train.py", *resume, "--out_dir=exported")) == expected
    sample = ["--device=cpu", "--dtype=float32", "--num_samples=1", "--max_new_tokens=20", "--start=a"]
    theirs, ours = (
        nanogpt("sample.py", *sample, f"--out_dir={d}").split("meta.pkl...")[1] for d in ("theirs", "exported")
    )
    assert theirs == ours and len(theirs) > 20
