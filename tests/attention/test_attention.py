"""The three backends against each other and against JAX's own attention, and the choice among them."""

import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from gpt2_jax.attention import causal_attention, choose
from gpt2_jax.attention.backend import Problem
from gpt2_jax.attention.splash import Tiles, splash_attention, tiles_for
from gpt2_jax.errors import UserError
from gpt2_jax.hardware import Hardware

CASE = Problem(Hardware("cuda", 9.0), jnp.bfloat16, time=1024, head_dim=64, dropout=0.0)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def qkv(time, heads=2, head_dim=64, batch=2):
    return [jax.random.normal(jax.random.key(seed), (batch, time, heads, head_dim)) for seed in range(3)]


def value_and_grads(attention, q, k, v):
    def loss(q, k, v):
        value = attention(q, k, v)
        return jnp.sum(jnp.sin(value)), value

    (_, value), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return value, *grads


def reference(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


# One block of queries, and four of which the last is short.
@pytest.mark.parametrize("time", [7, 513, *(pytest.param(time, marks=pytest.mark.slow) for time in (1, 128))])
def test_xla_equals_jax_forward_and_backward(time):
    for ours, theirs in zip(
        value_and_grads(causal_attention, *qkv(time)), value_and_grads(reference, *qkv(time)), strict=True
    ):
        # float32 sums of up to 513 terms of order 1, taken in another order: a part of 513 × 6e-8.
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_xla_in_bfloat16_is_as_near_to_float32_as_jax_is():
    exact = value_and_grads(reference, *qkv(130))
    narrow = [x.astype(jnp.bfloat16) for x in qkv(130)]
    with jax.numpy_dtype_promotion("standard"):  # theirs mixes dtypes
        jax_has = value_and_grads(reference, *narrow)
    for right, ours, theirs in zip(exact, value_and_grads(causal_attention, *narrow), jax_has, strict=True):
        ours, theirs = (np.linalg.norm(x.astype(jnp.float32) - right) for x in (ours, theirs))
        # For the gradients JAX keeps the weights in float32; rounded to bfloat16 they add a little to q's and k's.
        assert ours <= 1.25 * theirs


@pytest.mark.slow
def test_xla_in_float16_is_eight_times_as_near():
    """JAX's own attention cannot be differentiated in float16 on CPU, so bfloat16 is the measure: 8 bits beside 11."""
    exact = value_and_grads(causal_attention, *qkv(130))
    errors = [
        [np.linalg.norm(x.astype(jnp.float32) - right) for x, right in zip(narrow, exact, strict=True)]
        for dtype in (jnp.bfloat16, jnp.float16)
        for narrow in [value_and_grads(causal_attention, *(x.astype(dtype) for x in qkv(130)))]
    ]
    np.testing.assert_allclose(np.divide(*errors), 8, rtol=0.2)  # which way single roundings go is chance


@pytest.mark.parametrize("time", [7, 130])
def test_the_gradients_under_dropout_are_those_of_the_function(time):
    def attention(q, k, v):
        return causal_attention(q, k, v, dropout=0.3, dropout_key=jax.random.key(3))

    # Against differences of the function's values, in float32: JAX's default tolerance.
    jax.test_util.check_grads(attention, qkv(time, head_dim=8), order=1, modes=["rev"])


def test_splash_fuses_its_backward_pass_where_it_was_seen_to_compile():
    def tiles(time, head_dim=64, dtype=jnp.bfloat16):
        return tiles_for(time, head_dim, jnp.dtype(dtype))

    assert [tiles(time) for time in (128, 640, 1024)] == [(128, 128, True), (128, 640, True), (512, 1024, True)]
    assert [tiles(time) for time in (1152, 1280, 2048)] == [(size, size, False) for size in (128, 256, 512)]
    assert tiles(1024, dtype=jnp.float32) == tiles(1024, head_dim=128) == (512, 512, False)


@pytest.mark.parametrize("tiles", [Tiles(128, 256, True), Tiles(128, 128, False)], ids=str)
def test_splash_equals_xla_forward_and_backward(tiles):
    def splash(q, k, v):
        return splash_attention(q, k, v, 64**-0.5, tiles=tiles, interpret=True)

    for ours, theirs in zip(
        value_and_grads(splash, *qkv(256)), value_and_grads(causal_attention, *qkv(256)), strict=True
    ):
        # The kernel sums blocks of keys one after the other with a running maximum: float32 rounding, as above.
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
def test_the_tiles_of_a_training_are_as_near_to_float32_as_xla():
    """Those that the presets run with: 1,024 tokens in bfloat16, one kernel for the backward pass."""

    def splash(q, k, v):
        return splash_attention(q, k, v, 64**-0.5, interpret=True)

    exact, narrow = value_and_grads(causal_attention, *qkv(1024)), [x.astype(jnp.bfloat16) for x in qkv(1024)]
    assert tiles_for(1024, 64, narrow[0].dtype) == Tiles(512, 1024, True)
    both = value_and_grads(splash, *narrow), value_and_grads(causal_attention, *narrow)
    for right, ours, xlas in zip(exact, *both, strict=True):
        ours, xlas = (np.linalg.norm(x.astype(jnp.float32) - right) for x in (ours, xlas))
        assert ours <= 1.1 * xlas  # which way single roundings go is chance


def test_attention_is_causal():
    q, k, v = qkv(16)
    changed = [x.at[:, 9:].add(1.0) for x in (q, k, v)]
    np.testing.assert_array_equal(causal_attention(q, k, v)[:, :9], causal_attention(*changed)[:, :9])
    assert not np.allclose(causal_attention(q, k, v)[:, 9:], causal_attention(*changed)[:, 9:])


def test_dropout_drops_weights_and_keeps_the_mean():
    q, k = (jnp.zeros((1, 64, 64, 8)) for _ in range(2))  # equal weights, 1 / (position + 1)
    v = jnp.ones((1, 64, 64, 8))
    out = causal_attention(q, k, v, dropout=0.25, dropout_key=jax.random.key(0))[0, :, :, 0]
    last = np.asarray(out[-1])  # 64 heads, each the mean of 64 weights that are 0 or 1 / 0.75
    # The mean of 4,096 such draws has standard deviation sqrt(0.25 / 0.75) / 64 = 0.009; five of them.
    assert abs(last.mean() - 1) < 0.045
    assert set(np.unique(np.round(np.asarray(out[0]), 4))) == {0.0, np.float32(1.3333)}


def test_dropout_without_a_key_is_an_error():
    with pytest.raises(ValueError, match="dropout_key"):
        causal_attention(*qkv(4), dropout=0.1)
    with pytest.raises(ValueError, match="no dropout"):
        causal_attention(*qkv(128), backend="splash", dropout=0.1, dropout_key=jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({}, "cudnn"),
        ({"hardware": Hardware("tpu")}, "splash"),
        ({"hardware": Hardware("tpu"), "dtype": jnp.float32}, "splash"),
        ({"hardware": Hardware("tpu"), "dtype": jnp.float16}, "xla"),
        ({"dtype": jnp.float16}, "cudnn"),
        ({"hardware": Hardware("cpu")}, "xla"),
        ({"hardware": Hardware("rocm")}, "xla"),
        ({"dtype": jnp.float32}, "xla"),
        ({"hardware": Hardware("cuda", 7.5)}, "xla"),  # a T4
        ({"hardware": Hardware("tpu", kind="TPU v3")}, "xla"),
        ({"hardware": Hardware("tpu", kind="TPU v4")}, "splash"),
        ({"dropout": 0.1}, "xla"),
        ({"head_dim": 100}, "xla"),
        ({"hardware": Hardware("tpu"), "time": 1000}, "xla"),
    ],
)
def test_auto_takes_the_fastest_that_can(change, backend):
    choice = choose("auto", CASE._replace(**change))
    assert choice.backend == backend
    assert set(choice.rejected) == {"splash", "cudnn", "xla"} - {backend, "xla"}


