"""Every setting of a training run: frozen dataclasses, and the checks that need neither data nor devices.

A field's docstring is its entry in the `--help` of `gpt2_jax.train`. tyro keeps the line breaks in it, so lines break
between sentences only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

from gpt2_jax.errors import UserError
from gpt2_jax.files import check_utf8, user_path

Dtype = Literal["auto", "float32", "bfloat16"]
AttentionBackend = Literal["auto", "xla", "cudnn", "splash"]
TokenizerName = Literal["gpt2", "bytes", "chars"]

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
    remat: Literal["none", "dots", "full"] = "none"
    """Rematerialization saves memory: the backward pass recomputes activations instead of storing them.
    dots recomputes everything except matmuls, full recomputes whole blocks.
    Both also gather the parameters sharded over mesh.fsdp a second time, instead of storing them."""
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
    Of those saved right after an evaluation, the one with the lowest validation loss is kept too."""


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


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Training rows in OUT/metrics.jsonl and on the terminal."""

    every: int = 10
    """Updates between training rows."""
    profile_steps: int = 0
    """Updates to trace with jax.profiler into OUT/profile, from the tenth of the process on; 0 for none."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A complete training run, as written to config.toml in the run directory."""

    out: str
    """Run directory. If it has checkpoints of the same config, the run resumes from the newest one, bit for bit."""
    steps: int
    """Total number of optimizer updates."""
    batch_size: int
    """GLOBAL number of sequences per update, over all devices and micro-batches."""
    micro_batch_size: int = 0
    """Sequences per device and forward pass; 0 for the device's whole share of the batch.
    Smaller micro-batches need less memory: gradients are accumulated until batch_size is reached."""
    batch_ramp: tuple[tuple[int, int], ...] = ()
    """Smaller batches at the start of the run, as pairs of tokens and sequences.
    Until the run has trained on that many tokens, each batch has that many sequences.
    After the last pair, batch_size applies."""
    init_from: str = ""
    """Model to fine-tune: any MODEL that gpt2_jax.load takes. Empty for random initial parameters."""
    seed: int = 1337
    """Seed of the initial parameters, the data order and dropout."""
    dtype: Dtype = "auto"
    """Dtype of activations and matmuls: auto is bfloat16 on accelerators and float32 on CPU.
    Parameters, optimizer state, softmax, layer norm statistics and the loss are always float32."""
    compilation_cache: str = "auto"
    """Directory that caches compiled programs for the next start.
    auto is gpt2_jax/programs in the user's cache directory; empty turns the cache off."""
    model: GPT2Config = dataclasses.field(default_factory=GPT2Config)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


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
# and, with dropout, which of the equally likely masks is drawn.
_NOT_MATHEMATICAL = re.compile(
    r"out|steps|micro_batch_size|compilation_cache|(mesh|checkpoint|eval|log)\..*"
    r"|model\.(attention|scan_layers|remat|loss_chunk)"
    r"|data\.(text|train|val|sources)"  # files may move: the fingerprint of the data tells whether they are the same
)


