"""Attention between the tokens of a document on a GPU, for documents that share rows.

torch's flex_attention skips blocks of keys that no query of a block may see. A dense mask, which core/model.py's
Attention reads, costs as much as one long document.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ..core.cache import document_blocks
from ..core.model import Attention


@functools.cache
def document_attention() -> type[Attention]:
    """A replacement for kernels.swap. Its backward pass and its speed need a GPU."""
    eager = importlib.import_module("torch.nn.attention.flex_attention").flex_attention  # takes a second to import
    compiled = torch.compile(eager)  # eager, it computes all scores

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
        flex = eager if torch.compiler.is_compiling() or q.device.type == "cpu" else compiled
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a rotation leaves them in float32
        return flex(q, k, v, block_mask=blocks, enable_gqa=q.size(1) != k.size(1))

    class FlexAttention(Attention):
        reads_blocks = True  # of core/cache.py's Documents

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
            blocks = getattr(mask, "blocks", None)
            return super().forward(q, k, v, mask, causal) if blocks is None else attend(q, k, v, blocks)

        def exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
            """One document per row, for the comparison in kernels.swap: its rows are not shared."""
            return attend(q, k, v, document_blocks(q.new_zeros((len(q), q.size(2)), dtype=torch.long)))

    return FlexAttention
