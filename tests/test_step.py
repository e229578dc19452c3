"""The training step: equal results however a batch is cut up, one gradient reduction, donated state."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax import attention, step
from gpt2_jax.attention import splash
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import IGNORE, MeshConfig, OptimizerConfig
from gpt2_jax.layers import unstack_layers
from gpt2_jax.model import GPT2
from gpt2_jax.planning.collectives import read_collectives
from gpt2_jax.planning.hlo import HloModule
from gpt2_jax.sharding import batch_sharding, make_mesh, put_batch
from gpt2_jax.step import abstract_state, init_state, make_eval_step, make_train_step

PLAIN = ("loss", "grad_norm", "learning_rate", "param_norm")  # the metrics of a step that measures nothing more
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
    sharding = batch_sharding(mesh, leading_axis=True)
    rows = []
    for batch in batches:
        micro = batch.reshape(accumulation, -1, batch.shape[-1])
        with jax.transfer_guard("disallow"):  # as in training: nothing else goes to the devices
            state, metrics = step(state, put_batch(micro, sharding))
        rows.append(jax.device_get(metrics))
    params = unstack_layers(state.params) if config.scan_layers else state.params
    assert int(state.step) == len(batches)
    return [row.loss for row in rows], [row.grad_norm for row in rows], jax.device_get(params)


def trace(config, mesh, accumulation, dtype=jnp.float32, **measured):
    """The step for micro-batches of two sequences per device, not yet lowered, and the state it is for."""
    model = GPT2(config, dtype)
    shape = (accumulation, 2 * mesh.size, config.block_size + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, leading_axis=True))
    state = abstract_state(model, OPTIMIZER, mesh)
    return make_train_step(model, OPTIMIZER, mesh, seed=0, **measured).trace(state, tokens), state


@pytest.fixture(scope="module")
def whole_batch(tiny_config, batches):
    return run(tiny_config, mesh_of(1), batches, 1)


@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation", "change"),
    [
        (2, 4, 2, {"scan_layers": True, "remat": "full"}),
        (1, 1, 1, {"loss_chunk": 24}),
        pytest.param(2, 4, 2, {}, marks=pytest.mark.slow),
        pytest.param(1, 1, 16, {}, marks=pytest.mark.slow),
        pytest.param(1, 4, 4, {"scan_layers": True, "remat": "dots"}, marks=pytest.mark.slow),
        pytest.param(8, 1, 2, {}, marks=pytest.mark.slow),
        pytest.param(1, 1, 2, {"scan_layers": True, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param(4, 1, 2, {"scan_layers": True, "remat": "dots"}, marks=pytest.mark.slow),
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


@pytest.fixture(scope="module")
def twenty(tiny_config):
    """Twenty batches, of a few tokens so that there is something to learn, and their losses on one device."""
    batches = np.random.default_rng(1).integers(0, 8, (20, 32, tiny_config.block_size + 1), dtype=np.int32)
    return batches, run(tiny_config, mesh_of(1), batches, 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation"),
    [(4, 2, 4), (2, 4, 1), (8, 1, 1), (8, 1, 4), (4, 2, 1), (2, 4, 4), (1, 8, 1), (1, 8, 4)],
)
def test_twenty_losses_are_the_same_on_every_mesh(tiny_config, twenty, data, fsdp, accumulation):
    batches, expected = twenty
    scanned = accumulation == 4
    config = dataclasses.replace(tiny_config, scan_layers=scanned, remat="full" if scanned else "none")
    losses = run(config, mesh_of(data, fsdp), batches, accumulation)[0]
    assert expected[-1] < 3 < expected[0]
    # Rounding errors of 1e-7, which twenty updates may amplify.
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


@pytest.mark.parametrize(
    ("data", "fsdp"), [(2, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(4, 1), (2, 4)])]
)
def test_splash_in_the_sharded_step_equals_xla(tiny_config, monkeypatch, data, fsdp):
    """Interpreted, as there is no TPU: the step's way around Pallas kernels is what is under test."""
    config = dataclasses.replace(tiny_config, block_size=128, n_layer=1)
    batches = np.random.default_rng(0).integers(0, 65, (2, 16, 129), dtype=np.int32)
    expected = run(config, mesh_of(data, fsdp), batches, 2)
    interpreted = functools.partial(splash.splash_attention, interpret=True)
    monkeypatch.setitem(attention.BACKENDS, "splash", splash.BACKEND._replace(attend=interpreted))
    losses, norms, _ = run(dataclasses.replace(config, attention="splash"), mesh_of(data, fsdp), batches, 2)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)  # another order of sums in every attention row
    np.testing.assert_allclose(norms, expected[1], rtol=1e-4)


