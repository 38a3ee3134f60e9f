"""Mixtures of datasets: what their text means, and which window is where, against counting one sample at a time."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.checkpoint.contents import is_dataset_name
from llm_from_scratch.config import Config
from llm_from_scratch.core.dataset import BatchLoader, TokenData, resolve_dataset
from llm_from_scratch.core.mixed import MixedOrder, Mixture, permuted
from llm_from_scratch.core.packing import BEGINS, LEARNED, PackedData
from llm_from_scratch.errors import UserError
from llm_from_scratch.mixture import Part, read_mixture
from llm_from_scratch.presets import parse

# --- the text ---


@pytest.mark.parametrize(
    "text",
    [
        "{book: 0.7, code: 0.3}",
        "{'book': 7, \"code\": 3}",
        '{"book": 0.7, "code": 0.3}',
        "book:0.7,code:0.3",
        "book:7, code:3.0",
        "{book: {weight: 1.4}, code: {weight: 6e-1, max_epochs: null}}",
    ],
)
def test_a_mixture_in_several_notations(text: str) -> None:
    parts = read_mixture(text)
    assert [(part.name, part.max_epochs) for part in parts] == [("book", None), ("code", None)]
    assert [part.weight for part in parts] == pytest.approx([0.7, 0.3])
    assert is_dataset_name(text)


def test_names_and_folders_are_not_mixtures() -> None:
    for name in ("book", "data/a b", "C:\\data\\x", "s3://bucket/x", "a,b", "name:3", "a:b,c:d", ""):
        assert read_mixture(name) == []
    found = read_mixture("{book: {weight: 3, max_epochs: 4}, s3://b/code: 1}")
    assert found == [Part("book", 0.75, 4.0), Part("s3://b/code", 0.25)]
    assert not is_dataset_name("{book: 1, ../x: 1}") and not is_dataset_name("{book: -1}") and not is_dataset_name(3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "at least one dataset"),
        ("{book: 0.5, book: 0.5}", "names book twice"),
        ("a:1,b:2,a:3", "names a twice"),
        ("{book: 0}", "weight of book .* is not a positive number"),
        ("{book: -1, code: 1}", "not a positive number"),
        ("{book: .nan}", "not a positive number"),
        ("{book: .inf}", "not a positive number"),
        ("{book: true}", "not a positive number"),
        ("{book: x}", "not a positive number"),
        ("{book}", "not a positive number"),
        ("{book: {max_epochs: 2}}", "weight of book"),
        ("{book: {weight: 1, max_epochs: 0}}", "max_epochs of book"),
        ("{book: {weight: 1, max_epoch: 2}}", "unknown setting max_epoch of book .* did you mean max_epochs"),
        ("{book: 1", "cannot be read"),
        ("{book: &a 1, code: *a}", "alias"),
        ("{" + "[" * 2000, "cannot be read"),
    ],
)
def test_a_mistake_in_a_mixture_is_named(text: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as error:
        read_mixture(text)
    assert "\n" not in str(error.value)


def test_a_preset_may_hold_a_mixture(here: Path) -> None:
    (here / "a.yaml").write_text("data:\n  dataset: {book: {weight: 1, max_epochs: 2}, code: 3}\n")
    (here / "b.py").write_text("dataset = {'book': 1, 'code': 3}\n")
    for file, most in (("a.yaml", 2.0), ("b.py", None)):
        config = parse(Config, [file], prog="x").tree
        assert read_mixture(config.data.dataset) == [Part("book", 0.25, most), Part("code", 0.75)]


def test_a_command_of_one_dataset_refuses_a_mixture() -> None:
    with pytest.raises(UserError, match="is a mixture, but this command needs one dataset"):
        resolve_dataset("{a: 1, b: 2}")


# --- the order ---


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 65537])
def test_permuted_is_a_permutation(count: int) -> None:
    keys = np.random.default_rng(count).integers(0, 1 << 32, 6, np.uint64)
    found = permuted(np.arange(count), count, keys)
    assert sorted(found.tolist()) == list(range(count))
    some = np.arange(0, count, 3)
    assert permuted(some, count, keys).tolist() == found[some].tolist(), "a place does not depend on the others"


@pytest.mark.slow
def test_permuted_is_as_random_as_a_permutation() -> None:
    """How often element j is at place i: the chi-square statistic, whose mean and deviation are known."""
    count, rng, counts = 11, np.random.default_rng(0), np.zeros((11, 11))
    for _ in range(1000):
        counts[np.arange(count), permuted(np.arange(count), count, rng.integers(0, 1 << 32, 6, np.uint64))] += 1
    expected = 1000 / count
    chi, freedom = ((counts - expected) ** 2 / expected).sum(), (count - 1) ** 2
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


def ascending(length: int, begin: int, dtype: str = "<u2") -> TokenData:
    return TokenData([np.arange(begin, begin + length, dtype=dtype)], f"from {begin}")


def mixture(weights: dict[str, Any], sizes: list[int]) -> Mixture:
    """Parts whose tokens are their positions in the whole mixture."""
    text = "{" + ", ".join(f"{name}: {value}" for name, value in weights.items()) + "}"
    begins = np.cumsum([0, *sizes])[:-1].tolist()
    return Mixture(read_mixture(text), [ascending(n, begin) for n, begin in zip(sizes, begins, strict=True)])


def ordered(data: Mixture, kind: Any = "shuffled", stride: int | None = None, seed: int = 3) -> MixedOrder:
    return data.order(8, kind, stride, seed)


def one_by_one(order: MixedOrder, count: int) -> list[tuple[int, int]]:
    """(part, start in the part's tokens) of the first samples."""
    starts = [int(order.starts(sample, 1)[0]) for sample in range(count)]
    parts = [max(i for i, first in enumerate(order.first) if first <= start) for start in starts]
    return [(part, start - order.first[part]) for part, start in zip(parts, starts, strict=True)]


@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_every_prefix_has_the_shares(kind: Any) -> None:
    data = mixture({"a": 0.5, "b": 0.13, "c": 0.3, "d": 0.07}, [400, 90, 300, 150])
    found = one_by_one(ordered(data, kind), 300)
    counts = [0] * 4
    for number, (part, start) in enumerate(found, 1):
        counts[part] += 1
        assert all(abs(n - number * part.weight) < 2 for n, part in zip(counts, data.names, strict=True))
        assert 0 <= start <= len(data.parts[part]) - 9, "a window, with its last target, lies in one part"
    assert ordered(data, kind).counts(300) == counts


def test_no_window_of_a_part_repeats_within_an_epoch() -> None:
    data = mixture({"a": 0.8, "b": 0.2}, [103, 60])
    order = ordered(data)
    found = one_by_one(order, 120)
    for part in (0, 1):
        windows, mine = order.orders[part].windows_per_epoch, [start for p, start in found if p == part]
        epochs = [mine[at : at + windows] for at in range(0, len(mine) - windows + 1, windows)]
        assert len(epochs) >= 2
        for epoch in epochs:
            assert len(set(epoch)) == windows and len({start % 8 for start in epoch}) == 1, "8 tokens apart"
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
        assert len({epoch[0] % 8 for epoch in epochs}) > 1, "each epoch cuts at other places"


def naive_parts(weights: list[Fraction], limits: list[float], count: int) -> list[int]:
    """The number of samples of each part, counted in steps: each phase gives the parts that are left their shares."""
    counts, phase = [0] * len(weights), [Fraction(0)] * len(weights)
    for _ in range(count):
        active = [i for i, n in enumerate(counts) if n < limits[i]]
        total = sum(weights[i] for i in active)
        for i in active:
            phase[i] += weights[i] / total
        most = max(active, key=lambda i: phase[i] - counts[i])
        counts[most] += 1
    return counts


def test_a_used_up_part_leaves_its_share_to_the_others() -> None:
    data = mixture({"a": "{weight: 0.5, max_epochs: 2}", "b": "{weight: 0.3, max_epochs: 3.5}", "c": 0.2}, [103] * 3)
    order = ordered(data)
    windows = order.orders[0].windows_per_epoch
    found = one_by_one(order, 250)
    counts = Counter(part for part, _ in found)
    assert counts[0] == 2 * windows and counts[1] == int(3.5 * windows) and order.samples == float("inf")
    limits = [order.limit(part) for part in range(3)]
    for length in (10, 40, 50, 60, 70, 100, 250):
        expected = naive_parts([Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)], limits, length)
        assert all(abs(a - b) <= 2 for a, b in zip(order.counts(length), expected, strict=True)), length
        assert order.counts(length) == [sum(part == i for part, _ in found[:length]) for i in range(3)]
    used_up, later = (max(n for n, (part, _) in enumerate(found) if part == i) + 1 for i in (0, 1))
    after = Counter(part for part, _ in found[used_up:later])
    assert after[1] == pytest.approx(0.6 * (later - used_up), abs=2) and after[1] > 10, "0.3 and 0.2 become 0.6 and 0.4"
    lines = order.lines(250)
    assert "a 50.0% of the windows (2.00 epochs), b 30.0% of the windows (3.45 epochs)" in lines[0]
    assert lines[1] == f"mixture: after {used_up:,} windows, a reached max_epochs; then only the other parts are used"
    assert "a, b reached" in lines[2]


