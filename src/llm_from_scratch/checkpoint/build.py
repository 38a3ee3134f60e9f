"""A model from weights that are at hand."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..config import GPTConfig
from ..core.model import GPT
from ..errors import UserError


class NoInit(TorchFunctionMode):
    """A model built within spends no time on random weights, which are replaced at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_model(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """A model with these weights, which it takes over. Raises UserError where they do not fit."""
    with NoInit():
        model = GPT(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the model: {error}") from None
    if config.tie_embeddings:
        model.transformer["wte"].weight = model.lm_head.weight
    return model
