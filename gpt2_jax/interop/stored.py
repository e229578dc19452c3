"""A model on disk, in any format: its config, its tokenizer, and its parameters, read one at a time.

Parameters have the same names and shapes whatever the format: one entry per layer, and no padding of the vocabulary:

    wte/embedding [vocab_size, n_embd], h_3/attn/c_attn/kernel [n_embd, 3 n_embd], …
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from gpt2_jax.activity import tracked
from gpt2_jax.config import GPT2Config
from gpt2_jax.config.validation import MODEL_LIMITS
from gpt2_jax.data.tokenizer import UNKNOWN, Boundaries, Tokenizer, boundaries
from gpt2_jax.errors import DamagedError, UserError
from gpt2_jax.fingerprint import array_hash, to_hex
from gpt2_jax.generation import LanguageModel
from gpt2_jax.generation.decode import in_compute_dtype
from gpt2_jax.interop.model_files import FindFile, no_files
from gpt2_jax.layers import STACKED
from gpt2_jax.model import GPT2, Params, abstract_params
from gpt2_jax.sharding import state_sharding, with_shardings


@dataclasses.dataclass(frozen=True, eq=False)
class StoredModel:
    """A model that can be loaded or converted.

    Attributes:
        where: the name or path that the user gave, for errors.
        config: its architecture.
        read: reads an array from the file, by the name of the parameter. Raises KeyError if the file has none.
        find_tokenizer: reads the tokenizer. Returns None if the files have none and the format implies none.
        step: number of updates that it was trained for, if the format records it.
        named: the tokens around a text that the format names; the others are the tokenizer's.
        files: finds the tokenizer's files, which a conversion keeps as they are.
        expected: the fingerprint of the parameters (`fingerprint.py`), if the format records it; else "".
        hashes: collects the hash of each parameter that is read, for `fingerprint`; None for no hashing.
    """

    where: str
    config: GPT2Config
    read: Callable[[str], np.ndarray]
    find_tokenizer: Callable[[], Tokenizer | None]
    step: int = 0
    named: Boundaries = UNKNOWN
    files: FindFile = no_files
    expected: str = ""
    hashes: dict[str, int] | None = None

    def with_fingerprint(self, expected: str = "") -> StoredModel:
        """The same model, whose parameters are hashed when they are read, and compared with `expected` if it is given.

        Hashing takes about 3.5 s per billion parameters.
        """
        return dataclasses.replace(self, expected=expected or self.expected, hashes={})

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the parameters read so far, eight hex digits."""
        assert self.hashes is not None
        return to_hex(sum(self.hashes.values()))

    def _check_fingerprint(self) -> None:
        """Compares all parameters, once they are read, with the expected fingerprint.

        Raises:
            DamagedError: they differ.
        """
        if self.expected and self.fingerprint != self.expected:
            raise DamagedError(
                f"the parameters of {self.where} have the fingerprint {self.fingerprint}, but {self.expected} was "
                "expected: they are damaged, or those of another model; copy the model again, or use another checkpoint"
            )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, read at the first access; None if it is unknown.

        Raises:
            UserError: its files are damaged, or its vocabulary cannot be downloaded.
        """
        return self.find_tokenizer()

    @property
    def boundaries(self) -> Boundaries:
        """The tokens around a text.

        Raises:
            UserError: the tokenizer cannot be read.
        """
        return self.named.or_else(boundaries(self.tokenizer)) if self.tokenizer else self.named

    def open_tokenizer(self) -> Tokenizer:
        """`tokenizer`, for callers that cannot do without one.

        Raises:
            UserError: the tokenizer is unknown, or cannot be read.
        """
        if self.tokenizer is None:
            raise UserError(
                f"the tokenizer of {self.where} is not known; put its vocab.json and merges.txt, or nanoGPT's "
                "meta.pkl, beside the model"
            )
        return self.tokenizer

    def parameter(self, name: str) -> np.ndarray:
        """Reads one parameter: float32, contiguous, in new memory.

        Raises:
            UserError: it is missing, has another shape than the config implies, or is not of a floating-point dtype.
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
                f"{self.where}: {name} has the shape {list(array.shape)}, but its config implies {list(expected)} "
                f"({architecture_summary(self.config)}); correct the config or the file"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{self.where}: {name} holds {array.dtype}; expected float32, bfloat16 or float16")
        array = np.array(array, np.float32, order="C")  # It may be a transposed view, and writers copy memory in order.
        if self.hashes is not None:
            self.hashes[name] = array_hash(name, array)
        return array

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """Reads all parameters, in the order of the model: pairs of name and array.

        Raises:
            DamagedError: after the last one, if they do not have the expected fingerprint.
        """
        shapes = parameter_shapes(self.config)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        for name in tracked(sizes, sum(sizes.values()), lambda name: sizes[name]):
            yield name, self.parameter(name)
        self._check_fingerprint()

    def load(self, mesh: Mesh | None, dtype: jnp.dtype, compact: bool = False) -> LanguageModel:
        """Loads the model: see `interop.load`.

        Args:
            compact: stores matrices in `dtype`, which is enough to write text.
        """
        self.parameter(f"h_{self.config.n_layer - 1}/ln_1/scale")  # before a model with layers that it lacks is built
        model, abstract = self.abstract(mesh, dtype, compact)
        return LanguageModel(model, self.place(abstract), self.open_tokenizer, self.named)

    def abstract(self, mesh: Mesh | None, dtype: jnp.dtype, compact: bool = False) -> tuple[GPT2, Params]:
        """The model that `load` returns, with the shapes, dtypes and placements of its parameters."""
        model = GPT2(self.config.unrolled("auto"), dtype)
        shapes = abstract_params(model)
        if compact:
            shapes = jax.eval_shape(functools.partial(in_compute_dtype, dtype=dtype), shapes)
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = state_sharding(mesh, shapes) if mesh else jax.tree.map(lambda _: one_device, shapes)
        return model, with_shardings(shapes, shardings)

    def place(self, abstract: Params) -> Params:
        """Loads the parameters onto devices: reads, places and frees one after the other.

        Args:
            abstract: the shapes, dtypes and shardings to fill. Layers may be stacked, the vocabulary padded, and the
                positions fewer than in the file.

        Raises:
            DamagedError: the parameters do not have the expected fingerprint.
        """

        def fill(path: tuple[Any, ...], leaf: Any) -> jax.Array:
            first, *rest = [key.key for key in path]
            array = np.zeros(leaf.shape, leaf.dtype)
            if first == STACKED:
                for layer in range(self.config.n_layer):
                    array[layer] = self.parameter("/".join([f"h_{layer}", *rest]))
            elif first in ("wte", "wpe"):
                rows = min(leaf.shape[0], parameter_shapes(self.config)[f"{first}/embedding"][0])
                array[:rows] = self.parameter(f"{first}/embedding")[:rows]
            else:
                array[...] = self.parameter("/".join([first, *rest]))
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

        leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
        total = sum(leaf.size for _, leaf in leaves)
        arrays = [fill(path, leaf) for path, leaf in tracked(leaves, total, lambda item: item[1].size)]
        self._check_fingerprint()
        params: Params = jax.tree.unflatten(structure, arrays)
        return params


