"""Run directories and their checkpoints, and models that were converted to them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoint import Checkpoints, SavedState
from gpt2_jax.config import DataConfig, ModelConfig
from gpt2_jax.config.toml import read_model, to_toml
from gpt2_jax.data.tokenizer import CharTokenizer, Tokenizer, get_tokenizer, tokenizer_name
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import StoredModel, checked
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
    """One checkpoint, RUN/checkpoints/STEP; its config is that of the run.

    Raises:
        UserError: it cannot be read.
    """
    written = read_model(path.parent.parent / "config.toml")
    config, data = checked(str(path.parent.parent / "config.toml"), written.model), written.data
    saved = SavedState(path)

    # An access to the files takes as long for a block as for a tensor. A block of every GPT-2 is smaller than `wte`.
    @functools.lru_cache(maxsize=1)
    def block(first: str) -> Any:
        return saved.read("params", first)

    def read(name: str) -> np.ndarray:
        first, *rest = name.split("/")
        tree = block(first) if first.startswith("h_") else saved.read("params", first)
        array: np.ndarray = functools.reduce(lambda tree, key: tree[key], rest, tree)
        return array[: config.vocab_size] if first == "wte" else array

    def tokenizer() -> Tokenizer:
        return get_tokenizer(data.tokenizer, data.characters)

    return StoredModel(str(path), config, read, tokenizer, int(path.name))


def write_orbax(model: StoredModel, directory: Path) -> None:
    """Writes `config.toml` with model and tokenizer, and `checkpoints/STEP` with the parameters alone.

    Raises:
        UserError: the tokenizer is none that a config can name.
    """
    tokenizer = model.tokenizer()
    kind = tokenizer_name(tokenizer) if tokenizer else None
    if kind is None:
        raise UserError(
            f"the tokenizer of {model.where} is not known, or none of gpt2, bytes and chars, and config.toml has to "
            "name it; take --to huggingface"
        )
    data = DataConfig(tokenizer=kind, characters=tokenizer.characters if isinstance(tokenizer, CharTokenizer) else "")
    config = model.config.unrolled("auto")
    (directory / "config.toml").write_text(to_toml(ModelConfig(config, data)), encoding="utf-8")
    params: Params = {}
    for name, array in model.parameters():
        *path, leaf = name.split("/")
        if name == "wte/embedding":
            array = np.pad(array, ((0, padded_vocab_size(config) - len(array)), (0, 0)))
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, params)[leaf] = array
    with Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(model.step, {"params": params}, {})
