"""The command gptsmith, and `python -m llm_from_scratch`: `gptsmith train quick` is `llm-train quick`."""

from __future__ import annotations

import sys
from importlib import import_module

from ..config import did_you_mean
from ..errors import UserError
from .common import command

# Subcommand: (its module in cli/, what it does)
COMMANDS = {
    "prepare": ("prepare_data", "turns texts into tokens"),
    "train": ("train", "trains from scratch, resumes a run, or finetunes"),
    "plan": ("plan", "estimates time and memory of a run"),
    "generate": ("generate", "continues a text"),
    "serve": ("serve", "starts an OpenAI-compatible server with a playground"),
    "eval": ("evaluate", "loss, perplexity and bits per byte"),
    "bench": ("bench", "times a training step"),
    "export": ("export", "writes a model for transformers, llama.cpp or nanoGPT"),
    "demo": ("demo", "trains a small model on a small text"),
}
NAMES = f"one of {', '.join(COMMANDS)}"
HELP = f"""usage: gptsmith [-h] [--version] COMMAND ...

Trains, samples, evaluates, exports and serves GPT language models.

{chr(10).join(f"  {name:<9} {does}" for name, (_, does) in COMMANDS.items())}

gptsmith COMMAND --help explains a command. gptsmith COMMAND --completion bash
prints a completion script (bash or zsh)."""


@command
def main(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
        return 0
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; {did_you_mean(name, COMMANDS, NAMES)}")
    return import_module(f".{COMMANDS[name][0]}", __package__).main(rest)


if __name__ == "__main__":
    sys.exit(main())
