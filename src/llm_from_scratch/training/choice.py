"""The choice of a run's settings from a budget, facts about the data and the speed of the machine.

Candidates are model shapes times contexts, with and without n-gram embeddings. For each, the speed gives the tokens
that fit into the budget, and the law (law.py) the loss after them. The one with the lowest expected loss is chosen.
Settings that the user gave are kept. The result is an ordinary run: only plain settings are stored.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..config import Config, GPTConfig
from ..core.sizes import sizes
from ..errors import UserError
from ..machine.budget import Budget
from ..settings import flatten
from .counts import Curve
from .law import NGRAMS, PLAIN, Law, Prediction
from .progress import FORWARD_SHARE, SAVE_AWAITED, SAVE_BESIDE

# (layers, width): each step about doubles the parameters. Narrow models have heads of 32 dimensions, others of 64.
SHAPES = (
    (1, 128), (2, 128), (4, 128), (4, 192), (6, 256), (6, 320), (8, 384), (8, 512), (12, 512), (12, 768),
    (16, 1024), (24, 1024), (24, 1536), (32, 2048), (40, 2560), (48, 4096),
)  # fmt: skip
CONTEXTS = (64, 128, 256, 512, 1024)
CONTEXT_BY_WIDTH = ((512, 512), (math.inf, 1024))  # longer ones are untested for narrow models
SHORT = 64  # context of the models that are counted
ENOUGH_FOR_NGRAMS = 300_000  # tokens of text; with 98,000, models without were better
FEW_IDS = 1024  # ids of a vocabulary for which n-gram embeddings were measured
MEMORY_SHARE = 0.7  # of the device's memory that a run may be planned to use
FINAL_SHARE = 0.05  # of the budget for the evaluation of the whole validation split; if it takes longer, it is left out
LEAST_SHARE = 0.1  # of the budget that is left for updates
EVAL_SHARE = 0.02  # of the budget for evaluations on the way
MOST_EPOCHS_OF_NGRAMS = 8  # with 9, the loss was higher
MOST_EPOCHS = 60  # passes over the text after which more training does not help
MOST_PARAMETERS = 10  # per token of the text; larger models memorize it
LEAST_FORGOTTEN = 0.5  # epochs above which n-grams may be forgotten: a faster machine may begin a second epoch
FEWEST_STEPS = 20
LAUNCH, LAUNCH_ON_GPU = 5e-3, 4e-4  # seconds per layer and update, measured on a CPU; a rehearsal corrects them
BATCH_TOKENS = {False: 2048, True: 4096}  # of a step in a run of 4 million tokens, without and with n-grams
ENOUGH_TOKENS = 4096  # of a forward pass; more are not faster on a CPU
DROPOUT_BY_EPOCHS = ((4, 0.0), (12, 0.1), (math.inf, 0.2))
WIDE = 256  # width above which heads have 64 dimensions and a warm-up is used


@dataclass(frozen=True)
class Facts:
    """The data of a run, and how many processes share it."""

    train_tokens: int
    val_tokens: int
    vocab_size: int
    characters: float = 1.0
    """Characters of a token, on average."""
    bytes_per_character: float = 1.0
    text: Curve | None = None
    """Difficulty of the text; None if unknown."""
    processes: int = 1
    memory: int | None = None
    """Bytes of the device of one process."""
    is_mixture: bool = False
    """Of datasets, whose epochs end at different steps."""

    def unit(self, law: Law | None) -> float:
        """Amount of text in a token, in the unit of a law: characters, or bytes if llm-scale fitted it."""
        return self.characters * (self.bytes_per_character if law is not None else 1.0)

    @property
    def longest(self) -> int:
        """The largest context that fits into both splits."""
        return min(self.train_tokens, self.val_tokens) - 1


@dataclass(frozen=True)
class Speed:
    """How long an update takes, in all processes together. Measured: see dial.py."""

    flops: float
    """FLOP/s of large matrix products."""
    launch: float = LAUNCH
    """Seconds per layer and step that do not depend on the tokens."""
    start: float = 4.0
    """Seconds from the start of the process to the first update, and from the last one to its end."""
    factors: tuple[tuple[bool, float], ...] = ()
    """(with n-grams, measured time / time of this model)."""

    def seconds(self, model: GPTConfig, arithmetic: float, tokens: int) -> float:
        """Seconds of an update on `tokens` tokens, with `arithmetic` FLOPs for each of them."""
        width, layers = model.n_embd, model.n_layer
        narrow = 1 + 128 / width  # norms, activations and attention take their share of a narrow layer's time
        ngrams = 1.3 if model.max_ngram else 1.0
        muon = 240 * width**3 * layers  # the products of its iteration
        time = (tokens * arithmetic * narrow * ngrams + muon) / self.flops + layers * self.launch
        return time * dict(self.factors).get(bool(model.max_ngram), 1.0)

    def corrected(self, choice: Choice, measured: float) -> Speed:
        """With the measured seconds of this choice's update."""
        ngrams = bool(choice.model.max_ngram)
        factors = dict(self.factors)
        factors[ngrams] = factors.get(ngrams, 1.0) * measured / choice.step_seconds
        factors.setdefault(not ngrams, factors[ngrams])  # the other kind is not measured yet
        return dataclasses.replace(self, factors=tuple(sorted(factors.items())))