def test_the_choice_says_why():
    assert str(choose("auto", CASE._replace(dropout=0.1))) == (
        "xla; not splash: needs tpu, found cuda; not cudnn: has no dropout, asked for 0.1"
    )


@pytest.mark.parametrize(
    ("wanted", "change", "message"),
    [
        ("splash", {}, "'splash' needs tpu, found cuda; type --model.attention auto"),
        ("cudnn", {"hardware": Hardware("cpu")}, "needs cuda, found cpu"),
        ("cudnn", {"dtype": jnp.float32}, "needs bfloat16 or float16, found float32"),
        ("splash", {"hardware": Hardware("tpu", kind="TPU v2")}, "needs TPU v4 or newer, found TPU v2"),
        ("splash", {"hardware": Hardware("tpu"), "time": 100}, "multiple of 128, found 100"),
        ("splash", {"hardware": Hardware("tpu"), "head_dim": 32}, "multiple of 64, found 32"),
    ],
)
def test_an_explicit_choice_that_cannot_work_is_an_error(wanted, change, message):
    with pytest.raises(UserError, match=message):
        choose(wanted, CASE._replace(**change))


def test_cuda_programs_call_cudnn_forward_and_backward(cudnn_without_gpu):
    arguments = [jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)] * 3

    def loss(q, k, v):
        return jnp.sum(causal_attention(q, k, v, backend="cudnn"), dtype=jnp.float32)

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\$\w+)", program)
    assert sorted(calls) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