def test_the_gradient_that_adamw_sees_has_the_clipped_norm(tiny_config, batches):
    mesh = mesh_of(2)
    model = GPT2(dataclasses.replace(tiny_config, n_layer=1))
    state = init_state(model, OPTIMIZER, mesh, seed=0)
    batch = put_batch(batches[0].reshape(2, 8, -1), batch_sharding(mesh, leading_axis=True))
    state, metrics = make_train_step(model, OPTIMIZER, mesh, seed=0)(state, batch)
    assert float(metrics.grad_norm) > OPTIMIZER.clip_norm
    first_moment = optax.tree.get(state.opt_state, "mu")  # after one update (1 − β₁) times the gradient
    norm = float(optax.tree.norm(first_moment)) / (1 - OPTIMIZER.beta1)
    assert norm == pytest.approx(OPTIMIZER.clip_norm, rel=1e-6)


@pytest.mark.parametrize(
    ("scan_layers", "fsdp", "dtype"),
    [
        (False, 1, jnp.bfloat16),
        (True, 4, jnp.bfloat16),
        pytest.param(False, 4, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(True, 1, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(True, 4, jnp.float16, marks=pytest.mark.slow),
    ],
)
def test_the_16_bit_step_for_cuda_calls_cudnn(tiny_config, scan_layers, fsdp, dtype, cudnn_without_gpu):
    config = dataclasses.replace(
        tiny_config, n_head=2, n_embd=128, block_size=128, attention="cudnn", scan_layers=scan_layers
    )
    traced = trace(config, mesh_of(8 // fsdp, fsdp), 2, dtype)[0]
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\$\w+)", program)
    assert set(calls) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


@pytest.fixture(scope="module")
def dropout_run(tiny_config, batches):
    """Runs two updates on one sequence, repeated, with dropout."""

    def dropped(mesh, sequences, accumulation):
        config = dataclasses.replace(tiny_config, dropout=0.5, n_layer=1)
        return run(config, mesh, np.repeat(batches[:2, :1], sequences, axis=1), accumulation)

    return dropped


@pytest.fixture(scope="module")
def dropped_once(dropout_run):
    return dropout_run(mesh_of(1), 1, 1)


@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation"), [(1, 1, 2), (2, 1, 1), pytest.param(1, 2, 1, marks=pytest.mark.slow)]
)
def test_dropout_differs_by_micro_batch_and_device(dropout_run, dropped_once, data, fsdp, accumulation):
    norms = dropout_run(mesh_of(data, fsdp), 2, accumulation)[1]
    # With one mask for both sequences, each would have the gradient of the first, and so would their mean.
    assert norms[0] < 0.9 * dropped_once[1][0]


def test_dropout_is_reproducible(dropout_run, dropped_once):
    losses, _, params = dropout_run(mesh_of(1), 1, 1)
    assert losses == dropped_once[0]
    jax.tree.map(np.testing.assert_array_equal, params, dropped_once[2])


@pytest.fixture(scope="module", params=[1, 4, pytest.param(16, marks=pytest.mark.slow)])
def compiled(tiny_config, request):
    """The step for 8 devices, optimised by XLA, its state and the number of micro-batches."""
    traced, state = trace(dataclasses.replace(tiny_config, n_layer=1), mesh_of(8), request.param)
    return traced.lower().compile(), state, request.param


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


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_optimizer_runs_once_per_update_on_the_mean_gradient(tiny_config, batches, monkeypatch, accumulation):
    calls = []

    def update(grads, state, params=None, *, loss):
        jax.debug.callback(lambda norm: calls.append(float(norm)), optax.tree.norm(grads))
        return jax.tree.map(jnp.zeros_like, grads), state

    monkeypatch.setattr(step, "make_optimizer", lambda *_: optax.GradientTransformation(lambda params: (), update))
    _, norms, _ = run(dataclasses.replace(tiny_config, n_layer=1), mesh_of(1), batches, accumulation)
    jax.effects_barrier()
    assert calls == norms  # of as many updates as there are batches


def test_gradients_cross_the_mesh_once_per_update(compiled):
    program, state, accumulation = compiled
    text = program.as_text()
    bodies = computations(text)
    loops = re.findall(r"body=%?([\w.\-]+)", text)
    assert loops or accumulation == 1, "the micro-batches are a loop"
    for loop in loops:
        # Nothing is reduced in a micro-step.
        assert sum(reduced_bytes(bodies[name]) for name in called_from(loop, bodies)) == 0
    n_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    everywhere = sum(map(reduced_bytes, bodies.values()))
    assert n_bytes <= everywhere <= n_bytes + 16  # the gradients, and the scalar loss


def test_the_state_is_donated(compiled):
    program, state, _ = compiled
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= state_bytes


def moved(text, operation):
    """Result shapes of an operation in an HLO module's text, sorted."""
    results = re.findall(rf"= (.*?) {operation}(?:-start)?\(", text)
    assert not any(result.startswith("(") for result in results)
    return sorted(tuple(map(int, re.search(r"\[([\d,]+)\]", result)[1].split(","))) for result in results)


@pytest.mark.parametrize(
    ("data", "change"),
    [(2, {"scan_layers": True, "remat": "dots"}), pytest.param(1, {"n_layer": 1}, marks=pytest.mark.slow)],
)
def test_under_fsdp_only_parameters_and_gradients_move(tiny_config, data, change):
    traced, state = trace(dataclasses.replace(tiny_config, **change), mesh_of(data, 8 // data), 4)
    program = traced.lower().compile()
    text = program.as_text()
    gathered, scattered, whole_bytes, part_bytes = [], [], 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        part = leaf.sharding.shard_shape(leaf.shape)
        if part == leaf.shape:
            whole_bytes += 4 * leaf.size
            continue
        part_bytes += 4 * int(np.prod(part))
        stacked = path[0].key == "h"  # one block after the other, forward and backward
        gathered += [leaf.shape[stacked:]] * (1 + stacked)
        scattered.append(part[stacked:])
    assert moved(text, "all-gather") == sorted(gathered)
    assert moved(text, "reduce-scatter") == sorted(scattered)
    assert moved(text, "all-to-all") == moved(text, "collective-permute") == []

    # Vectors in every micro-step over `fsdp`; vectors and parts once per update over `data`; and scalars: the loss, and
    # one sum of squares for each parameter in the norms of gradient and parameters.
    bodies = computations(text)
    in_loops = set().union(*(called_from(loop, bodies) for loop in re.findall(r"body=%?([\w.\-]+)", text)))
    assert sum(reduced_bytes(bodies[name]) for name in in_loops) == whole_bytes
    over_data = whole_bytes + part_bytes if data > 1 else 0
    scalars = sum(map(reduced_bytes, bodies.values())) - whole_bytes - over_data
    assert 0 <= scalars <= 4 * (2 * len(jax.tree.leaves(state.params)) + 2)

    state_bytes = sum(
        leaf.dtype.itemsize * np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state)
    )
    assert program.memory_analysis().alias_size_in_bytes >= state_bytes


@pytest.mark.parametrize(("data", "fsdp"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_what_is_not_measured_is_not_in_the_step_and_what_is_measured_moves_scalars(tiny_config, data, fsdp):
    """All collectives of the compiled step: by kind, the calls and the bytes of one update."""
    mesh, micro_batches = mesh_of(data, fsdp), 4

    def compiled(**measured):
        traced, state = trace(dataclasses.replace(tiny_config, n_layer=1), mesh, micro_batches, **measured)
        after, metrics = traced.out_info
        assert jax.tree.structure(after) == jax.tree.structure(state)
        outputs = {name: value for name, value in metrics._asdict().items() if value is not None}
        found = read_collectives(HloModule(traced.lower().compile().as_text()), dict(mesh.shape))
        return outputs, {one.kind: (one.times, one.n_bytes) for one in found}, state.params

    # XLA removes what no output needs, so the outputs and the collectives are all that could be left of a measurement.
    outputs, plain, params = compiled()
    assert {name: value.shape for name, value in outputs.items()} == dict.fromkeys(PLAIN, ())
    split = [leaf.size for leaf in jax.tree.leaves(params) if "fsdp" in leaf.sharding.spec]
    whole = sum(leaf.size for leaf in jax.tree.leaves(params)) - sum(split)
    if data > 1:
        assert plain == {"all-reduce": (1, 4 * (whole + 1))}  # the gradient and the loss
    else:
        assert plain == {
            "all-gather": (len(split), 4 * sum(split)),
            "reduce-scatter": (micro_batches * len(split), micro_batches * 4 * sum(split)),
            # The gradients of vectors; the loss; a sum of squares for each split parameter in the norm of the gradient,
            # in the one that clips it, and in the norm of the new parameters.
            "all-reduce": (micro_batches + 2, micro_batches * 4 * whole + 4 * (1 + 3 * len(split))),
        }

    times, n_bytes = plain["all-reduce"]
    outputs, measured, _ = compiled(noise_scale=True)
    assert outputs.keys() == {*PLAIN, "micro_grad_norm"}
    # One scalar more over `data`, or a sum of squares for each split parameter in each micro-batch; no further call.
    scalars = 1 if data > 1 else micro_batches * len(split)
    assert measured == {**plain, "all-reduce": (times, n_bytes + 4 * scalars)}

    outputs, measured, _ = compiled(layers=True)
    assert outputs.keys() == {*PLAIN, "layers"}
    assert {name: value.shape for name, value in outputs["layers"].items()} == {
        "grad_norm": (4,),
        "update_ratio": (4,),
    }
    scalars = 3 * len(split)  # sums of squares of the gradient, of the update and of the weights
    assert measured == {**plain, "all-reduce": (times, n_bytes + 4 * scalars)}


def test_parameters_travel_in_bfloat16_and_gradients_in_float32(tiny_config):
    traced, state = trace(tiny_config, mesh_of(2, 4), 2, jnp.bfloat16)
    text = traced.lower().as_text()
    split = sum("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(state.params))
    for operation, dtype in (("all_gather", "bf16"), ("reduce_scatter", "f32"), ("all_reduce", "f32")):
        results = re.findall(rf'"stablehlo.{operation}".*?-> tensor<(?:\d+x)*(\w+)>', text, re.DOTALL)
        assert set(results) == {dtype}
        assert operation == "all_reduce" or len(results) == split


def test_a_state_is_the_same_on_every_mesh(tiny_config, tmp_path):
    """Bit for bit, through a checkpoint."""
    model = GPT2(tiny_config)
    states = {mesh: abstract_state(model, OPTIMIZER, mesh_of(*mesh)) for mesh in ((2, 4), (8, 1), (1, 8), (1, 1))}
    numbers = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: numbers.normal(size=leaf.shape).astype(leaf.dtype), states[2, 4])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, states[2, 4])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, jax.device_put(values, shardings), {})
        for abstract in states.values():
            restored = checkpoints.restore(1, abstract)
            jax.tree.map(np.testing.assert_array_equal, restored, values)
            assert jax.tree.all(
                jax.tree.map(lambda leaf, expected: leaf.sharding == expected.sharding, restored, abstract)
            )


def test_the_state_holds_no_accumulator(compiled):
    _, state, _ = compiled
    n_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * n_params + 10  # parameters and two moments


def test_evaluation_counts_every_target_once(tiny, batches):
    model, params = tiny
    tokens = batches[0].copy()
    tokens[3, 20:] = IGNORE
    tokens[7:] = IGNORE
    sums = []
    for mesh in (mesh_of(1), mesh_of(8), mesh_of(2, 4)):
        eval_step = make_eval_step(model, mesh)
        sums.append(jax.device_get(eval_step(params, put_batch(tokens, batch_sharding(mesh, leading_axis=False)))))
    assert sums[0][1] == sums[1][1] == sums[2][1] == 6 * 32 + 19
    assert float(sums[0][0]) == pytest.approx(float(sums[1][0]), rel=1e-6)
    assert float(sums[0][0]) == pytest.approx(float(sums[2][0]), rel=1e-6)
    logits = jax.jit(model.apply)({"params": params}, np.maximum(tokens[:7, :-1], 0))
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(tokens[:7, 1:], 0)[..., None], axis=-1)[..., 0]
    assert float(sums[0][0]) == pytest.approx(float(jnp.sum(nats * (tokens[:7, 1:] >= 0))), rel=1e-6)
