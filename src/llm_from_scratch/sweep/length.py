"""How many updates of a run fit into a budget. `python -m llm_from_scratch.sweep.length BUDGET PRESET --NAME=VALUE ...`
prints the number. For a time, it first measures the speed of the run for a few seconds."""

from __future__ import annotations

import dataclasses
import sys

from ..config import Config
from ..errors import UserError
from ..machine.budget import Budget, parse_budget
from ..presets import parse

UPDATES = 1000  # of the run that is estimated, with an evaluation every tenth


def updates_for_tokens(config: Config, tokens: float) -> int:
    """At least one."""
    per_update = config.data.batch_size * config.training.gradient_accumulation_steps * config.model.block_size
    return max(1, round(tokens / per_update))


def updates_for(config: Config, budget: Budget) -> int:
    """The updates of a run that uses the budget. For a time: with its start, ten evaluations, and its end."""
    if budget.unit == "tokens":
        return updates_for_tokens(config, budget.amount)
    from ..training.forecast import forecast
    from ..training.setup import make_plan

    training = dataclasses.replace(
        config.training, max_iters=UPDATES, eval_interval=UPDATES // 10, epochs=None, init_from="scratch"
    )
    plan = make_plan(dataclasses.replace(config, training=training))
    if budget.unit == "flops":
        return updates_for_tokens(plan.config, budget.amount / plan.sizes.flops_per_token)
    found = forecast(plan)
    left = budget.amount - (found.total - found.seconds["steps"])
    if left < found.step:
        raise UserError(f"a run needs {budget.amount - left + found.step:.0f} s or more with these settings")
    return int(left / found.step)


if __name__ == "__main__":
    try:
        print(updates_for(parse(Config, sys.argv[2:], prog="llm-sweep").tree, parse_budget(sys.argv[1])))
    except UserError as error:
        sys.exit(f"error: {error}")
