"""The plan of a run, made from its settings, so that a mistake shows before anything is built or written."""

from __future__ import annotations

import copy
import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any

from ..checkpoint.adapter import Base, base_of
from ..checkpoint.load import is_pretrained, load
from ..checkpoint.store import Checkpoint, resolved_init
from ..config import Config, GenerationConfig, GPTConfig
from ..core.adapters import scale_of
from ..core.dataset import TokenData
from ..core.mixed import MixedOrder, Mixture
from ..core.packing import PackedData, short_documents
from ..core.tokenizer import Tokenizer
from ..core.weights import cropped
from ..errors import UserError
from ..generation.prompt import first_text, read_start
from ..interop import is_hub_id
from ..interop.nanogpt import check_nanogpt
from ..kernels.float8 import refuse_unfit
from ..machine import device as runtimes
from ..settings import did_you_mean
from .check import Inputs, check
from .harness import load_tasks
from .microbatch import keeps_memory, largest_micro_batch
from .pace import ending_whole
from .parallel import with_parallel
from .plan import Plan, dataset_hashes, part_hashes
from .preferences import PreferenceData
from .resume import differences, same_machine, same_micro_batch
from .wrap import compiled_where_it_pays, with_layers

COMMAND_LINE = "command line"
KNOWN_INITS = ("scratch", "resume", "auto", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
LONGER = (  # settings of the model that may differ from those of rotary weights
    "block_size", "rope_theta", "rope_scaling", "rope_factor", "rope_original", "rope_low", "rope_high",
    "rope_attention",
)  # fmt: skip
GPT2_IDS, GPT2_PADDED = 50257, 50304  # 64 divides the padded size: faster matrix products


def make_plan(config: Config, sources: dict[str, str] | None = None) -> Plan:
    """Resolves settings against data, weights and machine. Writes nothing.

    sources: leaf name -> where it was set (see presets.parse). Loaded weights override a setting with a notice,
    except one from the command line, which is refused. Raises UserError for every mistake that can be found.
    """
    config = copy.deepcopy(config)
    training = config.training
    training.init_from = init_from = resolved_init(training.init_from, training.out_dir)
    inputs = check(config)
    if config.finetune.loss == "dpo":
        config.system.compile = config.training.chunked_loss = False  # its loss has another shape in each step
    runtime = runtimes.resolve(config.system)
    if config.system.fp8:
        refuse_unfit(runtime.device, runtime.dtype)
    if training.flex_attention and runtime.device.type != "cuda":
        raise UserError(
            f"--flex_attention=True needs a CUDA device, and this run uses {runtime.device.type}: remove it"
        )
    folder, notes = inputs.folder, list[str]()
    tokenizer, vocab_size = _vocabulary(inputs, notes)
    resumed, weights, base = None, None, None
    if init_from != "scratch":
        is_resumed = init_from == "resume"
        if not is_resumed and not is_pretrained(init_from) and not Path(init_from).exists():
            hint = did_you_mean(init_from, KNOWN_INITS, "no such checkpoint or folder")
            raise UserError(f"unknown init_from {init_from!r}: {hint} (known: {', '.join(KNOWN_INITS)})")
        loaded = load(
            training.out_dir if is_resumed else init_from, "last" if is_resumed else None, dataset=str(folder),
            weights_only=not is_resumed, need_tokenizer=False,
            set_aside=is_resumed and runtime.is_master and not training.eval_only, merge=not is_resumed,
            lazily=runtime.world_size > 1,
        )  # fmt: skip
        weights, theirs = loaded.model, loaded.tokenizer
        _fit(config, loaded.model_config, sources or {}, notes, may_crop=not is_resumed)
        if theirs is not None and tokenizer is not None and theirs.fingerprint() != tokenizer.fingerprint():
            source = str(loaded.path) if is_hub_id(init_from) else training.out_dir if is_resumed else init_from
            raise UserError(
                f"{folder} was made with the tokenizer {tokenizer.name} ({tokenizer.vocab_size} ids), but {source} "
                f"uses {theirs.name} ({theirs.vocab_size} ids). The ids do not match: prepare the text with "
                f"--tokenizer={source if Path(source).is_dir() else theirs.name}"
            )
        base = _base(config, loaded)
        weights = cropped(weights, loaded.model_config, config.model.block_size)
        if is_resumed:
            resumed, runtime = loaded, same_machine(config, runtime, loaded)
            notes.append(f"resuming from {loaded.path} at step {loaded.step}")
        else:
            notes.append(f"starting from the weights of {init_from}")
    elif config.model.vocab_size is None:
        config.model.vocab_size = vocab_size
    assert config.model.vocab_size is not None
    if tokenizer is not None and config.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size={config.model.vocab_size} is smaller than the {tokenizer.vocab_size} ids of the tokenizer of "
            f"{folder}: " + ("remove --vocab_size" if weights is None else "the weights belong to another tokenizer")
        )
    config.model.validate()
    runtime = with_parallel(config, runtime, resumed)
    if training.save_nanogpt_ckpt:
        check_nanogpt(Path(training.out_dir) / "ckpt.pt", config.model, accept_erf_gelu=True)
        if config.model.activation == "gelu_tanh":
            notes.append("ckpt.pt: nanoGPT runs these weights with the exact GELU, so its results differ slightly")
    for name in ("sample_interval", "eval_tasks"):
        if tokenizer is None and getattr(training, name) is not None:
            raise UserError(f"the data's tokenizer is unknown: remove --{name}, which needs it")
    prompt = _sample_prompt(config, tokenizer)
    tasks: dict[str, Any] = {}
    if training.eval_tasks is not None:
        tasks = load_tasks(training.eval_tasks, "--eval_tasks")
        notes.append(f"tasks at every evaluation: {', '.join(tasks['tasks'])} (estimates do not include them)")
    ids, remember = config.model.vocab_size if runtime.is_master else None, not training.eval_only
    splits = (inputs.train_data, inputs.val_data)
    if config.data.documents == "auto" and not inputs.documents:
        parts = zip([data for _, _, data in splits[0].weighted], inputs.folders, strict=True)
        found = (short_documents(data, folder, config.model.block_size, tokenizer) for data, folder in parts)
        notes += [line for line in found if line is not None]
    config.data.documents = inputs.documents
    if inputs.documents:
        config.validate()  # auto is resolved
        splits = _packed(config, inputs, tokenizer, notes)
    scans = [data.check(config.model.block_size, ids, remember) for data in sorted(splits, key=len)]
    foreign = [data for data in splits if data.largest_id is not None and data.largest_id >= GPT2_IDS]
    if inputs.tokenizer is None and inputs.vocab_size is None and foreign:  # the padding would hide them
        notes.append(
            f"warning: {foreign[0].name}: id {foreign[0].largest_id} is not a GPT-2 token (0 to {GPT2_IDS - 1}): "
            "another tokenizer made this data, so samples would be wrong; prepare the text with "
            "llm-prepare --tokenizer=FOLDER_OR_FILE"
        )
    kind, stride, seed = config.data.sample_order, config.data.stride, config.system.seed
    order = splits[0].order(config.model.block_size, kind, stride, seed)
    global_batch, share = inputs.global_batch, inputs.global_batch // runtime.world_size
    asked = config.data.micro_batch
    auto = largest_micro_batch(config, runtime, share) if asked == "auto" else math.gcd(share, config.data.batch_size)
    micro_batch = asked if isinstance(asked, int) else auto
    if resumed is not None:
        micro_batch = same_micro_batch(config, resumed, share, micro_batch)
    if asked == "auto":
        how = "the largest useful size that fits" if resumed is None else "as at the start of the run, if possible"
        notes.append(f"micro-batch: {micro_batch} of {share} sequences ({how})")
    if training.epochs is not None:
        is_whole = order.order == "shuffled" or inputs.documents
        per_epoch = order.windows_per_epoch if is_whole else order.tokens / order.block_size
        training.max_iters = max(1, math.ceil(training.epochs * per_epoch / global_batch))
        training.inclusive_max_iters, training.epochs = False, None
    last_step = training.max_iters + (1 if training.inclusive_max_iters else 0)
    if config.scheduler.decay_lr and config.scheduler.warmup_iters >= last_step > 0:
        notes.append(
            f"warning: warmup_iters={config.scheduler.warmup_iters} covers the whole run of {last_step} steps; "
            "the learning rate never reaches its peak"
        )
    if config.optimizer.forget_ngrams and config.scheduler.lr_ends:
        order = ending_whole(order, config.scheduler.lr_ends, global_batch)
    if isinstance(order, MixedOrder) and not training.eval_only:
        order.refuse_longer(last_step * global_batch, global_batch)
    if resumed is not None:
        _same_data(config, *splits, inputs.folder, resumed, notes)
        notes += differences(config, resumed)
    plan = Plan(
        config, runtime, folder, tokenizer, *splits, order, global_batch, micro_batch,
        last_step, False, resumed.step if resumed is not None else 0, weights, base, resumed, prompt, notes,
        [scan for scan in scans if scan is not None], tasks, resumed.reference if resumed is not None else None,
    )  # fmt: skip
    plan = dataclasses.replace(plan, keep_memory=keeps_memory(plan))
    if resumed is None and not training.eval_only:  # a resumed run compiles if it did before
        flops = plan.sizes.flops_per_token * plan.tokens_per_step * last_step / runtime.world_size
        runtime = with_layers(config, compiled_where_it_pays(config, runtime, flops), flops)
        plan = dataclasses.replace(plan, runtime=runtime)
    return plan


