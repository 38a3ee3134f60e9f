"""Texts and losses before and after finetuning: the same prompts, the same held-out text."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ..core.dataset import TokenData
from ..core.packing import PackedData
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from ..machine.files import open_whole, read_json
from .loggers import CONTROL, METRICS, RunLog, read_entries
from .plan import Plan

FILE = "before_after.json"
PLACES = (0.25, 0.6)  # of the prompts in the validation split
SEEN, CHARACTERS = 200, 60  # tokens of the split that a prompt is taken from; length of a prompt
SHOWN = 200  # characters of a prompt that are printed
FEW, MANY, SECONDS = 4, 48, 2.0  # tokens of the trial and of a text, and the time of a text
Write = Callable[[list[int], int], str]  # (prompt, number of tokens) -> the text with the prompt


@dataclass
class Comparison:
    """Content of before_after.json."""

    run_id: str
    prompts: list[str]
    tokens: int
    before: list[str]
    after: list[str] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    """Before and after, on the windows of the run's evaluations."""


def prompts_from(data: TokenData, tokenizer: Tokenizer) -> list[str]:
    """Beginnings of lines of held-out text, cut at a space. Of conversations: up to the assistant's first turn."""
    chats = [part for _, _, part in data.weighted if isinstance(part, PackedData) and part.marks]
    found = [tokenizer.decode(chats[0].prompt(place)) for place in PLACES] if chats else []
    for place in () if chats else PLACES:
        begin = int(place * max(0, len(data) - SEEN))
        ids = data.windows(np.array([begin]), min(SEEN, len(data)))[0]
        text = tokenizer.decode([int(i) for i in ids if i < tokenizer.vocab_size])
        line = text[text.find("\n", 0, len(text) // 2) + 1 :].lstrip()[:CHARACTERS]
        found.append(line.rpartition(" ")[0] or line or text)
    return list(dict.fromkeys(found))


def begin(plan: Plan, log: RunLog, run_id: str, write: Write) -> None:
    """Stores the texts of the model with its first weights, if the run finetunes and prints. Their length is what the
    machine writes in SECONDS."""
    training, wanted = plan.config.training, plan.config.finetune.before_after
    is_new = training.init_from not in ("scratch", "resume") and not training.eval_only
    if wanted == "auto":  # with several processes the others would wait for the texts
        wanted = not log.silent and log.nanogpt_mfu is None and (log.is_watched or plan.runtime.world_size == 1)
    unfit = not plan.runtime.is_master or plan.runtime.is_sharded  # which writes with all processes
    if not wanted or not is_new or plan.tokenizer is None or unfit:
        return
    prompts = prompts_from(plan.val_data, plan.tokenizer)
    if not all(prompts):
        return
    _continued(plan, prompts[0], write, 1)
    start = time.perf_counter()
    _continued(plan, prompts[0], write, FEW)
    tokens = int(max(FEW, min(MANY, FEW * SECONDS / (time.perf_counter() - start))))
    _save(log, Comparison(run_id, prompts, tokens, [_continued(plan, prompt, write, tokens) for prompt in prompts]))


def end(plan: Plan, log: RunLog, run_id: str, write: Write) -> None:
    """Adds the texts of the trained model, and the losses of the run's first and last evaluation. Prints all."""
    found = read(log.out_dir / FILE, run_id)
    if found is None or plan.tokenizer is None or not plan.runtime.is_master:
        return
    found.after = [_continued(plan, prompt, write, found.tokens) for prompt in found.prompts]
    entries = [entry for entry in read_entries(log.out_dir / METRICS) if isinstance(entry.get("val_loss"), float)]
    found.val_loss = [entry["val_loss"] for entry in (entries[0], entries[-1])] if entries else []
    _save(log, found)
    for line in lines(found):
        log.say(line)


def _continued(plan: Plan, prompt: str, write: Write, tokens: int) -> str:
    """A prompt and what follows, up to the end of the text or of the turn."""
    assert plan.tokenizer is not None
    whole = write(plan.tokenizer.encode(prompt, allow_special=bool(plan.val_data.marks)).tolist(), tokens)
    text = whole.removeprefix(prompt)
    for end in filter(None, (plan.tokenizer.decode([i]) for i in plan.tokenizer.end_ids)):
        text = text.partition(end)[0]
    return prompt + text


def _save(log: RunLog, found: Comparison) -> None:
    with log.writing(FILE), open_whole(log.out_dir / FILE) as file:
        file.write(json.dumps(asdict(found), indent=1).encode())


def read(path: Path, run_id: str) -> Comparison | None:
    """The comparison that this run began; None if there is none."""
    with contextlib.suppress(UserError, OSError, TypeError, ValueError):
        found = Comparison(**read_json(path))
        texts = [*found.prompts, *found.before]
        if found.run_id == run_id and all(isinstance(t, str) for t in texts) and 0 < int(found.tokens) <= MANY:
            return found
    return None


def lines(found: Comparison) -> list[str]:
    """The comparison as text; empty without an end."""
    if not found.after:
        return []
    losses = f": val loss {found.val_loss[0]:.4f} -> {found.val_loss[1]:.4f}" if found.val_loss else ""
    text = [f"before and after finetuning{losses}"]
    for prompt, first, last in zip(found.prompts, found.before, found.after, strict=True):
        for label, whole in (("before", first), ("after", last)):
            continuation = whole.removeprefix(prompt).strip("\n")
            text += [f"--- {label}: {prompt[-SHOWN:]!r} continues with", continuation.translate(CONTROL)]
    return [*text, "---"]
