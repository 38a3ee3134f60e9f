"""Tasks of lm-evaluation-harness: its documents, prompts and metrics, with log-likelihoods and texts of our model.

Texts that exceed the context are cut as the harness's own `hf` model cuts them: from the left.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import GenerationConfig
from ..core.tokenizer import Tokenizer
from ..errors import Interrupted, UserError, one_line
from ..generation.generator import Generator
from ..generation.likelihoods import Ids, Likelihoods, Score
from ..generation.sampling import FILTERS
from ..machine.extras import require

AT_ONCE = 64  # texts that are generated together
GENERATED = 256  # tokens, if a task does not say: as in the harness
RESAMPLES = 1000  # for the standard errors of metrics that are not means
SEED = 1234  # of the few-shot examples: the harness's default
SAMPLING = (*FILTERS, "repetition_penalty")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class TaskModel:
    """A generator's model for the harness, which calls its three methods. rows: contexts per forward pass; None:
    automatic. before_batch: called before every batch, and may raise to end the evaluation. share: (rank, processes)
    that score parts of the requests; each of them gets all scores."""

    rank, world_size = 0, 1  # the harness computes the same on every process

    def __init__(
        self, generator: Generator, rows: int | None = None, before_batch: Callable[[], None] = lambda: None,
        share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        self.generator, self.rows, self.before_batch, self.share = generator, rows, before_batch, share
        self.likelihoods = Likelihoods(generator, rows, before_batch, share)
        self.tokenizer, self.config = generator.tokenizer, generator.model.config
        self.first = first_token(generator.tokenizer)

    # the harness calls these; a request has args

    def loglikelihood(self, requests: Sequence[Any]) -> list[Score]:
        """For (context, continuation)."""
        return self.likelihoods.scores([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For (text,): all its tokens, the first one after the end-of-text token. A text that exceeds the context is
        cut into windows; the last one overlaps the one before it, so that it is as long."""
        pairs: list[tuple[Ids, Ids]] = []
        owners: list[int] = []
        block = self.config.block_size
        for owner, request in enumerate(requests):
            ids = (self.first, *self._encode(request.args[0]))
            for begin in range(1, len(ids), block):
                end = min(begin + block, len(ids))
                pairs.append((ids[max(0, end - 1 - block) : begin], ids[begin:end]))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self.likelihoods.scores(pairs), strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For (context, settings): the text up to a stop sequence of the settings or the end-of-text token."""
        (rank, processes), texts = self.share, dict[int, str]()
        alike: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(place)
        for places in alike.values():
            params = self._sampling(dict(requests[places[0]].args[1]))
            keep = self.config.block_size - params.max_new_tokens
            prompts = {place: (self._encode(requests[place].args[0]) or (self.first,))[-keep:] for place in places}
            places.sort(key=lambda place: -len(prompts[place]))
            size = min(self.rows or AT_ONCE, -(-len(places) // processes))
            for at in range(rank * size, len(places), processes * size):
                self.before_batch()
                group = places[at : at + size]
                for place, sample in zip(
                    group, self.generator.generate([prompts[p] for p in group], params, SEED), strict=True
                ):
                    texts[place] = sample.text
        parts = [texts] * processes
        if processes > 1:
            torch.distributed.all_gather_object(parts, texts)
        texts = {place: text for part in parts for place, text in part.items()}
        return [texts[place] for place in range(len(requests))]

    def _sampling(self, asked: dict[str, Any]) -> GenerationConfig:
        """A task's generation_kwargs. Raises UserError for one that is not supported."""
        until = asked.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        if self.tokenizer.eot_id is not None:
            stops.append(self.tokenizer.decode([self.tokenizer.eot_id]))
        lengths = [given for name in LENGTHS if (given := asked.pop(name, None)) is not None]
        length, samples = int(lengths[0]) if lengths else GENERATED, asked.pop("do_sample", None)
        temperature = float(asked.pop("temperature", None) or 0.0)
        known: dict[str, Any] = {name: asked.pop(name) for name in SAMPLING if name in asked}
        for name, value in asked.items():
            if value is not None and (name, value) != ("num_beams", 1):
                raise UserError(f"a task requires generation with {name}={value}, which is not supported")
        if length >= self.config.block_size:
            raise UserError(
                f"a task generates up to {length} tokens, which leaves no room for its prompt in block_size="
                f"{self.config.block_size}: set max_gen_toks in the generation_kwargs of its file"
            )
        known |= {"temperature": 0.0 if samples is False else temperature, "stop": tuple(filter(None, stops))}
        return GenerationConfig(**{"max_new_tokens": length, "top_k": None} | known)

    def _encode(self, text: str) -> Ids:
        return tuple(self.tokenizer.encode(text, allow_special=True).tolist())

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Token ids of both: those of the context, then those of the whole text after as many tokens. Spaces at the end
        of the context belong to the continuation, because many tokens begin with one."""
        before, whole = self._encode(context.rstrip()), self._encode(context + continuation)
        if not whole:
            raise UserError("a task has an empty context and an empty continuation: its likelihood is undefined")
        if len(before) >= len(whole):  # its end and the continuation are one token
            before = whole[:-1]
        if before:
            return before, whole[len(before) :]
        return ((self.first,), whole) if whole[0] != self.first or len(whole) < 2 else (whole[:1], whole[1:])


def first_token(tokenizer: Tokenizer) -> int:
    """The token before a text: the token that begins a text if there is one, else the end-of-text token, else a line
    break, else the token 0."""
    if tokenizer.chat is not None and tokenizer.chat.bos:
        ids = tokenizer.encode(tokenizer.chat.bos, allow_special=True)
        if len(ids) == 1:
            return int(ids[0])
    if tokenizer.eot_id is not None:
        return tokenizer.eot_id
    with contextlib.suppress(UserError):
        ids = tokenizer.encode("\n")
        return int(ids[0])
    return 0


# --- the harness ---


def load_tasks(names: str, option: str = "--tasks", fewshot: int | None = None) -> dict[str, Any]:
    """The tasks and groups of a comma-separated list of YAML files, folders of them, and the harness's own names, as
    the harness loads them. fewshot: number of examples in each prompt; None: as the task sets it. Raises UserError: the
    package is missing, a task is unknown or cannot be loaded."""
    require("lm_eval", "eval", option)
    os.environ["DISABLE_MULTIPROC"] = "1"  # no processes forked from one that has threads
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError(f"{option} is empty: expected names, YAML files or folders")
    with _harness_errors(option, "the harness"):
        import datasets
        from lm_eval.tasks import TaskManager

        datasets.disable_progress_bars()
    own = [name for name in wanted if os.path.isdir(name)]  # False for a name that is too long
    manager = TaskManager(include_path=own or None, include_defaults=False)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in wanted:
        path = Path(name)
        if not os.path.exists(name) and name not in manager.all_tasks:
            if path.suffix in (".yaml", ".yml"):
                raise UserError(f"{option}: no such file: {name}")
            if "hellaswag" not in manager.all_tasks:  # the harness's own, which takes seconds
                manager = TaskManager(include_path=own or None)
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "see `lm-eval ls tasks` for its names"
                raise UserError(f"{option}: unknown task {name!r}; {hint}")
        with _harness_errors(option, name):
            specs = (
                TaskManager(include_path=name, include_defaults=False).all_subtasks if os.path.isdir(name) else [name]
            )
            if not specs:
                raise UserError(f"{option}: the folder {name} contains no task (a .yaml file with a field `task`)")
            found = manager.load(specs)
            loaded = {kind: loaded[kind] | found.get(kind, {}) for kind in loaded}
    for name, task in loaded["tasks"].items():
        with _harness_errors(option, name):
            own_number = task.get_config("num_fewshot")
            if own_number is None or (fewshot is not None and own_number != 0):  # 0 in a file stays, as in the harness
                task.set_config(key="num_fewshot", value=fewshot or 0)
            task.set_fewshot_seed(seed=SEED)
    return loaded


def evaluate_tasks(model: TaskModel, loaded: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
    """The harness's results of loaded tasks: {"results": {task: {"acc,none": 0.5, "acc_stderr,none": 0.01, ...}}, ...}.
    limit: documents per task; below 1: a fraction. Raises UserError if a task cannot be evaluated."""
    import lm_eval
    from lm_eval.api.model import LM

    LM.register(TaskModel)  # an instance of LM for the harness, without its base class
    with _harness_errors("evaluating", ", ".join(loaded["tasks"])), contextlib.redirect_stdout(io.StringIO()):
        return lm_eval.evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)


@contextlib.contextmanager
def _harness_errors(action: str, name: str) -> Iterator[None]:
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:  # of the harness, of `datasets`, or of a function in a task's file
        raise UserError(f"{action}: {name} failed: {one_line(error, 300)}") from None


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of results as {"task/metric": value, "task/metric_stderr": its standard error}."""
    found = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and isinstance(value, (int, float)) and math.isfinite(value):
                found[f"{task}/{metric}" if kind == "none" else f"{task}/{metric},{kind}"] = float(value)
    return found


def tables(results: dict[str, Any]) -> str:
    """The harness's tables of tasks and of groups, in Markdown."""
    from lm_eval.utils import make_table

    return "\n".join(make_table(results, kind).strip() for kind in ("results", "groups") if results.get(kind))