def _base(config: Config, loaded: Checkpoint) -> Base | None:
    """The model that the run trains an adapter of. Raises UserError if a resumed run trained something else."""
    training, settings = config.training, config.finetune
    if training.init_from == "resume":
        ranks = loaded.base and loaded.base.rank, settings.lora_rank
        if ranks[0] != ranks[1]:
            same = "remove --lora_rank" if ranks[0] is None else f"set --lora_rank={ranks[0]}"  # a preset may set it
            raise UserError(
                f"the run in {training.out_dir} has lora_rank={ranks[0]}, not {ranks[1]}: {same}, or "
                f"start a new run from it ({shlex.quote(f'--init_from={training.out_dir}')}, another --out_dir)"
            )
        if loaded.base is not None and loaded.base.scale != scale_of(settings):
            raise UserError(
                f"the run in {training.out_dir} has lora_alpha={loaded.base.scale * loaded.base.rank:g}, not "
                f"{scale_of(settings) * loaded.base.rank:g}: remove --lora_alpha, or start a new run from it "
                f"({shlex.quote(f'--init_from={training.out_dir}')}, another --out_dir)"
            )
        return loaded.base
    if settings.lora_rank is None:
        return None
    found, out_dir = loaded.path, Path(training.out_dir)
    is_moved = found is not None and found.resolve().parent == out_dir.resolve() and not is_pretrained(found)
    if is_moved and not training.eval_only:  # by archive_previous
        raise UserError(
            f"{out_dir} holds the adapter's base model, which a new run would move: choose another --out_dir"
        )
    return base_of(loaded.model, found, training.init_from, out_dir, settings.lora_rank, scale_of(settings))


