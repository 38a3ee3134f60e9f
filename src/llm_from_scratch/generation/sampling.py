"""From logits to the next token: small pure functions on logits of shape (B, V), and the order they are applied in.

    1. logit_bias                             (added)
    2. repetition_penalty                     (tokens of the prompt and of the text so far)
    3. presence_penalty, frequency_penalty    (tokens of the text so far)
    4. temperature                            (0 ends here: the most likely token)
    5. top_k, then top_p, then min_p          (each on what the previous one left; FILTERS)
    6. softmax, and one draw per row

A removed token gets the logit -inf. The order is that of transformers' generate. If logits are equal at the k-th
place, top_k keeps any of them. row_sampler.py gives every row a random stream of its own, so its tokens do not depend
on the rest of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..config import GenerationConfig

GREEDY_BELOW = 1e-5  # temperatures below this are taken as 0: the division would overflow
LARGEST_LOGIT = 1e30  # penalties end here, so that no division after them overflows to inf - inf = nan


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Makes tokens already seen less likely (CTRL, arXiv 1909.05858). seen: bool (B, V); above 1 discourages."""
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised.clamp(-LARGEST_LOGIT, LARGEST_LOGIT), logits)


def presence_frequency_penalty(
    logits: Tensor, counts: Tensor, presence: float | Tensor, frequency: float | Tensor
) -> Tensor:
    """Subtracts presence once and frequency for each occurrence, as OpenAI's API does. counts: (B, V)."""
    return logits - presence * (counts > 0) - frequency * counts


def temperature(logits: Tensor, value: float) -> Tensor:
    """Flattens (above 1) or sharpens (below 1) the distribution. value > 0."""
    return logits / value


def top_k(logits: Tensor, k: int | None, keep_ties: bool = False) -> Tensor:
    """Keeps exactly the k largest logits; None, 0 or k >= V keeps all.

    keep_ties keeps more than k if further logits equal the k-th, as nanoGPT does.
    """
    if not k or k >= logits.size(-1):
        return logits
    largest = logits.topk(k)
    if keep_ties:
        return logits.masked_fill(logits < largest.values[..., -1:], -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, largest.indices, largest.values)


def top_p(logits: Tensor, p: float, among: int | None = None) -> Tensor:
    """Keeps the most likely tokens, as few as add up to a probability of p or more (arXiv 1904.09751); 1 keeps all.

    among: at most this many tokens are left; sorting only them is far cheaper than sorting V.
    """
    if p >= 1:
        return logits
    if among and among < logits.size(-1):
        ordered, ids = logits.topk(among)
    else:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # total probability of the more likely tokens
    return torch.full_like(logits, -math.inf).scatter(-1, ids, ordered.masked_fill(before >= p, -math.inf))


def min_p(logits: Tensor, p: float) -> Tensor:
    """Drops tokens with less than p times the probability of the most likely one (arXiv 2407.01082); 0 keeps all."""
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


Filter = Callable[[Tensor, GenerationConfig], Tensor]
# In the order in which they are applied, by the names of their settings. A new filter is a line here, a function above
# and a setting in GenerationConfig.
FILTERS: dict[str, Filter] = {
    "temperature": lambda logits, params: temperature(logits, params.temperature),
    "top_k": lambda logits, params: top_k(logits, params.top_k),
    "top_p": lambda logits, params: top_p(logits, params.top_p, among=params.top_k),
    "min_p": lambda logits, params: min_p(logits, params.min_p),
}


def keep_likely(logits: Tensor, params: GenerationConfig, filters: Mapping[str, Filter] = FILTERS) -> Tensor:
    """All filters in their order. (B, V) to (B, V)."""
    for function in filters.values():
        logits = function(logits, params)
    return logits


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The ids, (B,), at which the cumulative probabilities, (B, V), exceed the given random numbers in [0, 1), (B,).

    One random number per token, for any V. A token of probability 0 is never drawn.
    """
    cumulated = probs.cumsum(dim=-1, dtype=uniform.dtype)
    # below the total also after rounding, else the search would run past the last possible token
    below = uniform.clamp(max=1 - 4 * torch.finfo(uniform.dtype).eps)
    ids = torch.searchsorted(cumulated, below[:, None] * cumulated[:, -1:], right=True).squeeze(-1)
    return ids.clamp(max=probs.size(-1) - 1)  # nan compares above every number


def log_probabilities(logits: Tensor, ids: Tensor, alternatives: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of the model's own probabilities: of ids, (B,), and of the most likely alternatives, (B, k),
    with their ids. logits: (B, V), from the model."""
    logs = logits.float().log_softmax(dim=-1)
    top = logs.topk(min(alternatives, logs.size(-1)))
    return logs.gather(-1, ids[:, None]).squeeze(-1), top.values, top.indices
