"""A GPT's forward pass for decoding: the arithmetic of core/model.py with little around it.

A token of a small model takes longer in Python and in the dispatch of operations than in arithmetic, and one of a large
model as long as its weights take to be read. Here a layer is a dozen operations on tensors that lie ready; a matrix is
stored the way that one row multiplies fastest, if wanted in half precision or in int8; the last layer computes only
the positions whose logits are asked for. core/model.py stays the model: what is packed must give its logits on a trial,
else that model, changed in a way that is unknown here, decodes by its own forward.

Shapes as in core/model.py; N = B * T rows, G = H / Hkv query heads that share a key head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import GPTConfig
from ..core.cache import KVCache
from ..core.model import (
    GPT,
    POSITIONS,
    Attention,
    CausalSelfAttention,
    GatedMLP,
    LayerNorm,
    RMSNorm,
    rotary_angles,
)
from ..errors import UserError
from ..kernels.int8 import Dense, Half, Int8, has_half, has_int8
from ..machine.device import cpu_has_native_bf16
from .cuda_graphs import GraphedStep

Quantize = Literal["none", "int8"]
BUCKET = 64  # keys by which the part of the cache that is looked at grows
SMALL = 1 << 12  # numbers
TRIAL = 64  # tokens
Forward = Callable[..., Tensor]  # (idx, cache=None, logits_at=None) -> logits, as GPT.forward without targets


def plain_forward(model: GPT) -> Forward:
    """The model's own forward in the form of Packed."""
    return lambda idx, cache=None, logits_at=None: model(idx, cache=cache, logits_at=logits_at)[0]


def packed_forward(
    model: GPT, quantize: Quantize = "none", compiled: bool = False, graphed: bool = True
) -> tuple[Forward, str]:
    """The fastest forward that computes this model, and what it is, in words. compiled: torch.compile its decode step;
    graphed: else, on CUDA, record it.

    quantize="int8": weights of all linear layers in int8, a scale for each output; activations too, a scale for all,
    anew for each product (fbgemm's and qnnpack's dynamic quantization). Raises UserError where the device has none.
    """
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    if quantize == "int8" and not (device.type == "cpu" and has_int8()):
        raise UserError(f"quantize=int8 is for a CPU with fbgemm or qnnpack, not for {device}: leave it out")
    kind: type[Dense] | type[Half] | type[Int8] = Dense
    if quantize == "int8":
        kind = Int8
    elif device.type == "cpu" and has_half() and (
        dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_native_bf16())
    ):  # fmt: skip
        kind = Half
    try:
        right = agrees(Packed(model, Dense, dtype), model)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:  # modules that are not those known here
        right, _ = False, error
    if not right:
        if quantize != "none":
            raise UserError("quantize=int8 knows the model of core/model.py only, and this one computes otherwise")
        if compiled:
            model.compile(dynamic=True)
        return plain_forward(model), "its own forward"
    packed = Packed(model, kind, dtype if kind is Dense else torch.float32)
    if compiled:
        packed.step = torch.compile(packed.step)  # type: ignore[method-assign]
    elif device.type == "cuda" and graphed:
        packed.step = GraphedStep(packed.step, pool=torch.cuda.graph_pool_handle())  # type: ignore[method-assign]
    return packed, {Dense: "packed", Half: "packed, products from float16", Int8: "packed, int8"}[kind]


Linear = Callable[..., Tensor]


@dataclass
class _Layer:
    norm_1: Callable[[Tensor], Tensor]
    qkv: Linear
    rotate: Callable[..., Tensor]
    """(x, cos, sin) of all heads, (..., H + 2 Hkv, D): QK-norm and rotation."""
    out: Linear
    norm_2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor, Tensor], Tensor]


