"""The plan of a run: everything that is decided before its first step."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.adapter import Base
from ..checkpoint.store import Checkpoint
from ..config import Config
from ..core.adapters import trained_model
from ..core.dataset import SampleOrder, TokenData
from ..core.mixed import MixedOrder, Mixture
from ..core.remote import RemoteFile
from ..core.sizes import Sizes, sizes
from ..core.tokenfile import BackgroundScan
from ..core.tokenizer import Tokenizer
from ..machine.device import LARGE, Runtime
from .moments import optimizer_bytes, share_of
from .wrap import loss_is_chunked

HASHED = 1 << 30  # bytes of a split up to which the hash covers all tokens: a second or so
PIECE = 1 << 16  # tokens
KEPT = "memory: freed memory is kept for the next step; --keep_memory=False needs about a fifth less"
MANY_EPOCHS = 10  # from here on a small model starts to memorize the text


@dataclass(frozen=True)
class Plan:
    """Settings, data, weights and machine of a run, fitted to each other. What changes during the run is in Run."""

    config: Config
    runtime: Runtime
    folder: Path
    tokenizer: Tokenizer | None
    train_data: TokenData
    val_data: TokenData
    order: SampleOrder
    global_batch: int
    """Sequences per step, over all processes."""
    micro_batch: int
    """Sequences of one process in one forward pass, at the start of the run."""
    last_step: int
    """Steps after which the run ends."""
    keep_memory: bool = False
    """Whether a step's memory is kept for the next one."""
    start_step: int = 0
    weights: dict[str, Tensor] | None = None
    """Initial weights, unless they come from the seed."""
    base: Base | None = None
    """The model that an adapter is trained for, if one is."""
    resumed: Checkpoint | None = None
    prompt: list[int] = field(default_factory=list)
    """Token ids that the samples of --sample_interval continue; empty without samples."""
    notes: list[str] = field(default_factory=list)
    """Findings and decisions, one line each."""
    scans: list[BackgroundScan] = field(default_factory=list)
    """Checks of large data that run in the background during the first steps."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """The loaded tasks of eval_tasks."""
    reference: bytes | None = None
    """The reference of a resumed run with --loss=dpo; see preferences.py."""

    @property
    def micro_steps(self) -> int:
        """Forward passes of one process per step, at the start of the run."""
        return self.global_batch // self.runtime.world_size // self.micro_batch

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.config.model.block_size

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Parameters, FLOPs and bytes, with the micro-batch of the start."""
        return training_sizes(self.config, self.runtime, self.micro_batch)

    @property
    def keeps_more(self) -> bool:
        """Whether keep_memory makes a difference: a small model's memory is always kept."""
        return self.keep_memory and self.runtime.device.type == "cpu" and self.sizes.params >= LARGE

    @property
    def data_name(self) -> str:
        return self.train_data.name if isinstance(self.train_data, Mixture) else self.folder.as_posix()

    @property
    def hashes(self) -> tuple[str, str]:
        """Identify the training tokens, and the tokens of both splits."""
        return dataset_hashes(self.train_data, self.val_data)


def training_sizes(config: Config, runtime: Runtime, micro_batch: int) -> Sizes:
    """Parameters, FLOPs and bytes of training with micro-batches of this size, in one process."""
    model = trained_model(config)
    moments = optimizer_bytes(model, config.optimizer)
    recomputes, chunked = config.training.gradient_checkpointing, loss_is_chunked(config, micro_batch)
    found = sizes(config.model, micro_batch, runtime.dtype.itemsize, recomputes, moments, chunked, model)
    share = share_of(found.states, model, config.optimizer, runtime.shards)
    return replace(found, **{name: math.ceil(size) for name, size in share.items()})


@functools.lru_cache(maxsize=64)
def dataset_hashes(train: TokenData, val: TokenData) -> tuple[str, str]:
    """Hashes of the training split, and of both splits: of all tokens, or samples from all parts of a split above
    HASHED bytes."""
    digest, hashes = hashlib.sha256(), []
    for data in (train, val):
        digest.update(f"{len(data)} {[len(shard) for shard in data.shards]}".encode())
        stride = max(1, sum(shard.nbytes for shard in data.shards) // HASHED)
        for shard in [*data.shards, *data.marks]:
            pieces = -(-len(shard) // PIECE)
            if isinstance(shard, RemoteFile):
                digest.update(shard.sha256.encode())
                continue
            for piece in sorted({*range(0, pieces, stride), pieces - 1}):
                digest.update(shard[piece * PIECE : (piece + 1) * PIECE].tobytes())
        hashes.append(digest.hexdigest())
    return hashes[0], hashes[1]


def part_hashes(train: TokenData, val: TokenData) -> dict[str, str]:
    """Identify the tokens of each part of a mixture, by name."""
    if not isinstance(train, Mixture) or not isinstance(val, Mixture):
        return {}
    parts = zip(train.names, train.parts, val.parts, strict=True)
    return {part.name: dataset_hashes(own, theirs)[1] for part, own, theirs in parts}


def count_of(sizes: Sizes) -> str:
    """The number of parameters, and the share that trains if some are frozen."""
    share = f" ({sizes.trained:,} of them train: {sizes.trained / sizes.params:.2%})"
    return f"{sizes.params:,} parameters{share * (sizes.trained < sizes.params)}"


def describe(plan: Plan) -> list[str]:
    """The lines printed at the start: what will run, on what, and what was chosen for the machine."""
    model, runtime = plan.config.model, plan.runtime
    epochs = plan.last_step * plan.tokens_per_step / plan.train_data.positions
    return [
        *plan.notes,
        *(f"{name}: {text}" for name, text in runtime.reasons.items()),
        *([f"processes: {runtime.world_size} ({runtime.backend})"] if runtime.world_size > 1 else []),
        f"data: {plan.data_name}, {len(plan.train_data):,} training and {len(plan.val_data):,} validation tokens",
        f"model: {count_of(plan.sizes)}, vocabulary {model.vocab_size:,}, context {model.block_size}",
        f"tokens per iteration will be: {plan.tokens_per_step:,} ({plan.global_batch} sequences: "
        f"{runtime.world_size} x {plan.micro_steps} x {plan.micro_batch})",
        f"length: {plan.last_step:,} steps, {epochs:.2f} epochs",
        *(plan.order.lines(plan.last_step * plan.global_batch) if isinstance(plan.order, MixedOrder) else []),
        *([KEPT] if plan.keeps_more else []),
        *_doubts(plan, epochs),
    ]


def _doubts(plan: Plan, epochs: float) -> list[str]:
    """Notes for a model trained from scratch on too little text."""
    learned, tokens = plan.sizes.params - plan.sizes.embedding_params, len(plan.train_data)
    if plan.weights is not None or plan.config.training.eval_only:
        return []
    lines = []
    if learned > tokens:
        ways = "use a smaller model or more text" + (
            ", or a smaller vocabulary" if (plan.config.model.vocab_size or 0) > 1000 else ""
        )
        lines.append(f"note: {learned:,} parameters (no embeddings) exceed {tokens:,} training tokens: {ways}")
    if epochs > MANY_EPOCHS:
        lines.append(f"note: {epochs:.0f} epochs: the model may memorize the text; watch the val loss")
    return lines
