"""Models of any origin: `load` one, or `open_model` to see what it is, read its tokenizer, or convert it.

MODEL is one thing in every command: a run directory or one checkpoint in it, a directory of Hugging Face's
`transformers` or a name on its hub, a nanoGPT `ckpt.pt`, or an llm.c `model_*.bin`.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.errors import UserError
from gpt2_jax.generation import LanguageModel
from gpt2_jax.interop.huggingface import on_hub, open_huggingface
from gpt2_jax.interop.llmc import open_llmc
from gpt2_jax.interop.nanogpt import open_nanogpt
from gpt2_jax.interop.runs import newest_checkpoint, open_checkpoint
from gpt2_jax.interop.stored import StoredModel, in_directory

KINDS = (
    "a run directory or a checkpoint in it, a directory with config.json, a name on the Hugging Face hub, nanoGPT's "
    "ckpt.pt, or llm.c's model_*.bin"
)
RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's own


def open_model(name: str) -> StoredModel:
    """Finds out what a MODEL is, and reads all but its parameters.

    Raises:
        UserError: there is no such model, or it is damaged or none of ours.
    """
    try:
        path = Path(name).expanduser()
        is_file, is_directory = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a home that is not there
        raise UserError(f"{name} cannot be a model ({error}); expected {KINDS}") from error
    if is_file:
        return open_nanogpt(path) if path.suffix in (".pt", ".pth") else open_llmc(path)
    if is_directory and name:
        return _open_directory(name, path)
    outside = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if not name or outside or path.suffix in (".pt", ".bin"):
        raise UserError(f"{name or 'an empty name'} does not exist; expected {KINDS}")
    return open_huggingface(name, on_hub(name), assume_gpt2=name.removeprefix("openai-community/") in RELEASED)


def _open_directory(name: str, path: Path) -> StoredModel:
    if (path / "config.json").is_file():
        return open_huggingface(name, in_directory(path))
    if (path / "checkpoints").is_dir():
        return open_checkpoint(newest_checkpoint(path))
    if (path / "ckpt.pt").is_file():
        return open_nanogpt(path / "ckpt.pt")
    if files := sorted(path.glob("model_*.bin")):
        return open_llmc(files[-1])
    checkpoint = path.resolve()
    if checkpoint.parent.name == "checkpoints" and checkpoint.name.isdigit():
        return open_checkpoint(checkpoint)
    raise UserError(f"{name} is a directory without config.json, checkpoints, ckpt.pt or model_*.bin; expected {KINDS}")


def load(name: str, *, mesh: Mesh | None = None, dtype: jnp.dtype | type = jnp.float32) -> LanguageModel:
    """Loads a model of any format, each parameter straight to its device.

    Args:
        name: any MODEL.
        mesh: from `sharding.make_mesh`, to shard or replicate the parameters over; one device by default.
        dtype: of activations and matmuls. Parameters are float32.

    Returns:
        The model with the fastest attention backend for its device, its parameters and its tokenizer.

    Raises:
        UserError: there is no such model, it is damaged, or it is not a GPT-2.
    """
    return open_model(name).load(mesh, jnp.dtype(dtype))
