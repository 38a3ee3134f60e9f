"""training/evaluate.py: the loss of every token, the same for any batch size and any number of processes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.config import GPTConfig, SystemConfig
from llm_from_scratch.core.dataset import SampleOrder, TokenData
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import CharTokenizer, HFTokenizer
from llm_from_scratch.errors import MemoryShortError
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.training import evaluate
from llm_from_scratch.training.evaluate import Evaluation, combined, count_bytes, estimate_loss, evaluate_split

from ..tiny import slow_except

RUNTIME = runtimes.resolve(SystemConfig(device="cpu"))


def make(**changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)  # far from uniform, so that each token's loss is its own
    return model


def data(length: int, shards: int = 1, seed: int = 0) -> TokenData:
    ids = np.random.default_rng(seed).integers(0, 20, length).astype(np.uint16)
    return TokenData(np.array_split(ids, shards))


def naive(model: GPT, tokens: TokenData, block: int) -> float:
    """Token after token: each predicted from what precedes it in its window."""
    ids = [int(i) for i in np.concatenate([shard[:] for shard in tokens.shards])]
    losses = []
    model.eval()
    with torch.no_grad():
        for at in range(1, len(ids)):
            begin = (at - 1) // block * block
            logits, _ = model(torch.tensor([ids[begin:at]]))
            losses.append(-float(logits[0, -1].double().log_softmax(-1)[ids[at]]))
    return sum(losses) / len(losses)


@pytest.mark.cases(2)
@pytest.mark.parametrize("length", slow_except([2, 5, 8, 9, 10, 16, 17, 18, 60, 65], 2, 8, 9, 60))
@pytest.mark.parametrize("block", [8, 1, 3])
def test_the_whole_split_token_by_token(length: int, block: int) -> None:
    model, tokens = make(), data(length)
    result = evaluate_split(model, tokens, block, RUNTIME)
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(naive(model, tokens, block), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.text_bytes is None and result.bits_per_byte is None


def naive_strided(model: GPT, tokens: TokenData, block: int, stride: int) -> float:
    """A loop over windows of which only the tokens after those of the window before count."""
    ids = [int(i) for i in np.concatenate([shard[:] for shard in tokens.shards])]
    losses: dict[int, float] = {}
    model.eval()
    begin = 0
    while max(losses, default=0) < len(ids) - 1:
        for at in range(begin + 1, min(begin + block, len(ids) - 1) + 1):
            if at not in losses:
                assert begin == 0 or at - begin > block - stride, "at least block - stride tokens of context"
                with torch.no_grad():
                    logits, _ = model(torch.tensor([ids[begin:at]]))
                losses[at] = -float(logits[0, -1].double().log_softmax(-1)[ids[at]])
        begin += stride
    return sum(losses.values()) / len(losses)


@pytest.mark.cases(3)
@pytest.mark.parametrize("length", slow_except([2, 9, 10, 17, 33, 40], 2, 10, 33))
@pytest.mark.parametrize(("block", "stride"), [(8, 3), (8, 1), (8, 7), (8, 8), (3, 2)])
def test_overlapping_windows_token_by_token(length: int, block: int, stride: int) -> None:
    model, tokens = make(), data(length)
    expected = naive_strided(model, tokens, block, stride)
    for batch_size in (None, 1, 3):
        result = evaluate_split(model, tokens, block, RUNTIME, batch_size=batch_size, stride=stride)
        assert result.tokens == length - 1
        assert result.loss == pytest.approx(expected, rel=1e-5)


def test_evaluations_are_combined_by_their_tokens() -> None:
    parts = [Evaluation(2.0, 30, 60, 1.0), Evaluation(3.0, 10, 15, 0.5)]
    assert combined(parts) == Evaluation(2.25, 40, 75, 1.5)
    assert combined([*parts, Evaluation(1.0, 40, None, 0.0)]) == Evaluation(1.625, 80, None, 1.5)


def test_batch_size_and_shards_do_not_show() -> None:
    model, tokens = make(), data(101)
    expected = evaluate_split(model, tokens, 8, RUNTIME).loss
    for batch_size in (1, 2, 5, 13, 64):
        assert evaluate_split(model, tokens, 8, RUNTIME, batch_size=batch_size).loss == pytest.approx(
            expected, rel=1e-6
        )
    assert evaluate_split(model, data(101, shards=7), 8, RUNTIME).loss == pytest.approx(expected, rel=1e-6)


def test_a_shortage_of_one_process_ends_the_evaluation_of_a_sharded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait in the exchanges of this batch: none of them would take part in a smaller one."""
    model = make()
    calls: list[int] = []

    def short(self: Any, idx: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(idx))
        raise MemoryError

    monkeypatch.setattr(type(model), "forward", short)
    runtime = dataclasses.replace(RUNTIME, rank=1, world_size=2, parallel="fsdp", shards=2)
    with pytest.raises(MemoryShortError, match=r"evaluating 4 sequences .* on rank 1 \(MemoryError\)"):
        evaluate_split(model, data(161), 8, runtime, batch_size=4)
    assert calls == [4]