def test_a_run_longer_than_all_parts_is_refused() -> None:
    order = ordered(mixture({"a": "{weight: 1, max_epochs: 2}", "b": "{weight: 3, max_epochs: 1}"}, [203, 203]))
    per_epoch = order.orders[0].windows_per_epoch
    assert order.samples == 3 * per_epoch
    order.refuse_longer(3 * per_epoch, 1)
    lasts = f"the mixture is enough for {3 * per_epoch // 4:,} steps"
    with pytest.raises(UserError, match=f"{lasts}, but the run has 30: .*max_iters"):
        order.refuse_longer(120, 4)
    assert len(one_by_one(order, 4 * per_epoch)) == 4 * per_epoch, "a run that rolled back may need a little more"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_30_random_cuts_at_world_sizes_1_to_4(kind: Any) -> None:
    """A run that stops at a step and resumes with another number of processes reads the same ids."""
    data = mixture({"a": "{weight: 0.6, max_epochs: 1.5}", "b": 0.3, "c": 0.1}, [403, 203, 90])
    order, rng = ordered(data, kind), random.Random(0)
    whole = [data.windows(ordered(data, kind).starts(step, 12), 9) for step in range(60)]
    for cut in range(30):
        step, world = rng.randrange(59), 1 + cut % 4
        rows = []
        for rank in range(world):
            loader = BatchLoader(data, order, 12, torch.device("cpu"), rank, world)
            x, y = loader.get(step)
            rows.append(torch.cat((x, y[:, -1:]), dim=1).numpy())
            loader.close()
        assert (np.concatenate(rows) == whole[step]).all()


