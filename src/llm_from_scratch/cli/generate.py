"""llm-generate: text from a trained model, on the terminal, in a conversation, or as JSON lines."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoint.locations import read_start
from ..config import GenerationConfig, SystemConfig, validate
from ..errors import UserError
from ..presets import Parsed, parse
from .common import check_location, load_source, run

if TYPE_CHECKING:
    from ..generation.generator import Generator

SEPARATOR = "---------------"
HELP = """Continues a text, --start, with a trained model. Of several samples, each is followed by a line of dashes. \
PRESETs are YAML or Python files with such settings."""


@dataclass
class SourceOptions:
    """Which model."""

    out_dir: str = "out"
    """A run's folder."""
    checkpoint: str | None = None
    """Instead of out_dir: a step directory, a nanoGPT ckpt.pt, or another run's folder."""
    init_from: str | None = None
    """Instead of out_dir: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder in Hugging Face's format."""
    which: str | None = None
    """best, last or a step. None: best where the run saved only improvements, else last."""
    dataset: str | None = None
    """Name or folder of the data whose tokenizer serves a checkpoint that holds none (nanoGPT's)."""


@dataclass
class OutputOptions:
    """What is written, and how."""

    stream: bool | Literal["auto"] = "auto"
    """Write the text as it is drawn, one sample after the other; auto does so on a terminal."""
    interactive: bool = False
    """Ask for prompts, line by line, until the input ends (Ctrl-D)."""
    jsonl: bool = False
    """One JSON object a sample: prompt, text, tokens (how many), finish_reason (stop, length), seed."""
    overflow: Literal["recompute", "drop_half"] = "recompute"
    """Past block_size: recompute runs the whole window anew for every token (exact); drop_half forgets its older half
    each time it is full (much faster, another text)."""
    allow_special: bool = False
    """Read a special token that is written out in the prompt, such as <|endoftext|>, as that token."""


@dataclass
class SpeedOptions:
    """What makes it faster."""

    quantize: Literal["none", "int8"] = "none"
    """int8: weights and activations of the linear layers in 8 bits: faster on a CPU, a little less exact."""
    draft: str | None = None
    """What proposes tokens that the model then reads all at once, where one sample is drawn: lookup (what followed the
    same words before), or a smaller model of the same tokenizer (its run's folder). The text stays the same."""


