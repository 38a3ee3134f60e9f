"""training/choice.py: choices at fixed speeds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llm_from_scratch.config import Config
from llm_from_scratch.errors import UserError
from llm_from_scratch.interop.hf import family_of
from llm_from_scratch.machine.budget import parse_budget
from llm_from_scratch.settings import flatten
from llm_from_scratch.training.choice import Choice, Facts, Speed, choose, sequences, settings_of
from llm_from_scratch.training.counts import Curve
from llm_from_scratch.training.dial import with_settings
from llm_from_scratch.training.scheduler import learning_rate_at

LAPTOP = Speed(flops=1e11)
BOOK = Facts(1_000_000, 110_000, 65, 1.0, 1.0, Curve(500_000, 2.56, 0.44))
TEXTS = {
    "three lines": Facts(90, 11, 25, 1.0, 1.0, None),
    "book": BOOK,
    "30 MB": Facts(9_000_000, 1_000_000, 4096, 3.3, 1.0, Curve(1e6, 2.1, 0.35)),
    "100 GB": Facts(25_000_000_000, 12_000_000, 50304, 4.4, 1.01, Curve(1e6, 2.4, 0.4)),
}


def chosen(budget: str, facts: Facts = BOOK, speed: Speed = LAPTOP, exportable: bool = False, **fixed: Any) -> Choice:
    return choose(parse_budget(budget), facts, speed, fixed, exportable)[0]


def configured(choice: Choice, budget: str, facts: Facts = BOOK, **fixed: Any) -> Config:
    given = with_settings(Config(), {**fixed, "vocab_size": facts.vocab_size})
    config = with_settings(given, settings_of(choice, parse_budget(budget), facts, fixed))
    config.validate()
    return config


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 64])
@pytest.mark.parametrize("text", TEXTS)
def test_every_choice_is_a_run_and_more_budget_never_chooses_less(text: str, processes: int) -> None:
    facts, before = dataclasses.replace(TEXTS[text], processes=processes), 0.0
    speed = Speed(1e11 if processes == 1 else 2e16, start=4.0)
    for budget in ("10s", "30s", "1min", "4min", "15min", "1h", "10h", "100h"):
        choice = chosen(budget, facts, speed)
        config = configured(choice, budget, facts)
        assert config.model == dataclasses.replace(choice.model, dropout=config.model.dropout)
        assert config.data.batch_size % processes == 0 and config.training.max_iters == choice.steps >= 1
        assert config.model.block_size <= facts.longest
        assert choice.is_cut or 0.7 < choice.seconds / parse_budget(budget).amount <= 1
        work = choice.params * choice.tokens
        assert work >= before, f"{budget}: {choice}"
        before = work
        assert choice.expected.low < choice.expected.bits < choice.expected.high


def test_a_budget_of_time_is_used_and_of_tokens_or_arithmetic_is_met() -> None:
    choice = chosen("2min")
    assert 105 < choice.seconds <= 120 and choice.steps * choice.step_seconds < choice.seconds - 4
    by_tokens = chosen("2Mtokens")
    assert 0.99 < by_tokens.tokens / 2e6 <= 1
    by_flops = chosen("1e13flops")
    assert 0.95 < by_flops.tokens * by_flops.arithmetic / 1e13 <= 1
    assert chosen("2Mtokens", speed=Speed(1e9)) == dataclasses.replace(
        by_tokens, step_seconds=chosen("2Mtokens", speed=Speed(1e9)).step_seconds,
        seconds=chosen("2Mtokens", speed=Speed(1e9)).seconds,
    )  # fmt: skip


def test_settings_by_hand_are_kept() -> None:
    fixed: Any = {"n_layer": 3, "n_embd": 96, "block_size": 48, "batch_size": 5, "learning_rate": 0.123, "dropout": 0.3}
    config = configured(chosen("1min", **fixed), "1min", **fixed)
    values = flatten(config)
    assert {name: values[name] for name in fixed} == fixed and config.training.max_iters > 100
    shape = {"n_layer": 3, "n_embd": 96, "block_size": 48, "max_ngram": 0}
    assert len(choose(parse_budget("1min"), BOOK, LAPTOP, shape)) == 1
    short = chosen("1min", max_iters=200)
    assert short.steps == 200 and short.is_cut and short.seconds < 60


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("given", [{}, {"batch_size": 6}])
def test_accumulated_gradients_train_no_more_than_the_budget(given: dict[str, Any], processes: int) -> None:
    facts = dataclasses.replace(BOOK, processes=processes)
    fixed: Any = {**given, "gradient_accumulation_steps": 3, "n_layer": 2, "n_embd": 128, "block_size": 64}
    choice = chosen("2Mtokens", facts, **fixed)
    config = configured(choice, "2Mtokens", facts, **fixed)
    batch_size, accumulation = config.data.batch_size, config.training.gradient_accumulation_steps
    assert accumulation == 3 and batch_size % processes == 0 and batch_size == given.get("batch_size", batch_size)
    trained = config.training.max_iters * batch_size * accumulation * config.model.block_size
    assert trained == choice.tokens and 0.98 * 2e6 < trained <= 2e6


def test_a_width_that_heads_cannot_share_evenly() -> None:
    assert chosen("1min", n_embd=65, n_head=5, pos_embedding="learned").model.n_head == 5
    assert chosen("1min", n_embd=65, pos_embedding="learned").model.n_head == 1
    cases: list[dict[str, Any]] = [{}, {"n_head": 5}]
    for heads in cases:
        with pytest.raises(UserError, match="no model with these settings: rope needs an even head width, got .* = "):
            chosen("1min", n_embd=65, **heads)


def test_an_exportable_choice_is_one_of_transformers_models() -> None:
    assert configured(chosen("10s"), "10s").model.max_ngram
    config = configured(chosen("10s", exportable=True), "10s")
    assert not config.model.max_ngram
    config.model.vocab_size = 65
    family_of(config.model)  # raises UserError if transformers has no such model


def test_a_script_of_two_bytes_halves_the_bits_per_byte() -> None:
    cyrillic = dataclasses.replace(BOOK, bytes_per_character=2.0)
    one, two = chosen("1Mtokens").expected, chosen("1Mtokens", cyrillic).expected
    assert two == pytest.approx(tuple(bits / 2 for bits in one))


def test_a_run_that_cannot_fit_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="--budget=10s") as found:
        chosen("10s", n_layer=100, n_embd=4096)
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="no run fits"):
        chosen("10s", max_iters=10_000_000)


def test_a_short_text_ends_the_run_before_the_budget() -> None:
    choice = chosen("100h", TEXTS["three lines"])
    assert choice.is_cut and choice.seconds < 3600


def test_memory_limits_the_size() -> None:
    free = chosen("100h", TEXTS["100 GB"], Speed(1e15))
    tight = chosen("100h", dataclasses.replace(TEXTS["100 GB"], memory=1 << 30), Speed(1e15))
    assert 16 * tight.params < 1 << 30 < 16 * free.params


def test_large_runs_have_large_batches_shared_by_all_processes() -> None:
    assert sequences(4e6, 256, 1) == 8 and sequences(1e5, 64, 1) == 8
    assert sequences(1e10, 1024, 64) % 64 == 0 and sequences(1e10, 1024, 64) * 1024 > 50_000
    assert sequences(1e5, 1024, 64) == 64
    assert sequences(4e6, 256, 1, ngrams=True) == 16  # n-grams need larger ones


def test_a_short_run_evaluates_at_its_end_alone_also_if_it_becomes_longer() -> None:
    training = configured(chosen("1min"), "1min").training
    assert training.eval_interval == 2 * training.max_iters


def test_a_measurement_corrects_the_speed() -> None:
    choice = chosen("1min", exportable=True)
    speed = LAPTOP.corrected(choice, 3 * choice.step_seconds)
    with_ngrams, slower = chosen("1min", max_ngram=6), chosen("1min", speed=speed, max_ngram=6)
    assert slower.step_seconds / slower.batch > 2 * with_ngrams.step_seconds / with_ngrams.batch  # not yet measured
    assert speed.seconds(choice.model, choice.arithmetic, choice.batch * choice.model.block_size) == pytest.approx(
        3 * choice.step_seconds
    )


def test_the_learning_rate_falls_to_zero_at_the_last_step() -> None:
    config = configured(chosen("1min"), "1min")
    last, peak = config.training.max_iters, config.optimizer.learning_rate
    assert learning_rate_at(0, peak, config.scheduler, last) == peak
    assert 0 < learning_rate_at(last - 1, peak, config.scheduler, last) < 2 * peak / last
