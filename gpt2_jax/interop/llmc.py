"""llm.c's `model_*.bin` (llm.c, `train_gpt2.py`, `write_model`), little-endian:

    256 int32: magic 20240326, version (3: float32, 5: bfloat16), max_seq_len, vocab_size, num_layers, num_heads,
               channels, padded_vocab_size, zeros
    the tensors below one after the other, those of the blocks stacked over the layers, matrices [out, in]

llm.c's model has all biases and the tanh GELU.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.shards import HEADER_BYTES, HEADER_INTS, read_header
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import StoredModel, checked, in_directory
from gpt2_jax.interop.tokenizer_files import read_tokenizer, write_unusual_tokenizer
from gpt2_jax.model import padded_vocab_size

MAGIC = 20240326
DTYPES = {3: np.dtype("<f4"), 5: jnp.dtype(jnp.bfloat16)}

# Our names in the order of the file; "*" is every layer.
ORDER = (
    "wte/embedding",
    "wpe/embedding",
    "h_*/ln_1/scale",
    "h_*/ln_1/bias",
    "h_*/attn/c_attn/kernel",
    "h_*/attn/c_attn/bias",
    "h_*/attn/c_proj/kernel",
    "h_*/attn/c_proj/bias",
    "h_*/ln_2/scale",
    "h_*/ln_2/bias",
    "h_*/mlp/c_fc/kernel",
    "h_*/mlp/c_fc/bias",
    "h_*/mlp/c_proj/kernel",
    "h_*/mlp/c_proj/bias",
    "ln_f/scale",
    "ln_f/bias",
)


def _shape(name: str, config: GPT2Config, padded_vocab: int) -> tuple[int, ...]:
    """The shape of one tensor (of one layer) in the file."""
    width = config.n_embd
    outputs = {"c_attn": 3 * width, "c_fc": 4 * width}
    inputs = 4 * width if "mlp/c_proj" in name else width
    match name.split("/")[-2:]:
        case ["wte", _]:
            return (padded_vocab, width)
        case ["wpe", _]:
            return (config.block_size, width)
        case [layer, "kernel"]:
            return (outputs.get(layer, width), inputs)
        case [layer, _]:
            return (outputs.get(layer, width),)
    raise AssertionError(name)


def open_llmc(path: Path) -> StoredModel:
    """Reads the header; tensors are mapped.

    Raises:
        UserError: not such a file, another version, or header and size disagree.
    """
    header, size = read_header(path, MAGIC, "a model of llm.c")
    if int(header[1]) not in DTYPES:
        raise UserError(
            f"{path} has version {header[1]} of llm.c's format; expected 3 (float32) or 5 (bfloat16), as today's llm.c "
            "writes them"
        )
    dtype = DTYPES[int(header[1])]
    block_size, vocab_size, n_layer, n_head, n_embd, padded_vocab = map(int, header[2:8])
    if padded_vocab < vocab_size:
        raise UserError(f"{path} has an impossible header: {vocab_size} tokens padded to {padded_vocab}")
    config = GPT2Config(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    checked(str(path), config)
    offsets: dict[str, int] = {}
    offset = HEADER_BYTES
    for name in ORDER:
        offsets[name] = offset
        layers = n_layer if "*" in name else 1
        offset += layers * int(np.prod(_shape(name, config, padded_vocab))) * dtype.itemsize
    if offset != size:
        raise UserError(
            f"{path} is cut off or damaged: its header means {offset:,} bytes, and it has {size:,}; copy it again"
        )

    def read(name: str) -> np.ndarray:
        first, *rest = name.split("/")
        key = "/".join(["h_*", *rest]) if first.startswith("h_") else name
        shape = _shape(name, config, padded_vocab)
        layer = int(first.removeprefix("h_")) if first.startswith("h_") else 0
        start = offsets[key] + layer * int(np.prod(shape)) * dtype.itemsize
        array = np.memmap(path, dtype, "r", start, shape)
        if name == "wte/embedding":
            return array[:vocab_size]
        return array.T if name.endswith("kernel") else array

    tokenizer = functools.partial(read_tokenizer, in_directory(path.parent), vocab_size)
    step = path.stem.removeprefix("model_")
    return StoredModel(str(path), config, read, tokenizer, int(step) if step.isdigit() else 0)


def write_llmc(model: StoredModel, directory: Path, dtype: str) -> None:
    """Writes `model_STEP.bin`, with the vocabulary padded by zeros; a tokenizer other than GPT-2's beside it.

    Raises:
        UserError: llm.c has no such model.
    """
    config = model.config
    if not config.bias:
        raise UserError(f"{model.where} has no biases, llm.c's model always has; take --to huggingface or nanogpt")
    if config.gelu != "tanh":
        raise UserError(f"{model.where} uses the exact GELU, llm.c only the tanh one; take --to huggingface or nanogpt")
    write_unusual_tokenizer(model.tokenizer(), directory, config.block_size)
    version = {"float32": 3, "bfloat16": 5}[dtype]
    padded = padded_vocab_size(config)
    header = np.zeros(HEADER_INTS, "<i4")
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, padded)
    header[:8] = MAGIC, version, *sizes
    with open(directory / f"model_{model.step:08d}.bin", "wb") as file:
        header.tofile(file)
        arrays = dict(model.parameters())  # a model comes by layers, the file wants all layers of a tensor together
        for name in ORDER:
            for layer in range(config.n_layer if "*" in name else 1):
                array = arrays[name.replace("*", str(layer))]
                if name == "wte/embedding":
                    array = np.pad(array, ((0, padded - len(array)), (0, 0)))
                elif name.endswith("kernel"):
                    array = array.T
                file.write(np.ascontiguousarray(array, DTYPES[version]).tobytes())
