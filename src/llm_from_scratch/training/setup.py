"""Everything that is decided before the first step, so that a mistake shows before anything is built or written."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..checkpoint.load import is_pretrained, load
from ..checkpoint.store import Checkpoint, resolved_init
from ..config import Config, GenerationConfig, GPTConfig
from ..core.dataset import SampleOrder, TokenData, read_manifest, resolve_dataset
from ..core.sizes import Sizes, sizes
from ..core.tokenfile import BackgroundScan
from ..core.tokenizer import Tokenizer, tokenizer_of
from ..core.weights import build_model
from ..errors import UserError
from ..generation.prompt import read_start
from ..interop.nanogpt import check_nanogpt
from ..machine import device as runtimes
from ..machine.device import Runtime
from ..machine.processes import check_writable
from .loggers import check_extras
from .microbatch import largest_micro_batch
from .resume import differences, same_machine, same_micro_batch
from .wrap import compiled_where_it_pays

COMMAND_LINE = "command line"
HASHED = 1 << 30  # bytes of a split that a checkpoint's hash covers whole: a second or so
PIECE = 1 << 16  # tokens
GPT2_IDS, GPT2_PADDED = 50257, 50304  # 64 divides the padded size: faster matrix products


@dataclass
class Plan:
    """A run with nothing left open."""

    config: Config
    runtime: Runtime
    folder: Path
    tokenizer: Tokenizer | None
    train_data: TokenData
    val_data: TokenData
    order: SampleOrder
    global_batch: int
    """Sequences per update, over all processes."""
    micro_batch: int
    """Sequences of one process in one forward pass."""
    last_step: int
    """Updates after which the run ends."""
    start_step: int = 0
    weights: dict[str, Tensor] | None = None
    """Initial weights where they do not come from the seed."""
    resumed: Checkpoint | None = None
    prompt: list[int] = field(default_factory=list)
    """Token ids that the samples of --sample_interval continue; empty where none are wanted."""
    notes: list[str] = field(default_factory=list)
    """What was found and decided, a line each."""
    scans: list[BackgroundScan] = field(default_factory=list)
    """Checks of large data that go on beside the first steps."""

    @property
    def micro_steps(self) -> int:
        return self.global_batch // self.runtime.world_size // self.micro_batch

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.config.model.block_size

    @property
    def epochs(self) -> float:
        """Passes over the training tokens."""
        return self.last_step * self.tokens_per_step / len(self.train_data)

    @property
    def sizes(self) -> Sizes:
        element = 4 if str(self.runtime.dtype) == "torch.float32" else 2
        again = self.config.training.gradient_checkpointing
        return sizes(self.config.model, self.micro_batch, element, again, self.config.optimizer)

    @property
    def dataset_hash(self) -> str:
        """Identifies the tokens of both splits."""
        return self._hashes[1]

    @property
    def train_hash(self) -> str:
        """Identifies the training tokens."""
        return self._hashes[0]

    @functools.cached_property
    def _hashes(self) -> tuple[str, str]:
        """Of the training split, and of both: all tokens, or samples from all parts of a split above HASHED bytes."""
        digest, hashes = hashlib.sha256(), []
        for data in (self.train_data, self.val_data):
            digest.update(f"{len(data)} {[len(shard) for shard in data.shards]}".encode())
            stride = max(1, sum(shard.nbytes for shard in data.shards) // HASHED)
            for shard in data.shards:
                pieces = -(-len(shard) // PIECE)
                for piece in sorted({*range(0, pieces, stride), pieces - 1}):
                    digest.update(shard[piece * PIECE : (piece + 1) * PIECE].tobytes())
            hashes.append(digest.hexdigest())
        return hashes[0], hashes[1]


def prepare(config: Config, sources: dict[str, str] | None = None, check_out_dir: bool = True) -> Plan:
    """Resolves a configuration against data, weights and machine. Writes nothing.

    sources: leaf name -> where it was set, as presets.parse() gives it; what stands on the command line is refused
    where it contradicts loaded weights, what stands elsewhere gives way and is announced.
    Raises UserError for everything that is wrong with the settings, the data, the weights or the machine.
    """
    config = _copy(config)
    config.training.init_from = resolved_init(config.training.init_from, config.training.out_dir)
    config.validate()
    check_extras(config)
    runtime = runtimes.resolve(config.system)
    if check_out_dir and not config.training.eval_only:
        check_writable(Path(config.training.out_dir))
    folder = resolve_dataset(config.data.dataset)
    notes: list[str] = []
    tokenizer, vocab_size = _vocabulary(folder, notes)
    resumed, weights = None, None
    start_step = 0
    init_from = config.training.init_from
    if init_from == "resume":
        resumed = load(
            config.training.out_dir,
            which="last",
            dataset=str(folder),
            need_tokenizer=False,
            set_aside=runtime.is_master and not config.training.eval_only,
        )
        weights, start_step = resumed.model, resumed.step
        _fit(config, resumed.model_config, sources or {}, notes, may_crop=False)
        _same_tokenizer(resumed.tokenizer, tokenizer, folder, "the checkpoint")
        notes.append(f"resuming from {resumed.path} at step {start_step}")
        runtime = same_machine(config, runtime, resumed)
    elif init_from != "scratch":
        loaded = _load_weights(init_from, folder)
        weights = loaded.model
        _fit(config, loaded.model_config, sources or {}, notes, may_crop=True)
        _same_tokenizer(loaded.tokenizer, tokenizer, folder, init_from)
        if config.model.block_size < loaded.model_config.block_size:
            model = build_model(loaded.model_config, weights)
            model.crop_block_size(config.model.block_size)
            weights = model.state_dict()
        notes.append(f"starting from the weights of {init_from}")
    elif config.model.vocab_size is None:
        config.model.vocab_size = vocab_size
    assert config.model.vocab_size is not None
    if tokenizer is not None and config.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size={config.model.vocab_size} is smaller than the {tokenizer.vocab_size} ids of the tokenizer of "
            f"{folder}: " + ("leave --vocab_size out" if weights is None else "the weights belong to another tokenizer")
        )
    config.model.validate()
    if config.training.save_nanogpt_ckpt:
        check_nanogpt(Path(config.training.out_dir) / "ckpt.pt", config.model, accept_erf_gelu=True)
        if config.model.activation == "gelu_tanh":
            notes.append("ckpt.pt: nanoGPT runs these weights with the exact GELU, a little differently")
    if config.model.max_ngram and runtime.world_size > 1 and not config.training.eval_only:
        raise UserError("max_ngram trains in one process: its sparse gradients are not exchanged; run without torchrun")
    prompt = _sample_prompt(config, tokenizer)
    train_data, val_data = TokenData.open(folder, "train"), TokenData.open(folder, "val")
    eval_only = config.training.eval_only  # which changes no file
    checks = [
        data.check(config.model.block_size, config.model.vocab_size if runtime.is_master else None, not eval_only)
        for data in (train_data, val_data)
    ]
    if tokenizer_of(folder) is None and read_manifest(folder) is None:
        notes += _foreign_ids((train_data, val_data))
    order = SampleOrder(
        len(train_data), config.model.block_size, config.data.sample_order, config.data.stride, config.system.seed
    )
    global_batch, micro_batch = _batches(config, runtime)
    if resumed is not None:
        micro_batch = same_micro_batch(config, resumed, global_batch // runtime.world_size, micro_batch)
    if config.data.micro_batch == "auto":
        how = "what the free memory holds and pays" if resumed is None else "as the run began, where it can"
        notes.append(f"micro-batch: {micro_batch} of {global_batch // runtime.world_size} sequences ({how})")
    _set_length(config, order, global_batch)
    last_step = config.training.max_iters + (1 if config.training.inclusive_max_iters else 0)
    if config.scheduler.decay_lr and config.scheduler.warmup_iters >= last_step > 0:
        notes.append(
            f"warning: warmup_iters={config.scheduler.warmup_iters} covers the whole run of {last_step} steps; "
            "the learning rate never reaches its peak"
        )
    plan = Plan(
        config, runtime, folder, tokenizer, train_data, val_data, order, global_batch, micro_batch, last_step,
        start_step, weights, resumed, prompt, notes, [scan for scan in checks if scan is not None],
    )  # fmt: skip
    if resumed is not None:
        if runtime.is_master:
            _same_data(plan, resumed)
        notes += differences(config, resumed)
    elif not eval_only:  # a run that goes on stays as it began
        flops = plan.sizes.flops_per_token * plan.tokens_per_step * last_step / runtime.world_size
        plan.runtime = compiled_where_it_pays(config, runtime, flops)
    return plan


def _same_data(plan: Plan, resumed: Checkpoint) -> None:
    """Raises UserError if the tokens are not those of the run's start, unless that is allowed."""
    before = resumed.manifest.get("dataset_sha256")
    if before is None or before == plan.dataset_hash:
        return
    train = resumed.trainer.get("train_sha256")
    changed = "validation" if train == plan.train_hash else "training or validation" if train is None else "training"
    if not plan.config.training.allow_new_data:
        raise UserError(
            f"the {changed} tokens in {plan.folder} are not those that the run began with; name its data with "
            "--dataset, allow the change with --allow_new_data=True, or start a new run from its weights with "
            f"--init_from={plan.config.training.out_dir} and another --out_dir"
        )
    plan.notes.append(f"{plan.folder} holds other {changed} tokens than at the run's start, as allowed")


