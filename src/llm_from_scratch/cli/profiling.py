"""Summary of a torch profile of training steps: time per kind of operation. On a CPU, the time of an operation excludes
the operations it calls. On a GPU, it is the time of the kernels. The rest between the first and the last kernel is idle
time: the GPU waits for the host."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# The first kind with a pattern that matches the name of the operation or of one of its callers
BY_CALLER = (
    ("data", r"^data$"),
    ("optimizer", r"^Optimizer\.|^clipping$|FusedAdam"),
    ("loss", r"(?i)cross_?entropy|nll_?loss|log_?softmax"),
    ("attention", r"(?i)attention|scaled_?dot_?product|sdpa|flash|fmha|(?<!log_)softmax"),
)
# then the first with a pattern that matches the operation's name; nvjet, xmma and cutlass belong to cuBLAS
BY_NAME = (
    ("matrix products", r"(?i)mm(_\w+)?$|_mm_|gemm|gemv|aten::linear|matmul|nvjet|xmma|cutlass|cublas|splitkreduce"),
    (
        "copies and casts",
        r"(?i)copy|memcpy|memset|clone|contiguous|aten::(cat|stack|zero_|fill_|zeros|ones|empty|to)\b|CatArray|FillFunctor",
    ),
)
REST, PYTHON, IDLE = "norms, activations, other", "Python between operations", "idle"
HEAD = "matrix products of head and loss"  # in the chunked loss
STEP = "ProfilerStep"


@dataclass(frozen=True)
class Spent:
    """Time of one operation. names: its name, then its callers, innermost first."""

    names: tuple[str, ...]
    microseconds: float

    @property
    def kind(self) -> str:
        for kind, pattern in BY_CALLER:
            if any(re.search(pattern, name) for name in self.names):
                return HEAD if kind == "loss" and re.search(BY_NAME[0][1], self.names[0]) else kind
        if self.names[0].startswith(STEP):
            return PYTHON
        # a fused kernel has the names of all its operations: a cast fused with a norm is not a copy
        fused = re.sub(r"^triton_\w+?_fused_", "", self.names[0])
        if fused != self.names[0] and not re.fullmatch(r"(_?to_copy|clone|copy|t|transpose|view|permute|_|\d)+", fused):
            return BY_NAME[0][0] if self.names[0].startswith("triton_tem") else REST
        return next((kind for kind, pattern in BY_NAME if re.search(pattern, self.names[0])), REST)


@dataclass(frozen=True)
class Profile:
    """The profile of some steps."""

    spent: list[Spent]
    steps: int
    microseconds: float
    """From the start of the first step to the end of the last."""
    idle: float | None = None
    """Microseconds in which the GPU was idle; None on a CPU."""

    @property
    def by_kind(self) -> dict[str, float]:
        """Microseconds by kind, largest first."""
        idle = [] if self.idle is None else [(IDLE, self.idle)]
        return _sums([(item.kind, item.microseconds) for item in self.spent] + idle)

    def lines(self, largest: int = 12) -> list[str]:
        """The table: kinds, then the largest operations or kernels."""
        kinds, what = self.by_kind, "operation" if self.idle is None else "kernel"
        total = sum(kinds.values()) or 1.0

        def row(name: str, microseconds: float) -> str:
            short = name if len(name) <= 50 else f"{name[:47]}..."
            return f"{short:<50} {microseconds / total:>7.1%} {microseconds / self.steps / 1e3:>10.3f}"

        titles = f"{'share':>7} {'ms/step':>10} {'calls':>7}"
        rows = [f"{'time by kind':<50} {titles}", *(row(*item) for item in kinds.items())]
        times = list(_sums((item.names[0], item.microseconds) for item in self.spent).items())[:largest]
        calls = Counter(item.names[0] for item in self.spent)
        rows += ["", f"{f'largest {what}s':<50} {titles}"]
        return rows + [f"{row(*item)} {calls[item[0]] / self.steps:>7.0f}" for item in times]


def _sums(items: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The sum for each name, largest first."""
    sums: defaultdict[str, float] = defaultdict(float)
    for name, value in items:
        sums[name] += value
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def read(events: Iterable[Any], steps: int) -> Profile:
    """The profile from the events of a torch profiler that recorded N steps (on a GPU, if there are kernels)."""
    events = list(events)
    host = [e for e in events if e.device_type.name == "CPU"]
    kernels = [e for e in events if e.device_type.name != "CPU" and not e.is_user_annotation]
    if kernels:
        begin, end = min(e.time_range.start for e in kernels), max(e.time_range.end for e in kernels)
        return Profile(_of_kernels(host, kernels), steps, end - begin, end - begin - _busy(kernels))
    spent = [Spent(_names(e), e.self_cpu_time_total) for e in host]
    return Profile(spent, steps, sum(e.time_range.elapsed_us() for e in host if e.name.startswith(STEP)))


def _names(event: Any) -> tuple[str, ...]:
    return (event.name, *(_names(event.cpu_parent) if event.cpu_parent is not None else ()))


def _of_kernels(host: list[Any], kernels: list[Any]) -> list[Spent]:
    """The kernels, with the names of the operations that launched them (unknown in a CUDA graph)."""
    spent, known = [], Counter[tuple[str, float]]()
    for event in host:
        for kernel in event.kernels:
            spent.append(Spent((kernel.name, *_names(event)), kernel.duration))
            known[kernel.name, round(kernel.duration, 3)] += 1
    for event in kernels:
        key = event.name, round(event.time_range.elapsed_us(), 3)
        if known[key] > 0:
            known[key] -= 1
        else:
            spent.append(Spent((event.name,), key[1]))
    return spent


def _busy(kernels: list[Any]) -> float:
    """Microseconds in which at least one kernel runs; several streams may overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted((e.time_range.start, e.time_range.end) for e in kernels):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
