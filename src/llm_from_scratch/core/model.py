"""The whole model in one file: norms, positions, attention, MLP, block, head, loss, GPT. Its KV cache is in cache.py.

With the default configuration this is GPT-2 as nanoGPT writes it: the same state-dict keys, the same parameter
order and the same initial weights for a seed. Every option (RoPE, RMSNorm, SwiGLU, grouped-query attention,
QK-norm, untied head, softcap) is chosen from a table when the model is built, never while it runs.

Edit this file freely: all other code reads names and shapes of parameters from the model, faster kernels (kernels/)
are compared with the modules of this file before they are used, and decoding is recorded from forward.

Sources: GPT-2 (Radford et al. 2019) and openai/gpt-2 src/model.py; RoPE arXiv 2104.09864; RMSNorm arXiv 1910.07467;
SwiGLU arXiv 2002.05202; ReLU^2 arXiv 2109.08668; GQA arXiv 2305.13245; QK-norm arXiv 2010.04245.
Shapes in comments: B batch, T tokens, C = n_embd, H heads, D their width, V vocabulary, S cached length.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from ..config import GPTConfig
from ..errors import UserError
from .cache import KVCache, LayerCache
from .ngrams import NGramEmbedding
from .rope import rotary_angles


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input; its weights may be stored in a wider dtype.

    stacked: heights of the matrices that are stacked in the weight (queries, keys and values are three). Optimizers
    that update matrices, such as Muon, separate them.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, stacked: tuple[int, ...] | None = None):
        super().__init__(inputs, outputs, bias)
        self.stacked = stacked or (outputs,)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, ndim: int, bias: bool, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, ndim: int, bias: bool = False, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))  # bias: unused
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LearnedPositions(nn.Module):
    """A learned table, transformer.wpe, which GPT adds to the token embeddings. Attention does not use positions."""

    has_table = True

    def __init__(self, config: GPTConfig):
        super().__init__()

    def prepare(self, pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Values that every layer needs for the positions, (T,) or (B, T). Computed once per forward pass."""
        return ()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Applies positions to queries and keys. q: (B, H, T, D); k: (B, Hkv, T, D)."""
        return q, k


class RotaryPositions(LearnedPositions):
    """RoPE: queries and keys are rotated by an angle that grows with the position (arXiv 2104.09864)."""

    has_table = False

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.angles = rotary_angles(config)

    def prepare(self, pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        cos, sin = self.angles(pos)  # (..., 1, T, D/2)
        return cos.to(dtype), sin.to(dtype)

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]), the convention of Llama in transformers. x: (B, H, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


POSITIONS: dict[str, type[LearnedPositions]] = {"learned": LearnedPositions, "rope": RotaryPositions}


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, by torch's fused kernels. No parameters, so that another kernel can replace it.

    q: (B, H, T, D); k, v: (B, Hkv, S, D) with Hkv dividing H; mask: bool, broadcastable to (B, H, T, S), True if a
    query may attend to a key. causal: a query attends to the keys up to its own (S = T). Returns (B, H, T, D).
    """

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        grouped = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)


class CausalSelfAttention(nn.Module):
    """Multi-head (or grouped-query) attention; a token attends to itself and the tokens before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_dim = config.head_width
        # queries, keys and values of all heads in one product
        heights = tuple(n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head))
        self.c_attn = Linear(config.n_embd, sum(heights), bias=config.bias or config.qkv_bias, stacked=heights)
        self.c_proj = Linear(heights[0], config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.positions = POSITIONS[config.pos_embedding](config)
        self.attend = Attention(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, where: tuple[Tensor, ...] = (), cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.size()
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2 Hkv, D)
        q, k, v = (t.transpose(1, 2) for t in qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2))
        q, k = self.positions(self.q_norm(q), self.k_norm(k), *where)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(k, v)  # (B, Hkv, S, D), mask over S
        # a single query without a mask may see every key; torch would align a causal mask at the wrong corner
        causal = mask is None and T > 1
        y = self.attend(q, k, v, mask, causal)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H D)
        return self.resid_dropout(self.c_proj(y))


class ReLUSquared(nn.Module):
    """relu(x)^2 (arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """silu(gate) * x (arXiv 2002.05202). A gated activation has two inputs; config.py lists its name too."""

    def forward(self, gate: Tensor, x: Tensor) -> Tensor:
        return F.silu(gate) * x


ACTIVATIONS: dict[str, Any] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu2": ReLUSquared,
    "swiglu": SwiGLU,
}