def _foreign_ids(splits: tuple[TokenData, TokenData]) -> list[str]:
    """A warning if data that names no tokenizer holds ids that GPT-2 does not have: the padding would hide them."""
    for data in splits:
        if data.largest_id is not None and data.largest_id >= GPT2_IDS:
            return [
                f"warning: {data.name}: id {data.largest_id} is not a GPT-2 token (0 to {GPT2_IDS - 1}): another "
                "tokenizer made this data, so samples of the model would be wrong text; prepare the text with "
                "llm-prepare --tokenizer=FOLDER_OR_FILE"
            ]
    return []


def _sample_prompt(config: Config, tokenizer: Tokenizer | None) -> list[int]:
    if config.training.sample_interval is None:
        return []
    if tokenizer is None:
        raise UserError("--sample_interval needs the tokenizer of the data, which is not known; leave it out")
    plain, generation = GenerationConfig(), config.generation
    free = {"start", "max_new_tokens", "temperature", "top_k", "num_samples"}
    for item in dataclasses.fields(GenerationConfig):
        if item.name not in free and getattr(generation, item.name) != getattr(plain, item.name):
            raise UserError(
                f"{item.name} has no effect on the samples of --sample_interval, which know start, max_new_tokens, "
                "temperature and top_k; leave it out"
            )
    try:
        return tokenizer.encode(read_start(config.generation.start)).tolist()
    except UserError as error:
        raise UserError(f"--start, which the samples of --sample_interval continue: {error}") from None


