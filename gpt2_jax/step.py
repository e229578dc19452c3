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
from gpt2_jax.sharding import batch_sharding, state_sharding


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


def _manual_axes(mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes that the step handles itself. `fsdp` of 1 joins them, so that kernels see plain local arrays."""
    return ("data", "fsdp") if mesh.shape["fsdp"] == 1 else ("data",)


def _reduced_axes(mesh: Mesh) -> tuple[str, ...]:
    """The manual axes over which there is something to reduce. XLA refuses a reduction over an axis of one device
    beside one that it places itself."""
    return tuple(axis for axis in _manual_axes(mesh) if mesh.shape[axis] > 1)


def _manual(function: Callable[..., Any], model: GPT2, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` per device of the manual axes, the compiler taking care of the others."""
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(_manual_axes(mesh)),
        # The proof that replicated results are equal everywhere; JAX's Pallas kernels cannot take part in it.
        check_vma=model.config.attention != "splash",
    )


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
    config = model.config
    axes = _reduced_axes(mesh)
    inner = once_per_update(make_optimizer(optimizer), mean_over=axes)
    schedule = learning_rate_schedule(optimizer)

    def micro_loss(params: Params, tokens: jax.Array, key: jax.Array) -> jax.Array:
        """Mean nats per token of one micro-batch on one device."""
        rngs = {"dropout": key} if config.dropout else None
        hidden = model.apply({"params": params}, tokens[:, :-1], not config.dropout, method="hidden", rngs=rngs)
        targets = tokens[:, 1:]
        total = cross_entropy(hidden, params["wte"]["embedding"], targets, config.vocab_size, config.loss_chunk)
        return total / targets.size

    def update(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        micro_batches = tokens.shape[0]
        multi_steps = optax.MultiSteps(inner, every_k_schedule=micro_batches)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(axes) if axes else 0)
        # Gradients with respect to parameters that count as different on each device: with respect to shared
        # ones, differentiation itself would add a reduction to every micro-step.
        params = jax.lax.pcast(state.params, axes, to="varying")

        def micro_step(
            carry: tuple[optax.MultiStepsState, jax.Array, Any], batch: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[optax.MultiStepsState, jax.Array, Any], None]:
            opt_state, total, _ = carry
            index, tokens = batch
            loss, grads = jax.value_and_grad(micro_loss)(params, tokens, jax.random.fold_in(key, index))
            emit = opt_state.mini_step == micro_batches - 1
            updates, opt_state = multi_steps.update(grads, opt_state, state.params, emit=emit)
            return (opt_state, total + loss, updates), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        start = optax.MultiStepsState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=state.step,
            inner_opt_state=state.opt_state,
            acc_grads=jax.lax.pcast(zeros, axes, to="varying"),
            skip_state=(),
        )
        carry = (start, jax.lax.pcast(jnp.zeros((), jnp.float32), axes, to="varying"), zeros)
        (opt_state, total, updates), _ = jax.lax.scan(micro_step, carry, (jnp.arange(micro_batches), tokens))
        new = TrainState(opt_state.gradient_step, optax.apply_updates(state.params, updates), opt_state.inner_opt_state)
        loss = jax.lax.pmean(total / micro_batches, axes) if axes else total / micro_batches
        return new, Metrics(loss, new.opt_state.grad_norm, schedule(state.step))

    sharded = _manual(update, model, mesh, in_specs=(P(), P(None, axes)), out_specs=(P(), P()))
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
    config = model.config
    axes = _reduced_axes(mesh)

    def evaluate(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        targets = tokens[:, 1:]
        hidden = model.apply({"params": params}, jnp.maximum(tokens[:, :-1], 0), method="hidden")
        total = cross_entropy(hidden, params["wte"]["embedding"], targets, config.vocab_size, config.loss_chunk)
        sums = total, jnp.sum(targets != IGNORE)
        return jax.lax.psum(sums, axes) if axes else sums

    sharded = _manual(evaluate, model, mesh, in_specs=(P(), P(axes)), out_specs=(P(), P()))
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        sharded,
        in_shardings=(None, batch_sharding(mesh, micro_batches=False)),
        out_shardings=(replicated, replicated),
    )
