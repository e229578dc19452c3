"""The training step: one call is one optimizer update, for any number of micro-batches and devices.

Each device of the mesh axis `data` scans its micro-batches and accumulates their gradients. After the scan, one
all-reduce over `data` averages them, and the optimizer runs once.

Inside, `fsdp` shards each micro-batch and the parameters. The devices gather a block's parameters where the block uses
them (again in the backward pass under `remat`) and reduce-scatter its gradients (ZeRO stage 3, Rajbhandari et al.
2020). `data` is manual everywhere. `fsdp` is manual in the gradient, so that we place the gathers. It is automatic in
the optimizer, so that Optax's global norm needs no change: XLA inserts the reduction over the shards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import BACKENDS
from gpt2_jax.compiler_options import Options
from gpt2_jax.config import IGNORE, OptimizerConfig
from gpt2_jax.layers import STACKED, norms_by_layer
from gpt2_jax.loss import cross_entropy
from gpt2_jax.loss_scale import current_scale, value_and_grad
from gpt2_jax.model import GPT2, Params, abstract_params, init_params
from gpt2_jax.optimizer import gradient_accumulator, learning_rate_schedule, make_optimizer
from gpt2_jax.outliers import pass_over
from gpt2_jax.sharding import BATCH_AXES, batch_sharding, gather, state_sharding, with_shardings


class TrainState(NamedTuple):
    """Everything that changes from update to update. The data position follows from `step`.

    The accumulator of `optax.MultiSteps` is not part of it: each update starts a new one.
    """

    step: jax.Array  # int32 [], updates done
    params: Params
    opt_state: optax.OptState


class Metrics(NamedTuple):
    """Metrics of one update over the whole batch and all devices: scalars, float32 unless a line says otherwise."""

    loss: jax.Array  # mean nats per token
    grad_norm: jax.Array  # global norm of the mean gradient, before clipping
    learning_rate: jax.Array
    param_norm: jax.Array  # global norm of the new parameters: finite only if all of them are
    outlier: jax.Array | None = None  # int32, 1 if the update is one; None if nothing watches for them
    loss_scale: jax.Array | None = None  # of this update; None but for float16
    overflows: jax.Array | None = None  # int32, updates so far whose gradients were not finite, this one included
    micro_grad_norm: jax.Array | None = None  # root mean square of the norms of the gradients that `grad_norm` averages
    # By name of the statistic, each [n_layer] or as `layers.norms_by_layer`; None unless they are wanted.
    layers: dict[str, jax.Array] | None = None


class TrainStep(Protocol):
    """A jitted training step."""

    def __call__(self, state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        """Runs one update. The state is donated."""

    def trace(self, state: TrainState, tokens: jax.ShapeDtypeStruct) -> jax.stages.Traced:
        """`jax.jit(...).trace`; the state may be abstract."""

    def lower(self, state: TrainState, tokens: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """`jax.jit(...).lower`; the state may be abstract."""


EvalStep = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]
# (params, tokens, dropout key) -> each fsdp shard's part of the loss, float32 [fsdp], and the gradient of their sum.
LossAndGrads = Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Params]]


# --- the state -----------------------------------------------------------------------------------------


def init_state(model: GPT2, config: OptimizerConfig, mesh: Mesh, seed: int, params: Params | None = None) -> TrainState:
    """A new state, created in place on the devices that hold its shards.

    Args:
        params: initial parameters, which are donated; random from `seed` by default.
    """
    init = functools.partial(_new_state, model, config, seed)
    shardings = state_shardings(model, config, mesh)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def abstract_state(model: GPT2, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(functools.partial(_new_state, model, config, 0), abstract_params(model))
    return with_shardings(shapes, state_sharding(mesh, shapes))


def state_shardings(model: GPT2, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, config, mesh))


def _new_state(model: GPT2, config: OptimizerConfig, seed: int, params: Params | None = None) -> TrainState:
    params = params or init_params(model, jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config, model.dtype).init(params))


# --- training ------------------------------------------------------------------------------------------


def make_train_step(
    model: GPT2,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    seed: int,
    options: Options | None = None,
    noise_scale: bool = False,
    layers: bool = False,
) -> TrainStep:
    """The jitted step: (state, tokens) -> (state, metrics). The state is donated.

    `tokens` is int32 [micro_batches, sequences, block_size + 1], sequences sharded over the mesh. Each pair of
    `micro_batches` and `sequences` compiles once. `options` are those of XLA. `noise_scale` adds `micro_grad_norm` to
    the metrics, over the micro-batches of all devices on `data`. `layers` adds the norms of each layer's gradient, and
    of its update over its weights.
    """
    data = mesh_axis(mesh, "data")
    chain, schedule = make_optimizer(optimizer, model.dtype), learning_rate_schedule(optimizer)
    loss_and_grads = _make_loss_and_grads(model, mesh)

    def update(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(data) if data else 0)
        # Differentiate with respect to device-varying parameters: for replicated ones, differentiation itself inserts
        # a psum over `data` into every micro-step.
        params = jax.lax.pcast(state.params, data, to="varying")
        scale = current_scale(state.opt_state)
        gradient = functools.partial(loss_and_grads, scale)
        means = _mean_over_micro_batches(gradient, params, tokens, key, data, mesh.shape["fsdp"], noise_scale)
        loss, grads, square = jax.lax.pmean(means, data)  # the only reduction over `data`
        with jax.named_scope("optimizer"):
            updates, opt_state = chain.update(grads, state.opt_state, state.params, loss=loss)
            new_params = optax.apply_updates(state.params, updates)
            norms = optax.tree.norm(grads), optax.tree.norm(new_params)
            ratio = norms_by_layer(updates) / norms_by_layer(state.params) if layers else None
        outlier, overflows = (optax.tree.get(opt_state, name) for name in ("outlier", "overflows"))
        metrics = Metrics(
            loss,
            norms[0],
            schedule(state.step),
            norms[1],
            outlier,
            jnp.asarray(scale.scale) if scale else None,
            overflows,
            None if square is None else jnp.sqrt(square),
            None if ratio is None else {"grad_norm": norms_by_layer(grads), "update_ratio": ratio},
        )
        return TrainState(state.step + 1, new_params, opt_state), metrics

    shardings, replicated = state_shardings(model, optimizer, mesh), NamedSharding(mesh, P())
    return jax.jit(
        shard_map(update, model, mesh, {"data"}, in_specs=(P(), P(None, data)), out_specs=(P(), P())),
        in_shardings=(shardings, batch_sharding(mesh, leading_axis=True)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=options,
    )


@functools.partial(jax.jit, donate_argnums=0)
def skip_update(state: TrainState) -> TrainState:
    """The state after an update that is passed over: see `outliers.pass_over`. The state is donated."""
    return TrainState(state.step + 1, state.params, pass_over(state.opt_state))


def _mean_over_micro_batches(
    loss_and_grads: LossAndGrads,
    params: Params,
    tokens: jax.Array,
    key: jax.Array,
    data: tuple[str, ...],
    fsdp: int,
    squares: bool,
) -> tuple[jax.Array, Params, jax.Array | None]:
    """The mean loss, float32 [], the mean gradient, and the mean squared norm of gradients on one device of `data`.

    Args:
        tokens: int32 [micro_batches, sequences, time + 1].
        data: the mesh axis `data`, if it has several devices.
        fsdp: the number of devices on the mesh axis `fsdp`.
        squares: the squared norms are wanted; otherwise None is returned for them.
    """

    def square(grads: Params) -> jax.Array | None:
        return optax.tree.norm(grads, squared=True) if squares else None

    micro_batches = tokens.shape[0]
    if micro_batches == 1:
        # Nothing to accumulate. In a loop of one iteration, XLA's TPU compiler hoists half of the loss out of the loop
        # and computes the logits twice.
        loss, grads = loss_and_grads(params, tokens[0], jax.random.fold_in(key, 0))
        return jnp.sum(loss) / micro_batches, grads, square(grads)
    accumulator = gradient_accumulator()

    def micro_step(
        carry: tuple[optax.MultiStepsState, jax.Array], batch: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[optax.MultiStepsState, jax.Array], jax.Array | None]:
        accumulation, loss_sum = carry
        index, tokens = batch
        loss, grads = loss_and_grads(params, tokens, jax.random.fold_in(key, index))
        with jax.named_scope("accumulation"):
            _, accumulation = accumulator.update(grads, accumulation)
        return (accumulation, loss_sum + loss), square(grads)

    # A scan carry has one type throughout, so the initial sum has to vary over `data` like the losses.
    loss_sum = jax.lax.pcast(jnp.zeros(fsdp, jnp.float32), data, to="varying")
    start = accumulator.init(params), loss_sum
    (accumulation, loss_sum), all_squares = jax.lax.scan(micro_step, start, (jnp.arange(micro_batches), tokens))
    mean_square = None if all_squares is None else jnp.mean(all_squares)
    return jnp.sum(loss_sum) / micro_batches, accumulation.acc_grads, mean_square


def _make_loss_and_grads(model: GPT2, mesh: Mesh) -> Callable[..., tuple[jax.Array, Params]]:
    """Loss and gradient of one micro-batch [sequences, time + 1], manual over `fsdp`: `LossAndGrads` after a scale."""
    fsdp = mesh_axis(mesh, "fsdp")
    specs = param_specs(model, mesh)
    loss_of = functools.partial(_mean_loss, model, specs, mesh.shape["fsdp"])

    def map_replicated(function: Callable[[jax.Array], jax.Array], tree: Params) -> Params:
        return jax.tree.map(lambda leaf, spec: leaf if "fsdp" in spec else function(leaf), tree, specs)

    def loss_and_grads(
        scale: DynamicScale | None, params: Params, tokens: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Params]:
        if fsdp:
            key = jax.random.fold_in(key, jax.lax.axis_index(fsdp))
        # Mark replicated leaves as device-varying, so that differentiation inserts no psum, and sum them afterwards.
        params = map_replicated(lambda leaf: jax.lax.pcast(leaf, fsdp, to="varying"), params)
        loss, grads = value_and_grad(loss_of, scale)(params, tokens, key)
        return loss[None], map_replicated(lambda grad: jax.lax.psum(grad, fsdp), grads)

    return shard_map(loss_and_grads, model, None, {"fsdp"}, (P(), specs, P(fsdp), P()), (P(fsdp), specs))


def _mean_loss(model: GPT2, specs: Any, fsdp: int, params: Params, tokens: jax.Array, key: jax.Array) -> jax.Array:
    """One fsdp shard's part of a micro-batch's mean loss in nats per token, float32 []."""
    config = model.config
    model, params = gather_params(model, params, specs)
    rngs = {"dropout": key} if config.dropout else None
    hidden = model.apply({"params": params}, tokens[:, :-1], not config.dropout, method="hidden", rngs=rngs)
    targets = tokens[:, 1:]
    with jax.named_scope("head_and_loss"):
        loss_sum = cross_entropy(hidden, params["wte"]["embedding"], targets, config.vocab_size, config.loss_chunk)
    return loss_sum / (targets.size * fsdp)


# --- evaluation ----------------------------------------------------------------------------------------


def make_eval_step(model: GPT2, mesh: Mesh, options: Options | None = None) -> EvalStep:
    """The jitted evaluation: (params, tokens) -> (loss sum in nats, number of targets), float32 and int32 scalars.

    `tokens` is int32 [sequences, block_size + 1], sequences sharded over the mesh. `IGNORE` marks padding. `options`
    are those of XLA.
    """
    config = model.config
    axes = mesh_axis(mesh, "data") + mesh_axis(mesh, "fsdp")
    specs = param_specs(model, mesh)

    def evaluate(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        gathering, params = gather_params(model, params, specs)
        targets = tokens[:, 1:]
        hidden = gathering.apply({"params": params}, jnp.maximum(tokens[:, :-1], 0), method="hidden")
        loss_sum = cross_entropy(hidden, params["wte"]["embedding"], targets, config.vocab_size, config.loss_chunk)
        return jax.lax.psum((loss_sum, jnp.sum(targets != IGNORE)), axes)

    replicated = NamedSharding(mesh, P())
    return jax.jit(
        shard_map(evaluate, model, mesh, set(BATCH_AXES), in_specs=(specs, P(axes)), out_specs=P()),
        in_shardings=(None, batch_sharding(mesh, leading_axis=False)),
        out_shardings=(replicated, replicated),
        compiler_options=options,
    )


# --- sharding helpers ----------------------------------------------------------------------------------


def shard_map(
    function: Callable[..., Any], model: GPT2, mesh: Mesh | None, axes: set[str], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map`, manual over `axes`. `mesh` is None when nested in another shard_map."""
    check_vma = model.config.attention == "auto" or BACKENDS[model.config.attention].check_vma
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=check_vma
    )


def mesh_axis(mesh: Mesh, name: str) -> tuple[str, ...]:
    """The axis as a tuple, which is empty for a single device.

    XLA refuses a reduction over an axis of one device together with an axis that it shards itself.
    """
    return (name,) if mesh.shape[name] > 1 else ()


def param_specs(model: GPT2, mesh: Mesh) -> Any:
    """The `PartitionSpec` of every parameter on the mesh."""
    return jax.tree.map(lambda sharding: sharding.spec, state_sharding(mesh, abstract_params(model)))


def gather_params(model: GPT2, params: Params, specs: Any) -> tuple[GPT2, Params]:
    """A model that gathers each block's parameters inside the block. The parameters outside the blocks are gathered."""
    if not any("fsdp" in spec for spec in jax.tree.leaves(specs)):
        return model, params
    block = jax.tree.map(lambda spec: P(*spec[1:]), specs[STACKED]) if STACKED in specs else specs["h_0"]
    model = model.clone(gather_params=functools.partial(gather, specs=block, dtype=model.dtype))
    outside = {name: gather(params[name], specs[name], model.dtype) for name in ("wte", "wpe", "ln_f")}
    return model, params | outside
