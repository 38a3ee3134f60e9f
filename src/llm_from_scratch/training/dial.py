"""--budget: measures the speed of this machine, chooses the settings (choice.py) and explains the choice."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import Config, GPTConfig
from ..core.dataset import TokenData
from ..core.mixed import Mixture
from ..core.remote import RemoteFile
from ..machine import device as runtimes
from ..machine.budget import Budget, Deadline
from ..machine.device import Runtime
from ..machine.memory import free_memory
from ..machine.processes import sum_over_ranks
from ..settings import flatten
from .check import check
from .choice import LAUNCH, LAUNCH_ON_GPU, Choice, Facts, Speed, choose, expected_loss, settings_of
from .counts import counted
from .forecast import forecast, products_per_second
from .law import Law, Prediction
from .pace import EXIT
from .progress import in_words
from .setup import GPT2_IDS, GPT2_PADDED, make_plan

REHEARSAL_SHARE, LONGEST_REHEARSAL, MOST_REHEARSALS = 0.04, 3.0, 3  # of the budget; seconds; number
COMPILED_ON_GPU = 1200.0  # seconds: in shorter runs on a GPU, compiling takes longer than it saves
# How hard the text is: characters that are counted (about 1 us each), in a budget of time for each second and at most;
# and characters that they are asked for; in blocks of tokens from the whole text
COUNTED, COUNTED_PER_SECOND, MOST_COUNTED, ASKED, BLOCK = 1 << 20, 1 << 14, 1 << 22, 1 << 17, 1 << 11
SAMPLE = 1 << 15  # tokens that tell the length of a token


@dataclass(frozen=True)
class Dialed:
    """A run that was chosen."""

    config: Config
    lines: list[str]
    """The choice and its reasons."""
    deadline: Deadline | None
    """None: the length is fixed."""


def dial(
    config: Config, fixed: dict[str, Any], budget: Budget, began: float, exportable: bool = False,
    law: Law | None = None,
) -> Dialed:  # fmt: skip
    """Chooses the settings that the user did not give. fixed: the given ones. began: when the process started,
    on time.monotonic(). Takes some seconds if the budget is a time. Raises UserError."""
    runtime = runtimes.resolve(config.system)
    runtimes.start(runtime, config.system)
    is_timed = budget.unit == "seconds"
    most = min(MOST_COUNTED, int(COUNTED_PER_SECOND * budget.amount)) if is_timed else COUNTED
    is_counted = law is None or law.text is not None
    facts = facts_of(config, fixed, runtime, most if is_counted else 0)

    def agreed(value: float) -> float:
        """The first process's value: its clock counts."""
        return sum_over_ranks([value * runtime.is_master], runtime.device, runtime.world_size)[0]

    facts = dataclasses.replace(facts, memory=least_over_ranks(facts.memory, runtime))  # all choose the same model
    rate = products_per_second(device=runtime.device) * runtime.world_size
    spent = agreed(time.monotonic() - began)
    speed = Speed(agreed(rate), LAUNCH_ON_GPU if runtime.device.type == "cuda" else LAUNCH, spent + EXIT)
    measured = list[GPTConfig]()
    choices = choose(budget, facts, speed, fixed, exportable, law)
    is_open = is_timed and (len(choices) > 1 or not choices[0].is_cut)
    while is_open and len(measured) < MOST_REHEARSALS and choices[0].model not in measured:
        left = REHEARSAL_SHARE * budget.amount - (time.monotonic() - began - spent)
        if agreed(left) <= 0 and measured:
            break
        chosen = with_settings(config, settings_of(choices[0], budget, facts, fixed))
        chosen.system.compile = False  # compiling takes longer than the measurement
        found = forecast(make_plan(chosen), min(LONGEST_REHEARSAL, REHEARSAL_SHARE * budget.amount / MOST_REHEARSALS))
        speed = speed.corrected(choices[0], agreed(found.step * found.busy))
        speed = dataclasses.replace(speed, start=agreed(time.monotonic() - began) + EXIT)
        measured.append(choices[0].model)
        choices = choose(budget, facts, speed, fixed, exportable, law)
    choice = choices[0]
    chosen = with_settings(config, settings_of(choice, budget, facts, fixed))
    if runtime.device.type == "cuda" and budget.unit == "seconds" and budget.amount < COMPILED_ON_GPU:
        chosen.system.compile = fixed.get("compile", False)
    chosen.validate()
    deadline = None
    if budget.unit == "seconds" and fixed.get("max_iters") is None and fixed.get("epochs") is None:

        def expected(steps: int) -> str:
            tokens = steps * choice.batch * choice.model.block_size
            return in_line(expected_loss(choice.model, choice.params, tokens, facts, law), facts)

        deadline = Deadline(began + budget.amount, not choice.is_cut, expected)
    took = time.monotonic() - began - spent
    return Dialed(chosen, explain(choices, chosen, budget, facts, fixed, len(measured), took), deadline)


