"""The training step: equal results however a batch is cut up, one gradient reduction, donated state."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax import attention
from gpt2_jax.config import IGNORE, MeshConfig, OptimizerConfig
from gpt2_jax.model import GPT2, unstack_layers
from gpt2_jax.sharding import batch_sharding, make_mesh, put_batch
from gpt2_jax.step import abstract_state, init_state, make_eval_step, make_train_step

UPDATES = 5
BATCH = 16
# AdamW divides by the root of the mean square gradient. Where the true gradient is zero (a bias on the keys
# cancels in the softmax), a tiny epsilon would blow rounding noise up to full-size updates. This epsilon makes
# the update a smooth function of the gradient, so that equal gradients show as equal parameters.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2, decay_steps=20, epsilon=1e-2, clip_norm=0.5
)


def mesh_of(data, fsdp=1):
    return make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])


@pytest.fixture(scope="module")
def batches(tiny_config):
    shape = (UPDATES, BATCH, tiny_config.block_size + 1)
    return np.random.default_rng(0).integers(0, tiny_config.vocab_size, shape, dtype=np.int32)


def run(config, mesh, batches, accumulation, optimizer=OPTIMIZER):
    """Losses, gradient norms and final parameters of some updates."""
    model = GPT2(config)
    step = make_train_step(model, optimizer, mesh, seed=0)
    state = init_state(model, optimizer, mesh, seed=0)
    sharding = batch_sharding(mesh, micro_batches=True)
    rows = []
    for batch in batches:
        micro = batch.reshape(accumulation, -1, batch.shape[-1])
        with jax.transfer_guard("disallow"):  # as in training: nothing else goes to the devices
            state, metrics = step(state, put_batch(micro, sharding))
        rows.append(jax.device_get(metrics))
    params = unstack_layers(state.params) if config.scan_layers else state.params
    assert int(state.step) == len(batches)
    return [row.loss for row in rows], [row.grad_norm for row in rows], jax.device_get(params)


@pytest.fixture(scope="module")
def whole_batch(tiny_config, batches):
    return run(tiny_config, mesh_of(1), batches, 1)


@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation", "change"),
    [
        (1, 1, 4, {}),
        (1, 1, 16, {}),
        (2, 1, 1, {}),
        (2, 1, 4, {}),
        (8, 1, 1, {}),
        (8, 1, 2, {}),
        (2, 4, 2, {}),
        (1, 8, 1, {}),
        (1, 4, 4, {}),
        (1, 1, 2, {"scan_layers": True, "remat": "full"}),
        (4, 1, 2, {"scan_layers": True, "remat": "dots"}),
        (1, 1, 1, {"loss_chunk": 24}),
    ],
)
def test_however_a_batch_is_cut_up_the_updates_are_equal(
    tiny_config, batches, whole_batch, data, fsdp, accumulation, change
):
    config = dataclasses.replace(tiny_config, **change)
    losses, norms, params = run(config, mesh_of(data, fsdp), batches, accumulation)
    expected_losses, expected_norms, expected_params = whole_batch
    assert max(expected_norms) > 0.5  # clipping is at work
    # 1e-6 is 8 units in the last place of float32: means over 16 × 32 tokens in another order.
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    # Under fsdp the norm's own sum over all parameters is split over devices as well.
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-6 if fsdp == 1 else 3e-6)
    clipped, expected_clipped = (np.minimum(x, OPTIMIZER.clip_norm) for x in (norms, expected_norms))
    np.testing.assert_allclose(clipped, expected_clipped, rtol=1e-6)
    difference = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), params, expected_params)
    total = jax.tree.map(lambda b: np.sum(np.square(b)), expected_params)
    assert np.sqrt(sum(jax.tree.leaves(difference)) / sum(jax.tree.leaves(total))) < 1e-6


def test_splash_in_the_sharded_step_equals_xla(tiny_config, monkeypatch):
    """Interpreted, as there is no TPU: the step's way around Pallas kernels is what is under test."""
    config = dataclasses.replace(tiny_config, block_size=128, n_layer=1)
    batches = np.random.default_rng(0).integers(0, 65, (2, 8, 129), dtype=np.int32)
    expected = run(config, mesh_of(4), batches, 2)
    monkeypatch.setattr(attention, "splash_attention", functools.partial(attention.splash_attention, interpret=True))
    losses, norms, _ = run(dataclasses.replace(config, attention="splash"), mesh_of(4), batches, 2)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)  # another order of sums in every attention row
    np.testing.assert_allclose(norms, expected[1], rtol=1e-4)


