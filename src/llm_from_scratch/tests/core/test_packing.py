"""Documents packed into windows: which tokens are where, and that packed documents are the same as each alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core import packing
from llm_from_scratch.core.cache import Documents, KVCache, check_documents
from llm_from_scratch.core.dataset import BatchLoader, TokenData
from llm_from_scratch.core.model import GPT, Attention
from llm_from_scratch.core.packing import BEGINS, LEARNED, PackedData, best_fit
from llm_from_scratch.core.tokenizer import ByteTokenizer
from llm_from_scratch.errors import DataError, UserError

from ..tiny import write_data

ALL, CPU = slice(None), torch.device("cpu")
END = 0


def packed(ids: list[int], block_size: int, marks: list[int] | None = None, end: int | None = END) -> PackedData:
    shards = [np.array(ids, np.uint16)]
    return PackedData(shards, "tokens", block_size, end, [np.array(marks, np.uint8)] if marks else ())


def rows(data: PackedData) -> list[list[tuple[list[int], list[int]]]]:
    """(inputs, targets) of every document of every row; padding must be apart from them."""
    (x, y), numbers, _ = data.batch(np.arange(len(data.learned)), data.block_size, ALL)
    found = []
    for row in range(len(x)):
        last = numbers[row].max() + 1
        parts = [numbers[row] == n for n in range(last)]
        assert (np.diff(numbers[row]) >= 0).all()
        if (y[row] == -1).all() or not x[row][parts[-1]].any() and (y[row][parts[-1]] == -1).all():
            parts = parts[:-1]  # padding
        found.append([(x[row][part].tolist(), y[row][part].tolist()) for part in parts])
    return found


def test_best_fit_by_hand() -> None:
    order, first = best_fit(np.array([3, 5, 2, 4]), 6)
    # 5 opens a row (room 1), 4 another (room 2), 3 a third (room 3); 2 fills the second exactly
    assert order.tolist() == [1, 3, 2, 0] and first.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_loses_nothing_and_wastes_little(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    sizes, capacity = rng.integers(1, 40, 3000), 64
    order, first = best_fit(sizes, capacity)
    assert sorted(order.tolist()) == list(range(3000))
    filled = np.add.reduceat(sizes[order], first[:-1])
    assert (filled <= capacity).all() and len(filled) <= 11 / 9 * sizes.sum() / capacity + 1
    monkeypatch.setattr(packing, "GROUP", 100)
    order, first = best_fit(sizes, capacity)
    assert sorted(order.tolist()) == list(range(3000))
    assert (np.add.reduceat(sizes[order], first[:-1]) <= capacity).all()


def test_documents_of_a_text_by_hand() -> None:
    data = packed([5, 6, 7, END, 8, END, 9, 9, 9, 9, END, 3, 4], 5)
    assert data.documents == 4
    # 9 9 9 9 END fills 4 of 5 positions; 8 END the fifth; then 5 6 7 END (3) and 3 4 (1), whose row has padding
    assert rows(data) == [
        [([9, 9, 9, 9], [9, 9, 9, END]), ([8], [END])],
        [([5, 6, 7], [6, 7, END]), ([3], [4])],
    ]
    assert data.learned.tolist() == [5, 4] and "4 documents in 2 windows of 5, 10.0% of" in data.summary()


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 64])
def test_every_token_of_a_text_is_predicted_once(block_size: int) -> None:
    rng = random.Random(block_size)
    documents = [[*(rng.randrange(1, 30) for _ in range(rng.randrange(1, 20))), END] for _ in range(50)]
    data = packed(sum(documents, []), block_size)
    found: list[tuple[int, int]] = []
    for row in rows(data):
        for x, y in row:
            found += zip(x, y, strict=True)
            assert len(x) <= block_size and x[1:] == y[:-1]
    assert sorted(found) == sorted(pair for d in documents for pair in zip(d, d[1:], strict=False))
    assert data.learned.sum() == len(found)


def test_only_marked_tokens_are_learned_and_long_conversations_are_cropped() -> None:
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    b, n = BEGINS, LEARNED
    marks = [b, 0, n, n, b, 0, 0, n, b, b | n, 0]  # the third and the fourth have nothing to learn: n begins it
    data = packed(ids, 3, marks, None)
    assert rows(data) == [[([1, 2, 3], [-1, 3, 4])], [([5, 6, 7], [-1, -1, 8])]]
    assert data.learned.tolist() == [2, 1]
    data = packed(ids, 2, marks, None)  # the second conversation's only learned token is cropped
    assert rows(data) == [[([1, 2], [-1, 3])]] and data.cropped == 2
    with pytest.raises(UserError, match="larger --block_size"):
        packed(ids, 1, marks, None)


def test_a_row_weighs_as_many_tokens_as_it_teaches() -> None:
    data = packed([1, 2, 3, 4, END, 5, END], 4, None)
    assert len(data.learned) == 2
    shares = [data.batch(np.array([0, 1, 1, 0]), 4, part, 2)[2] for part in (slice(0, 2), slice(2, 4))]
    assert (
        shares[0].tolist() == pytest.approx([2 * 4 / 10, 2 * 1 / 10]) and shares[1].tolist() == shares[0][::-1].tolist()
    )


@pytest.mark.parametrize("limit", [packing.IN_MEMORY, 0])
@pytest.mark.parametrize("marks", [None, [BEGINS, LEARNED, LEARNED]])
def test_a_batch_may_be_empty(marks: list[int] | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an evaluation of fewer rows than processes."""
    monkeypatch.setattr(packing, "IN_MEMORY", limit)
    both, numbers, shares = packed([1, 2, END], 4, marks).batch(np.arange(0), 4, ALL)
    assert both.shape == (2, 0, 4) and numbers.shape == (0, 4) and shares.shape == (0,)


