"""Loss, perplexity and bits per byte. Sums are float64, so batch size and world size do not change them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.cache import Documents
from ..core.dataset import TokenData
from ..core.packing import PackedData
from ..core.tokenizer import Tokenizer
from ..errors import Interrupted, MemoryShortError, UserError, one_line
from ..machine.device import Runtime, is_out_of_memory
from ..machine.processes import sum_over_ranks

LOGITS_LIMIT = 1 << 26  # logits of one evaluation batch: 256 MiB in float32
EVAL_SEED = 0x5EED  # evaluation batches are the same in every run and at every step


@dataclass(frozen=True)
class Evaluation:
    """The loss over a split."""

    loss: float
    """Mean cross-entropy, nats per token."""
    tokens: int
    text_bytes: int | None
    """UTF-8 bytes of the predicted tokens; None without a tokenizer."""
    seconds: float
    of_pairs: bool = False
    """Whether the loss is the mean over pairs of answers, without perplexity."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, unlike the loss per token."""
        return self.loss * self.tokens / math.log(2) / self.text_bytes if self.text_bytes else None


def combined(parts: Sequence[Evaluation]) -> Evaluation:
    """Several evaluations as one over all their tokens."""
    tokens, sizes = sum(part.tokens for part in parts), [part.text_bytes for part in parts]
    nats = math.fsum(part.loss * part.tokens for part in parts)
    text_bytes = None if None in sizes else sum(size or 0 for size in sizes)
    return Evaluation(nats / tokens, tokens, text_bytes, sum(part.seconds for part in parts))


@torch.no_grad()
def evaluate_split(
    model: torch.nn.Module, data: TokenData, block_size: int, runtime: Runtime, tokenizer: Tokenizer | None = None,
    batch_size: int | None = None, before_batch: Callable[[], None] = lambda: None, stride: int | None = None,
) -> Evaluation:  # fmt: skip
    """The loss over every token of a split except its first, in windows of block_size tokens, `stride` tokens apart
    (None: block_size). Of a window that overlaps the one before it, only the new tokens count. before_batch is called
    before every batch, and may raise to end the evaluation."""
    begin = time.perf_counter()
    known = block_size - (stride or block_size)  # tokens of a window that only give context
    starts = np.arange(0, max(1, len(data) - 1 - known), stride or block_size)
    if isinstance(data, PackedData):
        known, starts = 0, np.arange(len(data.learned))
    nats, total = _sum_of_losses(model, data, starts, block_size, runtime, batch_size, before_batch, known)
    of_pairs = isinstance(data, PackedData) and data.of_pairs
    text_bytes = None if tokenizer is None or of_pairs else count_bytes(data, tokenizer)
    return Evaluation(nats / total, round(total), text_bytes, time.perf_counter() - begin, of_pairs)


