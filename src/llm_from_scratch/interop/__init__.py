"""Formats of other projects, read and written: Hugging Face's and nanoGPT's."""

import os
import re
from pathlib import Path

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def is_hub_id(name: str) -> bool:
    """Whether this has the form owner/name of a model on Hugging Face, and nothing of that name exists here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and not os.path.lexists(name)


def is_peft(path: Path) -> bool:
    """Whether this is a folder with an adapter in peft's format, without the weights that it adapts."""
    return os.path.isfile(path / "adapter_config.json") and not os.path.isfile(path / "config.json")
