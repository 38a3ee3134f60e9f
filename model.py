"""nanoGPT's model.py: the model itself is in src/llm_from_scratch/core/model.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # runs from a checkout that is not installed

from llm_from_scratch.machine.extras import stop_without_required  # noqa: E402

stop_without_required()

from llm_from_scratch.config import GPTConfig  # noqa: E402
from llm_from_scratch.core.model import GPT, MLP, Block, CausalSelfAttention, LayerNorm  # noqa: E402

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig", "LayerNorm"]
