"""Training on conversations against a plain loop over a transformers model: the same documents, one by one, with labels
-100 for what is not learned."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.core.packing import LEARNED
from llm_from_scratch.data.prepare import prepare
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train_step

from ..tiny import tiny_config

STEPS = 20
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPTIMIZER: dict[str, Any] = {
    "learning_rate": 1e-3,
    "decay_lr": False,
    "weight_decay": 0.0,
    "grad_clip": 1.0,
    "beta2": 0.99,
}


def talk(rng: random.Random) -> list[dict[str, str]]:
    words = ["sun", "moon", "é", "tree", "blue", "42", "why", "so"]
    text = lambda: " ".join(rng.choices(words, k=rng.randint(1, 6)))  # noqa: E731
    turns = [role for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")]
    return [{"role": role, "content": text()} for role in [*["system"] * rng.randint(0, 1), *turns]]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [8, 3])
def test_twenty_steps_equal_transformers(tmp_path: Path, micro_batch: int) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken

    from llm_from_scratch.core.tokenizer import HFTokenizer

    rng = random.Random(0)
    talks = [talk(rng) for _ in range(150)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks))
    backend = HFTokenizer.train([" ".join(m["content"] for m in messages) for messages in talks], 290).backend(False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    theirs_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    theirs_tokenizer.chat_template = TEMPLATE
    theirs_tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(theirs_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=theirs_tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(3) if p.dim() > 1 else None
    theirs.save_pretrained(tmp_path / "model")
    folder = prepare("c.jsonl", root=tmp_path, report=lambda line: None, tokenizer=str(tmp_path / "model"))

    run = Run(make_plan(tiny_config(
        folder, init_from=str(tmp_path / "model"), block_size=128, batch_size=12 if micro_batch == 3 else 8,
        micro_batch=micro_batch, max_iters=STEPS, dropout=0.0, sample_order="shuffled", **OPTIMIZER,
    )))  # fmt: skip
    data: Any = run.plan.train_data
    ids_of = {  # what transformers makes of every conversation, by its tokens
        tuple(theirs_tokenizer.apply_chat_template(m, tokenize=True, return_dict=False)): m for m in talks
    }
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    seen = 0
    for step in range(STEPS):
        rows = run.plan.order.starts(step, run.plan.global_batch)
        ours = float(train_step(run, *run.next_batch()).loss)
        losses, count = [], 0
        for row in rows:
            for piece in range(data.first[row], data.first[row + 1]):
                part = slice(data.begins[piece], data.begins[piece] + data.lengths[piece])
                ids, marks = data.tokens[part].tolist(), data.token_marks[part]
                whole = next(known for known in ids_of if list(known[: len(ids)]) == ids)
                assert theirs_tokenizer.decode(whole[len(ids) :]) == "\n", "nothing follows the last answer"
                labels = [i if mark & LEARNED else -100 for i, mark in zip(ids, marks, strict=True)]
                answers = [m["content"] + "<|im_end|>" for m in ids_of[whole] if m["role"] == "assistant"]
                assert theirs_tokenizer.decode([i for i in labels if i >= 0]) == "".join(answers)
                learned = sum(label >= 0 for label in labels[1:])
                out = theirs(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
                losses.append(out.loss * learned)
                count, seen = count + learned, seen + 1
        loss = torch.stack(losses).sum() / count
        assert ours == pytest.approx(loss.item(), rel=1e-6), step
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    assert seen > 200
    run.close()
