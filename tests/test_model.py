"""The model against `transformers`, its initial values, and the two ways to lay out its layers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_gpt2 import as_params, torch_gpt2

from gpt2_jax.config import GPT2Config
from gpt2_jax.layers import stack_layers, unstack_layers
from gpt2_jax.loss import cross_entropy
from gpt2_jax.model import GPT2, MLP, init_params, n_params, padded_vocab_size

SMALL = GPT2Config(vocab_size=300, block_size=64, n_layer=3, n_head=4, n_embd=64, attention="xla")
FULL = GPT2Config(attention="xla")  # 124M

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def tokens_for(config, batch, time):
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, time), dtype=np.int32)


def relative_error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


# The four sizes: 124M itself, the others with their layers and heads, and heads of 4 instead of 64.
SIZES = {
    "small": SMALL,
    "exact-gelu": dataclasses.replace(SMALL, gelu="exact"),
    "124M": FULL,
    "355M": dataclasses.replace(SMALL, n_layer=24, n_head=16, n_embd=64, scan_layers=True),
    "774M": dataclasses.replace(SMALL, n_layer=36, n_head=20, n_embd=80, scan_layers=True),
    "1558M": dataclasses.replace(SMALL, n_layer=48, n_head=25, n_embd=100, scan_layers=True),
}


@pytest.mark.parametrize(
    "config",
    [pytest.param(SIZES[size], id=size, marks=pytest.mark.slow if size.endswith("M") else ()) for size in SIZES],
)
def test_logits_and_gradients_equal_transformers(config):
    theirs = torch_gpt2(config)
    tokens = tokens_for(config, 2, 65)
    inputs, targets = torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(tokens[:, 1:]).long()
    expected_logits = theirs(inputs).logits
    loss = torch.nn.functional.cross_entropy(expected_logits.flatten(0, 1), targets.flatten())
    loss.backward()
    expected = as_params({name: parameter.grad for name, parameter in theirs.named_parameters()}, config)
    model, params = GPT2(config), as_params(theirs.state_dict(), config)
    if config.scan_layers:
        params = stack_layers(params)

    logits = jax.jit(model.apply)({"params": params}, tokens[:, :-1])
    assert logits.shape == expected_logits.shape
    assert logits.dtype == jnp.float32
    # float32 on both sides, products summed in another order
    np.testing.assert_allclose(logits, expected_logits.detach().numpy(), atol=1e-4)

    def our_loss(params):
        hidden = model.apply({"params": params}, tokens[:, :-1], method="hidden")
        return cross_entropy(hidden, params["wte"]["embedding"], tokens[:, 1:], config.vocab_size, 50) / 128

    ours, grads = jax.jit(jax.value_and_grad(our_loss))(params)
    assert float(ours) == pytest.approx(loss.item(), rel=1e-6)
    if config.scan_layers:
        grads = unstack_layers(grads)
    worst = {}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        target = expected
        for key in path:
            target = target[key.key]
        worst[jax.tree_util.keystr(path)] = relative_error(np.asarray(grad), target)
    # float32 sums over 128 tokens and up to 50,257 logits, in up to 48 layers: 2e-6 was seen.
    assert max(worst.values()) < 1e-5, max(worst, key=worst.get)


def test_initial_loss_is_that_of_a_uniform_guess(tiny):
    model, params = tiny
    logits = model.apply({"params": params}, tokens_for(model.config, 8, 32))
    targets = tokens_for(model.config, 8, 33)[:, 1:]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()
    # Logits are sums of n_embd products of a unit-variance hidden value and a weight of deviation 0.02:
    # deviation 0.02 sqrt(48) = 0.14, which raises the loss by half its square, 0.01.
    assert float(nats) == pytest.approx(math.log(65), abs=0.05)


def test_initial_standard_deviations():
    config = dataclasses.replace(SMALL, n_layer=4, n_embd=128)
    params = init_params(GPT2(config), jax.random.key(0))
    residual = 0.02 / math.sqrt(2 * 4)
    block = params["h_2"]
    for array, std in (
        (params["wte"]["embedding"][: config.vocab_size], 0.02),
        (params["wpe"]["embedding"], 0.02),
        (block["attn"]["c_attn"]["kernel"], 0.02),
        (block["attn"]["c_proj"]["kernel"], residual),
        (block["mlp"]["c_fc"]["kernel"], 0.02),
        (block["mlp"]["c_proj"]["kernel"], residual),
    ):
        # The estimate of a deviation from n draws is off by 1 / sqrt(2 n); five times that.
        assert float(array.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * array.size))
        assert abs(float(array.mean())) < 5 * std / math.sqrt(array.size)
    for layer in (block["ln_1"], block["ln_2"], params["ln_f"]):
        np.testing.assert_array_equal(layer["scale"], 1)
        np.testing.assert_array_equal(layer["bias"], 0)
    np.testing.assert_array_equal(block["mlp"]["c_fc"]["bias"], 0)


def test_the_padding_of_the_vocabulary_is_zero_and_never_predicted(tiny):
    model, params = tiny
    assert padded_vocab_size(model.config) == 128
    assert padded_vocab_size(FULL) == 50304
    np.testing.assert_array_equal(params["wte"]["embedding"][65:], 0)
    assert model.apply({"params": params}, jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 65)


def test_number_of_parameters():
    shapes = jax.eval_shape(lambda: init_params(GPT2(FULL), jax.random.key(0)))
    assert n_params(shapes, FULL) == 124_439_808  # as `transformers` counts the released model


@pytest.mark.parametrize("remat", ["none", "full", pytest.param("dots", marks=pytest.mark.slow)])
def test_scanned_equals_unrolled(tiny, remat):
    model, params = tiny
    scanned = GPT2(dataclasses.replace(model.config, scan_layers=True, remat=remat))
    tokens = tokens_for(model.config, 2, 32)
    stacked = init_params(scanned, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)

    def loss(model, params):
        return jnp.mean(jnp.square(model.apply({"params": params}, tokens)))

    expected = jax.jit(jax.grad(lambda p: loss(model, p)))(params)
    grads = unstack_layers(jax.jit(jax.grad(lambda p: loss(scanned, p)))(stacked))
    # The same products in the same order; the compiler fuses the elementwise work around them differently.
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * np.abs(theirs).max() + 1e-9)


def test_dropout_acts_in_training_only(tiny):
    model, params = tiny
    model = GPT2(dataclasses.replace(model.config, dropout=0.3))
    tokens = tokens_for(model.config, 1, 16)

    def logits(seed, deterministic):
        return model.apply({"params": params}, tokens, deterministic, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(logits(0, True), logits(1, True))
    np.testing.assert_array_equal(logits(0, False), logits(0, False))
    assert not np.allclose(logits(0, False), logits(1, False))


def test_without_biases_there_are_none(tiny_config):
    params = init_params(GPT2(dataclasses.replace(tiny_config, bias=False)), jax.random.key(0))
    assert not any(path[-1].key == "bias" for path, _ in jax.tree_util.tree_leaves_with_path(params))


def test_a_sequence_beyond_block_size_is_an_error(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="33 tokens are more than the model's block_size of 32"):
        model.apply({"params": params}, jnp.zeros((1, 33), jnp.int32))


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.bfloat16, 8), (jnp.float16, 11)])
def test_16_bit_logits_are_summed_in_float32(tiny, dtype, bits):
    model, params = tiny
    tokens = tokens_for(model.config, 2, 32)
    exact = jax.jit(model.apply)({"params": params}, tokens)
    with jax.numpy_dtype_promotion("standard"):  # Flax's layer norm mixes 16-bit values and float32 statistics
        rounded = jax.jit(model.clone(dtype=dtype).apply)({"params": params}, tokens)
    assert rounded.dtype == jnp.float32
    # Not rounded to 16 bits at the end: more distinct values than their mantissa can hold in this range.
    assert len(np.unique(rounded)) > 3000
    # With 8 bits, each of some 10 roundings on the way costs up to 0.4% of the logits' spread.
    np.testing.assert_allclose(rounded, exact, atol=10 * 2.0**-bits * float(exact.std()))


def test_gelu_in_float16_overflows_nowhere(tiny_config):
    """x³ is beyond float16 from 41 on. With identities as kernels, the MLP is its activation."""
    width = tiny_config.n_embd
    layers = {"c_fc": jnp.eye(width, 4 * width), "c_proj": jnp.eye(4 * width, width)}
    params = {name: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for name, kernel in layers.items()}
    x = jnp.resize(jnp.array([-6e4, -200, -41, -1, 0, 1, 41, 200, 6e4], jnp.float16), (1, 1, width))
    value, gradient = jax.vjp(lambda x: MLP(tiny_config, jnp.float16).apply({"params": params}, x, True), x)
    expected = torch.tensor(np.float32(x), requires_grad=True)
    torch.nn.functional.gelu(expected, approximate="tanh").sum().backward()
    np.testing.assert_array_equal(value, torch.nn.functional.gelu(expected, approximate="tanh").detach().half())
    np.testing.assert_allclose(gradient(jnp.ones_like(x))[0], expected.grad, atol=2**-10)  # 1.08 at 1, in 11 bits
