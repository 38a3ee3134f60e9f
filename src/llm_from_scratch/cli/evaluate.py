"""llm-eval: loss, perplexity and bits per byte of a trained model on a split or on texts; scores on tasks."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoint.contents import is_dataset_name
from ..config import SystemConfig
from ..errors import UserError
from ..machine.files import read_file
from ..machine.terminal import note
from ..mixture import read_mixture
from ..presets import Parsed, parse
from ..settings import above, at_least
from .common import check_location, command, not_named

if TYPE_CHECKING:
    import torch

    from ..checkpoint.contents import Checkpoint
    from ..core.dataset import TokenData
    from ..core.tokenizer import Tokenizer
    from ..training.evaluate import Evaluation

MAX_TEXT = 1 << 30  # bytes of a text file, which is read into memory
HELP = """Evaluates a checkpoint on prepared data, texts, or lm-evaluation-harness tasks.
Prints loss, perplexity and bits per byte.

  llm-eval --out_dir=out                 the validation split of the run
  llm-eval book.txt --out_dir=out        a text
  llm-eval --out_dir=gpt2 --dataset=book --split=train
  llm-eval --out_dir=out --text_files=texts
  llm-eval --out_dir=out --tasks=questions.yaml,hellaswag --limit=100"""


@dataclass
class EvalOptions:
    """Checkpoint and data."""

    out_dir: str = "out"
    """A run's folder, a step folder, a ckpt.pt, or a Hugging Face folder or name."""
    which: str | None = None
    """best, last or a step. None: best if the run saved only improvements, else last."""
    dataset: str | None = None
    """A name in data/ or data/processed/, or a folder. None: the training data of the model."""
    split: str = "val"
    """val or train."""
    eval_block_size: int | None = None
    """Window length in tokens. None: the model's block_size."""
    eval_batch_size: int | None = None
    """Windows or contexts per forward pass. None: automatic."""
    stride: int | None = None
    """Distance between windows in tokens. None: eval_block_size."""
    text_files: str | None = None
    """A folder of texts. Prints results per file, per folder, and in total."""
    tasks: str | None = None
    """lm-evaluation-harness tasks (extra: eval), comma-separated: names, YAML files or folders."""
    num_fewshot: int | None = None
    """Examples per prompt of a task. None: as the task sets it."""
    limit: float | None = None
    """Documents per task; below 1: a fraction. None: all."""
    quantize: Literal["none", "int8"] = "none"
    """int8: weights and activations of the linear layers in 8 bits, as in llm-generate and llm-serve (CPU)."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def validate(self) -> None:
        at_least(self, 1, "eval_block_size", "eval_batch_size", "stride")
        at_least(self, 0, "num_fewshot")
        above(self, 0, "limit")
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
    _check_source(parsed)
    check_location(options.out_dir, options.which)
    from ..checkpoint.load import load
    from ..core.weights import build_model
    from ..machine import device as runtimes
    from ..training.evaluate import combined, evaluate_parts

    runtimes.resolve_device(system.device)  # report a missing device before reading anything
    if options.tasks is not None:
        return _score(options.tasks, options, system)
    loaded = load(options.out_dir, options.which, options.dataset, weights_only=True, need_tokenizer=False)
    model, tokenizer = build_model(loaded.model_config, loaded.model).float().eval(), loaded.tokenizer
    if parsed.positionals:
        data = [_text(parsed.positionals[0], tokenizer)]
    elif options.text_files is not None:
        data = _texts(options.text_files, tokenizer)
    else:
        data = []
    block_size = options.eval_block_size or model.config.block_size
    if block_size > model.config.block_size:
        raise UserError(f"eval_block_size={block_size} exceeds the model's block_size={model.config.block_size}")
    if options.stride is not None and options.stride > block_size:
        raise UserError(f"stride={options.stride} exceeds the window of {block_size} tokens: tokens would be skipped")
    if not parsed.positionals and options.text_files is None:
        name, documents = options.dataset or _trained_on(loaded, argv), _documents(loaded, options.dataset)
        data = [_prepared(name, options.split, tokenizer, block_size, documents)]
        if data[0].is_packed and options.stride is not None:
            raise UserError(f"--stride does not apply to {data[0].name}, which holds documents: remove it")
    for part in data:
        part.check(1, model.config.vocab_size)

    runtime = runtimes.resolve(system)
    runtimes.start(runtime, system)
    scored: torch.nn.Module = model
    try:
        if options.quantize == "none":
            runtime.place(model)
        else:
            from ..kernels.int8 import Scorer

            scored = Scorer(model.to(runtime.device), options.quantize)
        found = [
            evaluate_parts(scored, part, block_size, runtime, tokenizer, options.eval_batch_size, stride=options.stride)
            for part in data
        ]
    finally:
        runtimes.stop()
    if not runtime.is_master:
        return 0
    windows = {"block_size": block_size} | ({"stride": options.stride} if options.stride is not None else {})
    results = [result for result, _ in found]
    if options.text_files is None:
        whole, each = found[0]
        name, total = data[0].name, f"{data[0].name}, weighted"
    else:
        domains: dict[str, list[Evaluation]] = {}
        for part, result in zip(data, results, strict=True):  # by the first part of its path below the folder
            domains.setdefault(Path(part.name).relative_to(options.text_files).parts[0], []).append(result)
        each = {name: combined(group) for name, group in domains.items()}
        whole, name, total = combined(results), options.text_files, f"total of {options.text_files}"
    if options.json:
        parts = {"domains": {part: _figures(result) for part, result in each.items()}} if each else {}
        seconds = {} if options.text_files else {"seconds": round(whole.seconds, 3)}
        print(json.dumps(_figures(whole) | windows | {"data": name} | seconds | parts))
        return 0
    for domain, result in each.items():
        _report(result, windows, domain)
    _report(whole, windows, total if each else name)
    return 0


def _check_source(parsed: Parsed[EvalCommand]) -> None:
    """Raises UserError for options that contradict each other."""
    options, texts = parsed.tree.options, parsed.positionals
    if len(texts) > 1:
        raise UserError(f"expected one text file, got {', '.join(texts)}; for several: --text_files=FOLDER")
    given = [name for name in ("dataset", "text_files", "tasks") if getattr(options, name) is not None]
    if options.tasks is not None:
        given = [name for name in given if name != "dataset"]  # it may name the tokenizer
    if texts and given and given != ["tasks"]:
        raise UserError(f"give a text file or --{given[0]}, not both")
    if len(given) > 1:
        raise UserError(f"give --{given[0]} or --{given[1]}, not both")
    unused = ["num_fewshot", "limit"] if options.tasks is None else ["eval_block_size", "stride"]
    unused += ["split"] if given in (["tasks"], ["text_files"]) or texts else []
    if found := [name for name in unused if parsed.on_command_line(name)]:
        what = "needs --tasks" if found[0] in ("num_fewshot", "limit") else f"has no effect on {(texts + given)[0]}"
        raise UserError(f"--{found[0]} {what}; remove it")
    if options.tasks is not None and texts:
        raise UserError(f"give a text file or --tasks, not both; several tasks: --tasks={options.tasks},{texts[0]}")


def _score(names: str, options: EvalOptions, system: SystemConfig) -> int:
    """Prints the results of tasks as the harness's tables, or as JSON."""
    from ..checkpoint.load import load
    from ..core.weights import build_model
    from ..generation.generator import Generator
    from ..machine import device as runtimes
    from ..training.harness import TaskModel, evaluate_tasks, load_tasks, tables

    tasks = load_tasks(names, fewshot=options.num_fewshot)
    loaded = load(options.out_dir, options.which, options.dataset, weights_only=True)
    assert loaded.tokenizer is not None  # load refuses a model without one
    model = build_model(loaded.model_config, loaded.model).float()
    runtime = runtimes.resolve(system)
    runtimes.start(runtime, system)
    begin = time.perf_counter()
    try:
        generator = Generator(model, loaded.tokenizer, runtime.device, runtime.dtype, options.quantize)
        results = evaluate_tasks(TaskModel(generator, options.eval_batch_size), tasks, options.limit)
    finally:
        runtimes.stop()
    if not runtime.is_master:
        return 0
    if options.json:
        kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
        found = {name: results[name] for name in kept if name in results}
        print(json.dumps(found | {"seconds": round(time.perf_counter() - begin, 3)}, default=str))
    else:
        print(tables(results))
    return 0


