"""The chunked cross-entropy against the plain one and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gpt2_jax.config import IGNORE
from gpt2_jax.loss import cross_entropy, head_logits, plain_cross_entropy

pytestmark = pytest.mark.usefixtures("strict_dtypes")

VOCAB, PADDED, WIDTH = 65, 128, 16


@pytest.fixture(scope="module")
def case():
    hidden = jax.random.normal(jax.random.key(0), (3, 10, WIDTH))
    embedding = jax.random.normal(jax.random.key(1), (PADDED, WIDTH))
    targets = jax.random.randint(jax.random.key(2), (3, 10), 0, VOCAB)
    return hidden, embedding, targets.at[1, 4:].set(IGNORE)


@pytest.mark.parametrize("chunk", [0, 1, 7, 10, 30, 100])
def test_chunked_equals_plain_and_its_gradients_too(case, chunk):
    hidden, embedding, targets = case

    def scaled(loss, *rest):  # a factor, so that the gradient that arrives is not 1
        return lambda h, e: 0.25 * loss(h, e, targets, VOCAB, *rest)

    ours, grads = jax.jit(jax.value_and_grad(scaled(cross_entropy, chunk), argnums=(0, 1)))(hidden, embedding)
    plain, expected = jax.jit(jax.value_and_grad(scaled(plain_cross_entropy), argnums=(0, 1)))(hidden, embedding)
    assert float(ours) == pytest.approx(float(plain), rel=1e-6)
    # float32 rounding of sums of 30 tokens, gradients of order 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, expected)
    np.testing.assert_array_equal(grads[1][VOCAB:], 0)  # the padding learns nothing


def test_equals_torch(case):
    hidden, embedding, targets = (np.array(x) for x in case)
    logits = torch.from_numpy(hidden) @ torch.from_numpy(embedding[:VOCAB]).T
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).long().flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert float(cross_entropy(*case, VOCAB, 8)) == pytest.approx(expected.item(), rel=1e-6)


def test_evaluation_without_gradients_is_the_same_sum(case):
    assert float(cross_entropy(*case, VOCAB, 7)) == pytest.approx(float(plain_cross_entropy(*case, VOCAB)), rel=1e-6)


def test_bfloat16_operands_float32_sums(case):
    hidden, embedding, targets = case
    logits = head_logits(hidden.astype(jnp.bfloat16), embedding, VOCAB)
    assert logits.dtype == jnp.float32
    loss, (d_hidden, d_embedding) = jax.value_and_grad(
        lambda h, e: cross_entropy(h, e, targets, VOCAB, 8), argnums=(0, 1)
    )(hidden.astype(jnp.bfloat16), embedding)
    assert (loss.dtype, d_hidden.dtype, d_embedding.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact = jax.grad(lambda h: plain_cross_entropy(h, embedding, targets, VOCAB))(hidden)
    # Operands have 8 bits: relative errors of 2^-8 in logits of order 4 move probabilities by a few percent.
    assert float(jnp.linalg.norm(d_hidden.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) < 0.03


def test_only_a_chunk_of_logits_exists_at_a_time():
    tokens, vocab, width = 4096, 50304, 32
    shapes = (
        jax.ShapeDtypeStruct((4, tokens // 4, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32),
    )

    def peak(chunk):
        grad = jax.jit(jax.grad(lambda h, e, t: cross_entropy(h, e, t, 50257, chunk), argnums=(0, 1)))
        return grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    one_chunk = 256 * vocab * 4
    # Logits, probabilities and what a matrix product packs: a few chunks; all logits at once would be 16.
    assert peak(256) < 4 * one_chunk
    assert peak(0) > 16 * one_chunk