@dataclass(frozen=True)
class Choice:
    """A candidate: settings, and what is expected of them."""

    settings: dict[str, Any]
    """By leaf name, except the user's."""
    model: GPTConfig
    params: int
    """All parameters that are multiplied."""
    arithmetic: float
    """FLOPs per token."""
    steps: int
    batch: int
    """Sequences of an update."""
    step_seconds: float
    expected: Prediction
    """Bits per byte."""
    seconds: float
    """Seconds of the whole run."""
    is_cut: bool
    """Whether the run is shorter than the budget, because more passes over the text would not help."""

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.model.block_size


def choose(
    budget: Budget, facts: Facts, speed: Speed, fixed: dict[str, Any] | None = None, exportable: bool = False,
    law: Law | None = None,
) -> list[Choice]:  # fmt: skip
    """All candidates that fit, the one with the lowest expected loss first. fixed: the user's settings by leaf name.
    exportable: only models that transformers has. law: for all candidates; None: the laws of this project. Raises
    UserError if none fits."""
    fixed, base = fixed or {}, flatten(Config())
    shapes = [
        (settings, _model({**base, **settings, **fixed}, facts)) for settings in candidates(facts, fixed, exportable)
    ]
    if wrong := [model for _, model in shapes if isinstance(model, UserError)]:
        if len(wrong) == len(shapes):  # whatever the budget is
            raise UserError(f"--budget finds no model with these settings: {wrong[0]}")
    found: list[Choice] = []
    for fewest in (FEWEST_STEPS, 1):
        if not found:
            found = [choice for settings, model in shapes if isinstance(model, GPTConfig)
                     for choice in _filled(budget, facts, speed, settings, fixed, model, law, fewest)]  # fmt: skip
    if not found:
        raise UserError(
            f"no run fits into --budget={budget.text} with {facts.train_tokens:,} training tokens and these settings: "
            "give a larger budget, or leave out settings such as --max_iters, --n_layer and --batch_size"
        )
    if budget.unit == "tokens":
        return _by_balance(found, facts, law)
    return sorted(found, key=lambda choice: (choice.expected.bits, choice.params))


