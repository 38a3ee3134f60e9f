"""llm-eval: loss, perplexity and bits per byte of a trained model over a whole split or a text file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..checkpoint.contents import is_dataset_name
from ..config import SystemConfig
from ..errors import UserError
from ..machine.files import read_file
from ..presets import parse
from ..settings import at_least
from .common import check_location, command, used_a_path

if TYPE_CHECKING:
    import torch

    from ..checkpoint.contents import Checkpoint
    from ..core.dataset import TokenData
    from ..core.tokenizer import Tokenizer

MAX_TEXT = 1 << 30  # bytes of a text file, which is read into memory
HELP = """Evaluates a checkpoint on a text file or on a split of prepared data. Prints loss (nats per token),
perplexity, bits per byte and the number of tokens.

  llm-eval --out_dir=out                 its validation split
  llm-eval book.txt --out_dir=out        a text
  llm-eval --out_dir=gpt2 --dataset=book --split=train
"""


@dataclass
class EvalOptions:
    """Checkpoint and data."""

    out_dir: str = "out"
    """A run's folder, a step folder, a ckpt.pt, a Hugging Face folder or a GPT-2 name."""
    which: str | None = None
    """best, last or a step. None: best if the run saved only improvements, else last."""
    dataset: str | None = None
    """A name in data/ or data/processed/, or a folder. None: the training data of the model."""
    split: str = "val"
    """val or train."""
    eval_block_size: int | None = None
    """Window length in tokens. None: the model's block_size."""
    eval_batch_size: int | None = None
    """Windows per forward pass. None: automatic. The result does not depend on it."""
    quantize: Literal["none", "int8"] = "none"
    """int8: the loss of the int8 model of llm-generate and llm-serve (--quantize=int8), on a CPU."""
    json: bool = False
    """Print one JSON object instead of the line."""

    def validate(self) -> None:
        at_least(self, 1, "eval_block_size", "eval_batch_size")
        if self.split not in ("train", "val"):
            raise UserError(f"split={self.split!r} is not one of train, val")


@dataclass
class EvalMachine:
    """Device and precision."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products. auto: bfloat16 or float16 on CUDA, else float32."""
    threads: int | None = None
    """Number of CPU threads for torch. None: torch's default."""


@dataclass
class EvalCommand:
    options: EvalOptions = field(default_factory=EvalOptions)
    machine: EvalMachine = field(default_factory=EvalMachine)


@command
def main(argv: list[str]) -> int:
    parsed = parse(EvalCommand, argv, prog="llm-eval [TEXT_FILE]", description=HELP, presets=False)
    options, machine = parsed.tree.options, parsed.tree.machine
    system = SystemConfig(**vars(machine), compile=False)
    options.validate()
    system.validate()
    if len(parsed.positionals) > 1:
        raise UserError(f"expected one text file, got {', '.join(parsed.positionals)}")
    if parsed.positionals and options.dataset:
        raise UserError("give a text file or --dataset, not both")

    check_location(options.out_dir, options.which)
    from ..checkpoint.load import load
    from ..core.weights import build_model
    from ..machine import device as runtimes
    from ..training.evaluate import evaluate_split

    runtimes.resolve_device(system.device)  # report a missing device before reading anything
    loaded = load(options.out_dir, options.which, options.dataset, weights_only=True, need_tokenizer=False)
    model, tokenizer = build_model(loaded.model_config, loaded.model).float().eval(), loaded.tokenizer
    if parsed.positionals:
        data = _text(parsed.positionals[0], tokenizer)
    else:
        data = _split(options.dataset or _trained_on(loaded, argv), options.split, tokenizer)
    block_size = options.eval_block_size or model.config.block_size
    if block_size > model.config.block_size:
        raise UserError(f"eval_block_size={block_size} exceeds the model's block_size={model.config.block_size}")
    data.check(1, model.config.vocab_size)

    runtime = runtimes.resolve(system)
    runtimes.start(runtime, system)
    scored: torch.nn.Module = model
    try:
        if options.quantize == "none":
            runtime.place(model)
        else:
            from ..kernels.int8 import Scorer

            scored = Scorer(model.to(runtime.device), options.quantize)
        result = evaluate_split(scored, data, block_size, runtime, tokenizer, batch_size=options.eval_batch_size)
    finally:
        runtimes.stop()
    if not runtime.is_master:
        return 0
    if options.json:
        figures = {key: getattr(result, key) for key in ("loss", "perplexity", "bits_per_byte", "tokens")}
        figures |= {"bytes": result.text_bytes, "block_size": block_size, "data": data.name}
        print(json.dumps(figures | {"seconds": round(result.seconds, 3)}))
    else:
        bits = "n/a" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        print(
            f"loss {result.loss:.4f}, perplexity {result.perplexity:.3f}, bits per byte {bits}, "
            f"{result.tokens:,} tokens in windows of {block_size}, {data.name}"
        )
    return 0


def _trained_on(model: Checkpoint, argv: list[str]) -> str:
    """The name of the training data in a checkpoint's settings."""
    saved = model.config.get("data", model.config)  # a ckpt.pt has no sections
    name = saved.get("dataset") if isinstance(saved, dict) else None
    if not name:
        raise UserError("nothing to evaluate on: give --dataset=NAME_OR_FOLDER or a text file")
    if not is_dataset_name(name):
        raise used_a_path(f"the run of {model.path}", name, "llm-eval", argv)
    return name


def _split(name: str, split: str, tokenizer: Tokenizer | None) -> TokenData:
    from ..core.dataset import TokenData, resolve_dataset
    from ..core.tokenizer import tokenizer_of

    folder = resolve_dataset(name)
    theirs = tokenizer_of(folder)
    if tokenizer is not None and theirs is not None and theirs.fingerprint() != tokenizer.fingerprint():
        raise UserError(
            f"{folder} uses the tokenizer {theirs.name} ({theirs.vocab_size} ids), but the model uses "
            f"{tokenizer.name} ({tokenizer.vocab_size} ids); evaluate the text file instead"
        )
    return TokenData.open(folder, split)


def _text(name: str, tokenizer: Tokenizer | None) -> TokenData:
    from ..core.dataset import TokenData

    if tokenizer is None:
        raise UserError(
            "the checkpoint does not have a tokenizer for a text file; use prepared data: --dataset=NAME_OR_FOLDER"
        )
    path = Path(name)
    try:
        text = read_file(path, MAX_TEXT).decode("utf-8-sig").replace("\r\n", "\n")  # as llm-prepare reads it
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise UserError(f"{path} has {len(ids)} tokens; the loss needs at least 2")
    return TokenData([ids], name)


if __name__ == "__main__":
    sys.exit(main())