def _packed(
    config: Config, inputs: Inputs, tokenizer: Tokenizer | None, notes: list[str]
) -> tuple[TokenData, TokenData]:  # fmt: skip
    """Both splits as rows of whole documents."""
    kind = PreferenceData if config.finetune.loss == "dpo" else PackedData

    def packed(data: TokenData, folder: Path, split: str) -> PackedData:
        found = kind.of(data, folder, split, config.model.block_size, tokenizer)
        if split == "train":
            of = f" of {folder.name}" if len(inputs.folders) > 1 else ""
            notes.append(f"documents{of}: {found.summary()}")
            if found.marks and tokenizer is not None:
                notes.append(f"example (in the loss: >>...<<): {found.example(tokenizer)}")
        return found

    def of_all(data: TokenData, split: str) -> TokenData:
        if not isinstance(data, Mixture):
            return packed(data, inputs.folder, split)
        parts = zip(data.parts, inputs.folders, strict=True)
        return Mixture(data.names, [packed(part, folder, split) for part, folder in parts])

    return of_all(inputs.train_data, "train"), of_all(inputs.val_data, "val")


def _same_data(
    config: Config, train_data: TokenData, val_data: TokenData, folder: Path, resumed: Checkpoint, notes: list[str]
) -> None:  # fmt: skip
    """Raises UserError if the tokens have changed since the start of the run, unless that is allowed."""
    before = resumed.manifest.get("dataset_sha256")
    train_hash, both = dataset_hashes(train_data, val_data)
    if before is None or before == both:
        return
    train = resumed.trainer.get("train_sha256")
    changed = "validation" if train == train_hash else "training or validation" if train is None else "training"
    where = _changed_parts(train_data, val_data, resumed) or str(folder)
    if not config.training.allow_new_data:
        raise UserError(
            f"the {changed} tokens in {where} have changed since the run started; select the original data "
            "with --dataset, allow the change with --allow_new_data=True, or start a new run from its weights with "
            f"{shlex.quote(f'--init_from={config.training.out_dir}')} and another --out_dir"
        )
    notes.append(f"{where}: the {changed} tokens have changed since the run started (--allow_new_data)")


