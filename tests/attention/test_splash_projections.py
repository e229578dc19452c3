"""Matmuls with written-out gradients, against the gradients that JAX derives in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.attention.splash import from_heads, to_heads
from gpt2_jax.model import flat_dot

BATCH, TIME, FEATURES, OUTPUTS, HEAD_DIM = 2, 5, 12, 24, 4
TOLERANCE = {jnp.float32: {"rtol": 1e-5, "atol": 1e-5}, jnp.bfloat16: {"rtol": 2**-8, "atol": 2**-5}}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "matmul",
    [
        lambda x, kernel, bias: flat_dot(x, kernel) + bias[None, None],
        lambda x, kernel, bias: to_heads(x, kernel, bias, HEAD_DIM),
        lambda x, kernel, bias: from_heads(x, kernel, HEAD_DIM) + bias[None, None],
    ],
    ids=["flat_dot", "to_heads", "from_heads"],
)
def test_values_and_gradients_are_those_of_the_plain_form(matmul, dtype):
    sizes = ((BATCH, TIME, FEATURES), (FEATURES, OUTPUTS), (OUTPUTS,), (BATCH, TIME, OUTPUTS))
    *args, grad = (jax.random.normal(jax.random.key(seed), size, dtype) for seed, size in enumerate(sizes))
    value, gradients = jax.vjp(jax.jit(matmul), *args)
    in_float32 = [x.astype(jnp.float32) for x in args]
    exact, exact_gradients = jax.vjp(lambda x, kernel, bias: x @ kernel + bias[None, None], *in_float32)
    wanted = (exact, *exact_gradients(grad.astype(jnp.float32)))
    for one, other in zip((value, *gradients(grad)), wanted, strict=True):
        assert one.dtype == dtype
        # Sums of at most 24 terms of order 1 in another order; in bfloat16 rounded after the matmul and after the sum.
        np.testing.assert_allclose(one, other, **TOLERANCE[dtype])
