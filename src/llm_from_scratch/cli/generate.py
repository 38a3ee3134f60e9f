"""llm-generate: samples text from a trained model, once, interactively or as JSON lines."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config import GenerationConfig, SystemConfig
from ..errors import UserError, first_line
from ..generation.prompt import first_text, read_start
from ..machine.processes import shield_children
from ..machine.terminal import note
from ..presets import Parsed, parse
from ..settings import validate
from .common import check_location, command
from .interactive import Chat, Conversation, Message, converse

if TYPE_CHECKING:
    from ..generation.generator import Generator

SEPARATOR = "---------------"
COMMON = (
    "start", "out_dir", "checkpoint", "init_from", "which", "num_samples", "max_new_tokens", "temperature", "top_k",
    "top_p", "repetition_penalty", "stop", "interactive", "quantize", "seed",
)  # fmt: skip
HELP = """Continues a text with a trained model.

  llm-generate --out_dir=out --start="Once upon a time"
  llm-generate --out_dir=out --interactive
  llm-generate --init_from=gpt2 --start=FILE:prompt.txt --num_samples=3

Lines of dashes separate samples. PRESETs are files with these settings."""


@dataclass
class SourceOptions:
    """The model."""

    out_dir: str = "out"
    """A run's folder."""
    checkpoint: str | None = None
    """Instead of out_dir: a step folder, a nanoGPT ckpt.pt or another run's folder."""
    init_from: str | None = None
    """Instead of out_dir: a Hugging Face folder or name (gpt2 to gpt2-xl, owner/name), or a GGUF file."""
    which: str | None = None
    """best, last or a step. None: best if the run saved only improvements, else last."""
    dataset: str | None = None
    """Name or folder of the data with the tokenizer, if the checkpoint does not have one (nanoGPT's)."""


@dataclass
class OutputOptions:
    """Output of samples."""

    stream: bool | Literal["auto"] = "auto"
    """Print each token as it is generated, one sample after the other. auto: if the output is a terminal."""
    interactive: bool = False
    """Read prompts line by line until the input ends (Ctrl-D). A chat model answers them (llm-chat). In a terminal,
    /help lists commands."""
    jsonl: bool = False
    """Print one JSON object per sample: prompt, text, tokens (their number), finish_reason (stop or length), seed."""
    overflow: Literal["recompute", "drop_half"] = "recompute"
    """Beyond block_size: recompute the whole window for every token (exact), or drop the older half of the cache each
    time it is full (much faster, different text)."""
    allow_special: bool = False
    """Parse special tokens in the prompt, such as <|endoftext|>."""


@dataclass
class SpeedOptions:
    """Faster generation."""

    quantize: Literal["none", "int8"] = "none"
    """int8: weights and activations of the linear layers in 8 bits. Faster on a CPU, slightly less exact."""
    draft: str | None = None
    """Speculative decoding for single samples: lookup (copies earlier text), or a smaller run's folder with the
    same tokenizer. The text does not change."""


@dataclass
class GenerateCommand:
    source: SourceOptions = field(default_factory=SourceOptions)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    output: OutputOptions = field(default_factory=OutputOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    system: SystemConfig = field(default_factory=SystemConfig)


@command
def main(argv: list[str]) -> int:
    parsed = parse(GenerateCommand, argv, prog="llm-generate [PRESET ...]", description=HELP, common=COMMON)
    tree = parsed.tree
    validate(tree)
    output, location = tree.output, location_of(parsed)
    if output.jsonl and output.stream is True:
        raise UserError("--jsonl and --stream cannot be combined: a JSON object needs the complete sample")
    if output.interactive and parsed.on_command_line("start"):
        raise UserError("--interactive reads prompts from the terminal: remove --start or --interactive")
    prompt = None if output.interactive else read_start(tree.generation.start)
    source = tree.source
    generator, found = load_generator(location, source.which, source.dataset, tree.system, tree.speed)
    if prompt is not None:
        prompt = first_text(prompt, generator.tokenizer)
        generator.encode(prompt, output.allow_special)  # report a bad prompt before printing anything
    generator.check(tree.generation)
    announce(generator, found)
    answer = partial(_answer, generator, output)
    if prompt is None and generator.tokenizer.chat is not None:
        return chat(generator, output, tree.generation, tree.system.seed)
    if prompt is not None:
        answer(tree.generation, prompt, tree.system.seed)
        return 0
    return converse(Conversation(tree.generation, tree.system.seed, answer, generator.check))


def chat(
    generator: Generator, output: OutputOptions, params: GenerationConfig, seed: int, system: str | None = None
) -> int:
    """A conversation with a chat model. system: the message of the system. Raises UserError."""
    if params.num_samples > 1:
        raise UserError(f"a conversation continues with one answer: remove --num_samples={params.num_samples}")
    return converse(Chat(params, seed, partial(_reply, generator, output), generator.check, system))


def location_of(parsed: Parsed[Any]) -> str:
    """The model in SourceOptions. Raises UserError if two options name one."""
    source = parsed.tree.source
    given = [name for name in ("checkpoint", "init_from", "out_dir") if parsed.on_command_line(name)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} both select a model: give only one")
    if given:
        return getattr(source, given[0])
    # init_from in a training preset is where that run started, not the model to load
    return source.checkpoint or source.out_dir


def load_generator(
    location: str, which: str | None, dataset: str | None, system: SystemConfig, speed: SpeedOptions | None = None
) -> tuple[Generator, Path | None]:
    """The generator of a run, checkpoint, Hugging Face folder or name, and the path. Raises UserError."""
    check_location(location, which)
    speed = speed or SpeedOptions()
    if speed.draft not in (None, "lookup"):
        check_location(speed.draft, None)
    import torch

    from ..checkpoint.load import load
    from ..core.weights import build_model
    from ..generation.generator import Decoder, Generator
    from ..generation.speculative import DraftModel, Lookup
    from ..machine.device import resolve_device, resolve_dtype

    if system.threads is not None:
        torch.set_num_threads(system.threads)
    device = resolve_device(system.device)
    dtype = resolve_dtype(system.dtype, device)
    found = load(location, which, dataset, weights_only=True)
    assert found.tokenizer is not None  # load refuses weights without one
    generator = Generator(build_model(found.model_config, found.model), found.tokenizer, device, dtype, speed.quantize)
    generator.graphed = system.cuda_graphs is not False
    if system.compile is True:
        _compile(generator)
    if speed.draft == "lookup":
        generator.draft = Lookup()
    elif speed.draft is not None:
        small = load(speed.draft, None, dataset, weights_only=True)
        assert small.tokenizer is not None
        draft = build_model(small.model_config, small.model).to(device=device, dtype=dtype)
        generator.draft = DraftModel(Decoder(draft), small.tokenizer.fingerprint(), found.tokenizer.fingerprint())
    generator.decoder  # noqa: B018  refuses an unsupported model before any text is printed
    return generator, found.path


def _compile(generator: Generator) -> None:
    """Compiles and runs the decode step, so that a failure shows before there is text. Raises UserError."""
    generator.compiled = True
    shield_children()
    try:
        generator.generate([[0]], GenerationConfig(num_samples=1, max_new_tokens=3))
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"torch.compile failed ({reason}); run without --compile") from None


