"""core/ngrams.py and training/adagrad.py: the row of each n-gram, and the updates of rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.config import GenerationConfig, GPTConfig, OptimizerConfig
from llm_from_scratch.core.dataset import SampleOrder, TokenData
from llm_from_scratch.core.model import GPT, KVCache
from llm_from_scratch.core.ngrams import NGramEmbedding
from llm_from_scratch.core.sizes import count_params, meta_model
from llm_from_scratch.core.tokenizer import CharTokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.training.adagrad import added, keep_occurrences, merged, occurrences, step_rows
from llm_from_scratch.training.optimizer import make_optimizer, set_learning_rates
from llm_from_scratch.training.run import Run
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train

from ..tiny import tiny_config


def make(**changes: Any) -> GPT:
    """A model whose n-grams have been trained, as far as their size goes."""
    torch.manual_seed(0)
    small = {
        "block_size": 16,
        "vocab_size": 7,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "max_ngram": 4,
        "ngram_rows": 50,
    }
    model = GPT(GPTConfig(**{**small, **changes})).eval()
    torch.nn.init.normal_(model.transformer.ngrams.weight)
    return model


def test_ngrams_have_their_own_rows_if_the_table_is_large_enough() -> None:
    config = GPTConfig(vocab_size=5, n_embd=8, n_head=1, max_ngram=3, ngram_rows=6**3)
    table = NGramEmbedding(config)
    runs = torch.cartesian_prod(*[torch.arange(5)] * 3)  # all of three tokens
    places = table.places(runs)
    assert places[:, 2, 0].unique().numel() == 25 and places[:, 2, 1].unique().numel() == 125
    assert places[..., 0].max() < 6**3 <= places[..., 1].min()  # each n has its own part
    assert (places[:, 2, 0].view(5, 25) == places[:25, 2, 0]).all()  # the last two decide
    first = table.places(torch.tensor([[3]]))  # nothing before it: no run that begins with a token
    assert not torch.isin(first[0, 0], places[:, 2]).any()


def test_hashed_runs_depend_on_the_last_tokens_only_and_fill_the_table() -> None:
    table = NGramEmbedding(GPTConfig(vocab_size=50304, n_embd=8, n_head=1, max_ngram=5, ngram_rows=1000))
    torch.manual_seed(0)
    idx = torch.randint(50304, (1, 5000))
    places = table.places(idx)
    assert (0 <= places).all() and all((places[..., i] // 1000 == i).all() for i in range(4))
    again = table.places(idx[:, 100:])
    for i in range(4):
        n = i + 2
        assert torch.equal(again[:, n - 1 :, i], places[:, 100 + n - 1 :, i])
        counts = torch.bincount(places[0, :, i] - i * 1000, minlength=1000).double()
        # 5,000 runs in 1,000 rows: counts of mean 5, and a chi-square of 999 +- 45
        assert abs(((counts - 5) ** 2 / 5).sum() - 999) < 5 * 45


def test_the_embedding_is_the_sum_over_the_rows() -> None:
    model = make()
    table, idx = model.transformer.ngrams, torch.tensor([[1, 2, 3], [6, 6, 0]])
    expected = torch.stack([sum(table.weight[p] for p in row) for row in table.places(idx).view(-1, 3)])
    torch.testing.assert_close(table(idx).view(-1, 8), expected)


def test_no_token_sees_later_tokens() -> None:
    model, idx = make(), torch.randint(7, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = idx.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 7
    before, after = model(idx, idx)[0], model(changed, changed)[0]
    assert torch.equal(before[:, :9], after[:, :9]) and (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


def test_a_cache_gives_the_logits_of_the_whole(pos: str = "rope") -> None:
    model, lengths = make(pos_embedding=pos), torch.tensor([3, 6])
    idx = torch.randint(7, (2, 12), generator=torch.Generator().manual_seed(1))
    full = model(idx, idx)[0]
    cache = KVCache(model.config, 2)
    model(idx[:, :6], cache=cache)
    cache.advance(lengths)
    for _ in range(4):  # rows of different length
        new = idx.gather(1, cache.lengths[:, None])
        logits = model(new, cache=cache)[0][:, 0]
        torch.testing.assert_close(logits, full[torch.arange(2), cache.lengths], atol=1e-6, rtol=1e-5)
        cache.advance(1)
    swapped = cache.select(torch.tensor([1, 0, 1]))
    new = idx[[1, 0, 1]].gather(1, swapped.lengths[:, None])
    expected = full[[1, 0, 1], swapped.lengths]
    torch.testing.assert_close(model(new, cache=swapped)[0][:, 0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("overflow", ["recompute", pytest.param("drop_half", marks=pytest.mark.slow)])
def test_generation_past_the_context_is_the_same_with_a_cache(overflow: Any) -> None:
    model = make(pos_embedding="rope", tie_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight)
    texts = []
    for cached in (True, False):
        generator = Generator(model, CharTokenizer.from_text(["abcdefg"]))
        settings = GenerationConfig(num_samples=1, max_new_tokens=60, temperature=0.0, top_k=None)
        texts.append([s.text for s in generator.generate(["abc", "g"], settings, overflow=overflow, use_cache=cached)])
    assert texts[0] == texts[1] and len(set(texts[0][0])) >= 3


def test_rows_step_as_adagrad_by_hand() -> None:
    """Elementwise Adagrad of torch is row-wise Adagrad if a row has one element."""
    torch.manual_seed(0)
    table, other = torch.nn.Parameter(torch.randn(9, 1)), None
    other = torch.nn.Parameter(table.detach().clone())
    reference = torch.optim.Adagrad([other], lr=0.3, eps=1e-30)
    total = torch.zeros(9, 1)
    for _ in range(5):
        rows = torch.randperm(9)[:4]
        target = torch.randn(4, 1)
        for p, sparse in ((table, True), (other, False)):
            p.grad = None
            (torch.nn.functional.embedding(rows, p, sparse=sparse) - target).square().sum().backward()
        step_rows(table, total, 0.3, occurrences(table))
        reference.step()
    torch.testing.assert_close(table, other)


def test_a_row_moves_by_the_rate_at_its_first_step_and_others_stay() -> None:
    table = torch.nn.Parameter(torch.zeros(5, 4))
    gradient = torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    (torch.nn.functional.embedding(torch.tensor([1, 3]), table, sparse=True) * gradient).sum().backward()
    step_rows(table, torch.zeros(5, 1), 0.5, occurrences(table))
    expected = torch.zeros(5, 4)
    expected[1] = -0.5 * torch.tensor([0.6, 0.0, 0.8, 0.0]) * 2  # length 0.5 * sqrt(4)
    expected[3] = -0.5
    torch.testing.assert_close(table.detach(), expected)


def test_a_step_that_is_left_out_changes_nothing() -> None:
    table, total = torch.nn.Parameter(torch.zeros(5, 4)), torch.zeros(5, 1)
    for value, left_out in ((1.0, 0.0), (float("nan"), 1.0)):
        table.grad = None
        (torch.nn.functional.embedding(torch.tensor([1, 3]), table, sparse=True) * value).sum().backward()
        before = [t.clone() for t in (table.detach(), total)]
        step_rows(table, total, 0.5, occurrences(table), torch.tensor(left_out))
    assert all(torch.equal(a, b) for a, b in zip(before, (table.detach(), total), strict=True))


def test_every_occurrence_of_a_row_counts_for_any_number_of_micro_batches() -> None:
    """By hand: g and s are sums over single positions. torch would add up some rows that occur in two micro-batches."""
    idx, found = torch.randint(7, (6, 9), generator=torch.Generator().manual_seed(0)), []
    for parts in (1, 2, 6):
        model = make()
        table = model.transformer.ngrams.weight
        for _ in range(2):  # again, as in a run that has tried a larger micro-batch or a compiler
            keep_occurrences(table)
        for part in idx.chunk(parts):
            (model(part[:, :-1], part[:, 1:])[1] / parts).backward()
        assert [len(rows) for rows, *_ in occurrences(table)] == [6 // parts * 8 * (model.config.max_ngram - 1)] * parts
        rows, _, squares = added([merged(*part) for part in occurrences(table)])
        assert len(rows) == len(rows.unique())
        total = torch.zeros(len(table), 1).index_add_(0, rows, squares)
        found.append((table.grad.to_dense(), total))
    for dense, total in found[1:]:
        torch.testing.assert_close(dense, found[0][0], atol=1e-8, rtol=1e-5)
        torch.testing.assert_close(total, found[0][1], atol=1e-10, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"embedding_norm": True, "norm": "layernorm"}, {"pos_embedding": "rope"}])
def test_shapes_and_counts_know_of_them(changes: dict[str, Any]) -> None:
    model = make(**changes)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    counted = {name: tuple(p.shape) for name, p in meta_model(model.config).named_parameters()}
    assert list(counted.items()) == list(shapes.items())
    assert count_params(model.config) == sum(p.numel() for p in model.parameters())


def test_zero_init_adds_nothing_at_first() -> None:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=8, vocab_size=7, n_layer=2, n_head=2, n_embd=32, tie_embeddings=False, zero_init=True)
    )
    idx = torch.randint(7, (2, 8))
    assert (model(idx, idx)[0] == 0).all()  # a head of zeros
    assert model(idx, idx)[1].item() == pytest.approx(1.9459101, rel=1e-6)  # ln 7
    assert all(
        (block.attn.c_proj.weight == 0).all() and (block.mlp.c_proj.weight == 0).all() for block in model.transformer.h
    )
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert weight.abs().max() <= (3 / 32) ** 0.5 / 2 and weight.std().item() == pytest.approx(0.5 / 32**0.5, rel=0.05)


@pytest.mark.parametrize("changes", [{"max_ngram": 1}, {"max_ngram": 17}, {"max_ngram": 3, "ngram_rows": 0}])
def test_impossible_tables_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="max_ngram|ngram_rows"):
        GPTConfig(**changes).validate()


def test_the_tables_keep_their_rate_while_the_others_follow_the_schedule() -> None:
    model = make(tie_embeddings=False)
    config = OptimizerConfig(optimizer_type="muon", learning_rate=0.1, muon_learning_rate=0.4, ngram_learning_rate=0.7)
    optimizer = make_optimizer(model, config, torch.device("cpu"))
    set_learning_rates(optimizer, 0.05)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["transformer.ngrams.weight"] == 0.7 and rates["lm_head.weight"] == 0.05
    assert rates["transformer.h.0.attn.c_attn.weight"] == pytest.approx(0.2)
    assert set(rates) == {name for name, _ in model.named_parameters()}


FORGETTING: dict[str, Any] = {
    "n_layer": 1, "max_ngram": 3, "ngram_rows": 5000, "sample_order": "shuffled", "forget_ngrams": True,
    "gradient_accumulation_steps": 1, "eval_iters": 1, "schedule": "linear", "keep_last": 99,
}  # fmt: skip


@pytest.mark.parametrize("partial", [10, 5])
def test_long_ngrams_are_reset_at_the_end_of_a_pass(tiny_data: Path, tmp_path: Path, partial: int) -> None:
    """A run of an epoch and `partial` steps. After the step that begins the whole epoch, weights and accumulators hold
    that step's rows alone."""
    config = tiny_config(tiny_data, **FORGETTING)
    order = SampleOrder(len(TokenData.open(tiny_data, "train")), config.model.block_size, "shuffled")
    batch = config.data.batch_size
    steps = partial + order.windows_per_epoch // batch
    begin = math.floor(steps - order.windows_per_epoch / batch)  # the step in which the whole epoch begins
    touched = []
    for step in (begin, begin + 1):
        out_dir = tmp_path / f"run-{step}"
        ends = {"max_iters": steps, "lr_ends": {0: steps}}
        train(tiny_config(tiny_data, **FORGETTING, **ends, eval_interval=step, out_dir=str(out_dir)))
        saved = load_checkpoint(find_checkpoint(out_dir, step))
        sums = saved.optimizer["state"]["transformer.ngrams.weight"]["sum"]  # type: ignore[index]
        touched.append([int((part != 0).sum()) for part in sums.split(5000)])
        assert torch.equal(sums[:, 0] != 0, saved.model["transformer.ngrams.weight"].abs().sum(1) != 0)
    (bigrams, trigrams), (bigrams_after, trigrams_after) = touched
    assert bigrams_after >= bigrams  # kept
    assert 0 < trigrams_after <= batch * config.model.block_size < trigrams


