"""Run directories and their checkpoints, and models that were converted to this format."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoint import Checkpoints, SavedState
from gpt2_jax.checkpoint_info import complete_checkpoints, read_info
from gpt2_jax.config import DataConfig, ModelConfig
from gpt2_jax.config.toml import read_model_config, to_toml
from gpt2_jax.data.tokenizer import CharTokenizer, ExtendedTokenizer, get_tokenizer, tokenizer_name
from gpt2_jax.errors import DamagedError, DeletedError, UserError
from gpt2_jax.files import replace_text
from gpt2_jax.interop.keep_tokenizer import keep_tokenizer
from gpt2_jax.interop.model_files import check_permission, directory_files
from gpt2_jax.interop.stored import StoredModel, check_sizes
from gpt2_jax.interop.tokenizer_files import read_named, read_tokenizer
from gpt2_jax.model import Params, padded_vocab_size


def newest_checkpoint(run: Path) -> Path:
    """The last checkpoint of a run directory.

    Raises:
        UserError: it has none yet.
    """
    steps = complete_checkpoints(run / "checkpoints")
    if not steps:
        raise UserError(f"{run} has no checkpoint yet; wait for one, or lower its --checkpoint.every")
    return steps[-1]


def open_checkpoint(path: Path) -> StoredModel:
    """Opens one checkpoint, RUN/checkpoints/STEP, with the config of its run.

    Tokenizer files in RUN come before the tokenizer that the config names. A converted model may have some, and a run
    that started from a model that has.

    Raises:
        UserError: it cannot be read.
    """
    config_file = path.parent.parent / "config.toml"
    check_permission(config_file)
    check_permission(path)
    saved_config = read_model_config(config_file)
    config, data = saved_config.model, saved_config.data
    check_sizes(str(config_file), config)
    with _noticing_deletion(path):
        expected = read_info(path).get("fingerprint", {}).get("params", "")  # missing in older ones
        saved = SavedState(path)

    # Orbax takes as long to read a block as to read one tensor. A block of any GPT-2 is smaller than `wte`.
    @functools.lru_cache(maxsize=1)
    def read_block(name: str) -> Any:
        with _noticing_deletion(path):
            return saved.read("params", name)

    def read(name: str) -> np.ndarray:
        first, *rest = name.split("/")
        tree = read_block(first) if first.startswith("h_") else read_block.__wrapped__(first)
        array: np.ndarray = functools.reduce(lambda tree, key: tree[key], rest, tree)
        return array[: config.vocab_size] if first == "wte" else array

    files = directory_files(config_file.parent)
    named_in_config = functools.partial(get_tokenizer, data.tokenizer, data.characters)
    find_tokenizer = functools.partial(read_tokenizer, files, named_in_config)
    named = read_named(files, config.vocab_size)
    model = StoredModel(str(path), config, read, find_tokenizer, int(path.name), named, files)
    return model.with_fingerprint(expected) if expected else model


@contextmanager
def _noticing_deletion(checkpoint: Path) -> Iterator[None]:
    """Reports a checkpoint that is damaged because it was deleted as a DeletedError."""
    try:
        yield
    except DamagedError as error:
        if checkpoint.exists():
            raise
        raise DeletedError(f"the checkpoint {checkpoint} was deleted while it was read; use a newer one") from error


def write_orbax(model: StoredModel, directory: Path) -> None:
    """Writes `config.toml`, the tokenizer's files if there are any, and `checkpoints/STEP` with the parameters only.

    Raises:
        UserError: the tokenizer is not known.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError(
            f"the tokenizer of {model.where} is not known, and a run needs one: gpt2, bytes, chars, or files of byte "
            "pairs or characters; take --to huggingface"
        )
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    characters = base.characters if isinstance(base, CharTokenizer) else ""
    # A config cannot name other byte pairs than gpt2 and bytes. They are always in files, which come first.
    data = DataConfig(tokenizer=tokenizer_name(base) or "gpt2", characters=characters)
    config = model.config.unrolled("auto")
    replace_text(directory / "config.toml", to_toml(ModelConfig(config, data)))
    keep_tokenizer(model, directory, make=False)
    model = model if model.hashes is not None else model.with_fingerprint()
    params: Params = {}
    for parameter, array in model.parameters():
        *path, leaf = parameter.split("/")
        if parameter == "wte/embedding":
            array = np.pad(array, ((0, padded_vocab_size(config) - len(array)), (0, 0)))
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, params)[leaf] = array
    with Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(model.step, {"params": params}, {"fingerprint": {"params": model.fingerprint}})
