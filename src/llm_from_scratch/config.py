"""Every setting of a run: name, type, default, bounds and the text that `--help` prints. Names are nanoGPT's if
nanoGPT has the setting; its defaults are in config/train_nanogpt.py. A leaf name is unique over all sections, so
`--learning_rate=3e-4`, `--optimizer.learning_rate=3e-4`, a nested YAML file and a flat Python preset set the same
field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .conflicts import check_model, check_run
from .errors import UserError
from .mixture import read_mixture
from .settings import Settings, above, at_least, between, matches, validate

GATED_ACTIVATIONS = ("swiglu",)  # activations with two inputs, and so a third matrix in the MLP


@dataclass
class GPTConfig(Settings):
    """The model's architecture."""

    block_size: int = 1024
    """Context length in tokens."""
    vocab_size: int | None = 50304
    """Rows of the token embedding. None: from the data (GPT-2's 50257 is padded to 50304)."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention (query) heads. Must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Dropout probability. Use 0 for pretraining, 0.1 or more for finetuning on little data."""
    bias: bool = True
    """Biases in linear layers and LayerNorms, as in GPT-2. False is slightly better and faster."""
    n_kv_head: int | None = None
    """Key/value heads of grouped-query attention. Must divide n_head. None: one per query head."""
    head_dim: int | None = None
    """Width of an attention head. None: n_embd / n_head."""
    qkv_bias: bool = False
    """Biases of queries, keys and values even if bias=False (as in Qwen2)."""
    pos_embedding: Literal["learned", "rope"] = "learned"
    """Position encoding: a learned table (GPT-2) or rotary embeddings (RoPE, arXiv 2104.09864)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Slow down the rotary frequencies for a longer context than in pretraining. linear (arXiv 2306.15595): all
    frequencies. llama3 (as in Llama 3.1) and yarn (arXiv 2309.00071): only the low ones."""
    rope_factor: float = 1.0
    """With rope_scaling: divide the scaled frequencies by this."""
    rope_original: int | None = None
    """With llama3 or yarn: the context length in pretraining."""
    rope_low: float = 1.0
    """With llama3 or yarn: frequencies with fewer rotations than this in rope_original tokens are divided by
    rope_factor."""
    rope_high: float | None = None
    """With llama3 or yarn: frequencies with more rotations than this are unchanged. None: 4 (llama3) or 32 (yarn)."""
    rope_attention: float | None = None
    """With yarn: multiply the rotated queries and keys by this. None: 0.1 * ln(rope_factor) + 1."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalization layer."""
    norm_eps: float = 1e-5
    """Epsilon of the normalization layers."""
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"
    """MLP activation: exact GELU (nanoGPT), tanh GELU (OpenAI's GPT-2), squared ReLU or SwiGLU."""
    mlp_hidden: int | None = None
    """Hidden width of the MLP. None: 4 * n_embd, or for swiglu 8/3 * n_embd rounded up to a multiple of 64."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head, before RoPE (as in Qwen3)."""
    tie_embeddings: bool = True
    """Share one matrix between the token embedding and the output head."""
    logit_softcap: float = 0.0
    """Soft-cap the logits: c * tanh(logits / c). 0: off."""
    embedding_norm: bool = False
    """Normalize the embeddings before the first block."""
    zero_init: bool = False
    """Initialize the output projections of the blocks, and an untied head, to zero. Works well with Muon."""
    max_ngram: int = 0
    """Add embeddings of the last 2, 3, ..., max_ngram tokens, so that small models learn faster. 0: off."""
    ngram_rows: int = 65536
    """Rows of the hash table for each n-gram length."""

    @property
    def is_gated(self) -> bool:
        """Whether the activation has two inputs: act(c_gate(x), c_fc(x))."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP. If gated, it has three matrices: 8/3 gives as many parameters as 4 does."""
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        return 64 * -(-8 * self.n_embd // (3 * 64)) if self.is_gated else 4 * self.n_embd

    def validate(self) -> None:
        """Raises UserError if the sizes do not fit together."""
        at_least(self, 1, "block_size", "n_layer", "n_head", "n_embd", "vocab_size")
        at_least(self, 1, "n_kv_head", "head_dim", "mlp_hidden", "ngram_rows", "rope_original")
        at_least(self, 0, "logit_softcap")
        above(self, 0, "rope_theta", "norm_eps", "rope_attention")
        between(self, 1, 1e6, "rope_factor")
        between(self, 1e-6, 1e6, "rope_low", "rope_high")
        between(self, 0, 1, "dropout", open_right=True)
        check_model(self)


@dataclass
class DataConfig(Settings):
    """The training data and its order."""

    dataset: str = "openwebtext"
    """A name in data/ or data/processed/, a folder with train.bin and val.bin, or a mixture: '{book: 0.7, code: 0.3}'.
    llm-train's default: the most recently prepared data."""
    batch_size: int = 8
    """Sequences per batch. The global batch has batch_size * gradient_accumulation_steps sequences."""
    micro_batch: int | Literal["auto"] | None = None
    """Sequences per process per forward pass; the global batch is unchanged. None: batch_size. auto: as many as fit
    in memory, up to about 4,096 tokens on a CPU (1,024 with LoRA) and 65,536 on a GPU."""
    sample_order: Literal["random", "shuffled"] = "shuffled"
    """random: random offsets at every step (nanoGPT). shuffled: every window once per epoch, in random order."""
    stride: int | None = None
    """Distance between the starts of neighbouring windows in shuffled order. None: block_size (no overlap)."""
    data_cache: float = 100.0
    """Limit (GiB) of data/cache/remote, for data in an object store (extra: remote). Larger data is read in parts."""
    documents: bool | Literal["auto"] = "auto"
    """Train on whole documents: a window begins at the start of a document, and attention stays within each document.
    auto: for conversations and one-line documents (llm-prepare --lines=True)."""

    def validate(self) -> None:
        at_least(self, 1, "batch_size", "micro_batch", "stride")
        above(self, 0, "data_cache")
        read_mixture(self.dataset)


@dataclass
class TrainingConfig(Settings):
    """The training run: length, initial weights, evaluation, checkpoints and memory."""

    out_dir: str = "out"
    """Folder for checkpoints, README.md, metrics.jsonl, loss.png and logs."""
    init_from: str = "scratch"
    """scratch; resume (continue the run in out_dir); auto (resume if there is a checkpoint, else scratch); or
    pretrained weights: gpt2 to gpt2-xl, owner/name on Hugging Face, a Hugging Face folder, a checkpoint or out_dir."""
    max_iters: int = 1000
    """Number of steps."""
    inclusive_max_iters: bool = False
    """Count max_iters as nanoGPT's train.py does: steps 0 to max_iters, which is one more step."""
    epochs: float | None = None
    """Length of the run in passes over the training tokens. Sets max_iters (and lr_decay_iters unless given)."""
    gradient_accumulation_steps: int = 1
    """Batches per step, in total over all processes."""
    allow_new_data: bool = False
    """Resume even if the training tokens have changed since the run started."""
    eval_interval: int = 100
    """Steps between evaluations of the train and val loss."""
    eval_iters: int = 20
    """Batches per split in each evaluation. Always the same batches."""
    eval_only: bool = False
    """Evaluate once and stop."""
    final_eval: bool | Literal["always"] = True
    """Evaluate the whole val split at the end. True: skip it if it takes over 2 minutes and longer than training."""
    eval_tasks: str | None = None
    """lm-evaluation-harness tasks for every evaluation (extra: eval), comma-separated: names, YAML files or folders."""
    eval_limit: float | None = None
    """Documents per task of eval_tasks; below 1: a fraction of them. None: all."""
    always_save_checkpoint: bool = True
    """Save after every evaluation. False: only if the val loss improved."""
    save_interval: int | None = None
    """Steps between checkpoints. None: save after evaluations."""
    keep_last: int = 2
    """Number of recent checkpoints to keep, in addition to the best."""
    keep_every: int | None = None
    """Also keep the checkpoints at multiples of this step."""
    mirror: str | None = None
    """Also keep the checkpoints at this URL, such as s3://BUCKET/FOLDER (extra: remote). If out_dir is
    missing or damaged, the run resumes from this copy. The URL is not stored: give it again to resume."""
    save_nanogpt_ckpt: bool = False
    """Also write out_dir/ckpt.pt for nanoGPT."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a better val loss. None: never."""
    sample_interval: int | None = None
    """Steps between samples (see start, max_new_tokens, temperature, top_k). The last is from the finished model."""
    max_skipped_steps: int = 5
    """Skip steps with a non-finite loss or gradient. After this many in a row, return to the last good checkpoint."""
    max_rollbacks: int = 2
    """Stop the run after this many rollbacks to the last good checkpoint. Each uses different batches."""
    skip_spikes: bool = False
    """Also skip steps with a loss far above recent losses. False: only report them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    activation_budget: float | Literal["auto"] | None = "auto"
    """Memory limit (GiB) for stored activations. Blocks beyond it are recomputed in the backward pass. auto: recompute
    norms and activation functions, which costs no time. None: store everything."""
    chunked_loss: bool | Literal["auto"] = "auto"
    """Compute head and loss in chunks so the full logits are never in memory. auto: for large vocabularies."""
    flex_attention: bool = False
    """With documents, on CUDA: use torch's flex_attention, which skips other documents. Untested."""

    def validate(self) -> None:
        at_least(self, 0, "max_iters", "max_rollbacks")
        at_least(self, 1, "gradient_accumulation_steps", "eval_interval", "eval_iters", "keep_last", "keep_every")
        at_least(self, 1, "max_skipped_steps", "save_interval", "early_stopping_patience", "sample_interval")
        above(self, 0, "epochs", "activation_budget", "eval_limit")
        if not self.out_dir:
            raise UserError("out_dir is empty: choose a folder for the run, for example --out_dir=out")
        url = "a URL such as s3://BUCKET/FOLDER or file:///FOLDER; keys belong in the environment, not in the URL"
        matches(self, r"memory|[a-z0-9+]+://(?![^/]*:[^/]*@).+", url, "mirror")


@dataclass
class FinetuneConfig(Settings):
    """The weights to train: all, all except frozen ones, or only adapters (LoRA, arXiv 2106.09685)."""

    lora_rank: int | None = None
    """Train adapters of this rank and freeze the weights of init_from. Checkpoints hold only adapters. None: off."""
    lora_alpha: float | None = None
    """Adapters are scaled by lora_alpha / lora_rank. None: 2 * lora_rank."""
    lora_targets: tuple[str, ...] = ("transformer.h",)
    """Layers with an adapter, by parts of their names: attn or c_attn,c_fc or 'h.[0-3].*'. Default: all blocks."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapters' inputs."""
    loss: Literal["next_token", "dpo"] = "next_token"
    """dpo: train on pairs of a chosen and a rejected answer (direct preference optimization, arXiv 2305.18290)."""
    dpo_beta: float = 0.1
    """With dpo: larger values keep the model closer to init_from."""
    freeze: tuple[str, ...] = ()
    """Parameters that do not train, by parts of their names, for example wte or 'h.[0-3]'."""
    before_after: bool | Literal["auto"] = "auto"
    """Finetuning: compare texts and loss before and after training. The comparison is printed at the end and written to
    README.md. auto: with one process, or in a terminal."""

    def validate(self) -> None:
        at_least(self, 1, "lora_rank")
        above(self, 0, "lora_alpha", "dpo_beta")
        between(self, 0, 1, "lora_dropout", open_right=True)


@dataclass
class OptimizerConfig(Settings):
    """AdamW (arXiv 1711.05101), or Muon for the matrices of the blocks and AdamW for everything else."""

    optimizer_type: Literal["adamw", "muon", "normuon"] = "adamw"
    """adamw; muon (kellerjordan.github.io/posts/muon), which needs fewer but slightly slower steps; normuon: muon with
    steps of equal size for all neurons (arXiv 2510.05491)."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW. The schedule also scales the other rates, except ngram_learning_rate."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum."""
    embedding_learning_rate: float | None = None
    """With muon: AdamW's peak learning rate for the embeddings. None: learning_rate."""
    head_learning_rate: float | None = None
    """With muon: AdamW's peak learning rate for the head, tied or not. None: learning_rate."""
    lr_scaling: Literal["none", "mup"] = "none"
    """mup: multiply AdamW's learning rates of hidden matrices and the head by base_width / n_embd (arXiv 2203.03466). A
    rate tuned at one width then works at others. Needs tie_embeddings=False."""
    base_width: int | None = None
    """With lr_scaling=mup: the n_embd at which the learning rates are unchanged."""
    ngram_learning_rate: float = 0.3
    """Learning rate of the n-gram embeddings (row-wise Adagrad). It does not follow the schedule."""
    forget_ngrams: bool = False
    """Reset the embeddings of n-grams of 3 or more tokens after an epoch (shuffled order), if half an epoch is left."""
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the optimizer's moments. bfloat16 (stochastically rounded) needs half the memory."""
    weight_decay: float = 1e-1
    """Decoupled weight decay of tensors with two or more dimensions; with muon, only of Muon's matrices."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.99
    """Decay rate of AdamW's second moment. Use a value closer to 1 if a step sees few tokens."""
    grad_clip: float = 1.0
    """Clip the global gradient norm to this value. 0: off."""
    fused: Literal["auto", "on", "off"] = "auto"
    """Use the fused AdamW kernel. auto: on CUDA and on the CPU."""

    def validate(self) -> None:
        above(self, 0, "learning_rate", "muon_learning_rate", "ngram_learning_rate")
        above(self, 0, "embedding_learning_rate", "head_learning_rate")
        at_least(self, 0, "weight_decay", "grad_clip")
        at_least(self, 1, "base_width")
        between(self, 0, 1, "muon_momentum", "beta1", "beta2", open_right=True)


@dataclass
class SchedulerConfig(Settings):
    """The learning-rate schedule."""

    decay_lr: bool = True
    """False: a constant learning_rate without warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. wsd (warmup-stable-decay): constant, then a linear cool-down to min_lr."""
    warmup_iters: int = 100
    """Steps of linear warm-up. Step 0 uses learning_rate / (warmup_iters + 1)."""
    lr_decay_iters: int | None = None
    """Step at which min_lr is reached. None: max_iters."""
    min_lr: float = 1e-4
    """Learning rate at the end of the decay, usually learning_rate / 10."""
    cooldown_frac: float = 0.4
    """Length of wsd's cool-down as a fraction of lr_decay_iters."""
    lr_ends: dict[int, float] = field(default_factory=dict)
    """With schedule=linear: changes of lr_decay_iters. '{0: 900, 200: 1100}': 900 until step 200, then 1100. Set by a
    run with a budget (--budget) if its length changes."""

    def validate(self) -> None:
        at_least(self, 0, "warmup_iters", "lr_decay_iters", "min_lr")
        between(self, 0, 1, "cooldown_frac")
        at_least({"a step in lr_ends": min(self.lr_ends, default=0)}, 0)
        above({f"lr_ends[{step}] - {step}": end - step for step, end in self.lr_ends.items()}, 0)


@dataclass
class GenerationConfig(Settings):
    """Sampling of text."""

    start: str = "\n"
    """The prompt: text, FILE:path for the content of a file, or - for standard input."""
    num_samples: int = 1
    """Number of samples."""
    max_new_tokens: int = 500
    """Tokens per sample."""
    temperature: float = 0.8
    """Below 1: more predictable. Above 1: more random. 0: always the most likely token."""
    top_k: int | None = 200
    """Sample from the k most likely tokens. None or 0: from all."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv 1904.09751): keep the smallest set of tokens with this total probability. 1: off."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one (arXiv 2407.01082). 0: off."""
    repetition_penalty: float = 1.0
    """Penalty for tokens already seen: divides positive and multiplies negative logits (arXiv 1909.05858). 1: off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits by token id before any other processing, for example '{50256: -100}'."""
    stop: tuple[str, ...] = ()
    """Stop sequences: the first one ends the sample and is not printed. One string, or a list: '["END", "\\n\\n"]'."""
    ignore_eos: bool = False
    """Continue after tokens that end a text or a turn. Otherwise the first one ends the sample and is not printed."""

    def validate(self) -> None:
        at_least(self, 1, "num_samples", "max_new_tokens")
        at_least(self, 0, "temperature", "top_k")
        above(self, 0, "repetition_penalty")
        between(self, 0, 1e30, "temperature", "repetition_penalty")  # float32 ends at 3e38
        between(self, 0, 1, "top_p", open_left=True)
        between(self, 0, 1, "min_p")
        between(self, -100, 100, "presence_penalty", "frequency_penalty")
        at_least({"a token id in logit_bias": min(self.logit_bias, default=0)}, 0)
        between({f"logit_bias of token {token}": value for token, value in self.logit_bias.items()}, -1000, 1000)
        if any(not text for text in self.stop):
            raise UserError("stop contains an empty string, which would end every sample immediately; remove it")


@dataclass
class LoggingConfig(Settings):
    """Logging and progress output. out_dir/metrics.jsonl is always written."""

    log_interval: int = 10
    """Steps between logged training losses."""
    tensorboard: bool | None = None
    """Write TensorBoard event files to out_dir/tensorboard (extra: tensorboard). None: if the extra is installed."""
    wandb_log: bool = False
    """Log to Weights & Biases (extra: wandb)."""
    wandb_project: str = "owt"
    """Weights & Biases project."""
    wandb_run_name: str = "gpt2"
    """Weights & Biases run name."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """Progress bar, plain lines, or nothing. auto: in a terminal the bar and a short sample at the end, else lines."""
    loss_plot: bool | None = None
    """Write out_dir/loss.png at the end (extra: plots). None: if the extra is installed."""

    def validate(self) -> None:
        at_least(self, 1, "log_interval")


@dataclass
class SystemConfig(Settings):
    """Device, precision and compilation. The choices made for auto are printed at the start."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; float16 trains with loss scaling. auto: bfloat16 on CUDA (float16 on older
    devices), and in training on a CPU that supports it; else float32."""
    compile: bool | Literal["auto"] = "auto"
    """Use torch.compile. auto: on CUDA with Triton, and in long CPU runs of small models; if it fails, eager mode."""
    backend: str = "auto"
    """torch.distributed backend: auto (nccl on CUDA, else gloo), nccl or gloo."""
    collective_timeout: float = 600.0
    """End the run if a process does not answer for this many seconds. The run ends sooner if a process dies."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: each process holds the whole model. fsdp: a part of every parameter, gradient and moment (FSDP2). hsdp: fsdp
    within groups of processes, ddp between them. auto: ddp if the model fits on each device, else fsdp."""
    shard_group: int | None = None
    """With hsdp: processes that share one copy of the model. None: the processes of a machine."""
    reshard_after_forward: bool = True
    """With fsdp and hsdp: free a block's weights after its forward pass. False: a third less traffic, more memory."""
    seed: int = 1337
    """Random seed of weights, dropout, data order and sampling."""
    threads: int | None = None
    """Number of CPU threads for torch. None: torch's default."""
    keep_memory: bool | Literal["auto"] = "auto"
    """CPU: keep freed memory of large models (faster, a fifth more memory). auto: if half the free memory is enough."""
    data_on_device: bool | Literal["auto"] = "auto"
    """Keep the tokens in device memory. auto: on CUDA, if they need at most 4 GiB and a tenth of the free memory."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record the training step as a CUDA graph. auto: for small compiled models on one GPU."""
    fp8: bool = False
    """Compute the blocks' matrix products in float8 (compute capability 8.9 or higher). Faster for wide layers."""

    def validate(self) -> None:
        between(self, 0, 2**63 - 1, "seed")
        at_least(self, 1, "threads")
        at_least(self, 2, "shard_group")
        between(self, 5, 7 * 86400, "collective_timeout")
        matches(self, r"auto|cpu|mps|cuda(:[0-9]{1,2})?", "one of auto, cpu, cuda, cuda:N, mps", "device")
        matches(self, "auto|nccl|gloo", "one of auto, nccl, gloo", "backend")


@dataclass
class Config(Settings):
    """All settings of a training run. The defaults train a small GPT-2 on any machine."""

    model: GPTConfig = field(
        default_factory=lambda: GPTConfig(
            block_size=256, vocab_size=None, n_layer=6, n_head=4, n_embd=256, dropout=0.1, bias=False
        )
    )
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    def validate(self) -> None:
        """Checks every value that can be checked without data, device or torch. Raises UserError."""
        validate(self)
        check_run(self)