def test_a_step_far_away_is_as_quick_as_the_first() -> None:
    """A part of a trillion tokens: nothing is as long as the data."""

    class Huge(np.ndarray):
        def __len__(self) -> int:
            return 10**12

    shards = [np.zeros(0, np.uint16).view(Huge) for _ in range(2)]
    data = Mixture(read_mixture("{a: 0.9, b: 0.1}"), [TokenData([shard]) for shard in shards])
    found = data.order(1024, "shuffled", None, 0).starts(1 << 28, 512)
    assert len(set(found.tolist())) == 512 and found.max() > 10**11


# --- the data ---


def test_parts_keep_their_number_types_and_vocabulary_check() -> None:
    parts = [ascending(100, 0), ascending(100, 70000, "<u4")]
    data = Mixture(read_mixture("{a: 1, b: 1}"), parts)
    assert data.windows(np.array([0, 100]), 3).tolist() == [[0, 1, 2], [70000, 70001, 70002]]
    with pytest.raises(UserError, match="token 150 has id 70050, outside the vocabulary of 70050 ids"):
        data.check(8, 70050)
    with pytest.raises(UserError, match="from 0 has 100 tokens, but a window needs"):
        data.check(100, None)


def test_rows_of_documents_of_parts() -> None:
    """A batch of a packed mixture: the rows of the parts, and their shares in the loss of the batch."""
    rng = np.random.default_rng(0)
    lines = np.concatenate([[*rng.integers(1, 9, n), 0] for n in rng.integers(1, 9, 60)]).astype(np.uint16)
    marks = np.where(rng.random(300) < 0.4, LEARNED, 0) | np.where(np.arange(300) % 10 == 0, BEGINS, 0)
    chats = rng.integers(10, 20, 300).astype(np.uint16)
    parts = [PackedData([lines], "lines", 12, 0), PackedData([chats], "chats", 12, marks=[marks.astype(np.uint8)])]
    data = Mixture(read_mixture("{lines: 2, chats: 1}"), parts)
    assert data.is_packed and data.positions == sum(part.positions for part in parts)
    order = data.order(12, "shuffled", None, 5)
    starts = order.starts(2, 9)
    (x, y), numbers, shares = data.batch(starts, 12, slice(None))
    counts = (y >= 0).sum(axis=1)
    assert shares == pytest.approx(counts / counts.sum())
    seen = Counter[int]()
    for row, start in enumerate(starts.tolist()):
        part = int(start >= len(parts[0].learned))
        (own, targets), theirs, _ = parts[part].batch(np.array([start - order.first[part]]), 12, slice(None))
        assert (own[0] == x[row]).all() and (targets[0] == y[row]).all() and (theirs[0] == numbers[row]).all()
        seen[part] += 1
    assert seen == {0: 6, 1: 3}
    halves = [data.batch(starts, 12, share, 2) for share in (slice(0, 5), slice(5, 9))]
    assert np.concatenate([half[2] for half in halves]) / 2 == pytest.approx(shares)
