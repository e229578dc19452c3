"""The training step: one call is one optimizer update, whatever the number of micro-batches and devices.

The devices of the mesh axis `data` each scan their micro-batches; `optax.MultiSteps` accumulates inside that
scan, and only its last turn reduces the gradients over `data`, once, and runs the optimizer. `fsdp` is left to
the compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.config import IGNORE, OptimizerConfig
from gpt2_jax.loss import cross_entropy
from gpt2_jax.model import GPT2, Params, init_params
from gpt2_jax.optimizer import OncePerUpdateState, learning_rate_schedule, make_optimizer, once_per_update
from gpt2_jax.sharding import BATCH_AXES, batch_sharding, gather, state_sharding


class TrainState(NamedTuple):
    """All that changes from update to update. The data position follows from `step`.

    The accumulator of `optax.MultiSteps` is not here: it is zero between updates.
    """

    step: jax.Array  # int32 [], updates done
    params: Params
    opt_state: OncePerUpdateState


class Metrics(NamedTuple):
    """Of one update, over the whole batch and all devices: float32 scalars."""

    loss: jax.Array  # nats per token
    grad_norm: jax.Array  # global norm of the mean gradient, before clipping
    learning_rate: jax.Array


TrainStep = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]


def _manual(
    function: Callable[..., Any], model: GPT2, mesh: Mesh, axes: set[str], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` as each device of the mesh axes `axes` runs it, on its parts."""
    return jax.shard_map(
        function,
        mesh=None if jax.sharding.get_abstract_mesh().manual_axes else mesh,  # inside another one, its mesh
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=axes,
        # The proof that replicated results are equal everywhere; JAX's Pallas kernels cannot take part in it.
        check_vma=model.config.attention != "splash",
    )


def _axis(mesh: Mesh, name: str) -> tuple[str, ...]:
    """The axis, if it has more than one device: XLA refuses a reduction over an axis of one device beside one that
    it places itself."""
    return (name,) if mesh.shape[name] > 1 else ()


def _specs(model: GPT2, mesh: Mesh) -> Any:
    """How each parameter is split."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(lambda sharding: sharding.spec, state_sharding(mesh, shapes))


def _nats(model: GPT2, specs: Any, params: Params, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The sum of nats over tokens [batch, block_size + 1] of one device, which holds parts of `params`."""
    config = model.config
    if any("fsdp" in spec for spec in jax.tree.leaves(specs)):
        blocks = {name for name in params if name not in ("wte", "wpe", "ln_f")}
        in_block = jax.tree.map(lambda spec: P(*spec[1:]), specs["h"]) if config.scan_layers else specs["h_0"]
        model = model.clone(whole=functools.partial(gather, specs=in_block, dtype=model.dtype))
        params = {
            name: value if name in blocks else gather(value, specs[name], model.dtype) for name, value in params.items()
        }
    rngs = None if key is None else {"dropout": key}
    inputs, targets = jnp.maximum(tokens[:, :-1], 0), tokens[:, 1:]
    hidden = model.apply({"params": params}, inputs, key is None, method="hidden", rngs=rngs)
    return cross_entropy(hidden, params["wte"]["embedding"], targets, config.vocab_size, config.loss_chunk)


def _new_state(model: GPT2, config: OptimizerConfig, seed: int, params: Params | None = None) -> TrainState:
    params = params or init_params(model, jax.random.key(seed))
    optimizer = once_per_update(make_optimizer(config), mean_over=())
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(model: GPT2, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(functools.partial(_new_state, model, config, seed=0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, shapes),
    )


def state_shardings(model: GPT2, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, config, mesh))


def init_state(model: GPT2, config: OptimizerConfig, mesh: Mesh, seed: int, params: Params | None = None) -> TrainState:
    """A new state, created in place on the devices that hold its parts.

    Args:
        params: initial parameters, which are donated; drawn from `seed` by default.
    """
    init = functools.partial(_new_state, model, config, seed)
    shardings = state_shardings(model, config, mesh)
    state: TrainState = jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)
    return state


