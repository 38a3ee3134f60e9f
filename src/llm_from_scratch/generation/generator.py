"""Text from a model: prompts in, samples out, whole or streamed.

A prompt is read in one pass (Decoder.read), then each step computes the logits of one token per row (Decoder.step),
draws the next token of each row (Generator.next_tokens) and adds it to its text. sampling.py has the filters and the
draw, batch.py knows which rows are in the cache, text_stream.py turns tokens into text.

Shapes in comments: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checkpoint.load import load, load_hf
from ..config import GenerationConfig
from ..core.cache import KVCache
from ..core.model import GPT
from ..core.tokenizer import Tokenizer
from ..core.weights import build_model
from ..errors import UserError
from ..kernels.int8 import Linears, Quantize
from ..machine.device import resolve_device, resolve_dtype
from ..settings import check_types
from .batch import Batch, Overflow, rows_at_once
from .decode_step import DecodeStep, works_with_cache
from .row_sampler import Sampler, check_bias
from .speculative import Draft, SpeculativeBatch
from .text_stream import TextStream, unused_ids

ENDS_EVERY = 16  # steps after which a batch is searched for ended samples; each costs a wait for the device
NOT_FINITE = "the model's outputs are not finite: its weights are damaged, or its training diverged"


class Decoder:
    """A model that decodes: read() for prompts and whole sequences, step() for one new token per row.

    quantize="int8": linear layers multiply 8-bit integers, on a CPU. compiled: torch.compile the step; graphed: else,
    on CUDA, use CUDA graphs. say: receives a notice if fast decoding is not possible. Raises UserError.
    """

    def __init__(
        self,
        model: GPT,
        quantize: Quantize = "none",
        compiled: bool = False,
        graphed: bool = True,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ):
        self.model, self.linears = model, Linears(model, quantize, not compiled, say)
        self.device, self.dtype = self.linears.device, self.linears.dtype  # dtype: of activations and the cache
        self.recorded = DecodeStep(model, self.linears, compiled, graphed, say)
        self.cacheable = works_with_cache(model, self.linears)
        if not self.cacheable:
            say("decoding without a cache: with a cache, this model's forward gives different logits")

    @torch.inference_mode()
    def read(self, idx: Tensor, cache: KVCache | None = None, logits_at: Tensor | None = None) -> Tensor:
        """The model's own forward. idx: (B, T).

        Returns the logits of the last position, (B, 1, V). With a cache: of all positions, (B, T, V), or with
        logits_at, (B,), of one position per row, (B, 1, V).
        """
        with self.linears.computing():
            logits, _ = self.model(idx, cache=cache, logits_at=logits_at)
        return logits

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits, (B, V), for one new token per row, (B,): the same forward, recorded for one token and replayed."""
        return self.recorded(ids, cache)

    def slide(self, idx: Tensor) -> Tensor:
        """The same as read(idx), recorded too: for windows that move with every token."""
        return self.recorded.last(idx)[:, None]


@dataclass
class Completion:
    """One sample. text: the continuation of the prompt, up to its end; tokens: all tokens drawn for it."""

    text: str
    tokens: list[int]
    finish_reason: Literal["length", "stop"]
    seed: int
    prompt_tokens: list[int]


