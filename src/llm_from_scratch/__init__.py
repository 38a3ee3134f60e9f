"""Train, finetune, sample, evaluate, export and serve GPTs on your own text."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "GPT", "Config", "GPTConfig", "GenerationConfig", "Generator", "Tokenizer", "UserError", "prepare", "preset",
    "read_metrics", "train",
]  # fmt: skip

if TYPE_CHECKING:
    from .config import Config, GenerationConfig, GPTConfig
    from .core.model import GPT
    from .core.tokenizer import Tokenizer
    from .data.prepare import prepare
    from .errors import UserError
    from .generation.generator import Generator
    from .presets import preset
    from .training.loggers import read_metrics
    from .training.trainer import train

# Loaded on first use: importing torch takes seconds, and `--help` does not need it.
_HOME = {
    "GPT": ".core.model",
    "Config": ".config",
    "GPTConfig": ".config",
    "GenerationConfig": ".config",
    "UserError": ".errors",
    "Generator": ".generation.generator",
    "Tokenizer": ".core.tokenizer",
    "prepare": ".data.prepare",
    "preset": ".presets",
    "read_metrics": ".training.loggers",
    "train": ".training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