@dataclass
class GenerateCommand:
    source: SourceOptions = field(default_factory=SourceOptions)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    output: OutputOptions = field(default_factory=OutputOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    system: SystemConfig = field(default_factory=SystemConfig)


def main(argv: list[str] | None = None) -> int:
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    parsed = parse(
        GenerateCommand, argv, prog="llm-generate [PRESET ...]", description=HELP, defaults={"num_samples": 1}
    )
    command = parsed.tree
    validate(command)
    output, location = command.output, location_of(parsed)
    if output.jsonl and output.stream is True:
        raise UserError("jsonl and stream exclude each other: a JSON object is written when its sample is complete")
    if output.interactive and parsed.on_command_line("start"):
        raise UserError("--interactive asks for its prompts: leave out --start, or leave out --interactive")
    prompt = None if output.interactive else read_start(command.generation.start)
    source = command.source
    generator, found = load_generator(location, source.which, source.dataset, command.system, command.speed)
    if prompt is not None:
        generator.encode(prompt, output.allow_special)  # what is wrong with it is the only thing to say
    generator.check(command.generation)
    announce(generator, found)
    if prompt is not None:
        _answer(generator, command, prompt, command.system.seed)
        return 0
    return _converse(generator, command)


def location_of(parsed: Parsed[Any]) -> str:
    """The model that SourceOptions name. Raises UserError where two options do."""
    source = parsed.tree.source
    given = [name for name in ("checkpoint", "init_from", "out_dir") if parsed.on_command_line(name)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} each name a model: give one of them")
    if given:
        return getattr(source, given[0])
    # a training preset's init_from says where its run began, not what to read from
    return source.checkpoint or source.out_dir


def load_generator(
    location: str, which: str | None, dataset: str | None, system: SystemConfig, speed: SpeedOptions | None = None
) -> tuple[Generator, Path | None]:
    """A run's folder, a checkpoint, a Hugging Face folder or a GPT-2 name; and what was found there.

    Raises UserError.
    """
    check_location(location, which)
    speed = speed or SpeedOptions()
    if speed.draft not in (None, "lookup"):
        check_location(speed.draft, None)
    import torch

    from ..checkpoint.build import build_model
    from ..generation.generator import Generator
    from ..generation.speculative import DraftModel, Lookup
    from ..machine.device import resolve_device, resolve_dtype

    if system.threads is not None:
        torch.set_num_threads(system.threads)
    device = resolve_device(system.device)
    dtype = resolve_dtype(system.dtype, device)
    found = load_source(location, which, dataset)
    assert found.tokenizer is not None  # load_source refuses weights without one
    generator = Generator(build_model(found.model_config, found.model), found.tokenizer, device, dtype, speed.quantize)
    generator.graphed = system.cuda_graphs is not False
    if system.compile is True:
        _compile(generator)
    if speed.draft == "lookup":
        generator.draft = Lookup()
    elif speed.draft is not None:
        small = load_source(speed.draft, None, dataset)
        assert small.tokenizer is not None
        draft = build_model(small.model_config, small.model).to(device=device, dtype=dtype)
        generator.draft = DraftModel(draft, small.tokenizer.fingerprint(), found.tokenizer.fingerprint())
    generator.forward  # noqa: B018  packs the model: what cannot be is told before there is text
    return generator, found.path


def _compile(generator: Generator) -> None:
    """Compiles the decode step and tries it, so that a failure shows before there is text. Raises UserError."""
    generator.compiled = True
    try:
        generator.generate([[0]], GenerationConfig(num_samples=1, max_new_tokens=3))
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
        raise UserError(f"torch.compile failed ({reason}); run without --compile") from None


def announce(generator: Generator, found: Path | None) -> None:
    """Says on standard error what writes, and on what."""
    weight = generator.model.lm_head.weight
    millions, dtype = generator.model.get_num_params() / 1e6, str(weight.dtype).removeprefix("torch.")
    form = f"{dtype}, int8 products" if generator.quantize == "int8" else dtype
    print(f"{found}: {millions:.2f}M parameters, on {weight.device}, {form}", file=sys.stderr)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what the output's encoding lacks is no reason for a traceback


def write(text: str) -> None:
    """Writes text at once. On a terminal, control characters are shown as U+FFFD: what a model writes must not move
    the cursor or reach the clipboard."""
    if sys.stdout.isatty():
        text = "".join("\ufffd" if ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 else c for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def _answer(generator: Generator, command: GenerateCommand, prompt: str, seed: int) -> None:
    """Writes the samples of one prompt."""
    params, output = command.generation, command.output
    if output.stream is True or (output.stream == "auto" and sys.stdout.isatty() and not output.jsonl):
        for k in range(params.num_samples):
            pieces = generator.stream(
                prompt, params, seed + k, overflow=output.overflow, allow_special=output.allow_special
            )
            write(prompt)
            for piece in pieces:
                write(piece)
            _end_sample(params)
        return
    for sample in generator.generate(
        [prompt], params, seed, overflow=output.overflow, allow_special=output.allow_special
    ):
        if output.jsonl:
            facts = {"prompt": prompt, "text": sample.text, "tokens": len(sample.tokens)}
            write(json.dumps(facts | {"finish_reason": sample.finish_reason, "seed": sample.seed}) + "\n")
        else:
            write(prompt + sample.text)
            _end_sample(params)


def _end_sample(params: GenerationConfig) -> None:
    write(f"\n{SEPARATOR}\n" if params.num_samples > 1 else "\n")


def _converse(generator: Generator, command: GenerateCommand) -> int:
    """Answers line after line, each with other random numbers, until the input ends."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  gives input() editing and a history

        print("Type a text to be continued; Ctrl-C stops a sample, Ctrl-D ends.", file=sys.stderr)
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8")
    seed = command.system.seed
    while True:
        try:
            prompt = input("> " if at_terminal else "")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text ({error.reason}); convert it first") from None
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return 0
        if not prompt:
            continue
        try:
            _answer(generator, command, prompt, seed)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print(file=sys.stderr)
        seed += command.generation.num_samples


if __name__ == "__main__":
    sys.exit(main())
