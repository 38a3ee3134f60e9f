"""Train, finetune, sample, evaluate and export small-to-medium GPT language models on your own text."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["GPT", "Config", "GPTConfig", "Generator", "Tokenizer", "UserError", "train"]

if TYPE_CHECKING:
    from .config import Config, GPTConfig
    from .core.model import GPT
    from .core.tokenizer import Tokenizer
    from .errors import UserError
    from .generation.generator import Generator
    from .training.trainer import train

# Loaded on first use: importing torch takes seconds, and `--help` does not need it.
_HOME = {
    "GPT": ".core.model",
    "Config": ".config",
    "GPTConfig": ".config",
    "UserError": ".errors",
    "Generator": ".generation.generator",
    "Tokenizer": ".core.tokenizer",
    "train": ".training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
