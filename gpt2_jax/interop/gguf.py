"""llama.cpp's GGUF, written with the package `gguf`, which knows the names of tensors and keys.

llama.cpp's GPT-2 always has biases and the tanh GELU. Its matrices are [out, in]. Its tokenizer is byte pairs with
GPT-2's pattern; without merges, the same code encodes raw bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tiktoken

from gpt2_jax.data.tokenizer import END_OF_TEXT, ExtendedTokenizer
from gpt2_jax.errors import UserError, import_optional
from gpt2_jax.interop.keep_tokenizer import vocab_and_merges
from gpt2_jax.interop.stored import StoredModel, parameter_shapes, torch_name
from gpt2_jax.model import LAYER_NORM_EPSILON


def write_gguf(model: StoredModel, directory: Path, dtype: str) -> None:
    """Writes `model.gguf`, one parameter after the other.

    Vectors and position embeddings are always float32, as in the files of llama.cpp's own converter.

    Args:
        dtype: "float32" or "bfloat16", of the matrices and the token embedding.

    Raises:
        UserError: llama.cpp cannot represent the model or its tokenizer, or the package `gguf` is not installed.
    """
    gguf = import_optional("gguf", "writing GGUF")
    config = model.config
    if config.gelu != "tanh":
        raise UserError(
            f"{model.where} uses the exact GELU, but llama.cpp only has the tanh one and would compute other logits; "
            "take --to huggingface or nanogpt (or train with --model.gelu tanh)"
        )
    arch, file_type = gguf.MODEL_ARCH.GPT2, gguf.LlamaFileType
    writer = gguf.GGUFWriter(directory / "model.gguf", gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type("model")
    writer.add_name(Path(model.where).name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPSILON)
    writer.add_file_type({"float32": file_type.ALL_F32, "bfloat16": file_type.MOSTLY_BF16}[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(gguf, writer, model)

    names = gguf.get_tensor_name_map(arch, config.n_layer)
    shapes = parameter_shapes(dataclasses.replace(config, bias=True))
    written = [*parameter_shapes(config), *(name for name in shapes if name not in parameter_shapes(config))]
    dtypes = {name: _dtype(name, shapes[name], dtype) for name in written}
    for name in written:
        theirs = names.get_name(f"transformer.{torch_name(name)}", try_suffixes=(".weight", ".bias"))
        shape = shapes[name][::-1] if name.endswith("kernel") else shapes[name]
        kind = gguf.GGMLQuantizationType.F32 if dtypes[name] == np.float32 else gguf.GGMLQuantizationType.BF16
        size = int(np.prod(shape)) * dtypes[name].itemsize
        writer.add_tensor_info(theirs, shape, dtypes[name], size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, array in _with_biases(model, written, shapes):
            array = array.T if name.endswith("kernel") else array
            writer.write_tensor_data(np.ascontiguousarray(array, dtypes[name]))
    finally:
        writer.close()


def _dtype(name: str, shape: tuple[int, ...], dtype: str) -> np.dtype[Any]:
    return jnp.dtype(dtype) if len(shape) > 1 and not name.startswith("wpe") else np.dtype(np.float32)


def _with_biases(
    model: StoredModel, names: list[str], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters, then zeros for the biases that the model does not have."""
    yield from model.parameters()
    for name in names[len(parameter_shapes(model.config)) :]:
        yield name, np.zeros(shapes[name], np.float32)


def _add_tokenizer(gguf: Any, writer: Any, model: StoredModel) -> None:
    """Adds the tokens, their merges and the tokens around a text.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    tokenizer, around = model.open_tokenizer(), model.boundaries
    words = isinstance(tokenizer, ExtendedTokenizer) and tokenizer.words
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    problem = None
    if not isinstance(base, tiktoken.Encoding):
        problem = "a tokenizer of characters"
    elif words:
        problem = "a tokenizer with added words"
    elif len(around.ends) != 1:
        problem = f"{len(around.ends)} tokens that end a text"
    elif around.prefix not in ((), (around.start,)):
        problem = "several tokens before each text"
    elif tokenizer.n_vocab > model.config.vocab_size:
        problem = f"{tokenizer.n_vocab:,} tokens and only {model.config.vocab_size:,} embeddings"
    if problem:
        raise UserError(f"{model.where} has {problem}, which GGUF cannot represent; take --to huggingface")
    assert isinstance(base, tiktoken.Encoding)
    vocab, merges = vocab_and_merges(base)
    pieces = sorted(vocab, key=vocab.__getitem__)
    kinds = [gguf.TokenType.CONTROL if piece in base.special_tokens_set else gguf.TokenType.NORMAL for piece in pieces]
    n_unused = model.config.vocab_size - len(pieces)  # rows of the embedding that no token has
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*pieces, *(f"[UNUSED{number}]" for number in range(n_unused))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * n_unused])
    # llama.cpp needs merges. This one, for raw bytes, never applies: no text has its halves.
    writer.add_token_merges(merges or [f"{END_OF_TEXT} {END_OF_TEXT}"])
    writer.add_bos_token_id(around.ends[0] if around.start is None else around.start)
    writer.add_eos_token_id(around.ends[0])
    writer.add_add_bos_token(bool(around.prefix))
