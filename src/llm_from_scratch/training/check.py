"""Mistakes that can be found without torch, which takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.load import is_pretrained
from ..checkpoint.store import find_checkpoint
from ..config import Config
from ..core.dataset import TokenData, read_manifest, resolve_dataset
from ..core.mixed import Mixture
from ..core.tokenizer import Tokenizer, tokenizer_of
from ..errors import SharedError, UserError, shared_by_all
from ..machine.extras import require
from ..machine.files import check_writable
from ..machine.processes import distributed_env
from ..mixture import Part, read_mixture
from .loggers import check_extras

SMALL = 1 << 26  # bytes of a split whose ids are checked at once


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a run."""

    folders: tuple[Path, ...]
    """Folders of the dataset, or of the parts of a mixture."""
    tokenizer: Tokenizer | None
    vocab_size: int | None
    """Ids of the data; None if neither a tokenizer nor a manifest gives it."""
    train_data: TokenData
    val_data: TokenData
    global_batch: int
    """Sequences of an update, which every process gets an equal share of."""
    documents: bool
    """Whether windows are made of whole documents."""

    @property
    def folder(self) -> Path:
        return self.folders[0]


def check(config: Config) -> Inputs:
    """Finds the mistakes in settings, machine and data that can be found without torch. init_from=auto is resolved
    before. Writes nothing. Raises UserError."""
    init_from = config.training.init_from
    with shared_by_all():
        config.validate()
    if init_from == "scratch" and config.finetune.lora_rank is not None:
        raise SharedError("lora_rank trains an adapter of an existing model: name it with --init_from=FOLDER")
    check_extras(config)
    if config.training.eval_tasks is not None:
        require("lm_eval", "eval", "--eval_tasks")
    if not config.training.eval_only:
        check_writable(Path(config.training.out_dir))
    _, _, world_size = distributed_env()
    global_batch = config.data.batch_size * config.training.gradient_accumulation_steps
    if global_batch % world_size:
        counts = ", ".join(str(count) for count in range(1, global_batch + 1) if global_batch % count == 0)
        raise SharedError(
            f"the global batch of batch_size * gradient_accumulation_steps = {global_batch} sequences is not divisible "
            f"by {world_size} processes: start {counts} processes (same batches), or make it a multiple of {world_size}"
        )
    share, micro_batch = global_batch // world_size, config.data.micro_batch
    if isinstance(micro_batch, int) and share % micro_batch:
        raise SharedError(
            f"micro_batch={micro_batch} does not divide the {share} sequences per process and step; choose a "
            "divisor, or auto"
        )
    mixture = read_mixture(config.data.dataset)
    folders = tuple(map(resolve_dataset, [part.name for part in mixture] or [config.data.dataset]))
    tokenizer, ids = _one_tokenizer(folders)
    units, documents = [(read_manifest(folder) or {}).get("units") for folder in folders], config.data.documents
    if mixture and config.finetune.loss == "dpo":
        raise UserError("--loss=dpo needs one dataset of pairs, not a mixture")
    for unit in {"conversations", "preferences"} & set(units) if documents is False else ():
        folder = folders[units.index(unit)]
        raise UserError(f"{folder} holds {unit}, which are trained as documents: remove --documents=False")
    documents = any(units) if documents == "auto" else documents
    splits = [_open(config, folders, mixture, split) for split in ("train", "val")]
    for data in sorted(splits, key=len):  # an error of the shortest names a block_size that fits both
        from_scratch = init_from == "scratch"  # otherwise the weights set context and vocabulary
        is_small = sum(shard.nbytes for shard in data.shards) < SMALL
        vocab_size = ids if from_scratch and is_small and config.model.vocab_size is None else None
        data.check(config.model.block_size if from_scratch and not documents else 1, vocab_size)
    if init_from not in ("scratch", "resume") and Path(init_from).exists() and not is_pretrained(init_from):
        find_checkpoint(init_from, verify=False)
    return Inputs(folders, tokenizer, ids, splits[0], splits[1], global_batch, documents)


def _open(config: Config, folders: tuple[Path, ...], mixture: list[Part], split: str) -> TokenData:
    parts = [TokenData.open(folder, split, config.data.data_cache) for folder in folders]
    if large := next((part for part in parts if part.group is not None), None):
        if config.data.sample_order == "random" or config.data.documents is True:
            what = "--documents=True" if config.data.documents is True else "--sample_order=random"
            raise UserError(f"{what} reads all shards of {large.name}, which do not fit: raise --data_cache")
        return Mixture(mixture or [Part(large.name, 1.0)], parts)  # its order has groups
    return Mixture(mixture, parts) if mixture else parts[0]


def _one_tokenizer(folders: tuple[Path, ...]) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer of all folders and the number of their ids, as far as they are known. Raises UserError if a mixture
    has several."""
    found = []
    for folder in folders:
        tokenizer, manifest = tokenizer_of(folder), read_manifest(folder)
        ids = tokenizer.vocab_size if tokenizer else int(manifest["vocab_size"]) if manifest else None
        found.append((tokenizer, ids, tokenizer.fingerprint() if tokenizer else ids))
        if found[-1][2] != found[0][2]:
            names = [f"{name.name} ({count} ids)" if name else "an unknown one" for name, count, _ in found]
            raise UserError(
                f"the parts of a mixture need the same tokenizer: {folders[0]} has {names[0]}, {folder} {names[-1]}. "
                f"Prepare {folder} again with --tokenizer={folders[0]}"
            )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"the mixture names one dataset twice ({', '.join(map(str, folders))}): give it one weight")
    return found[0][:2]