@functools.cache
def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name, in the order of the model, without padding of the vocabulary."""
    one_layer = GPT2(dataclasses.replace(config.unrolled(), n_layer=1))  # building all takes long if there are many
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(one_layer))
    shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    shapes["wte/embedding"] = (config.vocab_size, config.n_embd)
    layer = {name.removeprefix("h_0/"): shape for name, shape in shapes.items() if name.startswith("h_0/")}
    embeddings = {name: shape for name, shape in shapes.items() if name.startswith("w")}
    blocks = {f"h_{index}/{name}": shape for index in range(config.n_layer) for name, shape in layer.items()}
    return embeddings | blocks | {name: shape for name, shape in shapes.items() if name.startswith("ln_f")}


# The names that OpenAI's released checkpoints, transformers and nanoGPT give to the leaves.
_TORCH_LEAVES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}


def torch_name(name: str) -> str:
    """The name of a parameter in the released checkpoints: h_3/attn/c_attn/kernel -> h.3.attn.c_attn.weight."""
    *path, leaf = name.split("/")
    return ".".join([*path, _TORCH_LEAVES[leaf]]).replace("h_", "h.", 1)


def check_sizes(where: str, config: GPT2Config) -> None:
    """Checks the sizes in a config that comes from a file.

    Raises:
        UserError: a size is not a whole number from 1 to its limit, or `n_embd` is not a multiple of `n_head`.
    """
    for key, largest in MODEL_LIMITS.items():
        value = getattr(config, key)
        if type(value) is not int or not 1 <= value <= largest:
            raise UserError(
                f"{where} has {key} = {reprlib.repr(value)} in its config; expected a whole number from 1 to "
                f"{largest:,}; correct it, or copy the model again"
            )
    if config.n_embd % config.n_head:
        raise UserError(f"{where} has n_embd = {config.n_embd}, which is not a multiple of n_head = {config.n_head}")


def architecture_summary(config: GPT2Config) -> str:
    """The sizes of a model in words, for messages."""
    return (
        f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, {config.block_size} positions, "
        f"vocabulary {config.vocab_size:,}"
        + (", exact GELU" if config.gelu == "exact" else "")
        + ("" if config.bias else ", no biases")
    )
