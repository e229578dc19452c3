"""cuDNN's fused attention for NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt2_jax.attention.backend import Backend, Problem


def unsupported_reason(problem: Problem) -> str | None:
    """Says why cuDNN cannot solve a problem, or returns None if it can."""
    if problem.hardware.platform != "cuda":
        return f"needs cuda, found {problem.hardware.platform}"
    if problem.dropout:
        return f"has no dropout, asked for {problem.dropout:g}"
    if problem.hardware.capability < 8.0:
        return f"needs compute capability 8.0 (Ampere), found {problem.hardware.capability}"
    if problem.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, found {jnp.dtype(problem.dtype)}"
    if problem.head_dim % 8 or problem.head_dim > 128:
        return f"needs a head dimension up to 128 and a multiple of 8, found {problem.head_dim}"
    return None


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """`causal_attention` by cuDNN: [batch, time, heads, head_dim], bfloat16 or float16, without dropout."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")


BACKEND = Backend(cudnn_attention, unsupported_reason)
