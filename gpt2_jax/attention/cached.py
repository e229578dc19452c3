"""Attention for generation: keys and values of earlier tokens are kept in a cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """Keys and values of one layer. Sequences are padded on the left, so that all end in the same slot."""

    keys: jax.Array  # [batch · heads, slots, head_dim]
    values: jax.Array  # [batch · heads, slots, head_dim]
    slot: jax.Array  # int32 [], the slot of the next token
    pad: jax.Array  # int32 [batch], empty slots before the first token of each sequence


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, scale: float
) -> tuple[jax.Array, LayerCache]:
    """Attention of new tokens to the cache and to the new tokens up to themselves, softmax in float32.

    Args:
        q, k, v: [batch, time, heads, head_dim] of the new tokens, which fill the next `time` slots.
        cache: has `time` free slots.
        scale: factor of q kᵀ.

    Returns:
        [batch, time, heads, head_dim] in the dtype of `q`, and the cache with the new tokens added.
    """
    batch, time, n_head, head_dim = q.shape

    # Batch and heads are one axis, also in the cache. With two axes, XLA's CPU backend reshapes the updated cache for
    # the matmuls, which copies all of it for every token.
    def flat(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(batch * n_head, time, head_dim)

    keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, flat(k), cache.slot, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(cache.values, flat(v), cache.slot, axis=1)
    scores = jnp.einsum("nqd,nsd->nqs", flat(q) * scale, keys, preferred_element_type=jnp.float32)
    slots = jnp.arange(keys.shape[1])[None, None, :]
    seen = slots <= cache.slot + jnp.arange(time)[None, :, None]  # [1, time, slots]
    seen = seen & (slots >= cache.pad[:, None, None])  # [batch, time, slots]
    weights = jax.nn.softmax(jnp.where(jnp.repeat(seen, n_head, axis=0), scores, jnp.finfo(jnp.float32).min), axis=-1)
    y = jnp.einsum("nqs,nsd->nqd", weights.astype(values.dtype), values)
    y = y.reshape(batch, n_head, time, head_dim).swapaxes(1, 2)
    return y, LayerCache(keys, values, cache.slot + time, cache.pad)