def test_ngrams_are_not_reset_near_the_end(tiny_data: Path) -> None:
    """The last epoch is whole, except after a rollback: then the data is some steps ahead."""
    config = tiny_config(tiny_data, **FORGETTING)
    order = SampleOrder(len(TokenData.open(tiny_data, "train")), config.model.block_size, "shuffled")
    epoch = order.windows_per_epoch / config.data.batch_size  # steps
    for ahead, wanted in ((0, [epoch / 2, 1.5 * epoch]), (5, [epoch / 2 - 5, 1.5 * epoch - 5])):
        ends = {"max_iters": int(2.5 * epoch), "lr_ends": {0: int(2.5 * epoch)}}
        run = Run(make_plan(tiny_config(tiny_data, **FORGETTING, **ends)), say=print)
        run.state.data_shift, begun = ahead, list[int]()
        run.optimizer.begin_epoch = lambda run=run, begun=begun: begun.append(run.state.step)  # type: ignore[method-assign, misc]
        while run.state.step < run.plan.last_step:
            run.next_batch()
            run.state.step += 1
        run.close()
        assert begun == pytest.approx(wanted, abs=2)


@pytest.mark.parametrize("changes", [{"max_ngram": 0}, {"sample_order": "random"}])
def test_forgetting_needs_epochs_and_ngrams(changes: dict[str, Any], tiny_data: Path) -> None:
    settings: dict[str, Any] = {"max_ngram": 3, "sample_order": "shuffled", "forget_ngrams": True, **changes}
    with pytest.raises(UserError, match="forget_ngrams needs --max_ngram"):
        tiny_config(tiny_data, **settings).validate()
