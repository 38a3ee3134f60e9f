"""Every setting of the project: typed, named once, documented where it is declared.

The names and the default values are nanoGPT's wherever nanoGPT has the setting. A leaf name is unique over
all sections, so `--learning_rate=3e-4`, `--optimizer.learning_rate=3e-4`, a nested YAML file and a flat
Python preset all reach the same field. The text under a field is what `--help` prints for it.
Imports neither torch nor anything of ours: `--help` must answer at once.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UserError


@dataclass
class GPTConfig:
    """The model's architecture. The defaults are GPT-2's (124M); every other choice is an option of the same model."""

    block_size: int = 1024
    """Context length in tokens."""
    vocab_size: int | None = 50304
    """Rows of the token embedding. In a command, None takes it from the data (GPT-2's 50257 is padded to 50304)."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention (query) heads; divides n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Dropout probability; 0 for pretraining, 0.1 or more for finetuning on little data."""
    bias: bool = True
    """Biases in linear layers and LayerNorms, as GPT-2 has them. False is a bit better and faster."""
    n_kv_head: int | None = None
    """Key/value heads of grouped-query attention; divides n_head. None is one per query head."""
    pos_embedding: Literal["learned", "rope"] = "learned"
    """Positions: a learned table (GPT-2) or rotary embeddings (RoPE, arXiv 2104.09864)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation layer."""
    norm_eps: float = 1e-5
    """Epsilon of the normalisation layers."""
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"
    """MLP non-linearity: exact GELU (nanoGPT), tanh GELU (OpenAI's GPT-2), squared ReLU, or SwiGLU."""
    mlp_hidden: int | None = None
    """Hidden width of the MLP. None is 4 * n_embd; for swiglu 8/3 * n_embd rounded up to a multiple of 64."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head, before the rotation (as Qwen3 has it)."""
    tie_embeddings: bool = True
    """One matrix for the token embedding and the output head."""
    logit_softcap: float = 0.0
    """Caps logits softly: c * tanh(logits / c). 0 is off."""
    embedding_norm: bool = False
    """Normalise the embeddings before the first block."""
    zero_init: bool = False
    """Start with blocks that add nothing to the stream, and a head of zeros unless it is tied; suits Muon."""
    max_ngram: int = 0
    """Add embeddings of the last 2, the last 3, ... the last max_ngram tokens: small models learn faster. 0: off."""
    ngram_rows: int = 65536
    """Rows of the table for each length up to max_ngram, into which runs of tokens are hashed."""

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP. SwiGLU has three matrices, so 8/3 of the width gives it the parameters of 4."""
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        return 64 * -(-8 * self.n_embd // (3 * 64)) if self.activation == "swiglu" else 4 * self.n_embd

    def validate(self) -> None:
        """Raises UserError where the sizes do not fit together."""
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            _at_least(name, getattr(self, name), 1)
        if self.vocab_size is not None:
            _at_least("vocab_size", self.vocab_size, 1)
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: every head needs the same "
                f"width; try n_embd={max(1, round(self.n_embd / self.n_head)) * self.n_head}"
            )
        if self.n_kv_head is not None:
            _at_least("n_kv_head", self.n_kv_head, 1)
            if self.n_head % self.n_kv_head:
                raise UserError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if self.pos_embedding == "rope" and (self.n_embd // self.n_head) % 2:
            raise UserError(f"rope needs an even head width, got n_embd/n_head = {self.n_embd // self.n_head}")
        if self.mlp_hidden is not None:
            _at_least("mlp_hidden", self.mlp_hidden, 1)
        _between("dropout", self.dropout, 0.0, 1.0, open_right=True)
        _above("rope_theta", self.rope_theta, 0.0)
        _above("norm_eps", self.norm_eps, 0.0)
        _at_least("logit_softcap", self.logit_softcap, 0.0)
        _at_least("ngram_rows", self.ngram_rows, 1)
        if self.max_ngram and not 2 <= self.max_ngram <= 16:
            raise UserError(f"max_ngram={self.max_ngram} is out of range: expected 0, or 2 to 16 tokens")


@dataclass
class DataConfig:
    """Where the tokens come from, and in which order they are read."""

    dataset: str = "openwebtext"
    """A name, looked for in data/ and data/processed/, or a folder with train.bin and val.bin."""
    batch_size: int = 12
    """Sequences per micro-batch; the global batch is batch_size * gradient_accumulation_steps sequences."""
    micro_batch: int | Literal["auto"] | None = None
    """Sequences of one process in one forward pass, where not batch_size; the global batch stays. auto: what fits."""
    sample_order: Literal["random", "shuffled"] = "random"
    """random: offsets drawn anew each step (nanoGPT); shuffled: every window once per epoch, in random order."""
    stride: int | None = None
    """Distance between the starts of neighbouring windows in shuffled order. None is block_size (no overlap)."""

    def validate(self) -> None:
        _at_least("batch_size", self.batch_size, 1)
        if isinstance(self.micro_batch, int):
            _at_least("micro_batch", self.micro_batch, 1)
        if self.stride is not None:
            _at_least("stride", self.stride, 1)


@dataclass
class TrainingConfig:
    """The run: how long, from where, and what is kept of it."""

    out_dir: str = "out"
    """Folder for checkpoints, metrics.jsonl, loss.png and logs."""
    init_from: str = "scratch"
    """scratch, resume (continue the run in out_dir), auto (resume where there is a checkpoint, else scratch), a GPT-2
    name (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a checkpoint, out_dir or Hugging Face folder whose weights start
    a new run at step 0."""
    max_iters: int = 600000
    """Number of optimizer updates."""
    inclusive_max_iters: bool = False
    """Count max_iters as nanoGPT's train.py does: steps 0 to max_iters, one update more."""
    epochs: float | None = None
    """Length of the run in passes over the training tokens; sets max_iters (and lr_decay_iters unless given)."""
    gradient_accumulation_steps: int = 40
    """Micro-batches per update over all processes together; their number is shared among the processes."""
    allow_new_data: bool = False
    """Resume even where the training tokens are not those that the run began with."""
    eval_interval: int = 2000
    """Steps between evaluations of the train and val loss."""
    eval_iters: int = 200
    """Batches per split in such an evaluation; the same ones every time."""
    eval_only: bool = False
    """Evaluate once and stop."""
    final_eval: bool = True
    """Evaluate the whole validation split when the run ends."""
    always_save_checkpoint: bool = True
    """Save after every evaluation; False saves only where the val loss improved."""
    save_interval: int | None = None
    """Steps between checkpoints. None saves with the evaluations."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept, beside the best and the final one."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    save_nanogpt_ckpt: bool = False
    """Also write out_dir/ckpt.pt, which nanoGPT reads."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations in a row without a better val loss. None never stops early."""
    sample_interval: int | None = None
    """Steps between samples that the model writes while it trains (start, max_new_tokens, temperature, top_k)."""
    max_skipped_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite (each is left out), after which the run goes back."""
    max_rollbacks: int = 2
    """Returns to the last good checkpoint, with other batches from there on, before the run gives up."""
    skip_spikes: bool = False
    """Also leave out steps whose loss lies far above the recent ones; else they are only reported."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more arithmetic."""
    activation_budget: float | Literal["auto"] | None = "auto"
    """GiB that the blocks may keep of a micro-batch for the backward pass: as few of them as it takes are recomputed.
    auto recomputes what costs no time (norms, activation functions); None keeps all."""
    chunked_loss: bool | Literal["auto"] = "auto"
    """Head and loss a piece of the tokens at a time, never all logits at once. auto: where there are many of them."""

    def validate(self) -> None:
        _at_least("max_iters", self.max_iters, 0)
        _at_least("max_rollbacks", self.max_rollbacks, 0)
        if self.epochs is not None:
            _above("epochs", self.epochs, 0.0)
        for name in ("gradient_accumulation_steps", "eval_interval", "eval_iters", "keep_last", "max_skipped_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("save_interval", "keep_every", "early_stopping_patience", "sample_interval"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if not isinstance(self.activation_budget, (str, type(None))):
            _above("activation_budget", self.activation_budget, 0.0)
            if self.gradient_checkpointing:
                raise UserError(
                    "activation_budget decides which blocks are recomputed: leave out gradient_checkpointing"
                )
        if not self.out_dir:
            raise UserError("out_dir is empty: name a folder for the run, for example --out_dir=out")


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon for the matrices between embeddings and head with AdamW for all else."""

    optimizer_type: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon (kellerjordan.github.io/posts/muon): fewer steps to the same loss, each a little longer."""
    learning_rate: float = 6e-4
    """Peak learning rate, AdamW's. The others rise and fall with it."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon's matrices."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum (Nesterov's)."""
    embedding_learning_rate: float | None = None
    """With muon: AdamW's peak rate for the embeddings. None is learning_rate."""
    head_learning_rate: float | None = None
    """With muon: AdamW's peak rate for the head, be it tied or not. None is learning_rate."""
    ngram_learning_rate: float = 0.3
    """Rate of the n-gram embeddings, the same throughout: row-wise Adagrad, which steps them, lowers it by itself."""
    forget_ngrams: bool = False
    """Unlearn the n-grams of three tokens and more where a pass over the shuffled training text ends."""
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
    """How the moments are kept; bfloat16, stochastically rounded, takes half the memory."""
    weight_decay: float = 1e-1
    """Decoupled weight decay: on tensors of two or more dimensions; with muon on its matrices only."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment; nearer to 1 where a step sees few tokens."""
    grad_clip: float = 1.0
    """Clip the global gradient norm at this value; 0 is off."""
    fused: Literal["auto", "on", "off"] = "auto"
    """One kernel for the whole AdamW update; auto uses it on CUDA and on the CPU."""

    def validate(self) -> None:
        _above("learning_rate", self.learning_rate, 0.0)
        _at_least("weight_decay", self.weight_decay, 0.0)
        _above("muon_learning_rate", self.muon_learning_rate, 0.0)
        _above("ngram_learning_rate", self.ngram_learning_rate, 0.0)
        _between("muon_momentum", self.muon_momentum, 0.0, 1.0, open_right=True)
        for name in ("embedding_learning_rate", "head_learning_rate"):
            if getattr(self, name) is not None:
                _above(name, getattr(self, name), 0.0)
                if self.optimizer_type != "muon":
                    raise UserError(f"{name} belongs to --optimizer_type=muon; adamw has learning_rate for all")
        _between("beta1", self.beta1, 0.0, 1.0, open_right=True)
        _between("beta2", self.beta2, 0.0, 1.0, open_right=True)
        _at_least("grad_clip", self.grad_clip, 0.0)


@dataclass
class SchedulerConfig:
    """The learning rate as a function of the step."""

    decay_lr: bool = True
    """False keeps learning_rate throughout, without warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd is warmup-stable-decay: flat, then a linear cool-down to min_lr."""
    warmup_iters: int = 2000
    """Steps of linear warm-up; step 0 already has learning_rate / (warmup_iters + 1)."""
    lr_decay_iters: int | None = None
    """Step at which min_lr is reached. None is max_iters."""
    min_lr: float = 6e-5
    """Learning rate at the end of the decay; usually learning_rate / 10."""
    cooldown_frac: float = 0.4
    """Share of lr_decay_iters that the cool-down of wsd takes."""

    def validate(self) -> None:
        _at_least("warmup_iters", self.warmup_iters, 0)
        if self.lr_decay_iters is not None:
            _at_least("lr_decay_iters", self.lr_decay_iters, 0)
        _at_least("min_lr", self.min_lr, 0.0)
        _between("cooldown_frac", self.cooldown_frac, 0.0, 1.0)


@dataclass
class GenerationConfig:
    """How text is sampled."""

    start: str = "\n"
    """The prompt: text, FILE:path for a file's content, or - for standard input."""
    num_samples: int = 10
    """Samples drawn from the prompt."""
    max_new_tokens: int = 500
    """Tokens generated for each sample."""
    temperature: float = 0.8
    """Below 1 safer, above 1 wilder; 0 always takes the most likely token."""
    top_k: int | None = 200
    """Keep only the k most likely tokens. None or 0 keeps all."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv 1904.09751): keep the smallest set of tokens with this much probability; 1 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one (arXiv 2407.01082); 0 is off."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens already seen by this (arXiv 1909.05858); 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was generated."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of tokens before all else, by their ids, such as '{50256: -100}'."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; they are not part of it. One text, or a list such as '["END", "\\n\\n"]'."""

    def validate(self) -> None:
        _at_least("num_samples", self.num_samples, 1)
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        _at_least("temperature", self.temperature, 0.0)
        _between("temperature", self.temperature, 0.0, 1e30)  # float32 ends at 3e38
        if self.top_k is not None:
            _at_least("top_k", self.top_k, 0)
        _between("top_p", self.top_p, 0.0, 1.0, open_left=True)
        _between("min_p", self.min_p, 0.0, 1.0)
        _above("repetition_penalty", self.repetition_penalty, 0.0)
        _between("repetition_penalty", self.repetition_penalty, 0.0, 1e30)
        _between("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _between("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        for token, value in self.logit_bias.items():
            _at_least("a token id in logit_bias", token, 0)
            _between(f"logit_bias of token {token}", value, -1000.0, 1000.0)
        if any(not text for text in self.stop):
            raise UserError("stop holds an empty text, which would end every sample at once; leave it out")


@dataclass
class LoggingConfig:
    """What is told about a run, and where. metrics.jsonl in out_dir is always written."""

    log_interval: int = 1
    """Steps between logged training losses."""
    tensorboard: bool = False
    """Write TensorBoard event files to out_dir/tensorboard (extra: tensorboard)."""
    wandb_log: bool = False
    """Log to Weights & Biases (extra: wandb)."""
    wandb_project: str = "owt"
    """Weights & Biases project."""
    wandb_run_name: str = "gpt2"
    """Weights & Biases run name."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """Live progress bar or plain lines; auto shows the bar on a terminal only."""
    loss_plot: bool | None = None
    """Write out_dir/loss.png at the end (extra: plots). None does so where the extra is installed."""

    def validate(self) -> None:
        _at_least("log_interval", self.log_interval, 1)


@dataclass
class SystemConfig:
    """What the run uses of the machine. Whatever is auto is resolved once and announced at the start."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the matrix products; float16 trains with loss scaling. auto: bfloat16 where the device has
    it, CUDA or CPU; float16 on older CUDA; else float32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile: auto is on for CUDA with Triton, and for long runs of small models on a CPU; eager where it
    fails."""
    backend: str = "auto"
    """torch.distributed backend under torchrun: auto (nccl on CUDA, else gloo), nccl or gloo."""
    seed: int = 1337
    """Seed of weights, dropout, data order and sampling."""
    threads: int | None = None
    """CPU threads that torch uses. None leaves torch's own choice."""
    data_on_device: bool | Literal["auto"] = "auto"
    """Keep the training tokens in the device's memory. auto: on CUDA, where they take little of it."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record the model's kernels once, and launch them as one. auto: a small model that compiles on one GPU."""
    fp8: bool = False
    """The blocks' products in float8 while training (compute capability 8.9 and above): pays for wide layers."""

    def validate(self) -> None:
        _between("seed", self.seed, 0, 2**63 - 1)
        if self.threads is not None:
            _at_least("threads", self.threads, 1)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", self.device):
            raise UserError(f"device={self.device!r} is not one of auto, cpu, cuda, cuda:N, mps")
        if self.backend not in ("auto", "nccl", "gloo"):
            raise UserError(f"backend={self.backend!r} is not one of auto, nccl, gloo")


@dataclass
class Config:
    """All settings of a training run, in sections."""

    model: GPTConfig = field(default_factory=lambda: GPTConfig(vocab_size=None, bias=False))
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    def validate(self) -> None:
        """Checks every value that can be checked without data, device or torch. Raises UserError."""
        validate(self)
        if self.data.stride is not None and self.data.sample_order == "random":
            raise UserError("stride belongs to --sample_order=shuffled; random order has no windows to space")
        if self.optimizer.forget_ngrams and (self.data.sample_order == "random" or not self.model.max_ngram):
            raise UserError("forget_ngrams belongs to --max_ngram with --sample_order=shuffled, which has epochs")


def validate(tree: Any) -> None:
    """Calls validate() of every section of a dataclass tree."""
    for item in dataclasses.fields(tree):
        section = getattr(tree, item.name)
        if dataclasses.is_dataclass(section) and hasattr(section, "validate"):
            section.validate()


def to_dict(tree: Any) -> dict[str, Any]:
    """The tree as nested plain data (JSON and YAML can hold it). Shape: {section: {leaf: value}}."""
    return dataclasses.asdict(tree, dict_factory=lambda kv: {k: list(v) if isinstance(v, tuple) else v for k, v in kv})


def flatten(tree: Any) -> dict[str, Any]:
    """{leaf name: value} over all sections, as nanoGPT's flat settings."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(tree):
        value = getattr(tree, item.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def _at_least(name: str, value: float, low: float) -> None:
    if not low <= value < float("inf"):
        raise UserError(f"{name}={value} is out of range: expected {low:g} or more")


def _above(name: str, value: float, low: float) -> None:
    if not low < value < float("inf"):
        raise UserError(f"{name}={value} is out of range: expected a finite number above {low:g}")


def _between(
    name: str, value: float, low: float, high: float, open_left: bool = False, open_right: bool = False
) -> None:
    ok = (value > low if open_left else value >= low) and (value < high if open_right else value <= high)
    if not ok:
        left, right = "above" if open_left else "from", "below" if open_right else "to"
        raise UserError(f"{name}={value} is out of range: expected a value {left} {low:g} {right} {high:g}")
