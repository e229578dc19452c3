"""Next-token cross-entropy, from the hidden states to a sum of nats.

The logits of GPT-2 are its largest array: 16 sequences of 1,024 tokens make 3.3 GB in float32. `cross_entropy`
holds those of one chunk of tokens at a time, and forms the gradients of the head while it has them, in the
forward pass, so that the backward pass neither keeps nor computes logits again (the idea of Cut Cross-Entropy,
Wijmans et al. 2024, and of Liger Kernel's fused linear cross-entropy).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gpt2_jax.config import IGNORE


def head_logits(hidden: jax.Array, embedding: jax.Array, vocab_size: int) -> jax.Array:
    """The tied head: [..., n_embd] and [padded_vocab, n_embd] -> float32 logits [..., padded_vocab].

    Operands are in the dtype of `hidden`, sums in float32. Padding gets the lowest float32: no probability.
    """
    logits = jnp.einsum("...c,vc->...v", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(embedding.shape[0]) < vocab_size, logits, jnp.finfo(jnp.float32).min)


def plain_cross_entropy(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, vocab_size: int) -> jax.Array:
    """`cross_entropy` with all logits at once and JAX's own gradients: what it is tested against."""
    log_probs = jax.nn.log_softmax(head_logits(hidden, embedding, vocab_size))
    nats = -jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(targets == IGNORE, 0.0, nats))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, vocab_size: int, chunk: int = 0
) -> jax.Array:
    """Sum of −log p(target) over all targets that are not `IGNORE`, in nats, float32.

    Args:
        hidden: [batch, time, n_embd], the output of the final layer norm.
        embedding: [padded_vocab, n_embd], the tied token embedding, float32.
        targets: int [batch, time], below `vocab_size`, or `IGNORE`.
        chunk: tokens whose logits exist at the same time; 0 for all.
    """

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + _nats(*part, embedding, vocab_size)[0], None

    parts = _chunks(hidden, targets, chunk)
    return jax.lax.scan(add, _zeros((), targets), parts)[0]


def _nats(
    hidden: jax.Array, targets: jax.Array, embedding: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one chunk, [tokens, n_embd] and [tokens]: sum of nats, logits [tokens, V], log-normaliser [tokens, 1]."""
    logits = head_logits(hidden, embedding, vocab_size)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    at_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)
    nats = jnp.where(targets == IGNORE, 0.0, (log_normaliser - at_target)[:, 0])
    return jnp.sum(nats), logits, log_normaliser


def _forward(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, vocab_size: int, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss, with d loss / d hidden and d loss / d embedding as what the backward pass keeps."""

    def add(
        carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, d_embedding = carry
        hidden, targets = part
        nats, logits, log_normaliser = _nats(hidden, targets, embedding, vocab_size)
        is_target = jnp.arange(logits.shape[-1]) == targets[:, None]
        d_logits = jnp.exp(logits - log_normaliser) - is_target.astype(jnp.float32)
        d_logits = jnp.where(targets[:, None] == IGNORE, 0.0, d_logits).astype(hidden.dtype)
        d_hidden = jnp.einsum("nv,vc->nc", d_logits, embedding.astype(hidden.dtype))
        d_embedding += jnp.einsum("nv,nc->vc", d_logits, hidden, preferred_element_type=jnp.float32)
        return (total + nats, d_embedding), d_hidden

    start = _zeros((), targets), _zeros(embedding.shape, targets)
    (total, d_embedding), d_hidden = jax.lax.scan(add, start, _chunks(hidden, targets, chunk))
    d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    return total, (d_hidden, d_embedding.astype(embedding.dtype))


def _backward(
    vocab_size: int, chunk: int, kept: tuple[jax.Array, jax.Array], d_total: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    d_hidden, d_embedding = kept
    # In float32: a factor of 1 / tokens, rounded to bfloat16, would scale all gradients but the head's.
    return (d_hidden.astype(jnp.float32) * d_total).astype(d_hidden.dtype), d_embedding * d_total, None


cross_entropy.defvjp(_forward, _backward)


def _chunks(hidden: jax.Array, targets: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """[chunks, tokens, n_embd] and [chunks, tokens]; the last chunk is filled up with ignored targets."""
    tokens = targets.size
    chunk = min(chunk, tokens) or tokens
    missing = -tokens % chunk
    hidden = jnp.pad(hidden.reshape(tokens, -1), ((0, missing), (0, 0)))
    targets = jnp.pad(targets.reshape(tokens), (0, missing), constant_values=IGNORE)
    return hidden.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk)


def _zeros(shape: tuple[int, ...], targets: jax.Array) -> jax.Array:
    """Float32 zeros to start a loop with, computed from the targets.

    A constant would not do: under `shard_map` the loop's sums differ per device, and so must its start.
    """
    return jnp.broadcast_to((targets.reshape(-1)[0] * 0).astype(jnp.float32), shape)