def evaluate_parts(
    model: torch.nn.Module, data: TokenData, *rest: Any, **options: Any
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """evaluate_split, and the evaluations of the parts of a mixture by name. The whole is then that of a text that has
    the parts in the proportions of their weights."""
    found = [(name, weight, evaluate_split(model, part, *rest, **options)) for name, weight, part in data.weighted]
    parts = [part for _, _, part in found]
    if len(parts) == 1:
        return parts[0], {name: part for name, _, part in found if name}
    loss = math.fsum(weight * part.loss for _, weight, part in found)
    tokens, seconds = sum(part.tokens for part in parts), sum(part.seconds for part in parts)
    per_token = math.fsum(weight * (part.text_bytes or 0) / part.tokens for _, weight, part in found)
    text_bytes = None if None in [part.text_bytes for part in parts] else round(tokens * per_token)
    return Evaluation(loss, tokens, text_bytes, seconds), {name: part for name, _, part in found}


@torch.no_grad()
def estimate_loss(
    model: torch.nn.Module, data: TokenData, block_size: int, windows: int, runtime: Runtime,
    batch_size: int | None = None, before_batch: Callable[[], None] = lambda: None,
) -> float:  # fmt: skip
    """Mean loss over `windows` random windows, the same ones every time. before_batch: as in evaluate_split."""
    starts = data.order(block_size, "random", None, EVAL_SEED).starts(0, windows)
    nats, total = _sum_of_losses(model, data, starts, block_size, runtime, batch_size, before_batch)
    return nats / total


def _sum_of_losses(
    model: torch.nn.Module, data: TokenData, starts: np.ndarray, block_size: int, runtime: Runtime, size: int | None,
    before_batch: Callable[[], None], known: int = 0,
) -> list[float]:  # fmt: skip
    """(nats, tokens) of the windows, over all processes, in batches of `size`, or smaller ones if memory runs out. The
    first `known` tokens of each window do not count, except of the first window."""
    mine = starts[runtime.rank :: runtime.world_size]  # the same sum, whatever batch size a process ends with
    # a sharded model needs all processes for a batch: with fewer windows, one takes part with an empty batch
    share = -(-len(starts) // runtime.world_size) if runtime.is_sharded else len(mine)
    size = size or even_size(share, windows_at_once(model, block_size))
    was_training = model.training
    while True:
        nats, tokens, stopped = 0.0, 0, False
        model.eval()
        try:
            for i in range(0, share, size):
                try:
                    before_batch()
                except Interrupted:  # the other processes learn it with the sums
                    stopped = True
                    break
                x, y, *documents = _windows(data, mine[i : i + size], block_size, size, runtime.device)
                if known:
                    y[int(0 in mine[i : i + 1]) :, :known] = -1
                # of pairs of documents, each counts once
                count = int(((y >= 0) if len(documents) < 2 else ~documents[1].isnan()).sum())
                loss = loss_of(model, x, y, runtime, *Documents.of(documents, model))
                nats += loss * count if count else 0.0
                tokens += count
            *sums, stops = sum_over_ranks([nats, tokens, stopped], runtime.device, runtime.world_size)
            if stops:
                raise Interrupted
            return sums
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if runtime.is_sharded and runtime.world_size > 1:  # the others already wait in this batch's exchanges
                raise MemoryShortError(
                    f"out of memory evaluating {size} sequences of {block_size} tokens on rank {runtime.rank} "
                    f"({one_line(error) or type(error).__name__}), and the other processes of a sharded model cannot "
                    "repeat the batch: shorten the context, or use more processes"
                ) from None
            if size == 1:
                raise UserError(
                    f"out of memory evaluating one sequence of {block_size} tokens "
                    f"({one_line(error)}); shorten the context or use a smaller model"
                ) from None
        finally:
            model.train(was_training)
        size //= 2


def count_bytes(data: TokenData, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the tokens of a split that are predicted: all but the first, or the learned ones of documents."""
    length_of = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)], dtype=np.int64)
    total = 0
    if isinstance(data, PackedData):
        for at in range(0, len(data.learned), 256):
            some = np.arange(at, min(at + 256, len(data.learned)))
            targets = data.batch(some, data.block_size, slice(None), 1)[0][1]
            total += int(length_of[targets[targets >= 0]].sum())
        return total
    for shard in data.shards:
        for at in range(0, len(shard), 1 << 24):
            ids = np.asarray(shard[at : at + (1 << 24)])
            total += int(length_of[ids[ids < len(length_of)]].sum())
    first = int(data.shards[0][0])
    return total - (int(length_of[first]) if first < len(length_of) else 0)


def windows_at_once(model: torch.nn.Module, block_size: int) -> int:
    """Sequences per evaluation batch: enough tokens to keep the device busy, few enough for the logits to fit, and on a
    CPU for the activations to stay in its cache."""
    config: Any = model.config
    tokens = 4096 if next(model.parameters()).device.type == "cpu" else 16384
    return max(1, min(tokens, LOGITS_LIMIT // config.vocab_size) // block_size)


def even_size(windows: int, most: int) -> int:
    """The size of as few batches as possible, all of which are full or nearly so: a batch is padded to its size."""
    return -(-windows // max(1, -(-windows // most))) or 1


def _windows(
    data: TokenData, starts: np.ndarray, block_size: int, batch_size: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Inputs and targets (batch_size, block_size); positions beyond the data or the last row have target -1. Every
    batch has the same shape, so that a compiled model is compiled once. Of packed documents also their numbers."""
    if isinstance(data, PackedData):
        both, numbers, _, *margins = data.batch(starts, block_size, slice(None), 1)
        more = ((0, batch_size - len(starts)), (0, 0))
        parts = zip((*both, numbers, *margins), (0, -1, 0, np.nan), strict=False)
        return tuple(torch.from_numpy(np.pad(part, more, constant_values=fill)).to(device) for part, fill in parts)
    tokens = np.full((batch_size, block_size + 1), -1, dtype=np.int64)
    is_whole = starts + block_size < len(data)
    tokens[: len(starts)][is_whole] = data.windows(starts[is_whole], block_size + 1)
    for row in np.flatnonzero(~is_whole):  # the last window of the split
        length = len(data) - int(starts[row])
        tokens[row, :length] = data.windows(starts[row : row + 1], length)[0]
    ids = torch.from_numpy(tokens).to(device)
    return ids[:, :-1].clamp(min=0), ids[:, 1:].contiguous()


def loss_of(model: torch.nn.Module, x: Tensor, y: Tensor, runtime: Runtime, *documents: Documents) -> float:
    with runtime.autocast():
        _, loss = model(x, y, *documents)
    return float(loss)
