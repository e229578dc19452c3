"""The FLOP counter, on functions with known matmuls and against XLA's own count."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax import attention
from gpt2_jax.config import MeshConfig
from gpt2_jax.planning.flops import flops
from gpt2_jax.sharding import make_mesh


@pytest.mark.parametrize(("n", "remat"), [(1, False), (7, False), (7, True)])
def test_flops_count_loops_and_recomputation(n, remat):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(w, x):
        body = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jax.lax.scan(body, x, w)[0])

    w, x = jnp.ones((n, 32, 32)), jnp.ones((16, 32))
    matmuls = flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(w, x))["matmuls"]
    assert matmuls == n * 2 * 16 * 32 * 32 * (3 + remat)  # forward, two backward, and forward again


def test_flops_equal_xlas_where_nothing_loops():
    def loss(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))

    args = jnp.ones((64, 64)), jnp.ones((256, 64))
    ours = flops(jax.make_jaxpr(jax.grad(loss))(*args))["matmuls"]
    theirs = jax.jit(jax.grad(loss)).lower(*args).compile().cost_analysis()["flops"]
    assert ours <= theirs < 1.03 * ours  # XLA counts additions and tanh as well


def test_flops_of_all_devices_are_counted():
    mesh = make_mesh(MeshConfig(2, 4), jax.devices())

    def local(x, w):
        return x @ w

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(("data", "fsdp")), P()), out_specs=P(("data", "fsdp")))
    assert flops(jax.make_jaxpr(sharded)(jnp.ones((80, 8)), jnp.ones((8, 5))))["matmuls"] == 2 * 80 * 8 * 5


@pytest.mark.parametrize(
    ("backend", "dtype", "matmuls"),
    [("splash", "bfloat16", 7), ("splash", "float32", 9), ("cudnn", "bfloat16", 7)],  # float32 has two kernels backward
)
def test_flops_of_attention_kernels(backend, dtype, matmuls, cudnn_without_gpu):
    attend = functools.partial(attention.causal_attention, backend=backend)
    q = jnp.ones((2, 256, 4, 64), dtype)
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attend(q, q, q).astype(jnp.float32))))(q)
    sums = 2 * q.size if backend == "splash" else 0  # outputs times their gradients, outside the kernel
    assert flops(jaxpr) == {"matmuls": sums, "attention": matmuls * 2 * 4 * 256 * 256 * 64}


def test_the_largest_branch_of_a_conditional_counts():
    def f(x):
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert flops(jax.make_jaxpr(f)(jnp.ones((8, 8))))["matmuls"] == 2 * 2 * 8**3


def test_matmuls_in_a_loop_of_unknown_length_are_an_error():
    def until(body):
        return jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, body, x))(jnp.ones((8, 8)))

    assert flops(until(lambda x: 2 * x)) == {"matmuls": 0, "attention": 0}
    with pytest.raises(ValueError, match="a while loop with matmuls has no known trip count"):
        flops(until(lambda x: x @ x))
