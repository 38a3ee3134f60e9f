"""The angles of RoPE (arXiv 2104.09864), and their scaling for contexts longer than that of the pretraining.

Sources: linear arXiv 2306.15595; llama3 Llama 3.1; yarn arXiv 2309.00071. D is the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..config import GPTConfig

Angles = Callable[[Tensor], tuple[Tensor, Tensor]]


def rotary_angles(config: GPTConfig) -> Angles:
    """A function of positions, (T,) or (B, T), that returns their cosines and sines in float32, (..., 1, T, D/2)."""
    plain = partial(plain_angles, head_dim=config.head_width, theta=config.rope_theta)
    return plain if config.rope_scaling == "none" else partial(scaled_angles, config=config)


def plain_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    return _cos_sin(positions, _frequencies(head_dim, theta, positions.device))


def scaled_angles(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    frequencies = _frequencies(config.head_width, config.rope_theta, positions.device)
    cos, sin = _cos_sin(positions, frequencies / frequency_divisors(config, positions.device))
    gain = attention_factor(config)
    return cos * gain, sin * gain


def frequency_divisors(config: GPTConfig, device: torch.device | str = "cpu") -> Tensor:
    """By what each frequency is divided: from 1 to rope_factor, (D/2,)."""
    frequencies = _frequencies(config.head_width, config.rope_theta, device)
    kept = SCALINGS[config.rope_scaling](config, frequencies)
    return 1 / (kept + (1 - kept) / config.rope_factor)


def attention_factor(config: GPTConfig) -> float:
    """The factor of the rotated queries and keys. A larger one sharpens the attention, as a long context needs."""
    if config.rope_scaling != "yarn":
        return 1.0
    return config.rope_attention or 0.1 * math.log(max(1.0, config.rope_factor)) + 1


def high_turns(config: GPTConfig) -> float:
    return config.rope_high or {"yarn": 32.0}.get(config.rope_scaling, 4.0)


def _frequencies(head_dim: int, theta: float, device: torch.device | str) -> Tensor:
    """Radians per token of each pair of numbers, (D/2,)."""
    return theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def _cos_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.float()[..., None] * frequencies  # (..., T, D/2)
    return angles.cos().unsqueeze(-3), angles.sin().unsqueeze(-3)  # the 1 broadcasts over the heads


def _llama3_kept(config: GPTConfig, frequencies: Tensor) -> Tensor:
    """A ramp over the turns in the original context, from rope_low to rope_high."""
    turns = float(config.rope_original or 0) / (2 * math.pi) * frequencies
    return ((turns - config.rope_low) / (high_turns(config) - config.rope_low)).clamp(0, 1)


def _yarn_kept(config: GPTConfig, frequencies: Tensor) -> Tensor:
    """A ramp over the indices, between whole indices around those with rope_high and rope_low turns."""

    def index(turns: float) -> float:
        tokens = float(config.rope_original or 0) / (turns * 2 * math.pi)  # of one turn
        return config.head_width * math.log(tokens) / (2 * math.log(config.rope_theta))

    first = max(math.floor(index(high_turns(config))), 0)
    last = min(math.ceil(index(config.rope_low)), config.head_width - 1)
    indices = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    return 1 - ((indices - first) / (last - first or 0.001)).clamp(0, 1)


# The share of each frequency that stays; the rest is divided by rope_factor
SCALINGS: dict[str, Callable[[GPTConfig, Tensor], Tensor]] = {
    "none": lambda config, frequencies: torch.ones_like(frequencies),
    "linear": lambda config, frequencies: torch.zeros_like(frequencies),
    "llama3": _llama3_kept,
    "yarn": _yarn_kept,
}
