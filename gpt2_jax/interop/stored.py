"""A model on disk in any format: what it is, its tokenizer, and its parameters, one at a time.

Names of parameters are ours with slashes, layers apart and the vocabulary not padded, whatever the file has:

    wte/embedding [vocab_size, n_embd], h_3/attn/c_attn/kernel [n_embd, 3 n_embd], …
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.tokenizer import Tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.generation import LanguageModel
from gpt2_jax.layers import STACKED
from gpt2_jax.model import GPT2, Params, abstract_params
from gpt2_jax.sharding import state_sharding

Find = Callable[[str], Path | None]  # a file of a model by its name, or None

# How the released checkpoints, transformers and nanoGPT call the leaves of ours.
_TORCH_LEAVES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model that can be loaded or converted.

    Attributes:
        where: what the user knows it by, for errors.
        config: its architecture.
        read: an array of the file by our name of the parameter; KeyError if there is none.
        tokenizer: makes its tokenizer, or None where that is not known.
        end_of_text: the token that ends a text, where the format names another one than the tokenizer's.
        step: updates that it was trained for, where the format says so.
    """

    where: str
    config: GPT2Config
    read: Callable[[str], np.ndarray]
    tokenizer: Callable[[], Tokenizer | None]
    step: int = 0
    end_of_text: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", functools.cache(self.tokenizer))

    def parameter(self, name: str) -> np.ndarray:
        """One parameter, float32, contiguous, in memory of its own.

        Raises:
            UserError: it is missing, or not of the shape that the config says, or not of floats.
        """
        expected = parameter_shapes(self.config)[name]
        try:
            array = self.read(name)
        except KeyError as error:
            raise UserError(
                f"{self.where} has no {error.args[0]}, which a GPT-2 of its config needs "
                f"({architecture_summary(self.config)}); the file is incomplete or belongs to another config"
            ) from error
        if array.shape != expected:
            raise UserError(
                f"{self.where}: {name} has the shape {list(array.shape)}, its config says {list(expected)} "
                f"({architecture_summary(self.config)}); correct the config or the file"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{self.where}: {name} holds {array.dtype}; expected float32, bfloat16 or float16")
        return np.array(array, np.float32, order="C")  # not as the file has it: writers take the memory as it is

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """All parameters with their names, in the order of the model."""
        for name in parameter_shapes(self.config):
            yield name, self.parameter(name)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer, opened once.

        Raises:
            UserError: the model comes without one.
        """
        tokenizer = self.tokenizer()
        if tokenizer is None:
            raise UserError(
                f"the tokenizer of {self.where} is not known; put its vocab.json and merges.txt, or nanoGPT's "
                "meta.pkl, beside the model"
            )
        return tokenizer

    def load(self, mesh: Mesh | None, dtype: jnp.dtype) -> LanguageModel:
        """Loads the parameters: see `interop.load`."""
        model = GPT2(self.config.unrolled("auto"), dtype)
        shapes = abstract_params(model)
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = state_sharding(mesh, shapes) if mesh else jax.tree.map(lambda _: one_device, shapes)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        )
        return LanguageModel(model, self.place(abstract), self.open_tokenizer, self.end_of_text)

    def place(self, abstract: Params) -> Params:
        """The parameters on the devices, each read, placed and forgotten before the next.

        Args:
            abstract: shapes and shardings to fill. Layers may be stacked, the vocabulary padded, positions fewer.
        """

        def fill(path: tuple[Any, ...], leaf: Any) -> jax.Array:
            first, *rest = [key.key for key in path]
            array = np.zeros(leaf.shape, np.float32)
            if first == STACKED:
                for layer in range(self.config.n_layer):
                    array[layer] = self.parameter("/".join([f"h_{layer}", *rest]))
            elif first in ("wte", "wpe"):
                rows = min(leaf.shape[0], parameter_shapes(self.config)[f"{first}/embedding"][0])
                array[:rows] = self.parameter(f"{first}/embedding")[:rows]
            else:
                array[...] = self.parameter("/".join([first, *rest]))
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

        return jax.tree_util.tree_map_with_path(fill, abstract)


@functools.cache
def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name, the vocabulary not padded."""
    shapes = abstract_params(GPT2(config.unrolled()))
    by_name = {
        "/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    order = sorted(by_name, key=lambda name: (name[0] != "w", name[0] == "l", _layer(name)))
    return {name: by_name[name] for name in order} | {"wte/embedding": (config.vocab_size, config.n_embd)}


def _layer(name: str) -> int:
    return int(name[2:].split("/")[0]) if name.startswith("h_") else 0


def torch_name(name: str) -> str:
    """h_3/attn/c_attn/kernel -> h.3.attn.c_attn.weight, the released checkpoints' name."""
    *path, leaf = name.split("/")
    return ".".join([*path, _TORCH_LEAVES[leaf]]).replace("h_", "h.", 1)


def checked(where: str, config: GPT2Config) -> GPT2Config:
    """The config itself, if its sizes are those of a model.

    Raises:
        UserError: they are not.
    """
    for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
        value = getattr(config, key)
        if type(value) is not int or not 1 <= value < 2**31:
            raise UserError(f"{where} has {key} = {value!r} in its config; expected a whole number, 1 or more")
    if config.n_embd % config.n_head:
        raise UserError(f"{where} has n_embd = {config.n_embd}, which is not a multiple of n_head = {config.n_head}")
    return config


def in_directory(directory: Path) -> Find:
    """The files of a directory."""
    return lambda name: path if (path := directory / name).is_file() else None


def architecture_summary(config: GPT2Config) -> str:
    """The sizes, for messages."""
    return (
        f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, {config.block_size} positions, "
        f"vocabulary {config.vocab_size:,}"
        + (", exact GELU" if config.gelu == "exact" else "")
        + ("" if config.bias else ", no biases")
    )
