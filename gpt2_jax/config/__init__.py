"""Every setting of a training run: frozen dataclasses.

A field's docstring is its entry in the `--help` of `gpt2_jax.train`. Lists of keys show its first line only, so lines
break between sentences only.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AttentionBackend = Literal["auto", "xla", "cudnn", "splash"]
TokenizerName = Literal["gpt2", "bytes", "chars"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
Remat = Literal["auto", "none", "dots", "full"]

IGNORE = -1  # a target that does not count in the loss


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The architecture of the model, and how it is computed."""

    vocab_size: int = 50257
    """Number of tokens in the vocabulary; 0 takes it from the tokenizer.
    The model pads it to a multiple of 128 internally."""
    block_size: int = 1024
    """Context length: the longest sequence, in tokens (n_positions in GPT-2)."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Attention heads per block. n_embd must be a multiple of it."""
    n_embd: int = 768
    """Width of the embeddings and of the residual stream."""
    dropout: float = 0.0
    """Dropout rate of the embeddings, the attention weights and both residual branches."""
    bias: bool = True
    """Biases in linear layers and layer norms. GPT-2 has them; nanoGPT's recipes do not."""
    gelu: Literal["tanh", "exact"] = "tanh"
    """The GELU activation: GPT-2 uses the tanh approximation, nanoGPT the exact function."""
    attention: AttentionBackend = "auto"
    """Attention backend. auto takes the fastest one that supports the device, dtype, shape and dropout.
    The run prints the reason."""
    scan_layers: bool = False
    """Scan over the layers instead of unrolling them: faster to compile and a smaller program, but slower updates."""
    remat: Remat = "none"
    """Rematerialization saves memory: the backward pass recomputes activations instead of storing them.
    dots recomputes everything except matmuls, full recomputes whole blocks.
    auto takes the least that fits into the device's memory; outside of training it is none.
    dots and full also gather the parameters sharded over mesh.fsdp a second time, instead of storing them."""
    loss_chunk: int = 4096
    """Tokens whose logits are in memory at the same time in the training loss; 0 for all."""

    def unrolled(self, attention: AttentionBackend = "xla") -> GPT2Config:
        """The same architecture without scan and rematerialization, by default with attention that runs everywhere.

        Its parameters have one entry per layer, as in checkpoints and exports.
        """
        return dataclasses.replace(self, scan_layers=False, remat="none", attention=attention)


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One of several sources of training tokens: a `[[data.sources]]` table."""

    train: str
    """Glob of its token files."""
    weight: float = 1.0
    """Its share of the training sequences, relative to the weights of the other sources."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training and validation data: either `text`, or token files in `val` and in one of `train` and `sources`."""

    text: str = ""
    """Text file or glob to train on. "stdlib" is the source code of the running Python's standard library."""
    train: str = ""
    """Glob of token files to train on: llm.c's or nanoGPT's .bin, or build-nanogpt's .npy.
    To mix several sources, write [[data.sources]] tables into a TOML file instead, each with train and weight."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources of token files, mixed by weight, instead of `train`."""
    val: str = ""
    """Glob of token files to validate on: needed with token files, not allowed with text."""
    tokenizer: TokenizerName = "gpt2"
    """Tokenizer of the text: gpt2 for GPT-2's byte pairs, bytes for raw bytes, chars for the text's characters."""
    val_fraction: float = 0.1
    """Fraction of text to hold out: whole files, chosen by a hash of their names, or the end of a single file."""
    characters: str = ""
    """Alphabet of tokenizer "chars", in token order.
    Empty takes the sorted characters of the text, or the alphabet in nanoGPT's meta.pkl."""
    document_starts: bool = False
    """Move each training window forward to the first document that starts in it, if one does."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with masked weight decay, clipping by global norm, and a warmup-cosine schedule."""

    learning_rate: float = 6e-4
    """Peak learning rate, reached at the last update of warmup."""
    final_learning_rate: float = 6e-5
    """Learning rate at the end of the cosine decay."""
    warmup_steps: int = 715
    """Updates of linear warmup."""
    decay_steps: int = 0
    """Update at which the cosine decay ends, counted from the start of the run; 0 for the last update."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""
    epsilon: float = 1e-8
    """Constant in AdamW's denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay of every tensor of rank 2 or more, embeddings included."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient: larger gradients are scaled down to it. 0 turns clipping off."""
    on_outlier: Literal["off", "stop", "skip", "rewind"] = "off"
    """Action at an update whose loss or gradient norm is an outlier, or not finite.
    stop ends the run, skip leaves parameters and moments as they are.
    rewind continues from the newest checkpoint and passes over the update. off watches for nothing."""
    outlier_window: int = 128
    """Updates that an update is compared with."""
    outlier_z_score: float = 6.0
    """Standard deviations above the mean of those updates that make an outlier."""
    rewind_updates: int = 1
    """Updates that rewind passes over: the outlier, and those right before it."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis. One of the two may be -1: all devices that the other one leaves."""

    data: int = -1
    """Replicas of the parameters. Each replica computes its share of the batch."""
    fsdp: int = 1
    """Devices per replica, which shard its parameters, its optimizer state and its share of the batch."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in OUT/checkpoints. The last update is always saved."""

    every: int = 1000
    """Updates between checkpoints; 0 saves the last update only."""
    keep: int = 2
    """Number of newest checkpoints to keep.
    Of those saved right after an evaluation, the best one is kept too."""
    best: str = "val_loss"
    """Evaluation that ranks checkpoints: val_loss, or a metric of a task in eval.tasks, as hellaswag/acc_norm."""
    strict: bool = False
    """Refuse to resume if the newest checkpoint is damaged, instead of setting it aside and using the one before."""
    max_failures: int = 3
    """Saves in a row that may fail, as on a full disk, before the run ends with exit code 1."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation data. It always runs after the last update."""

    every: int = 250
    """Updates between evaluations; 0 evaluates after the last update only."""
    tokens: int = 0
    """Validation tokens per evaluation, from the start of the data; 0 for all.
    The report at the end of a run on text always takes all."""
    sample_tokens: int = 0
    """Tokens of sample text to print at the end of the run."""
    prompts: tuple[str, ...] = ()
    """Texts that the model continues at each evaluation, into OUT/samples.jsonl; @FILE for the lines of a file."""
    prompt_tokens: int = 100
    """Tokens of each continuation."""
    tasks: tuple[str, ...] = ()
    """Tasks of gpt2_jax.evaluate to run too, such as hellaswag and lambada."""
    tasks_every: int = 0
    """Updates between evaluations of the tasks; 0 for eval.every."""
    tasks_limit: int = 0
    """Examples per task at most, or windows of a task that scores a stream of text; 0 for all."""
    tasks_data: tuple[str, ...] = ()
    """Directories or files with the examples of the tasks; none to read them from the Hugging Face hub."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Training rows in OUT/metrics.jsonl and on the terminal."""

    every: int = 10
    """Updates between training rows."""
    format: Literal["text", "json"] = "text"
    """What a run prints: lines or a bar; or each row of metrics.jsonl on stdout, and everything else on stderr."""
    to: tuple[TrackerName, ...] = ()
    """Trackers that get the rows too: tensorboard, wandb, trackio. Each is an extra to install."""
    noise_scale: bool = False
    """Measure the norms of the gradients of micro-batches and devices too.
    gpt2_jax.report estimates from them the batch size above which more sequences help little."""
    layers: int = 0
    """Updates between rows about each layer; 0 for none.
    They have norms of gradients, updates and activations, saturated GELUs and the entropy of attention."""
    profile: str = ""
    """START:COUNT traces COUNT updates from update START on into OUT/profile, and prints where their time went."""
    check_replicas: int = 0
    """Updates between comparisons of the copies of the training state on different devices.
    0 compares them only when the run saves or evaluates."""
    on_mismatch: Literal["stop", "restore"] = "stop"
    """Action if the copies differ: end the run with exit code 1, or continue from the newest checkpoint."""
    stall_seconds: float = 0.0
    """Seconds without progress after which a process prints what it waits for and the stacks of its threads.
    Take more than the longest compilation, save or batch of an evaluation lasts. 0 for never."""
    stall_exit: bool = False
    """End all processes with exit code 1 at such a stall, so that a launcher restarts them."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A complete training run, as written to config.toml in the run directory."""

    out: str
    """Run directory. If it has checkpoints of the same config, the run resumes from the newest one, bit for bit."""
    steps: int
    """Total number of optimizer updates."""
    batch_size: int
    """GLOBAL number of sequences per update, over all devices and micro-batches."""
    micro_batch_size: int | Literal["auto"] = 0
    """Sequences per device and forward pass; 0 for the device's whole share of the batch.
    Smaller micro-batches need less memory: gradients are accumulated until batch_size is reached.
    auto takes the most that fit into the device's memory, up to the size from which more are not faster."""
    batch_ramp: tuple[tuple[int, int], ...] = ()
    """Smaller batches at the start of the run, as pairs of tokens and sequences.
    Until the run has trained on that many tokens, each batch has that many sequences.
    After the last pair, batch_size applies."""
    skip_updates: tuple[int, ...] = ()
    """Updates to pass over: their batches are not trained on.
    on_outlier = "rewind" adds to them."""
    init_from: str = ""
    """Model to fine-tune: any MODEL that gpt2_jax.load takes. Empty for random initial parameters."""
    seed: int = 1337
    """Seed of the initial parameters, the data order and dropout."""
    dtype: Dtype = "auto"
    """Dtype of activations and matmuls.
    auto is bfloat16 on accelerators, float16 on NVIDIA GPUs of the generations Volta and Turing, float32 on CPU.
    float16 trains with dynamic loss scaling: updates whose gradients overflow are skipped and counted.
    Parameters, optimizer state, softmax, layer norm statistics and the loss are always float32."""
    deterministic: bool = False
    """Bit-for-bit equal results on NVIDIA GPUs: excludes kernels that add in no fixed order, and turns off autotuning.
    Updates are slower. CPUs and TPUs are deterministic without it."""
    sdc_checker: bool = False
    """Checks on TPU for silent data corruption: the compiler repeats a part of the computations and compares.
    Updates are slower."""
    compiler_options: Literal["none", "experimental"] = "none"
    """Options of XLA for the training and evaluation steps: none, or those that others use on the chip.
    The latter were compiled here, and not measured.
    An option that XLA_FLAGS or LIBTPU_INIT_ARGS names is left as it is there. The run prints the options."""
    compilation_cache: str = "auto"
    """Directory that caches compiled programs for the next start.
    auto is gpt2_jax/programs in the user's cache directory; empty turns the cache off.
    Its programs are executed, so only a flag can name a directory: a file has auto or an empty value."""
    model: GPT2Config = dataclasses.field(default_factory=GPT2Config)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    @property
    def micro_batch_limit(self) -> int:
        """`micro_batch_size` after "auto" is resolved: the most sequences per device and forward pass, 0 for all."""
        assert self.micro_batch_size != "auto", "planning/micro_batch.py resolves it"
        return self.micro_batch_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The part of a `TrainConfig` that a trained model needs: the architecture, and the tokenizer in `data`."""

    model: GPT2Config = dataclasses.field(default_factory=GPT2Config)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config as `{"steps": ..., "model.n_layer": ...}`, in the order of its fields."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


# Keys that change speed, memory or output, but not the mathematics. At most they change the order of float additions
# and, with dropout, which of the equally likely masks is drawn. A resumed run checks `skip_updates` by itself.
_NOT_MATHEMATICAL = re.compile(
    r"out|steps|micro_batch_size|skip_updates|deterministic|sdc_checker|compiler_options|compilation_cache"
    r"|(mesh|checkpoint|eval|log)\..*"
    r"|model\.(attention|scan_layers|remat|loss_chunk)"
    r"|data\.(text|train|val|sources)"  # files may move: the fingerprint of the data tells whether they are the same
)


def differences(config: TrainConfig, saved: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The keys that change the mathematics of a run, each with its value in `saved` and in `config`."""
    old, new = flatten(saved), flatten(config)
    return {key: (old[key], new[key]) for key in new if new[key] != old[key] and not _NOT_MATHEMATICAL.fullmatch(key)}
