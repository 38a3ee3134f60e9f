"""The key/value cache: with it, the next token needs a pass over that token alone. Documents takes its place in
training on packed documents.

The cache is an argument of the model's forward, never an attribute, so that nothing is left in a model. Shapes as in
model.py.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..config import GPTConfig
from ..errors import UserError, one_line


class KVCache:
    """Keys and values of the tokens seen so far, for a batch of rows of different lengths.

    Rows are filled from the left. A forward pass over (B, T) writes row b at positions lengths[b] ... lengths[b] + T -
    1. Then the caller calls advance() with the number of valid tokens. Prompts of different lengths are padded on the
    right: positions beyond a row's length are masked, and overwritten by the row's next tokens. The memory may have
    room for more and longer rows than there are. join() adds rows, drop() removes one.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        heads, width = config.n_kv_head or config.n_head, config.head_width
        self.max_len = max_len or config.block_size
        self.rows, self.room = batch_size, batch_size  # rows in use, rows allocated
        self.n_gram = bool(config.max_ngram)  # its embeddings read the tokens too
        self.kv = torch.zeros(
            config.n_layer, 2, batch_size, heads, self.max_len, width, device=device, dtype=dtype
        )  # keys are kv[:, 0], values kv[:, 1]
        self.tokens = torch.zeros(batch_size, self.max_len, dtype=torch.long, device=device)
        self.counts = [0] * batch_size  # length of each row, on the host: no device sync to read it
        self._lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.end = 0  # length of the longest row
        self.ragged = False  # whether rows differ in length
        self.positions: Tensor | None = None
        self.mask: Tensor | None = None
        self.window: Any = None  # of generation/window.py, which keeps its views here

    @property
    def lengths(self) -> Tensor:
        """Length of each row on the device, (B,) int64."""
        return self._lengths[: self.rows]

    @property
    def device(self) -> torch.device:
        return self.kv.device

    def begin(self, T: int) -> Tensor:
        """Prepares the cache for a pass over T new tokens per row. Returns their positions, (B, T) or (T,)."""
        if self.end + T > self.max_len:
            raise ValueError(f"{self.end} cached + {T} new tokens exceed the cache's max_len={self.max_len}")
        steps = torch.arange(T, device=self.device)
        self.positions = self.lengths[:, None] + steps if self.ragged else self.end + steps
        self.mask = None
        if self.end and (self.ragged or T > 1):
            keys = torch.arange(self.end + T, device=self.device)
            self.mask = (keys <= self.positions[..., None]).view(-1, 1, T, self.end + T)  # (B or 1, 1, T, S)
        return self.positions

    def seen(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """After begin: stores idx, (B, T). Returns all tokens so far, (B, S), and the positions of idx."""
        assert self.positions is not None
        rows = torch.arange(idx.size(0), device=idx.device)[:, None]
        self.tokens[rows, self.positions] = idx
        return self.tokens[: self.rows, : self.end + idx.size(1)], self.positions

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, index)

    def advance(self, n: int | Sequence[int] | Tensor) -> None:
        """Counts n more tokens as valid (negative: fewer). n: one number for all rows, or one per row, (B,)."""
        if isinstance(n, int):
            self.counts = [count + n for count in self.counts]
            self.end += n
            self._lengths[: self.rows] += n
        else:
            each = n.tolist() if isinstance(n, Tensor) else n
            self._set([count + more for count, more in zip(self.counts, each, strict=True)])

    def select(self, rows: Tensor) -> KVCache:
        """A cache of the given rows, (N,), in that order. A row may be repeated."""
        new = copy.copy(self)
        new.window = None
        new.kv, new.tokens = self.kv.index_select(2, rows), self.tokens.index_select(0, rows)
        new.rows = new.room = len(rows)
        new._lengths = self._lengths.index_select(0, rows)
        new._set([self.counts[row] for row in rows.tolist()])
        return new

    def join(self, other: KVCache, of: Sequence[int], room: int = 0, max_len: int = 0) -> None:
        """Appends the rows `of` another cache. Afterwards there is memory for at least `room` rows of max_len."""
        first, n = self.rows, len(of)
        self._reserve(max(room, first + n), max(max_len, other.end))
        self.rows += n
        self._lengths[first : self.rows] = 0
        self.counts += [0] * n
        self.put(range(first, self.rows), other, of)

    def put(self, rows: Sequence[int], other: KVCache, of: Sequence[int]) -> None:
        """Overwrites rows with the rows `of` another cache."""
        to, source = (torch.tensor(list(which), device=self.device) for which in (rows, of))
        self.kv[:, :, to, :, : other.end] = other.kv[:, :, source, :, : other.end]
        self.tokens[to, : other.end] = other.tokens[source, : other.end]
        counts = list(self.counts)
        for row, its in zip(rows, of, strict=True):
            counts[row] = other.counts[its]
        self._set(counts)

    def drop(self, row: int) -> None:
        """Removes a row; the last one takes its place."""
        last, n = self.rows - 1, self.counts[self.rows - 1]
        self.kv[:, :, row, :, : self.counts[row]] = 0  # a mask hides numbers, but nan times 0 is nan
        if row != last:
            self.kv[:, :, row, :, :n] = self.kv[:, :, last, :, :n]
            self.kv[:, :, last, :, :n] = 0
            self.tokens[row, :n] = self.tokens[last, :n]
        counts = list(self.counts)
        counts[row] = counts[last]
        self.rows = last
        self._set(counts[:last])

    def _set(self, counts: list[int]) -> None:
        self.counts, self.end = counts, max(counts, default=0)
        self.ragged = min(counts, default=0) != self.end
        self._lengths[: self.rows] = torch.tensor(counts, device=self.device)

    def _reserve(self, room: int, max_len: int) -> None:
        """Enlarges the memory if it is too small for this many rows of this length."""
        if room <= self.room and max_len <= self.max_len:
            return
        before, tokens, lengths = self.kv, self.tokens, self._lengths
        L, _, _, heads, _, width = before.shape
        self.room, self.max_len = max(room, self.room), max(max_len, self.max_len)
        self.kv = before.new_zeros(L, 2, self.room, heads, self.max_len, width)
        self.tokens, self._lengths = tokens.new_zeros(self.room, self.max_len), lengths.new_zeros(self.room)
        self.kv[:, :, : self.rows, :, : self.end] = before[:, :, : self.rows, :, : self.end]
        self.tokens[: self.rows, : self.end] = tokens[: self.rows, : self.end]
        self._lengths[: self.rows] = lengths[: self.rows]


