"""core/dataset.py: windows against a naive reference, in an order that depends only on seed and step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.core import dataset as datasets
from llm_from_scratch.core.dataset import (
    BatchLoader,
    SampleOrder,
    TokenData,
    load_on_device,
    read_manifest,
    resolve_dataset,
)
from llm_from_scratch.errors import UserError

from ..tiny import write_data, write_ids

CPU = torch.device("cpu")


def loader(data: TokenData, order: SampleOrder, batch: int, rank: int = 0, world_size: int = 1) -> BatchLoader:
    return BatchLoader(data, order, batch, CPU, rank, world_size)


def ascending(*lengths: int) -> TokenData:
    """Shards whose token at position p is p."""
    ends = np.cumsum(lengths)
    return TokenData([np.arange(end - n, end, dtype=np.uint16) for n, end in zip(lengths, ends, strict=True)])


# --- token files ---


def test_a_nanogpt_folder_is_read_unchanged(tmp_path: Path) -> None:
    folder = write_data(tmp_path, train=[5, 1, 65535, 0], val=[7], tokenizer=None)
    data = TokenData.open(folder, "train")
    assert len(data) == 4 and data.windows(np.array([0, 1]), 3).tolist() == [[5, 1, 65535], [1, 65535, 0]]
    assert data.windows(np.array([0]), 2).dtype == np.int64
    assert not isinstance(data.shards[0], np.memmap)  # which a truncation under way turns into SIGBUS
    assert len(TokenData.open(folder, "val")) == 1


def test_uint32_as_stated_in_the_manifest(tmp_path: Path) -> None:
    ids = [70000, 1, 2**32 - 1]
    splits = {"train": {"tokens": 3, "shards": [{"file": "train.bin", "tokens": 3}]}}
    folder = write_data(tmp_path, train=ids, val=[1, 2], tokenizer=None, dtype="uint32", splits=splits)
    assert TokenData.open(folder, "train").windows(np.array([0]), 3).tolist() == [ids]
    assert len(TokenData.open(folder, "val")) == 2  # a split that the manifest leaves out


def test_windows_across_shards_equal_one_long_file() -> None:
    lengths = (3, 1, 7, 2, 11)
    data = ascending(*lengths)
    assert len(data) == 24
    for length in (1, 2, 5, 24):
        starts = np.arange(0, 24 - length + 1)
        naive = [[start + i for i in range(length)] for start in starts]
        assert data.windows(starts, length).tolist() == naive


def test_numbered_shards_are_read_in_order(tmp_path: Path) -> None:
    folder = write_data(tmp_path, train=[[1, 2], [3], [4, 5, 6]], val=[[9]], tokenizer=None)
    data = TokenData.open(folder, "train")
    assert data.windows(np.array([0]), 6).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert resolve_dataset(folder) == folder


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(folder: Path, split: str = "train") -> str:
        with pytest.raises(UserError) as error:
            TokenData.open(folder, split)
        assert "\n" not in str(error.value)
        return str(error.value)

    empty = write_data(tmp_path / "empty", train=[], tokenizer=None)
    assert "train.bin is empty: the train split does not have tokens" in refused(empty)
    odd = write_data(tmp_path / "odd", tokenizer=None)
    (odd / "train.bin").write_bytes(b"abc")
    assert "has 3 bytes, not a multiple of 2" in refused(odd)
    (odd / "val.bin").unlink()
    assert "val.bin is missing: the dataset does not have its val split" in refused(odd, "val")
    shards = [{"file": "train.bin", "tokens": 5}]
    cut = write_data(tmp_path / "cut", train=[1, 2, 3], splits={"train": {"shards": shards}})
    assert "has 3 tokens, but its manifest lists 5" in refused(cut)
    gone = write_data(tmp_path / "gone", splits={"train": {"shards": [{"file": "train_000001.bin", "tokens": 5}]}})
    assert "train_000001.bin is missing" in refused(gone)


@pytest.mark.parametrize("name", ["../train.bin", "/etc/hostname", "sub/train.bin"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    write_ids(tmp_path / "train.bin", [1, 2])
    folder = write_data(tmp_path / "x", splits={"train": {"shards": [{"file": name, "tokens": 2}]}})
    with pytest.raises(UserError, match="files outside its folder"):
        TokenData.open(folder, "train")


GOOD: dict[str, Any] = {"format": "llm-from-scratch-data", "dtype": "uint16", "vocab_size": 20, "splits": {}}
SHARD: dict[str, Any] = {"file": "train.bin", "tokens": 1}
SPLITS: list[Any] = [[], {}, {"shards": 1}, {"shards": ["train.bin"]}]


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "3", '"x"', "null", "{}", "[" * 100000),
        *({k: v for k, v in GOOD.items() if k != missing} for missing in GOOD),
        *(GOOD | change for change in ({"format": "other"}, {"dtype": "int8"}, {"vocab_size": "x"}, {"splits": 5})),
        *(GOOD | {"splits": {"train": split}} for split in SPLITS),
        *(GOOD | {"splits": {"train": {"shards": [{k: v}]}}} for k, v in SHARD.items()),
        GOOD | {"splits": {"train": {"shards": [SHARD | {"tokens": "x"}]}}},
    ],
    ids=lambda content: str(content)[:40],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: Any) -> None:
    folder = write_data(tmp_path, tokenizer=None)
    (folder / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match="manifest.json is damaged"):
        TokenData.open(folder, "train")


def test_a_manifest_that_is_not_text_is_refused(tmp_path: Path) -> None:
    folder = write_data(tmp_path, tokenizer=None)
    assert read_manifest(folder) is None
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(folder)


def test_check_finds_short_data_and_foreign_ids() -> None:
    data = ascending(5, 5)
    data.check(9, 10)
    with pytest.raises(
        UserError, match=r"has 10 tokens, but a window needs block_size \+ 1 = 11.*use --block_size=9, or"
    ):
        data.check(10, 10)
    with pytest.raises(UserError, match="token 7 has id 7, outside the vocabulary of 7 ids"):
        data.check(9, 7)
    data.check(9, None)


# --- finding a dataset ---


def test_a_name_is_looked_up_in_two_places(here: Path) -> None:
    write_data(here / "data" / "a")
    write_data(here / "data" / "processed" / "b")
    write_data(here / "elsewhere")
    assert resolve_dataset("a") == Path("data/a")
    assert resolve_dataset("b") == Path("data/processed/b")
    assert resolve_dataset("elsewhere") == Path("elsewhere")
    assert resolve_dataset(here / "elsewhere") == here / "elsewhere"
    assert resolve_dataset("data/processed/b") == Path("data/processed/b")
    assert resolve_dataset("a", root=here) == here / "data" / "a"


def test_an_ambiguous_name_is_refused(here: Path) -> None:
    write_data(here / "data" / "a")
    write_data(here / "data" / "processed" / "a")
    with pytest.raises(UserError, match="'a' is ambiguous: data/a and data/processed/a; use one of the two"):
        resolve_dataset("a")
    (here / "data" / "a" / "train.bin").unlink()
    (here / "data" / "a" / "val.bin").unlink()
    assert resolve_dataset("a") == Path("data/processed/a")


def test_a_missing_dataset_names_the_command_that_makes_it(here: Path) -> None:
    (here / "data" / "shakespeare_char").mkdir(parents=True)
    (here / "data" / "shakespeare_char" / "prepare.py").write_text("")
    with pytest.raises(UserError, match="make it with: python data/shakespeare_char/prepare.py"):
        resolve_dataset("shakespeare_char")
    with pytest.raises(UserError, match="make it with: llm-prepare FILE --out_dir=data/processed/mine"):
        resolve_dataset("mine")
    (here / "folder").mkdir()
    with pytest.raises(UserError, match="no train.bin or val.bin in .*folder"):
        resolve_dataset("folder")
    with pytest.raises(UserError, match="name is empty"):
        resolve_dataset("")


# --- the order ---


def naive_epoch(order: SampleOrder, batch: int, epoch: int) -> list[int]:
    """All starts of one epoch, gathered sample by sample over however many steps they spread."""
    per_epoch = order.windows_per_epoch
    places = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    return [int(order.starts(place // batch, batch)[place % batch]) for place in places]


@pytest.mark.parametrize(
    ("tokens", "block", "stride"),
    [(100, 8, None), (101, 8, 3), (97, 16, 16), (9, 8, None), (50, 4, 30), (10, 8, 5)],
)
@pytest.mark.parametrize("batch", [1, 7])
def test_shuffled_order_sees_each_window_once_an_epoch(tokens: int, block: int, stride: int | None, batch: int) -> None:
    order = SampleOrder(tokens, block, "shuffled", stride, seed=3)
    spacing = stride or block
    shifts = set()
    for epoch in range(6):
        starts = naive_epoch(order, batch, epoch)
        assert max(Counter(starts).values()) == 1
        shift = min(starts)
        assert 0 <= shift < spacing
        assert sorted(starts) == [shift + spacing * i for i in range(len(starts))]
        assert max(starts) + block + 1 <= tokens  # the targets' last token exists
        assert tokens - block - 1 - max(starts) < 2 * spacing  # and nothing but less than a stride is left out
        shifts.add(shift)
    assert len(shifts) > 1 or order.last_start == 0  # epochs begin at different places


def test_shuffled_order_differs_in_each_epoch() -> None:
    order = SampleOrder(10_000, 10, "shuffled", seed=1)
    first, second = (np.array(naive_epoch(order, 8, epoch)) // 10 for epoch in (0, 1))
    assert first.tolist() != sorted(first) and first.tolist() != second.tolist()
    # no window's place in one epoch tells its place in the next
    assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 0.15


def test_random_offsets_are_uniform_and_reach_both_ends() -> None:
    order = SampleOrder(20, 8, "random", seed=0)
    starts = np.concatenate([order.starts(step, 100) for step in range(30)])
    counts = np.bincount(starts, minlength=12)
    assert len(counts) == 12 and counts.min() > 0  # 0 ... tokens - 1 - block_size
    assert ((counts - 250) ** 2 / 250).sum() < 35  # chi-squared with 11 degrees of freedom: p = 0.0002


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_the_order_depends_on_seed_and_step_alone(kind: Any) -> None:
    def made(seed: int = 1) -> SampleOrder:
        return SampleOrder(500, 8, kind, seed=seed)

    expected = [made().starts(step, 6).tolist() for step in range(40)]
    order = made()
    for step in np.random.default_rng(0).permutation(40):  # asked in any order, any number of times
        np.random.seed(step)
        torch.manual_seed(int(step))
        assert order.starts(int(step), 6).tolist() == expected[step]
    assert len({tuple(starts) for starts in expected}) == 40
    assert [made(2).starts(step, 6).tolist() for step in range(40)] != expected


def test_all_seeds_are_taken() -> None:
    for seed in (0, 2**31, 2**63 - 1):
        assert SampleOrder(100, 8, seed=seed).starts(0, 4).max() <= 91


# --- batches ---


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_batches_equal_a_naive_loop(kind: Any) -> None:
    data = ascending(40, 1, 30, 29)
    order = SampleOrder(len(data), 8, kind, seed=5)
    batches = loader(data, order, 6)
    for step in (0, 1, 2, 9, 3, 3):  # in order, out of order, and twice
        x, y = batches.get(step)
        assert x.shape == y.shape == (6, 8) and x.dtype == y.dtype == torch.int64
        for row, start in enumerate(order.starts(step, 6)):
            assert x[row].tolist() == [start + i for i in range(8)]
            assert y[row].tolist() == [start + i + 1 for i in range(8)]
    batches.close()


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_share_the_same_global_batch(world_size: int) -> None:
    data = ascending(300)
    order = SampleOrder(len(data), 8, "shuffled", seed=5)
    whole = loader(data, order, 12)
    parts = [loader(data, order, 12, rank, world_size) for rank in range(world_size)]
    for step in range(5):
        x, y = whole.get(step)
        shares = [part.get(step) for part in parts]
        assert torch.equal(torch.cat([share[0] for share in shares]), x)
        assert torch.equal(torch.cat([share[1] for share in shares]), y)
    for each in (whole, *parts):
        each.close()


def test_the_next_batch_is_made_ahead() -> None:
    made: list[int] = []

    class Watched(BatchLoader):
        def _make(self, step: int, order: SampleOrder) -> list[torch.Tensor]:
            made.append(step)
            return super()._make(step, order)

    data = ascending(100)
    batches = Watched(data, SampleOrder(100, 8), 2, CPU)
    for step in range(4):
        batches.get(step)
    assert batches.ahead is not None
    batches.ahead[2].result()
    batches.close()
    assert sorted(made) == [0, 1, 2, 3, 4]  # each once, and one ahead


def test_a_batch_read_ahead_is_not_used_after_the_order_changes() -> None:
    batches = BatchLoader(ascending(100), SampleOrder(100, 8, "shuffled"), 2, CPU)
    batches.get(0)
    batches.order = SampleOrder(100, 8, "shuffled", shifts=((1, 5),))
    assert batches.get(1)[0][:, 0].tolist() == batches.order.starts(1, 2).tolist()  # token i is i
    assert batches.order.starts(1, 2).tolist() != SampleOrder(100, 8, "shuffled").starts(1, 2).tolist()
    batches.close()


def test_a_manifest_on_disk_equals_the_helpers(tmp_path: Path) -> None:
    folder = write_data(tmp_path, name="tiny")
    assert read_manifest(folder) == json.loads((folder / "manifest.json").read_text())


# --- tokens on the device ---


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_tokens_on_the_device_give_the_same_batches(order: Any) -> None:
    data, told = ascending(70, 1, 129), list[str]()
    samples = SampleOrder(200, 8, order, seed=3)
    tokens = load_on_device(CPU, data, 200, True, told.append)
    for rank in (0, 1):
        reading, ours = loader(data, samples, 6, rank, 2), BatchLoader(data, samples, 6, CPU, rank, 2, None, tokens)
        for step in (0, 1, 2, 9, 3):
            for theirs, mine in zip(reading.get(step), ours.get(step), strict=True):
                assert torch.equal(mine, theirs) and mine.dtype == torch.int64 and mine.is_contiguous()
        reading.close()
        ours.close()
    assert told == ["data: the training tokens are kept on cpu (0 MiB; --data_on_device)"]


def test_tokens_on_the_device_are_not_read_again(tmp_path: Path) -> None:
    folder = write_data(tmp_path, train=list(range(19)) * 4, val=[1, 2], tokenizer=None)
    data = TokenData.open(folder, "train")
    batches = BatchLoader(data, SampleOrder(76, 8), 2, CPU, tokens=load_on_device(CPU, data, 19, True, print))
    expected = [loader(data, SampleOrder(76, 8), 2).get(step)[0].tolist() for step in range(3)]
    write_ids(folder / "train.bin", [0] * 76)
    assert [batches.get(step)[0].tolist() for step in range(3)] == expected
    batches.close()


def test_an_id_outside_the_vocabulary_is_met_on_the_way_to_the_device() -> None:
    with pytest.raises(UserError, match="token 57 has id 57, outside the vocabulary of 57 ids"):
        load_on_device(CPU, ascending(50, 50), 57, True, print)
    wide = TokenData([np.array([1, 2**31], dtype=np.uint32)])
    with pytest.raises(UserError, match="token 1 has id 2147483648"):  # which int32 would wrap
        load_on_device(CPU, wide, None, True, print)


def test_tokens_are_moved_to_the_device_if_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    data, free = ascending(1000), {"bytes": 40_000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 1 << 40))
    made = []
    monkeypatch.setattr(
        torch, "empty", lambda *size, **how: made.append(how["device"]) or torch.zeros(*size, dtype=torch.int32)  # type: ignore[func-returns-value]
    )
    gpu = torch.device("cuda")
    assert load_on_device(gpu, data, 1000, "auto", print) is not None and made == [gpu]  # 4,000 bytes of 40,000
    free["bytes"] -= 1
    assert load_on_device(gpu, data, 1000, "auto", print) is None
    free["bytes"] = 1 << 40
    monkeypatch.setattr(datasets, "MAX_ON_DEVICE", 3999)
    assert load_on_device(gpu, data, 1000, "auto", print) is None
    assert (
        load_on_device(CPU, data, 1000, "auto", print) is None and load_on_device(gpu, data, 1000, False, print) is None
    )


def test_tokens_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*size: Any, **how: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match="--data_on_device=True: the 0.0 GiB .* do not fit on cuda"):
        load_on_device(torch.device("cuda"), ascending(1000), 1000, True, print)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    told: list[str] = []
    assert load_on_device(torch.device("cuda"), ascending(1000), 1000, "auto", told.append) is None
    assert told == ["data: the training tokens do not fit on cuda; reading them from the files"]