class Generator:
    """A model and its tokenizer, ready to generate.

    device, dtype: the model is converted to them; None leaves it unchanged. quantize: see Decoder. Raises UserError if
    the tokenizer has more tokens than the model.
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
                f"the {tokenizer.name} tokenizer has {tokenizer.vocab_size} ids, the model only {rows}: the "
                "model was trained with another tokenizer; name its data with --dataset"
            )
        self.model, self.tokenizer, self.quantize = model.to(device=device, dtype=dtype), tokenizer, quantize
        self.draft: Draft | None = None  # proposes tokens when one sample is decoded alone
        self.compiled, self.graphed = False, True  # see Decoder
        self._decoder: tuple[list[tuple[int, int]], Decoder] | None = None
        self._said: set[str] = set()
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

        which: best, last or a step. dataset: the data (name or folder) with the tokenizer, if the checkpoint has
        none.
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
    def decoder(self) -> Decoder:
        """Rebuilt when a parameter or buffer changes. Edits through `.data` and updates of torch's fused optimizers are
        not detected: call weights_changed() after them. Raises UserError."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        weights = [(0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors]
        if self._decoder is None or self._decoder[0] != weights:
            self._decoder = weights, Decoder(self.model, self.quantize, self.compiled, self.graphed, self._say)
        return self._decoder[1]

    def weights_changed(self) -> None:
        """The decoder is rebuilt before its next use."""
        self._decoder = None

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            print(line, file=sys.stderr)

    def encode(self, prompt: str | Sequence[int], allow_special: bool = False) -> list[int]:
        """Token ids of a prompt, which may already be ids. Raises UserError for an empty prompt or unknown ids."""
        ids = self.tokenizer.encode(prompt, allow_special) if isinstance(prompt, str) else prompt
        if not len(ids):
            raise UserError("the prompt is empty: a model continues a text, so give it at least one character")
        known = [int(i) for i in ids]
        unknown = [i for i in known if not 0 <= i < self.tokenizer.vocab_size or i in self.gaps]
        if unknown:
            raise UserError(f"token id {unknown[0]} is outside the vocabulary: 0 to {self.tokenizer.vocab_size - 1}")
        return known

    def ends(self, params: GenerationConfig) -> frozenset[int]:
        """The tokens that end a sample."""
        return frozenset() if params.ignore_eos else self.tokenizer.end_ids

    def check(self, params: GenerationConfig) -> None:
        """Raises UserError for settings out of range, and for a logit_bias on an id that is not a token."""
        check_types(params)
        params.validate()
        check_bias(params, self.tokenizer.vocab_size)

    @overload
    def generate(self, prompts: str, *, num_samples: Literal[1] = 1, seed: int = 1337, **settings: Any) -> str: ...

    @overload
    def generate(self, prompts: str, *, num_samples: int, seed: int = 1337, **settings: Any) -> str | list[str]: ...

    @overload
    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], *, seed: int = 1337, **settings: Any
    ) -> list[str]: ...

    @overload
    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], params: GenerationConfig, seed: int = 1337, **how: Any
    ) -> list[Completion]: ...

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
        **settings: Any,
    ) -> str | list[str] | list[Completion]:
        """With params: num_samples completions of every prompt (texts or token ids), in the order of the prompts.
        Without: the continuation of one prompt, or a list; settings: of GenerationConfig, such as max_new_tokens=40.

        Sample k of a prompt uses the seed seed + k. It is the same alone (that seed, num_samples=1) and in any batch.
        allow_special: parse special tokens in the prompts. sampler: another sampler, with one row per sample. Raises
        UserError for an empty prompt or one that the vocabulary cannot express.
        """
        if params is None:
            params = GenerationConfig(num_samples=1)
            for name, value in settings.items():
                setattr(params, name, value)
            given: Any = [prompts] if isinstance(prompts, str) else prompts
            how: dict[str, Any] = {"use_cache": use_cache, "overflow": overflow, "allow_special": allow_special}
            plain = [sample.text for sample in self.generate(given, params, seed, sampler=sampler, **how)]
            return plain[0] if isinstance(prompts, str) and len(plain) == 1 else plain
        if settings:
            raise UserError(f"{', '.join(settings)} cannot be combined with params: set it in the GenerationConfig")
        self.check(params)
        encoded = [self.encode(p, allow_special) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        rows = [(ids, (seed + k) % 2**63) for ids in encoded for k in range(params.num_samples)]
        longest = max(map(len, encoded), default=0) + params.max_new_tokens
        size = rows_at_once(self.model.config, longest, self.decoder.dtype, self.decoder.device)
        done: list[Completion] = []
        for at in range(0, len(rows), size):
            ids, seeds = (list(column) for column in zip(*rows[at : at + size], strict=True))
            part = sampler.select(torch.arange(at, at + len(ids))) if sampler else self._sampler(params, ids, seeds)
            with evaluating(self.model):
                batch = self._batch(ids, params.max_new_tokens, use_cache, overflow)
                ends = self.ends(params)
                texts = [TextStream(self.bytes_of, prompt[-1], params.stop, ends) for prompt in ids]
                every = 1 if params.stop else ENDS_EVERY if ends else params.max_new_tokens
                for _ in self._run(batch, part, texts, params.max_new_tokens, every):
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
        """The text of one sample in pieces, as it is generated. Joined, they equal generate()'s text for that seed."""
        params = params or GenerationConfig()
        self.check(params)
        return self._stream(self.encode(prompt, allow_special), params, seed % 2**63, overflow)

    def _stream(self, ids: list[int], params: GenerationConfig, seed: int, overflow: Overflow) -> Iterator[str]:
        text = TextStream(self.bytes_of, ids[-1], params.stop, self.ends(params))
        with evaluating(self.model):
            batch = self._batch([ids], params.max_new_tokens, True, overflow)
            sampler = self._sampler(params, [ids], [seed])
            for pieces in self._run(batch, sampler, [text], params.max_new_tokens):
                yield from filter(None, pieces)
        yield from filter(None, [text.finish()])

    def _batch(self, prompts: Sequence[Sequence[int]], steps: int, use_cache: bool, overflow: Overflow) -> Batch:
        decoder = self.decoder
        if self.draft is None or not (use_cache and decoder.cacheable) or len(prompts) > 1:
            return Batch(decoder, prompts, steps, use_cache, overflow)
        return SpeculativeBatch(decoder, prompts[0], steps, self.draft, self.tokenizer.vocab_size, overflow)

    def _run(
        self, batch: Batch, sampler: Sampler, texts: list[TextStream], steps: int, every: int = 1
    ) -> Iterator[list[str]]:
        """Decodes until every row has all its tokens or has ended. Yields the new text of each row, of `every` steps at
        a time, so that the host does not wait for the device in between.
        """
        live, drawn = list(range(len(texts))), []
        for step in range(1, steps + 1):
            look = step % every == 0 or step == steps
            drawn.append(self.next_tokens(batch, sampler, check=look or step == 1))
            if not look:
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
    def next_tokens(self, batch: Batch, sampler: Sampler, check: bool) -> Tensor:
        """Draws and appends one token per row; returns them, (B,)."""
        logits = batch.logits()  # (B, V): by Decoder.read for a prompt, then by Decoder.step
        ids = sampler.draw(self.choosable(logits, check))  # penalties, temperature, filters, a random number per row
        batch.append(ids)
        return ids

    def choosable(self, logits: Tensor, check: bool) -> Tensor:
        """The logits, (B, V), restricted to real tokens (no padding, no gaps). check: raise UserError if they are not
        finite."""
        if logits.size(1) > self.tokenizer.vocab_size:
            logits = logits[:, : self.tokenizer.vocab_size]
        if check and not logits.isfinite().all():
            raise UserError(NOT_FINITE)
        return logits.index_fill(1, self.unused, -math.inf) if len(self.unused) else logits

    def _sampler(self, params: GenerationConfig, prompts: list[list[int]], seeds: list[int]) -> Sampler:
        return Sampler(params, prompts, seeds, self.tokenizer.vocab_size, self.model.lm_head.weight.device)

    def _bytes_of(self, before: int, token: int) -> bytes:
        # with the previous token: some tokenizers write a space between two tokens that belongs to neither
        return self.tokenizer.decode_bytes([before, token])[len(self.tokenizer.decode_bytes([before])) :]


@contextlib.contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """The model in eval mode (no dropout); its previous mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