def differences(config: TrainConfig, saved: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The keys that change the mathematics of a run, each with its value in `saved` and in `config`."""
    old, new = flatten(saved), flatten(config)
    return {key: (old[key], new[key]) for key in new if new[key] != old[key] and not _NOT_MATHEMATICAL.fullmatch(key)}


# --- validation ----------------------------------------------------------------------------------------

_Range = tuple[str, Callable[[Any], bool]]  # in words, for errors, and as a test


def _between(least: int, most: int) -> _Range:
    """The range of a whole number."""
    words = f"at least {least}" if least else "0 or more"
    return f"{words}, at most {most:,}", lambda value: least <= value <= most


# Limits far above any model of this kind. Beyond them a number no longer fits where the device or the host counts with
# it, or the program would take hours to build, so the user would see a crash instead of the key that is wrong.
MAX_INT = 2**31 - 1  # the largest number of 32 bits, in which devices count
MAX_LAYERS, MAX_WIDTH, MAX_SEQUENCES, MAX_VOCABULARY = 4096, 2**20, 2**24, 2**26
MAX_PARAMETERS = 2**40
MAX_TOKENS = 2**62  # in a whole run, which the host counts with 64 bits
_MAX_FLOAT = 3.4e38  # of float32

_COUNT: _Range = _between(1, MAX_INT)
_COUNT_OR_0: _Range = _between(0, MAX_INT)
_POSITIVE: _Range = (f"a finite number above 0, at most {_MAX_FLOAT}", lambda value: 0 < value <= _MAX_FLOAT)
_FINITE: _Range = (f"a finite number, 0 or more, at most {_MAX_FLOAT}", lambda value: 0 <= value <= _MAX_FLOAT)
_RATE: _Range = ("0 or more and below 1", lambda value: 0 <= value < 1)
_DEVICES: _Range = (
    f"at least 1, or -1 for the remaining devices, at most {MAX_INT:,}",
    lambda value: value == -1 or 1 <= value <= MAX_INT,
)

_RANGES: dict[str, _Range] = {
    "out": ("the name of a run directory", bool),
    "steps": _COUNT,
    "batch_size": _between(1, MAX_SEQUENCES),
    "micro_batch_size": _between(0, MAX_SEQUENCES),
    "seed": ("0 or more and below 2**32", lambda value: 0 <= value < 2**32),
    "model.vocab_size": _between(0, MAX_VOCABULARY),
    "model.block_size": _between(1, MAX_SEQUENCES),
    "model.n_layer": _between(1, MAX_LAYERS),
    "model.n_head": _between(1, MAX_WIDTH),
    "model.n_embd": _between(1, MAX_WIDTH),
    "model.dropout": _RATE,
    "model.loss_chunk": _COUNT_OR_0,
    "data.val_fraction": ("above 0 and below 1", lambda value: 0 < value < 1),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.final_learning_rate": _FINITE,
    "optimizer.warmup_steps": _COUNT_OR_0,
    "optimizer.decay_steps": _COUNT_OR_0,
    "optimizer.beta1": _RATE,
    "optimizer.beta2": _RATE,
    "optimizer.epsilon": _POSITIVE,
    "optimizer.weight_decay": _FINITE,
    "optimizer.clip_norm": _FINITE,
    "mesh.data": _DEVICES,
    "mesh.fsdp": _DEVICES,
    "checkpoint.every": _COUNT_OR_0,
    "checkpoint.keep": _COUNT,
    "eval.every": _COUNT_OR_0,
    "eval.tokens": _between(0, MAX_TOKENS),
    "eval.sample_tokens": _between(0, MAX_SEQUENCES),
    "log.every": _COUNT,
    "log.profile_steps": _COUNT_OR_0,
}


def validate(config: TrainConfig) -> None:
    """Checks everything that can be checked without data and devices.

    Raises:
        UserError: names the key, its value, and what to type instead.
    """
    values = flatten(config)
    for key, (expected, is_valid) in _RANGES.items():
        if not is_valid(values[key]):
            raise UserError(f"{key} = {values[key]!r}; expected {expected}")
    _check_paths(config)
    _check_size(config)
    n_embd, n_head = config.model.n_embd, config.model.n_head
    if n_embd % n_head:
        divisor = next(n for n in range(n_head, 0, -1) if n_embd % n == 0)
        raise UserError(
            f"model.n_embd = {n_embd} is not a multiple of model.n_head = {n_head}; type --model.n_head {divisor}"
        )
    if config.mesh.data == -1 and config.mesh.fsdp == -1:
        raise UserError(
            "mesh.data and mesh.fsdp are both -1; only one of them can take the remaining devices; type --mesh.fsdp 1"
        )
    _check_schedule(config)
    _check_data(config.data)


def _check_paths(config: TrainConfig) -> None:
    """Checks that every text can be written to config.toml, and that every path can be one."""
    paths = {
        "out": config.out,
        "init_from": config.init_from,
        "compilation_cache": config.compilation_cache,
        "data.text": config.data.text,
        "data.train": config.data.train,
        "data.val": config.data.val,
    }
    for key, text in paths.items():
        if text:
            user_path(text, key)
    for source in config.data.sources:
        user_path(source.train, "data.sources")
    check_utf8(config.data.characters, "data.characters")


def _check_size(config: TrainConfig) -> None:
    """Checks that neither the model nor a batch is larger than anything that could be trained."""
    model = config.model
    n_params = 12 * model.n_layer * model.n_embd**2 + (model.vocab_size + model.block_size) * model.n_embd
    if n_params > MAX_PARAMETERS:
        raise UserError(
            f"model.n_layer = {model.n_layer}, model.n_embd = {model.n_embd} and model.vocab_size = {model.vocab_size} "
            f"make about {n_params:,} parameters; expected at most {MAX_PARAMETERS:,}; type a smaller --model.n_embd"
        )
    if config.batch_size * model.block_size > MAX_INT:
        raise UserError(
            f"batch_size = {config.batch_size} with model.block_size = {model.block_size} makes "
            f"{config.batch_size * model.block_size:,} tokens per update; expected at most {MAX_INT:,}; type "
            f"--batch_size {max(MAX_INT // model.block_size, 1)}"
        )


def shortened(config: TrainConfig, written: TrainConfig) -> tuple[TrainConfig, str]:
    """A config whose `steps` a flag has shortened to less than its warmup, with a warmup that fits.

    The warmup keeps its share of the run, and is at least one update. A warmup that fits stays as it is written, so the
    mathematics changes only where there was none. Evaluations and checkpoints need no change: after the last update
    there is always one.

    Args:
        config: with the flags, none of which sets `optimizer.warmup_steps`.
        written: without the flags.

    Returns:
        The config, and a line that says what was changed; empty if nothing was.
    """
    warmup, steps = config.optimizer.warmup_steps, config.steps
    if config.optimizer.decay_steps or not 1 <= steps < min(warmup, written.steps) or warmup > written.steps:
        return config, ""
    fitting = max(round(warmup * steps / written.steps), 1)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=fitting)
    line = (
        f"--steps {steps} is shorter than the warmup of {warmup} updates: now {fitting}, the same share as of "
        f"{written.steps:,} updates; --optimizer.warmup_steps N sets another"
    )
    return dataclasses.replace(config, optimizer=optimizer), line


def _check_schedule(config: TrainConfig) -> None:
    """Checks that warmup fits into the learning rate schedule, and that the batch size ramps up."""
    warmup_steps, decay_steps = config.optimizer.warmup_steps, config.optimizer.decay_steps or config.steps
    if warmup_steps > decay_steps:
        raise UserError(
            f"optimizer.warmup_steps = {warmup_steps} is more than the {decay_steps} updates of the learning rate "
            f"schedule; type --optimizer.warmup_steps {decay_steps // 10}"
        )
    previous_tokens, previous_size = 0, 1
    for tokens, size in config.batch_ramp:
        if not previous_tokens < tokens <= MAX_TOKENS or not previous_size <= size <= config.batch_size:
            raise UserError(
                f"batch_ramp = {config.batch_ramp}; expected pairs of tokens and sequences, with tokens rising and "
                f"sequences growing to at most batch_size = {config.batch_size}"
            )
        previous_tokens, previous_size = tokens, size


def _check_data(data: DataConfig) -> None:
    """Checks that there is one kind of training data, with validation data to match."""
    token_files = f"data.train = {data.train!r}" if data.train else "[[data.sources]]"
    if not (data.text or data.train or data.sources):
        raise UserError(
            "no training data is set; type --data.text FILE for text, or --data.train FILES --data.val FILES for token "
            "files"
        )
    if data.text and (data.train or data.sources):
        raise UserError(
            f"data.text = {data.text!r} and {token_files} are both set; expected one of them; for token files, type "
            "--data.text= with --data.train and --data.val"
        )
    if data.train and data.sources:
        raise UserError(
            f"data.train = {data.train!r} and [[data.sources]] are both set; expected one of them; for the sources, "
            "type --data.train="
        )
    if data.text and data.val:
        raise UserError(
            f"data.val = {data.val!r} is set with data.text, which holds out data.val_fraction of itself; type "
            "--data.val="
        )
    if not data.text and not data.val:
        raise UserError(f"{token_files} is set without validation data; type --data.val FILES")
    for source in data.sources:
        if not 0 < source.weight < float("inf"):
            raise UserError(
                f"the source {source.train!r} in data.sources has weight = {source.weight}; expected a finite number "
                "above 0"
            )
    if data.document_starts and data.tokenizer == "chars":
        raise UserError(
            "data.document_starts = true needs an end-of-text token, and data.tokenizer = 'chars' has none; type "
            "--data.document_starts false"
        )