def _copy(config: Config) -> Config:
    return Config(**{f.name: dataclasses.replace(getattr(config, f.name)) for f in dataclasses.fields(config)})


def _vocabulary(folder: Path, notes: list[str]) -> tuple[Tokenizer | None, int]:
    """The data's tokenizer and the rows that a new model's token table needs."""
    tokenizer = tokenizer_of(folder)
    manifest = read_manifest(folder)
    if tokenizer is None and manifest is None:
        notes.append(f"{folder} names no tokenizer: taken for GPT-2's, vocabulary padded to {GPT2_PADDED}")
        try:
            tokenizer = Tokenizer.from_name("gpt2")
        except UserError:
            notes.append("warning: GPT-2's vocabulary cannot be had, so the checkpoints hold no tokenizer")
            return None, GPT2_PADDED
    if tokenizer is None:
        assert manifest is not None
        return None, int(manifest["vocab_size"])
    size = tokenizer.vocab_size
    return tokenizer, GPT2_PADDED if size == GPT2_IDS else size


def _load_weights(init_from: str, folder: Path) -> Checkpoint:
    """Weights for a new run: a checkpoint, nanoGPT's ckpt.pt, a Hugging Face folder, or a GPT-2 name."""
    if not is_pretrained(init_from) and not Path(init_from).exists():
        raise UserError(
            f"init_from={init_from!r} is neither scratch, resume, auto, a GPT-2 name (gpt2, gpt2-medium, gpt2-large, "
            "gpt2-xl), nor an existing checkpoint or folder"
        )
    return load(init_from, dataset=str(folder), weights_only=True, need_tokenizer=False)


