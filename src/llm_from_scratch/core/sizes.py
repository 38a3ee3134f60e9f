"""Parameters, FLOPs and memory of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import GPTConfig, OptimizerConfig


@dataclass(frozen=True)
class Sizes:
    """What a model costs. Memory in bytes."""

    params: int
    embedding_params: int
    """Position table; and the token table where the head has its own."""
    flops_per_token: int
    """Forward and backward, PaLM's count (arXiv 2204.02311, appendix B): 6 N + 12 L C T."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """A rough upper estimate for one micro-batch, saved for the backward pass, logits included."""

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def count_params(config: GPTConfig) -> int:
    """Number of parameters; a tied head counts once."""
    C, V, L = config.n_embd, config.vocab_size or 0, config.n_layer
    D, bias = C // config.n_head, int(config.bias)
    qkv = (config.n_head + 2 * (config.n_kv_head or config.n_head)) * D
    hidden = config.mlp_width
    ups = 2 if config.activation == "swiglu" else 1
    norm = C * (1 + bias) if config.norm == "layernorm" else C
    attention = C * qkv + bias * qkv + C * C + bias * C + (2 * D if config.qk_norm else 0)
    mlp = ups * (C * hidden + bias * hidden) + hidden * C + bias * C
    total = (
        V * C + L * (2 * norm + attention + mlp) + norm + (norm if config.embedding_norm else 0) + ngram_params(config)
    )
    total += config.block_size * C if config.pos_embedding == "learned" else 0
    return total + (0 if config.tie_embeddings else V * C)


def ngram_params(config: GPTConfig) -> int:
    """Rows that are looked up and multiply nothing."""
    return (config.max_ngram - 1) * config.ngram_rows * config.n_embd if config.max_ngram else 0


def optimizer_bytes(config: GPTConfig, optimizer: OptimizerConfig | None = None) -> int:
    """Memory of the moments: AdamW keeps two numbers a parameter, Muon one for those of its matrices (the linear layers
    in the blocks), row-wise Adagrad one for each row of the n-gram tables. None: AdamW in float32."""
    optimizer = optimizer or OptimizerConfig()
    C, H = config.n_embd, config.mlp_width
    heads = config.n_head + 2 * (config.n_kv_head or config.n_head)
    matrices = C * (C // config.n_head) * heads + C * C + (3 if config.activation == "swiglu" else 2) * C * H
    numbers = 2 * (count_params(config) - ngram_params(config))
    numbers -= config.n_layer * matrices if optimizer.optimizer_type == "muon" else 0
    return (2 if optimizer.optimizer_dtype == "bfloat16" else 4) * numbers + 4 * ngram_params(config) // C


def sizes(
    config: GPTConfig,
    batch_size: int,
    element_size: int = 4,
    gradient_checkpointing: bool = False,
    optimizer: OptimizerConfig | None = None,
) -> Sizes:
    """Costs of training with micro-batches of batch_size sequences; element_size: bytes of an activation."""
    params = count_params(config)
    C, T, L, V = config.n_embd, config.block_size, config.n_layer, config.vocab_size or 0
    embedding = (T * C if config.pos_embedding == "learned" else 0) + (0 if config.tie_embeddings else V * C)
    embedding += ngram_params(config)
    # nanoGPT's convention: the position table multiplies nothing; nor does an untied token table
    flops = 6 * (params - embedding) + 12 * L * C * T
    tokens = batch_size * T
    saved = 10 * C + (3 if config.activation == "swiglu" else 2) * config.mlp_width
    per_layer = 2 * C if gradient_checkpointing else saved
    extra = 10 * C + 3 * config.mlp_width if gradient_checkpointing else 0
    logits = tokens * V * (element_size + 8)  # logits, and their float32 log-softmax and gradient
    activations = tokens * (L * per_layer + extra + 2 * C) * element_size + logits
    return Sizes(params, embedding, flops, 4 * params, 4 * params, optimizer_bytes(config, optimizer), activations)
