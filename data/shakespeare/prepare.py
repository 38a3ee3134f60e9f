"""Tiny Shakespeare, in GPT-2 tokens: writes train.bin and val.bin next to this file."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "src"))

from llm_from_scratch.cli.common import run  # noqa: E402
from llm_from_scratch.data.nanogpt import prepare_shakespeare  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(lambda argv: prepare_shakespeare(HERE, "gpt2")))
