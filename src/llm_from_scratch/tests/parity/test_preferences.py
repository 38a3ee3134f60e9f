"""Preference optimisation against a hand-worked value, and against a plain loop over a transformers model."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm_from_scratch.checkpoint.contents import REFERENCE, read_manifest
from llm_from_scratch.checkpoint.hashed_folder import MANIFEST, with_own_hash, write_synced
from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.cli.train import main
from llm_from_scratch.config import Config
from llm_from_scratch.core.cache import Documents
from llm_from_scratch.core.model import Head
from llm_from_scratch.core.packing import LEARNED
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.errors import UserError
from llm_from_scratch.training.opening import open_run
from llm_from_scratch.training.preferences import PreferenceLoss
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train, train_step

from ..ranks import in_ranks
from ..tiny import tiny_config

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS, BETA = 20, 0.3
WORDS = ["sun", "moon", "é", "tree", "blue", "42", "why", "so"]


def test_a_value_worked_by_hand() -> None:
    loss, head = PreferenceLoss(beta=0.5), Head(3, 2, softcap=0.0)
    # with activations of zero both tokens have probability 1/2. Chosen: two tokens, rejected: one, so m = -log 2; the
    # second pair's answers are equally long, so m = 0. -log sigmoid(0.5 (m - m0)) = log(1 + exp(-0.5 (m - m0)))
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2, 3]])
    targets = torch.tensor([[-1, 1, 0, -1, 1, 0, 1]])
    loss.note(None, (None, None, Documents(numbers, torch.tensor([[0.25, -1.0, float("nan")]]))))
    _, found = loss(torch.zeros(1, 7, 3), targets, head)
    # log(1 + exp(0.5 (0.693147 + 0.25))) = 0.956478; log(1 + exp(-0.5)) = 0.474077
    assert found.item() == pytest.approx((0.956478 + 0.474077) / 2, abs=2e-6)
    loss.note(None, (None, None, Documents(numbers)))
    assert loss(torch.zeros(1, 7, 3), targets, head)[1][0].tolist() == pytest.approx([-0.693147, 0.0], abs=1e-6)


def talk(rng: random.Random) -> dict[str, Any]:
    words = lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))  # noqa: E731
    turns = [{"role": role, "content": words()} for role in ("user", "assistant", "user")]
    return {"prompt": rng.choice([words(), turns]), "chosen": words() + " sun", "rejected": words() + " moon"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a tiny Llama with a tokenizer and a chat template, in the folder `model`."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken

    from llm_from_scratch.core.tokenizer import HFTokenizer

    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(talk(rng)) + "\n" for _ in range(120)))
    backend = HFTokenizer.train([" ".join(WORDS)] * 9, 280).backend(False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.dim() > 1 else None
    model.save_pretrained(folder / "model")
    prepare("pairs.jsonl", root=folder, report=lambda line: None, tokenizer=str(folder / "model"))
    return folder


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes: Any) -> Config:
    plain: dict[str, Any] = {
        "init_from": "model", "block_size": 192, "batch_size": 6, "max_iters": STEPS, "dropout": 0.0, "loss": "dpo",
        "dpo_beta": BETA, "learning_rate": 1e-3, "decay_lr": False, "weight_decay": 0.0, "grad_clip": 1.0,
        "beta2": 0.99, "sample_order": "shuffled", "out_dir": "run",
    }  # fmt: skip
    return tiny_config(Path("data/processed/pairs"), **{**plain, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [6, 2])
def test_twenty_steps_equal_transformers(here: Path, micro_batch: int) -> None:
    from ..lazy import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained("model").train()
    reference = transformers.LlamaForCausalLM.from_pretrained("model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    texts = {}  # of an answer with its prompt: the answer
    for line in (here / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        for side in ("chosen", "rejected"):
            messages = [*prompt, {"role": "assistant", "content": row[side]}]
            texts[tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")] = row[side]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)

    def log_probability(model: Any, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        scores = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        return scores.gather(1, ids[1:, None])[:, 0][learned[1:]].sum()

    with open_run(settings(micro_batch=micro_batch), None, "llm-train", None) as run:
        data: Any = run.plan.train_data
        seen, first = 0, None
        for step in range(STEPS):
            rows = run.plan.order.starts(step, run.plan.global_batch)
            losses = []
            for row in rows:
                sums = []
                for piece in range(data.first[row], data.first[row + 1]):
                    part = slice(data.begins[piece], data.begins[piece] + data.lengths[piece])
                    ids = torch.from_numpy(data.tokens[part].astype("int64"))
                    learned = torch.from_numpy(data.token_marks[part] & LEARNED).bool()
                    assert tokenizer.decode(ids[learned]) == texts[tokenizer.decode(ids)] + "<|im_end|>"
                    with torch.no_grad():
                        base = log_probability(reference, ids, learned)
                    sums.append(log_probability(theirs, ids, learned) - base)
                losses += [-F.logsigmoid(BETA * (a - b)) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            loss, seen = torch.stack(losses).mean(), seen + len(losses)
            ours = float(train_step(run, *run.next_batch()).loss)
            assert ours == pytest.approx(loss.item(), abs=1e-6), step
            first = first or ours
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
        assert seen > 100 and first == pytest.approx(0.693147, abs=1e-5) and ours < 0.6


@pytest.mark.slow
def test_a_resumed_run_has_the_reference_of_its_start(here: Path) -> None:
    plain = {"eval_interval": 4, "progress": "none", "lora_rank": 2, "learning_rate": 3e-2, "final_eval": True}
    whole = train(settings(out_dir="whole", **plain))
    train(settings(max_iters=8, **plain))
    stored = (here / "run" / "step-00000008" / REFERENCE).read_bytes()
    resumed = train(settings(init_from="resume", **plain))
    assert resumed.final is not None and whole.final is not None and resumed.final.loss == whole.final.loss
    assert resumed.final.of_pairs
    assert resumed.final.loss < 0.69 and (here / "run" / f"step-{STEPS:08d}" / REFERENCE).read_bytes() == stored
    rows = [json.dumps(talk(random.Random(n))) + "\n" for n in range(120)]
    (here / "other.jsonl").write_text("".join(rows))
    prepare("other.jsonl", root=here, report=lambda line: None, tokenizer="model")
    other = settings(init_from="resume", allow_new_data=True, max_iters=30, **plain)
    other.data.dataset = "data/processed/other"
    with pytest.raises(UserError, match=f"step-{STEPS:08d}/{REFERENCE}, the reference .*other data"):
        train(other)


def forget_reference(step: Path) -> bytes:
    """Makes a checkpoint as it was before it had a reference."""
    content = (step / REFERENCE).read_bytes()
    (step / REFERENCE).unlink()
    manifest = read_manifest(step)
    files = {name: entry for name, entry in manifest["files"].items() if name != REFERENCE}
    write_synced(step / MANIFEST, [with_own_hash({**manifest, "files": files})])
    return content


@pytest.mark.slow
def test_a_run_from_before_checkpoints_had_the_reference_is_resumed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"eval_interval": 4, "progress": "none", "lora_rank": 2, "keep_last": 9}
    train(settings(max_iters=8, **plain))
    stored = forget_reference(here / "run" / "step-00000008")
    (here / "run" / REFERENCE).write_bytes(stored)
    train(settings(init_from="resume", max_iters=12, **plain))
    assert (here / "run" / "step-00000012" / REFERENCE).read_bytes() == stored
    shutil.rmtree(here / "run" / "step-00000012")
    cool = ["--init_from=run/step-00000008", "--cooldown=0.5", "--dataset=data/processed/pairs"]
    assert main([*cool, "--out_dir=cooled"]) == 0
    assert (here / "cooled" / "step-00000012" / REFERENCE).read_bytes() == stored
    for content, reason in ((stored[:-4], "cannot be used"), (None, "No such file")):
        (here / "run" / REFERENCE).unlink() if content is None else (here / "run" / REFERENCE).write_bytes(content)
        message = f"{REFERENCE}, the reference of this run, cannot be used.*{reason}|{reason}"
        with pytest.raises(UserError, match=message):
            train(settings(init_from="resume", max_iters=30, **plain))
    assert main([*cool, "--out_dir=again"]) == 2 and not Path("again").exists()
    assert "does not hold the reference of its run with --loss=dpo, and run/reference" in capsys.readouterr().err


@pytest.mark.slow
def test_the_reference_is_restored_from_a_mirror_and_copied_to_a_cooldown(here: Path) -> None:
    plain = {"eval_interval": 4, "progress": "none", "lora_rank": 2, "learning_rate": 3e-2, "keep_last": 9}
    whole = train(settings(out_dir="whole", **plain))
    train(settings(max_iters=8, mirror=f"file://{here}/store", **plain))
    shutil.rmtree(here / "run")
    data = "--dataset=data/processed/pairs"
    words = ["--init_from=resume", "--out_dir=run", f"--max_iters={STEPS}", f"--mirror=file://{here}/store", data]
    assert main(words) == 0
    final = f"step-{STEPS:08d}/adapter.safetensors"
    assert whole.step == STEPS and (here / "run" / final).read_bytes() == (here / "whole" / final).read_bytes()
    assert main(["--init_from=whole/step-00000008", "--cooldown=0.5", data, "--out_dir=cooled"]) == 0
    assert (here / "cooled" / "step-00000012" / REFERENCE).read_bytes() == (
        here / "whole" / "step-00000008" / REFERENCE
    ).read_bytes()


def trained(leaves: dict[str, Any]) -> float:
    """The loss of the whole validation split after a run, in a process of in_ranks() or alone."""
    torch.set_num_threads(1)
    result = train(settings(**leaves))
    assert result.final is not None
    return result.final.loss


@pytest.mark.slow
def test_sharded_models_learn_preferences_too(here: Path) -> None:
    plain = {"eval_interval": 20, "progress": "none", "lora_rank": 2, "learning_rate": 1e-2, "final_eval": True}
    losses = in_ranks(2, trained, here, {**plain, "parallel": "fsdp", "out_dir": "sharded"})
    assert losses == [pytest.approx(trained(plain), rel=1e-5)] * 2 and losses[0] < 0.69
    one, two = (load(name, "last", merge=False) for name in ("run", "sharded"))
    assert one.reference is not None and two.reference is not None and len(one.reference) == len(two.reference)
    for name, tensor in one.adapter.items():
        assert float((two.adapter[name] - tensor).norm() / tensor.norm()) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "next_token", "dpo_beta": 0.1}, "holds pairs of answers, which only llm-train --loss=dpo reads"),
        ({"loss": "next_token"}, "dpo_beta has no effect without --loss=dpo"),
        ({"block_size": 8}, "no pair fits into block_size=8"),
        ({"init_from": "scratch"}, "--loss=dpo needs a trained model"),
        ({"compile": True}, "--loss=dpo does not support compile=True"),
        ({"documents": False}, "--loss=dpo does not support documents=False"),
        ({"dpo_beta": 0.0}, "dpo_beta"),
    ],
)
def test_options_without_effect_are_refused_by_name(here: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(settings(**changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}', "line 2: expected an object with prompt, chosen, rejected"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "line 2: message 2: content is not a string"),
        ('{"messages": []}', "line 2: expected an object with prompt, chosen, rejected"),
    ],
)
def test_a_line_that_is_not_a_pair_is_an_error_with_its_place(here: Path, line: str, message: str) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        prepare("bad.jsonl", root=here, report=lambda line: None, tokenizer="byte")
