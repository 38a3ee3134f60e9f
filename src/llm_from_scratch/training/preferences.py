"""Direct preference optimization (DPO, arXiv 2305.18290): a model learns to prefer the chosen answer of each pair to
the rejected one, compared with itself at the start of the run.

The loss of a pair is -log sigmoid(beta (m - m0)), where m is the log-probability of the chosen answer minus that of the
rejected one, and m0 the same of the reference, which is computed once and stored in every checkpoint. The answers of a
pair share a row of packed documents. Shapes: B rows, T positions, P pairs of the fullest row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint.contents import REFERENCE
from ..config import FinetuneConfig
from ..core.cache import Documents
from ..core.dataset import TokenData
from ..core.model import GPT, Head, NextTokenLoss
from ..core.packing import PackedData, best_fit
from ..core.tokenfile import Shards
from ..core.weights import file_of
from ..errors import DataError, UserError, one_line
from ..machine.files import read_file
from .evaluate import windows_at_once

MAX_FILE = 1 << 31  # bytes


class PreferenceData(PackedData):
    """A split of pairs, chosen before rejected. The answers of a pair are neighbours in a row, with their prompt."""

    of_pairs = True
    margins: np.ndarray | None = None
    """m0 of each pair, in the order of the rows. None: 0, as for a measurement of speed."""

    def __init__(self, shards: Shards, name: str, block_size: int, end_id: int | None = None, marks: Shards = ()):
        TokenData.__init__(self, shards, name)
        self.marks, self.block_size = marks, block_size
        begins, ends = self.find_documents(end_id)
        if len(begins) % 2:
            raise DataError(f"{name}: {len(begins)} answers are not pairs; prepare the data again")
        sizes = (ends - begins - 1).reshape(-1, 2).sum(1)
        fitting = np.flatnonzero(sizes <= block_size)
        self.documents, self.cropped = len(sizes), len(sizes) - len(fitting)
        if not len(fitting):
            needed = f"the shortest pair needs {sizes.min():,} tokens (the prompt counts twice)"
            raise UserError(f"{name}: no pair fits into block_size={block_size}: {needed}; use a larger --block_size")
        order, first = best_fit(sizes[fitting], block_size)
        both = (2 * fitting[order][:, None] + np.arange(2)).reshape(-1)
        self.begins, self.lengths, self.first = begins[both], (ends - begins)[both], 2 * first
        self.learned = np.diff(first)  # pairs of each row, by which the loss is averaged
        self.keep_in_memory()

    def batch(self, starts: np.ndarray, *others: Any) -> list[np.ndarray]:
        """As of PackedData, and m0 of the pairs in each row, (B, P), NaN if there are fewer."""
        found, mine = super().batch(starts, *others), starts[others[1]]
        margins = np.full((len(mine), int(self.learned.max())), np.nan, np.float32)
        for row, number in enumerate(mine):
            pairs = slice(self.first[number] // 2, self.first[number + 1] // 2)
            margins[row, : self.learned[number]] = 0.0 if self.margins is None else self.margins[pairs]
        return [*found, margins]

    def summary(self) -> str:
        rows, padding = len(self.learned), 1 - (self.lengths - 1).sum() / self.positions
        return (
            f"{self.documents - self.cropped:,} pairs in {rows:,} windows of {self.block_size}, {padding:.1%} of "
            f"positions are padding; {self.cropped:,} pairs are too long and are left out (--block_size)"
        )


class PreferenceLoss(NextTokenLoss):
    """The mean of the pairs' losses. Called for documents without m0, it returns m of each pair instead, (B, P)."""

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta
        self.documents: Documents | None = None

    def note(self, model: Any, args: tuple[Any, ...]) -> None:
        self.documents = args[2] if len(args) > 2 and isinstance(args[2], Documents) else None

    def forward(self, x: Tensor, targets: Tensor, head: Head) -> tuple[Tensor | None, Tensor]:
        if self.documents is None:  # a comparison of kernels
            return super().forward(x, targets, head)
        numbers, margins = self.documents.numbers, self.documents.margins
        pairs = (int(numbers.max()) + 1) // 2 if margins is None else margins.size(1)
        learned = targets >= 0
        nats = F.cross_entropy(head(x[learned]).float(), targets[learned], reduction="none")
        answers = 2 * pairs * torch.arange(len(x), device=x.device)[:, None] + numbers  # (B, T)
        sums = nats.new_zeros(len(x) * 2 * pairs).index_add(0, answers[learned], -nats).view(-1, pairs, 2)
        m = sums[..., 0] - sums[..., 1]
        if margins is None:
            return None, m
        losses = -F.logsigmoid(self.beta * (m - margins.nan_to_num()))
        is_pair = ~margins.isnan()
        return None, (losses * is_pair).sum() / is_pair.sum()


