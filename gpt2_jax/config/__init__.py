"""Every knob of a training run: frozen dataclasses, and what can be seen to be impossible in them.

Whatever the user got wrong is a `UserError`: one line that says what was found, what was expected and
what to type.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

from gpt2_jax.errors import UserError

Dtype = Literal["auto", "float32", "bfloat16"]
AttentionBackend = Literal["auto", "xla", "cudnn", "splash"]
TokenizerName = Literal["gpt2", "bytes", "chars"]

IGNORE = -1  # A target that the loss does not count.


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The architecture, and how it is computed."""

    vocab_size: int = 50257
    """Tokens in the vocabulary; 0 takes the tokenizer's. Padded to a multiple of 128 inside the model only."""
    block_size: int = 1024
    """Longest sequence, in tokens (GPT-2's n_positions)."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads per block."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Dropout rate after the embeddings, on attention weights and on both residual branches."""
    bias: bool = True
    """Biases in linear layers and layer norms. GPT-2 has them; nanoGPT's recipes do not."""
    gelu: Literal["tanh", "exact"] = "tanh"
    """GPT-2 uses the tanh approximation of GELU, nanoGPT the exact one."""
    attention: AttentionBackend = "auto"
    """Attention kernel: auto picks by platform, dtype, shape and dropout, and the run says why."""
    scan_layers: bool = False
    """Compile one block and scan over the layers: faster to compile, smaller program, slower steps."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, or whole blocks. With the last two it
    also gathers parameters split over mesh.fsdp again, and does not keep them."""
    loss_chunk: int = 4096
    """Tokens whose logits exist at the same time in the training loss; 0 for all."""

    def unrolled(self, attention: AttentionBackend = "xla") -> GPT2Config:
        """The same architecture without scan and rematerialisation, by default with attention that runs everywhere.

        Its parameters have one entry per layer, as in checkpoints and exports.
        """
        return dataclasses.replace(self, scan_layers=False, remat="none", attention=attention)


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One of several sources of training tokens: a `[[data.sources]]` table."""

    train: str
    """Glob of its token files."""
    weight: float = 1.0
    """Its share of the training sequences, relative to the other weights."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from: `text`, or `val` with either `train` or `sources`."""

    text: str = ""
    """Text file or glob to train on; "stdlib" is the source of the running Python's standard library."""
    train: str = ""
    """Glob of token files to train on: llm.c's and nanoGPT's .bin, build-nanogpt's .npy. For several sources with
    weights write [[data.sources]] tables into a TOML file instead, each with train and weight."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources, mixed by weight, instead of `train`."""
    val: str = ""
    """Glob of token files to validate on."""
    tokenizer: TokenizerName = "gpt2"
    """How text becomes tokens: GPT-2's byte pairs, raw bytes, or the text's own characters."""
    val_fraction: float = 0.1
    """Share of `text` held out: of the files, by a hash of their names, or the end of a single file."""
    characters: str = ""
    """Alphabet of tokenizer "chars", in token order; empty takes the text's own, sorted, or nanoGPT's meta.pkl."""
    document_starts: bool = False
    """Move each training window forward to the first document that starts in it, if one does."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Clip by global norm, then AdamW with masked decay, on a warmup-cosine schedule."""

    learning_rate: float = 6e-4
    """Peak learning rate, reached by the last warm-up update."""
    final_learning_rate: float = 6e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 715
    """Updates of linear warm-up."""
    decay_steps: int = 0
    """Update at which the cosine ends, warm-up included; 0 for `steps`."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled decay of every tensor of rank 2 and up (embeddings included)."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 for no clipping."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left."""

    data: int = -1
    """Replicas: each computes its share of the batch."""
    fsdp: int = 1
    """Devices that share one copy of parameters and optimizer state."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is written to OUT/checkpoints, always after the last update too."""

    every: int = 1000
    """Updates between checkpoints; 0 for the last one only."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best of those that were saved right after an evaluation."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Validation during the run, always after the last update too."""

    every: int = 250
    """Updates between evaluations; 0 for the last one only."""
    tokens: int = 0
    """Validation tokens per evaluation, from the first on; 0 for all. The end of a run on text takes all too."""
    sample_tokens: int = 0
    """Tokens that the finished model writes at the end of the run."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Rows of OUT/metrics.jsonl, and the lines or the bar that you see."""

    every: int = 10
    """Updates between training rows."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run, whole: what config.toml in the run directory holds."""

    out: str
    """Run directory. If it holds checkpoints of the same config, the run continues exactly."""
    steps: int
    """Optimizer updates, in total."""
    batch_size: int
    """GLOBAL sequences per update, over all devices and micro-batches."""
    micro_batch_size: int = 0
    """Sequences per device per forward pass; 0 for all at once. Accumulation follows from the two sizes."""
    batch_ramp: tuple[tuple[int, int], ...] = ()
    """Smaller batches at the start: pairs (until this many tokens, this many sequences), then batch_size."""
    init_from: str = ""
    """MODEL to start from (fine-tuning), as `gpt2_jax.load` takes it; empty for random initial parameters."""
    seed: int = 1337
    """Seeds the initial parameters, the data order and dropout."""
    dtype: Dtype = "auto"
    """Of the matrix products: auto is bfloat16 on accelerators and float32 on CPU. The rest is float32."""
    compilation_cache: str = "auto"
    """Directory for compiled programs, which the next start need not compile: auto is gpt2_jax/programs in the user's
    cache directory, empty for none."""
    model: GPT2Config = dataclasses.field(default_factory=GPT2Config)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The part of a `TrainConfig` that a trained model needs: the architecture, and in `data` the tokenizer."""

    model: GPT2Config = dataclasses.field(default_factory=GPT2Config)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


# Keys that change speed, memory or what is written, but not what is computed: at most the order of float
# additions and, with dropout, which of the equally likely masks are drawn.
NOT_MATHEMATICS = re.compile(
    r"out|steps|micro_batch_size|compilation_cache|(mesh|checkpoint|eval|log)\..*"
    r"|model\.(attention|scan_layers|remat|loss_chunk)"
    r"|data\.(text|train|val|sources)"  # files may move; that they are the same is seen from their fingerprint
)


def differences(ours: TrainConfig, theirs: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The keys that change the mathematics of a run, each with its value there and here."""
    here, there = flatten(ours), flatten(theirs)
    return {
        key: (there[key], here[key]) for key in here if here[key] != there[key] and not NOT_MATHEMATICS.fullmatch(key)
    }


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config as `{"steps": ..., "model.n_layer": ...}`, in the order of its declaration."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def validate(config: TrainConfig) -> None:
    """Refuses what can be seen to be impossible without data and devices.

    Raises:
        UserError: names the key, its value and what to type instead.
    """
    values = flatten(config)

    def require(key: str, holds: Callable[[Any], bool], expected: str) -> None:
        if not holds(values[key]):
            raise UserError(f"{key} = {values[key]!r}; expected {expected}")

    for key in ("steps", "batch_size", "model.block_size", "model.n_layer", "model.n_head", "model.n_embd"):
        require(key, lambda value: value >= 1, "at least 1")
    for key in ("log.every", "checkpoint.keep"):
        require(key, lambda value: value >= 1, "at least 1")
    for key in ("micro_batch_size", "checkpoint.every", "eval.every", "eval.tokens", "eval.sample_tokens"):
        require(key, lambda value: value >= 0, "0 or more")
    for key in ("model.vocab_size", "model.loss_chunk", "optimizer.warmup_steps", "optimizer.decay_steps"):
        require(key, lambda value: value >= 0, "0 or more")
    for key in ("optimizer.final_learning_rate", "optimizer.weight_decay", "optimizer.clip_norm"):
        require(key, lambda value: 0 <= value < float("inf"), "a finite number, 0 or more")
    for key in ("optimizer.learning_rate", "optimizer.epsilon"):
        require(key, lambda value: 0 < value < float("inf"), "a finite number above 0")
    for key in ("optimizer.beta1", "optimizer.beta2", "model.dropout"):
        require(key, lambda value: 0 <= value < 1, "0 or more and below 1")
    require("seed", lambda value: 0 <= value < 2**32, "0 or more and below 2**32")
    require("data.val_fraction", lambda value: 0 < value < 1, "above 0 and below 1")
    require("mesh.data", lambda value: value == -1 or value >= 1, "-1 or at least 1")
    require("mesh.fsdp", lambda value: value == -1 or value >= 1, "-1 or at least 1")
    require("out", bool, "the name of a run directory")

    model = config.model
    if model.n_embd % model.n_head:
        raise UserError(f"model.n_embd = {model.n_embd} is not a multiple of model.n_head = {model.n_head}")
    if config.mesh.data == -1 and config.mesh.fsdp == -1:
        raise UserError("mesh.data and mesh.fsdp are both -1; only one can take what is left")
    decay_steps = config.optimizer.decay_steps or config.steps
    if config.optimizer.warmup_steps > decay_steps:
        raise UserError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} is more than the {decay_steps} updates of "
            f"the schedule; type --optimizer.warmup_steps {decay_steps // 10}"
        )
    previous_tokens, previous_size = 0, 1
    for tokens, size in config.batch_ramp:
        if tokens <= previous_tokens or size < previous_size or size > config.batch_size:
            raise UserError(
                f"batch_ramp = {config.batch_ramp}; expected pairs (tokens, sequences), tokens rising and sequences "
                f"growing towards batch_size = {config.batch_size}"
            )
        previous_tokens, previous_size = tokens, size
    data = config.data
    if [bool(data.text), bool(data.train), bool(data.sources)].count(True) != 1 or bool(data.text) == bool(data.val):
        raise UserError(
            "no data, or two kinds of it; give either --data.text, or --data.train and --data.val (of several sources "
            "[[data.sources]] in TOML and --data.val)"
        )
    for source in data.sources:
        if not 0 < source.weight < float("inf"):
            raise UserError(f"data.sources: {source.train!r} has the weight {source.weight}; expected one above 0")
    if data.document_starts and data.tokenizer == "chars":
        raise UserError("data.document_starts = true needs end-of-text tokens, which data.tokenizer = 'chars' lacks")