def candidates(facts: Facts, fixed: dict[str, Any], exportable: bool) -> Iterator[dict[str, Any]]:
    """The architecture of each candidate by leaf name, without the user's settings."""
    contexts = [size for size in CONTEXTS if size <= facts.longest] or [max(1, facts.longest)]
    kinds = [False]
    may_count = (
        facts.vocab_size <= FEW_IDS
        and facts.train_tokens >= ENOUGH_FOR_NGRAMS
        and "muon" in fixed.get("optimizer_type", "muon")
    )
    if may_count and not exportable and "max_ngram" not in fixed:
        kinds.append(True)
    if fixed.get("max_ngram"):
        kinds = [True]
    seen = set()
    for (layers, width), context, ngrams in itertools.product(SHAPES, contexts, kinds):
        width, context = fixed.get("n_embd", width), fixed.get("block_size", context)
        if context > next(most for limit, most in CONTEXT_BY_WIDTH if width <= limit) and "block_size" not in fixed:
            continue
        heads = max(1, width // (32 if width < WIDE else 64))
        while heads > 1 and (width % heads or (width // heads) % 2):  # a width that the user gave
            heads -= 1
        settings: dict[str, Any] = {
            "n_layer": layers, "n_embd": width, "n_head": heads, "block_size": context, "dropout": 0.0, "bias": False,
            "pos_embedding": "rope", "rope_theta": 1000.0 if context <= 256 else 10000.0, "qk_norm": True,
            "tie_embeddings": False, "zero_init": True,
        }  # fmt: skip
        if ngrams:
            settings |= {"activation": "relu2", "embedding_norm": True, "max_ngram": 6}
        else:
            settings |= {"norm": "rmsnorm", "activation": "swiglu"}
        settings = {name: value for name, value in settings.items() if name not in fixed}
        key = tuple(settings.items())
        if key not in seen:
            seen.add(key)
            yield settings


def _model(values: dict[str, Any], facts: Facts) -> GPTConfig | UserError:
    """The model of these settings, or why they do not fit together."""
    names = [item.name for item in dataclasses.fields(GPTConfig)]
    model = GPTConfig(**{name: values[name] for name in names})
    model.vocab_size = model.vocab_size or facts.vocab_size
    try:
        model.validate()
    except UserError as error:
        return error
    return model


def _counts(model: GPTConfig) -> tuple[float, float, float]:
    """(parameters, multiplied parameters, FLOPs per token)."""
    small = dataclasses.replace(model, n_layer=1, block_size=SHORT)
    (params, multiplied, flops), layer, attention = _small_counts(dataclasses.astuple(small))
    more = model.n_layer - 1
    positions = attention * (model.block_size / SHORT - 1) * model.n_layer
    return params + more * layer[0], multiplied + more * layer[1], flops + more * layer[2] + positions


@functools.lru_cache(maxsize=256)
def _small_counts(values: tuple[Any, ...]) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """The same for one layer and a short context, what another layer adds, and the FLOPs of attention per layer:
    counting every candidate would take seconds."""
    one = GPTConfig(*values)

    def count(model: GPTConfig) -> tuple[float, ...]:
        found = sizes(model, 1)
        return found.params, found.params - found.embedding_params, found.flops_per_token

    first, second = count(one), count(dataclasses.replace(one, n_layer=2))
    longer = count(dataclasses.replace(one, block_size=2 * one.block_size))
    return first, tuple(b - a for a, b in zip(first, second, strict=True)), longer[2] - first[2]


def _filled(
    budget: Budget, facts: Facts, speed: Speed, settings: dict[str, Any], fixed: dict[str, Any], model: GPTConfig,
    law: Law | None, fewest: int,
) -> Iterator[Choice]:  # fmt: skip
    """The run of this model that uses the budget, if it has enough steps."""
    total, params, arithmetic = _counts(model)
    if facts.memory is not None and 16 * total > MEMORY_SHARE * facts.memory:
        return
    if params > MOST_PARAMETERS * facts.train_tokens and (model.n_layer, model.n_embd) != SHAPES[0]:
        if not {"n_layer", "n_embd"} & fixed.keys():
            return
    per_row = 0.0  # parameters of a row of the n-gram tables, which follow the tokens
    if model.max_ngram and "ngram_rows" not in fixed:
        model = dataclasses.replace(model, ngram_rows=_rows(math.inf))
        total = _counts(model)[0]
        per_row = (total - _counts(dataclasses.replace(model, ngram_rows=_rows(0)))[0]) / (_rows(math.inf) - _rows(0))
    T, accumulation = model.block_size, fixed.get("gradient_accumulation_steps", 1)
    tokens, overhead = 1e5, 0.0
    most = (MOST_EPOCHS_OF_NGRAMS if model.max_ngram else MOST_EPOCHS) * facts.train_tokens
    for _ in range(6):  # the batch depends on the tokens, and they on the time of an update
        batch = fixed.get("batch_size", 0) * accumulation or sequences(
            tokens, T, accumulation * facts.processes, bool(model.max_ngram)
        )
        step = speed.seconds(model, arithmetic, batch * T)
        if budget.unit == "seconds":
            stored = total - per_row * (model.ngram_rows - _rows(tokens))
            overhead = _overhead(budget, facts, speed, step / (batch * T), stored)
            tokens = (budget.amount - overhead) / step * batch * T
        else:
            tokens = budget.amount / (arithmetic if budget.unit == "flops" else 1)
        is_cut = tokens > most
        tokens = min(tokens, most)
        if fixed.get("epochs") or fixed.get("max_iters"):
            wanted = fixed["epochs"] * facts.train_tokens if fixed.get("epochs") else fixed["max_iters"] * batch * T
            if tokens < wanted and not is_cut:
                return
            tokens, is_cut = wanted, True
    steps = int(tokens / (batch * T))
    if steps < (1 if is_cut else fewest):
        return
    if model.max_ngram and "ngram_rows" not in fixed:
        rows = _rows(tokens)
        settings = {**settings, "ngram_rows": rows}
        model = dataclasses.replace(model, ngram_rows=rows)
    expected = expected_loss(model, params, steps * batch * T, facts, law)
    seconds = steps * step + (overhead if budget.unit == "seconds" and not is_cut else speed.start)
    yield Choice(settings, model, int(params), arithmetic, steps, batch, step, expected, seconds, is_cut)


def expected_loss(model: GPTConfig, params: float, tokens: float, facts: Facts, law: Law | None) -> Prediction:
    """Bits per byte after training on these tokens. params: that are multiplied."""
    used, size = law or (NGRAMS if model.max_ngram else PLAIN), facts.unit(law)
    found = used.predict(params, tokens * size, facts.train_tokens * size, model.block_size * size, facts.text)
    return found if law is not None else Prediction(*(bits / facts.bytes_per_character for bits in found))


def _rows(tokens: float) -> int:
    """Rows of each n-gram table, in a run of this many tokens."""
    return 1 << round(math.log2(min(1 << 18, max(1 << 12, tokens / 8))))


def _overhead(budget: Budget, facts: Facts, speed: Speed, per_token: float, params: float) -> float:
    """Seconds of the budget that are not for updates."""
    final = facts.val_tokens * FORWARD_SHARE * per_token
    final = final if final <= FINAL_SHARE * budget.amount else 0.0
    saved = 12 * params * SAVE_AWAITED
    # a machine that was slow to start still trains something
    return min((1 - LEAST_SHARE) * budget.amount, EVAL_SHARE * budget.amount + speed.start + final + saved)


def sequences(tokens: float, context: int, multiple: int, ngrams: bool = False) -> int:
    """Sequences of a step in a run of this many tokens: few small steps learn less than many, and large runs gain
    from large batches. multiple: the number is divisible by it."""
    wanted = min(1 << 19, max(512.0, BATCH_TOKENS[ngrams] * math.sqrt(tokens / 4e6)))
    return multiple * max(1, round(wanted / context / multiple))


def _by_balance(found: list[Choice], facts: Facts, law: Law | None) -> list[Choice]:
    """For a budget of tokens, which does not limit the size: the models that are not too large for these tokens."""

    def is_balanced(choice: Choice) -> bool:
        used = law or (NGRAMS if choice.model.max_ngram else PLAIN)
        return choice.params <= used.balanced(choice.tokens * facts.unit(law), facts.train_tokens * facts.unit(law))

    smallest = min(choice.params for choice in found)
    fit = [choice for choice in found if is_balanced(choice) or choice.params == smallest]
    return sorted(fit, key=lambda choice: (choice.expected.bits, choice.params))


def settings_of(choice: Choice, budget: Budget, facts: Facts, fixed: dict[str, Any]) -> dict[str, Any]:
    """All settings of the run by leaf name, except the user's."""
    steps, model = choice.steps, choice.model
    batch_size = choice.batch // fixed.get("gradient_accumulation_steps", 1)
    epochs = choice.tokens / facts.train_tokens
    dropout = next(value for limit, value in DROPOUT_BY_EPOCHS if epochs <= limit)
    settings = {
        **choice.settings, "sample_order": "shuffled", "batch_size": batch_size, "max_iters": steps,
        "dropout": 0.0 if model.max_ngram else dropout, "schedule": "linear", "min_lr": 0.0, "lr_decay_iters": None,
        "warmup_iters": steps // 50 if model.n_embd > WIDE else 0,
    }  # fmt: skip
    if choice.batch // facts.processes * model.block_size > ENOUGH_TOKENS:
        settings["micro_batch"] = "auto"
    if "gradient_accumulation_steps" not in fixed:
        settings["gradient_accumulation_steps"] = 1
    settings |= rates(steps, model, fixed.get("optimizer_type", "muon"))
    if model.max_ngram and fixed.get("sample_order", "shuffled") == "shuffled" and not facts.is_mixture:
        ends_whole = fixed.keys().isdisjoint({"schedule", "decay_lr", "lr_decay_iters"})  # the last epoch: see pace.py
        settings["forget_ngrams"] = epochs > (LEAST_FORGOTTEN if ends_whole else 1)
        if settings["forget_ngrams"] and ends_whole:
            settings["lr_ends"] = {0: steps}
    settings |= _evaluations(choice, budget, facts, batch_size)
    return {name: value for name, value in settings.items() if name not in fixed}


def rates(steps: int, model: GPTConfig, optimizer: str) -> dict[str, Any]:
    """Optimizer settings. Muon's rates: 0.05 for 60 updates, 0.03 for 1,000, 0.02 for 4,000 (configs/)."""
    if "muon" not in optimizer:
        return {"learning_rate": _rounded(min(4e-3, 0.4 / model.n_embd)), "weight_decay": 0.1, "grad_clip": 1.0}
    muon = min(0.05, max(0.01, 0.03 * (1000 / steps) ** 0.25))
    adamw = muon * min(1.0, (128 / model.n_embd) ** 0.5)
    settings: dict[str, Any] = {
        "optimizer_type": optimizer, "muon_learning_rate": _rounded(muon), "learning_rate": _rounded(2 / 3 * adamw),
        "embedding_learning_rate": None if model.tie_embeddings else _rounded(10 / 3 * adamw),
        "muon_momentum": 0.9 if steps < 100 else 0.95,
        "weight_decay": 0.0, "beta1": 0.8, "beta2": 0.95, "grad_clip": 0.0,
    }  # fmt: skip
    if model.max_ngram:
        settings["ngram_learning_rate"] = 0.15
    return settings


def _rounded(rate: float) -> float:
    """With two digits, so that the printed rate is the rate."""
    return float(f"{rate:.2g}")


def _evaluations(choice: Choice, budget: Budget, facts: Facts, batch_size: int) -> dict[str, Any]:
    """How often and how much a run evaluates, and what it writes at its end."""
    is_timed = budget.unit == "seconds"  # if not, the settings must not depend on the speed
    seconds = min(budget.amount, choice.seconds) if is_timed else choice.steps * choice.step_seconds
    per_token = choice.step_seconds / (choice.batch * choice.model.block_size)
    is_short = is_timed and seconds < 120
    saved = 12 * _counts(choice.model)[0] * SAVE_BESIDE
    count = 1 if is_short or (is_timed and 10 * saved > EVAL_SHARE * seconds) else 10
    windows = EVAL_SHARE * seconds / (count + 1) / (2 * FORWARD_SHARE * per_token * choice.model.block_size)
    interval = choice.steps // count if count > 1 else 2 * choice.steps  # at the end only, also of a run made longer
    settings: dict[str, Any] = {
        "eval_interval": max(1, interval), "eval_iters": min(200, max(1, int(windows / batch_size))),
        "final_eval": facts.val_tokens * FORWARD_SHARE * per_token <= FINAL_SHARE * seconds,
    }  # fmt: skip
    return settings | ({"loss_plot": False, "tensorboard": False} if is_short else {})