def test_processes_that_run_short_of_memory_still_count_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make(), data(161)
    expected, sums, forward = evaluate_split(model, tokens, 8, RUNTIME), [], type(model).forward

    def collect(values: list[float], *_: Any) -> list[float]:
        sums.append(values)
        return [1.0, 1.0, 0.0]

    monkeypatch.setattr(evaluate, "sum_over_ranks", collect)

    def small(self: Any, idx: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(idx) > room:
            raise torch.OutOfMemoryError
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", small)
    for rank in (0, 1):
        room = (4, 2)[rank]
        evaluate_split(model, tokens, 8, dataclasses.replace(RUNTIME, rank=rank, world_size=2), batch_size=4)
    nats, counted, stopped = np.sum(sums, axis=0)
    assert (
        not stopped and counted == expected.tokens == 160 and nats / counted == pytest.approx(expected.loss, rel=1e-6)
    )


@pytest.mark.parametrize("world", [2, 3, 50])
def test_processes_together_count_every_token_once(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process in turn; the sums that they would exchange are added up here."""
    model, tokens = make(), data(101)
    expected = evaluate_split(model, tokens, 8, RUNTIME, batch_size=2)
    expected_estimate = estimate_loss(model, tokens, 8, 20, RUNTIME)
    sums: list[list[float]] = []

    def collect(values: list[float], *_: Any) -> list[float]:
        sums.append(values)
        return [values[0], max(1, values[1]), values[2]]

    monkeypatch.setattr(evaluate, "sum_over_ranks", collect)
    monkeypatch.setattr(evaluate, "windows_at_once", lambda *_: 3)
    ranks = [dataclasses.replace(RUNTIME, rank=rank, world_size=world) for rank in range(world)]
    for runtime in ranks:
        evaluate_split(model, tokens, 8, runtime, batch_size=2)
    nats, counted, stopped = np.sum(sums, axis=0)
    assert (
        not stopped and counted == expected.tokens == 100 and nats / counted == pytest.approx(expected.loss, rel=1e-6)
    )
    sums.clear()
    for runtime in ranks:
        estimate_loss(model, tokens, 8, 20, runtime)
    nats, counted, stopped = np.sum(sums, axis=0)
    assert not stopped and counted == 20 * 8 and nats / counted == pytest.approx(expected_estimate, rel=1e-6)


def test_bits_per_byte_by_hand() -> None:
    assert Evaluation(loss=2.0, tokens=30, text_bytes=60, seconds=0.0).bits_per_byte == pytest.approx(
        2.0 * 30 / math.log(2) / 60
    )
    assert Evaluation(math.log(2), 7, 7, 0.0).bits_per_byte == pytest.approx(1.0)  # one bit a token of one byte
    assert Evaluation(1e4, 7, 7, 0.0).perplexity == math.inf


def test_bytes_leave_out_the_first_token() -> None:
    text = "aé€b€€😀ab"
    tokenizer = CharTokenizer.from_text([text])
    ids = tokenizer.encode(text)
    expected = len(text[1:].encode())
    assert count_bytes(TokenData([ids]), tokenizer) == expected == 18
    assert count_bytes(TokenData(np.array_split(ids, 3)), tokenizer) == expected
    assert count_bytes(TokenData([ids[1:]]), tokenizer) == expected - 2  # the first token has two bytes
    assert evaluate_split(make(), TokenData([ids]), 8, RUNTIME, tokenizer).text_bytes == expected


def test_bytes_with_a_vocabulary_of_pieces() -> None:
    text = "the thing that the thinker thinks: naïve — thé! " * 3
    tokenizer = HFTokenizer.train([text], 280)
    ids = tokenizer.encode(text)
    first = len(tokenizer.decode_bytes(ids[:1]))
    assert len(ids) < len(text)
    assert count_bytes(TokenData([ids]), tokenizer) == len(text.encode()) - first


def test_the_estimate_is_the_mean_over_fixed_windows() -> None:
    model, tokens = make(), data(60)
    found = estimate_loss(model, tokens, 8, 12, RUNTIME)
    order = SampleOrder(60, 8, "random", seed=evaluate.EVAL_SEED)
    ids = np.concatenate([shard[:] for shard in tokens.shards]).astype(np.int64)
    losses = []
    model.eval()
    for start in order.starts(0, 12):
        window = torch.from_numpy(ids[start : start + 9])[None]
        with torch.no_grad():
            losses.append(float(model(window[:, :-1], window[:, 1:])[1]))
    assert found == pytest.approx(sum(losses) / 12, rel=1e-6)
    torch.manual_seed(5)
    assert estimate_loss(model, tokens, 8, 12, RUNTIME) == found
    for batch_size in (1, 5, 12, 40):
        assert estimate_loss(model, tokens, 8, 12, RUNTIME, batch_size=batch_size) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(training: bool) -> None:
    model, tokens = make(dropout=0.5).train(training), data(60)
    state = torch.get_rng_state()
    first = evaluate_split(model, tokens, 8, RUNTIME).loss, estimate_loss(model, tokens, 8, 8, RUNTIME)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    again = evaluate_split(model, tokens, 8, RUNTIME).loss, estimate_loss(model, tokens, 8, 8, RUNTIME)
    assert first == again
    assert all(p.grad is None for p in model.parameters())


def test_every_batch_has_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model is then compiled once. A batch is hardly padded."""
    shapes = []
    model = make()
    forward = model.forward

    def watch(idx: torch.Tensor, targets: torch.Tensor) -> Any:
        shapes.append(tuple(idx.shape))
        return forward(idx, targets)

    monkeypatch.setattr(model, "forward", watch)
    evaluate_split(model, data(101), 8, RUNTIME, batch_size=4)
    assert set(shapes) == {(4, 8)}
    shapes.clear()
    monkeypatch.setattr(evaluate, "windows_at_once", lambda *_: 8)
    estimate_loss(model, data(101), 8, 10, RUNTIME)
    assert shapes == [(5, 8)] * 2  # not 8 and 2 padded to 8
    shapes.clear()
    evaluate_split(model, data(8 * 17), 8, RUNTIME)
    assert shapes == [(6, 8)] * 3
