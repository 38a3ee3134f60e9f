"""llm-chat: a conversation with a chat model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from ..config import GenerationConfig, SystemConfig
from ..errors import UserError
from ..presets import parse
from ..settings import validate
from .common import command
from .generate import OutputOptions, SourceOptions, SpeedOptions, announce, chat, load_generator, location_of

COMMON = (
    "system_prompt", "out_dir", "checkpoint", "init_from", "which", "max_new_tokens", "temperature", "top_k", "top_p",
    "repetition_penalty", "quantize", "seed",
)  # fmt: skip
HELP = """Talks with a chat model: one trained on conversations, or a folder or
GGUF file with a chat template.

  llm-chat --out_dir=out
  llm-chat --init_from=FOLDER --system="You are brief."

In a terminal, /help lists commands. PRESETs are files with these settings."""
ALIASES = {"system": "system_prompt"}  # system is a section of settings
DEFAULTS = {"interactive": True, "max_new_tokens": 1024}


@dataclass
class ChatOptions:
    """The conversation."""

    system_prompt: str | None = None
    """System message, which the model reads before the conversation. Short form: --system=TEXT."""


@dataclass
class ChatCommand:
    chat: ChatOptions = field(default_factory=ChatOptions)
    source: SourceOptions = field(default_factory=SourceOptions)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    output: OutputOptions = field(default_factory=OutputOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    system: SystemConfig = field(default_factory=SystemConfig)


@command
def main(argv: list[str]) -> int:
    words = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        words.append(f"--{ALIASES.get(name[2:], name[2:])}{equals}{value}" if name[:2] == "--" else arg)
    parsed = parse(ChatCommand, words, prog="llm-chat [PRESET ...]", description=HELP, defaults=DEFAULTS, common=COMMON)
    tree, source = parsed.tree, parsed.tree.source
    validate(tree)
    for name in ("interactive", "start", "allow_special"):
        if parsed.on_command_line(name):
            raise UserError(f"--{name} has no effect in a conversation: remove it")
    location = location_of(parsed)
    generator, found = load_generator(location, source.which, source.dataset, tree.system, tree.speed)
    if generator.tokenizer.chat is None:
        raise UserError(
            f"{location} is not a chat model (it does not have a chat template): train one on conversations "
            "(docs/FINETUNE.md), or continue a text with llm-generate --interactive"
        )
    generator.check(tree.generation)
    announce(generator, found)
    return chat(generator, tree.output, tree.generation, tree.system.seed, tree.chat.system_prompt)


if __name__ == "__main__":
    sys.exit(main())
