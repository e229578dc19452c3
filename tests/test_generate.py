"""Sampling against a plain loop over the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.generate import sample


@pytest.mark.parametrize("length", [1, 20, 40])
def test_sample_equals_a_plain_loop(tiny, length):
    model, params = tiny
    block_size = model.config.block_size
    logits_of = jax.jit(lambda window: model.apply({"params": params}, window[None])[0])
    sequence = list(range(length))
    for index in range(20):
        context = sequence[-block_size:]  # the last 32 tokens
        padded = jnp.asarray(context + [0] * (block_size - len(context)))
        logits = logits_of(padded)[len(context) - 1, :50]
        sequence.append(int(jax.random.categorical(jax.random.fold_in(jax.random.key(7), index), logits)))
    drawn = sample(model, params, range(length), 20, vocab_size=50, seed=7)
    assert drawn.tolist() == sequence[length:]
    assert drawn.dtype == np.int32
