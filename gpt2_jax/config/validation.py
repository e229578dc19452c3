"""Checks a config without data and devices, and fits the warmup into a run that a flag has shortened."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from gpt2_jax.config import DataConfig, TrainConfig, flatten
from gpt2_jax.errors import UserError
from gpt2_jax.files import check_utf8, user_path

_Range = tuple[str, Callable[[Any], bool]]  # in words, for errors, and as a test


def _between(least: int, most: int) -> _Range:
    """The range of a whole number."""
    words = f"at least {least}" if least else "0 or more"
    return f"{words}, at most {most:,}", lambda value: least <= value <= most


# Limits far above any GPT-2: the deepest models have about 100 layers. A larger number overflows on the device or the
# host, or takes hours to compile. The user would see a crash instead of the wrong key.
MAX_INT = 2**31 - 1  # the largest number of 32 bits, in which devices count
MAX_SEQUENCES = 2**24
MODEL_LIMITS = {"vocab_size": 2**24, "block_size": 2**24, "n_layer": 2**10, "n_head": 2**16, "n_embd": 2**20}
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
    "micro_batch_size": (
        f'"auto", or 0 or more, at most {MAX_SEQUENCES:,}',
        lambda value: value == "auto" or 0 <= value <= MAX_SEQUENCES,
    ),
    "seed": ("0 or more and below 2**32", lambda value: 0 <= value < 2**32),
    # A vocab_size of 0 is that of the tokenizer.
    **{f"model.{key}": _between(0 if key == "vocab_size" else 1, limit) for key, limit in MODEL_LIMITS.items()},
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
    "optimizer.outlier_window": _between(2, MAX_SEQUENCES),
    "optimizer.outlier_z_score": _POSITIVE,
    "optimizer.rewind_updates": _COUNT,
    "skip_updates": (
        f"numbers of updates, each at least 1 and at most {MAX_INT:,}",
        lambda value: all(1 <= update <= MAX_INT for update in value),
    ),
    "mesh.data": _DEVICES,
    "mesh.fsdp": _DEVICES,
    "checkpoint.every": _COUNT_OR_0,
    "checkpoint.keep": _COUNT,
    "checkpoint.max_failures": _COUNT,
    "eval.every": _COUNT_OR_0,
    "eval.tokens": _between(0, MAX_TOKENS),
    "eval.sample_tokens": _between(0, MAX_SEQUENCES),
    "eval.prompt_tokens": _between(1, MAX_SEQUENCES),
    "eval.tasks_every": _COUNT_OR_0,
    "eval.tasks_limit": _COUNT_OR_0,
    "log.every": _COUNT,
    "log.layers": _COUNT_OR_0,
    "log.profile": (
        "START:COUNT, such as 100:5",
        lambda text: bool(re.fullmatch(r"|[1-9]\d{0,8}:[1-9]\d{0,8}", text, re.A)),
    ),
    "log.check_replicas": _COUNT_OR_0,
    "log.stall_seconds": _FINITE,
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
    if config.log.stall_exit and not config.log.stall_seconds:
        raise UserError("log.stall_exit = true needs log.stall_seconds above 0; type --log.stall_seconds 600")
    best, tasks = config.checkpoint.best, config.eval.tasks
    if best != "val_loss" and best.partition("/")[0] not in tasks:
        raise UserError(
            f"checkpoint.best = {best!r}, and eval.tasks = {list(tasks)}; expected val_loss, or TASK/METRIC of one of "
            "these tasks"
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
    for path in config.eval.tasks_data:
        user_path(path, "eval.tasks_data")
    for text in (*config.eval.tasks, config.checkpoint.best):
        check_utf8(text, "eval.tasks")
    for text in config.eval.prompts:
        check_utf8(text, "eval.prompts")
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


def fit_warmup(config: TrainConfig, written: TrainConfig) -> tuple[TrainConfig, str]:
    """Shortens the warmup of a config whose `steps` a flag has made shorter than it.

    The warmup keeps its share of the run, and is at least one update. A warmup that fits does not change. The
    intervals of evaluations and checkpoints do not change either, because both also happen after the last update.

    Args:
        config: the config with the flags, none of which sets `optimizer.warmup_steps`.
        written: the config without the flags.

    Returns:
        The config, and a line that names the change; "" if there is none.
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