def make_train_step(model: GPT2, optimizer: OptimizerConfig, mesh: Mesh, seed: int) -> TrainStep:
    """The jitted step: (state, tokens) -> (state, metrics). The state is donated.

    `tokens` is int32 [micro_batches, sequences, block_size + 1], sequences split over the mesh. Each pair of
    lengths compiles once.
    """
    data, fsdp = _axis(mesh, "data"), _axis(mesh, "fsdp")
    inner = once_per_update(make_optimizer(optimizer), mean_over=data)
    schedule = learning_rate_schedule(optimizer)
    specs = _specs(model, mesh)

    def gradient(params: Params, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, Params]:
        """Of one micro-batch on one device: its share of the mean nats per token over `fsdp`, and the gradient of
        that mean with respect to the device's part of the parameters."""
        if fsdp:
            key = jax.random.fold_in(key, jax.lax.axis_index(fsdp))
        # As for `data` below: the whole parameters are shared, and their gradients summed once all are there.
        params = jax.tree.map(
            lambda part, spec: part if "fsdp" in spec else jax.lax.pcast(part, fsdp, to="varying"), params, specs
        )
        targets = tokens[:, 1:].size * mesh.shape["fsdp"]
        nats = functools.partial(_nats, model, specs, tokens=tokens, key=key if model.config.dropout else None)
        loss, grads = jax.value_and_grad(lambda params: nats(params) / targets)(params)
        return loss[None], jax.tree.map(
            lambda grad, spec: grad if "fsdp" in spec else jax.lax.psum(grad, fsdp), grads, specs
        )

    def update(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        micro_batches = tokens.shape[0]
        multi_steps = optax.MultiSteps(inner, every_k_schedule=micro_batches)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(data) if data else 0)
        # Gradients with respect to parameters that count as different on each device: with respect to shared
        # ones, differentiation itself would add a reduction to every micro-step.
        params = jax.lax.pcast(state.params, data, to="varying")
        over_fsdp = _manual(gradient, model, mesh, {"fsdp"}, (specs, P(fsdp), P()), (P(fsdp), specs))

        def micro_step(
            carry: tuple[optax.MultiStepsState, jax.Array, Any], batch: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[optax.MultiStepsState, jax.Array, Any], None]:
            opt_state, total, _ = carry
            index, tokens = batch
            loss, grads = over_fsdp(params, tokens, jax.random.fold_in(key, index))
            emit = opt_state.mini_step == micro_batches - 1
            updates, opt_state = multi_steps.update(grads, opt_state, state.params, emit=emit)
            return (opt_state, total + loss, updates), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        start = optax.MultiStepsState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=state.step,
            inner_opt_state=state.opt_state,
            acc_grads=jax.lax.pcast(zeros, data, to="varying"),
            skip_state=(),
        )
        carry = (start, jax.lax.pcast(jnp.zeros(mesh.shape["fsdp"], jnp.float32), data, to="varying"), zeros)
        (opt_state, total, updates), _ = jax.lax.scan(micro_step, carry, (jnp.arange(micro_batches), tokens))
        new = TrainState(opt_state.gradient_step, optax.apply_updates(state.params, updates), opt_state.inner_opt_state)
        loss = jnp.sum(total) / micro_batches
        loss = jax.lax.pmean(loss, data)
        return new, Metrics(loss, new.opt_state.grad_norm, schedule(state.step))

    sharded = _manual(update, model, mesh, {"data"}, in_specs=(P(), P(None, data)), out_specs=(P(), P()))
    shardings = state_shardings(model, optimizer, mesh)
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        sharded,
        in_shardings=(shardings, batch_sharding(mesh, micro_batches=True)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def make_eval_step(model: GPT2, mesh: Mesh) -> EvalStep:
    """The jitted evaluation: (params, tokens) -> (sum of nats, number of targets), float32 and int32 scalars.

    `tokens` is int32 [sequences, block_size + 1], sequences split over the mesh; `IGNORE` fills up.
    """
    specs = _specs(model, mesh)
    axes = _axis(mesh, "data") + _axis(mesh, "fsdp")

    def evaluate(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = _nats(model, specs, params, tokens), jnp.sum(tokens[:, 1:] != IGNORE)
        return jax.lax.psum(sums, axes)

    sharded = _manual(evaluate, model, mesh, set(BATCH_AXES), in_specs=(specs, P(axes)), out_specs=P())
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        sharded,
        in_shardings=(None, batch_sharding(mesh, micro_batches=False)),
        out_shardings=(replicated, replicated),
    )