def _fit(config: Config, loaded: GPTConfig, sources: dict[str, str], notes: list[str], may_crop: bool) -> None:
    """Gives the model the shape of the loaded weights; dropout stays free, the context may be shortened."""
    replaced = []
    for item in dataclasses.fields(GPTConfig):
        wanted, has = getattr(config.model, item.name), getattr(loaded, item.name)
        if item.name == "dropout" or wanted == has or (item.name == "vocab_size" and wanted is None):
            continue
        if item.name == "block_size" and may_crop and wanted < has:
            loaded = dataclasses.replace(loaded, block_size=wanted)
            continue
        if sources.get(item.name) == COMMAND_LINE:
            raise UserError(f"--{item.name}={wanted} contradicts the loaded weights, which have {has}; leave it out")
        replaced.append(f"{item.name}={has}")
    config.model = dataclasses.replace(loaded, dropout=config.model.dropout)
    if replaced:
        notes.append(f"the loaded weights decide: {', '.join(replaced)}")


def _same_tokenizer(theirs: Tokenizer | None, ours: Tokenizer | None, folder: Path, whose: str) -> None:
    if theirs is not None and ours is not None and theirs.fingerprint() != ours.fingerprint():
        raise UserError(
            f"{folder} was made with the tokenizer {ours.name} ({ours.vocab_size} ids), {whose} with another, "
            f"{theirs.name} ({theirs.vocab_size} ids): the ids would mean other tokens; prepare the text with that one"
        )


def _batches(config: Config, runtime: Runtime) -> tuple[int, int]:
    """(global batch, micro-batch). The global batch is stated; how processes share it is derived."""
    world, batch_size, asked = runtime.world_size, config.data.batch_size, config.data.micro_batch
    global_batch = batch_size * config.training.gradient_accumulation_steps
    if global_batch % world:
        raise UserError(
            f"the global batch of batch_size * gradient_accumulation_steps = {global_batch} sequences cannot be shared "
            f"by {world} processes; choose a multiple of {world}"
        )
    local = global_batch // world
    if asked == "auto":
        return global_batch, largest_micro_batch(config, runtime, local)
    if asked is not None:
        if local % asked:
            raise UserError(
                f"micro_batch={asked} does not divide the {local} sequences that a process has of a batch; choose a "
                "divisor, or auto"
            )
        return global_batch, asked
    return global_batch, math.gcd(local, batch_size) if local % batch_size else batch_size


def _set_length(config: Config, order: SampleOrder, global_batch: int) -> None:
    """Turns epochs into max_iters."""
    if config.training.epochs is None:
        return
    per_epoch = order.windows_per_epoch if order.order == "shuffled" else order.tokens / order.block_size
    config.training.max_iters = max(1, math.ceil(config.training.epochs * per_epoch / global_batch))
    config.training.inclusive_max_iters = False
    config.training.epochs = None


def describe(plan: Plan) -> list[str]:
    """The announcement: what will run, on what, and what was chosen for the machine."""
    config, s = plan.config, plan.sizes
    lines = list(plan.notes)
    lines += [f"{name}: {text}" for name, text in plan.runtime.reasons.items()]
    if plan.runtime.world_size > 1:
        lines.append(f"processes: {plan.runtime.world_size} ({plan.runtime.backend})")
    lines += [
        f"data: {plan.folder.as_posix()}, {len(plan.train_data):,} training and {len(plan.val_data):,} validation "
        "tokens",
        f"model: {s.params:,} parameters, vocabulary {config.model.vocab_size:,}, context {config.model.block_size}",
        f"tokens per iteration will be: {plan.tokens_per_step:,} ({plan.global_batch} sequences: "
        f"{plan.runtime.world_size} x {plan.micro_steps} x {plan.micro_batch})",
        f"length: {plan.last_step:,} steps, {plan.epochs:.2f} epochs",
    ]
    return lines