def announce(generator: Generator, found: Path | None) -> None:
    """Prints the model, its size, device and precision on standard error."""
    weight = generator.model.lm_head.weight
    millions, dtype = generator.model.get_num_params() / 1e6, str(weight.dtype).removeprefix("torch.")
    form = f"{dtype}, int8 products" if generator.quantize == "int8" else dtype
    form += ", compiled kernels (off: LLM_KERNEL=torch)" if generator.decoder.linears.kernel else ""
    note(f"{found}: {millions:.2f}M parameters, on {weight.device}, {form}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the output's encoding may not have every character


def write(text: str) -> None:
    """Prints and flushes a text. On a terminal, control characters become U+FFFD: generated text must not move the
    cursor or reach the clipboard."""
    if sys.stdout.isatty():
        text = "".join("\ufffd" if ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 else c for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def _answer(generator: Generator, output: OutputOptions, params: GenerationConfig, prompt: str, seed: int) -> None:
    """Prints the samples of one prompt."""
    how: dict[str, Any] = {"overflow": output.overflow, "allow_special": output.allow_special}
    end = f"\n{SEPARATOR}\n" if params.num_samples > 1 else "\n"
    if output.stream is True or (output.stream == "auto" and sys.stdout.isatty() and not output.jsonl):
        for k in range(params.num_samples):
            pieces = generator.stream(prompt, params, seed + k, **how)
            write(prompt)
            for piece in pieces:
                write(piece)
            write(end)
        return
    for sample in generator.generate([prompt], params, seed, **how):
        if output.jsonl:
            facts = {"prompt": prompt, "text": sample.text, "tokens": len(sample.tokens)}
            write(json.dumps(facts | {"finish_reason": sample.finish_reason, "seed": sample.seed}) + "\n")
        else:
            write(prompt + sample.text + end)


def _reply(
    generator: Generator, output: OutputOptions, params: GenerationConfig, messages: list[Message], seed: int
) -> str:
    """Prints and returns the answer to messages. If they do not fit in the context, the oldest are left out."""
    template, context = generator.tokenizer.chat, generator.model.config.block_size
    assert template is not None
    room, first = context - min(params.max_new_tokens, context // 4), int(messages[0]["role"] == "system")
    prompt = generator.encode(template.render(messages), allow_special=True)
    dropped = 0
    while len(prompt) > room and len(messages) > first + 2:
        messages, dropped = messages[:first] + messages[first + 2 :], dropped + 2
        prompt = generator.encode(template.render(messages), allow_special=True)
    if dropped:
        note(f"the oldest {dropped} messages no longer fit in the context of {context} tokens")
    if output.stream is True or (output.stream == "auto" and sys.stdout.isatty() and not output.jsonl):
        parts = []
        for piece in generator.stream(prompt, params, seed, overflow=output.overflow):
            write(piece)
            parts.append(piece)
        write("\n")
        return "".join(parts)
    sample = generator.generate([prompt], params, seed, overflow=output.overflow)[0]
    if output.jsonl:
        facts = {"messages": messages, "text": sample.text, "tokens": len(sample.tokens)}
        write(json.dumps(facts | {"finish_reason": sample.finish_reason, "seed": sample.seed}) + "\n")
    else:
        write(sample.text + "\n")
    return sample.text


if __name__ == "__main__":
    sys.exit(main())
