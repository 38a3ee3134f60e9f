"""The search space of a sweep: ranges and lists of settings, parsed from text such as
"learning_rate=log(1e-4,1e-1) n_layer=2,4,6 dropout=0..0.3"."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..errors import UserError
from ..presets import build
from ..setting_text import union_members
from ..settings import did_you_mean, flatten, leaf_types

# Settings that the sweep sets itself
OWN = ("out_dir", "init_from", "eval_only", "progress")
FORMS = "expected LOW..HIGH, LOW..HIGH/STEP, log(LOW,HIGH) or A,B,C"


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, which are included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def suggest(self, trial: Any, name: str) -> str:
        """The value that a trial of optuna chooses, as text. A fraction is rounded to four digits."""
        if isinstance(self.low, int):
            return str(trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log))
        value = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        return repr(min(max(float(f"{value:.4g}"), self.low), self.high))

    def ends(self) -> tuple[str, ...]:
        return str(self.low), str(self.high)

    def __str__(self) -> str:
        if self.log:
            return f"log({self.low},{self.high})"
        return f"{self.low}..{self.high}" + (f"/{self.step}" if self.step else "")


@dataclass(frozen=True)
class Choices:
    """A list of values as texts."""

    values: tuple[str, ...]

    def suggest(self, trial: Any, name: str) -> str:
        return trial.suggest_categorical(name, self.values)

    def ends(self) -> tuple[str, ...]:
        return self.values

    def __str__(self) -> str:
        return ",".join(self.values)


Space = dict[str, Range | Choices]


def parse_space(texts: Iterable[str]) -> Space:
    """The space that texts describe. A text may have several settings: "NAME=SPEC NAME=SPEC". Raises UserError."""
    types, space = leaf_types(Config), Space()
    for item in filter(None, re.split(r"\s+(?=[\w.-]+=)", " ".join(texts).strip())):
        name, equals, spec = item.partition("=")
        name = name.strip().lstrip("-").replace("-", "_").rpartition(".")[2]
        if not equals or not spec.strip():
            raise UserError(f"--over has {item!r}: expected NAME=VALUES, such as learning_rate=log(1e-4,1e-2)")
        if name in OWN:
            raise UserError(f"{name} is set by the sweep itself: remove it from --over")
        if name not in types:
            raise UserError(f"--over has an unknown setting {name}; {did_you_mean(name, types, 'see --help-all')}")
        if name in space:
            raise UserError(f"--over has {name} twice: give one range")
        space[name] = _parse_spec(name, spec.strip(), set(union_members(types[name])))
    if not space:
        raise UserError("nothing to sweep over: give ranges, such as --over='learning_rate=log(1e-4,1e-2) n_layer=2,4'")
    return space


def _parse_spec(name: str, spec: str, kinds: set[Any]) -> Range | Choices:
    logarithmic = re.fullmatch(r"log\((.+?)(?:,|\.\.)(.+)\)", spec)
    # a path may have two dots
    linear = re.fullmatch(r"(.+?)\.\.(.+?)(?:/(.+))?", spec) if kinds & {int, float} else None
    if not logarithmic and not linear:
        values = tuple(value.strip() for value in spec.split(","))
        if "(" in spec or not all(values):
            raise UserError(f"{spec} is not valid for {name}: {FORMS}")
        if len(set(values)) < len(values):
            raise UserError(f"{name}={spec} has a value twice")
        if len(values) == 1:
            raise UserError(f"{name}={spec} is one value: give it as --{name}={spec}, or a range: {FORMS}")
        return Choices(values)
    if not kinds & {int, float}:
        raise UserError(f"{name} cannot have a range, because it is not a number: give a list, {name}=A,B,C")
    is_whole = float not in kinds
    found = logarithmic or linear
    assert found is not None
    ends = [_number(name, text, is_whole) for text in found.groups() if text is not None]
    low, high = ends[:2]
    step = ends[2] if len(ends) > 2 else None
    if not low < high:
        raise UserError(f"{name}={spec}: the first number must be below the second")
    if logarithmic and low <= 0:
        raise UserError(f"{name}={spec}: a logarithmic range begins above 0")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{name}={spec}: the step must be above 0 and at most {high - low}")
    return Range(low, high, logarithmic is not None, step)


def _number(name: str, text: str, is_whole: bool) -> float:
    with contextlib.suppress(ValueError):
        number = float(text)
        if math.isfinite(number) and (not is_whole or number == int(number)):
            return int(number) if is_whole else number
    raise UserError(f"{name}: {text.strip()!r} is not a {'whole ' if is_whole else ''}number; {FORMS}")


def check_space(space: Space, config: Config) -> None:
    """Raises UserError if a value of the space has the wrong type or is out of range. Values that do not fit the other
    settings are left to the trial. config: the settings that the trials share."""
    shared = {name: value for name, value in flatten(config).items() if name in leaf_types(Config)}
    for column in itertools.zip_longest(*(part.ends() for part in space.values())):  # reading settings takes 40 ms
        chosen = {name: text for name, text in zip(space, column, strict=True) if text is not None}
        try:
            build(Config, {**shared, **chosen}).validate()
        except UserError as error:
            if re.match(rf"({'|'.join(chosen)})=.*(out of range|is not valid)", str(error)):
                raise UserError(f"--over: {error}") from None


def combinations(space: Space) -> list[dict[str, str]] | None:
    """Every combination if all are lists, in the order of the last one first; else None."""
    lists = [values.values for values in space.values() if isinstance(values, Choices)]
    if len(lists) < len(space):
        return None
    return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*lists)]


def words_of(settings: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]
