"""Causal self-attention: one signature, several backends, and the choice among them with its reasons.

    splash  the Pallas flash-attention kernel for TPU that ships with JAX
    cudnn   cuDNN's fused attention for NVIDIA GPUs
    xla     written in jax.numpy: runs everywhere, in any dtype, with dropout; its memory grows with time²

All compute softmax(q kᵀ / √head_dim + causal mask) v (Vaswani et al. 2017, section 3.2.1). `cached.py` has the variant
for generation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gpt2_jax.attention import cudnn, splash, xla
from gpt2_jax.attention.backend import Backend, Problem
from gpt2_jax.config import AttentionBackend
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import current_hardware

# Fastest first: "auto" takes the first that supports the problem.
BACKENDS: dict[AttentionBackend, Backend] = {"splash": splash.BACKEND, "cudnn": cudnn.BACKEND, "xla": xla.BACKEND}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen backend, and the reason for each rejected one."""

    backend: AttentionBackend
    rejected: dict[str, str]

    def __str__(self) -> str:
        return "; ".join([self.backend, *(f"not {name}: {reason}" for name, reason in self.rejected.items())])


def choose(wanted: AttentionBackend, problem: Problem) -> Choice:
    """Chooses the backend for `wanted`, which may be "auto".

    Raises:
        UserError: `wanted` names a backend that does not support the problem.
    """
    reasons = {name: backend.unsupported_reason(problem) for name, backend in BACKENDS.items()}
    if wanted != "auto":
        if reason := reasons[wanted]:
            raise UserError(f"model.attention = {wanted!r} {reason}; type --model.attention auto")
        return Choice(wanted, {})
    name = next(name for name, reason in reasons.items() if reason is None)
    return Choice(name, {name: reason for name, reason in reasons.items() if reason})


def get_backend(name: AttentionBackend, *, dtype: jnp.dtype, time: int, head_dim: int, dropout: float) -> Backend:
    """The record of a backend. "auto" chooses it for the default device and a `Problem` with the other arguments."""
    if name == "auto":
        name = choose("auto", Problem(current_hardware(), dtype, time, head_dim, dropout)).backend
    return BACKENDS[name]


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    backend: AttentionBackend = "xla",
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Attention of each position to itself and to those before it.

    Args:
        q, k, v: [batch, time, heads, head_dim], one floating dtype.
        backend: "auto" chooses for the default device.
        scale: factor of q kᵀ, 1/√head_dim by default.
        dropout: rate on the attention weights; needs `dropout_key` unless 0.

    Returns:
        [batch, time, heads, head_dim], in the dtype of `q`.

    Raises:
        ValueError: the backend has no dropout, or `dropout_key` is missing.
    """
    if dropout and backend not in ("auto", "xla"):
        raise ValueError(f"attention backend {backend!r} has no dropout")
    _, time, _, head_dim = q.shape
    record = get_backend(backend, dtype=q.dtype, time=time, head_dim=head_dim, dropout=dropout)
    scale = head_dim**-0.5 if scale is None else scale
    return record.attend(q, k, v, scale, dropout=dropout, dropout_key=dropout_key)