def least_over_ranks(memory: int | None, runtime: Runtime) -> int | None:
    """The smallest amount of all processes; None if it is unknown in one of them."""
    own = [float(memory or 0) if rank == runtime.rank else 0.0 for rank in range(runtime.world_size)]
    return int(min(sum_over_ranks(own, runtime.device, runtime.world_size))) or None


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """A copy of the configuration with these settings by leaf name."""
    config = copy.deepcopy(config)
    sections = {name: getattr(config, section.name) for section in dataclasses.fields(config)
                for name in flatten(getattr(config, section.name))}  # fmt: skip
    for name, value in settings.items():
        setattr(sections[name], name, value)
    return config


def facts_of(config: Config, fixed: dict[str, Any], runtime: Runtime, characters: int) -> Facts:
    """The facts behind the choice, apart from the speed. characters: of the training text that are counted."""
    smallest = {
        "block_size": 1,
        "batch_size": runtime.world_size,
        "gradient_accumulation_steps": 1,
        "micro_batch": None,
    }
    inputs = check(with_settings(config, {name: value for name, value in smallest.items() if name not in fixed}))
    sample, curve, blocks = "", None, sampled(inputs.train_data, SAMPLE)
    if inputs.tokenizer is not None:
        sample = inputs.tokenizer.decode(blocks)
        if characters and sample:
            tokens = [int(number * len(blocks) / len(sample)) for number in (characters, ASKED)]
            both = zip((inputs.train_data, inputs.val_data), tokens, strict=True)
            curve = counted(*(inputs.tokenizer.decode(sampled(data, number)) for data, number in both))
    size = inputs.vocab_size or GPT2_PADDED
    memory = free_memory(runtime.device)
    if memory is not None and runtime.device.type == "cpu":
        memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Facts(
        len(inputs.train_data), len(inputs.val_data), GPT2_PADDED if size == GPT2_IDS else size,
        len(sample) / len(blocks) if sample else 1.0, len(sample.encode()) / len(sample) if sample else 1.0,
        curve, runtime.world_size, memory, isinstance(inputs.train_data, Mixture),
    )  # fmt: skip


def sampled(data: TokenData, tokens: int) -> np.ndarray:
    """About as many tokens, in blocks from the whole split in a mixed order; of a remote one, from its first shard."""
    total = len(data.shards[0] if isinstance(data.shards[0], RemoteFile) else data)
    length = min(BLOCK, total)
    starts = np.linspace(0, total - length, max(1, min(tokens, total) // length)).astype(np.int64)
    return data.windows(np.random.default_rng(0).permutation(starts), length).ravel()


def explain(
    choices: list[Choice], config: Config, budget: Budget, facts: Facts, fixed: dict[str, Any], rehearsals: int,
    took: float,
) -> list[str]:  # fmt: skip
    """The lines that a run prints: what was chosen, why, and the expected loss."""
    choice, model, optimizer = choices[0], config.model, config.optimizer
    tables = f", n-grams up to {model.max_ngram}" if model.max_ngram else ""
    epochs, muon = choice.tokens / facts.train_tokens, "muon" in optimizer.optimizer_type
    rate = f"{choice.batch * model.block_size / choice.step_seconds:,.0f} tokens/s"
    speed = f"{rate}, measured in {took:.1f} s" if rehearsals else f"about {rate}"
    other = next((some for some in choices if some.model.n_embd != model.n_embd or
                  some.model.n_layer != model.n_layer), None)  # fmt: skip
    lines = [
        f"budget: {budget.text}; {speed}",
        f"model: {_layers(model)}, width {model.n_embd}, {model.n_head} heads, context {model.block_size}"
        f"{tables}; dropout {model.dropout:g}",
        f"training: {choice.steps:,} steps of {choice.batch * model.block_size:,} tokens, {epochs:.2f} epochs; "
        f"learning rate {optimizer.learning_rate:g}" + (f", muon {optimizer.muon_learning_rate:g}" if muon else ""),
        f"why: the lowest expected loss of {len(choices)} candidates"
        + (f"; second: {_layers(other.model)}, width {other.model.n_embd}, {other.expected.bits:.3f} bits per byte"
           if other is not None else ""),
        in_line(choice.expected, facts),
    ]  # fmt: skip
    is_short = budget.unit == "seconds" and choice.seconds < 0.95 * budget.amount
    if choice.is_cut and is_short and not {"max_iters", "epochs"} & fixed.keys():
        lines.append(
            f"note: the run takes about {in_words(choice.seconds)}, less than the budget: after {epochs:.0f} epochs "
            "the loss would not fall any more; use more text"
        )
    return lines


def in_line(expected: Prediction, facts: Facts) -> str:
    nats = [bits * math.log(2) * facts.bytes_per_character * facts.characters for bits in expected]
    return f"expected: val loss {nats[0]:.3f} ({nats[1]:.3f} to {nats[2]:.3f}), {expected.bits:.3f} bits per byte"


def _layers(model: GPTConfig) -> str:
    return f"{model.n_layer} layer{'s' * (model.n_layer > 1)}"
