"""Sampling text from a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.model import GPT2, Params


def sample(
    model: GPT2, params: Params, prompt: Sequence[int], n_tokens: int, *, vocab_size: int, seed: int
) -> np.ndarray:
    """Draws `n_tokens` tokens after a prompt, one at a time, each from the model's distribution.

    Beyond `block_size` tokens the model sees the last `block_size` of them.

    Args:
        prompt: tokens, at least one.
        vocab_size: only tokens below it are drawn; the model may have room for more than its tokenizer has.

    Returns:
        int32 [n_tokens].
    """
    # Kernels want their own lengths and placements; one sequence at a time gains nothing from them.
    model = model.clone(config=dataclasses.replace(model.config, attention="xla"))
    block_size = model.config.block_size
    window = np.zeros(block_size, np.int32)
    length = min(len(prompt), block_size)
    window[:length] = prompt[-length:]
    state = jnp.asarray(window), jnp.asarray(length)
    draw = jax.jit(functools.partial(_draw, model, vocab_size))
    drawn = []
    for index in range(n_tokens):
        token, state = draw(params, state, jax.random.fold_in(jax.random.key(seed), index))
        drawn.append(token)
    return np.array(jax.device_get(drawn), np.int32)


def _draw(
    model: GPT2, vocab_size: int, params: Params, state: tuple[jax.Array, jax.Array], key: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One token from a window of which `length` are filled, and the window with the token in it."""
    window, length = state
    logits = cast(jax.Array, model.apply({"params": params}, window[None]))[0, length - 1]
    token = jax.random.categorical(key, logits[:vocab_size])
    full = length == window.size
    window = jnp.where(full, jnp.roll(window, -1), window)
    length = jnp.minimum(length + 1, window.size)
    return token, (window.at[length - 1].set(token), length)
