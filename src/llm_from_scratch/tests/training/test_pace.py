"""training/pace.py: a run ends on time, and its stored settings are an ordinary run."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.checkpoint.store import find_checkpoint, read_settings
from llm_from_scratch.cli.train import main
from llm_from_scratch.config import Config, SchedulerConfig
from llm_from_scratch.core.dataset import SampleOrder
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.budget import Deadline
from llm_from_scratch.training import pace as pacing
from llm_from_scratch.training.pace import Pace, ending_whole, with_last_step
from llm_from_scratch.training.scheduler import learning_rate_at
from llm_from_scratch.training.setup import make_plan
from llm_from_scratch.training.trainer import train

from ..tiny import arguments, tiny_config

pytestmark = pytest.mark.usefixtures("here")
ORDER = SampleOrder(1000, 32, "shuffled", seed=5)  # 30 windows


def rates(steps: list[int], last: int, **ends: Any) -> list[float]:
    config = SchedulerConfig(schedule="linear", warmup_iters=0, min_lr=0.0, **ends)
    return [learning_rate_at(step, 1.0, config, last) for step in steps]


def test_the_rate_bends_towards_the_new_end_by_hand() -> None:
    # to 100; at 50 it is 0.5, and from there it falls to 0 at 70
    assert rates([0, 25, 50, 60, 70, 71], 70, lr_ends={0: 100, 50: 70}) == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    # and again at 60 (0.25), to 110
    assert rates([60, 85, 110], 110, lr_ends={0: 100, 50: 70, 60: 110}) == pytest.approx([0.25, 0.125, 0])


def test_a_bend_changes_no_bit_of_the_steps_before() -> None:
    before = rates(list(range(50)), 97)
    assert rates(list(range(50)), 70, lr_ends={0: 97, 50: 70}) == before
    assert rates(list(range(50)), 97, lr_ends={0: 97}) == before


def test_a_longer_run_learns_until_its_new_end_by_hand() -> None:
    # at 50 it is 0.5, and from there it falls to 0 at 150 instead of 70
    longer = rates([25, 50, 75, 100, 150], 150, lr_ends={0: 100, 50: 70})
    assert longer == pytest.approx([0.75, 0.5, 0.375, 0.25, 0])
    assert rates([50, 100, 200], 200, lr_ends={0: 100}) == pytest.approx([0.75, 0.5, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine", "lr_ends": {0: 10}}, "needs --schedule=linear"),
        ({"schedule": "linear", "lr_ends": {-1: 10}}, "a step in lr_ends"),
        ({"schedule": "linear", "lr_ends": {5: 5}}, "lr_ends.5. - 5=0"),
    ],
)
def test_ends_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(scheduler=SchedulerConfig(**settings)).validate()


class Clock:
    """A clock that each update moves by `seconds`."""

    def __init__(self, seconds: float):
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        return self.now


class Log:
    """Stands in for RunLog: the remaining time is known exactly."""

    def __init__(self, clock: Clock, plan: Any):
        from llm_from_scratch.training.progress import Calendar

        self.clock, self.calendar, self.remaining, self.last = clock, Calendar.of(plan), self, plan.last_step
        self.said = list[str]()

    def seconds(self, step: int) -> float:
        return (self.calendar.last - step) * self.clock.seconds + 3.0

    def expect(self, last: int) -> None:
        import dataclasses

        self.calendar = dataclasses.replace(self.calendar, last=last)

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.mark.parametrize("speeds", [[1.0], [0.5], [3.0], [1.0, 2.5], [1.0, 0.4, 1.7]])
def test_a_run_ends_within_two_hundredths_of_the_time_at_any_speed(tiny_data: Path, speeds: list[float]) -> None:
    """The machine changes its speed in the first two thirds of the run."""
    plan = make_plan(tiny_config(tiny_data, max_iters=1000, schedule="linear"))
    clock = Clock(speeds[0])
    log, pace = Log(clock, plan), Pace(Deadline(1000.0 + pacing.EXIT), plan, clock)
    for step in range(10_000):
        plan = pace.replan(plan, step, log)  # type: ignore[arg-type]
        if step >= plan.last_step:
            break
        clock.seconds = speeds[min(len(speeds) - 1, int(clock.now / 660 * len(speeds)))]
        clock.now += clock.seconds
    assert 980 <= clock.now + 3.0 <= 1010
    assert plan.config.training.max_iters == step == plan.last_step
    ends = plan.config.scheduler.lr_ends
    assert not ends or list(ends.values())[-1] == step


def test_a_printed_length_is_corrected_with_the_expected_loss(tiny_data: Path) -> None:
    """1,000 updates of 1 s are planned; each takes 1.05 s, and later 1.2: changes add up to what is printed."""
    plan, clock = make_plan(tiny_config(tiny_data, max_iters=1000, schedule="linear")), Clock(1.05)
    log = Log(clock, plan)
    pace = Pace(Deadline(1003.0 + pacing.EXIT, expected=lambda steps: f"expected: {steps}"), plan, clock)
    for step in range(1001):
        plan = pace.replan(plan, step, log)  # type: ignore[arg-type]
        clock.seconds = 1.05 if step < 400 else 1.2
        clock.now += clock.seconds
    # at the first look 1000 / 1.05 = 952 are not printed; at the first one with 1.2 s, 400 + (1000 - 420) / 1.2
    assert log.said == ["pace: 883 steps fit into the budget instead of 1,000; expected: 883"]


def test_a_run_of_limited_length_is_only_shortened(tiny_data: Path) -> None:
    """1,000 updates are planned for 1,000 s, with 3 s for the end."""
    for seconds, least, most in ((0.1, 1000, 1000), (2.0, 480, 500)):
        plan, clock = make_plan(tiny_config(tiny_data, max_iters=1000, schedule="linear")), Clock(seconds)
        log = Log(clock, plan)
        pace = Pace(Deadline(1000.0 + pacing.EXIT, may_extend=False), plan, clock)
        for step in range(1001):
            plan = pace.replan(plan, step, log)  # type: ignore[arg-type]
            if step >= plan.last_step:
                break
            clock.now += clock.seconds
        assert least <= step <= most
        assert bool(plan.config.scheduler.lr_ends) == (step < 1000)


def test_a_rollback_forgets_later_bends(tiny_data: Path) -> None:
    plan = make_plan(tiny_config(tiny_data, max_iters=100, schedule="linear"))
    plan = with_last_step(with_last_step(plan, 20, 80), 60, 90)
    assert plan.config.scheduler.lr_ends == {0: 100, 20: 80, 60: 90}
    assert with_last_step(plan, 40, 70).config.scheduler.lr_ends == {0: 100, 20: 80, 40: 70}


class Jumping:
    """In place of Pace: at these steps there is time for as many updates. stop: the step at which the process dies."""

    def __init__(self, limits: dict[int, int], stop: int | None = None):
        self.limits, self.stop = limits, stop

    def replan(self, plan: Any, step: int, log: Any) -> Any:
        if step == self.stop:
            raise KeyboardInterrupt
        if step in self.limits and step not in plan.config.scheduler.lr_ends:
            log.expect(self.limits[step])
            return with_last_step(plan, step, self.limits[step])
        return plan


def paced(data: Path, out_dir: str, pace: Jumping, **settings: Any) -> int:
    """Trains with this pace. Returns the last step."""
    config = tiny_config(
        data, out_dir=out_dir, max_iters=40, schedule="linear", eval_interval=16, dropout=0.1, **settings
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_from_scratch.training.opening.Pace", lambda deadline, plan: pace)
        return train(config, quiet=True, deadline=Deadline(0.0)).step


def test_the_stored_settings_train_the_same_model_without_a_clock(tiny_data: Path) -> None:
    assert paced(tiny_data, "paced", Jumping({10: 24, 20: 36})) == 36
    stored = read_settings(find_checkpoint("paced", "last"))
    assert stored["scheduler"]["lr_ends"] == {"0": 40, "10": 24, "20": 36} and stored["training"]["max_iters"] == 36
    leaves = {name: value for section in stored.values() for name, value in section.items()} | {"out_dir": "plain"}
    leaves["lr_ends"] = {int(step): end for step, end in leaves["lr_ends"].items()}
    leaves = {name: tuple(value) if isinstance(value, list) else value for name, value in leaves.items()}
    del leaves["dataset"]
    assert train(tiny_config(tiny_data, **leaves), quiet=True).step == 36
    assert_same("paced", "plain")


def test_a_cut_run_resumes_with_the_steps_that_were_planned_last(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of step 16 knows that 24 steps are left, and the resumed run does not look at the clock."""
    assert paced(tiny_data, "whole", Jumping({10: 24})) == 24
    with pytest.raises(KeyboardInterrupt):
        paced(tiny_data, "cut", Jumping({10: 24}, stop=18))
    assert main(["--init_from=resume", "--out_dir=cut", f"--dataset={tiny_data}"]) == 0
    assert "changed since the checkpoint" not in capsys.readouterr().out
    assert_same("whole", "cut")


