"""Models of Hugging Face `transformers`, in a directory or on the hub.

A model is `config.json`, safetensors (or the older `pytorch_model.bin`) and tokenizer files. Its Conv1D matrices are
[in, out], like Flax kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.tokenizer import Boundaries
from gpt2_jax.errors import UserError
from gpt2_jax.files import check_hub_cache, replace_text
from gpt2_jax.interop.keep_tokenizer import keep_tokenizer, special_ids
from gpt2_jax.interop.model_files import FindFile, check_permission, read_json
from gpt2_jax.interop.state_dict import Tensors, check_state
from gpt2_jax.interop.stored import StoredModel, check_sizes, parameter_shapes, torch_name
from gpt2_jax.interop.tokenizer_files import boundaries_in, implied_tokenizer, read_named, read_tokenizer
from gpt2_jax.interop.torch_files import load_torch, state_tensors
from gpt2_jax.model import LAYER_NORM_EPSILON

# Files that may hold the weights, in the order of preference. An index names the files that hold parts of them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "exact"}
# Settings of transformers' GPT-2 that this model does not have, with the values that it implements.
FIXED_SETTINGS = {
    "layer_norm_epsilon": LAYER_NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Sizes: our name, the names in config.json from the preferred to the oldest, and the default of `GPT2Config`.
SIZES = (
    ("vocab_size", ("vocab_size",), 50257),
    ("block_size", ("n_positions", "max_position_embeddings", "n_ctx"), 1024),
    ("n_layer", ("n_layer", "num_hidden_layers"), 12),
    ("n_head", ("n_head", "num_attention_heads"), 12),
    ("n_embd", ("n_embd", "hidden_size"), 768),
)


def hub_files(repository: str) -> FindFile:
    """Finds the files of a model on the hub, and downloads them into huggingface_hub's cache.

    The returned function raises UserError if there is no such repository, or if it is not in the cache and the hub
    cannot be reached.

    Raises:
        UserError: there is no place for that cache.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_CACHE

    check_hub_cache(repository)
    unreachable = False

    def find(name: str) -> Path | None:
        nonlocal unreachable
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=unreachable))
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            unreachable = True
            if name != "config.json":
                return None  # the files in the cache may be enough
            raise UserError(
                f"{repository} is not a file or directory here, it is not in the cache {HF_HUB_CACHE}, and the hub "
                "cannot be reached; give a directory with config.json and model.safetensors, or set HF_HOME to a copy "
                "of another machine's cache"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # huggingface_hub does not document what else the HTTP stack may raise
            raise UserError(
                f"{repository} is not a file or directory here, and it cannot be read from the hub "
                f"({type(error).__name__}); give a path, or a name such as gpt2 or openai-community/gpt2-xl"
            ) from error

    return find


def open_huggingface(where: str, find: FindFile, assume_gpt2: bool = True) -> StoredModel:
    """Opens a model and reads its config. Tensors are memory-mapped.

    Args:
        where: the model's name, for errors.
        find: finds its files.
        assume_gpt2: if there are no tokenizer files, take GPT-2's tokenizer for a model of its vocabulary size.

    Raises:
        UserError: the model is not a GPT-2, or its files are missing, damaged or of different models.
    """
    config, named = _read_config(where, find)
    config, tensors = check_state(where, config, _open_weights(where, find))
    vocab_size = config.vocab_size if assume_gpt2 else 0
    find_tokenizer = functools.partial(read_tokenizer, find, lambda: implied_tokenizer(vocab_size))

    def read(name: str) -> np.ndarray:
        return tensors[torch_name(name)]()

    return StoredModel(where, config, read, find_tokenizer, named=named, files=find)


def _read_config(where: str, find: FindFile) -> tuple[GPT2Config, Boundaries]:
    """The config, with the defaults of transformers for missing keys, and the tokens around a text."""
    path = find("config.json")
    if path is None:
        raise UserError(f"{where} has no config.json; expected the files that save_pretrained of transformers writes")
    table = read_json(path)
    architecture = table.get("model_type")
    if architecture != "gpt2":
        raise UserError(f"{where} has model_type = {architecture!r} in config.json; expected 'gpt2'")
    for key, value in FIXED_SETTINGS.items():
        if table.get(key, value) != value:
            raise UserError(f"{where} has {key} = {table[key]} in config.json; expected {value}, as in GPT-2")
    activation = str(table.get("activation_function", "gelu_new"))
    if activation not in GELUS:
        raise UserError(
            f"{where} has activation_function = {activation!r} in config.json; expected one of {', '.join(GELUS)}"
        )
    sizes: dict[str, Any] = {
        ours: next((table[name] for name in theirs if name in table), default) for ours, theirs, default in SIZES
    }
    config = GPT2Config(
        **sizes,
        gelu="exact" if GELUS[activation] == "exact" else "tanh",
        bias=table.get("bias") is not False,  # our own key: transformers always has biases, here zeros
    )
    check_sizes(where, config)
    if table.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{where} has n_inner = {table['n_inner']} in config.json; expected 4 × {config.n_embd}")
    return config, read_named(find, config.vocab_size).or_else(boundaries_in(table, config.vocab_size))


def _open_weights(where: str, find: FindFile) -> Tensors:
    for name in WEIGHT_FILES:
        path = find(name)
        if path is None:
            continue
        if not name.endswith(".json"):
            return _open_file(path)
        try:
            parts = sorted(set(read_json(path)["weight_map"].values()))
            if any(Path(part).name != part for part in parts):
                raise ValueError("it names files in other directories")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an index of weights ({error!r}); copy it again") from error
        tensors: Tensors = {}
        for part in parts:
            found = find(part)
            if found is None:
                raise UserError(f"{where} has no {part}, which {name} lists; copy it again")
            tensors |= _open_file(found)
        return tensors
    raise UserError(f"{where} has no weights; expected one of {', '.join(WEIGHT_FILES)}")


def _open_file(path: Path) -> Tensors:
    if path.suffix == ".bin":
        return state_tensors(path, load_torch(path))
    check_permission(path)
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is cut off, damaged or not safetensors ({error}); copy it again") from error
    return {name: functools.partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 (not a dict)


# --- writing -------------------------------------------------------------------------------------------


def write_huggingface(model: StoredModel, directory: Path, dtype: str) -> None:
    """Writes a model for `transformers` (`AutoModelForCausalLM`, `AutoTokenizer`) and lm-eval.

    llama.cpp's converter reads it too, if the vocabulary is GPT-2's. llama.cpp only computes the tanh GELU.

    Raises:
        UserError: the vocabulary of the tokenizer cannot be downloaded.
    """
    config = model.config
    numpy_dtype = jnp.dtype(jnp.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
    tensors = {f"transformer.{torch_name(name)}": array.astype(numpy_dtype) for name, array in model.parameters()}
    if not config.bias:  # transformers always adds biases; zeros compute the same
        for name, shape in parameter_shapes(dataclasses.replace(config, bias=True)).items():
            tensors.setdefault(f"transformer.{torch_name(name)}", np.zeros(shape, numpy_dtype))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})  # transformers requires the key
    keep_tokenizer(model, directory, make=True)
    table = _config_json(config, dtype) | special_ids(model.boundaries)
    replace_text(directory / "config.json", json.dumps(table, indent=2) + "\n")


def _config_json(config: GPT2Config, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # for llama.cpp's converter; transformers has dropped it
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": 0.02,
        **FIXED_SETTINGS,
        "dtype": dtype,
        "torch_dtype": dtype,
    } | ({} if config.bias else {"bias": False})
