"""Attention for scoring: a row holds several texts, and the continuations of a text share its context."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packed(NamedTuple):
    """Where the tokens of packed rows belong: int32 [batch, time] each.

    A token sees the earlier tokens of its own segment and those of the segment's parent.
    """

    positions: jax.Array  # in the text; they select the rows of `wpe`
    segments: jax.Array
    parents: jax.Array  # the segment of the context, or for a context its own


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, packed: Packed, scale: float) -> jax.Array:
    """Attention within packed rows, softmax in float32: [batch, time, heads, head_dim] -> the same shape and dtype."""
    q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
    keys = packed.segments[:, None, :]
    time = jnp.arange(q.shape[2])
    seen = (keys == packed.segments[:, :, None]) | (keys == packed.parents[:, :, None])
    seen = seen & (time[None, None, :] <= time[None, :, None])
    # Added, not selected: a comparison for every head took longer on CPUs. Scores are far smaller than 1e30.
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores + jnp.where(seen, 0.0, -1e30)[:, None], axis=-1)
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v).swapaxes(1, 2)
