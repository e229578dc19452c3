"""Next-token cross-entropy: from the hidden states to a loss sum in nats.

Logits are the largest array of GPT-2: 3.3 GB in float32 for 16 sequences of 1,024 tokens. `cross_entropy` computes them
in chunks of tokens. It forms the gradients of the head in the forward pass, while a chunk's logits exist, so the
backward pass neither stores nor recomputes logits (the idea of Cut Cross-Entropy, Wijmans et al. 2024, and of Liger
Kernel's fused linear cross-entropy).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gpt2_jax.config import IGNORE


def head_logits(hidden: jax.Array, embedding: jax.Array, vocab_size: int) -> jax.Array:
    """The tied head: [..., n_embd] and [padded_vocab, n_embd] -> float32 logits [..., padded_vocab].

    The matmul has operands in the dtype of `hidden` and sums in float32. Padding gets the lowest float32, so its
    probability is 0.
    """
    logits = jnp.einsum("...c,vc->...v", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    is_token = jnp.arange(embedding.shape[0]) < vocab_size
    return jnp.where(jnp.expand_dims(is_token, range(hidden.ndim - 1)), logits, jnp.finfo(jnp.float32).min)


def plain_cross_entropy(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, vocab_size: int) -> jax.Array:
    """`cross_entropy` with all logits at once and JAX's own gradients: the reference in tests."""
    log_probs = jax.nn.log_softmax(head_logits(hidden, embedding, vocab_size))
    nats = -jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(targets == IGNORE, 0.0, nats))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, vocab_size: int, chunk: int = 0
) -> jax.Array:
    """Sum of −log p(target) in nats over all targets that are not `IGNORE`, float32 [].

    Args:
        hidden: [batch, time, n_embd], the output of the final layer norm.
        embedding: float32 [padded_vocab, n_embd], the tied token embedding.
        targets: int [batch, time], below `vocab_size` or `IGNORE`.
        chunk: tokens whose logits exist at the same time; 0 for all.
    """

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + _chunk_loss(*part, embedding, vocab_size)[0], None

    parts = _chunks(hidden, targets, chunk)
    return jax.lax.scan(add, _varying_zeros((), targets), parts)[0]


def _chunk_loss(
    hidden: jax.Array, targets: jax.Array, embedding: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One chunk, [tokens, n_embd] and [tokens] -> loss sum [], logits [tokens, vocab], log-normalizer [tokens, 1]."""
    logits = head_logits(hidden, embedding, vocab_size)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    at_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)
    nats = jnp.where(targets == IGNORE, 0.0, (log_normalizer - at_target)[:, 0])
    return jnp.sum(nats), logits, log_normalizer


def _forward(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, vocab_size: int, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss sum, and its gradients with respect to `hidden` and `embedding` for the backward pass."""

    def add(
        carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, d_embedding = carry
        hidden, targets = part
        loss_sum, logits, log_normalizer = _chunk_loss(hidden, targets, embedding, vocab_size)
        is_target = jnp.arange(logits.shape[-1])[None, :] == targets[:, None]
        d_logits = jnp.exp(logits - log_normalizer) - is_target.astype(jnp.float32)
        # In float16 too without a loss scale, which arrives with `d_total` only. Even the rows of rare tokens, sums of
        # probabilities near 1 / 50,257, had an error of 6e-4 of their norm, where bfloat16 had 2e-3.
        d_logits = jnp.where(targets[:, None] == IGNORE, 0.0, d_logits).astype(hidden.dtype)
        d_hidden = jnp.einsum("nv,vc->nc", d_logits, embedding.astype(hidden.dtype))
        d_embedding += jnp.einsum("nv,nc->vc", d_logits, hidden, preferred_element_type=jnp.float32)
        return (total + loss_sum, d_embedding), d_hidden

    start = _varying_zeros((), targets), _varying_zeros(embedding.shape, targets)
    (total, d_embedding), d_hidden = jax.lax.scan(add, start, _chunks(hidden, targets, chunk))
    d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    return total, (d_hidden, d_embedding.astype(embedding.dtype))


def _backward(
    vocab_size: int, chunk: int, saved: tuple[jax.Array, jax.Array], d_total: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    d_hidden, d_embedding = saved
    # Multiply in float32: rounding the factor 1 / tokens to bfloat16 would scale all gradients except the head's.
    return (d_hidden.astype(jnp.float32) * d_total).astype(d_hidden.dtype), d_embedding * d_total, None


cross_entropy.defvjp(_forward, _backward)


def _chunks(hidden: jax.Array, targets: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Splits into [chunks, tokens, n_embd] and [chunks, tokens]. Ignored targets pad the last chunk."""
    tokens = targets.size
    chunk = min(chunk, tokens) or tokens
    missing = -tokens % chunk
    hidden = jnp.pad(hidden.reshape(tokens, -1), ((0, missing), (0, 0)))
    targets = jnp.pad(targets.reshape(tokens), (0, missing), constant_values=IGNORE)
    return hidden.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk)


def _varying_zeros(shape: tuple[int, ...], targets: jax.Array) -> jax.Array:
    """Float32 zeros that vary over the same mesh axes as `targets`, to start a scan under `shard_map`.

    A constant does not vary, but the sums that replace it in the carry do. `jax.lax.pcast` would need the axis names.
    """
    return jnp.broadcast_to((targets.reshape(-1)[0] * 0).astype(jnp.float32), shape)