def test_files_and_memory_give_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, 400)
    marks = rng.integers(0, 4, 400).astype(np.uint8)
    marks[0] |= BEGINS
    folder = write_data(tmp_path, train=[ids[:150], ids[150:]], val=ids[:50])
    for split, at in (("train", 250), ("val", 25)):  # cut elsewhere than the tokens
        for index, part in enumerate((marks[:at], marks[at : 400 if split == "train" else 50])):
            part.tofile(folder / f"{split}_marks_{index:06d}.bin")
    stated = {
        split: {
            "shards": [
                {"file": f.name, "tokens": f.stat().st_size // 2}
                for f in sorted(folder.glob(f"{split}*.bin"))
                if "marks" not in f.name
            ],
            "marks": [{"file": f.name, "tokens": f.stat().st_size} for f in sorted(folder.glob(f"{split}_marks*"))],
        }
        for split in ("train", "val")
    }  # fmt: skip
    content: dict[str, Any] = {"format": "llm-from-scratch-data", "dtype": "uint16", "vocab_size": 20, "splits": stated}
    (folder / "manifest.json").write_text(json.dumps(content))
    batches = []
    for limit in (1 << 20, 0):
        monkeypatch.setattr(packing, "IN_MEMORY", limit)
        data = PackedData.of(TokenData.open(folder, "train"), folder, "train", 16, None)
        assert (data.tokens is None) == (limit == 0)
        order = data.order(16, "shuffled", None, 7)
        loader = BatchLoader(data, order, 6, CPU)
        batches.append([loader.get(step) for step in range(4)])
        loader.close()
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and len(one) == 4
    (folder / "train_marks_000001.bin").write_bytes(b"\0" * 3)
    with pytest.raises(DataError, match="loss mask does not match"):
        PackedData.of(TokenData.open(folder, "train"), folder, "train", 16, None)


def test_every_row_once_an_epoch_for_any_number_of_processes() -> None:
    data = packed(sum([[1 + n % 9, 2, END] for n in range(41)], []), 4)
    order = data.order(4, "shuffled", None, 3)
    count = len(data.learned)
    assert sorted(order.starts(0, count).tolist()) == list(range(count)) and order.windows_per_epoch == count
    whole = BatchLoader(data, order, 6, CPU).get(5)
    halves = [BatchLoader(data, order, 6, CPU, rank, 2).get(5) for rank in (0, 1)]
    for part in range(3):
        assert torch.equal(whole[part], torch.cat([half[part] for half in halves]))
    assert torch.allclose(whole[3] * 2, torch.cat([half[3] for half in halves]))


def test_documents_need_ends(tmp_path: Path) -> None:
    folder = write_data(tmp_path, tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="--lines=True"):
        PackedData.of(TokenData.open(folder, "train"), folder, "train", 8, ByteTokenizer())


# --- the model ---

KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope": {"pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu"},
    "gqa": {"pos_embedding": "rope", "n_kv_head": 2, "qk_norm": True},
    "ngrams": {"max_ngram": 4, "ngram_rows": 64},
}


def model_of(**changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"vocab_size": 20, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32} | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))  # away from zeros and from a nearly linear model
    return model.eval()


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_each_alone(kind: str) -> None:
    model = model_of(**KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    lengths = [[7, 12, 1, 9], [20, 9]]  # the second row has 3 positions of padding
    documents = [[torch.randint(20, (n + 1,), generator=generator) for n in row] for row in lengths]
    x, y = torch.zeros(2, 32, dtype=torch.long), torch.full((2, 32), -1)
    numbers = torch.full((2, 32), 9)
    for r, row in enumerate(documents):
        at = 0
        for number, ids in enumerate(row):
            part = slice(at, at := at + len(ids) - 1)
            x[r, part], y[r, part], numbers[r, part] = ids[:-1], ids[1:], number
    logits, loss = model(x, y, Documents(numbers))
    sums, count = torch.zeros(()), 0
    for r, row in enumerate(documents):
        at = 0
        for ids in row:
            theirs, own = model(ids[None, :-1], ids[None, 1:])
            part = slice(at, at := at + len(ids) - 1)
            assert torch.allclose(logits[r, part], theirs[0], atol=1e-5 * float(theirs.detach().abs().max())), (r, at)
            with torch.no_grad():  # decoding with a cache, from the document's first token on
                cache, one_by_one = KVCache(model.config, 1), []
                for token in ids[:-1]:
                    one_by_one.append(model(token[None, None], cache=cache)[0][0, -1])
                    cache.advance(1)
            assert torch.allclose(torch.stack(one_by_one), theirs[0], atol=1e-5 * float(theirs.detach().abs().max()))
            sums, count = sums + own * (len(ids) - 1), count + len(ids) - 1
    assert loss.item() == pytest.approx((sums / count).item(), rel=1e-6)
    ours = torch.autograd.grad(loss, model.lm_head.weight)[0].to_dense()
    expected = torch.autograd.grad(sums / count, model.lm_head.weight)[0].to_dense()
    assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))
    check_documents(model)


def test_a_model_that_mixes_documents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=16, zero_init=True))
    check_documents(fresh)
    assert fresh.training
    whole = torch.nn.functional.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", lambda self, q, k, v, mask, causal: whole(q, k, v, is_causal=True))
        with pytest.raises(UserError, match="depend on the document before it"):
            check_documents(fresh)
    monkeypatch.setattr(GPT, "forward", lambda self, idx, targets=None: (None, None))
    with pytest.raises(UserError, match="cannot keep the documents"):
        check_documents(fresh)
