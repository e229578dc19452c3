"""Products with gradients that are written out, against those that JAX derives in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.products import add_bias, flat_dot, from_heads, to_heads

BATCH, TIME, FEATURES, OUTPUTS, HEAD_DIM = 2, 5, 12, 24, 4


@pytest.mark.parametrize(
    ("ours", "shape"),
    [
        (flat_dot, (FEATURES, OUTPUTS)),
        (lambda x, kernel: to_heads(x, kernel, HEAD_DIM), (FEATURES, OUTPUTS)),
        (lambda x, kernel: from_heads(x, kernel, HEAD_DIM), (FEATURES, OUTPUTS)),
        (add_bias, (FEATURES,)),
    ],
    ids=["flat_dot", "to_heads", "from_heads", "add_bias"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_form(ours, shape, dtype):
    def plain(x, weights):
        return x @ weights if len(shape) == 2 else x + weights

    sizes = ((BATCH, TIME, FEATURES), shape, (BATCH, TIME, shape[-1]))
    x, weights, grad = (jax.random.normal(jax.random.key(seed), size, dtype) for seed, size in enumerate(sizes))
    value, gradients = jax.vjp(ours, x, weights)
    expected, wanted = jax.vjp(plain, x.astype(jnp.float32), weights.astype(jnp.float32))
    for one, other in zip((value, *gradients(grad)), (expected, *wanted(grad.astype(jnp.float32))), strict=True):
        assert one.dtype == dtype
        # Sums of at most 24 terms of order 1 in another order; in bfloat16, rounded once.
        np.testing.assert_allclose(one, other, rtol=2**-8 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5)
