"""Text from a model: prompts in, samples out, whole or streamed.

decoding.py makes the logits, sampler.py draws from them, text.py turns what is drawn into text; here they meet.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..checkpoint.load import load, load_hf
from ..config import GenerationConfig
from ..core.model import GPT
from ..core.tokenizer import Tokenizer
from ..core.weights import build_model
from ..errors import UserError
from ..machine.device import resolve_device, resolve_dtype
from .batch import Batch, Overflow
from .decode_step import Forward, Quantize, packed_forward
from .row_sampler import Sampler, check_bias
from .text_stream import TextStream, unused_ids

if TYPE_CHECKING:
    from .speculative import Draft

CACHE_BYTES = 1 << 30  # samples whose caches take more than this are decoded in groups; the result is the same

NOT_FINITE = "the model's outputs are not finite: its weights are damaged, or its training diverged"


@dataclass
class Completion:
    """One sample. text is what follows the prompt, up to a stop text; tokens is all that was drawn for it."""

    text: str
    tokens: list[int]
    finish_reason: Literal["length", "stop"]
    seed: int
    prompt_tokens: list[int]


class Generator:
    """A model and its tokenizer, ready to write.

    device, dtype: where the model is moved and what its weights become; None leaves it as it is. quantize="int8":
    products of 8-bit integers, for a CPU (packed.py). Raises UserError where the tokenizer has more tokens than the
    model.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantize: Quantize = "none",
    ):
        rows = model.lm_head.weight.size(0)
        if tokenizer.vocab_size > rows:
            raise UserError(
                f"the {tokenizer.name} tokenizer has {tokenizer.vocab_size} tokens, the model only {rows}: it is not "
                "the one that the model was trained with; name the model's data with --dataset"
            )
        self.model, self.tokenizer, self.quantize = model.to(device=device, dtype=dtype), tokenizer, quantize
        self.draft: Draft | None = None  # what proposes tokens where one sample is decoded alone
        self.compiled, self.graphed = False, True  # the decode step: by torch.compile; else, on CUDA, as graphs
        self._packed: tuple[list[tuple[int, int]], Forward, str] | None = None
        self.gaps = frozenset(unused_ids(tokenizer))
        self.unused = torch.tensor(sorted(self.gaps), dtype=torch.long, device=model.lm_head.weight.device)
        self.bytes_of = functools.lru_cache(1 << 16)(self._bytes_of)

    @classmethod
    def from_checkpoint(
        cls,
        location: str | Path,
        which: str | int | None = None,
        dataset: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantize: Quantize = "none",
    ) -> Generator:
        """From an out_dir, a checkpoint directory or a nanoGPT ckpt.pt. Raises UserError.

        which: best, last or a step. dataset: the data (name or folder) whose tokenizer serves where there is none.
        """
        where = resolve_device(device)
        checkpoint = load(location, which, dataset, weights_only=True)
        assert checkpoint.tokenizer is not None  # load refuses a model without one
        model = build_model(checkpoint.model_config, checkpoint.model)
        return cls(model, checkpoint.tokenizer, where, resolve_dtype(dtype, where), quantize)

    @classmethod
    def from_pretrained(
        cls, name: str, device: str = "auto", dtype: str = "auto", quantize: Quantize = "none"
    ) -> Generator:
        """From the Hugging Face hub (gpt2, gpt2-medium, ...) or a folder in its format. Raises UserError."""
        where = resolve_device(device)
        loaded = load_hf(name)
        assert loaded.tokenizer is not None
        model = build_model(loaded.model_config, loaded.model).float()
        return cls(model, loaded.tokenizer, where, resolve_dtype(dtype, where), quantize)

    @property
    def forward(self) -> Forward:
        """The model's forward pass for decoding, made anew where its weights have changed, save by way of .data, of
        which a tensor does not tell. Raises UserError."""
        weights = [(0 if p.is_inference() else p._version, p.data_ptr()) for p in self.model.parameters()]
        if self._packed is None or self._packed[0] != weights:
            self._packed = (weights, *packed_forward(self.model, self.quantize, self.compiled, self.graphed))
        return self._packed[1]

    def encode(self, prompt: str | Sequence[int], allow_special: bool = False) -> list[int]:
        """Token ids of a prompt, which may be ids already. Raises UserError for an empty one or unknown ids."""
        ids = self.tokenizer.encode(prompt, allow_special) if isinstance(prompt, str) else prompt
        if not len(ids):
            raise UserError("the prompt is empty: a model continues a text, so give it at least one character")
        known = [int(i) for i in ids]
        unknown = [i for i in known if not 0 <= i < self.tokenizer.vocab_size or i in self.gaps]
        if unknown:
            raise UserError(f"token id {unknown[0]} is outside the vocabulary: 0 to {self.tokenizer.vocab_size - 1}")
        return known

    def check(self, params: GenerationConfig) -> None:
        """Raises UserError for settings out of range, and for a logit_bias of what is no token."""
        params.validate()
        check_bias(params, self.tokenizer.vocab_size)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: GenerationConfig | None = None,
        seed: int = 1337,
        *,
        use_cache: bool = True,
        overflow: Overflow = "recompute",
        allow_special: bool = False,
        sampler: Sampler | None = None,
    ) -> list[Completion]:
        """params.num_samples samples of every prompt (texts or token ids), prompt by prompt.

        Sample k of a prompt has the seed seed + k: it comes out the same alone (that seed, num_samples=1) and in any
        batch. allow_special: a special token written out in a prompt is that token. sampler: another way to draw, a
        row a sample. Raises UserError for an empty prompt or one that the vocabulary cannot express.
        """
        params = params or GenerationConfig()
        self.check(params)
        encoded = [self.encode(p, allow_special) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        rows = [(ids, (seed + k) % 2**63) for ids in encoded for k in range(params.num_samples)]
        size = self._rows_at_once(max(map(len, encoded), default=0) + params.max_new_tokens)
        done: list[Completion] = []
        for at in range(0, len(rows), size):
            ids, seeds = (list(column) for column in zip(*rows[at : at + size], strict=True))
            part = sampler.select(torch.arange(at, at + len(ids))) if sampler else self._sampler(params, ids, seeds)
            with evaluating(self.model):
                batch = self._batch(ids, params.max_new_tokens, use_cache, overflow)
                texts = [TextStream(self.bytes_of, prompt[-1], params.stop) for prompt in ids]
                for _ in self._run(batch, part, texts, params.max_new_tokens, watch=bool(params.stop)):
                    pass
            for text in texts:
                text.finish()
            done += [
                Completion(text.text, text.tokens, "stop" if text.stopped else "length", row_seed, prompt)
                for text, row_seed, prompt in zip(texts, seeds, ids, strict=True)
            ]
        return done

    def stream(
        self,
        prompt: str | Sequence[int],
        params: GenerationConfig | None = None,
        seed: int = 1337,
        *,
        overflow: Overflow = "recompute",
        allow_special: bool = False,
    ) -> Iterator[str]:
        """The text of one sample in pieces, as it is drawn: together they are generate()'s text for that seed."""
        params = params or GenerationConfig()
        self.check(params)
        return self._stream(self.encode(prompt, allow_special), params, seed % 2**63, overflow)

    def _stream(self, ids: list[int], params: GenerationConfig, seed: int, overflow: Overflow) -> Iterator[str]:
        text = TextStream(self.bytes_of, ids[-1], params.stop)
        with evaluating(self.model):
            batch = self._batch([ids], params.max_new_tokens, True, overflow)
            sampler = self._sampler(params, [ids], [seed])
            for pieces in self._run(batch, sampler, [text], params.max_new_tokens, watch=True):
                yield from filter(None, pieces)
        yield from filter(None, [text.finish()])

    def _batch(self, prompts: Sequence[Sequence[int]], steps: int, use_cache: bool, overflow: Overflow) -> Batch:
        if self.draft is None or not use_cache or len(prompts) > 1:
            return Batch(self.model, prompts, steps, use_cache, overflow, self.forward)
        from .speculative import SpeculativeBatch  # a leaf: decoding stands without it

        known = self.tokenizer.vocab_size
        return SpeculativeBatch(self.model, prompts[0], steps, self.draft, known, overflow, self.forward)

    def _run(
        self, batch: Batch, sampler: Sampler, texts: list[TextStream], steps: int, watch: bool
    ) -> Iterator[list[str]]:
        """Decodes until every row has its tokens or its stop text, and yields what the rows' texts have gained.

        watch: read the tokens after every step, not all at the end, which spares a wait for the device.
        """
        live, drawn = list(range(len(texts))), []
        for step in range(1, steps + 1):
            drawn.append(self._step(batch, sampler, check=watch or step in (1, steps)))
            if not watch and step < steps:
                continue
            yield [
                "".join([texts[row].push(token) for token in column])
                for row, column in zip(live, torch.stack(drawn, dim=1).tolist(), strict=True)
            ]
            drawn.clear()
            stay = [i for i, row in enumerate(live) if not texts[row].stopped]
            if not stay:
                return
            if len(stay) < len(live) and step < steps:
                live = [live[i] for i in stay]
                batch.keep(stay)
                sampler = sampler.select(torch.tensor(stay))

    @torch.inference_mode()
    def _step(self, batch: Batch, sampler: Sampler, check: bool) -> Tensor:
        """Draws and appends one token a row; returns them, (B,)."""
        ids = sampler(self.choosable(batch.logits(), check))
        batch.append(ids)
        return ids

    def choosable(self, logits: Tensor, check: bool) -> Tensor:
        """The logits, (B, V), of what is a token: neither padding nor a gap. check: raises UserError for nan."""
        if logits.size(1) > self.tokenizer.vocab_size:
            logits = logits[:, : self.tokenizer.vocab_size]
        if check and not logits.isfinite().all():
            raise UserError(NOT_FINITE)
        return logits.index_fill(1, self.unused, -math.inf) if len(self.unused) else logits

    def _sampler(self, params: GenerationConfig, prompts: list[list[int]], seeds: list[int]) -> Sampler:
        return Sampler(params, prompts, seeds, self.tokenizer.vocab_size, self.model.lm_head.weight.device)

    def _bytes_of(self, before: int, token: int) -> bytes:
        # with the token before it: some tokenizers write a space between two tokens that neither of them holds
        return self.tokenizer.decode_bytes([before, token])[len(self.tokenizer.decode_bytes([before])) :]

    def _rows_at_once(self, length: int) -> int:
        """How many rows of so many tokens fit into CACHE_BYTES, or into a quarter of a GPU's free memory."""
        config, weight = self.model.config, self.model.lm_head.weight
        size = getattr(self.forward, "dtype", weight.dtype).itemsize  # of the cache's numbers
        heads = (config.n_kv_head or config.n_head) / config.n_head
        row = 2 * config.n_layer * config.n_embd * heads * min(length, config.block_size) * size
        free = torch.cuda.mem_get_info(weight.device)[0] // 4 if weight.device.type == "cuda" else CACHE_BYTES
        return max(1, int(free / row))


@contextlib.contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """No dropout within; the model's mode is given back after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
