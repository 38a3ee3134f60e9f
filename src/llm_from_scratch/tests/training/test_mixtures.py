"""Training on a mixture of datasets: the losses of its parts, resuming, and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.cli import evaluate
from llm_from_scratch.cli import train as command
from llm_from_scratch.core.dataset import TokenData
from llm_from_scratch.core.tokenizer import CharTokenizer
from llm_from_scratch.core.weights import build_model
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine import device
from llm_from_scratch.training.evaluate import evaluate_split
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train

from ..tiny import TOKENIZER, arguments, babble, count_documents, read_metrics, tiny_config, write_data

MIX = "{a: {weight: 0.75, max_epochs: 3}, b: 0.25}"
SHUFFLED: dict[str, Any] = {"sample_order": "shuffled", "final_eval": True}


@pytest.fixture
def parts(here: Path) -> Path:
    write_data(here / "data" / "a")
    write_data(here / "data" / "b", train=TOKENIZER.encode(babble(900, 5)), val=TOKENIZER.encode(babble(300, 6)))
    return here


def test_a_run_on_a_mixture(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(MIX, out_dir="out", progress="lines", max_iters=8, **SHUFFLED)
    train(config)
    said = capsys.readouterr().out
    assert "data: a, b, 2,900 training and 505 validation tokens" in said
    assert "mixture: a 75.0% of the windows (0.10 epochs), b 25.0% of the windows (0.07 epochs)" in said
    entries = read_metrics(Path("out"))
    for entry in (entry for entry in entries if "val_loss" in entry):
        for split in ("train", "val"):
            each = entry[f"{split}_loss/a"], entry[f"{split}_loss/b"]
            assert entry[f"{split}_loss"] == pytest.approx(0.75 * each[0] + 0.25 * each[1]) and each[0] != each[1]
    found = load_checkpoint(find_checkpoint("out", "last"))
    assert set(found.trainer["parts"]) == {"a", "b"} and all(len(h) == 64 for h in found.trainer["parts"].values())
    # the loss of each part: that of the part alone
    model = build_model(found.model_config, found.model).eval()
    runtime = device.resolve(config.system)
    alone = {name: evaluate_split(model, TokenData.open(parts / "data" / name, "val"), 8, runtime) for name in "ab"}
    last = entries[-1]
    for name, one in alone.items():
        assert last[f"val_loss_full/{name}"] == pytest.approx(one.loss, rel=1e-5)
    loss = 0.75 * alone["a"].loss + 0.25 * alone["b"].loss
    assert last["val_loss_full"] == pytest.approx(loss, rel=1e-5)
    assert last["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5), "a character is a byte"
    assert f"val_loss_full/a {alone['a'].loss:.4g}" in said and "val_loss/b" in said
    assert evaluate.main(["--out_dir=out", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[0].rpartition(", ")[2] for line in lines[:2]] and len(lines) == 3
    assert lines[0].startswith(f"loss {alone['a'].loss:.4f}") and lines[2].startswith(f"loss {loss:.4f}")
    assert lines[2].endswith("a, b, weighted")


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out_dir, steps in (("whole", [8]), ("cut", [3, 5, 8])):
        for number, last in enumerate(steps):
            how = "resume" if number else "scratch"
            train(tiny_config(MIX, out_dir=out_dir, max_iters=last, lr_decay_iters=8, init_from=how, **SHUFFLED))
    whole, cut = (load_checkpoint(find_checkpoint(name, "last")) for name in ("whole", "cut"))
    assert all(torch.equal(whole.model[name], cut.model[name]) for name in whole.model)
    # a part that has changed is named
    shutil.copy("data/a/val.bin", "data/b/val.bin")
    with pytest.raises(UserError, match="the validation tokens in b have changed since the run started"):
        make_plan(tiny_config(MIX, out_dir="cut", max_iters=9, init_from="resume", **SHUFFLED))


def test_mismatches_are_refused_by_name(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(parts / "data" / "c", tokenizer=CharTokenizer.from_text(["\n xyz"]), train=[1, 2] * 50, val=[1, 2] * 20)
    for options, why in (
        (["--dataset={a: 1, c: 1}"], "need the same tokenizer: data/a has char (20 ids), data/c char (5 ids)"),
        (["--dataset={a: 1, x: 1}"], "dataset 'x' not found"),
        (["--dataset={a: 1, data/a: 1}"], "names one dataset twice (data/a, data/a)"),
        (["--dataset={a: {weight: 1, max_epochs: 0.02}}"], "the mixture is enough for 1 steps, but the run has 8"),
        (
            ["--dataset={a: 1, b: 1}", "--sample_order=shuffled", "--forget_ngrams", "--max_ngram=3"],
            "forget_ngrams needs one dataset",
        ),
    ):
        assert command.main(arguments(**SHUFFLED)[:-1] + options) == 2
        assert why in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.slow
def test_documents_of_a_mixture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines and conversations in one run, interrupted and resumed."""
    (here / "sums.txt").write_text("".join(f"{a}+{a}={2 * a}\n" for a in range(200)))
    sums = prepare("sums.txt", root=here, report=lambda line: None, tokenizer="byte", lines=True)
    rows = "".join(f'{{"prompt": "{n}?", "completion": "{"ha" * (n % 7)}{n}"}}\n' for n in range(60))
    (here / "chat.jsonl").write_text(rows)
    chat = prepare("chat.jsonl", root=here, report=lambda line: None, tokenizer=str(sums))
    mix = "{sums: 0.5, chat: 0.5}"
    settings: dict[str, Any] = {**SHUFFLED, "block_size": 32, "batch_size": 6, "progress": "lines"}
    train(tiny_config(mix, out_dir="whole", max_iters=6, **settings))
    said = capsys.readouterr().out
    for name, folder, count in (("sums", sums, 200), ("chat", chat, 60)):
        in_train, in_val = count_documents(folder)
        assert in_train + in_val == count and f"documents of {name}: {in_train} documents in" in said
    train(tiny_config(mix, out_dir="cut", max_iters=3, lr_decay_iters=6, **settings))
    train(tiny_config(mix, out_dir="cut", max_iters=6, init_from="resume", **settings))
    whole, cut = (load_checkpoint(find_checkpoint(name, "last")) for name in ("whole", "cut"))
    assert all(torch.equal(whole.model[name], cut.model[name]) for name in whole.model)
    capsys.readouterr()
    assert evaluate.main(["--out_dir=whole", "--device=cpu", "--json"]) == 0
    assert '"domains": {"sums": {' in capsys.readouterr().out