def _report(result: Evaluation, windows: dict[str, int], name: str) -> None:
    bits = "n/a" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    apart = f", {windows['stride']} apart" if "stride" in windows else ""
    print(
        f"loss {result.loss:.4f}, perplexity {result.perplexity:.3f}, bits per byte {bits}, "
        f"{result.tokens:,} tokens in windows of {windows['block_size']}{apart}, {name}"
    )


def _figures(result: Evaluation) -> dict[str, Any]:
    names = ("loss", "perplexity", "bits_per_byte", "tokens")
    return {name: getattr(result, name) for name in names} | {"bytes": result.text_bytes}


def _trained_on(model: Checkpoint, argv: list[str]) -> str:
    """The name of the training data in a checkpoint's settings."""
    saved = model.config.get("data", model.config)  # a ckpt.pt has no sections
    name = saved.get("dataset") if isinstance(saved, dict) else None
    if not name:
        raise UserError("nothing to evaluate on: give --dataset=NAME_OR_FOLDER or a text file")
    if not is_dataset_name(name):
        raise not_named(f"the run of {model.path}", {"dataset": name}, "llm-eval", argv)
    return name


def _documents(model: Checkpoint, dataset: str | None) -> bool | None:
    """Whether the run of a model was trained on whole documents, if it is evaluated on its own data; None: unknown."""
    from ..core.dataset import resolve_dataset

    saved = model.config.get("data")
    documents, name = (saved.get(key) for key in ("documents", "dataset")) if isinstance(saved, dict) else (None, None)
    if not isinstance(documents, bool) or not isinstance(name, str):
        return None
    is_own = dataset in (None, name)
    with contextlib.suppress(UserError, OSError, ValueError):  # the run's data is somewhere else
        is_own = is_own or resolve_dataset(str(dataset)).resolve() == resolve_dataset(name).resolve()
    return documents if is_own else None


