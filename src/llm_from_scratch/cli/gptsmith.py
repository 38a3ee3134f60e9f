"""The command gptsmith, and `python -m llm_from_scratch`: `gptsmith train quick` is `llm-train quick`."""

from __future__ import annotations

import sys
from importlib import import_module

from ..completion import completion_shell
from ..errors import UserError
from ..settings import did_you_mean
from .common import command

# Subcommand: (its module in cli/, what it does)
COMMANDS = {
    "prepare": ("prepare_data", "tokenizes texts"),
    "inspect": ("inspect_data", "shows the contents of a prepared dataset"),
    "train": ("train", "trains from scratch, resumes a run, or finetunes"),
    "plan": ("plan", "estimates time and memory of a run"),
    "generate": ("generate", "continues a text"),
    "chat": ("chat", "talks with a chat model"),
    "serve": ("serve", "starts an OpenAI-compatible server with a playground"),
    "eval": ("evaluate", "computes loss, perplexity and bits per byte"),
    "bench": ("bench", "times a training step"),
    "export": ("export", "writes a model for transformers, llama.cpp or nanoGPT"),
    "sweep": ("sweep", "compares settings in many runs"),
    "scale": ("scale", "fits a scaling law over sizes and budgets"),
    "demo": ("demo", "trains a small model and samples from it"),
}
NAMES = f"one of {', '.join(COMMANDS)}"
HELP = f"""usage: gptsmith [-h] [--version] COMMAND ...

Trains, samples, evaluates, exports and serves GPT language models.

{chr(10).join(f"  {name:<9} {does}" for name, (_, does) in COMMANDS.items())}

gptsmith COMMAND --help explains a command. gptsmith --completion bash prints a
completion script (bash or zsh)."""
# In bash, the rest of the line is completed as for llm-COMMAND. Its script is read at the first use.
SCRIPTS = {
    "bash": """_gptsmith() {
  local name="${COMP_WORDS[1]}"
  if [[ $COMP_CWORD -eq 1 ]]; then
    COMPREPLY=($(compgen -W "NAMES" -- "$name"))
  elif [[ " NAMES " == *" $name "* && $name != demo ]]; then
    declare -F "_tyro_llm_$name" >/dev/null || eval "$(gptsmith "$name" --completion bash)"
    COMP_WORDS=("llm-$name" "${COMP_WORDS[@]:2}"); COMP_CWORD=$((COMP_CWORD - 1))
    "_tyro_llm_$name"
  fi
}
complete -F _gptsmith gptsmith""",
    "zsh": """#compdef gptsmith
_gptsmith() { if (( CURRENT == 2 )); then compadd NAMES; else _files; fi }
compdef _gptsmith gptsmith""",
}


@command
def main(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
        return 0
    if name.partition("=")[0] == "--completion":
        print(SCRIPTS[completion_shell(argv)].replace("NAMES", " ".join(COMMANDS)))
        return 0
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; {did_you_mean(name, COMMANDS, NAMES)}")
    return import_module(f".{COMMANDS[name][0]}", __package__).main(rest)


if __name__ == "__main__":
    sys.exit(main())