class Packed:
    """A model's weights as decoding wants them. Called as GPT.forward is, without targets; returns the logits.

    kind: how linear layers multiply. dtype: of activations and cache. Later changes of the weights may go unseen.
    """

    def __init__(self, model: GPT, kind: Callable[..., Linear], dtype: torch.dtype):
        config = self.config = model.config
        self.model, self.dtype, self.device = model, dtype, model.lm_head.weight.device
        self.H, self.Hkv = config.n_head, config.n_kv_head or config.n_head
        self.D, self.C = config.n_embd // config.n_head, config.n_embd
        parts = model.transformer
        self.wte, self.wpe = parts.wte.weight.detach(), parts.wpe.weight.detach() if "wpe" in parts else None
        self.ngrams = parts.ngrams if "ngrams" in parts else None
        self.norm_e = _norm(parts.norm_e, dtype)
        self.cos, self.sin = self._angles()
        self.steps = torch.arange(config.block_size, device=self.device)
        self.layers = [self._layer(block, kind) for block in parts.h]
        self.norm_f = _norm(parts.ln_f, dtype)
        self.lm_head = _linear(model.lm_head, kind, dtype, head=True)

    def _angles(self) -> tuple[Tensor | None, Tensor | None]:
        """Cosines and signed sines for every position, (block_size, 1, D)."""
        if self.wpe is not None:
            return None, None
        positions = torch.arange(self.config.block_size, device=self.device)
        cos, sin = rotary_angles(positions, self.D, self.config.rope_theta)  # (1, T, D/2)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.transpose(0, 1).to(self.dtype), sin.transpose(0, 1).to(self.dtype)

    def _layer(self, block: Any, kind: Callable[..., Linear]) -> _Layer:
        attn: CausalSelfAttention = block.attn
        if type(attn.attend) is not Attention or type(attn.positions) not in POSITIONS.values():
            raise TypeError("attention is computed otherwise than in core/model.py")
        act, down = block.mlp.act, _linear(block.mlp.c_proj, kind, self.dtype)
        up = _linear(block.mlp.c_fc, kind, self.dtype)
        if isinstance(block.mlp, GatedMLP):
            gate = _linear(block.mlp.c_gate, kind, self.dtype)
            mlp = lambda h, x: down(act(gate(h), up(h)), x)  # noqa: E731
        else:
            plain = _activation(act)
            mlp = lambda h, x: down(plain(up(h)), x)  # noqa: E731
        return _Layer(
            _norm(block.ln_1, self.dtype),
            _linear(attn.c_attn, kind, self.dtype),
            self._rotation(attn),
            _linear(attn.c_proj, kind, self.dtype),
            _norm(block.ln_2, self.dtype),
            mlp,
        )

    def _rotation(self, attn: CausalSelfAttention) -> Callable[..., Tensor]:
        """What happens to queries and keys after their projection: (..., H + 2 Hkv, D), changed in place."""
        H, Hkv, half = self.H, self.Hkv, self.D // 2
        q_norm, k_norm = _norm(attn.q_norm, self.dtype), _norm(attn.k_norm, self.dtype)
        normed, rotated = not isinstance(attn.q_norm, torch.nn.Identity), self.wpe is None

        def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
            if normed:
                q, k = x[..., :H, :], x[..., H : H + Hkv, :]
                q.copy_(q_norm(q))
                k.copy_(k_norm(k))
            if rotated:
                qk = x[..., : H + Hkv, :]
                swapped = torch.cat((qk[..., half:], qk[..., :half]), dim=-1)
                torch.mul(qk, cos, out=qk).addcmul_(swapped, sin)  # type: ignore[arg-type]
            return x

        return rotate if normed or rotated else lambda x, cos, sin: x

    @torch.inference_mode()
    def __call__(self, idx: Tensor, cache: KVCache | None = None, logits_at: Tensor | None = None) -> Tensor:
        """idx: (B, T). Without a cache the last position's logits, (B, 1, V); with one all, (B, T, V); logits_at, (B,),
        asks for one position a row: (B, 1, V)."""
        B, T = idx.shape
        if cache is not None and cache.end and T == 1:
            return self._decode(idx, cache)
        if T > self.config.block_size:
            raise UserError(f"a sequence of {T} tokens exceeds the model's block_size={self.config.block_size}")
        pos = cache.begin(T) if cache is not None else self.steps[:T]  # (T,) or (B, T)
        x = self._embed(idx, pos, cache).view(B * T, self.C)
        cos, sin = (self.cos[pos], self.sin[pos]) if self.cos is not None and self.sin is not None else (None, None)
        narrow = cache is None or logits_at is not None
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norm_1(x)).view(B, T, -1, self.D)  # (B, T, H + 2 Hkv, D)
            qkv = layer.rotate(qkv, cos, sin).transpose(1, 2)
            q, k, v = qkv.split((self.H, self.Hkv, self.Hkv), dim=1)  # (B, H or Hkv, T, D)
            mask = None
            if cache is not None:
                k, v, mask = cache.layer(i).update(k, v)  # (B, Hkv, S, D)
            if narrow and i == len(self.layers) - 1:  # of the last layer only what is asked for
                q, mask, x = self._at(q, mask, x.view(B, T, self.C), logits_at)
            causal = mask is None and q.size(2) > 1
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.H != self.Hkv
            )  # (B, H, T or 1, D)
            x = layer.out(y.transpose(1, 2).reshape(-1, self.C), x)
            x = layer.mlp(layer.norm_2(x), x)
        return self._head(x).view(B, -1, self.lm_rows)

    def _at(self, q: Tensor, mask: Tensor | None, x: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries, mask and stream of one position a row; None is the last."""
        if at is None:
            return q[:, :, -1:], None if mask is None else mask[:, :, -1:], x[:, -1]
        B, T = x.shape[:2]
        rows = torch.arange(B, device=x.device)
        if mask is None:
            mask = (self.steps[:T] <= at[:, None])[:, None, None]  # (B, 1, 1, T)
        else:
            mask = mask.expand(B, -1, -1, -1)[rows, :, at][:, :, None]  # (B, 1, 1, S)
        return q[rows, :, at][:, :, None], mask, x[rows, at]

    def _embed(self, idx: Tensor, pos: Tensor, cache: KVCache | None) -> Tensor:
        """The stream that enters the first layer, (B, T, C). pos: (T,) or (B, T)."""
        x = torch.embedding(self.wte, idx)
        if self.ngrams is not None:
            x = x + self.ngrams(idx, *(cache.seen(idx) if cache is not None else ()))
        if self.wpe is not None:
            x = x + torch.embedding(self.wpe, pos)
        return self.norm_e(x.to(self.dtype))

    @property
    def lm_rows(self) -> int:
        return self.model.lm_head.weight.size(0)

    def _head(self, x: Tensor) -> Tensor:
        logits = self.lm_head(self.norm_f(x))
        if cap := self.config.logit_softcap:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _decode(self, idx: Tensor, cache: KVCache) -> Tensor:
        """One new token a row: (B, 1) to (B, 1, V)."""
        if cache.end >= cache.max_len:
            raise ValueError(f"{cache.end} cached + 1 new tokens exceed the cache's max_len={cache.max_len}")
        view = Window.of(cache)
        lengths = cache.lengths
        if self.ngrams is not None:
            cache.positions = lengths[:, None]  # which cache.seen() reads
        x = self._embed(idx, lengths[:, None], cache).view(idx.size(0), self.C)
        where, mask = view.step(lengths, cache.end, cache.ragged)
        return self.step(x, lengths, where, mask, view.memory, view.keys, view.values)

    def step(
        self,
        x: Tensor,
        positions: Tensor,
        where: Tensor,
        mask: Tensor,
        memory: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        """The layers and the head for one token a row: (B, C) to (B, 1, V). The rest is what Window has; positions:
        (B,)."""
        B, D, H = len(x), self.D, self.H
        cos, sin = None, None
        if self.cos is not None and self.sin is not None:
            cos, sin = self.cos[positions], self.sin[positions]  # (B, 1, D)
        scale = 1 / math.sqrt(D)
        for i, layer in enumerate(self.layers):
            qkv = layer.rotate(layer.qkv(layer.norm_1(x)).view(B, -1, D), cos, sin)  # (B, H + 2 Hkv, D)
            memory[i].index_copy_(0, where, qkv[:, H:].reshape(-1, D))
            q = qkv[:, :H].reshape(B * self.Hkv, -1, D)  # (B Hkv, G, D)
            weights = torch.baddbmm(mask, q, keys[i], alpha=scale).softmax(-1)  # (B Hkv, G, S)
            x = layer.out(torch.bmm(weights, values[i]).view(B, self.C), x)
            x = layer.mlp(layer.norm_2(x), x)
        return self._head(x).view(B, 1, -1)


class Scorer(torch.nn.Module):
    """A forward for decoding, asked for losses as a model is: (idx, targets), (B, T) each, to (logits, loss)."""

    def __init__(self, config: GPTConfig, forward: Forward):
        super().__init__()
        self.config, self.passes = config, forward

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        dtype = getattr(self.passes, "dtype", torch.float32)
        cache = KVCache(self.config, idx.size(0), idx.size(1), idx.device, dtype)  # with which it gives all logits
        logits = self.passes(idx, cache=cache)
        return logits, F.cross_entropy(logits.flatten(0, -2).float(), targets.reshape(-1), ignore_index=-1)


class Window:
    """The part of a cache that a decode step looks at: views that serve until the longest row outgrows them."""

    def __init__(self, cache: KVCache):
        L, _, room, heads, max_len, width = cache.kv.shape
        self.kv, self.rows, self.size = cache.kv, cache.rows, min(max_len, BUCKET * (cache.end // BUCKET + 1))
        self.memory = [cache.kv[i].view(-1, width) for i in range(L)]  # (2 room Hkv max_len, D)
        used = cache.kv[:, :, : self.rows].flatten(2, 3)[:, :, :, : self.size]  # (L, 2, B Hkv, S, D)
        self.keys = [used[i, 0].transpose(1, 2) for i in range(L)]
        self.values = [used[i, 1] for i in range(L)]
        device, dtype = cache.kv.device, cache.kv.dtype
        which, row, head = (torch.arange(n, device=device) for n in (2, self.rows, heads))
        base = (which[None, :, None] * room + row[:, None, None]) * heads + head  # (B, 2, Hkv)
        self.base = (base * max_len).flatten(1)
        self.heads, self.places = heads, torch.arange(self.size, device=device)
        self.seen, self.hidden = torch.zeros((), device=device, dtype=dtype), torch.tensor(-math.inf, device=device)
        self.hidden = self.hidden.to(dtype)
        self.mask, self.shown = torch.empty(0), -1

    @staticmethod
    def of(cache: KVCache) -> Window:
        view: Window | None = getattr(cache, "window", None)
        if view is None or view.kv is not cache.kv or view.rows != cache.rows or cache.end >= view.size:
            view = Window(cache)
            cache.window = view  # type: ignore[attr-defined]
        return view

    def step(self, lengths: Tensor, end: int, ragged: bool) -> tuple[Tensor, Tensor]:
        """Where the new keys and values go, (2 B Hkv,), and the mask that is added to the scores, (B Hkv or 1, 1, S).

        lengths: (B,), before the new token; end: the longest of them; ragged: whether they differ.
        """
        where = (self.base + lengths[:, None]).view(-1)
        if ragged:
            self.shown = -1
            mask = torch.where(self.places <= lengths[:, None], self.seen, self.hidden)  # (B, S)
            return where, mask.repeat_interleave(self.heads, dim=0)[:, None]
        if self.shown == end and end:
            self.mask[..., end] = 0
        else:
            self.mask = torch.where(self.places <= end, self.seen, self.hidden)[None, None]
        self.shown = end + 1
        return where, self.mask


def _linear(module: Any, kind: Callable[..., Linear], dtype: torch.dtype, head: bool = False) -> Linear:
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    if kind is Dense:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return kind(weight, bias, head)


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    """The activation function; of few numbers GELU is faster in parts (torch 2.13 on a CPU: 8 us against 15)."""
    if type(module) is not torch.nn.GELU or module.approximate != "none":
        return module.forward

    def gelu(x: Tensor) -> Tensor:
        if x.numel() > SMALL or x.device.type != "cpu":
            return F.gelu(x)
        half = x * 0.5
        return torch.addcmul(half, half, (x * math.sqrt(0.5)).erf_())

    return gelu


def _norm(module: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A norm without a module around it. Raises TypeError for one that is not known here."""
    if isinstance(module, torch.nn.Identity):
        return lambda x: x
    weight, shape, eps = module.weight.detach().to(dtype), module.weight.shape, module.eps
    if type(module) is LayerNorm:
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    if type(module) is RMSNorm:
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    raise TypeError(f"{type(module).__name__} is no norm of core/model.py")


@torch.inference_mode()
def agrees(packed: Packed, model: GPT) -> bool:
    """Whether both give the same logits on some tokens, read at once, then one more."""
    config, device = model.config, model.lm_head.weight.device
    n = min(TRIAL, config.block_size)
    ids = torch.randint(int(config.vocab_size or 1), (n,), generator=torch.Generator().manual_seed(0)).to(device)
    read = ids[None, : max(1, n - 1)]
    training, found = model.training, []
    model.eval()
    try:
        for forward in (packed, plain_forward(model)):
            cache = KVCache(config, 1, n, device, packed.dtype)
            logits = [forward(read, cache)]
            cache.advance(read.size(1))
            if n > 1:
                logits.append(forward(ids[None, n - 1 :], cache))
            logits.append(forward(ids[None]))
            found.append(torch.cat(logits, dim=1).float())
    finally:
        model.train(training)
    ours, theirs = found
    allowed = 1e-3 if packed.dtype == torch.float32 else 0.05
    return bool((ours - theirs).norm() <= allowed * theirs.norm())
