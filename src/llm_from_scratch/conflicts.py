"""Settings that need or exclude each other, or that do not fit together."""

from __future__ import annotations

from typing import Any

from .errors import UserError
from .mixture import read_mixture
from .settings import above, flatten

LORA_REFUSES = (("optimizer_type", "muon"), ("optimizer_type", "normuon"), ("fp8", True), ("save_nanogpt_ckpt", True))
DPO_REFUSES = (("compile", True), ("cuda_graphs", True), ("chunked_loss", True), ("documents", False))


def check_model(model: Any) -> None:
    """Raises UserError if the sizes of a GPTConfig do not fit together."""
    if model.head_dim is None and model.n_embd % model.n_head:
        width = 2 if model.pos_embedding == "rope" else 1  # a divisor of a head's width
        fits = [n for n in range(1, min(2 * model.n_head, 1 << 12)) if model.n_embd % (n * width) == 0]
        hint = f"; try n_head={min(fits, key=lambda n: abs(n - model.n_head))}" if fits else ""
        raise UserError(f"n_embd={model.n_embd} is not divisible by n_head={model.n_head}{hint}")
    if model.n_kv_head is not None and model.n_head % model.n_kv_head:
        raise UserError(f"n_kv_head={model.n_kv_head} does not divide n_head={model.n_head}")
    if model.pos_embedding == "rope" and model.head_width % 2:
        raise UserError(f"rope needs an even head width, got n_embd/n_head = {model.head_width}")
    if model.rope_scaling != "none" and model.pos_embedding != "rope":
        raise UserError(f"rope_scaling={model.rope_scaling} needs --pos_embedding=rope")
    if model.rope_scaling in ("llama3", "yarn"):
        if model.rope_original is None:
            raise UserError(f"rope_scaling={model.rope_scaling} needs rope_original, the context length in pretraining")
        above(model, 1, "rope_theta")
        above(model, model.rope_low, "rope_high")
    if model.max_ngram and not 2 <= model.max_ngram <= 16:
        raise UserError(f"max_ngram={model.max_ngram} is out of range: expected 0, or 2 to 16 tokens")


def check_run(config: Any) -> None:
    """Raises UserError if settings of a Config need or exclude each other."""
    data, training, finetune, optimizer, system = (
        config.data, config.training, config.finetune, config.optimizer, config.system
    )  # fmt: skip
    if training.eval_limit is not None and training.eval_tasks is None:
        raise UserError("eval_limit needs --eval_tasks")
    if training.gradient_checkpointing and training.activation_budget not in ("auto", None):
        raise UserError("activation_budget decides which blocks are recomputed: remove gradient_checkpointing")
    plain = type(finetune)()
    for name in ("lora_alpha", "lora_targets", "lora_dropout") if finetune.lora_rank is None else ():
        if getattr(finetune, name) != getattr(plain, name):
            raise UserError(f"{name} has no effect without lora_rank: set --lora_rank=8, or remove it")
    if finetune.loss != "dpo" and finetune.dpo_beta != plain.dpo_beta:
        raise UserError("dpo_beta has no effect without --loss=dpo: remove it")
    if finetune.lora_rank is not None and finetune.freeze:
        raise UserError("lora_rank already freezes all weights: remove --freeze")
    if (optimizer.lr_scaling == "mup") != (optimizer.base_width is not None):
        raise UserError("lr_scaling=mup and base_width need each other: give both, or neither")
    for name in ("embedding_learning_rate", "head_learning_rate"):
        if getattr(optimizer, name) is not None and "muon" not in optimizer.optimizer_type:
            raise UserError(f"{name} needs --optimizer_type=muon or normuon; adamw uses learning_rate for everything")
    if config.scheduler.lr_ends and config.scheduler.schedule != "linear":
        raise UserError(f"lr_ends needs --schedule=linear, not {config.scheduler.schedule}")
    if system.shard_group is not None and system.parallel != "hsdp":
        raise UserError("shard_group needs --parallel=hsdp")
    if not system.reshard_after_forward and system.parallel == "ddp":
        raise UserError("reshard_after_forward has no effect with --parallel=ddp: remove one of them")
    if data.stride is not None and data.sample_order == "random":
        raise UserError("stride needs --sample_order=shuffled")
    for name, given in (("stride", data.stride is not None), ("data_on_device", system.data_on_device is True)):
        if data.documents is True and given:
            raise UserError(f"{name} has no effect with --documents=True: remove one of them")
    flat = flatten(config)
    for setting, chosen, refused in (
        ("lora_rank", finetune.lora_rank is not None, LORA_REFUSES),
        ("--loss=dpo", finetune.loss == "dpo", DPO_REFUSES),
    ):
        for name, value in refused:
            if chosen and flat[name] == value:
                raise UserError(f"{setting} does not support {name}={value}: remove one of them")
    if finetune.loss == "dpo" and training.init_from == "scratch":
        raise UserError("--loss=dpo needs a trained model: name it with --init_from=FOLDER")
    if optimizer.forget_ngrams and (data.sample_order == "random" or not config.model.max_ngram):
        raise UserError("forget_ngrams needs --max_ngram and --sample_order=shuffled")
    if optimizer.forget_ngrams and read_mixture(data.dataset):
        raise UserError("forget_ngrams needs one dataset: the epochs of a mixture's parts end at different steps")