def _changed_parts(train_data: TokenData, val_data: TokenData, resumed: Checkpoint) -> str:
    """The parts of a mixture with other tokens than in the checkpoint."""
    before, now = resumed.trainer.get("parts"), part_hashes(train_data, val_data)
    before = before if isinstance(before, dict) else {}
    return ", ".join(sorted(name for name in {*before, *now} if before.get(name) != now.get(name)))


def _sample_prompt(config: Config, tokenizer: Tokenizer | None) -> list[int]:
    if config.training.sample_interval is None or tokenizer is None:
        return []
    plain, generation = GenerationConfig(), config.generation
    free = {"start", "max_new_tokens", "temperature", "top_k", "num_samples"}
    for item in dataclasses.fields(GenerationConfig):
        if item.name not in free and getattr(generation, item.name) != getattr(plain, item.name):
            raise UserError(
                f"{item.name} has no effect on the samples of --sample_interval, which use start, max_new_tokens, "
                "temperature and top_k only; remove it"
            )
    try:
        return tokenizer.encode(first_text(read_start(config.generation.start), tokenizer)).tolist()
    except UserError as error:
        raise UserError(f"--start (for --sample_interval): {error}") from None


def _vocabulary(inputs: Inputs, notes: list[str]) -> tuple[Tokenizer | None, int]:
    """The data's tokenizer, and the rows of a new model's token table."""
    tokenizer = inputs.tokenizer
    if tokenizer is None and inputs.vocab_size is not None:
        return None, inputs.vocab_size
    if tokenizer is None:
        notes.append(f"{inputs.folder} does not name a tokenizer: assuming GPT-2's, vocabulary padded to {GPT2_PADDED}")
        try:
            tokenizer = Tokenizer.from_name("gpt2")
        except UserError:
            notes.append("warning: GPT-2's vocabulary is not available, so the checkpoints do not contain a tokenizer")
            return None, GPT2_PADDED
    size = tokenizer.vocab_size
    return tokenizer, GPT2_PADDED if size == GPT2_IDS else size


def _fit(config: Config, loaded: GPTConfig, sources: dict[str, str], notes: list[str], may_crop: bool) -> None:
    """Gives the model the shape of the loaded weights. Dropout may differ, the context may be shortened, and with
    rotary embeddings be longer."""
    replaced = []
    longer = LONGER if config.finetune.lora_rank is None else LONGER[:1]  # an adapter's base keeps its positions
    for item in dataclasses.fields(GPTConfig):
        wanted, has = getattr(config.model, item.name), getattr(loaded, item.name)
        if item.name == "dropout" or wanted == has or (item.name == "vocab_size" and wanted is None):
            continue
        if item.name == "block_size" and may_crop and wanted < has:
            notes.append(f"context: shortened from the {has:,} tokens of the weights to {wanted:,} (--block_size)")
            loaded = dataclasses.replace(loaded, block_size=wanted)
            continue
        if sources.get(item.name) == COMMAND_LINE:
            if may_crop and item.name in longer and loaded.pos_embedding == "rope":
                notes.append(f"{item.name}: {wanted} instead of the {has} of the weights")
                loaded = dataclasses.replace(loaded, **{item.name: wanted})
                continue
            raise UserError(f"--{item.name}={wanted} contradicts the loaded weights, which have {has}; remove it")
        replaced.append(f"{item.name}={has}")
    config.model = dataclasses.replace(loaded, dropout=config.model.dropout)
    if replaced:
        notes.append(f"set by the loaded weights: {', '.join(replaced)}")
