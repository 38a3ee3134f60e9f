"""generation/sampling.py: values worked by hand, and the guarantees of the random streams."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation import sampling
from llm_from_scratch.generation.nanogpt_sampler import NanoGPTSampler, random_stream
from llm_from_scratch.generation.row_sampler import Sampler

INF = math.inf
CPU = torch.device("cpu")


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor([probs]).log()


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = torch.tensor([[3.0, -2.0, 3.0, -2.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert sampling.repetition_penalty(logits, seen, 2.0).tolist() == [[1.5, -4.0, 3.0, -2.0, 0.0]]
    assert sampling.repetition_penalty(logits, seen, 0.5).tolist() == [[6.0, -1.0, 3.0, -2.0, 0.0]]


def test_extreme_repetition_penalties_stay_finite():
    logits = torch.tensor([[300.0, -300.0]])
    seen = torch.ones(1, 2, dtype=torch.bool)
    for penalty in (1e-38, 1e38):
        params = GenerationConfig(repetition_penalty=penalty, temperature=2e-5)
        penalised = sampling.repetition_penalty(logits, seen, penalty)
        probs = sampling.keep_likely(penalised, params).softmax(-1)
        assert probs.isfinite().all() and probs.sum() == 1


def test_presence_counts_once_and_frequency_every_time():
    logits, counts = torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    assert sampling.presence_frequency_penalty(logits, counts, 0.5, 0.25).tolist() == [[0.0, -0.75, -1.0, -1.75]]
    assert sampling.presence_frequency_penalty(logits, counts, -1.0, 0.0).tolist() == [[0.0, 1.0, 1.0, 1.0]]


def test_temperature_divides():
    assert sampling.temperature(torch.tensor([[1.0, -2.0]]), 0.5).tolist() == [[2.0, -4.0]]


def test_top_k_keeps_exactly_k_and_nanogpts_keeps_ties():
    logits = torch.tensor([[1.0, 4.0, 2.0, 4.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert kept(sampling.top_k(logits[:1], 3)) == [[1, 3, 4]]
    assert [len(row) for row in kept(sampling.top_k(logits, 1))] == [1, 1]
    assert kept(sampling.top_k(logits, 1, keep_ties=True)) == [[1, 3], [0, 1, 2, 3, 4]]
    assert sampling.top_k(logits, 2)[0][1] == 4.0  # what is kept is unchanged
    for all_of_them in (None, 0, 5, 99):
        assert torch.equal(sampling.top_k(logits, all_of_them), logits)


@pytest.mark.parametrize("among", [None, 3])
def test_top_p_keeps_the_smallest_set_that_reaches_p(among):
    logits = logits_of(0.1, 0.5, 0.3, 0.1 / 3, 0.2 / 3) if among is None else logits_of(0.125, 0.5, 0.375, 0.0, 0.0)
    assert kept(sampling.top_p(logits, 0.4, among)) == [[1]]
    assert kept(sampling.top_p(logits, 0.6, among)) == [[1, 2]]
    assert kept(sampling.top_p(logits, 0.89, among)) == [[0, 1, 2]]
    assert kept(sampling.top_p(logits, 1e-9, among)) == [[1]]
    assert torch.equal(sampling.top_p(logits, 1.0, among), logits)


def test_top_p_stops_at_a_set_that_reaches_p_exactly():
    # probabilities that floating point holds exactly
    assert kept(sampling.top_p(logits_of(0.25, 0.5, 0.125, 0.125), 0.5)) == [[1]]
    assert kept(sampling.top_p(logits_of(0.25, 0.5, 0.125, 0.125), 0.75)) == [[0, 1]]


def test_min_p_compares_with_the_most_likely_token():
    logits = logits_of(0.5, 0.3, 0.15, 0.05)
    assert kept(sampling.min_p(logits, 0.2)) == [[0, 1, 2]]
    assert kept(sampling.min_p(logits, 0.5)) == [[0, 1]]
    assert kept(sampling.min_p(logits, 1.0)) == [[0]]
    assert torch.equal(sampling.min_p(logits, 0.0), logits)


def test_the_filters_apply_in_the_documented_order():
    # top-k first: of 0.4, 0.3 (rescaled 4/7, 3/7) the nucleus of 0.5 is the first alone; of all five it is two tokens
    logits = logits_of(0.4, 0.3, 0.15, 0.1, 0.05)
    both = GenerationConfig(temperature=1.0, top_k=2, top_p=0.5)
    assert kept(sampling.keep_likely(logits, both)) == [[0]]
    assert kept(sampling.keep_likely(logits, GenerationConfig(temperature=1.0, top_k=None, top_p=0.5))) == [[0, 1]]
    # temperature before min-p: at 0.5 the ratio 0.75 becomes 0.5625
    assert kept(sampling.keep_likely(logits, GenerationConfig(temperature=0.5, top_k=None, min_p=0.6))) == [[0]]
    assert kept(sampling.keep_likely(logits, GenerationConfig(temperature=1.0, top_k=None, min_p=0.6))) == [[0, 1]]


def test_draw_is_the_inverse_of_the_cumulated_probabilities():
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert sampling.draw(probs, numbers).tolist() == [0, 0, 2, 2, 3, 3]
    assert sampling.draw(probs[:1], torch.tensor([1.0])).tolist() == [3]  # float32, as on MPS


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.6, 0.3, 0.1])
    ids = sampling.draw(probs.expand(20000, -1), torch.rand(20000, dtype=torch.float64).sort().values)
    shares = torch.bincount(ids, minlength=3) / 20000
    assert torch.allclose(shares, probs, atol=0.02)


def test_greedy_takes_the_first_of_equals():
    params = GenerationConfig(temperature=0.0)
    sampler = Sampler(params, [[0], [0]], [1, 2], 4, CPU)
    assert sampler.draw(torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 3.0]])).tolist() == [1, 0]


def run(sampler: Sampler, logits: torch.Tensor, steps: int) -> list[list[int]]:
    return torch.stack([sampler.draw(logits) for _ in range(steps)], dim=1).tolist()


def test_a_row_draws_the_same_alone_and_in_any_batch(monkeypatch):
    params = GenerationConfig(temperature=1.0, top_k=None)
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = run(Sampler(params, [[0]] * 3, [7, 8, 7], 50, CPU), logits, 600)
    alone = run(Sampler(params, [[0]], [8], 50, CPU), logits[1:2], 600)
    assert together[1] == alone[0]
    assert together[0] != together[1] and len(set(together[0])) > 20
    monkeypatch.setattr(Sampler, "CHUNK", 7)
    assert run(Sampler(params, [[0]] * 3, [7, 8, 7], 50, CPU), logits, 600) == together


def test_select_carries_streams_and_counts_along():
    params = GenerationConfig(temperature=1.0, top_k=None, frequency_penalty=1.5, repetition_penalty=1.3)
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    whole = run(Sampler(params, [[0], [1, 2], [3]], [7, 8, 9], 12, CPU), logits, 300)
    sampler = Sampler(params, [[0], [1, 2], [3]], [7, 8, 9], 12, CPU)
    first = run(sampler, logits, 100)
    rest = run(sampler.select(torch.tensor([2, 1])), logits[[2, 1]], 200)
    assert first[2] + rest[0] == whole[2] and first[1] + rest[1] == whole[1]


def test_which_penalties_count_the_prompt():
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    # repetition: token 0 stands in the prompt, so 1 / 2 < 0.9
    params = GenerationConfig(temperature=0.0, repetition_penalty=2.0)
    assert Sampler(params, [[0]], [0], 3, CPU).draw(logits).item() == 1
    # and what was generated counts as well: 1, 0.9, then 1 / 2 against 0.9 / 2
    sampler = Sampler(GenerationConfig(temperature=0.0, repetition_penalty=2.0), [[2]], [0], 3, CPU)
    assert run(sampler, logits, 4) == [[0, 1, 0, 0]]
    # presence: only what was generated counts, so token 0 is drawn once and then avoided
    sampler = Sampler(GenerationConfig(temperature=0.0, presence_penalty=0.5), [[0]], [0], 3, CPU)
    assert run(sampler, logits, 4) == [[0, 1, 0, 0]]
    # frequency grows: 1.0, 0.9, then 0.6 against 0.5 ...
    sampler = Sampler(GenerationConfig(temperature=0.0, frequency_penalty=0.4), [[0]], [0], 3, CPU)
    assert run(sampler, logits, 5) == [[0, 1, 0, 1, 0]]


def test_only_nanogpts_sampler_draws_from_ties():
    params, level = GenerationConfig(num_samples=1, max_new_tokens=99, temperature=1.0, top_k=1), torch.ones(1, 4)
    assert len(set(run(Sampler(params, [[0]], [1], 4, CPU), level, 99)[0])) == 1
    nanogpts = NanoGPTSampler(params, random_stream(1, CPU, None), vocab_size=4, model_rows=6)
    assert set(run(nanogpts, level, 99)[0]) == {0, 1, 2, 3}


def test_bfloat16_logits_are_drawn_in_float32():
    logits = torch.randn(2, 300).bfloat16()
    params = GenerationConfig(temperature=0.7, top_k=5, top_p=0.9)
    a, b = (Sampler(params, [[0]] * 2, [1, 2], 300, CPU) for _ in range(2))
    assert run(a, logits, 50) == run(b, logits.float(), 50)


def test_a_logit_bias_is_added_before_all_else():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    # 1 + 3 is the largest; then the repetition penalty divides what the prompt holds: 4 / 2.5 against 2
    params = GenerationConfig(temperature=0.0, logit_bias={1: 3.0})
    assert Sampler(params, [[0]], [0], 3, CPU).draw(logits).item() == 1
    penalised = GenerationConfig(temperature=0.0, logit_bias={1: 3.0}, repetition_penalty=2.5)
    assert Sampler(penalised, [[1]], [0], 3, CPU).draw(logits).item() == 0
    with pytest.raises(UserError, match="token 3"):
        Sampler(GenerationConfig(logit_bias={3: 1.0}), [[0]], [0], 3, CPU)


KINDS = [
    GenerationConfig(temperature=0.0),
    GenerationConfig(temperature=0.7, top_k=None),
    GenerationConfig(temperature=1.3, top_k=5),
    GenerationConfig(temperature=1.0, top_k=40, top_p=0.8),
    GenerationConfig(temperature=1.0, top_k=0, top_p=0.3, min_p=0.1),
    GenerationConfig(temperature=0.9, top_k=3, repetition_penalty=1.4),
    GenerationConfig(temperature=1.0, top_k=None, presence_penalty=1.0, frequency_penalty=0.5),
    GenerationConfig(temperature=1.0, top_k=None, logit_bias={7: 4.0, 8: -50.0}),
]


def test_rows_of_every_kind_draw_the_same_as_alone():
    prompts, seeds = [[k, k + 1] for k in range(8)], list(range(20, 28))
    logits = 2 * torch.randn(8, 60, generator=torch.Generator().manual_seed(0))
    alone = [run(Sampler(p, [prompts[k]], [seeds[k]], 60, CPU), logits[k, None], 300)[0] for k, p in enumerate(KINDS)]
    together = run(Sampler(KINDS, prompts, seeds, 60, CPU), logits, 300)
    assert together == alone and len({tuple(row) for row in alone}) == 8


def test_rows_join_and_leave_with_their_streams_and_counts():
    prompts, seeds = [[k, k + 1] for k in range(8)], list(range(20, 28))
    logits = 2 * torch.randn(8, 60, generator=torch.Generator().manual_seed(0))
    alone = [run(Sampler(p, [prompts[k]], [seeds[k]], 60, CPU), logits[k, None], 400)[0] for k, p in enumerate(KINDS)]

    def some(rows: list[int]) -> Sampler:
        return Sampler([KINDS[k] for k in rows], [prompts[k] for k in rows], [seeds[k] for k in rows], 60, CPU)

    sampler, rows = some([3, 1]), [3, 1]
    drawn: dict[int, list[int]] = {k: [] for k in range(8)}
    for coming, going, steps in (((), (), 100), ((6, 0, 5), (), 30), ((), (1,), 57), ((7, 2, 4), (3,), 200)):
        if coming:
            sampler, rows = sampler.join(some(list(coming))), [*rows, *coming]
        stay = [i for i, k in enumerate(rows) if k not in going]
        sampler, rows = sampler.select(torch.tensor(stay)), [rows[i] for i in stay]
        for row, tokens in zip(rows, run(sampler, logits[rows], steps), strict=True):
            drawn[row] += tokens
    assert all(alone[k][: len(drawn[k])] == drawn[k] for k in range(8))
    assert {k: len(tokens) for k, tokens in drawn.items()} == {
        0: 287, 1: 130, 2: 200, 3: 187, 4: 200, 5: 287, 6: 287, 7: 200
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS[2:4])
def test_drawing_among_the_candidates_alone_is_the_same(kind):
    """A large vocabulary of which top_k leaves few: sorting and adding up those gives the same tokens."""
    logits = 2 * torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    fast = run(Sampler(kind, [[0]] * 3, [1, 2, 3], 4000, CPU), logits, 300)
    sampler = Sampler(kind, [[0]] * 3, [1, 2, 3], 4000, CPU)
    probs = sampling.keep_likely(logits, kind).softmax(-1)
    assert fast == torch.stack([sampler.pick(probs) for _ in range(300)], dim=1).tolist()
    assert len(set(fast[0])) > 3


def test_log_probabilities_by_hand():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    own, top, ids = sampling.log_probabilities(logits, torch.tensor([1]), 2)
    assert own.exp().tolist() == pytest.approx([0.25])
    assert ids.tolist() == [[2, 1]] and top.exp().tolist()[0] == pytest.approx([0.625, 0.25])
    assert sampling.log_probabilities(logits, torch.tensor([1]), 9)[1].shape == (1, 3)


def test_a_new_filter_is_a_line_of_the_table_and_a_setting(monkeypatch):
    """Rows that differ in the new setting alone are filtered apart."""

    @dataclasses.dataclass
    class Settings(GenerationConfig):
        only_below: int = 100

    def only_below(logits, params):
        return logits.masked_fill(torch.arange(logits.size(-1)) >= params.only_below, -torch.inf)

    monkeypatch.setitem(sampling.FILTERS, "only_below", only_below)
    params = [Settings(temperature=9.0, only_below=n) for n in (1, 3, 1, 3)]
    sampler = Sampler(params, [[]] * 4, range(4), 8, CPU)
    drawn = torch.stack([sampler.draw(torch.zeros(4, 8)) for _ in range(60)])
    assert drawn.amax(0).tolist() == [0, 2, 0, 2]