def use_preferences(model: GPT, settings: FinetuneConfig) -> None:
    """Gives the model the loss of pairs, if the run learns from them."""
    if settings.loss == "dpo" and not isinstance(model.loss, PreferenceLoss):
        model.loss = loss = PreferenceLoss(settings.dpo_beta)
        model.register_forward_pre_hook(loss.note)


def add_reference(run: Any) -> None:
    """Gives the pairs of a Run m0, of the model at its start: computed, or that of its checkpoint if it is resumed.
    Raises UserError if a resumed run's is gone, damaged, or of other data."""
    plan = run.plan
    if plan.config.finetune.loss != "dpo":
        return
    splits: dict[str, Any] = {"train": plan.train_data, "val": plan.val_data}
    identity = f"{plan.hashes[1]} {plan.config.model.block_size}"
    if run.config.training.init_from == "resume":
        found = _stored(plan.reference, run.out_dir, plan.start_step, identity, splits)
    else:
        pairs = sum(int(data.learned.sum()) for data in splits.values())
        run.say(f"reference: computing the log-probabilities of {pairs:,} pairs")
        found = {name: _margins(run, data) for name, data in splits.items()}
    run.saver.reference = b"".join(file_of(found, data=identity))
    for name, data in splits.items():
        data.margins = found[name].numpy()


def _stored(
    content: bytes | None, out_dir: Path, step: int, identity: str, splits: dict[str, Any]
) -> dict[str, Tensor]:  # fmt: skip
    """m0 from a step's checkpoint, or from the run's folder if it was made before checkpoints had it."""
    path = out_dir / REFERENCE if content is None else out_dir / f"step-{step:08d}" / REFERENCE
    try:
        content = read_file(path, MAX_FILE) if content is None else content
        found = load(content)
        expected = {name: (int(data.learned.sum()),) for name, data in splits.items()}
        is_same = {name: tuple(t.shape) for name, t in found.items()} == expected and identity.encode() in content
        if is_same and all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in found.values()):
            return found
        reason = "it belongs to other data"
    except (OSError, ValueError, SafetensorError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
    raise UserError(
        f"{path}, the reference of this run, cannot be used ({reason}): restore it, or start a new run from the "
        f"weights (--init_from={out_dir}, another --out_dir)"
    )


@torch.no_grad()
def _margins(run: Any, data: PreferenceData) -> Tensor:
    """m of the pairs, in the order of the rows."""
    rows, found = np.arange(len(data.learned)), []
    size, was_training = windows_at_once(run.model, data.block_size), run.model.training
    run.model.eval()
    for at in range(0, len(rows), size):
        if run.stop.agree(run.stop.signum is not None):
            raise KeyboardInterrupt  # nothing is trained yet
        (x, y), numbers, *_ = data.batch(rows, data.block_size, slice(at, at + size))
        idx, targets, documents = (torch.from_numpy(part).to(run.runtime.device) for part in (x, y, numbers))
        with run.runtime.autocast():
            _, m = run.model(idx, targets, *Documents.of([documents], run.model))
        counts = torch.from_numpy(data.learned[at : at + size]).to(m.device)
        found.append(m[torch.arange(m.size(1), device=m.device) < counts[:, None]].float().cpu())
    run.model.train(was_training)
    return torch.cat(found)
