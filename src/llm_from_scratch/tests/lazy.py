"""Packages that few tests need, imported at first use: every worker collects every file."""

from __future__ import annotations

import importlib
import sys
from typing import Any


class Lazy:
    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and self.name not in sys.modules:
            raise AttributeError(name)  # pytest looks for such names on all that a test file imports
        return getattr(importlib.import_module(self.name), name)


app: Any = Lazy("llm_from_scratch.serving.app")
dtensor: Any = Lazy("torch.distributed.tensor")
fsdp: Any = Lazy("torch.distributed.fsdp")
openai: Any = Lazy("openai")
peft: Any = Lazy("peft")
server: Any = Lazy("llm_from_scratch.serving.server")
transformers: Any = Lazy("transformers")