@dataclasses.dataclass
class LayerCache:
    """One layer's part of a KVCache."""

    cache: KVCache
    index: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores new keys and values, (B, Hkv, T, D). Returns all of them, (B, Hkv, S, D), and the mask."""
        cache, T = self.cache, k.size(2)
        keys, values = (cache.kv[self.index, which, : cache.rows] for which in (0, 1))
        if cache.ragged:
            assert cache.positions is not None
            rows = torch.arange(k.size(0), device=k.device)[:, None]
            keys[rows, :, cache.positions] = k.transpose(1, 2).to(keys.dtype)
            values[rows, :, cache.positions] = v.transpose(1, 2).to(values.dtype)
        else:
            keys[:, :, cache.end : cache.end + T] = k
            values[:, :, cache.end : cache.end + T] = v
        if cache.end == 0:  # the first pass sees only itself: the plain causal kernel
            return k, v, None
        return keys[:, :, : cache.end + T], values[:, :, : cache.end + T], cache.mask


class Documents:
    """The documents that share the rows of a batch, passed to the model as its cache: positions begin again with every
    document, and a token attends to its own document only.

    numbers: of the document at each position, (B, T), int64, counted from 0 in each row and never decreasing. margins:
    what the loss of pairs of documents compares with (training/preferences.py). blocks: the mask has its blocks too.
    """

    GAP = 15  # ids that n-grams see before a document: the most that any reads

    def __init__(self, numbers: Tensor, margins: Tensor | None = None, *, blocks: bool = False):
        T, self.margins = numbers.size(1), margins
        self.numbers, steps = numbers, torch.arange(T, device=numbers.device)
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        self.positions = steps - (begins * steps).cummax(dim=1).values  # (B, T)
        same = numbers[:, None, :, None] == numbers[:, None, None, :]
        mask: Any = same & torch.ones(T, T, dtype=torch.bool, device=numbers.device).tril()  # (B, 1, T, T)
        if blocks:
            mask.blocks = document_blocks(numbers)  # for kernels/flex.py; lost if an edited model changes the mask
        self.mask: Tensor = mask

    @classmethod
    def of(cls, parts: Sequence[Tensor], model: torch.nn.Module) -> list[Documents]:
        """The Documents of a batch of packed documents, one per row, in a list; an empty list for other data. The mask
        has blocks if a module of the model reads them."""
        if not parts:
            return []
        return [cls(*parts, blocks=any(getattr(m, "reads_blocks", False) for m in model.modules()))]

    def begin(self, T: int) -> Tensor:
        return self.positions

    def seen(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens with a gap of ids -1, which stand for no token, before every document, and where idx is there."""
        places = torch.arange(idx.size(1), device=idx.device) + self.GAP * self.numbers
        tokens = torch.full((len(idx), int(places.max()) + 1), -1, device=idx.device)
        return tokens.scatter(1, places, idx), places

    def layer(self, index: int) -> Documents:
        return self

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return k, v, self.mask


def document_blocks(numbers: Tensor) -> Any:
    """The mask of Documents for flex_attention, which skips blocks of keys that no query of a block may see."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")  # takes a second to import

    def may_see(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (numbers[b, query] == numbers[b, key])

    B, T = numbers.shape
    return flex.create_block_mask(may_see, B, None, T, T, device=numbers.device)


@torch.no_grad()
def check_documents(model: Any) -> None:
    """Raises UserError if a model's forward lets documents in a row see each other. Compares a document after another
    one with the same document alone; weights that are zero at the start would hide a difference, so others take their
    place."""
    n = min(4, model.config.block_size // 2)
    if not n:  # a context of one token
        return
    ids = torch.arange(1, 2 * n + 1, device=model.lm_head.weight.device)[None] % model.config.vocab_size
    weights = {
        name: p if p.any() else torch.linspace(-0.1, 0.1, p.numel(), dtype=p.dtype, device=p.device).view(p.shape)
        for name, p in model.named_parameters()
    }
    why, was_training = "", model.training
    model.eval()
    try:
        numbers = (torch.arange(2 * n, device=ids.device) >= n).long()[None]
        both = functional_call(model, weights, (ids, ids, Documents(numbers)))[0][:, n:]
        alone = functional_call(model, weights, (ids[:, n:], ids[:, n:]))[0]
        if not torch.allclose(both, alone, atol=1e-4 * float(alone.abs().max())):
            why = "a document's logits depend on the document before it"
    except Exception as error:
        why = f"{type(error).__name__}: {one_line(error)}"
    finally:
        model.train(was_training)
    if why:
        raise UserError(
            f"--documents=True: this model (core/model.py) cannot keep the documents of a window apart: {why}. Its "
            "attention must use the mask of the cache argument, and its position embeddings the cache's positions"
        )