class MLP(nn.Module):
    """Two linear layers with a non-linearity between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class GatedMLP(MLP):
    """An MLP with a gated activation: c_proj(act(c_gate(x), c_fc(x)))."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.c_gate = Linear(config.n_embd, config.mlp_width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_gate(x), self.c_fc(x))))


NORMS: dict[str, Any] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def make_norm(config: GPTConfig) -> nn.Module:
    return NORMS[config.norm](config.n_embd, config.bias, config.norm_eps)


class Block(nn.Module):
    """A transformer layer with its norms before attention and MLP."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = GatedMLP(config) if config.is_gated else MLP(config)

    def forward(self, x: Tensor, where: tuple[Tensor, ...] = (), cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), where, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class Head(Linear):
    """Logits of normalized activations: (..., C) to (..., V); softcap: c * tanh(logits / c), 0 is off."""

    def __init__(self, inputs: int, outputs: int, softcap: float):
        super().__init__(inputs, outputs, bias=False)
        self.softcap = softcap

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


class NextTokenLoss(nn.Module):
    """Mean cross-entropy (nats) over the targets that are not -1. No parameters, so another kernel can replace it."""

    def forward(self, x: Tensor, targets: Tensor, head: Head) -> tuple[Tensor | None, Tensor]:
        """x: (B, T, C), normalized activations; targets: (B, T). Returns (logits or None, loss)."""
        logits = head(x)
        return logits, F.cross_entropy(logits.flatten(0, -2).float(), targets.reshape(-1), ignore_index=-1)


class GPT(nn.Module):
    """A decoder-only transformer language model. Raises UserError if the configuration's sizes do not fit together."""

    transformer: Any
    tokenizer: Any = None  # set by from_pretrained
    compute_dtype: torch.dtype | None = None  # of activations and products; None is the weights' dtype

    def __init__(self, config: GPTConfig):
        super().__init__()
        config.validate()
        vocab_size = config.vocab_size
        if vocab_size is None:
            raise UserError("vocab_size is not set: a model needs the size of its tokenizer's vocabulary")
        self.config = config = dataclasses.replace(config)  # crop_block_size must not change the caller's
        # nanoGPT's order of construction: it fixes which random numbers each weight draws, and the order of the
        # parameters in stored optimizer states
        modules: dict[str, nn.Module] = {"wte": nn.Embedding(vocab_size, config.n_embd)}
        self.positions = POSITIONS[config.pos_embedding](config)
        if self.positions.has_table:
            modules["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.max_ngram:
            modules["ngrams"] = NGramEmbedding(config)
        modules["norm_e"] = make_norm(config) if config.embedding_norm else nn.Identity()
        modules["drop"] = nn.Dropout(config.dropout)
        modules["h"] = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        modules["ln_f"] = make_norm(config)
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = Head(config.n_embd, vocab_size, config.logit_softcap)
        self.loss = NextTokenLoss()
        if config.tie_embeddings:
            self.transformer.wte.weight = self.lm_head.weight  # arXiv 1608.05859
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialization.

        | tensor                                  | distribution                    |
        |-----------------------------------------|---------------------------------|
        | embeddings, linear weights              | N(0, 0.02)                      |
        | c_proj, which adds to the residual      | N(0, 0.02 / sqrt(2 * n_layer))  |
        | biases, n-gram embeddings               | 0                               |
        | norm weights                            | 1                               |
        """
        children_first: list[nn.Module] = []
        self.apply(children_first.append)  # a tied weight is drawn twice, as in nanoGPT
        for module in children_first:
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
        if self.config.zero_init:
            self.init_projections_zero()

    def init_projections_zero(self) -> None:
        """Zero output projections: at first, blocks add nothing to the residual stream (modded-nanogpt, train_gpt.py).

        | tensor                                  | distribution                    |
        |-----------------------------------------|---------------------------------|
        | c_proj; an untied head                  | 0                               |
        | the token table of an untied head       | N(0, 1)                         |
        | c_attn, c_fc, c_gate                    | U(-a, a), a = sqrt(3 / C) / 2   |
        """
        if not self.config.tie_embeddings:
            nn.init.normal_(self.transformer.wte.weight)
            nn.init.zeros_(self.lm_head.weight)
        a = math.sqrt(3 / self.config.n_embd) / 2
        for name, p in self.transformer.h.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.zeros_(p)
            elif name.endswith(("c_attn.weight", "c_fc.weight", "c_gate.weight")):
                nn.init.uniform_(p, -a, a)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; non_embedding excludes positions and n-grams (the token table belongs to the head)."""
        n = sum(p.numel() for p in self.parameters())
        for table in ("wpe", "ngrams") if non_embedding else ():
            n -= self.transformer[table].weight.numel() if table in self.transformer else 0
        return n

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        logits_at: Tensor | None = None,
    ) -> tuple[Any, Tensor | None]:
        """Next-token logits, and the mean cross-entropy (nats) if targets are given.

        idx: (B, T) int64; targets: (B, T) int64, -1 is ignored. Returns (logits, loss):
        with targets (B, T, V) and a scalar; without (B, 1, V), the last position's, and None; with a cache
        (B, T, V). logits_at, (B,), asks for one position per row instead: (B, 1, V).
        Raises UserError if T exceeds block_size.
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise UserError(f"a sequence of {T} tokens exceeds the model's block_size={self.config.block_size}")
        pos = cache.begin(T) if cache is not None else torch.arange(T, device=idx.device)  # (T,) or (B, T)
        x = self.transformer.wte(idx)  # (B, T, C)
        if "ngrams" in self.transformer:
            x = x + self.transformer.ngrams(idx, *(cache.seen(idx) if cache is not None else ()))
        if "wpe" in self.transformer:
            x = x + self.transformer.wpe(pos)
        dtype = self.compute_dtype or x.dtype
        where = self.positions.prepare(pos, dtype)
        x = self.transformer.drop(self.transformer.norm_e(x.to(dtype)))
        for i, block in enumerate(self.transformer.h):
            x = block(x, where, cache.layer(i) if cache is not None else None)
        x = self.transformer.ln_f(x)
        if targets is not None:
            return self.loss(x, targets, self.lm_head)
        if logits_at is not None:
            x = x[torch.arange(B, device=x.device), logits_at][:, None]  # (B, 1, C)
        elif cache is None:
            x = x[:, -1:]  # the head is a large product: only for the position that is wanted
        return self.lm_head(x), None

    def crop_block_size(self, block_size: int) -> None:
        """Shortens the context, for example of pretrained weights. Raises UserError if it would grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise UserError(f"block_size={block_size} must be between 1 and the model's {self.config.block_size}")
        self.config.block_size = block_size
        if "wpe" in self.transformer:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
            wpe.num_embeddings = block_size

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> GPT:
        """Weights from the Hugging Face hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a folder in its format.

        override_args may set dropout. The tokenizer of the weights becomes the model's `tokenizer`, None if they have
        none. Raises UserError if the weights cannot be loaded or do not fit.
        """
        from ..interop.hf import load_pretrained

        if set(override_args or {}) - {"dropout"}:
            raise UserError(f"override_args may only set dropout, got {sorted(override_args or {})}")
        config, state, tokenizer = load_pretrained(model_type)
        model = cls(dataclasses.replace(config, **(override_args or {})))
        model.load_state_dict(state)
        model.tokenizer = tokenizer
        return model

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.Optimizer:
        """AdamW with weight decay on tensors of two or more dimensions (see training/optimizer.py)."""
        from ..training.optimizer import make_adamw

        return make_adamw(self, weight_decay, learning_rate, betas, fused=device_type == "cuda")

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Share of the device's peak that the model's arithmetic reaches (PaLM, arXiv 2204.02311, appendix B).

        fwdbwd_per_iter: sequences a step; dt: seconds a step; peak_flops: FLOP/s, by default an A100's in bfloat16.
        """
        cfg = self.config
        width = cfg.n_head * cfg.head_width
        flops_per_token = 6 * self.get_num_params() + 12 * cfg.n_layer * width * cfg.block_size
        return flops_per_token * cfg.block_size * fwdbwd_per_iter / dt / peak_flops

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Samples max_new_tokens tokens after idx, (B, T). Returns (B, T + max_new_tokens).

        Uses the last block_size tokens. Keys and values are cached until the text exceeds the context. Draws from
        torch's global generator and keeps all ties at the k-th logit. Call eval() first.
        """
        block_size, weight = self.config.block_size, self.lm_head.weight
        room = min(block_size, idx.size(1) + max_new_tokens)
        cache = KVCache(self.config, idx.size(0), room, idx.device, self.compute_dtype or weight.dtype)
        for _ in range(max_new_tokens):
            if idx.size(1) <= block_size:
                new = idx[:, cache.end :]  # at first the prompt, then one token
                logits, _ = self(new, cache=cache, logits_at=torch.full_like(idx[:, 0], new.size(1) - 1))
                cache.advance(new.size(1))
            else:  # the window moves, and with it every position
                logits, _ = self(idx[:, -block_size:])
            logits = logits[:, -1] / temperature  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            idx = torch.cat((idx, torch.multinomial(logits.softmax(dim=-1), num_samples=1)), dim=1)
        return idx
