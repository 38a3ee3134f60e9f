"""Parameters, FLOPs and memory of a model, counted on GPT(config) on the meta device: shapes without numbers."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import GPTConfig
from ..errors import UserError, first_line
from .model import GPT
from .ngrams import NGramEmbedding


class NoInit(TorchFunctionMode):
    """Skips torch.nn.init, for weights that are replaced at once or never read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def meta_model(config: GPTConfig) -> GPT:
    """GPT(config) on the meta device: every name, shape and type, without memory. Cached and shared, so do not change
    it.

    The rest of the program learns from it which parameters a model has. Raises UserError if no such model can be built.
    """
    return _meta_model(dataclasses.astuple(config))


@functools.lru_cache(maxsize=32)
def _meta_model(values: tuple[Any, ...]) -> GPT:
    config = GPTConfig(*values)
    try:
        with torch.device("meta"), NoInit():
            return GPT(config)
    except UserError:
        raise
    except (RuntimeError, OverflowError) as error:  # more elements than 64 bits count
        raise UserError(f"a model of these sizes cannot be built on the meta device: {first_line(error)}") from None


def meta_tensors(config: GPTConfig) -> dict[str, Tensor]:
    """{name: parameter or persistent buffer on the meta device} as in the state dict, both names of a tied one."""
    return meta_model(config).state_dict(keep_vars=True)


def tied_names(config: GPTConfig) -> dict[str, str]:
    """{name: the earlier name of the same tensor} in the state dict; a checkpoint stores the earlier one."""
    first: dict[int, str] = {}
    earlier = {name: first.setdefault(id(tensor), name) for name, tensor in meta_tensors(config).items()}
    return {name: other for name, other in earlier.items() if other != name}


@dataclass(frozen=True)
class Sizes:
    """The cost of a model. Memory in bytes."""

    params: int
    trained: int
    """Parameters that train: all, unless some are frozen."""
    embedding_params: int
    """Parameters that are only looked up, not multiplied."""
    flops_per_token: int
    """Forward and backward, PaLM's count (arXiv 2204.02311, appendix B): 6 N + 12 L H D T; 4 for a frozen parameter."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """A rough upper estimate for one micro-batch, saved for the backward pass, logits included."""

    @property
    def states(self) -> dict[str, int]:
        """Bytes that sharding divides among the processes."""
        return {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}

    @property
    def memory(self) -> int:
        return sum(self.states.values()) + self.activations


def count_params(config: GPTConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(p.numel() for p in meta_model(config).parameters())


def embedding_params(config: GPTConfig) -> int:
    """Parameters that are only looked up: positions, n-grams, and the token table if the head has its own."""
    modules = list(meta_model(config).modules())
    multiplied = {id(module.weight) for module in modules if isinstance(module, nn.Linear)}
    tables = {id(m.weight): m.weight.numel() for m in modules if isinstance(m, (nn.Embedding, NGramEmbedding))}
    return sum(size for table, size in tables.items() if table not in multiplied)


def sizes(
    config: GPTConfig, batch_size: int, element_size: int = 4, gradient_checkpointing: bool = False,
    optimizer: int = 0, chunked_loss: bool = False, model: GPT | None = None,
) -> Sizes:  # fmt: skip
    """Costs of training with micro-batches of batch_size sequences; element_size: bytes of an activation.

    optimizer: bytes of its moments, which it declares itself (training.moments.optimizer_bytes); chunked_loss: never
    all logits at once, but the head's gradient twice; model: GPT(config) on the meta device with adapters or frozen
    parameters.
    """
    parameters, embedding = list((model or meta_model(config)).parameters()), embedding_params(config)
    params, trained = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
    C, T, L, V = config.n_embd, config.block_size, config.n_layer, config.vocab_size or 0
    # nanoGPT's convention: the position table multiplies nothing; nor does an untied token table
    flops = 4 * (params - embedding) + 2 * min(trained, params - embedding)
    flops += 12 * L * config.n_head * config.head_width * T
    tokens = batch_size * T
    # a block stores the inputs and outputs of its linear layers, and the outputs of its two norms
    blocks = [
        2 * C + sum(part.in_features + part.out_features for part in block.modules() if isinstance(part, nn.Linear))
        for block in meta_model(config).transformer.h
    ]
    saved = 2 * C * L + max(blocks, default=0) if gradient_checkpointing else sum(blocks)
    # logits, and their float32 log-softmax and gradient; or the head's gradient, and its scaled copy
    loss = 8 * V * C if chunked_loss else tokens * V * (element_size + 8)
    activations = tokens * (saved + 2 * C) * element_size + loss
    return Sizes(params, trained, embedding, flops, 4 * params, 4 * trained, optimizer, activations)
