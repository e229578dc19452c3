"""Tensors with the names of the released checkpoints: what every file of torch and transformers is checked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.interop.stored import check_sizes, parameter_shapes, torch_name

Tensors = dict[str, Callable[[], np.ndarray]]  # name -> function that reads the tensor

# Parts of names that the wrappers of torch add, in any order: DDP and DataParallel, torch.compile, FSDP, and
# activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which older versions saved
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"


def check_state(where: str, config: GPT2Config, tensors: Tensors) -> tuple[GPT2Config, Tensors]:
    """Checks that tensors are those of a GPT-2, and gives them the names of `torch_name`.

    Args:
        where: the model's name, for errors.
        config: its config. If its `bias` is False, the tensors decide: a model whose biases are all 0 has none.
        tensors: its tensors, with any prefixes of torch's wrappers and of `GPT2LMHeadModel`.

    Returns:
        The config, and the tensors of the parameters.

    Raises:
        UserError: a size is impossible, a tensor is unknown or there twice, or the head is not the token embedding.
    """
    check_sizes(where, config)
    tensors = _renamed(where, tensors)
    if HEAD in tensors:
        head = tensors.pop(HEAD)
        # A lone head is the embedding: safetensors' save_model keeps one of two names for the same tensor.
        embedding = tensors.setdefault(EMBEDDING, head)
        if embedding is not head and not np.array_equal(head(), embedding()):
            raise UserError(
                f"{where} has an {HEAD} that differs from {EMBEDDING}; expected a head tied to the token embedding, "
                "as in GPT-2"
            )
    known = {torch_name(name) for name in parameter_shapes(dataclasses.replace(config, bias=True))}
    if unknown := sorted(tensors.keys() - known):
        raise UserError(f"{where} has the tensor {unknown[0]}, which a GPT-2 of its config does not have")
    if not config.bias and any(np.any(read()) for name, read in tensors.items() if name.endswith(".bias")):
        config = dataclasses.replace(config, bias=True)
    return config, tensors


def _renamed(where: str, tensors: Tensors) -> Tensors:
    """The tensors without prefixes and without masks."""
    renamed: Tensors = {}
    for name, read in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("transformer.")
        if bare in renamed:
            raise UserError(f"{where} has the tensor {bare} twice, once as {name}; save it again with one of them")
        if not bare.endswith(MASKS):
            renamed[bare] = read
    return renamed
