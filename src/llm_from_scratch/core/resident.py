"""The tokens of a split in the memory of the device: a step sends the places of its windows, and not their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import UserError
from .tokenfile import BLOCK, refuse_outside

if TYPE_CHECKING:  # which imports this, and torch takes seconds to import
    import torch
    from torch import Tensor

    from .dataset import TokenData

SHARE, MOST = 0.1, 4 << 30  # of the device's free memory, and bytes, up to which auto spends it on tokens
BYTES = 4  # int32: torch indexes nothing smaller that holds every vocabulary


def tokens_on(
    device: torch.device, data: TokenData, vocab_size: int | None, wanted: bool | Literal["auto"],
    say: Callable[[str], None],
) -> Tensor | None:  # fmt: skip
    """All tokens of a split, (N,) int32, on the device; None where they are to be read from the files.

    auto: on CUDA, where they take little of its free memory. Every id that is put there is checked, so that no batch
    has to be. Raises UserError where they are asked for and do not fit; DataError for an id outside the vocabulary,
    and for a file that fails.
    """
    import torch

    from ..machine.device import is_out_of_memory

    size, asked = len(data) * BYTES, wanted is True
    if wanted == "auto":
        wanted = device.type == "cuda" and size <= min(MOST, SHARE * torch.cuda.mem_get_info(device)[0])
    if not wanted:
        return None
    try:
        tokens = torch.empty(len(data), dtype=torch.int32, device=device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if not asked:
            say(f"data: no room for the training tokens on {device}; they are read from the files")
            return None
        raise UserError(
            f"--data_on_device=True: the {size / (1 << 30):.1f} GiB of the training tokens do not fit on {device}; "
            "leave it at auto"
        ) from None
    at, bound = 0, min(vocab_size or 1 << 31, 1 << 31)
    for shard in data.shards:
        for begin in range(0, len(shard), BLOCK):
            part = np.asarray(shard[begin : begin + BLOCK])
            refuse_outside(data.shards, data.name, bound, at, part)
            tokens[at : at + len(part)].copy_(torch.from_numpy(part.astype(np.int32)))
            at += len(part)
    say(f"data: the training tokens are kept on {device} ({size / (1 << 20):,.0f} MiB; --data_on_device)")
    return tokens


def windows(tokens: Tensor, starts: Tensor, block_size: int) -> Tensor:
    """Inputs and targets of the windows that begin at starts, (B,) int64: (2, B, block_size) int64, contiguous."""
    import torch

    places = starts[:, None] + torch.arange(block_size, device=tokens.device)  # (B, T)
    return tokens[torch.stack((places, places + 1))].long()
