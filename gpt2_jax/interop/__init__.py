"""Models of any format: `load` one, or `open_model` to inspect it, read its tokenizer or convert it.

MODEL means the same in every command: a run directory or a checkpoint in it, a directory written by Hugging Face
`transformers` or a name on the Hugging Face hub, nanoGPT's `ckpt.pt`, or llm.c's `model_*.bin`.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.errors import DeletedError, UserError
from gpt2_jax.files import check_regular, user_path
from gpt2_jax.generation import LanguageModel
from gpt2_jax.interop.huggingface import hub_files, open_huggingface
from gpt2_jax.interop.llmc import open_llmc
from gpt2_jax.interop.model_files import directory_files, permission
from gpt2_jax.interop.nanogpt import open_nanogpt
from gpt2_jax.interop.runs import newest_checkpoint, open_checkpoint
from gpt2_jax.interop.stored import StoredModel

MODEL_KINDS = (
    "a run directory or a checkpoint in it, a directory with config.json, a name on the Hugging Face hub, nanoGPT's "
    "ckpt.pt, or llm.c's model_*.bin"
)
T = TypeVar("T")

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def open_model(name: str) -> StoredModel:
    """Detects the format of a MODEL, and reads everything except its parameters.

    Raises:
        UserError: there is no such model, it is damaged, it may not be read, or it is not a GPT-2.
    """
    path = user_path(name or ".", "MODEL")
    check_regular(path)
    try:
        with permission(path):
            is_file, is_directory = path.is_file(), path.is_dir()
    except OSError as error:
        raise UserError(f"{name} cannot be a model ({error}); expected {MODEL_KINDS}") from error
    if is_file:
        return open_nanogpt(path) if path.suffix in (".pt", ".pth") else open_llmc(path)
    if is_directory and name:
        with permission(path):
            return _open_directory(name, path)
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    is_path |= "\\" in name or ":" in name  # of Windows; no name on the hub has them
    if not name or is_path or path.suffix in (".pt", ".pth", ".bin"):
        raise UserError(f"{name or 'an empty name'} does not exist; expected {MODEL_KINDS}")
    assume_gpt2 = name.removeprefix("openai-community/") in OPENAI_MODELS
    return open_huggingface(name, hub_files(name), assume_gpt2=assume_gpt2)


def _open_directory(name: str, path: Path) -> StoredModel:
    find = directory_files(path)
    if find("config.json"):
        return open_huggingface(name, find)
    if (path / "checkpoints").is_dir():
        return open_checkpoint(newest_checkpoint(path))
    if checkpoint_file := find("ckpt.pt"):
        return open_nanogpt(checkpoint_file)
    if files := fnmatch.filter(os.listdir(path), "model_*.bin"):
        return open_llmc(path / max(files))
    checkpoint = path.resolve()
    if checkpoint.parent.name == "checkpoints" and checkpoint.name.isdigit():
        return open_checkpoint(checkpoint)
    raise UserError(
        f"{name} is a directory without config.json, checkpoints, ckpt.pt or model_*.bin; expected {MODEL_KINDS}"
    )


def is_on_disk(name: str) -> bool:
    """True if a MODEL is a file or a directory, so that opening it downloads nothing."""
    with suppress(OSError, ValueError):  # no path at all
        return Path(name).exists()
    return False


def use_model(name: str, use: Callable[[StoredModel], T]) -> T:
    """Opens a MODEL and uses it; again with the next newest checkpoint if a run that trains deletes the opened one.

    Raises:
        UserError: as `open_model` and `use`.
    """
    while True:
        try:
            return use(open_model(name))
        except DeletedError:
            if user_path(name, "MODEL").name.isdigit():  # that checkpoint was asked for
                raise


def load(
    name: str, *, mesh: Mesh | None = None, dtype: jax.typing.DTypeLike = jnp.float32, fingerprint: str = ""
) -> LanguageModel:
    """Loads a model of any format, one parameter at a time, straight to its devices.

    Args:
        name: any MODEL.
        mesh: shards or replicates the parameters (`sharding.make_mesh` makes one); one device by default.
        dtype: the dtype of activations and matmuls. Parameters are float32.
        fingerprint: that of the parameters, as `gpt2_jax.convert` prints it, to compare with; "" compares only what a
            run recorded.

    Returns:
        The model with the fastest attention backend for its device, its parameters and its tokenizer.

    Raises:
        UserError: there is no such model, it is damaged, or it is not a GPT-2.
        DamagedError: its parameters have another fingerprint.
    """

    def read(model: StoredModel) -> LanguageModel:
        return (model.with_fingerprint(fingerprint) if fingerprint else model).load(mesh, jnp.dtype(dtype))

    return use_model(name, read)
