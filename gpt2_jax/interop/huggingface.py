"""Models of Hugging Face `transformers`, in a directory or on the hub.

A model is `config.json`, safetensors (or the older `pytorch_model.bin`) and tokenizer files. Its Conv1D matrices are
[in, out], like Flax kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.tokenizer import end_of_text
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import FindFile, StoredModel, check_sizes, parameter_shapes, torch_name
from gpt2_jax.interop.tokenizer_files import read_tokenizer, write_tokenizer
from gpt2_jax.interop.torch_files import load_torch, to_numpy
from gpt2_jax.model import LAYER_NORM_EPSILON

Tensors = dict[str, Callable[[], np.ndarray]]  # name in the file -> function that reads the tensor

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
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which older versions saved


def hub_files(repository: str) -> FindFile:
    """Finds the files of a model on the hub, and downloads them into huggingface_hub's cache.

    The returned function raises UserError if there is no such repository, or if it is not in the cache and the hub
    cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_CACHE

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
    config, end = _read_config(where, find)
    tensors = _open_weights(where, find)
    # GPT2LMHeadModel adds the prefix; GPT2Model and the released files have none.
    tensors = {name.removeprefix("transformer."): read for name, read in tensors.items() if not name.endswith(MASKS)}
    names = {torch_name(name) for name in parameter_shapes(config)}
    zeros = set() if config.bias else {name for name in tensors if name.endswith(".bias")}
    if unknown := sorted(tensors.keys() - names - zeros - {"lm_head.weight"}):
        raise UserError(f"{where} has the tensor {unknown[0]}, which a GPT-2 of its config does not have")
    if "lm_head.weight" in tensors and "wte.weight" in tensors:
        head, embedding = tensors["lm_head.weight"](), tensors["wte.weight"]()
        if not np.array_equal(head, embedding):
            raise UserError(
                f"{where} has an lm_head.weight that differs from wte.weight; expected a head tied to the token "
                "embedding, as in GPT-2"
            )
    for name in sorted(zeros):
        if np.any(tensors[name]()):
            raise UserError(f"{where} has bias = false in config.json, but {name} is not zero; correct one of them")

    find_tokenizer = functools.partial(read_tokenizer, find, config.vocab_size if assume_gpt2 else 0)

    def read(name: str) -> np.ndarray:
        return tensors[torch_name(name)]()

    return StoredModel(where, config, read, find_tokenizer, end_of_text=end)


def _read_config(where: str, find: FindFile) -> tuple[GPT2Config, int | None]:
    """The config, and the token that ends a text."""
    path = find("config.json")
    if path is None:
        raise UserError(f"{where} has no config.json; expected the files that save_pretrained of transformers writes")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); copy it again") from error
    architecture = table.get("model_type") if isinstance(table, dict) else None
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
    config = GPT2Config(
        vocab_size=table.get("vocab_size"),
        block_size=table.get("n_positions", table.get("n_ctx")),
        n_layer=table.get("n_layer"),
        n_head=table.get("n_head"),
        n_embd=table.get("n_embd"),
        gelu="exact" if GELUS[activation] == "exact" else "tanh",
        bias=bool(table.get("bias", True)),  # our own key: transformers always has biases, here zeros
    )
    check_sizes(where, config)
    if table.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{where} has n_inner = {table['n_inner']} in config.json; expected 4 × {config.n_embd}")
    end = table.get("eos_token_id")
    return config, end if type(end) is int and 0 <= end < config.vocab_size else None


def _open_weights(where: str, find: FindFile) -> Tensors:
    for name in WEIGHT_FILES:
        path = find(name)
        if path is None:
            continue
        if not name.endswith(".json"):
            return _open_file(path)
        try:
            parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(part).name != part for part in parts):
                raise ValueError("it names files in other directories")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
        state = load_torch(path)
        if not isinstance(state, dict) or not all(hasattr(tensor, "is_floating_point") for tensor in state.values()):
            raise UserError(f"{path} is not a state dict; expected a dict with only tensors as values")
        return {name: functools.partial(to_numpy, tensor) for name, tensor in state.items()}
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
    tokenizer = model.tokenizer
    numpy_dtype = jnp.dtype(jnp.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
    tensors = {f"transformer.{torch_name(name)}": array.astype(numpy_dtype) for name, array in model.parameters()}
    if not config.bias:  # transformers always adds biases; zeros compute the same
        for name, shape in parameter_shapes(dataclasses.replace(config, bias=True)).items():
            tensors.setdefault(f"transformer.{torch_name(name)}", np.zeros(shape, numpy_dtype))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})  # transformers requires the key
    end = model.end_of_text
    if tokenizer:
        end = end_of_text(tokenizer) if end is None else end
        write_tokenizer(tokenizer, directory, config.block_size, end)
    (directory / "config.json").write_text(json.dumps(_config_json(config, end, dtype), indent=2) + "\n")
    generation = {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _config_json(config: GPT2Config, end_of_text: int | None, dtype: str) -> dict[str, Any]:
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
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
        "torch_dtype": dtype,
    } | ({} if config.bias else {"bias": False})