def assert_same(one: str, other: str) -> None:
    first, second = (load(folder, "last", need_tokenizer=False) for folder in (one, other))
    assert first.step == second.step and first.model.keys() == second.model.keys()
    assert all(torch.equal(first.model[name], second.model[name]) for name in first.model)


# --- the command ---


def printed_config(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    import yaml

    capsys.readouterr()
    assert main([*words, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.slow
def test_print_config_shows_an_ordinary_run_with_the_same_result(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A budget of tokens does not depend on the clock."""
    words = [f"--dataset={tiny_data}", "--budget=1.5ktokens", "--device=cpu", "--dtype=float32", "--n_embd=16",
             "--n_layer=1", "--n_head=2", "--batch_size=4", "--block_size=16",
             "--loss_plot=False", "--tensorboard=False"]  # fmt: skip
    shown = printed_config(capsys, *words, "--out_dir=plain")
    assert shown["training"]["max_iters"] == 1500 // 64 and shown["model"]["n_embd"] == 16
    Path("plain.yaml").write_text(json.dumps(shown))
    assert main(["plain.yaml"]) == 0
    assert main([*words, "--out_dir=dialed"]) == 0
    said = capsys.readouterr().err
    assert "expected: val loss" in said and "why: the lowest" in said
    assert_same("plain", "dialed")


def test_a_budget_of_time_ends_in_time(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The speed of this machine is not known, so only the choice is checked, in --dry_run."""
    assert main([f"--dataset={tiny_data}", "--budget=10s", "--dry_run", "--device=cpu", "--threads=1"]) == 0
    said = capsys.readouterr()
    assert "budget: 10s" in said.err and len(said.err.splitlines()) <= 6
    assert "tokens/s" in said.err and "nothing was trained" in said.out and not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget=soon"], "budget='soon'"),
        (["--budget"], "--budget needs a value"),
        (["--exportable=True"], "--exportable needs --budget"),
        (["--law=x.json"], "--law needs --budget"),
        (["--budget=1min", "--law=missing.json"], "missing.json"),
        (["--budget=1min", "--init_from=gpt2"], "init_from='gpt2'"),
        (["--budget=1min", "--dataset=nowhere"], "nowhere"),
        (["--budget=1min", "--n_layer=0"], "n_layer=0"),
    ],
)
def test_a_mistake_is_one_line(
    tiny_data: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    given = words if any("dataset" in word for word in words) else [f"--dataset={tiny_data}", *words]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1


def test_a_resumed_run_refuses_a_budget_and_auto_reports_the_kept_settings(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--dataset={tiny_data}", "--out_dir=run", "--progress=none"]
    assert main([*arguments(max_iters=4), *words]) == 0
    assert main([*words, "--init_from=resume", "--budget=1min"]) == 2
    assert "raise --max_iters" in capsys.readouterr().err
    assert main([*words, "--init_from=auto", "--budget=1min"]) == 0
    assert "when the run started" in capsys.readouterr().err


# --- epochs of a run that forgets n-grams ---


def numbers(order: SampleOrder, steps: int, batch: int) -> list[int]:
    """The numbers of the samples of a run, in its order: 30 in each epoch."""
    plain = replace(order, shifts=())
    known = {}
    for number in range(30 * 30):
        known[number // 30, int(plain.starts(number, 1)[0])] = number
    found = list[int]()
    for step in range(steps):
        first = order.first_sample(step, batch)
        for place, start in enumerate(order.starts(step, batch).tolist()):
            found.append(known[(first + place) // 30, start])
    return found


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize("end", [31, 45, 61, 75, 90, 100])
def test_the_last_epoch_is_whole_and_the_first_is_the_partial_one(end: int, batch: int) -> None:
    order = ending_whole(ORDER, {0: end}, batch)
    found = numbers(order, end, batch)
    assert found == list(range(found[0], found[0] + end * batch)) and 0 <= found[0] < 30
    assert (found[-1] + 1) % 30 == 0
    assert [step for step in range(end) if order.begins_epoch(step, batch)] == [
        step for step in range(1, end) if found[step * batch + batch - 1] // 30 > found[step * batch - 1] // 30
    ]


def test_a_run_of_less_than_an_epoch_is_the_begin_of_one() -> None:
    assert numbers(ending_whole(ORDER, {0: 20, 5: 29, 9: 25}, 1), 25, 1) == list(range(25))


@pytest.mark.parametrize(
    ("ends", "jumps"),
    [
        # planned: 15 + 2 x 30 samples; in the second epoch 9 fewer: 9 are left out
        ({0: 75, 20: 66}, {21: 9}),
        # 5 more: 5 are repeated
        ({0: 75, 20: 80}, {21: -5}),
        ({0: 75, 20: 80, 30: 75}, {21: -5, 31: 5}),
        # in the last epoch, nothing changes
        ({0: 75, 50: 70}, {}),
        ({0: 75, 50: 80}, {}),
        # early, the plan of a run of less than an epoch becomes longer than an epoch
        ({0: 20, 2: 45}, {3: 15}),
    ],
)
def test_a_change_of_the_length_moves_the_order_before_the_last_epoch(
    ends: dict[int, float], jumps: dict[int, int]
) -> None:
    found = numbers(ending_whole(ORDER, ends, 1), int(ends[max(ends)]), 1)
    steps = {step: after - before - 1 for step, (before, after) in enumerate(pairwise(found), 1) if after != before + 1}
    assert steps == jumps


def test_a_run_that_forgets_ngrams_ends_with_its_epoch(tiny_data: Path) -> None:
    """The machine becomes faster in the last epoch: the few steps of another one are left out."""
    config = tiny_config(
        tiny_data,
        max_iters=90,
        schedule="linear",
        max_ngram=3,
        forget_ngrams=True,
        batch_size=4,
        sample_order="shuffled",
        lr_ends={0: 90},
    )
    plan, clock = make_plan(config), Clock(1.0)
    size = plan.order.windows_per_epoch
    log, pace = Log(clock, plan), Pace(Deadline(93.0 + pacing.EXIT), plan, clock)
    for step in range(200):
        plan = pace.replan(plan, step, log)  # type: ignore[arg-type]
        if step >= plan.last_step:
            break
        clock.seconds = 1.0 if step < 60 else 0.93
        clock.now += clock.seconds
    assert plan.order.first_sample(step, 4) in range(2 * size - 3, 2 * size + 1)


def test_a_run_that_goes_on_after_its_last_epoch_resets_its_ngrams_there(tiny_data: Path) -> None:
    """A run of --budget, resumed with more steps: the order before does not change, and another epoch begins there."""
    settings = {
        "schedule": "linear",
        "max_ngram": 3,
        "forget_ngrams": True,
        "sample_order": "shuffled",
        "batch_size": 4,
    }
    short, long = (
        make_plan(tiny_config(tiny_data, max_iters=steps, lr_ends={0: 90}, **settings)).order for steps in (90, 150)
    )
    assert short == long and short.shifts
    assert [step for step in range(150) if long.begins_epoch(step, 4)][1] in (90, 91)


def test_a_paced_run_resumes_exactly_in_the_middle_of_its_epochs(tiny_data: Path) -> None:
    settings = {"max_ngram": 3, "ngram_rows": 99, "forget_ngrams": True, "sample_order": "shuffled", "batch_size": 8}
    stops = Jumping({10: 60, 20: 75}), Jumping({10: 60, 20: 75}, stop=40)
    assert paced(tiny_data, "whole", stops[0], **settings) == 75
    with pytest.raises(KeyboardInterrupt):
        paced(tiny_data, "parts", stops[1], **settings)
    assert main(["--init_from=resume", "--out_dir=parts", f"--dataset={tiny_data}"]) == 0
    assert_same("whole", "parts")
