"""AdamW whose moments may be kept in bfloat16, rounded at random so that small changes are not lost."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .adagrad import step_rows

PIECES = {"cuda": 1 << 24}  # elements of which float32 copies exist at a time: a GPU wants few kernels,
PIECE = 1 << 17  # a processor what stays in its cache


class Dither:
    """Rounds float32 to bfloat16, up or down with the probability that keeps the mean (stochastic rounding,
    arXiv 2010.06192). With rounding to nearest a moment stands still once its change is below 1/512 of it: the second
    one at beta2 = 0.999 does.

    The noise is a function of (seed, tensor's name, number of the rounding, element) and draws from no generator of
    torch's: a table of random numbers made once from the seed, xor-ed with a number that is new each time.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.tables: dict[torch.device, Tensor] = {}

    def key(self, name: str, count: int, index: int) -> int:
        """16 random bits for one rounding of the piece of a tensor that begins at element index."""
        return _mixed(self.seed, zlib.crc32(name.encode()), count, index) & 0xFFFF

    def round(self, target: Tensor, values: Tensor, key: int, row: int = 0) -> None:
        """target (bfloat16) = values (float32, overwritten), (n,) with n up to piece_of(device); row: 0 or 1, of two
        independent noises."""
        if values.device not in self.tables:
            generator = torch.Generator().manual_seed(self.seed)
            shape = (2, piece_of(values.device))
            table = torch.randint(1 << 16, shape, generator=generator, dtype=torch.int32)
            self.tables[values.device] = table.to(values.device)
        raw = values.view(torch.int32)
        # a carry into the upper half comes with the probability of the lower half's fraction
        raw += self.tables[values.device][row, : values.numel()] ^ key
        raw >>= 16
        target.view(torch.int16).copy_(raw)

    def round_all(self, target: Tensor, values: Tensor, name: str, count: int, index: int) -> None:
        """As round(), for contiguous tensors of any shape; index: of the first element in the tensor named."""
        target, values, piece = target.view(-1), values.view(-1), piece_of(values.device)
        for begin in range(0, values.numel(), piece):
            part = slice(begin, begin + piece)
            self.round(target[part], values[part], self.key(name, count, index + begin))


def piece_of(device: torch.device) -> int:
    return PIECES.get(device.type, PIECE)


def _mixed(*words: int) -> int:
    """32 bits that look random, from whole numbers (the finalizer of SplitMix64, after each word)."""
    mask, h = (1 << 64) - 1, 0
    for word in words:
        h = (h + word + 0x9E3779B97F4A7C15) & mask
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        h ^= h >> 31
    return h >> 32


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) by torch's kernels; its groups name their parameters ("names"). A group whose gradients
    are sparse is stepped by row-wise Adagrad (see adagrad.py).

    dtype: of the moments. bfloat16 halves them; they are widened, updated and rounded again in pieces, so that no
    float32 copy of a whole model exists. Each parameter then counts its roundings ("draws"), which makes them
    repeatable. fused: one kernel for many tensors. A 0-dim tensor `found_inf`, set as torch.amp.GradScaler sets it,
    makes fused kernels leave everything as it is where it is 1; nothing waits for it.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        fused: bool,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        self.dtype, self.dither = dtype, Dither(seed)
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
                for p in group["params"]:
                    step_rows(p, self.state[p], group["lr"], self.found_inf)
            else:
                self.step_group(group)
        return loss

    def step_group(self, group: dict[str, Any]) -> None:
        named = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if p.grad is not None]
        for _, p in named:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device if group["fused"] else "cpu"),
                    "exp_avg": torch.zeros_like(p, dtype=self.dtype),
                    "exp_avg_sq": torch.zeros_like(p, dtype=self.dtype),
                }
        if self.dtype == torch.float32:
            params = [p for _, p in named]
            m, v = [self.state[p]["exp_avg"] for p in params], [self.state[p]["exp_avg_sq"] for p in params]
            self._adamw(group, params, [p.grad for p in params], m, v, [self.state[p]["step"] for p in params])
        else:
            self._step_in_pieces(group, named)

    def _step_in_pieces(self, group: dict[str, Any], named: list[tuple[str, Any]]) -> None:
        for batch in pieces(named):
            flat = [[t.reshape(-1)[part] for t in (p, p.grad, *self._moments(p))] for _, p, part in batch]
            params, grads, m, v = (list(column) for column in zip(*flat, strict=True))
            m32, v32 = [t.float() for t in m], [t.float() for t in v]
            steps = [self.state[p]["step"].clone() for _, p, _ in batch]  # a tensor may come in several pieces
            self._adamw(group, params, grads, m32, v32, steps)
            for i, (name, p, part) in enumerate(batch):
                key = self.dither.key(name, self.state[p].get("draws", 0), part.start)
                self.dither.round(m[i], m32[i], key, 0)
                self.dither.round(v[i], v32[i], key, 1)
        for _, p in named:
            self.state[p]["draws"] = self.state[p].get("draws", 0) + 1
            self.state[p]["step"] += 1 if self.found_inf is None else 1 - self.found_inf

    def _moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        return self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]

    def _adamw(self, group: dict[str, Any], params: list, grads: list, m: list, v: list, steps: list) -> None:
        adamw(
            params, grads, m, v, [], steps, fused=group["fused"], found_inf=self.found_inf, amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; but the moments get this optimizer's dtype, where torch gives them the parameter's."""
        rest = {
            number: {slot: value for slot, value in slots.items() if not _is_moment(value)}
            for number, slots in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": rest})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for slot, value in state_dict["state"].get(number, {}).items():
                if _is_moment(value):
                    self.state[p][slot] = value.to(p.device, torch.float32 if slot == "sum" else self.dtype)


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def pieces(named: list[tuple[str, Any]]) -> Iterator[list[tuple[str, Any, slice]]]:
    """Cuts tensors into flat pieces, and brings small ones together: lists of (name, tensor, part of it)."""
    batch: list[tuple[str, Any, slice]] = []
    size = 0
    for name, p in named:
        limit = piece_of(p.device)
        for begin in range(0, p.numel(), limit):
            part = slice(begin, min(begin + limit, p.numel()))
            if batch and size + part.stop - begin > limit:
                yield batch
                batch, size = [], 0
            batch.append((name, p, part))
            size += part.stop - begin
    if batch:
        yield batch
