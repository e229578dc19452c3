"""Run directories and their checkpoints, and models that were converted to this format."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoint import Checkpoints, SavedState
from gpt2_jax.config import DataConfig, ModelConfig
from gpt2_jax.config.toml import read_model_config, to_toml
from gpt2_jax.data.tokenizer import CharTokenizer, Tokenizer, get_tokenizer, tokenizer_name
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import StoredModel, check_sizes
from gpt2_jax.model import Params, padded_vocab_size


def newest_checkpoint(run: Path) -> Path:
    """The last checkpoint of a run directory.

    Raises:
        UserError: it has none yet.
    """
    steps = [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    if not steps:
        raise UserError(f"{run} has no checkpoint yet; wait for one, or lower its --checkpoint.every")
    return max(steps, key=lambda path: int(path.name))


def open_checkpoint(path: Path) -> StoredModel:
    """Opens one checkpoint, RUN/checkpoints/STEP, with the config of its run.

    Raises:
        UserError: it cannot be read.
    """
    config_file = path.parent.parent / "config.toml"
    saved_config = read_model_config(config_file)
    config, data = saved_config.model, saved_config.data
    check_sizes(str(config_file), config)
    saved = SavedState(path)

    # Orbax takes as long to read a block as to read one tensor. A block of any GPT-2 is smaller than `wte`.
    @functools.lru_cache(maxsize=1)
    def read_block(name: str) -> Any:
        return saved.read("params", name)

    def read(name: str) -> np.ndarray:
        first, *rest = name.split("/")
        tree = read_block(first) if first.startswith("h_") else saved.read("params", first)
        array: np.ndarray = functools.reduce(lambda tree, key: tree[key], rest, tree)
        return array[: config.vocab_size] if first == "wte" else array

    def find_tokenizer() -> Tokenizer:
        return get_tokenizer(data.tokenizer, data.characters)

    return StoredModel(str(path), config, read, find_tokenizer, int(path.name))


def write_orbax(model: StoredModel, directory: Path) -> None:
    """Writes `config.toml` with the model and its tokenizer, and `checkpoints/STEP` with the parameters only.

    Raises:
        UserError: a config cannot name the tokenizer.
    """
    tokenizer = model.tokenizer
    name = tokenizer_name(tokenizer) if tokenizer else None
    if name is None:
        raise UserError(
            f"the tokenizer of {model.where} is not known, or not one of gpt2, bytes and chars, which config.toml can "
            "name; take --to huggingface"
        )
    data = DataConfig(tokenizer=name, characters=tokenizer.characters if isinstance(tokenizer, CharTokenizer) else "")
    config = model.config.unrolled("auto")
    (directory / "config.toml").write_text(to_toml(ModelConfig(config, data)), encoding="utf-8")
    params: Params = {}
    for parameter, array in model.parameters():
        *path, leaf = parameter.split("/")
        if parameter == "wte/embedding":
            array = np.pad(array, ((0, padded_vocab_size(config) - len(array)), (0, 0)))
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, params)[leaf] = array
    with Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(model.step, {"params": params}, {})