def test_the_gradient_that_adamw_sees_has_the_clipped_norm(tiny_config, batches):
    mesh = mesh_of(2)
    model = GPT2(tiny_config)
    state = init_state(model, OPTIMIZER, mesh, seed=0)
    batch = put_batch(batches[0].reshape(2, 8, -1), batch_sharding(mesh, micro_batches=True))
    state, metrics = make_train_step(model, OPTIMIZER, mesh, seed=0)(state, batch)
    assert float(metrics.grad_norm) > OPTIMIZER.clip_norm
    first_moment = optax.tree.get(state.opt_state.inner, "mu")  # after one update (1 − β₁) times the gradient
    norm = float(optax.global_norm(first_moment)) / (1 - OPTIMIZER.beta1)
    assert norm == pytest.approx(OPTIMIZER.clip_norm, rel=1e-6)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_bfloat16_step_for_cuda_calls_cudnn(tiny_config, scan_layers, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # there is none here
    config = dataclasses.replace(
        tiny_config, n_head=2, n_embd=128, block_size=128, attention="cudnn", scan_layers=scan_layers
    )
    mesh = mesh_of(8)
    model = GPT2(config, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 16, 129), jnp.int32, sharding=batch_sharding(mesh, micro_batches=True))
    traced = make_train_step(model, OPTIMIZER, mesh, seed=0).trace(abstract_state(model, OPTIMIZER, mesh), tokens)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\$\w+)", program)
    assert set(calls) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


def test_dropout_differs_by_micro_batch_and_device_and_is_reproducible(tiny_config, batches):
    config = dataclasses.replace(tiny_config, dropout=0.5, n_layer=1)
    same = np.repeat(batches[:1, :1], BATCH, axis=1)  # one sequence, sixteen times
    losses, norms, params = run(config, mesh_of(2), same, 8)
    again = run(config, mesh_of(2), same, 8)
    assert losses == again[0]
    jax.tree.map(np.testing.assert_array_equal, params, again[2])
    # With one mask for all, each of the 16 would have the gradient of the first, and so would their mean.
    one_norm = run(config, mesh_of(1), same[:, :1], 1)[1][0]
    assert norms[0] < 0.9 * one_norm


@pytest.fixture(scope="module")
def compiled(tiny_config):
    """The step for 8 devices and 4 micro-batches, optimised by XLA."""
    mesh = mesh_of(8)
    model = GPT2(tiny_config)
    step = make_train_step(model, OPTIMIZER, mesh, seed=0)
    shape = (4, BATCH, tiny_config.block_size + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, micro_batches=True))
    state = abstract_state(model, OPTIMIZER, mesh)
    return step.lower(state, tokens).compile(), state


def computations(text):
    """{name: body} of an HLO module's text."""
    return dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))


def called_from(name, bodies):
    """The computation `name` and all that it calls, directly or not, but for the branches of conditionals."""
    seen, queue = set(), [name]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            body = re.sub(r"branch_computations=\{.*?\}|(true|false)_computation=\S+", "", bodies[current])
            queue += [word for word in re.findall(r"%?([\w.\-]+)", body) if word in bodies]
    return seen


def reduced_bytes(body):
    sizes = {"f32": 4, "s32": 4, "bf16": 2}
    total = 0
    for shapes in re.findall(r"= (.*?) all-reduce(?:-start)?\(", body):
        for dtype, dims in re.findall(r"(f32|bf16|s32)\[([\d,]*)\]", shapes):
            total += sizes[dtype] * int(np.prod([int(d) for d in dims.split(",") if d], initial=1))
    return total


def test_gradients_cross_the_mesh_once_per_update(compiled):
    program, state = compiled
    text = program.as_text()
    bodies = computations(text)
    loops = re.findall(r"body=%?([\w.\-]+)", text)
    assert loops, "the micro-batches are a loop"
    for loop in loops:
        # What runs in every micro-step; the branch that runs once per update is behind a conditional.
        assert sum(reduced_bytes(bodies[name]) for name in called_from(loop, bodies)) == 0
    n_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    everywhere = sum(map(reduced_bytes, bodies.values()))
    assert n_bytes <= everywhere <= n_bytes + 16  # the gradients, and the scalar loss


def test_the_state_is_donated(compiled):
    program, state = compiled
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= state_bytes


def test_the_state_holds_no_accumulator(compiled):
    _, state = compiled
    n_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * n_params + 10  # parameters and two moments


def test_evaluation_counts_every_target_once(tiny, batches):
    model, params = tiny
    tokens = batches[0].copy()
    tokens[3, 20:] = IGNORE
    tokens[7:] = IGNORE
    sums = []
    for mesh in (mesh_of(1), mesh_of(8)):
        eval_step = make_eval_step(model, mesh)
        sums.append(jax.device_get(eval_step(params, put_batch(tokens, batch_sharding(mesh, micro_batches=False)))))
    assert sums[0][1] == sums[1][1] == 6 * 32 + 19
    assert float(sums[0][0]) == pytest.approx(float(sums[1][0]), rel=1e-6)
    logits = model.apply({"params": params}, np.maximum(tokens[:7, :-1], 0))
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(tokens[:7, 1:], 0)[..., None], axis=-1)[..., 0]
    assert float(sums[0][0]) == pytest.approx(float(jnp.sum(nats * (tokens[:7, 1:] >= 0))), rel=1e-6)
