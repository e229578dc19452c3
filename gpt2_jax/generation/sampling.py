"""Draws tokens from logits: temperature, top-k, top-p, and a random choice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gpt2_jax.errors import UserError

MIN_TEMPERATURE = 1e-6  # Lower ones count as 0: dividing by them would overflow float32.
MAX_SAMPLES = 1 << 16  # Each has a cache of keys and values, in GPT-2 small of 75 MB.
BLOCK = 256  # Tokens per block in `sample_categorical`: 197 blocks for GPT-2.


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options for continuing sequences. Logits are divided by the temperature, then come top-k and top-p.

    The order and the meaning of the three are those of `transformers`.

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: keeps the k most probable tokens and ties with the last of them; 0 keeps all.
        top_p: keeps the most probable tokens whose probabilities reach this sum, and ties with the last of them:
            nucleus sampling (Holtzman et al. 2020).
        samples: continuations of each prompt.
        seed: seeds the random numbers. Sample i of a prompt depends only on the seed, on i and on the prompt.
        stop: a token that ends a sequence, such as end-of-text; None for none.
        vocab_size: draws only tokens below it; a model may have room for more tokens than its tokenizer has.
        slide: past `block_size`, draws each token from the last `block_size` tokens. Each token then shifts all
            positions, and so costs a forward pass over the whole window.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    stop: int | None = None
    vocab_size: int | None = None
    slide: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature:g}; expected a finite number, 0 or more")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k = {self.top_k}; expected 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p:g}; expected above 0 and at most 1")
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise UserError(f"samples = {self.samples}; expected at least 1, at most {MAX_SAMPLES:,}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed}; expected 0 or more and below 2**32")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"vocab_size = {self.vocab_size}; expected at least 1")


def mask_top_k_top_p(logits: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None) -> jax.Array:
    """Sets logits outside of top-k, then outside of the nucleus, to −inf: [rows, vocab] -> [rows, vocab].

    Args:
        top_k: int32 [], or None for all.
        top_p: float32 [], or None for all.
    """
    if top_k is not None:
        logits = _mask_below(logits, jnp.ones_like(logits, jnp.int32), top_k)
    if top_p is not None:
        logits = _mask_below(logits, jax.nn.softmax(logits, axis=-1), top_p)
    return logits


def _mask_below(logits: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Keeps each logit with less than `limit` of the row's weight above it, and sets the others to −inf.

    A bisection over the bits of the logits finds the threshold in 32 sums. On a CPU they take at most a tenth of the
    time of a sort.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ranks = jnp.where(bits & sign, ~bits, bits | sign)  # unsigned integers that sort like the floats

    def step(index: jax.Array, low: jax.Array) -> jax.Array:
        middle = low | (sign >> index)
        above = jnp.sum(jnp.where(ranks > middle, weights, 0), axis=-1, keepdims=True)
        return jnp.where(above >= limit, middle, low)

    # The largest rank with at least `limit` above it. No finite float has rank 0.
    low = jax.lax.fori_loop(0, 32, step, jnp.zeros_like(ranks[:, :1]))
    return jnp.where(ranks > low, logits, -jnp.inf)


def sample_categorical(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """One token from each row's distribution: random keys [rows] and logits [rows, vocab] -> int32 [rows].

    Draws a block of tokens, then a token in the block, both by Gumbel noise. That takes some 450 random numbers instead
    of 50,257. Inverting the distribution function would take one, but rounding one logit would move the boundaries of
    all later tokens. With Gumbel noise, rounding rarely changes the token.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    filled = jnp.pad(logits, ((0, 0), (0, blocks * BLOCK - vocab)), constant_values=-jnp.inf)
    filled = filled.reshape(rows, blocks, BLOCK)
    pairs = jax.vmap(jax.random.split)(keys)
    block = jax.vmap(jax.random.categorical)(pairs[:, 0], jax.nn.logsumexp(filled, axis=-1))
    inside = jnp.take_along_axis(filled, block[:, None, None], axis=1)[:, 0]
    within = jax.vmap(jax.random.categorical)(pairs[:, 1], inside)
    return (block * BLOCK + within).astype(jnp.int32)
