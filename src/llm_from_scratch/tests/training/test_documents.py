"""Training on whole documents: the loss of a batch, its parts, resuming, and the lines that are printed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.cli import evaluate
from llm_from_scratch.cli import train as command
from llm_from_scratch.core.model import Attention
from llm_from_scratch.core.packing import PackedData
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.errors import UserError
from llm_from_scratch.training import forecast as forecasts
from llm_from_scratch.training.evaluate import evaluate_split
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train, train_step

from ..tiny import arguments, count_documents, read_metrics, tiny_config

CHAT: dict[str, Any] = {
    "block_size": 32,
    "sample_order": "shuffled",
    "batch_size": 6,
    "max_iters": 6,
    "eval_interval": 3,
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of different lengths."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [{"prompt": f"{n}?", "completion": "ha" * (n % 7) + str(n)} for n in range(60)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare("c.jsonl", root=folder, report=lambda line: None, tokenizer="char")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    (folder / "t.txt").write_text("".join(f"{a}+{a}={2 * a}\n" for a in range(200)))
    return prepare("t.txt", root=folder, report=lambda line: None, tokenizer="char", lines=True)


def opened(plan: Any) -> Run:
    """A run whose weights are the same every time."""
    torch.manual_seed(0)
    return Run(plan)


def naive(model: Any, data: PackedData) -> float:
    """The mean loss over what is learned, one document at a time."""
    total, count = 0.0, 0
    for row in range(len(data.learned)):
        (x, y), numbers, _ = (
            torch.from_numpy(part) for part in data.batch(np.array([row]), data.block_size, slice(None))
        )
        for number in numbers.unique():
            here = numbers[0] == number
            learned = int((y[0, here] >= 0).sum())
            if learned:
                with torch.no_grad():
                    total += float(model(x[:, here], y[:, here])[1]) * learned
                count += learned
    return total / count


def test_the_loss_of_a_batch_is_the_mean_over_its_learned_tokens(chats: Path) -> None:
    """Split into micro-batches with unequal shares, the loss and the gradient are those of all documents alone."""
    found = []
    for micro_batch in (6, 2, 1):
        run = opened(make_plan(tiny_config(chats, **CHAT, micro_batch=micro_batch)))
        x, y, numbers, share = batch = run.next_batch()
        assert share.sum() == pytest.approx(1) and len(set(share.tolist())) > 2, "the rows must differ"
        step = train_step(run, *batch)
        weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        found.append((float(step.loss), float(step.grad_norm), weights))
        run.close()
    run = opened(make_plan(tiny_config(chats, **CHAT)))
    losses = [
        run.model(x[row : row + 1, here], y[row : row + 1, here])[1] * int((y[row, here] >= 0).sum())
        for row in range(6)
        for number in numbers[row].unique()
        if (y[row, here := numbers[row] == number] >= 0).any()
    ]
    loss = sum(losses) / int((y >= 0).sum())
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]).norm()
    for ours, gradient, weights in found:
        assert ours == pytest.approx(loss.item(), rel=1e-6) and gradient == pytest.approx(float(norm), rel=1e-5)
        assert torch.allclose(weights, found[0][2], atol=1e-6)
    run.close()


def test_a_run_on_conversations(chats: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(chats, out_dir="a", final_eval=True, progress="lines", **CHAT)
    result = train(config)
    said = capsys.readouterr().out
    in_train, in_val = count_documents(chats)
    assert in_train + in_val == 60 and in_train > in_val > 0
    assert f"documents: {in_train} documents in" in said and "example (in the loss: >>...<<): User:\\n" in said
    plan = make_plan(dataclasses.replace(config, training=dataclasses.replace(config.training, out_dir="c")))
    run = Run(plan)
    run.model.load_state_dict(load_checkpoint(find_checkpoint("a", "last")).model)
    assert isinstance(plan.val_data, PackedData) and result.final is not None
    assert result.final.loss == pytest.approx(naive(run.model.eval(), plan.val_data), rel=1e-6)
    assert result.final.tokens == plan.val_data.learned.sum() == result.final.text_bytes, "of a char tokenizer"
    run.close()
    # interrupted and resumed: bit-equal
    for steps, how in ((2, "scratch"), (6, "resume")):
        first = tiny_config(
            chats, **{**CHAT, "out_dir": "b", "max_iters": steps, "init_from": how, "lr_decay_iters": 6}
        )
        train(first, quiet=True)
    whole = tiny_config(chats, **{**CHAT, "out_dir": "d", "lr_decay_iters": 6})
    train(whole, quiet=True)
    one, two = (load_checkpoint(find_checkpoint(name, "last")) for name in ("b", "d"))
    assert all(torch.equal(one.model[name], two.model[name]) for name in one.model)
    losses = [[e["loss"] for e in read_metrics(Path(name)) if "loss" in e] for name in ("b", "d")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    # changed marks are changed data
    with open(chats / "train_marks.bin", "r+b") as file:
        before = file.read(9)
        file.seek(0)
        file.write(bytes([before[0], *(b ^ 1 for b in before[1:])]))
    try:
        with pytest.raises(UserError, match="have changed since the run started"):
            train(tiny_config(chats, **{**CHAT, "out_dir": "b", "init_from": "resume", "max_iters": 9}), quiet=True)
    finally:
        with open(chats / "train_marks.bin", "r+b") as file:
            file.write(before)


def test_lines_train_as_documents_unless_asked_otherwise(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tiny_config(lines, **CHAT, epochs=2.0))
    assert isinstance(plan.train_data, PackedData) and plan.config.data.documents is True
    assert plan.last_step == -(-2 * len(plan.train_data.learned) // 6)
    in_train, in_val = count_documents(lines)
    assert in_train + in_val == 200 and in_train > in_val > 0
    assert any(f"documents: {in_train} documents in" in note for note in plan.notes)
    whole = make_plan(tiny_config(lines, **CHAT, documents=False))
    assert not isinstance(whole.train_data, PackedData) and whole.config.data.documents is False
    model = Run(plan).model.eval()
    assert evaluate_split(model, plan.val_data, 32, plan.runtime).loss == pytest.approx(
        naive(model, plan.val_data), rel=1e-6  # type: ignore[arg-type]
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(Attention, "forward", lambda self, q, k, v, mask, causal: attend(q, k, v, is_causal=True))
    with pytest.raises(UserError, match="cannot keep the documents of a window apart"):
        Run(plan)


def test_settings_that_documents_exclude(lines: Path, chats: Path, tiny_data: Path) -> None:
    for folder, options, says in (
        (lines, {"documents": True, "stride": 4}, "stride has no effect with --documents=True"),
        (lines, {"data_on_device": True}, "data_on_device has no effect with --documents=True"),
        (chats, {"documents": False}, "holds conversations"),
        (tiny_data, {"documents": True}, "do not end with an end-of-text token"),
    ):
        with pytest.raises(UserError, match=says):
            make_plan(tiny_config(folder, **{**CHAT, **options}))


@pytest.mark.cases(2)
@pytest.mark.parametrize("options", [{"activation_budget": None}, {"gradient_checkpointing": True}, {"max_ngram": 3},
                                     {"chunked_loss": True}, {"dropout": 0.2}])  # fmt: skip
def test_documents_with_other_settings(lines: Path, options: dict[str, Any]) -> None:
    """Every way to compute a step sees the documents: its loss is that of the plain model, without dropout."""
    run = opened(make_plan(tiny_config(lines, **{**CHAT, **options, "dropout": 0.0})))
    batch = run.next_batch()
    plain = opened(make_plan(tiny_config(lines, **{**CHAT, "max_ngram": options.get("max_ngram", 0)})))
    for _ in range(2):
        ours, theirs = train_step(run, *batch), train_step(plain, *batch)
        assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-5)
        assert float(ours.grad_norm) == pytest.approx(float(theirs.grad_norm), rel=1e-4)
    if options.get("dropout"):
        assert np.isfinite(float(train_step(opened(make_plan(tiny_config(lines, **CHAT, **options))), *batch).loss))


def test_llm_eval_equals_the_evaluation_of_training(
    chats: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_from_scratch.cli import evaluate

    result = train(tiny_config(chats, out_dir="e", final_eval=True, **CHAT), quiet=True)
    assert result.final is not None
    for quantize, apart in (("none", 1e-6), ("int8", 0.05)):
        assert not evaluate.main(["--out_dir=e", f"--dataset={chats}", "--json", f"--quantize={quantize}"])
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(result.final.loss, rel=apart) and found["tokens"] == result.final.tokens
    assert evaluate.main(["--out_dir=e", f"--dataset={chats}", "--stride=4"]) == 2
    assert "remove it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_two_processes_weigh_by_token(chats: Path, here: Path) -> None:
    """Their shares of a batch have different numbers of learned tokens; the loss is that of one process."""
    Path("two.py").write_text("import sys\nfrom llm_from_scratch.cli.train import main\nsys.exit(main())\n")
    settings = {**CHAT, "batch_size": 3, "gradient_accumulation_steps": 2, "dropout": 0.0, "beta2": 0.95}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two.py",
         *arguments(**{**settings, "dataset": chats, "out_dir": "two", "backend": "gloo"})],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0 and "processes: 2 (gloo)" in done.stdout, done.stderr
    train(tiny_config(chats, out_dir="one", **settings), quiet=True)
    one, two = (read_metrics(Path(name)) for name in ("one", "two"))
    assert len(one) == len(two) > 6
    for a, b in zip(one, two, strict=True):
        for key in {"loss", "train_loss", "val_loss", "grad_norm", "lr"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-5), key


@pytest.mark.slow
def test_compiled_steps_keep_documents_apart(lines: Path) -> None:
    """--compile=True gives the losses of eager mode."""
    losses = []
    for compiled in (True, False):
        run = opened(make_plan(tiny_config(lines, **{**CHAT, "compile": compiled})))
        assert run.models.is_compiled == compiled
        losses.append([float(train_step(run, *run.next_batch()).loss) for _ in range(3)])
        run.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("data", ["chats", "lines"])
def test_a_run_on_documents_is_estimated(
    data: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From a rehearsal of fewer sequences, whose first pass is over one of them."""
    monkeypatch.setattr(forecasts, "rehearsal_size", lambda plan, budget: (1, 2))
    monkeypatch.setattr(forecasts, "SETTLED", 0.0)
    monkeypatch.setattr(forecasts, "MOST", 2)
    settings = {**CHAT, "n_layer": 2, "dataset": request.getfixturevalue(data), "out_dir": tmp_path / "run"}
    assert command.main([*arguments(**settings), "--documents=True", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "with 1 of 2 layers and 2 of 6 sequences" in out and "time: about" in out


@pytest.mark.cases(1)
@pytest.mark.parametrize("documents", [True, False])
def test_llm_eval_gives_the_final_loss_of_a_run(
    here: Path, lines: Path, capsys: pytest.CaptureFixture[str], documents: bool
) -> None:
    """Also of documents in data that was not prepared as documents, and of plain windows in data that was."""
    folder = lines
    if documents:
        for name in "abcdefgh":
            (here / f"{name}.txt").write_text(f"{name} and {name}. " * (1 + ord(name) % 5))
        sources = [f"{name}.txt" for name in "abcdefgh"]
        folder = prepare(sources, root=here, report=print, tokenizer="bpe:270", name="several", val_fraction=0.4)
    config = tiny_config(folder, out_dir="run", final_eval=True, documents=documents, **CHAT)
    final = train(config, quiet=True).final
    assert final is not None
    plan = make_plan(dataclasses.replace(config, training=dataclasses.replace(config.training, out_dir="other")))
    packed = PackedData.of(plan.val_data, folder, "val", 32, None)
    counts = {True: packed.learned.sum(), False: len(plan.val_data) - 1}
    assert final.tokens == counts[documents] != counts[not documents]
    (here / "link").symlink_to(folder)
    for dataset in (folder, here / "link"):
        capsys.readouterr()
        assert evaluate.main(["--out_dir=run", f"--dataset={dataset}", "--json", "--device=cpu"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(final.loss, rel=1e-6) and found["tokens"] == final.tokens
