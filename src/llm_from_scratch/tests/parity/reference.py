"""nanoGPT's own model.py, if the environment variable NANOGPT_DIR names a checkout."""

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NANOGPT_DIR = os.environ.get("NANOGPT_DIR")
needs_nanogpt = pytest.mark.skipif(not NANOGPT_DIR, reason="set NANOGPT_DIR to a checkout of nanoGPT")


def nanogpt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(str(NANOGPT_DIR)) / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quietly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of a call that prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args, **kwargs)
