"""The result of a run, and its README.md: results, the best checkpoint, commands, settings."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.contents import read_manifest
from ..checkpoint.store import find_checkpoint
from ..config import Config
from ..errors import UserError
from ..interop.hf import family_of
from ..machine.files import open_whole, read_file
from ..settings import to_dict
from . import before_after
from .evaluate import Evaluation
from .loggers import METRICS, read_entries, read_metrics
from .plan import Plan, count_of
from .resume import NOT_COMPARED, eval_command, resume_command
from .state import TrainState

README = "README.md"
MARK = "<!-- Rewritten at the end of each run in this folder, unless you edit it. {} -->\n"
LIMIT = 1 << 20  # bytes; a longer file is the user's


@dataclass
class TrainResult:
    """The result of a run."""

    step: int
    out_dir: Path
    checkpoint: Path | None
    best_val_loss: float
    final: Evaluation | None
    """The whole validation split at the last step; None if turned off, too long, or the run was stopped."""
    exit_code: int
    """0, 128 + the number of the signal that stopped the run, or 1 if the last state could not be saved."""

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """The run's metrics.jsonl as columns."""
        return read_metrics(self.out_dir)


def write_readme(path: Path, text: str) -> bool:
    """Writes the text atomically. Returns False if the file was edited or not written by a run."""
    if os.path.lexists(path):
        try:
            old, _, _ = (content := read_file(path, LIMIT)).rpartition(MARK[:4].encode())
        except UserError:  # a folder, a FIFO or a long text
            return False
        if _signed(old) != content:
            return False
    with open_whole(path) as file:
        file.write(_signed(text.encode()))
    return True


def _signed(text: bytes) -> bytes:
    """The text and a line with its hash, which shows whether the file was edited."""
    return text + MARK.format(hashlib.sha256(text).hexdigest()[:16]).encode()


def readme(plan: Plan, state: TrainState, command: str) -> str:
    """The results of a run, and the commands to continue."""
    out_dir = Path(plan.config.training.out_dir)
    best, last = _checkpoint(out_dir, "best"), _checkpoint(out_dir, "last")
    picture = ["![loss](loss.png)", ""] if (out_dir / "loss.png").exists() else []
    compared = before_after.read(out_dir / before_after.FILE, state.run_id)
    text = "\n".join(before_after.lines(compared)) if compared else ""
    comparison = ["", *(f"    {line}" for line in text.splitlines()), ""] if text else []
    settings = yaml.safe_dump(changed_settings(plan.config), sort_keys=False, allow_unicode=True)
    return "\n".join([
        f"# {out_dir.resolve().name}", "", *(f"- {line}" for line in _results(plan, state, best, last)), "",
        *picture, *comparison, "```sh", *_commands(plan, state, command, best != last), "```", "",
        "Settings that differ from the defaults, as a preset:", "", "```yaml", settings.rstrip(), "```", "", "",
    ])  # fmt: skip


def changed_settings(config: Config) -> dict[str, dict[str, Any]]:
    """The settings that differ from the defaults, by section, except settings of one call or of the data."""
    plain, changed = to_dict(Config()), dict[str, dict[str, Any]]()
    for section, values in to_dict(config).items():
        for name, value in values.items():
            if value != plain[section][name] and name not in {*NOT_COMPARED, "out_dir", "vocab_size"}:
                changed.setdefault(section, {})[name] = value
    return changed


def _checkpoint(out_dir: Path, which: str) -> str | None:
    with contextlib.suppress(UserError):  # there is none, or none has a val loss
        return find_checkpoint(out_dir, which, verify=False).name
    return None


def _results(plan: Plan, state: TrainState, best: str | None, last: str | None) -> list[str]:
    model, out_dir = plan.config.model, Path(plan.config.training.out_dir)
    entries, tokens = read_entries(out_dir / METRICS), state.step * plan.tokens_per_step
    evaluated = next((e for e in reversed(entries) if "val_loss" in e), None)
    final = next((e for e in reversed(entries) if "val_loss_full" in e and e["step"] == state.step), None)
    tokenizer = f", tokenizer {plan.tokenizer.name}" if plan.tokenizer is not None else ""
    lines = [
        f"model: {count_of(plan.sizes)}, {_counted(model.n_layer, 'layer')}, "
        f"{_counted(model.n_head, 'head')}, width {model.n_embd}, context {model.block_size}, "
        f"vocabulary {model.vocab_size:,}",
        f"data: `{plan.data_name}`, {len(plan.train_data):,} training and {len(plan.val_data):,} validation "
        f"tokens{tokenizer}",
        f"length: step {state.step:,} of {plan.last_step:,}, {tokens:,} tokens, "
        f"{tokens / len(plan.train_data):.2f} epochs",
    ]
    if evaluated is not None:
        lines.append(
            f"step {evaluated['step']:,}: train loss {_loss(evaluated['train_loss'])}, "
            f"val loss {_loss(evaluated['val_loss'])}"
        )
    if final is not None:
        bits = f", {final['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in final else ""
        lines.append(f"whole validation split: loss {_loss(final['val_loss_full'])}{bits}")
    if best is not None:
        others = "also the last one" if best == last else f"last: `{last}`"
        val_loss = read_manifest(out_dir / best)["val_loss"]
        lines.append(f"best checkpoint: `{best}` (val loss {_loss(val_loss)}), {others}")
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _commands(plan: Plan, state: TrainState, command: str, choose: bool) -> list[str]:
    """One line each, with its comment. choose: the last checkpoint is not the best one."""
    config, processes = plan.config, plan.runtime.world_size
    out_dir, which = f"--out_dir={config.training.out_dir}", " --which=best" if choose else ""
    more = f" --max_iters={2 * config.training.max_iters}" if state.step == plan.last_step else ""
    sampler = "python sample.py" if command.endswith("train.py") else "llm-generate"
    lines = [
        (shlex.join([*sampler.split(), out_dir]) + which, "generate text"),
        (eval_command(config) + which, "evaluate on the whole validation split"),
        (
            resume_command(config, command) + more,
            ("train longer" if more else "continue") + (f", with torchrun, {processes} processes" * (processes > 1)),
        ),
    ]
    with contextlib.suppress(UserError):  # transformers has no such model
        family_of(config.model)
        words = ["llm-export", out_dir, f"--output={config.training.out_dir}-hf"]
        lines.append((shlex.join(words) + which, "export for transformers"))
    width = max(len(words) for words, _ in lines)
    return [f"{words:<{width}}  # {comment}" for words, comment in lines]
