"""llm.c's `model_*.bin`, as `write_model` in llm.c's `train_gpt2.py` writes it. It is little-endian:

    256 int32: magic 20240326, version (3: float32, 5: bfloat16), max_seq_len, vocab_size, num_layers, num_heads,
               channels, padded_vocab_size, zeros
    the tensors in `ORDER`: a tensor of the blocks is stacked over the layers, and matrices are [out, in]

A model in llm.c always has biases and the tanh GELU.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.shards import HEADER_BYTES, HEADER_INTS, read_header
from gpt2_jax.errors import UserError
from gpt2_jax.interop.keep_tokenizer import is_implied, keep_tokenizer
from gpt2_jax.interop.model_files import check_permission, directory_files
from gpt2_jax.interop.stored import StoredModel, check_sizes
from gpt2_jax.interop.tokenizer_files import implied_tokenizer, read_named, read_tokenizer
from gpt2_jax.model import padded_vocab_size

MAGIC = 20240326
DTYPES = {3: np.dtype("<f4"), 5: jnp.dtype(jnp.bfloat16)}

# Our names, in the order of the file. "*" stands for every layer.
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
    """The shape of a tensor in the file; of one layer if the tensor is stacked."""
    width = config.n_embd
    outputs = {"c_attn": 3 * width, "c_fc": 4 * width}
    inputs = 4 * width if "mlp/c_proj" in name else width
    match name.split("/")[-2:]:
        case ["wte", _]:
            return (padded_vocab, width)
        case ["wpe", _]:
            return (config.block_size, width)
        case [module, "kernel"]:
            return (outputs.get(module, width), inputs)
        case [module, _]:
            return (outputs.get(module, width),)
    raise AssertionError(name)


def open_llmc(path: Path) -> StoredModel:
    """Opens the file and reads its header. Tensors are memory-mapped.

    Raises:
        UserError: it is another kind of file or another version of the format, or its size does not match its header.
    """
    check_permission(path)
    header, size = read_header(path, MAGIC, "a model of llm.c")
    if int(header[1]) not in DTYPES:
        raise UserError(
            f"{path} has version {header[1]} of llm.c's format; expected 3 (float32) or 5 (bfloat16); write it again "
            "with a newer llm.c"
        )
    dtype = DTYPES[int(header[1])]
    block_size, vocab_size, n_layer, n_head, n_embd, padded_vocab = map(int, header[2:8])
    if padded_vocab < vocab_size:
        raise UserError(f"{path} has an impossible header: {vocab_size} tokens padded to {padded_vocab}; copy it again")
    config = GPT2Config(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    check_sizes(str(path), config)
    offsets: dict[str, int] = {}
    offset = HEADER_BYTES
    for name in ORDER:
        offsets[name] = offset
        layers = n_layer if "*" in name else 1
        offset += layers * int(np.prod(_shape(name, config, padded_vocab))) * dtype.itemsize
    if offset != size:
        raise UserError(
            f"{path} is cut off or damaged: its header implies {offset:,} bytes, but it has {size:,}; copy it again"
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

    files = directory_files(path.parent)
    find_tokenizer = functools.partial(read_tokenizer, files, lambda: implied_tokenizer(vocab_size))
    digits = path.stem.removeprefix("model_")
    step = int(digits) if digits.isdecimal() else 0
    return StoredModel(str(path), config, read, find_tokenizer, step, read_named(files, vocab_size), files)


def write_llmc(model: StoredModel, directory: Path, dtype: str) -> None:
    """Writes `model_STEP.bin`, with the vocabulary padded with zeros, and the tokenizer unless it is implied.

    Raises:
        UserError: llm.c cannot represent the model.
    """
    config = model.config
    if not config.bias:
        raise UserError(f"{model.where} has no biases, but llm.c needs them; take --to huggingface or nanogpt")
    if config.gelu != "tanh":
        raise UserError(
            f"{model.where} uses the exact GELU, but llm.c only has the tanh one; take --to huggingface or nanogpt"
        )
    keep_tokenizer(model, directory, make=not is_implied(model))
    version = {"float32": 3, "bfloat16": 5}[dtype]
    padded = padded_vocab_size(config)
    header = np.zeros(HEADER_INTS, "<i4")
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, padded)
    header[:8] = MAGIC, version, *sizes
    with open(directory / f"model_{model.step:08d}.bin", "wb") as file:
        header.tofile(file)
        arrays = dict(model.parameters())  # all in memory: the file stores all layers of a tensor together
        for name in ORDER:
            for layer in range(config.n_layer if "*" in name else 1):
                array = arrays[name.replace("*", str(layer))]
                if name == "wte/embedding":
                    array = np.pad(array, ((0, padded - len(array)), (0, 0)))
                elif name.endswith("kernel"):
                    array = array.T
                file.write(np.ascontiguousarray(array, DTYPES[version]).tobytes())
