"""The record that every attention backend fills in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gpt2_jax.hardware import Hardware


class Problem(NamedTuple):
    """An attention computation, as far as the choice of a backend depends on it.

    Attributes:
        time: tokens per sequence.
        dropout: rate on the attention weights while training.
    """

    hardware: Hardware
    dtype: jnp.dtype
    time: int
    head_dim: int
    dropout: float


class Attend(Protocol):
    """Computes causal attention."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, scale: float, *, dropout: float, dropout_key: jax.Array | None
    ) -> jax.Array:
        """q, k, v [batch, time, heads, head_dim] -> the same shape. `dropout` is 0 for backends without dropout."""


class Backend(NamedTuple):
    """One way to compute causal attention.

    Attributes:
        attend: softmax(scale · q kᵀ + causal mask) v.
        unsupported_reason: says why the backend cannot solve a problem, or returns None if it can.
        project_in: (x [batch, time, n_embd], kernel [n_embd, 3 n_embd], bias [3 n_embd], head_dim) -> q, k and v, each
            [batch, time, n_embd], for a kernel that needs them in another memory layout. None takes the model's own.
        project_out: (y [batch, time, n_embd], kernel [n_embd, n_embd], head_dim) -> [batch, time, n_embd], likewise.
        scales_queries: `project_in` multiplies the queries by 1/√head_dim, so `attend` is given a scale of 1.
        check_vma: `jax.shard_map` can check which values vary over the mesh. JAX's Pallas kernels do not take part.
    """

    attend: Attend
    unsupported_reason: Callable[[Problem], str | None]
    project_in: Callable[[jax.Array, jax.Array, jax.Array, int], list[jax.Array]] | None = None
    project_out: Callable[[jax.Array, jax.Array, int], jax.Array] | None = None
    scales_queries: bool = False
    check_vma: bool = True