def _prepared(name: str, split: str, tokenizer: Tokenizer | None, block_size: int, documents: bool | None) -> TokenData:
    """A split of a dataset or of all parts of a mixture, packed if the model was trained on packed windows."""
    from ..core.mixed import Mixture
    from ..core.packing import in_units

    mixture = read_mixture(name)
    parts = [
        in_units(_split(part, split, tokenizer), split, block_size, tokenizer, documents)
        for part in [part.name for part in mixture] or [name]
    ]
    return Mixture(mixture, parts) if mixture else parts[0]


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

    path = Path(name)
    try:
        text = read_file(path, MAX_TEXT).decode("utf-8-sig").replace("\r\n", "\n")  # as llm-prepare reads it
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    ids = _known(tokenizer).encode(text)
    if len(ids) < 2:
        raise UserError(f"{path} has {len(ids)} tokens; the loss needs at least 2")
    return TokenData([ids], name)


def _texts(folder: str, tokenizer: Tokenizer | None) -> list[TokenData]:
    """The files below a folder that llm-prepare reads, with an end-of-text token after each of several documents."""
    import numpy as np

    from ..core.dataset import TokenData
    from ..data.sources import FileSource, find_files

    if not Path(folder).is_dir():
        raise UserError(f"--text_files={folder} is not a folder: for a single text, llm-eval TEXT_FILE")
    encode, data = _known(tokenizer).encode, []
    for path in find_files([folder], Path(), Path(), note):
        source, parts = FileSource(path), []
        end = [] if tokenizer is None or tokenizer.eot_id is None or not source.has_many else [tokenizer.eot_id]
        for text, ends in source.pieces():
            parts += [encode(text), np.array(end if ends else [], np.int64)]
        ids = np.concatenate(parts) if parts else np.empty(0, np.int64)
        if len(ids) < 2:
            note(f"{path}: skipped, because the loss needs at least 2 tokens")
        else:
            data.append(TokenData([ids], str(path)))
    if not data:
        raise UserError(f"--text_files={folder}: no file has 2 tokens or more")
    return data


def _known(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UserError(
            "the checkpoint does not have a tokenizer for a text file; use prepared data: --dataset=NAME_OR_FOLDER"
        )
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
